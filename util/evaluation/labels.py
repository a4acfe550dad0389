"""Which classes the images of an evaluation are of, and whether its reference has the same mix of them."""
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models import FlowARError
from models.errors import reading
from util.cluster import log
from util.files import check_fields, is_count, is_strings

KINDS = ("balanced", "train")  # of --labels, which otherwise is a file's name
UNLIKE = 0.02  # share of images of other classes that is worth a warning: ImageNet's own training set is at 0.013


def image_label(index, num_images, class_num):
    """Label of image `index` (an array too) of `num_images`: classes in order, as evenly as can be (50 each for 50,000
    of 1000)."""
    return index * class_num // num_images


class Classes(NamedTuple):
    """A model's classes; names in the order of the labels, and training images of each (number,), None if unknown."""
    number: int
    names: list | None = None
    counts: np.ndarray | None = None
    path: str | None = None  # of the training checkpoint that says so, or does not

    def sampled(self, all_classes=False):
        """The labels that images are drawn of: those that had images in training, all where that is not known."""
        return np.arange(self.number) if all_classes or self.counts is None else np.flatnonzero(self.counts)

    def report_untrained(self, all_classes):
        """A line of classes without training images, or that it is not known which these are."""
        missing = self.number - len(self.sampled())
        if self.path and self.counts is None:
            log(f"{self.path}: does not say which classes had training images: labels are drawn over all {self.number}")
        elif self.path and missing:
            log(f"{self.path}: {missing} of {self.number} classes had no training images and are "
                + ("sampled all the same" if all_classes else "not sampled (--all_classes samples them)"))


def classes_of(data, number, path, trained=False):
    """Classes of what a checkpoint says of its training data: {"classes": names, "counts": images of each, ...}.
    trained: it is of a training run, not weights alone (such as the released), and should say it.
    """
    if not isinstance(data, dict) or "classes" not in data or data.get("counts") is None:
        return Classes(number, path=str(path) if trained else None)
    data = {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}
    check_fields(data, {"classes": (is_strings, "a list of names"), "counts": (
        lambda value: isinstance(value, list) and all(map(is_count, value)), "a list of numbers")}, f"{path}: data")
    names, counts = data["classes"], np.zeros(number, np.int64)
    if len(names) != len(data["counts"]) or len(names) > number or not 0 < sum(data["counts"]) < 2**53:
        raise FlowARError(f"{path}: data has {len(names)} classes and {len(data['counts'])} counts of "
                          f"{sum(data['counts'])} images, expected a count of each and at most {number} classes")
    counts[:len(names)] = data["counts"]
    return Classes(number, names, counts, str(path))


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


def choose_labels(kind, count, classes, all_classes=False):
    """Labels of `count` images: --labels. balanced: as many images of each class; train: in the proportions of the
    training images, each class's share of `count` rounded so that the largest remainders are rounded up; else those of
    a file. classes: Classes. FlowARError for labels of classes that had no training images, unless all_classes.
    """
    allowed = classes.sampled(all_classes)
    if kind == "balanced":
        classes.report_untrained(all_classes)
        return Labels(kind, allowed[image_label(np.arange(count), count, len(allowed))], classes, allowed)
    if kind == "train":
        if all_classes:
            raise FlowARError("--all_classes is for --labels balanced or a file: train draws the classes that had "
                              "images")
        if classes.counts is None:
            raise FlowARError(f"--labels train: {classes.path or 'the checkpoint, or dataset,'} does not say how many "
                              "training images each class had (an earlier version wrote it, or it holds weights "
                              "alone): use balanced, or a file of labels")
        return Labels(kind, np.repeat(np.arange(classes.number), quotas(classes.counts, count)), classes, allowed)
    values = read_labels(kind, classes)
    if not len(values):
        raise FlowARError(f"--labels {kind}: is empty, expected a label in each line, one for each image")
    if len(values) != count:
        raise FlowARError(f"--labels {kind}: {len(values)} lines, one for each image, but {count} images are asked "
                          f"for: give --num_images {len(values)} (in training --eval_num_images)")
    unseen = np.setdiff1d(values, allowed)
    if len(unseen):
        raise FlowARError(f"--labels {kind}: line {np.flatnonzero(values == unseen[0])[0] + 1} asks for class "
                          f"{unseen[0]}, which had no training images; --all_classes samples it all the same")
    return Labels("file", values, classes, allowed, str(kind))


