"""Which files are images, and which labels they have: one rule for training, caches, references and scripts.

A file counts if its suffix says so; what is hidden (._x.png) or left by a system (__MACOSX) does not, nor what lies in
such folders. Classes are the folders at the top, in the order of their names, at whatever depth their files lie; files
are in torchvision's order. Images outside of the class folders are left out. If no folder holds an image, those at the
top are a flat set without classes, which a reference may be. Whatever is left out is counted by reason. Links are
followed; a loop of links ends. Names are what the disk holds: bytes, which need not be UTF-8.
"""
import hashlib
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from models import FlowARError
from models.errors import name_some

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".ppm",
                            ".pgm", ".pbm", ".pnm", ".pfm", ".tif", ".tiff", ".jp2", ".j2k", ".avif", ".heic", ".heif"))
SYSTEM_FILES = frozenset(("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle", "$recycle.bin",
                          "lost+found", "system volume information", "__pycache__"))
LABELS_FILE = "dataset.json"  # of EDM's tools
THREADS = 16  # a network disk answers many at once
HIDDEN, REPEATED, OUTSIDE = "hidden or system files", "folders already read", "outside the class folders"
NO_SUFFIX = "without a suffix"
UNPACK_CLASSES = 'for t in *.tar*; do mkdir "${t%.tar*}" && tar -xf "$t" -C "${t%.tar*}"; done'
UNPACK_ZIPS = 'for z in *.zip; do unzip -qd "${z%.zip}" "$z"; done'
UNPACK_SHARDS = "cat *.tar | tar -xif -"  # of WebDataset, whose NAME.cls holds the label of NAME.png
SORT_SHARDS = ('for c in *.cls; do d=$(printf %05d "$(cat "$c")") && mkdir -p "$d" && mv "${c%.cls}".[!c]* "$d" && '
               'rm "$c"; done')


def is_hidden(name):
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def suffix_of(name):
    return os.path.splitext(name)[1].lower()


class Listing:
    """Images with labels, of one kind of source; read(index) -> the bytes of an image file.

    root: path of the source; classes: names in the order of the labels, none of a flat set; left_out: Counter of
    reasons; labels_from: what gives the labels, None for class folders. Names, sizes (bytes) and labels are arrays: a
    million Python objects would be copied into every data worker.
    """

    def __init__(self, root, classes, rows, left_out, labels_from=None):
        """rows: (label, name below root, size, place, which is a number for read()) of every image, in order."""
        self.root, self.classes, self.left_out, self.labels_from = str(root), classes, +Counter(left_out), labels_from
        labels, names, sizes, places = zip(*rows) if rows else [()] * 4
        names = [os.fsencode(name) for name in names]
        self.text = np.frombuffer(b"".join(names), np.uint8)
        self.ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self.labels = np.array(labels, np.int32)
        self.sizes, self.places = np.array(sizes, np.int64), np.array(places, np.int64)

    def __len__(self):
        return len(self.ends)

    def name(self, index):
        """Path below root; bytes that are no UTF-8 are surrogates, as in all of Python's paths."""
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.text[start:self.ends[index]].tobytes())

    def path(self, index):
        return os.path.join(self.root, self.name(index))

    @property
    def counts(self):
        """Images of every class."""
        return np.bincount(self.labels, minlength=len(self.classes)).tolist()

    @property
    def depths(self):
        """(images,) how many folders below root each image lies in."""
        return np.diff(np.cumsum(self.text == ord("/"))[self.ends - 1], prepend=0)

    def identity(self):
        """What a checkpoint or a cache records of the images: classes, counts, number, hash of names and sizes."""
        digest = hashlib.sha256("\0".join(self.classes).encode("utf-8", "surrogateescape"))
        for values in (self.text, self.ends, self.sizes):
            digest.update(np.ascontiguousarray(values))
        if self.labels_from == LABELS_FILE:  # else they follow from the names
            digest.update(np.ascontiguousarray(self.labels))
        return {"classes": self.classes, "counts": self.counts, "images": len(self), "sha256": digest.hexdigest()}

    def summary(self):
        """'3,700 images; left out: 12 hidden or system files, 28 .txt'."""
        text = f"{len(self):,} images"
        if self.left_out:
            text += "; left out: " + ", ".join(f"{count} {reason}" for reason, count in self.left_out.most_common())
        return text

    def check_classes(self):
        """FlowARError without images, without classes, or where the classes are likely one folder deeper."""
        if 2 * self.left_out[".cls"] > len(self):  # not a stray one
            raise FlowARError(f"{self.root}: labels are in .cls files, which are not read: unpack the tars into one "
                              f"folder ({UNPACK_SHARDS}), and sort them into class folders: {SORT_SHARDS}")
        if not len(self) and self.left_out[".zip"]:
            raise FlowARError(f"{self.root}: {self.summary()}; unpack them in place: {UNPACK_ZIPS}")
        if not len(self) and (self.left_out[".tar"] or self.left_out[".gz"]):
            raise FlowARError(f"{self.root}: {self.summary()}; unpack them in place, if each is a class: "
                              f"{UNPACK_CLASSES}; if they are shards: {UNPACK_SHARDS}")
        if not len(self):
            raise FlowARError(f"{self.root}: {self.summary()}; expected images in class folders")
        if not self.classes:
            raise FlowARError(f"{self.root}: {self.summary()}; no class folders found (label files are not read): put "
                              f"the images into one folder per class, or all into one, such as {self.root}/all")
        if len(self.classes) == 1 and not self.labels_from and self.depths.min() > 1:
            raise FlowARError(f"{self.root}: the only class folder contains just folders, such as "
                              f"{os.path.dirname(self.name(0))}: if these are the classes, move them up; else put the "
                              f"images into {self.classes[0]} itself")


