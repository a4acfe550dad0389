"""Which classes the images of an evaluation are of, their names, and whether its reference has the same mix."""
import difflib
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models.errors import FlowARError, name_some
from util.cluster import log

KINDS = ("balanced", "train")  # of --labels, which otherwise is a file's name
UNLIKE = 0.02  # share of images of other classes that is worth a warning: ImageNet's own training set is at 0.013
IMAGENET, WNID = 1000, re.compile(r"n\d{8}")  # classes; a class folder's name there


def image_label(index, num_images, class_num):
    """Label of image `index` (an array too) of `num_images`: classes in order, as evenly as can be (50 each for 50,000
    of 1000)."""
    return index * class_num // num_images


class Classes(NamedTuple):
    """A model's classes; names in the order of the labels, and training images of each (number,), None if unknown."""
    number: int
    names: list | None = None
    counts: np.ndarray | None = None

    def sampled(self):
        """The labels that images are drawn of: those that had images in training, all where that is not known."""
        return np.arange(self.number) if self.counts is None else np.flatnonzero(self.counts)


def classes_of(data, number, path):
    """Classes of what a checkpoint says of its training data, see util.training.record; {} if it does not say it."""
    if not data or data.get("counts") is None:
        return Classes(number)
    names, counts = list(data["classes"]), np.zeros(number, np.int64)
    if len(names) > number:
        raise FlowARError(f"{path}: was trained on {len(names)} classes, but the model has {number}")
    counts[:len(names)] = data["counts"]
    return Classes(number, names, counts)


class Labels(NamedTuple):
    """The labels of an evaluation's images."""
    kind: str  # of KINDS, or "file"
    values: np.ndarray  # (images,) int64
    classes: Classes
    allowed: np.ndarray  # the labels that may be drawn
    file: str | None = None

    def of(self, indices):
        """List of the labels of images, given a range of indices."""
        return self.values[indices.start:indices.stop].tolist()

    def settings(self):
        return {"labels": self.kind, "labels_sha256": hashlib.sha256(self.values.tobytes()).hexdigest(),
                "classes_sampled": len(np.unique(self.values)), "labels_file": self.file}


def choose_labels(kind, count, classes):
    """Labels of `count` images: --labels. balanced: as many images of each class; train: in the proportions of the
    training images, each class's share of `count` rounded so that the largest remainders are rounded up; else those of
    a file, which alone may ask for classes that had no training images. classes: Classes.
    """
    allowed = classes.sampled()
    if kind == "balanced":
        if len(allowed) < classes.number:
            log(f"{classes.number - len(allowed)} of {classes.number} classes have no training images and are not "
                "sampled (to sample them, pass a file to --labels)")
        return Labels(kind, allowed[image_label(np.arange(count), count, len(allowed))], classes, allowed)
    if kind == "train":
        if classes.counts is None:
            raise FlowARError("--labels train: the checkpoint does not record its training images per class: use "
                              "balanced, or a file of labels")
        counts = divide_in_proportion(classes.counts, count)
        return Labels(kind, np.repeat(np.arange(classes.number), counts), classes, allowed)
    values = read_labels(kind, classes)
    if len(values) != count:
        raise FlowARError(f"--labels {kind}: {len(values)} lines, but --num_images is {count}: use --num_images "
                          f"{len(values)}")
    return Labels("file", values, classes, allowed, str(kind))


def divide_in_proportion(counts, total):
    """How many of `total` each gets in proportion to `counts`, exactly: the method of largest remainders."""
    counts, shares, remainders = counts.tolist(), [], []  # Python's numbers do not overflow
    whole = sum(counts)
    for count in counts:
        share, remainder = divmod(total * count, whole)
        shares.append(share)
        remainders.append(remainder)
    shares = np.array(shares)
    order = np.argsort(-np.array(remainders), kind="stable")  # of equal remainders the first class
    shares[order[:total - shares.sum()]] += 1
    return shares


def read_labels(path, classes):
    """(lines,) int64, the labels of a file: in each line a label, or a class's name where the checkpoint knows them. A
    number is a label, whatever the classes' names are.
    """
    if not Path(path).is_file():
        raise FlowARError(f"--labels {path}: expected {', '.join(KINDS)}, or a file with one label per line")
    lines = Path(path).read_text("utf-8-sig", errors="surrogateescape").splitlines()
    labels = {name: label for label, name in enumerate(classes.names or []) if not name.isdecimal()}
    labels.update((str(label), label) for label in range(classes.number))
    values = []
    for number, line in enumerate(lines, 1):
        label = labels.get(line, labels.get(line.strip()))
        if label is None:
            raise FlowARError(f"--labels {path}: line {number} is {line[:60]!r}, expected a label from 0 to "
                              f"{classes.number - 1}, or a class name of the checkpoint")
        values.append(label)
    return np.array(values, dtype=np.int64)


def warn_of_mix(labels, reference):
    """Say it if a Reference whose class folders are known has another mix of classes than the images."""
    if not reference.classes or labels.kind == "file":  # a file is meant as it is
        return
    classes = labels.classes
    ours = np.bincount(labels.allowed, minlength=classes.number)
    if labels.kind == "train":
        ours = classes.counts
    names = classes.names or []
    if reference.classes.keys().isdisjoint(names):  # the classes are in the same order, under other names
        names = list(reference.classes)
    names = [*names, *range(len(names), classes.number)]
    ours = dict(zip(names, ours / ours.sum()))
    images, unlike = sum(reference.classes.values()), 0
    for name in {**ours, **reference.classes}:
        unlike += abs(ours.get(name, 0) - reference.classes.get(name, 0) / images) / 2
    if unlike > UNLIKE:
        log(f"warning: class proportions of the reference {reference.name} and the samples differ by {unlike:.0%}, "
            "which raises the distance; choose those of the samples with --labels")


# ---- names: what captions show, and what a person may type for a label -----------------------------------------


def class_names(classes):
    """A name for each of a model's Classes: the checkpoint's, ImageNet's for 1000 classes of it, else numbers."""
    names = classes.names or []
    if classes.number == IMAGENET and all(map(WNID.fullmatch, names)) and len(names) in (0, IMAGENET):
        from torchvision.models import ResNet18_Weights  # its metadata: nothing is downloaded
        return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    return names + [str(label) for label in range(len(names), classes.number)]


def find_label(label, names):
    """The number of a class by number, or by name, whatever its case. FlowARError if there is none, or two."""
    text = str(label).strip()
    if text.removeprefix("-").isdecimal():
        if not 0 <= int(text) < len(names):
            raise FlowARError(f"label {label}: the model has classes 0..{len(names) - 1}")
        return int(text)
    matches = [number for number, name in enumerate(names) if name == text]
    matches = matches or [number for number, name in enumerate(names) if name.casefold() == text.casefold()]
    if len(matches) > 1:
        raise FlowARError(f"label {text!r}: {len(matches)} classes have this name, use a number: "
                          f"{', '.join(map(str, matches))}")
    if not matches:
        near = [name for name in names if text.casefold() in name.casefold()]
        near = near or difflib.get_close_matches(text, names, n=5)
        hint = f"expected 0 to {len(names) - 1}, or a name such as {names[0]}"
        if near:
            hint = f"similar names: {name_some(near)}"
        raise FlowARError(f"label {text!r}: no such class; {hint}")
    return matches[0]
