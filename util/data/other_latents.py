"""Cached latents of others: MAR's layout of one .npz an image, and LightningDiT's samples."""
import functools
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch.utils.data import Dataset

from models import FlowARError
from models.errors import first_sentence
from models.vae import KL16_LATENT_SCALE, DiagonalGaussian, LatentScale
from models.vaes import read_latent_scale
from models.weights import content_hash, read_file
from util.data.folders import Folder
from util.data.latents import SAFETENSORS, ShardedMoments, scale_of_channels
from util.files import read_json
from util.training.record import saved_origin

NPZ_INFO = "latents.json"
LIGHTNING, LIGHTNING_STATS = "latents_rank*_shard*.safetensors", "latents_stats.pt"


class LightningLatents(ShardedMoments):
    """LightningDiT's (extract_features.py): `latents` and `latents_flip` (N, C, h, w), one sample of the posterior
    each, and `labels` (N,), in latents_rank00_shard000.safetensors and so on. Read and drawn as a cache of shards of
    one crop, and as moments of a deterministic encoder. Their classes are numbers; their latent scale is not known.
    """

    @staticmethod
    def is_at(path):
        return next(Path(path).glob(LIGHTNING), None) is not None

    def read_index(self):
        """What index.json says of a cache of shards, out of the files' names, sizes and headers."""
        paths = sorted(self.root.glob(LIGHTNING))
        opened = [open_lightning(path) for path in paths]
        shapes, labels = [parts[0].get_shape()[1:] for parts, _ in opened], [labels for _, labels in opened]
        for path, shape in zip(paths, shapes):
            if shape != shapes[0]:
                raise FlowARError(f"{path}: its latents are {shape}, those of {paths[0].name} {shapes[0]}: of another "
                                  "VAE or image size")
        shards = [{"file": path.name, "images": len(some), "bytes": path.stat().st_size}
                  for path, some in zip(paths, labels)]
        classes = [str(label) for label in range(1 + max(int(some.max()) for some in labels))]
        return {**dict.fromkeys(("vae", "vae_sha256", "vae_tensors", "latent_scale")), "shape": tuple(shapes[0]),
                "shards": shards, "images": sum(map(len, labels)), "variants": 2, "classes": classes,
                "source_sha256": content_hash(shards)}

    @staticmethod
    def geometry(path):
        return {"vae_embed_dim": LightningLatents(path).index["shape"][0]}

    def check(self, settings):
        side = settings.img_size // settings.vae_stride
        if self.index["shape"] != (settings.vae_embed_dim, side, side):
            raise FlowARError(f"{self.root}: its latents are {self.index['shape']}, but --vae_embed_dim is "
                              f"{settings.vae_embed_dim} and --img_size / --vae_stride {side}")

    def open(self, shard):
        return open_lightning(self.root / shard["file"])

    def item(self, parts, row, variant):
        return DiagonalGaussian.of_mean(parts[variant][row:row + 1]).parameters[0]

    def channel_scale(self):
        path = self.root / LIGHTNING_STATS
        if not path.is_file():
            raise FlowARError(f"{path}: no such file, from which --latent_norm channel takes mean and std: LightningDiT"
                              " writes it when it first reads the latents, and publishes it beside its VAE")
        mean, std = (read_file(path)[name].flatten().tolist() for name in ("mean", "std"))
        return scale_of_channels(mean, std, path)


def open_lightning(path):
    """((latents, latents_flip) as lazy slices, labels (N,)) of a file of LightningDiT; FlowARError if it is none."""
    try:
        file = safe_open(path, framework="pt")
    except Exception as error:  # safetensors has no common error
        raise FlowARError(f"{path}: cannot be read ({error})") from error
    parts, labels = [file.get_slice(name) for name in ("latents", "latents_flip")], file.get_tensor("labels").numpy()
    shapes = [part.get_shape() for part in parts]
    if shapes[0] != shapes[1] or len(shapes[0]) != 4 or parts[0].get_dtype() not in SAFETENSORS.values():
        raise FlowARError(f"{path}: latents and latents_flip are {shapes[0]} and {shapes[1]}, expected two of N x C x "
                          "h x w, floating-point")
    if labels.shape != (shapes[0][0],) or not len(labels) or labels.dtype != np.int64 or labels.min() < 0:
        raise FlowARError(f"{path}: its labels are not {shapes[0][0]} numbers from 0 on")
    return parts, labels


