"""Cached latents: posterior moments in shards that know what they are. Those of others: util/data/other_latents.py.

A cache of shards is a folder of safetensors files and index.json, written by scripts/cache_latents.py. The index
appears last: a folder without one is no cache. Images lie in the shards in a random order, so that an epoch can read
shard after shard (each worker maps one file at a time) and still mix the classes.
"""
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch.utils.data import Dataset

from models import FlowARError
from models.vae import LatentScale
from models.vaes import read_latent_scale
from util.files import read_json
from util.training.record import LatentOrigin

INDEX = "index.json"
UNFINISHED = "index.unfinished.json"  # the settings of a cache that is being written
FORMAT = "flowar-latents-1"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SAFETENSORS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
NEWER = ("background", "vae", "vae_tensors", "source_sha256")  # that older caches do not know
VARIANTS = 1  # stream of random draws, beside that of the order


class ShardedMoments(Dataset):
    """Moments of a cache of shards. Items: (moments (2C, h, w) in the shards' dtype, label) for a key (epoch, index).

    In training the crop, and whether it is flipped, follow from (seed, epoch, index); otherwise it is the first crop.
    Files are memory-mapped and one at a time is open in a process: reading is O(1) and holds no copy of the data.
    index: what index.json says; shape: (C, h, w) of the latents; geometry: the options that the cache decides.
    """
    is_moments = True

    def __init__(self, root, seed=0, train=False, flip=True):
        self.root, self.seed, self.train, self.flip = Path(root), seed, train, flip
        self.index = index = self.read_index()
        self.classes, self.shape, self.geometry = index["classes"], index["shape"], index["geometry"]
        self.crops = index["crops"] if isinstance(index["crops"], int) else 1
        if train and flip and index["variants"] == self.crops:
            raise FlowARError(f"{root}: this cache was made with --no_flip: train with --no_flip too, or make it again "
                              "without")
        name, scale = index["vae"] or f"that of {root}", index["latent_scale"]
        self.origin = LatentOrigin(name, index["vae_sha256"], scale and tuple(scale), index["vae_tensors"])
        self.ends = np.cumsum([shard["images"] for shard in index["shards"]])
        self.opened = None  # (number of the shard, moments, labels)
        self.drawn = None  # (epoch, variant of every image)

    @staticmethod
    def is_at(path):
        """FlowARError for a cache that is not finished."""
        if (Path(path) / INDEX).is_file():
            return True
        if (Path(path) / UNFINISHED).is_file():
            raise FlowARError(f"{path}: this cache is incomplete: run scripts/cache_latents.py again to finish it")
        return False

    def read_index(self):
        """The index, as a dict; every shard that it names is there in full length."""
        file = self.root / INDEX
        index = {**dict.fromkeys(NEWER), **read_json(file)}
        if index.get("format") != FORMAT:
            raise FlowARError(f"{file}: format is {index.get('format')!r}, expected {FORMAT!r}")
        for shard in index["shards"]:
            path = self.root / shard["file"]
            if not path.is_file():
                raise FlowARError(f"{path}: shard not found")
            if (size := path.stat().st_size) != shard["bytes"]:
                raise FlowARError(f"{path}: expected {shard['bytes']} bytes, got {size}: truncated or from another "
                                  "cache")
        channels, stride, side = index["channels"], index["stride"], index["img_size"] // index["stride"]
        index["latent_scale"] = LatentScale(*read_latent_scale(index["latent_scale"], file))
        index["shape"] = channels, side, side
        index["geometry"] = {"vae_embed_dim": channels, "vae_stride": stride, "img_size": index["img_size"]}
        if index["background"]:
            index["geometry"]["background"] = tuple(index["background"])
        return index

    def __len__(self):
        return int(self.ends[-1])

    def __getstate__(self):
        return {**self.__dict__, "opened": None, "drawn": None}  # a mapped file does not travel to another process

    def open(self, shard):
        """(what item() reads of, labels) of a shard."""
        return open_shard(self.root / shard["file"], self.index, shard["images"])

    def item(self, moments, row, variant):
        return moments[row:row + 1, variant:variant + 1][0, 0]

    def channel_scale(self):
        """The LatentScale of --latent_norm channel."""
        measured = self.index["measured"]
        return scale_of_channels(measured["channel_mean"], measured["channel_std"], self.root / INDEX)

    def identity(self):
        """Of the images that were cached, as far as the cache knows them; see util.data.folders.Listing."""
        labels = np.concatenate([self.open(shard)[1] for shard in self.index["shards"]])
        sha256 = self.index["source_sha256"]
        if sha256 is None:
            text = "".join(shard.get("sha256", "") for shard in self.index["shards"])
            sha256 = hashlib.sha256(text.encode()).hexdigest()
        counts = np.bincount(labels, minlength=len(self.classes)).tolist()
        return {"classes": self.classes, "images": len(self), "counts": counts, "sha256": sha256}

    def order(self, seed, epoch):
        """Permutation of the indices: the shards in random order, their images in random order."""
        rng = np.random.default_rng((seed, epoch))
        starts = self.ends - [shard["images"] for shard in self.index["shards"]]
        shards = rng.permutation(len(self.ends))
        return np.concatenate([starts[k] + rng.permutation(self.ends[k] - starts[k]) for k in shards])

    def variant(self, epoch, index):
        """Which of the stored crops: crop c is at 2 c and its flipped image at 2 c + 1, or c at c without flipped ones.
        """
        if not self.train:
            return 0
        if self.drawn is None or self.drawn[0] != epoch:  # a generator for each image would cost more than the read
            rng = np.random.default_rng((self.seed, epoch, VARIANTS))
            crops = rng.integers(self.crops, size=len(self), dtype=np.int32)
            copies = self.index["variants"] // self.crops
            self.drawn = (epoch, copies * crops + (self.flip & (rng.random(len(self)) < 0.5)))
        return int(self.drawn[1][index])

    def __getitem__(self, key):
        epoch, index = key
        number = int(np.searchsorted(self.ends, index, side="right"))
        if self.opened is None or self.opened[0] != number:
            self.opened = None  # unmap the last one first
            self.opened = number, *self.open(self.index["shards"][number])
        _, moments, labels = self.opened
        row, variant = index - int(self.ends[number]) + len(labels), self.variant(epoch, index)
        return self.item(moments, row, variant), int(labels[row])


