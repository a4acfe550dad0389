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
    path: str | None = None  # of the training checkpoint that says so, or does not

    def sampled(self):
        """The labels that images are drawn of: those that had images in training, all where that is not known."""
        return np.arange(self.number) if self.counts is None else np.flatnonzero(self.counts)


def classes_of(data, number, path, trained=False):
    """Classes of what a checkpoint says of its training data: {"classes": names, "counts": images of each, ...}.
    trained: it is of a training run, not weights alone (such as the released), and should say it.
    """
    if not isinstance(data, dict) or "classes" not in data or data.get("counts") is None:
        return Classes(number, path=str(path) if trained else None)
    names, counts = list(data["classes"]), np.zeros(number, np.int64)
    if len(names) > number:
        raise FlowARError(f"{path}: was trained on {len(names)} classes, the model has {number}")
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


def choose_labels(kind, count, classes):
    """Labels of `count` images: --labels. balanced: as many images of each class; train: in the proportions of the
    training images, each class's share of `count` rounded so that the largest remainders are rounded up; else those of
    a file, which alone may ask for classes that had no training images. classes: Classes.
    """
    allowed = classes.sampled()
    if kind == "balanced":
        if classes.path and classes.counts is None:
            log(f"{classes.path}: does not say which classes had training images: labels are drawn over all "
                f"{classes.number}")
        elif classes.path and len(allowed) < classes.number:
            log(f"{classes.path}: {classes.number - len(allowed)} of {classes.number} classes had no training images "
                "and are not sampled (a file of --labels may ask for them)")
        return Labels(kind, allowed[image_label(np.arange(count), count, len(allowed))], classes, allowed)
    if kind == "train":
        if classes.counts is None:
            raise FlowARError(f"--labels train: {classes.path or 'the checkpoint, or dataset,'} does not say how many "
                              "training images each class had: use balanced, or a file of labels")
        return Labels(kind, np.repeat(np.arange(classes.number), quotas(classes.counts, count)), classes, allowed)
    values = read_labels(kind, classes)
    if len(values) != count:
        raise FlowARError(f"--labels {kind}: {len(values)} lines, one for each image, but {count} images are asked "
                          f"for: give --num_images {len(values)}")
    return Labels("file", values, classes, allowed, str(kind))


def quotas(counts, total):
    """How many of `total` each gets in proportion to `counts`, exactly: the method of largest remainders."""
    counts = list(map(int, counts))  # Python's numbers do not overflow
    whole = sum(counts)
    shares, remainders = zip(*(divmod(total * count, whole) for count in counts))
    shares = np.array(shares)
    order = sorted(range(len(counts)), key=lambda i: -remainders[i])  # of equal remainders the first class
    shares[order[:total - shares.sum()]] += 1
    return shares


def read_labels(path, classes):
    """(lines,) int64, the labels of a file: in each line a label, or a class's name where the checkpoint knows them."""
    if not Path(path).is_file():
        raise FlowARError(f"--labels {path}: expected {', '.join(KINDS)}, or a file with a label in each line")
    lines = Path(path).read_text("utf-8-sig", errors="surrogateescape").splitlines()
    numbers = {str(label): label for label in range(classes.number)}
    names = {name: label for label, name in enumerate(classes.names or [])}
    if any(name.isdecimal() and numbers.get(name) != label for name, label in names.items()):
        if any(line.strip() in numbers for line in lines):
            log(f"warning: --labels {path}: its numbers are taken as labels, not as the classes' names, some of which "
                "are numbers too")
        names = {name: label for name, label in names.items() if not name.isdecimal()}
    known, values = {**names, **numbers}, []
    for number, line in enumerate(lines, 1):
        label = known.get(line, known.get(line.strip()))
        if label is None:
            raise FlowARError(f"--labels {path}: line {number} is {line[:60]!r}, expected a label from 0 to "
                              f"{classes.number - 1}" + " or the name of a class" * bool(names))
        values.append(label)
    return np.array(values, dtype=np.int64)


def warn_of_mix(labels, reference):
    """Say it if a Reference whose class folders are known has another mix of classes than the images."""
    if reference is None or not reference.classes or labels.kind == "file":  # a file is meant as it is
        return
    ours = np.bincount(labels.allowed, minlength=labels.classes.number)
    ours = labels.classes.counts if labels.kind == "train" else ours
    theirs = align(labels.classes, reference.classes)
    mix = np.zeros((2, max(len(ours), len(theirs))))
    mix[0, :len(ours)], mix[1, :len(theirs)] = ours / ours.sum(), theirs / theirs.sum()
    unlike = abs(mix[0] - mix[1]).sum() / 2
    if unlike > UNLIKE:
        log(f"warning: the reference {reference.name} has another mix of classes than the samples: the distance counts "
            f"that {unlike:.0%} of the images are of other classes too; --labels balanced, train or a file choose the "
            "samples' mix")


def align(classes, counts):
    """Images of each label in a reference's {class folder: images}: by name where the checkpoint knows the names."""
    names = classes.names or []
    if not counts.keys() & set(names):
        return np.array(list(counts.values()))
    mine = np.array(list({**dict.fromkeys(names, 0), **counts}.values()))  # folders that are no class come last
    return np.insert(mine, [len(names)] * (classes.number - len(names)), 0)


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
    if isinstance(label, int) or text.isdecimal():
        if not 0 <= int(label) < len(names):
            raise FlowARError(f"label {label}: the model has classes 0..{len(names) - 1}")
        return int(label)
    matches = [number for number, name in enumerate(names) if name == text]
    matches = matches or [number for number, name in enumerate(names) if name.casefold() == text.casefold()]
    if len(matches) > 1:
        raise FlowARError(f"label {text!r}: {len(matches)} classes have this name, give a number: "
                          f"{', '.join(map(str, matches))}")
    if not matches:
        near = [name for name in names if text.casefold() in name.casefold()]
        near = dict.fromkeys(near + difflib.get_close_matches(text, names, n=5)) or names[:3]
        raise FlowARError(f"label {text!r}: no class of this name; near are: {name_some(near)}")
    return matches[0]
