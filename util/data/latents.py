"""Cached latents: posterior moments in shards that know what they are, or in MAR's layout of one .npz an image, or
samples in LightningDiT's.

A cache of shards is a folder of safetensors files and index.json, written by scripts/cache_latents.py. The index
appears last: a folder without one is no cache. Images lie in the shards in a random order, so that an epoch can read
shard after shard (each worker maps one file at a time) and still mix the classes.
"""
import functools
import hashlib
import math
import os
import reprlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch.utils.data import Dataset

from models import FlowARError
from models.checks import as_sides
from models.errors import first_line, reading
from models.vae import KL16_LATENT_SCALE, DiagonalGaussian, LatentScale
from models.vaes import read_latent_scale
from models.weights import content_hash, file_hash, read_file
from util.cluster import from_main
from util.data.folders import list_classes
from util.data.pixels import CONVERSIONS
from util.files import check_fields, is_count, is_number, is_strings, read_json
from util.training.record import LatentOrigin, saved_origin

INDEX = "index.json"
UNFINISHED = "index.unfinished.json"  # the settings of a cache that is being written
NPZ_INFO = "latents.json"
FORMAT = "flowar-latents-1"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
HASHING_THREADS = 4
SAFETENSORS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
LABEL_BYTES = 8
LARGER = 16  # times what is expected: an .npz of up to that is read, to say what it holds instead
LARGEST_IMAGE = 65536  # pixels a side
DIGEST_BYTES = 16  # of an image's file
VARIANTS = 1  # stream of random draws, beside that of the order
LIGHTNING, LIGHTNING_STATS = "latents_rank*_shard*.safetensors", "latents_stats.pt"
MOST_CLASSES = 10**6


def kind_of_cache(path):
    """'shards', 'npz' (MAR's layout), 'lightning' (LightningDiT's) or None. FlowARError for unfinished shards."""
    path = Path(path)
    if not path.is_dir():
        return None
    if (path / INDEX).is_file():
        return "shards"
    if (path / UNFINISHED).is_file():
        raise FlowARError(f"{path}: this cache is not complete; run scripts/cache_latents.py again to finish it")
    if next(path.glob("shard-*.safetensors"), None) is not None:
        raise FlowARError(f"{path}: shards of latents without {INDEX}; run scripts/cache_latents.py again to make it")
    if next(path.glob(LIGHTNING), None) is not None:
        return "lightning"
    if (path / NPZ_INFO).is_file() or next(path.glob("*/*.npz"), None) is not None:
        return "npz"
    return None


def is_measured(value):
    """The latent scale that cache_latents.py measured: two numbers, and one of every channel."""
    channels = [value.get(name) for name in ("channel_mean", "channel_std")] if isinstance(value, dict) else [None]
    return (all(isinstance(part, list) and all(map(is_number, part)) for part in channels)
            and is_number(value.get("scale")) and is_number(value.get("shift")))


def scale_of_channels(mean, std, path, channels):
    """The LatentScale that gives every channel mean 0 and std 1; FlowARError for what no statistics are."""
    inverse = [1 / part if part > 0 else 0.0 for part in std]  # of which 0 is refused
    return LatentScale(*read_latent_scale((inverse, list(mean)), f"{path}: of its channels' mean and std", channels))


POSITIVE = lambda value: is_count(value, 1), "a number above 0"
TEXT = lambda value: isinstance(value, str), "a text"
FIELDS = {
    "images": POSITIVE, "channels": POSITIVE, "stride": POSITIVE,
    "img_size": (lambda value: is_count(value, 1) and value <= LARGEST_IMAGE, f"1 to {LARGEST_IMAGE} pixels"),
    "variants": (lambda value: is_count(value, 2) and value % 2 == 0, "an even number above 0"),
    "dtype": (lambda value: isinstance(value, str) and value in DTYPES, f"one of {', '.join(DTYPES)}"),
    "crops": (lambda value: value == "center" or is_count(value, 1), "center or a number above 0"),
    "seed": (is_count, "a number of 0 or more"),
    "classes": (is_strings, "a list of names"), "skipped": (is_strings, "a list of messages"),
    "background": (lambda value: value is None or isinstance(value, list) and list(map(is_count, value)) == [True] * 3,
                   "three numbers"),
    **dict.fromkeys(("vae", "vae_sha256", "vae_tensors", "source_sha256"),
                    (lambda value: value is None or isinstance(value, str), "a text or null")),
    "measured": (is_measured, "scale, shift, channel_mean and channel_std"),
    "shards": (lambda value: isinstance(value, list), "a list"),
}
NEWER = ("background", "vae", "vae_tensors", "source_sha256")  # that older caches do not know
SHARD_FIELDS = {"file": (TEXT[0], "a name"), "images": POSITIVE, "bytes": POSITIVE, "sha256": TEXT}


