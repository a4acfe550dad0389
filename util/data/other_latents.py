"""Cached latents of others: MAR's layout of one .npz an image, and LightningDiT's samples."""
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from models import FlowARError
from models.errors import first_sentence
from models.vae import KL16_LATENT_SCALE, DiagonalGaussian
from models.vaes import read_latent_scale
from models.weights import content_hash, read_file
from util.data.folders import Folder
from util.data.latents import SAFETENSORS, ShardedMoments, open_file, scale_of_channels
from util.files import read_json
from util.training.record import LatentOrigin

NPZ_INFO = "latents.json"
LIGHTNING, LIGHTNING_STATS = "latents_rank*_shard*.safetensors", "latents_stats.pt"


class LightningLatents(ShardedMoments):
    """LightningDiT's (extract_features.py): `latents` and `latents_flip` (N, C, h, w), one sample of the posterior
    each, and `labels` (N,), in latents_rank00_shard000.safetensors and so on. Read and drawn as a cache of shards of
    one crop, and as moments of a deterministic encoder. Their classes are numbers; their latent scale is not known.
    """

    @staticmethod
    def is_at(path):
        return any(Path(path).glob(LIGHTNING))

    def read_index(self):
        """What index.json says of a cache of shards, out of the files' names, sizes and headers."""
        shards, first, last_label = [], None, 0
        for path in sorted(self.root.glob(LIGHTNING)):
            (latents, _), labels = open_lightning(path)
            shape = tuple(latents.get_shape()[1:])
            first = first or (path.name, shape)
            if shape != first[1]:
                raise FlowARError(f"{path}: latents are {shape}, expected {first[1]} as in {first[0]}: made with "
                                  "another VAE or image size")
            shards.append({"file": path.name, "images": len(labels), "bytes": path.stat().st_size})
            last_label = max(last_label, int(labels.max()))
        unknown = dict.fromkeys(("vae", "vae_sha256", "vae_tensors", "latent_scale"))
        return {**unknown, "shape": shape, "geometry": {"vae_embed_dim": shape[0]}, "shards": shards, "crops": 1,
                "variants": 2, "classes": [str(label) for label in range(last_label + 1)],
                "source_sha256": content_hash(shards)}

    def open(self, shard):
        return open_lightning(self.root / shard["file"])

    def item(self, parts, row, variant):
        return DiagonalGaussian.of_mean(parts[variant][row:row + 1]).parameters[0]

    def channel_scale(self):
        path = self.root / LIGHTNING_STATS
        if not path.is_file():
            raise FlowARError(f"{path}: not found, but --latent_norm channel reads mean and std from it: LightningDiT "
                              "writes it on first use of the latents, and publishes it with its VAE")
        statistics = read_file(path)
        mean, std = statistics["mean"].flatten().tolist(), statistics["std"].flatten().tolist()
        return scale_of_channels(mean, std, path)


def open_lightning(path):
    """((latents, latents_flip) as lazy slices, labels (N,)) of a file of LightningDiT; FlowARError if it is none."""
    file = open_file(path)
    latents, flipped = file.get_slice("latents"), file.get_slice("latents_flip")
    shape, labels = latents.get_shape(), file.get_tensor("labels").numpy()
    if shape != flipped.get_shape() or len(shape) != 4 or latents.get_dtype() not in SAFETENSORS.values():
        raise FlowARError(f"{path}: latents and latents_flip are {shape} and {flipped.get_shape()}: expected floats N "
                          "x C x h x w for both")
    if labels.shape != (shape[0],) or not len(labels) or labels.dtype != np.int64 or labels.min() < 0:
        raise FlowARError(f"{path}: expected {shape[0]} labels, integers from 0")
    return (latents, flipped), labels


class NpzMoments(Dataset):
    """MAR's cache: class folders with one .npz an image, holding `moments` and `moments_flip` (2C, h, w).
    Items: (float32 moments, label); in training the flipped ones with probability 1/2. shape, geometry: as of shards.
    """
    is_moments = True

    def __init__(self, root, seed=0, train=False, flip=True):
        self.listing = Folder(root, {".npz"})
        self.classes, self.seed, self.flip = self.listing.classes, seed, train and flip
        file, info = Path(root) / NPZ_INFO, {}
        if file.is_file():
            info = read_json(file)
            if not info.get("complete"):
                raise FlowARError(f"{root}: this cache is incomplete: run scripts/cache_latents.py again")
            if info.get("files", len(self)) != len(self) or info.get("classes", self.classes) != self.classes:
                raise FlowARError(f"{root}: files or classes do not match {NPZ_INFO} ({len(self)} files in "
                                  f"{len(self.classes)} class folders found): run scripts/cache_latents.py again")
        channels, *sides = self.load(0, "moments").shape
        self.shape, self.geometry = (channels // 2, *sides), {"vae_embed_dim": channels // 2}
        if not info and channels != 32:  # a cache of MAR says nothing of itself
            raise FlowARError(f"{root}: without {NPZ_INFO}, expected a KL-16 cache with 16 channels, got "
                              f"{channels // 2}: make the cache with scripts/cache_latents.py")
        scale = read_latent_scale(info["latent_scale"], file) if info else KL16_LATENT_SCALE
        name = info.get("vae") or f"that of {root}"
        self.origin = LatentOrigin(name, info.get("vae_sha256"), tuple(scale), info.get("vae_tensors"))
        self.source_sha256 = info.get("source_sha256")

    @staticmethod
    def is_at(path):
        return (Path(path) / NPZ_INFO).is_file() or any(Path(path).glob("*/*.npz"))

    def __len__(self):
        return len(self.listing)

    def identity(self):
        """As that of a cache of shards."""
        identity = self.listing.identity()
        return {**identity, "sha256": self.source_sha256 or identity["sha256"]}

    def load(self, index, name):
        path = self.listing.path(index)
        try:
            with np.load(path) as file:
                return file[name]
        except Exception as error:  # a damaged file makes zipfile and numpy raise almost anything
            raise FlowARError(f"{path}: {name} cannot be read ({first_sentence(error)})") from error

    def __getitem__(self, key):
        epoch, index = key
        name = "moments"
        if self.flip and np.random.default_rng((self.seed, epoch, index)).random() < 0.5:
            name = "moments_flip"
        moments, expected = self.load(index, name), (2 * self.shape[0], *self.shape[1:])
        if moments.dtype.kind != "f" or moments.shape != expected:
            raise FlowARError(f"{self.listing.path(index)}: {name} is {moments.shape} {moments.dtype}: expected floats "
                              f"{expected}, as for the first image")
        return torch.from_numpy(moments.astype(np.float32, copy=False)), int(self.listing.labels[index])
