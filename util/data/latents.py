"""Cached latents: posterior moments in shards that know what they are. Those of others: util/data/other_latents.py.

A cache of shards is a folder of safetensors files and index.json, written by scripts/cache_latents.py. The index
appears last: a folder without one is no cache. Images lie in the shards in a random order, so that an epoch can read
shard after shard (each worker maps one file at a time) and still mix the classes.
"""
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch.utils.data import Dataset

from models import FlowARError
from models.vae import LatentScale
from models.vaes import read_latent_scale
from models.weights import file_hash
from util.data.pixels import CONVERSIONS
from util.files import read_json
from util.training.record import LatentOrigin

INDEX = "index.json"
UNFINISHED = "index.unfinished.json"  # the settings of a cache that is being written
FORMAT = "flowar-latents-1"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SAFETENSORS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
NEWER = ("background", "vae", "vae_tensors", "source_sha256")  # that older caches do not know
HASHING_THREADS = 4
VARIANTS = 1  # stream of random draws, beside that of the order


def is_shards(path):
    """Whether a finished cache of shards is at a path; FlowARError for one that is not finished."""
    path = Path(path)
    if (path / INDEX).is_file():
        return True
    if (path / UNFINISHED).is_file():
        raise FlowARError(f"{path}: this cache is not complete; run scripts/cache_latents.py again to finish it")
    return False


def read_index(path):
    """The index of a cache of shards, as a dict; every shard that it names is there in full length."""
    file = Path(path) / INDEX
    index = {**dict.fromkeys(NEWER), **read_json(file)}
    if index.get("format") != FORMAT:
        raise FlowARError(f"{file}: format is {index.get('format')!r}, expected {FORMAT!r}")
    index["latent_scale"] = LatentScale(*read_latent_scale(index["latent_scale"], file))
    if sum(shard["images"] for shard in index["shards"]) != index["images"]:
        raise FlowARError(f"{file}: its shards do not add up to {index['images']} images")
    for shard in index["shards"]:
        shard_path = Path(path) / shard["file"]
        if not shard_path.is_file():
            raise FlowARError(f"{shard_path}: this shard is missing")
        if (size := shard_path.stat().st_size) != shard["bytes"]:
            raise FlowARError(f"{shard_path}: {size} bytes, expected {shard['bytes']}: truncated or of another cache")
    return index


def verify_checksums(path, index, rank=0, world_size=1):
    """FlowARError naming a shard whose bytes changed. The ranks share the work."""
    shards = index["shards"][rank::world_size]
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        for shard, sha256 in zip(shards, pool.map(lambda shard: file_hash(Path(path) / shard["file"]), shards)):
            if sha256 != shard["sha256"]:
                raise FlowARError(f"{Path(path) / shard['file']}: its SHA-256 is {sha256[:12]}..., expected "
                                  f"{shard['sha256'][:12]}...: damaged; write the cache again")


def scale_of_channels(mean, std, path):
    """The LatentScale that gives every channel mean 0 and std 1."""
    inverse = [1 / part if part > 0 else 0.0 for part in std]  # of which 0 is refused
    return LatentScale(*read_latent_scale((inverse, list(mean)), f"{path}: of its channels' mean and std"))


