"""Cached latents: posterior moments in shards that know what they are, or in MAR's layout of one .npz an image.

A cache of shards is a folder of safetensors files and index.json, written by scripts/cache_latents.py. The index appears
last: a folder without one is no cache. Images lie in the shards in a random order, so that an epoch can read shard after
shard (each worker maps one file at a time) and still mix the classes.
"""
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.utils.data import Dataset
from torchvision.datasets import DatasetFolder

from models import FlowARError
from models.vae import KL16_LATENT_SCALE, LatentScale, vae_hash
from models.weights import first_line
from util.data import scan_folder
from util.files import file_hash, read_json

INDEX = "index.json"
UNFINISHED = "index.unfinished.json"  # the settings of a cache that is being written
NPZ_INFO = "latents.json"
FORMAT = "flowar-latents-1"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
HASHING_THREADS = 4
VARIANTS = 1  # stream of random draws, beside that of the order


# ---- what a cache says of itself -----------------------------------------------------------------------------


def kind_of_cache(path):
    """'shards', 'npz' (MAR's layout) or None. FlowARError for shards that are not finished."""
    path = Path(path)
    if not path.is_dir():
        return None
    if (path / INDEX).is_file():
        return "shards"
    if (path / UNFINISHED).is_file():
        raise FlowARError(f"{path}: this cache is not complete; run scripts/cache_latents.py again to finish it")
    if next(path.glob("shard-*.safetensors"), None) is not None:
        raise FlowARError(f"{path}: shards of latents without {INDEX}; run scripts/cache_latents.py again to make it")
    if (path / NPZ_INFO).is_file() or next(path.glob("*/*.npz"), None) is not None:
        return "npz"
    return None


def read_index(path):
    """The index of a cache of shards, as a dict; every shard that it names is there in full length."""
    file = Path(path) / INDEX
    index = read_json(file)
    if index.get("format") != FORMAT:
        raise FlowARError(f"{file}: format is {index.get('format')!r}, expected {FORMAT!r}")
    try:
        index["latent_scale"] = LatentScale(*map(float, index["latent_scale"]))
        for shard in index["shards"]:
            shard_path = Path(path) / shard["file"]
            if Path(shard["file"]).name != shard["file"]:
                raise FlowARError(f"{file}: shard {shard['file']!r} lies outside of the cache")
            if not shard_path.is_file():
                raise FlowARError(f"{shard_path}: this shard is missing")
            if shard_path.stat().st_size != shard["bytes"]:
                raise FlowARError(f"{shard_path}: {shard_path.stat().st_size} bytes, expected {shard['bytes']}: truncated or "
                                  "of another cache")
        if sum(shard["images"] for shard in index["shards"]) != index["images"]:
            raise FlowARError(f"{file}: its shards do not add up to {index['images']} images")
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, FlowARError):
            raise
        raise FlowARError(f"{file}: not an index of latents ({type(error).__name__} {error})") from error
    return index


def verify_checksums(path, index, rank=0, world_size=1):
    """FlowARError naming a shard whose bytes changed. The ranks share the work."""
    shards = index["shards"][rank::world_size]
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        for shard, found in zip(shards, pool.map(lambda shard: file_hash(Path(path) / shard["file"]), shards)):
            if found != shard["sha256"]:
                raise FlowARError(f"{Path(path) / shard['file']}: its SHA-256 is {found[:12]}..., expected "
                                  f"{shard['sha256'][:12]}...: damaged; write the cache again")


def check_index(path, index, expected):
    """FlowARError naming the first thing in which the cache differs from what training expects.

    expected: {key of the index: (option, value)}; a value None is not checked.
    """
    for key, (option, value) in expected.items():
        found = len(index["classes"]) if key == "classes" else index[key]
        if value is not None and found != value:
            raise FlowARError(f"{path}: this cache has {key} {found}, but {option} is {value}")