def shape_of(index):
    """Shape (variants, 2C, h, w) of an image's moments."""
    side = index["img_size"] // index["stride"]
    return index["variants"], 2 * index["channels"], side, side


def parse_index(file):
    """The content of an index.json, whose values are of the right types and go together; no shard is looked at."""
    index = {**dict.fromkeys(NEWER), **read_json(file)}
    if index.get("format") != FORMAT:
        raise FlowARError(f"{file}: format is {reprlib.repr(index.get('format'))}, expected {FORMAT!r}")
    words = f"{file}: not an index of latents"
    check_fields(index, FIELDS, words)
    index["latent_scale"] = LatentScale(*read_latent_scale(index.get("latent_scale"), file, index["channels"]))
    if index["img_size"] % index["stride"]:
        raise FlowARError(f"{words}: img_size {index['img_size']} is not a multiple of stride {index['stride']}")
    image_bytes = LABEL_BYTES + math.prod(shape_of(index)) * DTYPES[index["dtype"]].itemsize
    seen = set()
    for shard in index["shards"]:
        check_fields(shard, SHARD_FIELDS, words)
        name = shard["file"]
        if name in ("", ".", "..") or Path(name).name != name:
            raise FlowARError(f"{file}: shard {name!r} lies outside of the cache")
        if name in seen:
            raise FlowARError(f"{file}: shard {name!r} is named twice")
        if shard["images"] * image_bytes > shard["bytes"]:
            raise FlowARError(f"{file}: {name} is said to hold {shard['images']} images in {shard['bytes']} bytes, "
                              f"but one takes {image_bytes}")
        seen.add(name)
    if sum(shard["images"] for shard in index["shards"]) != index["images"]:
        raise FlowARError(f"{file}: its shards do not add up to {index['images']} images")
    return index


def read_index(path):
    """The index of a cache of shards, as a dict; every shard that it names is there in full length."""
    index = parse_index(Path(path) / INDEX)
    for shard in index["shards"]:
        shard_path = Path(path) / shard["file"]
        with reading(shard_path):
            size = shard_path.stat().st_size if shard_path.is_file() else None
        if size is None:
            raise FlowARError(f"{shard_path}: this shard is missing")
        if size != shard["bytes"]:
            raise FlowARError(f"{shard_path}: {size} bytes, expected {shard['bytes']}: truncated or of another cache")
    return index


def verify_checksums(path, index, rank=0, world_size=1):
    """FlowARError naming a shard whose bytes changed. The ranks share the work."""
    shards = index["shards"][rank::world_size]
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        for shard, found in zip(shards, pool.map(lambda shard: file_hash(Path(path) / shard["file"]), shards)):
            if found != shard["sha256"]:
                raise FlowARError(f"{Path(path) / shard['file']}: its SHA-256 is {found[:12]}..., expected "
                                  f"{shard['sha256'][:12]}...: damaged; write the cache again")


class ShardedMoments(Dataset):
    """Moments of a cache of shards. Items: (moments (2C, h, w) in the shards' dtype, label) for a key (epoch, index).

    In training the crop, and whether it is flipped, follow from (seed, epoch, index); otherwise it is the first crop.
    Files are memory-mapped and one at a time is open in a process: reading is O(1) and holds no copy of the data.
    """
    is_moments = True
    look = staticmethod(read_index)

    def __init__(self, root, seed=0, train=False, flip=True):
        self.root, self.index, self.seed, self.train, self.flip = Path(root), self.look(root), seed, train, flip
        self.classes, self.latent_scale = self.index["classes"], self.index["latent_scale"]
        self.ends = np.cumsum([shard["images"] for shard in self.index["shards"]])
        self.opened = None  # (number of the shard, moments, labels)
        self.drawn = None  # (epoch, variant of every image)

    def __len__(self):
        return self.index["images"]

    def __getstate__(self):
        return {**self.__dict__, "opened": None, "drawn": None}  # a mapped file does not travel to another process

    def open(self, shard):
        """(what item() reads of, labels) of a shard."""
        return open_shard(self.root / shard["file"], self.index, shard["images"])

    def item(self, moments, row, variant):
        return moments[row:row + 1, variant:variant + 1][0, 0]

    @property
    def bytes_an_image(self):
        return sum(shard["bytes"] for shard in self.index["shards"]) / len(self) / self.index["variants"]

    def channel_scale(self):
        """The LatentScale of --latent_norm channel."""
        measured = self.index["measured"]
        return scale_of_channels(measured["channel_mean"], measured["channel_std"], self.root / INDEX,
                                 self.index["channels"])

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
    with reading(path):
        file = safe_open(path, framework="pt")
        moments, labels = file.get_slice("moments"), file.get_tensor("labels")
        shape, dtype = tuple(moments.get_shape()), moments.get_dtype()
    count = images if images is not None else len(labels) if labels.ndim else 1
    expected, classes = ((count, *shape_of(index)), SAFETENSORS[index["dtype"]]), len(index["classes"])
    if (shape, dtype) != expected:
        raise FlowARError(f"{path}: moments are {shape} {dtype}, expected {expected[0]} {expected[1]}")
    if labels.shape != shape[:1] or labels.dtype != torch.int64 or not ((labels >= 0) & (labels < classes)).all():
        raise FlowARError(f"{path}: its labels are not {shape[0]} numbers of its {classes} classes")
    return moments, labels.numpy()


