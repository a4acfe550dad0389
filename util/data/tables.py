"""Hugging Face's image datasets: hf:OWNER/NAME/SPLIT[@REVISION], or a folder of parquet files.

The package datasets makes an Arrow file of them once, in its cache (HF_HOME), of which any image is read at once. An
image is named CLASS/NAME, as in class folders, and so is the order; labels are the dataset's own.
"""
import functools
import glob
import os
from collections import Counter

import numpy as np

from models import FlowARError
from models.errors import first_line
from models.hub import HUB, parse
from util.cluster import first_on_host
from util.data.folders import Packed, check_listed, is_left_behind, pack

MOST_CLASSES = 2**20  # of a dataset that does not name them
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels")  # where a column's type does not tell


def package():
    try:
        import datasets
    except ImportError as error:
        raise FlowARError("Hugging Face's datasets and parquet files are read by the package datasets, which is not "
                          "installed: pip install datasets") from error
    return datasets


def is_hub(path):
    return str(path).startswith(HUB)


def parquet_files(path):
    """The parquet files of a split: all of a folder without other folders, PATH.parquet, PATH-00000-of-00010.parquet,
    or the latter in a folder data/ beside, as on the hub.
    """
    folder, name = os.path.split(str(path))
    if os.path.isdir(path):
        with os.scandir(path) as found:
            if any(entry.is_dir() and not is_left_behind(entry.name) for entry in found):
                return []
        return sorted(glob.glob(os.path.join(glob.escape(str(path)), "*.parquet")))
    whole, part = f"{glob.escape(name)}.parquet", f"{glob.escape(name)}-[0-9]*.parquet"
    places = [os.path.join(glob.escape(folder), pattern) for pattern in (whole, part, os.path.join("data", part))]
    return next(filter(None, (sorted(glob.glob(place)) for place in places)), [])


def is_table(path):
    return is_hub(path) or bool(parquet_files(path))


def split_names(path):
    """Names of the splits of hf:OWNER/NAME."""
    repository, _, revision = parse(path)
    return tried(path, lambda: package().get_dataset_split_names(repository, revision=revision))


def tried(path, function):
    try:
        return function()
    except FlowARError:
        raise
    except Exception as error:  # of the network, the disk, the file: the package's own kinds change with its versions
        raise FlowARError(f"{path}: cannot be opened as a dataset ({type(error).__name__}: {first_line(error)}); is "
                          "the name right, does it ask for an account (hf auth login), is it parquet?") from error


@functools.lru_cache(maxsize=2)  # of training and of validation
def load(path):
    """The datasets.Dataset of a path, in the package's cache."""
    datasets, files = package(), [] if is_hub(path) else parquet_files(path)
    if files:
        what = dict(path="parquet", data_files={"train": files}, split="train")
    else:
        repository, split, revision = parse(path)
        what = dict(path=repository, split=split, revision=revision)
    return tried(path, lambda: datasets.load_dataset(**what, keep_in_memory=False))


@functools.lru_cache(maxsize=4)  # datasets, in every process
def reopened(files, column):
    """The images of Arrow files, which are mapped."""
    datasets = package()
    data = datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
    return as_bytes(data, column)


def as_bytes(data, column):
    """Only a column of images, as {bytes, path}."""
    return data.select_columns([column]).cast_column(column, package().Image(decode=False))


def find_columns(path, features):
    """Names of the columns of images and labels."""
    datasets = package()
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    found = [next((name for name in names if name in features), typed[0] if len(typed) == 1 else None)
             for names, typed in ((IMAGE_COLUMNS, images), (LABEL_COLUMNS, labels))]
    for name, names, what in zip(found, (IMAGE_COLUMNS, LABEL_COLUMNS), ("images", "labels")):
        if name is None:
            raise FlowARError(f"{path}: none of its columns is known to hold the {what} ({', '.join(features)}): "
                              f"rename that one to {names[0]} (rename_column of datasets) and give a folder of the "
                              "parquet files")
    return found


def read_labels(path, kind, values):
    """(names of the classes, label of every row) of a column and its type."""
    names = list(kind.names) if isinstance(kind, package().ClassLabel) else None
    if names is None and values and all(isinstance(value, str) for value in values):
        names = sorted(set(values))
        values = list(map({name: label for label, name in enumerate(names)}.get, values))
    room = len(names) if names else MOST_CLASSES
    for row, value in enumerate(values):
        if type(value) is not int or not 0 <= value < room:
            raise FlowARError(f"{path}: row {row} has the label {value!r}, expected a whole number from 0 to "
                              f"{room - 1}: a split without labels cannot be trained on")
    return names or numbered(max(values, default=-1) + 1), np.array(values, np.int32)


class Table(Packed):
    """Images of a dataset: by number, the row they are in."""

    def __init__(self, root, classes, part, rows, labels, column):
        super().__init__(root, classes, [part], part.left_out)
        self.rows, self.labels, self.column, self.labels_from = rows, labels, column, "the dataset"
        self.files = arrow_files(root)

    def prepare(self):
        with first_on_host():  # the cache is the host's own
            self.files = arrow_files(self.root)

    def read(self, index):
        return reopened(self.files, self.column)[int(self.rows[index])][self.column]["bytes"]


def arrow_files(path):
    return tuple(file["filename"] for file in load(path).cache_files)


def list_table(path):
    """Listing of a dataset's images."""
    data = load(path)
    import pyarrow.compute as pc  # comes with the package, which load() asks for
    column, label_column = find_columns(path, data.features)
    classes, labels = read_labels(path, data.features[label_column], data[label_column][:])
    images = tried(path, lambda: as_bytes(data, column).with_format("arrow")[:][column])
    sizes = pc.binary_length(pc.struct_field(images, "bytes")).to_pylist()
    if None in sizes:
        raise FlowARError(f"{path}: row {sizes.index(None)} holds no image: a dataset whose images are files of their "
                          "own is read as class folders: download it (hf download --repo-type dataset)")
    files = [os.path.basename(name or "") for name in pc.struct_field(images, "path").to_pylist()]
    folders = [name.replace("/", "_") for name in classes]
    named = [(label, f"{folders[label]}/{file}") for label, file in zip(labels.tolist(), files)]
    if not all(files) or len(set(named)) < len(named):
        named = [(label, f"{folders[label]}/{row:08d}") for row, label in enumerate(labels.tolist())]
    rows = sorted(range(len(named)), key=named.__getitem__)
    part = pack([(os.fsencode(named[row][1]), sizes[row], 0) for row in rows], Counter())
    order = np.array(rows, np.int64)
    return check_listed(Table(path, classes, part, order, labels[order], column))


def numbered(count):
    """Names of classes that have none: in the order of text too."""
    return [f"{label:0{len(str(count - 1))}d}" for label in range(count)]
