"""Where images lie: a folder of class folders, an archive of them, a Hugging Face dataset. Each is listed by one rule,
and named by a path: imagenet/train, imagenet.zip/train, imagenet/train.zip, hf:OWNER/NAME/train.
"""
import json
import os
from collections import Counter

import numpy as np

from models import FlowARError
from models.errors import name_some, reading
from util.cluster import from_main, log
from util.data.archives import COMPRESSED, SUFFIXES, find_archive, has_folder, list_archive, names_below, read_file
from util.data.folders import LABELS_FILE, list_classes, list_files, name_classes
from util.data.tables import MOST_CLASSES, is_hub, is_table, list_table, numbered, split_names

SPLITS = {"train": ("train",), "val": ("val", "validation", "test")}  # what Hugging Face's datasets call them


def is_there(path):
    """Whether something lies at a path that list_images may read."""
    if is_table(path):
        return True
    return has_folder(path) if find_archive(path) else os.path.isdir(path) and bool(os.listdir(path))


def list_images(path):
    """Listing of the images of a path with their classes, or FlowARError."""
    if is_table(path):
        return list_table(str(path))
    archive = find_archive(path)
    if (labels := labels_of(path, archive)) is not None:
        return relabelled(list_archive(path, flat=True) if archive else list_files(path), labels)
    return list_archive(path) if archive else list_classes(path)


def name_images(path):
    """Names of the classes in the order of their labels; of class folders, what is in them is not looked at."""
    listed = is_table(path) or find_archive(path) or os.path.isfile(os.path.join(path, LABELS_FILE))
    return list_images(path).classes if listed else name_classes(path)


def labels_of(path, archive):
    """{name: label} of EDM's dataset.json, None without it. Beside it the folders are no classes, only thousands."""
    file = os.path.join(path, LABELS_FILE)
    with reading(file):
        if archive:
            text = read_file(file)
        elif os.path.isfile(file):
            with open(file, "rb") as found:
                text = found.read()
        else:
            text = None
    try:
        labels = json.loads(text or "null")["labels"]
    except (ValueError, TypeError, KeyError, RecursionError):  # another file of that name
        return None
    if not labels:
        raise FlowARError(f"{file}: it says that the images have no labels, and beside it folders are no classes: "
                          "images without classes go into one folder, without that file")
    if not isinstance(labels, list) or not all(
            isinstance(pair, list) and [type(part) for part in pair] == [str, int] and 0 <= pair[1] < MOST_CLASSES
            for pair in labels) or len(dict(labels)) < len(labels):
        raise FlowARError(f"{file}: its labels are not a list of [name, whole number from 0 on], each name once")
    return dict(labels)


def relabelled(listing, labels):
    """A Listing without classes with those of labels_of."""
    names = [listing.name(i) for i in range(len(listing))]
    for what, some in (("has no label for", [name for name in names if name not in labels]),
                       ("names files that are not there or no images:", sorted(labels.keys() - set(names)))):
        if some:
            raise FlowARError(f"{listing.root}/{LABELS_FILE} {what} {name_some(some, 3)}: put the right one there, or "
                              "remove it if the folders are the classes")
    listing.labels = np.array([labels[name] for name in names], np.int32)
    listing.left_out = +(listing.left_out - Counter({".json": 1}))
    listing.classes, listing.labels_from = numbered(int(listing.labels.max()) + 1), LABELS_FILE
    return listing


def find_split(data_path, split, needed=True):
    """Path of the images of a split, train or val, of --data_path; all ranks call it. Without any None, or if it is
    needed a FlowARError.
    """
    found = from_main(lambda: places(data_path, split))
    if not found and needed:
        if not is_hub(data_path) and not from_main(lambda: os.path.exists(data_path) or find_archive(data_path)):
            raise FlowARError(f"--data_path {data_path}: no such file or folder")
        raise FlowARError(f"--data_path {data_path}: there is no {split}/ in it: "
                          f"{from_main(lambda: hint(data_path, split))}")
    if len(found) > 1:
        if not os.path.isdir(found[0]):
            raise FlowARError(f"--data_path {data_path}: {' and '.join(found)} are there: which holds the images? Move "
                              "the others away")
        log(f"{found[0]} is read, not {', '.join(found[1:])}")
    return found[0] if found else None


def places(data_path, split):
    """All paths at which a split of --data_path lies; a folder first."""
    path = os.path.join(data_path, split)
    if is_hub(data_path):
        place, at, revision = str(data_path).partition("@")
        names = split_names(data_path)
        return [f"{place}/{name}{at}{revision}" for name in SPLITS[split] if name in names][:1]
    if find_archive(data_path):
        return [path] * has_folder(path)
    found = [path] if os.path.isdir(path) else []
    found += [path + suffix for suffix in SUFFIXES if os.path.isfile(path + suffix)]
    tables = [os.path.join(data_path, name) for name in SPLITS[split]]
    return found + [table for table in tables if table not in found and is_table(table)][:1]


def hint(data_path, split):
    """What to do about a split that is not there."""
    above, name = os.path.split(os.path.normpath(data_path))
    if is_hub(data_path):
        return f"it has {', '.join(split_names(data_path))}"
    if name in [of + suffix for of in ("train", "val") for suffix in ("", *SUFFIXES)]:
        return f"give {above}"
    if packed := [split + suffix for suffix in COMPRESSED if os.path.isfile(os.path.join(data_path, split + suffix))]:
        return f"there is {packed[0]}, which is compressed: decompress it to {split}.tar"
    if find_archive(data_path):
        tops = {name.partition("/")[0] for _, name in names_below(data_path)}
        if below := [top for top in sorted(tops) if has_folder(os.path.join(data_path, top, split))]:
            return f"it is in {below[0]}/: give {os.path.join(data_path, below[0])}"
        return ("an archive holds train/ and val/, each with a folder per class; one of the training images alone goes "
                f"into a folder as train{os.path.splitext(data_path)[1]}, and that folder is given")
    return "it holds train/ and val/, each with a folder per class"
