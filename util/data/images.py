"""Images of any source with their labels, as training, validation, caches and scripts read them."""
import os
import sys

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from models import FlowARError
from models.errors import name_some
from util.data.archives import SUFFIXES, Archive, find_archive, index_archive, names_below
from util.data.folders import Folder
from util.data.pixels import WHITE, center_crop, random_crop, read_image, to_tensor
from util.data.tables import Columns, Table, is_hub, split_names

READERS = [Table, Archive, Folder]  # of the first that is_at(path), a Listing is opened
SPLITS = {"train": ("train",), "val": ("val", "validation", "test")}  # what Hugging Face's datasets call them
MOST_UNREADABLE = 100  # images one after the other that may be skipped: more are not damaged, they are gone


def list_images(path, flat=False, columns=Columns()):
    """Listing of the images at a path, in class folders or, where flat is True, also of a flat set without classes.
    columns: of a Table.
    """
    path = os.path.expanduser(path)
    for reader in READERS:
        if reader.is_at(path):
            listing = reader(path, columns) if reader is Table else reader(path)
            if not flat or not len(listing):
                listing.check_classes()
            return listing
    raise FlowARError(f"{path}: not found: expected a folder, archive (.zip, .tar) or dataset of images")


def find_split(data_path, split, needed=True, columns=Columns()):
    """Path of the images of a split, train or val, of --data_path. Without any None, or FlowARError if it is needed."""
    if is_hub(data_path):
        repository, at, revision = str(data_path).partition("@")
        names = split_names(data_path, columns.dataset_config_name)
        paths = [f"{repository}/{name}{at}{revision}" for name in SPLITS[split] if name in names]
    else:
        if columns.dataset_config_name:
            data_path = os.path.join(data_path, columns.dataset_config_name)
        names = [split, *(split + suffix for suffix in SUFFIXES), *SPLITS[split]]
        paths = [path for path in (os.path.join(data_path, name) for name in names)
                 if any(reader.is_at(path) for reader in READERS)]
    if paths:
        return paths[0]
    if not needed:
        return None
    if archive := find_archive(data_path):
        names = {name.partition("/")[0] for name in names_below(index_archive(archive[0])[0], archive[1])}
    elif not is_hub(data_path):
        if not os.path.isdir(data_path):
            raise FlowARError(f"--data_path {data_path}: not found: expected a folder, archive (.zip, .tar) or dataset")
        names = os.listdir(data_path)
    raise FlowARError(f"--data_path {data_path}: {split}/ not found, only {name_some(sorted(names), 3)}: expected "
                      "train/ and val/, each with one folder per class")


class Images(Dataset):
    """Images at a path, see list_images. Items for a key (epoch, index): (float tensor (3, size, size) in [-1, 1],
    label).

    In training a random crop of the recipe, or with center=True the centre crop, flipped with probability 1/2; its
    draws follow from (seed, epoch, index). An unreadable image is an error; with on_bad="skip" the next readable one
    replaces it. background: under transparency, (r, g, b).
    """
    is_moments = False

    def __init__(self, root, size, seed=0, train=False, center=False, flip=True, on_bad=None, background=WHITE,
                 columns=Columns()):
        self.listing = list_images(root, columns=columns)
        self.classes, self.size, self.seed = self.listing.classes, size, seed
        self.random, self.flip = train and not center, train and flip
        self.on_bad, self.background = on_bad, background

    def __len__(self):
        return len(self.listing)

    def identity(self):
        """See Listing."""
        return self.listing.identity()

    def __getitem__(self, key):
        image, label = self.load(key[1])
        return self.crop(image, key), label

    def load(self, index):
        """(RGB image, label) of an index, or with on_bad="skip" of the first readable image from there on."""
        for number in range(index, index + MOST_UNREADABLE):
            number %= len(self)
            name = self.listing.path(number)
            try:
                image = read_image(self.listing.read(number), self.background, name).image
                return image, int(self.listing.labels[number])
            except FlowARError as error:
                if self.on_bad is None:
                    raise
                if self.on_bad == "error":
                    raise FlowARError(f"{error}; fix or remove it, or use --on_bad_image skip") from error
                print(f"skipped: {error}", file=sys.stderr, flush=True)
        raise FlowARError(f"{MOST_UNREADABLE} images in a row cannot be read, up to {name}")

    def crop(self, image, key):
        """The tensor that a key takes of an RGB image."""
        rng = np.random.default_rng((self.seed, *key))
        crop = random_crop(image, self.size, rng) if self.random else center_crop(image, self.size)
        if self.flip and rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(crop)
