"""Images: the recipe's transform, and an order of images or cached latents that depends on (seed, epoch) alone.

A dataset's key is (epoch, index): crop and flip of an image follow from (seed, epoch, index), whoever loads it.
"""
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as TF

from models import FlowARError
from models.weights import first_line

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")  # whatever a file is called; others start programs, such as Ghostscript
LONGEST_SIDES = 100
RESIZE_MARGIN = 1.125  # training images are resized to 288 for crops of 256
MOST_UNREADABLE = 100  # images one after the other: more are not damaged, they are gone


# ---- pixels and crops ----------------------------------------------------------------------------------------


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


# ---- datasets ----------------------------------------------------------------------------------------------


def open_image(path):
    """RGB image, or FlowARError with the path."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if max(image.size) > LONGEST_SIDES * min(image.size):  # resized to a crop's size it would take gigabytes
                raise ValueError(f"{image.width}x{image.height} pixels, expected sides within a factor of {LONGEST_SIDES}")
            return image.convert("RGB")
    except Exception as error:  # a damaged file makes PIL's decoders raise almost anything
        raise FlowARError(f"{path}: cannot be read as an image ({first_line(error)})") from error


class Images(Dataset):
    """Class folders of images. Items: (float tensor (3, size, size) in [-1, 1], label).

    In training a random crop of the recipe, or with center=True the centre crop, flipped with probability 1/2.
    An image that cannot be read is an error with its path, or with on_bad="skip" the next one that can takes its place;
    `skipped` counts them over all workers.
    """

    def __init__(self, root, size, seed=0, train=False, center=False, flip=True, on_bad="error"):
        self.folder = scan_folder(ImageFolder, root, "images")
        self.size, self.seed, self.train, self.center, self.flip = size, seed, train, center, flip
        self.on_bad, self.skipped = on_bad, multiprocessing.Value("q", 0)

    @property
    def classes(self):
        return self.folder.classes

    def __len__(self):
        return len(self.folder)

    def readable(self, index):
        """(image, label) of an index, or with on_bad="skip" of the first readable one from there on."""
        for offset in range(len(self)):
            path, label = self.folder.samples[(index + offset) % len(self)]
            try:
                return open_image(path), label
            except FlowARError as error:
                if self.on_bad != "skip":
                    raise
                if offset >= MOST_UNREADABLE:
                    raise FlowARError(f"{path}: neither this image nor the {offset} before it can be read: is the disk there?") from error
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


def check_classes(dataset, class_num, root):
    if len(dataset.classes) > class_num:
        raise FlowARError(f"{root}: {len(dataset.classes)} class folders, but --class_num is {class_num}")


# ---- order -------------------------------------------------------------------------------------------------


class EpochSampler(Sampler):
    """Keys (epoch, index) of one rank.

    The epoch's order is a permutation that depends on (seed, epoch) alone; rank r takes elements r, r + world, ...,
    so that the k-th batches of all ranks together are the same images for every number of ranks. set_epoch(e, start=n)
    begins with image n of epoch e's order.

    order(seed, epoch) -> permutation; a uniformly random one if None.
    """

    def __init__(self, length, *, rank=0, world_size=1, seed=0, shuffle=False, drop_last=False, order=None):
        self.length = length - length % world_size if drop_last else length
        self.total, self.rank, self.world_size = length, rank, world_size
        self.seed, self.shuffle, self.epoch, self.start = seed, shuffle, 0, 0
        self.order = order or self.random_order

    def random_order(self, seed, epoch):
        return np.random.default_rng((seed, epoch)).permutation(self.total)

    def set_epoch(self, epoch, start=0):
        self.epoch, self.start = epoch, start

    def indices(self, first, last):
        """This rank's images among first..last - 1 of the epoch's order; first is a multiple of the world size."""
        order = self.order(self.seed, self.epoch) if self.shuffle else np.arange(self.total)
        return order[first + self.rank:last:self.world_size].tolist()

    def __iter__(self):
        return ((self.epoch, index) for index in self.indices(self.start, self.length))

    def __len__(self):
        return len(range(self.start + self.rank, self.length, self.world_size))


def build_loader(dataset, batch_size, *, rank=0, world_size=1, seed=0, train=False, num_workers=0, pin_memory=False, timeout=0):
    """Loader of one rank. In training only whole global batches, in an order drawn anew for every epoch.

    timeout: seconds to wait for a batch of the workers; 0 waits for ever.
    """
    sampler = EpochSampler(len(dataset), rank=rank, world_size=world_size, seed=seed, shuffle=train, drop_last=train,
                           order=getattr(dataset, "order", None))
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, num_workers=num_workers, pin_memory=pin_memory,
                      drop_last=train, persistent_workers=train and num_workers > 0, timeout=timeout if num_workers else 0,
                      worker_init_fn=obey_the_rank_alone)


def obey_the_rank_alone(worker):
    """A signal to the whole job must not kill the workers under a rank that is about to save: only the rank itself ends them."""
    if not hasattr(signal, "sigwaitinfo"):
        return
    signals, parent = {signal.SIGTERM, signal.SIGUSR1}, os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait():
        while True:
            found = signal.sigwaitinfo(signals)
            if found.si_signo == signal.SIGTERM and found.si_pid == parent:
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
