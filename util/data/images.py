"""Images of any source with their labels, and the recipe's crops of them."""
import os
import sys

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from models import FlowARError
from models.errors import name_some
from util.data.archives import SUFFIXES, Archive, below, find_archive, read_index
from util.data.folders import Folder
from util.data.pixels import WHITE, read_image
from util.data.tables import Table, is_hub, split_names

READERS = [Table, Archive, Folder]  # of the first that is_at(path), a Listing is opened
SPLITS = {"train": ("train",), "val": ("val", "validation", "test")}  # what Hugging Face's datasets call them
RESIZE_MARGIN = 1.125  # training images are resized to 288 for crops of 256
MOST_UNREADABLE = 100  # images one after the other that may be skipped: more are not damaged, they are gone


def list_images(path, flat=False):
    """Listing of the images at a path, in class folders or, where flat is True, also of a flat set without classes."""
    for reader in READERS:
        if reader.is_at(path):
            listing = reader(path)
            return listing if flat and len(listing) else listing.require_classes()
    raise FlowARError(f"{path}: no folder, archive (.zip, .tar) or dataset of images is there")


def find_split(data_path, split, needed=True):
    """Path of the images of a split, train or val, of --data_path. Without any None, or FlowARError if it is needed."""
    if is_hub(data_path):
        repository, at, revision = str(data_path).partition("@")
        names = split_names(data_path)
        paths = [f"{repository}/{name}{at}{revision}" for name in SPLITS[split] if name in names]
    else:
        names = [split, *(split + suffix for suffix in SUFFIXES), *SPLITS[split]]
        paths = [path for path in (os.path.join(data_path, name) for name in names)
                 if any(reader.is_at(path) for reader in READERS)]
    if paths or not needed:
        return paths[0] if paths else None
    if archive := find_archive(data_path):
        names = {name.partition("/")[0] for name in below(read_index(archive[0])[0], archive[1]).values()}
    elif not is_hub(data_path):
        if not os.path.isdir(data_path):
            raise FlowARError(f"--data_path {data_path}: no such folder, archive or dataset")
        names = os.listdir(data_path)
    raise FlowARError(f"--data_path {data_path}: there is no {split}/ in it, only {name_some(sorted(names), 3)}; give "
                      "what holds train/ and val/, each with a folder per class")


def to_tensor(image):
    """PIL image -> float tensor (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255) * 2 - 1


def to_uint8(images):
    """[-1, 1] -> uint8, rounded as the release saves its PNGs: clip((x + 1) / 2 * 255, 0, 255)."""
    return ((images.float() + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8)


def random_crop(image, size, rng):
    """The recipe's training crop: shorter side to size x 1.125, then a random size x size window. The resize is
    torchvision's of a PIL image, bilinear and antialiased.
    """
    side, shorter = int(size * RESIZE_MARGIN), min(image.size)
    image = image.resize([int(side * length / shorter) for length in image.size], Image.Resampling.BILINEAR)
    left = rng.integers(image.width - size + 1)
    top = rng.integers(image.height - size + 1)
    return image.crop((left, top, left + size, top + size))


def center_crop(image, size):
    """ADM's preprocessing, which MAR's cache uses: halve with a box filter while possible, bicubic, centre crop."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = size / min(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class Images(Dataset):
    """Images at a path, see list_images. Items for a key (epoch, index): (float tensor (3, size, size) in [-1, 1],
    label).

    In training a random crop of the recipe, or with center=True the centre crop, flipped with probability 1/2; its
    draws follow from (seed, epoch, index). An unreadable image is an error; with on_bad="skip" the next readable one
    replaces it. background: under transparency, (r, g, b).
    """
    is_moments = False

    def __init__(self, root, size, seed=0, train=False, center=False, flip=True, on_bad=None, background=WHITE):
        self.listing = list_images(root)
        self.classes, self.size, self.seed = self.listing.classes, size, seed
        self.random, self.flip = train and not center, train and flip
        self.on_bad, self.background = on_bad, background

    def __len__(self):
        return len(self.listing)

    def summary(self):
        return f"{self.listing.summary()} in {self.listing.root}, encoded on the fly"

    def identity(self):
        """See Listing."""
        return self.listing.identity()

    def load(self, index):
        """(Pixels, label) of an index, or with on_bad="skip" of the first readable one from there on."""
        for number in range(index, index + MOST_UNREADABLE):
            number %= len(self)
            try:
                name, content = self.listing.path(number), self.listing.read(number)
                return read_image(content, self.background, name), int(self.listing.labels[number])
            except FlowARError as error:
                if self.on_bad != "skip":
                    cure = "; mend or remove it, or --on_bad_image skip" if self.on_bad else ""
                    raise FlowARError(f"{error}{cure}") from error
                print(f"skipped: {error}", file=sys.stderr, flush=True)
        raise FlowARError(f"{MOST_UNREADABLE} images in a row cannot be read, the last of them {name}")

    def crop(self, image, key):
        """The tensor that a key takes of an RGB image."""
        rng = np.random.default_rng((self.seed, *key))
        crop = random_crop(image, self.size, rng) if self.random else center_crop(image, self.size)
        if self.flip and rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(crop)

    def __getitem__(self, key):
        pixels, label = self.load(key[1])
        return self.crop(pixels.image, key), label