class ShardedMoments(Dataset):
    """Moments of a cache of shards. Items: (moments (2C, h, w) in the shards' dtype, label) for a key (epoch, index).

    In training the crop, and whether it is flipped, follow from (seed, epoch, index); otherwise it is the first crop.
    Files are memory-mapped and one at a time is open in a process: reading is O(1) and holds no copy of the data.
    """
    is_moments = True

    def __init__(self, root, seed=0, train=False, flip=True):
        self.root, self.seed, self.train, self.flip = Path(root), seed, train, flip
        self.index = self.read_index()
        self.classes, self.latent_scale = self.index["classes"], self.index["latent_scale"]
        self.ends = np.cumsum([shard["images"] for shard in self.index["shards"]])
        self.opened = None  # (number of the shard, moments, labels)
        self.drawn = None  # (epoch, variant of every image)

    def read_index(self):
        return read_index(self.root)

    @staticmethod
    def geometry(path):
        """What a cache says of itself, by options."""
        index = read_index(path)
        known = {"vae_embed_dim": index["channels"], "vae_stride": index["stride"], "img_size": index["img_size"]}
        return {**known, "background": tuple(index["background"])} if index["background"] else known

    def check(self, settings):
        """FlowARError naming the first thing in which the cache differs from DataSettings."""
        for key, option in (("stride", "vae_stride"), ("channels", "vae_embed_dim"), ("img_size", "img_size"),
                            ("background", "background")):
            cached, value = self.index[key], getattr(settings, option)
            if cached is not None and cached != (list(value) if option == "background" else value):
                raise FlowARError(f"{self.root}: this cache has {key} {cached}, but --{option} is {value}")

    def __len__(self):
        return self.index["images"]

    def __getstate__(self):
        return {**self.__dict__, "opened": None, "drawn": None}  # a mapped file does not travel to another process

    def open(self, shard):
        """(what item() reads of, labels) of a shard."""
        return open_shard(self.root / shard["file"], self.index, shard["images"])

    def item(self, moments, row, variant):
        return moments[row:row + 1, variant:variant + 1][0, 0]

    def summary(self):
        return f"{len(self):,} cached latents in {self.root}"

    def channel_scale(self):
        """The LatentScale of --latent_norm channel."""
        measured = self.index["measured"]
        return scale_of_channels(measured["channel_mean"], measured["channel_std"], self.root / INDEX)

    @property
    def origin(self):
        """LatentOrigin of the moments."""
        return LatentOrigin(self.index["vae"], self.index["vae_sha256"], self.latent_scale, self.index["vae_tensors"])

    def identity(self):
        """Of the images that were cached, as far as the cache knows them; see util.data.folders.Listing."""
        labels = [self.open(shard)[1] for shard in self.index["shards"]]
        digest = hashlib.sha256("".join(shard.get("sha256", "") for shard in self.index["shards"]).encode()).hexdigest()
        return {"classes": self.classes, "images": len(self),
                "counts": np.bincount(np.concatenate(labels), minlength=len(self.classes)).tolist(),
                "sha256": self.index["source_sha256"] or digest}

    def order(self, seed, epoch):
        """Permutation of the indices: the shards in random order, their images in random order."""
        rng = np.random.default_rng((seed, epoch))
        starts = self.ends - [shard["images"] for shard in self.index["shards"]]
        shards = rng.permutation(len(self.ends))
        return np.concatenate([starts[k] + rng.permutation(self.ends[k] - starts[k]) for k in shards])

    def variant(self, epoch, index):
        """Which of the stored crops: crop c is at 2 c, its flipped image at 2 c + 1."""
        if not self.train:
            return 0
        if self.drawn is None or self.drawn[0] != epoch:  # a generator for each image would cost more than the read
            rng = np.random.default_rng((self.seed, epoch, VARIANTS))
            crops = rng.integers(self.index["variants"] // 2, size=len(self), dtype=np.int32)
            self.drawn = (epoch, 2 * crops + (self.flip & (rng.random(len(self)) < 0.5)))
        return int(self.drawn[1][index])

    def __getitem__(self, key):
        epoch, index = key
        number = int(np.searchsorted(self.ends, index, side="right"))
        if self.opened is None or self.opened[0] != number:
            shard = self.index["shards"][number]
            self.opened = None  # unmap the last one first
            self.opened = number, *self.open(shard)
        _, moments, labels = self.opened
        row, variant = index - int(self.ends[number]) + len(labels), self.variant(epoch, index)
        return self.item(moments, row, variant), int(labels[row])


def open_shard(path, index, images=None):
    """(moments as a lazy slice (images, variants, 2C, h, w), labels (images,)) of a shard; FlowARError unless they are
    what the index, or the settings of a cache that is being written, says.
    """
    try:
        file = safe_open(path, framework="pt")
    except Exception as error:  # safetensors has no common error
        raise FlowARError(f"{path}: cannot be read ({error})") from error
    moments, labels = file.get_slice("moments"), file.get_tensor("labels").numpy()
    side = index["img_size"] // index["stride"]
    expected = [len(labels) if images is None else images, index["variants"], 2 * index["channels"], side, side]
    if (moments.get_shape(), moments.get_dtype()) != (expected, SAFETENSORS[index["dtype"]]):
        raise FlowARError(f"{path}: moments are {moments.get_shape()} {moments.get_dtype()}, expected {expected} "
                          f"{SAFETENSORS[index['dtype']]}")
    if len(labels) != expected[0] or labels.min() < 0 or labels.max() >= len(index["classes"]):
        raise FlowARError(f"{path}: its labels are not {expected[0]} numbers of its {len(index['classes'])} classes")
    return moments, labels


def texts_tensor(texts):
    """Texts as a tensor of a shard: bytes that no path can hold end each."""
    content = b"".join(os.fsencode(text) + b"\0" for text in texts) or b"\0"
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def read_tensor(path, name):
    """A tensor of a shard, None in shards that are older than it."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name) if name in file.keys() else None


def read_texts(path, name):
    """Texts in a shard: `names`, its images' paths in their split, or `skipped`, what could not be read."""
    content = bytes(read_tensor(path, name).numpy())
    end = b"\0" if b"\0" in content else b"\n"  # lines: caches of before
    return [os.fsdecode(text) for text in content.split(end) if text]


def count_conversions(path):
    """How many images of a shard took each of CONVERSIONS; zeros where it does not know."""
    bits = read_tensor(path, "converted")
    return [0 if bits is None else int((bits >> number & 1).sum()) for number in range(len(CONVERSIONS))]