def quotas(counts, total):
    """How many of `total` each gets in proportion to `counts`, exactly: the method of largest remainders."""
    counts = list(map(int, counts))  # Python's numbers do not overflow
    whole = sum(counts)
    shares = [divmod(total * count, whole) for count in counts]
    found = np.array([share for share, _ in shares])
    order = sorted(range(len(shares)), key=lambda i: -shares[i][1])  # of equal remainders the first class
    found[order[:total - found.sum()]] += 1
    return found


def read_labels(path, classes):
    """(lines,) int64, the labels of a file: in each line a label, or a class's name where the checkpoint knows them."""
    if not Path(path).is_file():
        raise FlowARError(f"--labels {path}: expected {', '.join(KINDS)}, or a file with a label in each line")
    with reading(path):
        lines = os.fsdecode(Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")).split("\n")
    lines = [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    names = {name: label for label, name in enumerate(classes.names or [])}
    known = {str(label): label for label in range(classes.number)}
    unlike = [name for name in names if known.get(name, names[name]) != names[name]]
    if unlike:  # a number means one thing in a file
        if any(line.strip() in known for line in lines):
            log(f"warning: --labels {path}: its numbers are taken as labels, not as the classes' names, some of which "
                f"are numbers too (the class named {unlike[0]!r} has label {names[unlike[0]]})")
        names = {name: label for name, label in names.items() if not name.isdecimal()}
    known = {**names, **known}
    values = [known.get(line, known.get(line.strip())) for line in lines]
    if None in values:
        number = values.index(None)
        expected = f"a label from 0 to {classes.number - 1}" + (" or the name of a class" if names else "")
        raise FlowARError(f"--labels {path}: line {number + 1} is {lines[number][:60]!r}, expected {expected}")
    return np.array(values, dtype=np.int64)


def warn_of_mix(labels, reference):
    """Say it if the images and a Reference whose class folders are known are of different mixes of classes."""
    if reference is None or not reference.classes or labels.kind == "file":  # a file is meant as it is
        return
    ours, how = np.zeros(labels.classes.number), "evenly"
    ours[labels.allowed] = 1
    if labels.kind == "train":
        ours, how = labels.classes.counts, "in the proportions of the training images"
    theirs = align(labels.classes, reference.classes)
    mix = np.zeros((2, max(len(ours), len(theirs))))
    for row, counts in zip(mix, (ours, theirs)):
        row[:len(counts)] = counts / counts.sum()
    unlike, there = abs(mix[0] - mix[1]).sum() / 2, theirs[theirs > 0]
    if unlike > UNLIKE:
        cures = ["--labels balanced samples evenly" if labels.kind == "train" else
                 "--labels train samples in the proportions of the training images",
                 "--labels FILE samples what a file says"]
        cures = cures[labels.kind == "balanced" and labels.classes.counts is None:]
        log(f"warning: the classes of the reference {reference.name} are {'un' if len(set(there)) > 1 else ''}balanced "
            f"({len(there)} of {there.min()} to {there.max()} images), those of the samples are drawn {how} (of "
            f"{np.count_nonzero(ours)}): the distance counts that {unlike:.0%} of the images are of other classes too. "
            f"{', '.join(cures)}; or give a reference of the same mix")


def align(classes, counts):
    """Images of each label in a reference's {class folder: images}: by name where the checkpoint knows the names."""
    names = classes.names or []
    if not counts.keys() & set(names):
        return np.array(list(counts.values()))
    mine = {**dict.fromkeys(names, 0), **counts}  # the folders that no class is called after come last
    found = np.array(list(mine.values()))
    return np.insert(found, [len(names)] * (classes.number - len(names)), 0)
