"""Images and cached latents: the recipe's transform, MAR's cache layout, and an order that depends on (seed, epoch).

A dataset's key is (epoch, index): crop and flip of an image follow from (seed, epoch, index), whoever loads it.
"""
import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import DatasetFolder, ImageFolder
from torchvision.transforms import functional as TF

from models import FlowARError
from models.vae import KL16_LATENT_SCALE, LatentScale

RESIZE_MARGIN = 1.125  # training images are resized to 288 for crops of 256
CACHE_INFO = "latents.json"


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
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise FlowARError(f"{path}: cannot be read as an image ({error})") from error


class Images(Dataset):
    """Class folders of images. Items: (float tensor (3, size, size) in [-1, 1], label).

    In training a random crop of the recipe, or with center=True the centre crop, flipped with probability 1/2.
    """

    def __init__(self, root, size, seed=0, train=False, center=False, flip=True):
        self.folder = scan_folder(ImageFolder, root, "images")
        self.size, self.seed, self.train, self.center, self.flip = size, seed, train, center, flip

    @property
    def classes(self):
        return self.folder.classes

    def __len__(self):
        return len(self.folder)

    def __getitem__(self, key):
        epoch, index = key
        path, label = self.folder.samples[index]
        image = open_image(path)
        rng = np.random.default_rng((self.seed, epoch, index))
        crop = random_crop(image, self.size, rng) if self.train and not self.center else center_crop(image, self.size)
        if self.train and self.flip and rng.random() < 0.5:
            crop = TF.hflip(crop)
        return to_tensor(crop), label


class CachedMoments(Dataset):
    """MAR's cache: class folders with one .npz an image, holding `moments` and `moments_flip` (2C, h, w).

    Items: (float32 moments, label); in training the flipped ones with probability 1/2.
    """

    def __init__(self, root, shape, seed=0, train=False, flip=True):
        self.folder = scan_folder(DatasetFolder, root, "cached latents", loader=None, extensions=(".npz",))
        self.shape, self.seed, self.flip = tuple(shape), seed, train and flip

    @property
    def classes(self):
        return self.folder.classes

    def __len__(self):
        return len(self.folder)

    def __getitem__(self, key):
        epoch, index = key
        path, label = self.folder.samples[index]
        flip = self.flip and np.random.default_rng((self.seed, epoch, index)).random() < 0.5
        name = "moments_flip" if flip else "moments"
        try:
            with np.load(path, allow_pickle=False) as file:
                moments = file[name]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
            raise FlowARError(f"{path}: cannot read {name} ({error})") from error
        if moments.shape != self.shape:
            raise FlowARError(f"{path}: {name} is {moments.shape}: expected {self.shape} (2 x latent channels, latent "
                              "height, width); the cache is of another VAE or image size")
        return torch.from_numpy(moments.astype(np.float32, copy=False)), label


def scan_folder(kind, root, what, **options):
    """Open class folders, with the one-line errors of this project."""
    if not Path(root).is_dir():
        raise FlowARError(f"{root}: no such folder (expected {what} in class folders)")
    try:
        return kind(str(root), **options)
    except (FileNotFoundError, RuntimeError) as error:
        raise FlowARError(f"{root}: {str(error).splitlines()[0]} (expected {what} in class folders)") from error


def has_cache(path):
    """Whether a folder holds cached latents: a class folder with an .npz in it, or the cache's description."""
    path = Path(path)
    return path.is_dir() and ((path / CACHE_INFO).is_file() or next(path.glob("*/*.npz"), None) is not None)


def read_cache_info(path):
    """What cache_latents.py left beside the latents, or None: MAR's own caches say nothing of themselves."""
    info = Path(path) / CACHE_INFO
    if not info.is_file():
        return None
    try:
        content = json.loads(info.read_text())
        return {**content, "latent_scale": LatentScale(*map(float, content["latent_scale"]))}
    except (ValueError, KeyError, TypeError) as error:
        raise FlowARError(f"{info}: not a description of cached latents ({error})") from error


def cache_latent_scale(path, embed_dim):
    """LatentScale of a complete cache; KL-16's for a cache of MAR."""
    info = read_cache_info(path)
    if info is None:
        if embed_dim != 16:
            raise FlowARError(f"{path}: no {CACHE_INFO}, so this must be a KL-16 cache with 16 channels, but "
                              f"--vae_embed_dim is {embed_dim}; make the cache with scripts/cache_latents.py")
        return KL16_LATENT_SCALE
    if not info.get("complete"):
        raise FlowARError(f"{path}: this cache is not complete; run scripts/cache_latents.py again to finish it")
    return info["latent_scale"]


def check_classes(dataset, class_num, root):
    if len(dataset.classes) > class_num:
        raise FlowARError(f"{root}: {len(dataset.classes)} class folders, but --class_num is {class_num}")


# ---- order -------------------------------------------------------------------------------------------------


class EpochSampler(Sampler):
    """Keys (epoch, index) of one rank.

    The epoch's order is a permutation that depends on (seed, epoch) alone; rank r takes elements r, r + world, ...,
    so that the k-th batches of all ranks together are the same images for every number of ranks.
    """

    def __init__(self, length, *, rank=0, world_size=1, seed=0, shuffle=False, drop_last=False):
        self.length = length - length % world_size if drop_last else length
        self.total, self.rank, self.world_size = length, rank, world_size
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.total)
        else:
            order = np.arange(self.total)
        return ((self.epoch, int(index)) for index in order[self.rank:self.length:self.world_size])

    def __len__(self):
        return len(range(self.rank, self.length, self.world_size))


def build_loader(dataset, batch_size, *, rank=0, world_size=1, seed=0, train=False, num_workers=0, pin_memory=False):
    """Loader of one rank. In training only whole global batches, in an order drawn anew for every epoch."""
    sampler = EpochSampler(len(dataset), rank=rank, world_size=world_size, seed=seed, shuffle=train, drop_last=train)
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, num_workers=num_workers, pin_memory=pin_memory,
                      drop_last=train, persistent_workers=train and num_workers > 0)