def is_whole(path, settings):
    """Whether a shard is there, as long as its header says, and of these settings."""
    try:
        open_shard(path, settings)
        return True
    except FlowARError:
        return False


def texts_tensor(texts):
    """Texts as a tensor of a shard: bytes that no path can hold end each."""
    content = b"".join(os.fsencode(text) + b"\0" for text in texts) or b"\0"
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def read_texts(path, name):
    """Texts in a shard: `names`, its images' paths in their split, or `skipped`, what could not be read."""
    with reading(path), safe_open(path, framework="pt") as file:
        content = bytes(file.get_tensor(name).numpy())
    end = b"\0" if b"\0" in content else b"\n"  # lines: caches of before
    return [os.fsdecode(text) for text in content.split(end) if text]


def count_conversions(path):
    """How many images of a shard each of CONVERSIONS was made of; zeros where it does not know."""
    with reading(path), safe_open(path, framework="pt") as file:
        made = file.get_tensor("converted").numpy() if "converted" in file.keys() else np.zeros(0, np.uint8)
    return [int((made >> number & 1).sum()) for number in range(len(CONVERSIONS))]


def read_digests(path):
    """Of every image in a shard, the digest of its file."""
    with reading(path), safe_open(path, framework="pt") as file:
        if "digests" not in file.keys():
            raise FlowARError(f"{path}: this cache does not know its images' contents (made before that was kept)")
        return [bytes(row.tolist()) for row in file.get_tensor("digests")]


class LightningLatents(ShardedMoments):
    """LightningDiT's (extract_features.py): `latents` and `latents_flip` (N, C, h, w), one sample of the posterior
    each, and `labels` (N,), in latents_rank00_shard000.safetensors and so on. Read and drawn as a cache of shards of
    one crop, and as moments of a deterministic encoder. Their classes are numbers; their latent scale is not told.
    """

    @staticmethod
    def look(root):
        """What index.json says of a cache of shards, out of the files' names, sizes and headers."""
        paths = sorted(Path(root).glob(LIGHTNING))
        opened = [open_lightning(path) for path in paths]
        shape = opened[0][0][0].get_shape()[1:]
        for path, (parts, _) in zip(paths, opened):
            if parts[0].get_shape()[1:] != shape:
                raise FlowARError(f"{path}: its latents are {as_sides(parts[0].get_shape()[1:])}, those of "
                                  f"{paths[0].name} {as_sides(shape)}: of another VAE or image size")
        shards = [{"file": path.name, "images": len(labels), "bytes": path.stat().st_size}
                  for path, (_, labels) in zip(paths, opened)]
        classes = 1 + max(int(labels.max()) for _, labels in opened)
        return {**dict.fromkeys(("vae", "vae_sha256", "vae_tensors", "latent_scale")), "shape": tuple(shape),
                "shards": shards, "images": sum(shard["images"] for shard in shards), "variants": 2,
                "classes": [str(label) for label in range(classes)], "source_sha256": content_hash(shards)}

    def open(self, shard):
        return open_lightning(self.root / shard["file"])

    def item(self, parts, row, variant):
        return DiagonalGaussian.of_mean(parts[variant][row:row + 1]).parameters[0]

    def channel_scale(self):
        path, channels = self.root / LIGHTNING_STATS, self.index["shape"][0]
        if not path.is_file():
            raise FlowARError(f"{path}: no such file, from which --latent_norm channel takes mean and std: LightningDiT"
                              " writes it when it first reads the latents, and publishes it beside its VAE")
        content = read_file(path)
        parts = [content.get(name) if isinstance(content, dict) else None for name in ("mean", "std")]
        for name, part in zip(("mean", "std"), parts):
            if not isinstance(part, torch.Tensor) or part.shape != (1, channels, 1, 1) or part.is_complex():
                found = as_sides(part.shape) if isinstance(part, torch.Tensor) else type(part).__name__
                raise FlowARError(f"{path}: {name} is {found}, expected a tensor of 1 x {channels} x 1 x 1")
        return scale_of_channels(*(part.flatten().tolist() for part in parts), path, channels)