class Folder(Listing):
    """Files in class folders on a disk."""

    def __init__(self, root, suffixes=IMAGE_SUFFIXES):
        root, left_out = str(root), Counter()
        files, classes = scan(root, "", suffixes, left_out)
        with ThreadPoolExecutor(THREADS) as pool:
            for files_of_class, reasons in pool.map(lambda name: walk(root, name, suffixes), classes):
                files += files_of_class
                left_out += reasons
        classes, rows = assign_labels(files, classes, left_out)
        super().__init__(root, classes, rows, left_out)
        file = os.path.join(root, LABELS_FILE)
        if os.path.isfile(file):
            with open(file, "rb") as content:
                assign_edm_labels(self, content.read())

    @staticmethod
    def is_at(path):
        return os.path.isdir(path)

    def read(self, index):
        with open(self.path(index), "rb") as file:
            return file.read()


def scan(root, folder, suffixes, left_out):
    """(files (name below root, size, place), names of folders) of one folder, each in the order of names."""
    files, folders = [], []
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name, suffix = os.path.join(folder, entry.name), suffix_of(entry.name)
            if is_hidden(entry.name):
                left_out[HIDDEN] += 1
            elif entry.is_dir():
                folders.append(name)
            elif suffix not in suffixes:
                left_out[suffix or NO_SUFFIX] += 1
            else:
                left_out[OUTSIDE] += not folder
                files.append((name, entry.stat().st_size, 0))
    return files, folders


def walk(root, top, suffixes):
    """(files, Counter of what is left out) at any depth below root/top; each folder is read once."""
    files, left_out, waiting, done = [], Counter(), [top], {os.path.realpath(root)}
    while waiting:
        folder = waiting.pop()
        target = os.path.realpath(os.path.join(root, folder))
        if target in done:
            left_out[REPEATED] += 1
            continue
        done.add(target)
        files_here, folders = scan(root, folder, suffixes, left_out)
        files += files_here
        waiting += reversed(folders)
    return files, left_out


def assign_labels(files, classes, left_out):
    """(classes, rows of a Listing in torchvision's order) of files (name, size, place), by the rule above."""
    inside = [file for file in files if "/" in file[0]]
    if not inside:
        classes = []
        del left_out[OUTSIDE]
    classes = sorted(classes)
    labels = {name: label for label, name in enumerate(classes)}
    rows = [(labels.get(file[0].partition("/")[0], 0), *file) for file in inside or files]
    rows.sort(key=lambda row: (row[0], *os.path.split(row[1])))
    return classes, rows


def assign_edm_labels(listing, content):
    """Give a Listing the labels of EDM's dataset.json: beside it folders are no classes, only thousands of images."""
    try:
        labels = json.loads(content)["labels"]
        has_labels = labels is not None
        labels = dict(labels or ())
    except (ValueError, TypeError, KeyError):  # another file of that name
        return
    if not has_labels:
        raise FlowARError(f"{listing.root}/{LABELS_FILE}: labels are null: make it with labels, or remove it if the "
                          "folders are the classes")
    names = [listing.name(index) for index in range(len(listing))]
    if labels.keys() != set(names):
        raise FlowARError(f"{listing.root}/{LABELS_FILE}: labels and images do not match "
                          f"({name_some(sorted(labels.keys() ^ set(names)), 3)} only in one of them): use the right "
                          "file, or remove it if the folders are the classes")
    listing.labels = np.array([labels[name] for name in names], np.int32)
    listing.classes, listing.labels_from = number_names(int(listing.labels.max()) + 1), LABELS_FILE
    listing.left_out -= Counter({".json": 1})


def number_names(count):
    """Names of classes that have none: in the order of text too."""
    return [f"{label:0{len(str(count - 1))}d}" for label in range(count)]