def scale_of_channels(mean, std, path):
    """The LatentScale that gives every channel mean 0 and std 1."""
    inverse = [1 / part if part > 0 else 0.0 for part in std]  # of which 0 is refused
    return LatentScale(*read_latent_scale((inverse, list(mean)), f"{path}: of its channels' mean and std"))


def open_file(path):
    """A safetensors file, mapped; FlowARError if it is none."""
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # safetensors has no common error
        raise FlowARError(f"{path}: cannot be read ({error})") from error


def open_shard(path, index, images=None):
    """(moments as a lazy slice (images, variants, 2C, h, w), labels (images,)) of a shard; FlowARError unless they are
    what the index, or the settings of a cache that is being written, says.
    """
    file = open_file(path)
    moments, labels = file.get_slice("moments"), file.get_tensor("labels").numpy()
    side = index["img_size"] // index["stride"]
    expected = [len(labels) if images is None else images, index["variants"], 2 * index["channels"], side, side]
    if (moments.get_shape(), moments.get_dtype()) != (expected, SAFETENSORS[index["dtype"]]):
        raise FlowARError(f"{path}: moments are {moments.get_shape()} {moments.get_dtype()}: expected {expected} "
                          f"{SAFETENSORS[index['dtype']]}")
    if len(labels) != expected[0] or labels.min() < 0 or labels.max() >= len(index["classes"]):
        raise FlowARError(f"{path}: expected {expected[0]} labels of {len(index['classes'])} classes")
    return moments, labels


def texts_tensor(texts):
    """Texts as a tensor of a shard: bytes that no path can hold end each."""
    content = b"".join(os.fsencode(text) + b"\0" for text in texts) or b"\0"
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def read_texts(path, name):
    """Texts in a shard: `names`, its images' paths in their split, or `skipped`, what could not be read."""
    content = bytes(open_file(path).get_tensor(name).numpy())
    return [os.fsdecode(text) for text in content.split(b"\0") if text]
