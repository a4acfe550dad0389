"""Which files of a folder are data: one rule for training, validation, caches, references and scripts.

A file counts if its suffix says so and its name is not hidden (._x.png) nor left behind by a system (__MACOSX);
hidden folders (.thumbnails) neither. Links are followed, each folder once, so a loop of links ends. What is left out is
counted by reason. Classes are the folders at the top, in the order of their names, at whatever depth their files lie;
files are in torchvision's order. Names are what the disk holds: bytes, which need not be UTF-8. Archives and tables
(util.data.places) are listed by the same rule; only how a file of theirs is opened is another.
"""
import copy
import hashlib
import io
import os
import stat
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from models import FlowARError
from models.errors import name_some

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".ppm",
                            ".pgm", ".pbm", ".pnm", ".pfm", ".tif", ".tiff", ".jp2", ".j2k", ".avif", ".heic", ".heif"))
LEFT_BEHIND = frozenset(("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle", "$recycle.bin",
                         "lost+found", "system volume information", "__pycache__"))
LABELS_FILE = "dataset.json"  # of EDM's tools
READERS = 16  # threads: a network disk answers many at once
HIDDEN, LOST, AGAIN, NO_FILE, OUTSIDE = ("hidden or a system's", "links to nothing", "folders already read",
                                         "neither files nor folders", "outside of the class folders")


def is_left_behind(name):
    return name.startswith(".") or name.lower() in LEFT_BEHIND


class Part(NamedTuple):
    """The files of one class: names, one after the other, and of each its length, size and time."""
    text: bytes
    lengths: np.ndarray
    sizes: np.ndarray
    times: np.ndarray
    left_out: Counter


class Listing:
    """Files below a folder, in arrays: Python objects would be copied into every worker that touches them.

    root: the folder; classes: names, in the order of the labels; left_out: Counter of reasons; labels_from: what says
    the labels, None for class folders.
    """
    labels_from = None

    def __init__(self, root, classes, parts, left_out):
        self.root, self.classes, self.left_out = str(root), classes, left_out
        self.text = np.frombuffer(b"".join(part.text for part in parts), np.uint8)
        lengths, self.sizes, self.times = (np.concatenate([np.zeros(0, np.int64)] + [part[k] for part in parts])
                                           for k in (1, 2, 3))
        self.ends = np.cumsum(lengths)
        self.labels = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.lengths) for part in parts])

    def __len__(self):
        return len(self.ends)

    def name(self, index):
        """Path below root; bytes that are no UTF-8 are surrogates, as in all of Python's paths."""
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.text[start:self.ends[index]].tobytes())

    def file(self, index):
        """What open_file takes, and str() names."""
        return os.path.join(self.root, self.name(index))

    def __getitem__(self, index):
        """(file, label)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.file(index), int(self.labels[index])

    @property
    def samples(self):
        """(path, label) of every file, as of torchvision's ImageFolder; others can be put in their place."""
        return self

    @samples.setter
    def samples(self, pairs):
        part = pack([(os.fsencode(os.path.relpath(path, self.root)), 0, 0) for path, _ in pairs], Counter())
        Listing.__init__(self, self.root, self.classes, [part], self.left_out)
        self.labels = np.array([label for _, label in pairs], np.int32)

    @property
    def counts(self):
        """Files of every class."""
        return np.bincount(self.labels, minlength=len(self.classes)).tolist()

    def identity(self):
        """What a checkpoint or a cache remembers of them: classes, counts, number, hash of names and sizes."""
        digest = hashlib.sha256("\0".join(self.classes).encode("utf-8", "surrogateescape"))
        for values in (self.text, self.ends, self.sizes):
            digest.update(np.ascontiguousarray(values))
        if self.labels_from == LABELS_FILE:  # else they follow from the names
            digest.update(np.ascontiguousarray(self.labels))
        return {"classes": self.classes, "counts": self.counts, "images": len(self), "sha256": digest.hexdigest()}

    def for_workers(self):
        """A copy without what they do not need, smaller where it has to be sent to them."""
        smaller = copy.copy(self)
        smaller.sizes = smaller.times = np.zeros(0, np.int64)
        return smaller

    def prepare(self):
        """Make it readable on this host; all ranks call it."""

    def times_sha256(self):
        return hashlib.sha256(np.ascontiguousarray(self.times)).hexdigest()

    def summary(self, what="images"):
        """'3,700 images; left out: 12 hidden or a system's, 28 .txt'."""
        reasons = ", ".join(f"{number} {reason}" for reason, number in self.left_out.most_common())
        return f"{len(self):,} {what}" + (f"; left out: {reasons}" if reasons else "")