def vae_identity(vae, path, opened=None):
    """What a cache remembers of its VAE: SHA-256 of the file of --vae kl16, or over the tensors of another one.

    None if the VAE is not at hand: no file, or `opened` not given.
    """
    if vae == "kl16":
        return file_hash(path) if Path(path).is_file() else None
    return vae_hash(opened) if opened is not None else None


# ---- reading -------------------------------------------------------------------------------------------------


class ShardedMoments(Dataset):
    """Moments of a cache of shards. Items: (moments (2C, h, w) in the shards' dtype, label) for a key (epoch, index).

    In training the crop, and whether it is flipped, follow from (seed, epoch, index); otherwise it is the first crop.
    Files are memory-mapped and one at a time is open in a process: reading is O(1) and holds no copy of the data.
    """

    def __init__(self, root, seed=0, train=False, flip=True):
        self.root, self.index = Path(root), read_index(root)
        self.seed, self.train, self.flip = seed, train, flip
        self.ends = np.cumsum([shard["images"] for shard in self.index["shards"]])
        self.opened = None  # (number of the shard, moments, labels)
        self.drawn = None  # (epoch, variant of every image)

    @property
    def classes(self):
        return self.index["classes"]

    def __len__(self):
        return self.index["images"]

    def __getstate__(self):
        return {**self.__dict__, "opened": None, "drawn": None}  # a mapped file does not travel to another process

    def order(self, seed, epoch):
        """Permutation of the indices: the shards in random order, their images in random order."""
        rng = np.random.default_rng((seed, epoch))
        starts = self.ends - [shard["images"] for shard in self.index["shards"]]
        return np.concatenate([starts[k] + rng.permutation(self.ends[k] - starts[k])
                               for k in rng.permutation(len(self.ends))])

    def shard(self, number):
        if self.opened is None or self.opened[0] != number:
            path = self.root / self.index["shards"][number]["file"]
            self.opened = None  # unmap the last one first
            self.opened = (number, *open_shard(path))
        return self.opened[1:]

    def variant(self, epoch, index):
        """Which of the stored crops: crop c is at 2 c, its flipped image at 2 c + 1."""
        if not self.train:
            return 0
        if self.drawn is None or self.drawn[0] != epoch:  # for all images at once: a generator for each would cost more than the read
            rng = np.random.default_rng((self.seed, epoch, VARIANTS))
            crops = rng.integers(self.index["variants"] // 2, size=len(self), dtype=np.int32)
            self.drawn = (epoch, 2 * crops + (self.flip & (rng.random(len(self)) < 0.5)))
        return int(self.drawn[1][index])

    def __getitem__(self, key):
        epoch, index = key
        number = int(np.searchsorted(self.ends, index, side="right"))
        moments, labels = self.shard(number)
        row, variant = index - int(self.ends[number]) + len(labels), self.variant(epoch, index)
        return moments[row:row + 1, variant:variant + 1][0, 0], int(labels[row])


def open_shard(path):
    """(moments as a lazy slice, labels) of a shard."""
    try:
        file = safe_open(path, framework="pt")
        return file.get_slice("moments"), file.get_tensor("labels").numpy()
    except (OSError, SafetensorError) as error:
        raise FlowARError(f"{path}: cannot be read ({first_line(error)})") from error


def read_shard(path):
    """All tensors of a shard."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise FlowARError(f"{path}: cannot be read ({first_line(error)})") from error


def is_whole(path):
    """Whether a shard is there and as long as its header says."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def shard_names(path):
    """Paths of a shard's images inside their split, as they were when it was written."""
    with safe_open(path, framework="pt") as file:
        return bytes(file.get_tensor("names").numpy()).decode().split("\n")


class NpzMoments(Dataset):
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
    try:
        return LatentScale(*map(float, content["latent_scale"]))
    except (KeyError, TypeError, ValueError) as error:
        raise FlowARError(f"{info}: not a description of cached latents ({error})") from error