class NpzMoments(Dataset):
    """MAR's cache: class folders with one .npz an image, holding `moments` and `moments_flip` (2C, h, w).
    Items: (float32 moments, label); in training the flipped ones with probability 1/2.
    """
    is_moments = True

    def __init__(self, root, shape, seed=0, train=False, flip=True):
        self.listing = Folder(root, {".npz"}).require_classes("cached latents")
        self.root, self.classes, self.shape, self.seed = Path(root), self.listing.classes, tuple(shape), seed
        self.flip = train and flip

    @staticmethod
    def is_at(path):
        return (Path(path) / NPZ_INFO).is_file() or next(Path(path).glob("*/*.npz"), None) is not None

    @staticmethod
    def geometry(path):
        return {}

    @functools.cached_property
    def info(self):
        """What the cache says of itself; one of MAR says nothing."""
        return read_json(self.root / NPZ_INFO) if (self.root / NPZ_INFO).is_file() else {}

    @functools.cached_property
    def latent_scale(self):
        scale = npz_latent_scale(self.root, self.shape[0] // 2)
        for what, recorded, there in (("files", self.info.get("files"), len(self.listing)),
                                      ("classes", self.info.get("classes"), self.classes)):
            if recorded not in (None, there):
                raise FlowARError(f"{self.root}: its {what} are not those of {NPZ_INFO} ({len(self.listing)} files in "
                                  f"{len(self.classes)} class folders are there): some are missing, or were added; run "
                                  "scripts/cache_latents.py again")
        return scale

    @functools.cached_property
    def origin(self):
        """LatentOrigin of the moments."""
        known = dict(zip(("name", "sha256", "tensors"), map(self.info.get, ("vae", "vae_sha256", "vae_tensors"))))
        return saved_origin({"vae": known})._replace(latent_scale=self.latent_scale)

    def summary(self):
        return f"{len(self):,} cached latents in {self.root}"

    def identity(self):
        """As that of a cache of shards."""
        source = self.info.get("source_sha256")
        return {**self.listing.identity(), **({"sha256": source} if source else {})}

    def __len__(self):
        return len(self.listing)

    def __getitem__(self, key):
        epoch, index = key
        path, label = self.listing.path(index), int(self.listing.labels[index])
        flip = self.flip and np.random.default_rng((self.seed, epoch, index)).random() < 0.5
        name = "moments_flip" if flip else "moments"
        try:
            with np.load(path) as file:
                moments = file[name]
        except Exception as error:  # a damaged file makes zipfile and numpy raise almost anything
            raise FlowARError(f"{path}: cannot read {name} ({first_sentence(error)})") from error
        if moments.dtype.kind != "f" or moments.shape != self.shape:
            raise FlowARError(f"{path}: {name} is {moments.shape} of {moments.dtype}: expected {self.shape} (2 x "
                              "latent channels, latent height, width), floats; the cache is of another VAE or image "
                              "size")
        return torch.from_numpy(moments.astype(np.float32, copy=False)), label


def npz_latent_scale(path, embed_dim):
    """LatentScale of a complete cache of .npz files; KL-16's for a cache of MAR, which says nothing of itself."""
    info = Path(path) / NPZ_INFO
    if not info.is_file():
        if embed_dim != 16:
            raise FlowARError(f"{path}: no {NPZ_INFO}, so this must be a KL-16 cache with 16 channels, but "
                              f"--vae_embed_dim is {embed_dim}; make the cache with scripts/cache_latents.py")
        return KL16_LATENT_SCALE
    content = read_json(info)
    if not content.get("complete"):
        raise FlowARError(f"{path}: this cache is not complete; run scripts/cache_latents.py again to finish it")
    return LatentScale(*read_latent_scale(content.get("latent_scale"), info))