class Packed(Listing):
    """Files inside of others: read(index) -> the bytes of one; OSError or ValueError if they are not those listed."""

    def file(self, index):
        return Inside(self, index)


class Inside(NamedTuple):
    """A file of a Packed listing."""
    listing: Packed
    index: int

    def __str__(self):
        return Listing.file(*self)


def open_file(file):
    """Binary file of a path, or of a file of a Listing."""
    return io.BytesIO(file.listing.read(file.index)) if isinstance(file, Inside) else open(file, "rb")


def pack(rows, left_out):
    """Part of rows (name, size, time)."""
    names, sizes, times = zip(*rows) if rows else ((), (), ())
    lengths = [len(name) for name in names]
    return Part(b"".join(names), *(np.array(values, np.int64) for values in (lengths, sizes, times)), left_out)


def list_files(root):
    """Listing of all images below a folder, without classes."""
    if not os.path.isdir(root):
        is_file = " (a file is there: unpack it)" if os.path.isfile(root) else ""
        raise FlowARError(f"{root}: no such folder of images{is_file}")
    part = walk(str(root), "", IMAGE_SUFFIXES, set())
    return Listing(root, [], [part], part.left_out)


def list_classes(root, suffixes=IMAGE_SUFFIXES, what="images"):
    """Listing of the files in class folders; a class without any keeps its label. FlowARError if there is no file."""
    if not os.path.isdir(root):
        raise FlowARError(f"{root}: no such folder (expected {what} in class folders)")
    root, folders, left_out = str(root), [], Counter()
    for entry, status in entries(root, left_out):
        if stat.S_ISDIR(status.st_mode):
            folders.append((entry.is_symlink(), entry.name, identify(status)))
        else:
            left_out[OUTSIDE if suffix_of(entry.name) in suffixes else suffix_reason(entry.name)] += 1
    taken = {identify(os.stat(root)): None}  # {folder: its class}: a link to another class is no class
    for _, name, mine in sorted(folders):
        left_out[AGAIN] += mine in taken
        taken.setdefault(mine, name)
    classes = sorted(filter(None, taken.values()))
    around = {name: set(taken) - {mine} for mine, name in taken.items()}
    with ThreadPoolExecutor(READERS) as pool:
        parts = list(pool.map(lambda name: walk(root, name, suffixes, around[name]), classes))
    return check_listed(Listing(root, classes, parts, +sum((part.left_out for part in parts), left_out)), what)


def check_listed(listing, what="images"):
    """The Listing; FlowARError unless it has classes, and a file."""
    root, flat = listing.root, listing.left_out[OUTSIDE]
    if not listing.classes:
        raise FlowARError(f"{root}: " + (
            f"{flat:,} {what} but no class folders: put them into a folder for each class, or all into one, as "
            f"{root}/all" if flat else f"no class folders (expected {what} in class folders)"))
    if not len(listing):
        raise FlowARError(f"{root}: no {what} in its class folders ({name_some(listing.classes, 3)}; "
                          f"expected {what} in class folders{listing.summary(what).partition(what)[2]})")
    return listing


def name_classes(root):
    """Names of the class folders, in the order of the labels; what is in them is not looked at."""
    if not os.path.isdir(root):
        raise FlowARError(f"{root}: no such folder (expected class folders)")
    return [entry.name for entry, status in entries(root, Counter()) if stat.S_ISDIR(status.st_mode)]


