"""Hugging Face's image datasets: hf:OWNER/NAME/SPLIT[@REVISION], or parquet files.

The package datasets converts them once to an Arrow file in its cache (HF_HOME), from which any image is read at once.
An image is named CLASS/NAME, as in class folders, and so is the order; labels are the dataset's own.
"""
import glob
import os
from collections import Counter
from dataclasses import dataclass

from models import FlowARError
from models.hub import HUB, explain, split_hub_name
from models.settings import setting
from util.data.folders import Listing, is_hidden, number_names

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels")  # where a column's type does not tell


@dataclass
class Columns:
    """hf: and parquet data"""
    image_column_name: str = setting(None, "image column; default: image, img or the only one of images", str,
                                     beyond=True)
    label_column_name: str = setting(None, "label column, integers or strings; default: label, labels or the only "
                                     "ClassLabel column", str, beyond=True)
    dataset_config_name: str = setting(None, "configuration of the dataset, or subfolder of a local one",
                                       str, beyond=True)


class Table(Listing):
    """Images of a dataset of Hugging Face. columns: Columns, or options that have them."""

    def __init__(self, root, columns=Columns()):
        import pyarrow.compute as pc
        self.config = columns.dataset_config_name
        data = load_table(root, self.config)
        self.column, label_column = find_columns(root, data.features, columns)
        classes, labels = number_labels(root, data.features[label_column], data[label_column][:])
        self.rows = only_bytes(data, self.column)
        images = self.rows.with_format("arrow")[:][self.column]
        sizes = pc.binary_length(pc.struct_field(images, "bytes")).to_pylist()
        if None in sizes:
            raise FlowARError(f"{root}: row {sizes.index(None)} contains no image data: if the images are separate "
                              "files, download the dataset (hf download --repo-type dataset) and pass its class "
                              "folders")
        files = [os.path.basename(name or "") for name in pc.struct_field(images, "path").to_pylist()]
        folders = [name.replace("/", "_") for name in classes]
        names = [f"{folders[label]}/{file}" for label, file in zip(labels, files)]
        if not all(files) or len(set(zip(labels, names))) < len(names):
            names = [f"{folders[label]}/{row:08d}" for row, label in enumerate(labels)]
        rows = [(label, name, size, row) for row, (label, name, size) in enumerate(zip(labels, names, sizes))]
        super().__init__(root, classes, sorted(rows), Counter(), "the dataset")

    @staticmethod
    def is_at(path):
        return is_hub(path) or bool(parquet_files(path))

    def read(self, index):
        return self.rows[int(self.places[index])][self.column]["bytes"]

    def __getstate__(self):
        return {**self.__dict__, "rows": None}

    def __setstate__(self, state):
        """Every host has a cache of its own."""
        self.__dict__.update(state)
        self.rows = only_bytes(load_table(self.root, self.config), self.column)


def is_hub(path):
    return str(path).startswith(HUB)


def parquet_files(path):
    """The parquet files of a split: all of a folder without other folders, PATH.parquet, PATH-00000-of-00010.parquet,
    or the latter in a folder data/ beside, as on the hub.
    """
    folder, name = os.path.split(str(path))
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            if any(entry.is_dir() and not is_hidden(entry.name) for entry in entries):
                return []
        return sorted(glob.glob(os.path.join(glob.escape(str(path)), "*.parquet")))
    folder, name = glob.escape(folder), glob.escape(name)
    for pattern in (f"{name}.parquet", f"{name}-[0-9]*.parquet", f"data/{name}-[0-9]*.parquet"):
        if files := sorted(glob.glob(os.path.join(folder, pattern))):
            return files
    return []


def split_names(path, config=None):
    """Names of the splits of hf:OWNER/NAME."""
    import datasets
    repository, _, revision = split_hub_name(path)
    return datasets.get_dataset_split_names(repository, config, revision=revision)


def load_table(path, config=None):
    """The datasets.Dataset of a path, in the package's cache."""
    import datasets
    if files := parquet_files(path):
        with explain(path):
            return datasets.load_dataset("parquet", data_files={"train": files}, split="train", keep_in_memory=False)
    repository, split, revision = split_hub_name(path)
    if split is None:
        names = ", ".join(split_names(path, config))
        raise FlowARError(f"{path}: expected hf:OWNER/NAME/SPLIT with SPLIT one of {names}")
    with explain(path):
        return datasets.load_dataset(repository, config, split=split, revision=revision, keep_in_memory=False)


def only_bytes(data, column):
    """The column of images, each {bytes, path}."""
    import datasets
    return data.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def find_columns(path, features, chosen):
    """Names of the columns of images and labels. chosen: Columns."""
    import datasets
    images = find_column(path, features, datasets.Image, IMAGE_COLUMNS, "image_column_name", chosen)
    return images, find_column(path, features, datasets.ClassLabel, LABEL_COLUMNS, "label_column_name", chosen)


def find_column(path, features, kind, usual_names, option, chosen):
    """The column that an option of Columns names, else one of a usual name, else the only one of this kind."""
    columns = [name for name in usual_names if name in features][:1]
    if not columns:
        columns = [name for name, feature in features.items() if isinstance(feature, kind)]
    if getattr(chosen, option):
        columns = [getattr(chosen, option)]
    if len(columns) != 1 or columns[0] not in features:
        raise FlowARError(f"{path}: set --{option} to one of its columns: {', '.join(features)}")
    return columns[0]


def number_labels(path, feature, values):
    """(names of the classes, label of every row) of a column."""
    import datasets
    names = None
    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
    elif all(isinstance(value, str) for value in values):
        names = sorted(set(values))
        labels = {name: label for label, name in enumerate(names)}
        values = [labels[value] for value in values]
    for row, value in enumerate(values):
        if type(value) is not int or value < 0:
            raise FlowARError(f"{path}: row {row} has label {value!r}: expected integers from 0; a split without "
                              "labels cannot be used for training")
    return names or number_names(max(values, default=-1) + 1), values
