"""Images: from a file to pixels, the recipe's crops, class folders."""
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as TF

from models import FlowARError
from models.files import first_line
from util.cluster import is_shortage

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")  # of any name; others start programs (Ghostscript)
LONGEST_SIDES = 100
RESIZE_MARGIN = 1.125  # training images are resized to 288 for crops of 256
MOST_UNREADABLE = 100  # images one after the other: more are not damaged, they are gone


def to_tensor(image):
    """PIL image -> float tensor (3, H, W) in [-1, 1]."""
    return TF.to_tensor(image) * 2 - 1


def to_uint8(images):
    """[-1, 1] -> uint8, rounded as the release saves its PNGs: clip((x + 1) / 2 * 255, 0, 255)."""
    return ((images.float() + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8)


def random_crop(image, size, rng):
    """The recipe's training crop: shorter side to size x 1.125, then a random size x size window."""
    image = TF.resize(image, int(size * RESIZE_MARGIN))
    left = rng.integers(image.width - size + 1)
    top = rng.integers(image.height - size + 1)
    return TF.crop(image, top, left, size, size)


def center_crop(image, size):
    """ADM's preprocessing, which MAR's cache uses: halve with a box filter while possible, bicubic, centre crop."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = size / min(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def open_image(path):
    """RGB image, or FlowARError with the path."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if max(image.size) > LONGEST_SIDES * min(image.size):  # resized to a crop's size it would take gigabytes
                raise ValueError(f"{image.width}x{image.height} pixels, expected sides within a factor of "
                                 f"{LONGEST_SIDES}")
            return image.convert("RGB")
    except Exception as error:  # a damaged file makes PIL's decoders raise almost anything
        raise FlowARError(f"{path}: cannot be read as an image ({first_line(error)})") from error


class Images(Dataset):
    """Class folders of images. Items: (float tensor (3, size, size) in [-1, 1], label).

    In training a random crop of the recipe, or with center=True the centre crop, flipped with probability 1/2.
    An unreadable image is an error, or with on_bad="skip" the next readable one replaces it and `skipped` counts it.
    """
    is_moments = False

    def __init__(self, root, size, seed=0, train=False, center=False, flip=True, on_bad="error"):
        self.folder = scan_folder(ImageFolder, root, "images")
        self.classes, self.size, self.seed = self.folder.classes, size, seed
        self.train, self.center, self.flip = train, center, flip
        self.on_bad, self.skipped = on_bad, multiprocessing.Value("q", 0)

    def __len__(self):
        return len(self.folder)

    def readable(self, index):
        """(image, label) of an index, or with on_bad="skip" of the first readable one from there on."""
        for offset in range(len(self)):
            path, label = self.folder.samples[(index + offset) % len(self)]
            try:
                return open_image(path), label
            except FlowARError as error:
                if self.on_bad != "skip" or is_shortage(error):
                    raise
                if offset >= MOST_UNREADABLE:
                    raise FlowARError(f"{path}: neither this image nor the {offset} before it can be read: is the disk "
                                      "there?") from error
                print(f"skipped: {error}", file=sys.stderr, flush=True)
                with self.skipped.get_lock():
                    self.skipped.value += 1
        raise FlowARError(f"{self.folder.root}: none of its {len(self)} images can be read")

    def __getitem__(self, key):
        epoch, index = key
        image, label = self.readable(index)
        rng = np.random.default_rng((self.seed, epoch, index))
        crop = random_crop(image, self.size, rng) if self.train and not self.center else center_crop(image, self.size)
        if self.train and self.flip and rng.random() < 0.5:
            crop = TF.hflip(crop)
        return to_tensor(crop), label


def scan_folder(kind, root, what, **options):
    """Open class folders, with the one-line errors of this project."""
    if not Path(root).is_dir():
        raise FlowARError(f"{root}: no such folder (expected {what} in class folders)")
    try:
        return kind(str(root), **options)
    except (FileNotFoundError, RuntimeError) as error:
        raise FlowARError(f"{root}: {str(error).splitlines()[0]} (expected {what} in class folders)") from error
