"""Images in class folders, and the recipe's crops of them."""
import multiprocessing
import sys

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from models import FlowARError
from util.cluster import from_main, gather_to_main, is_shortage, log, together
from util.data.pixels import CONVERSIONS, WHITE, describe_conversions, read_image
from util.data.places import list_images

RESIZE_MARGIN = 1.125  # training images are resized to 288 for crops of 256
SKIPPED, READ, FIRST_CONVERSION = range(3)  # what Images counts
MOST_UNREADABLE = 100  # images one after the other: more are not damaged, they are gone


def to_tensor(image):
    """PIL image -> float tensor (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() / 255 * 2 - 1


def to_uint8(images):
    """[-1, 1] -> uint8, rounded as the release saves its PNGs: clip((x + 1) / 2 * 255, 0, 255)."""
    return ((images.float() + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8)


def random_crop(image, size, rng):
    """The recipe's training crop: shorter side to size x 1.125, then a random size x size window."""
    short, target = min(image.size), int(size * RESIZE_MARGIN)
    width, height = (target * side // short for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
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
    """Images of a place, see util.data.places. Items: (float tensor (3, size, size) in [-1, 1], label).

    In training a random crop of the recipe, or with center=True the centre crop, flipped with probability 1/2.
    An unreadable image is an error, or with on_bad="skip" the next readable one replaces it; "error" is of a program
    with the option --on_bad_image. background: under
    transparency, (r, g, b). What was skipped or converted on the way is counted for all workers together.
    """
    is_moments = False

    def __init__(self, root, size, seed=0, train=False, center=False, flip=True, on_bad=None, background=WHITE):
        self.folder = from_main(lambda: list_images(root))  # one rank asks a network disk
        together(self.folder.prepare)
        self.classes, self.size, self.seed = self.folder.classes, size, seed
        self.train, self.center, self.flip = train, center, flip
        self.on_bad, self.background = on_bad, background
        self.way_on = f"; mend or remove it{', or --on_bad_image skip' if on_bad else ''}"  # after such an error
        self.counts = multiprocessing.Array("q", FIRST_CONVERSION + len(CONVERSIONS))

    def __len__(self):
        return len(self.folder)

    def __getstate__(self):
        return {**self.__dict__, "folder": self.folder.for_workers()}

    @property
    def bytes_an_image(self):
        return self.folder.sizes.mean()

    def identity(self):
        """See util.data.folders.Listing."""
        return self.folder.identity()

    def count(self, number):
        with self.counts.get_lock():
            self.counts[number] += 1

    def say_counts(self, conversions=True):
        """Log what was skipped, and what converted, by all ranks together."""
        counts = gather_to_main(self.counts[:]) or [self.counts[:]]
        skipped, read, *made = np.sum(counts, axis=0).tolist()
        if skipped:
            log(f"{skipped} times an image could not be read and the next one took its place")
        if conversions and (line := describe_conversions(read, made)):
            log(line)

    def load(self, index):
        """(Pixels, label) of an index, or with on_bad="skip" of the first readable one from there on."""
        for offset in range(len(self)):
            path, label = self.folder[(index + offset) % len(self)]
            try:
                pixels = read_image(path, self.background)
            except FlowARError as error:
                if is_shortage(error):
                    raise
                if self.on_bad != "skip":
                    raise FlowARError(f"{error}{self.way_on}") from error
                if offset >= MOST_UNREADABLE:
                    raise FlowARError(f"{path}: neither this image nor the {offset} before it can be read: is the disk "
                                      "there?") from error
                print(f"skipped: {error}", file=sys.stderr, flush=True)
                self.count(SKIPPED)
                continue
            self.count(READ)
            for conversion in pixels.conversions:
                self.count(FIRST_CONVERSION + conversion)
            return pixels, label
        raise FlowARError(f"{self.folder.root}: none of its {len(self)} images can be read")

    def crop(self, image, key):
        """The tensor that a key takes of an RGB image: its draws follow from (seed, epoch, index)."""
        rng = np.random.default_rng((self.seed, *key))
        crop = random_crop(image, self.size, rng) if self.train and not self.center else center_crop(image, self.size)
        if self.train and self.flip and rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(crop)

    def __getitem__(self, key):
        pixels, label = self.load(key[1])
        return self.crop(pixels.image, key), label