def walk(root, top, suffixes, seen):
    """Part of all files below root/top, folder by folder in the order of their paths. seen: folders not to enter. Links
    are entered last: a folder is read where it is.
    """
    waiting, links, folders, left_out = [top], [], {}, Counter()
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop()
        path = os.path.join(root, folder)
        if (mine := identify(os.stat(path))) in seen:
            left_out[AGAIN] += 1
            continue
        seen.add(mine)
        found, below = [], []
        for entry, status in entries(path, left_out):
            name = os.path.join(folder, entry.name)
            if stat.S_ISDIR(status.st_mode):
                (links if entry.is_symlink() else below).append(name)
            elif suffix_of(entry.name) not in suffixes:
                left_out[suffix_reason(entry.name)] += 1
            elif not stat.S_ISREG(status.st_mode):
                left_out[NO_FILE] += 1
            else:
                found.append((os.fsencode(name), status.st_size, status.st_mtime_ns))
        folders[folder] = sorted(found, key=lambda row: os.fsdecode(row[0]))
        waiting += sorted(below, reverse=True)
        links.sort(reverse=True)
    return pack([row for folder in sorted(folders) for row in folders[folder]], left_out)


def entries(path, left_out):
    """(os.DirEntry, its os.stat with links followed) of what is not left out at once, sorted by name."""
    try:
        with os.scandir(path) as found:
            listed = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise FlowARError(f"{path}: this folder cannot be read ({error.strerror})") from error
    for entry in listed:
        if is_left_behind(entry.name):
            left_out[HIDDEN] += 1
            continue
        try:
            yield entry, entry.stat()
        except OSError as error:  # a link that leads nowhere, or in a circle
            if not entry.is_symlink():
                raise FlowARError(f"{entry.path}: cannot be looked at ({error.strerror})") from error
            left_out[LOST] += 1


def identify(status):
    return status.st_dev, status.st_ino


def suffix_of(name):
    return os.path.splitext(name)[1].lower()


def suffix_reason(name):
    return suffix_of(name) or "without a suffix"


def advice(listing):
    """Lines about what looks like a mistake in class folders, each with what to do."""
    classes, counts, lines = listing.classes, listing.counts, []
    empty = [name for name, count in zip(classes, counts) if not count]
    if empty:
        lines.append(f"{len(empty)} of {len(classes)} class folders hold no image ({name_some(empty, 3)}): they keep "
                     "their labels and are not trained; remove them if they are no classes")
    if len(classes) == 1:
        lines.append(f"one class folder, {classes[0]}: every image gets the same label; a model of several classes "
                     "needs a folder for each")
    depth = depths(listing)
    own = np.bincount(listing.labels[depth == 1], minlength=len(classes))
    only_folders = [name for name, count, direct in zip(classes, counts, own) if count and not direct]
    if only_folders and not listing.labels_from:
        below = listing.name(int(np.argmax(depth > 1))).rpartition("/")[0]
        lines.append(f"{len(only_folders)} of {len(classes)} class folders hold only folders ("
                     f"{name_some(only_folders, 3)}): an image in {below} gets the label of "
                     f"{below.partition('/')[0]}; if the folders below are the classes, point one folder lower or move "
                     "them up")
    if all(name.isdecimal() for name in classes) and classes != sorted(classes, key=int):
        label, name = next((i, name) for i, name in enumerate(classes) if name != sorted(classes, key=int)[i])
        lines.append(f"class names are numbers but are in the order of text, so label {label} is folder {name}; with "
                     f"leading zeros ({int(classes[0]):0{max(map(len, classes))}d} for {classes[0]}) they would be in "
                     "that of numbers")
    return lines


def depths(listing):
    """How many folders lie between root and every file."""
    slashes = np.cumsum(listing.text == ord("/"))
    return np.diff(np.concatenate(([0], slashes[listing.ends - 1])))