def open_lightning(path):
    """((latents, latents_flip) as lazy slices, labels (N,)) of a file of LightningDiT; FlowARError if it is none."""
    with reading(path):
        file = safe_open(path, framework="pt")
        parts, labels = [file.get_slice(name) for name in ("latents", "latents_flip")], file.get_tensor("labels")
        shapes, dtypes = [part.get_shape() for part in parts], [part.get_dtype() for part in parts]
    if len(shapes[0]) != 4 or shapes[0] != shapes[1] or not set(dtypes) <= set(SAFETENSORS.values()):
        raise FlowARError(f"{path}: latents and latents_flip are {as_sides(shapes[0])} {dtypes[0]} and "
                          f"{as_sides(shapes[1])} {dtypes[1]}, expected two of N x C x h x w, floating-point")
    if (labels.shape != (shapes[0][0],) or not len(labels) or labels.dtype != torch.int64
            or not ((labels >= 0) & (labels < MOST_CLASSES)).all()):
        raise FlowARError(f"{path}: its labels are not {shapes[0][0]} numbers of 0 to {MOST_CLASSES - 1}")
    return parts, labels.numpy()


class NpzMoments(Dataset):
    """MAR's cache: class folders with one .npz an image, holding `moments` and `moments_flip` (2C, h, w).
    Items: (float32 moments, label); in training the flipped ones with probability 1/2.
    """
    is_moments = True

    def __init__(self, root, shape, seed=0, train=False, flip=True):
        self.folder = from_main(lambda: list_classes(root, {".npz"}, "cached latents"))
        self.root, self.classes, self.shape, self.seed = Path(root), self.folder.classes, tuple(shape), seed
        self.flip = train and flip

    @functools.cached_property
    def info(self):
        """What the cache says of itself; one of MAR says nothing."""
        return read_json(self.root / NPZ_INFO) if (self.root / NPZ_INFO).is_file() else {}

    @functools.cached_property
    def latent_scale(self):
        scale = npz_latent_scale(self.root, self.shape[0] // 2)
        for what, said, found in (("files", self.info.get("files"), len(self.folder)),
                                  ("classes", self.info.get("classes"), self.classes)):
            if said not in (None, found):
                raise FlowARError(f"{self.root}: its {what} are not those that {NPZ_INFO} tells of ({len(self.folder)} "
                                  f"files in {len(self.classes)} class folders are there): some are missing, or were "
                                  "added; run scripts/cache_latents.py again")
        return scale

    @functools.cached_property
    def origin(self):
        """LatentOrigin of the moments."""
        known = dict(zip(("name", "sha256", "tensors"), map(self.info.get, ("vae", "vae_sha256", "vae_tensors"))))
        return saved_origin({"vae": known})._replace(latent_scale=self.latent_scale)

    @property
    def bytes_an_image(self):
        return self.folder.sizes.mean() / 2  # of the two, as they are or flipped

    def identity(self):
        """As that of a cache of shards."""
        source = self.info.get("source_sha256")
        return {**self.folder.identity(), **({"sha256": source} if isinstance(source, str) else {})}

    def __len__(self):
        return len(self.folder)

    def __getitem__(self, key):
        epoch, index = key
        path, label = self.folder[index]
        flip = self.flip and np.random.default_rng((self.seed, epoch, index)).random() < 0.5
        name = "moments_flip" if flip else "moments"
        try:
            with np.load(path, allow_pickle=False) as file:
                moments = file[name]
        except Exception as error:  # a damaged file makes zipfile and numpy raise almost anything
            raise FlowARError(f"{path}: cannot read {name} ({first_line(error)})") from error
        if moments.dtype.kind != "f":
            raise FlowARError(f"{path}: {name} is of {moments.dtype}, expected floating-point numbers")
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
    return LatentScale(*read_latent_scale(content.get("latent_scale"), info))
