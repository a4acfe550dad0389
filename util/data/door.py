"""Datasets by what lies at a path.

A dataset has `classes` (their names, a label's order), a length, and items (tensor, label) for a key (epoch, index).
The tensor is an image (3, img_size, img_size) in [-1, 1] with is_moments = False; with is_moments = True it holds
posterior moments (2C, h, w), and the dataset has `latent_scale`, None if it does not know it, and may have `origin`, a
LatentOrigin, and channel_scale() -> LatentScale, see --latent_norm. It may have order(seed, epoch) -> permutation;
identity(), see Listing; say_counts(), see Images; and bytes_an_image, what is read for one on average, which --dry_run
tells. A row in DATASETS makes training, validation and benchmarks know it.
"""
from typing import Callable, NamedTuple

from models import FlowARError
from models.checks import as_sides
from util.cluster import from_main, sharers
from util.data import latents
from util.data.images import Images
from util.data.pixels import WHITE
from util.data.places import is_there


class DataSettings(NamedTuple):
    """What a dataset is opened with."""
    img_size: int
    vae_embed_dim: int
    vae_stride: int
    seed: int = 0
    train: bool = False  # random crops and flips
    flip: bool = True
    on_bad: str = "error"  # see Images
    background: tuple = WHITE


class DataKind(NamedTuple):
    """A kind of dataset."""
    is_at: Callable  # path -> whether one of this kind is there
    open: Callable  # (path, DataSettings) -> dataset, or FlowARError
    is_cache: bool = False  # of latents: --cached_path takes it
    geometry: Callable = lambda path: {}  # path -> what it says of itself, by options


def shards_geometry(path):
    index = latents.read_index(path)
    known = {"vae_embed_dim": index["channels"], "vae_stride": index["stride"], "img_size": index["img_size"]}
    return {**known, "background": tuple(index["background"])} if index["background"] else known


def open_shards(path, settings):
    """A finished cache; FlowARError naming the first thing in which it differs from what training expects."""
    data = latents.ShardedMoments(path, settings.seed, settings.train, settings.flip)
    for key, option, value in (
            ("stride", "--vae_stride", settings.vae_stride), ("channels", "--vae_embed_dim", settings.vae_embed_dim),
            ("img_size", "--img_size", settings.img_size), ("background", "--background", list(settings.background))):
        if data.index[key] not in (value, None):
            raise FlowARError(f"{path}: this cache has {key} {data.index[key]}, but {option} is {value}")
    latents.verify_checksums(path, data.index, *sharers())
    return data


def open_npz(path, settings):
    side = settings.img_size // settings.vae_stride
    shape = (2 * settings.vae_embed_dim, side, side)
    return latents.NpzMoments(path, shape, settings.seed, settings.train, settings.flip)


def open_lightning(path, settings):
    side = settings.img_size // settings.vae_stride
    data = latents.LightningLatents(path, settings.seed, settings.train, settings.flip)
    if data.index["shape"] != (settings.vae_embed_dim, side, side):
        raise FlowARError(f"{path}: its latents are {as_sides(data.index['shape'])}, but --vae_embed_dim is "
                          f"{settings.vae_embed_dim} and --img_size / --vae_stride {side}")
    return data


DATASETS = {
    "shards": DataKind(lambda path: latents.kind_of_cache(path) == "shards", open_shards, True, shards_geometry),
    "npz": DataKind(lambda path: latents.kind_of_cache(path) == "npz", open_npz, True),
    "lightning": DataKind(
        lambda path: latents.kind_of_cache(path) == "lightning", open_lightning, True,
        lambda path: {"vae_embed_dim": latents.LightningLatents.look(path)["shape"][0]}),
    "images": DataKind(is_there, lambda path, s: Images(path, s.img_size, s.seed, s.train, flip=s.flip, on_bad=s.on_bad,
                                                        background=s.background)),
}


def find_data(path, cached):
    """Name of the kind of dataset at a path, None if there is none: of caches of latents alone, or of all others."""
    # Apart: a stray .npz among a million images makes no cache, nor is it looked for.
    return next((name for name, kind in DATASETS.items() if kind.is_cache == cached and kind.is_at(path)), None)


def open_data(path, settings, cached=False):
    """The dataset at a path, see find_data; without any, what opening a folder of images says of it."""
    return DATASETS[from_main(lambda: find_data(path, cached)) or "images"].open(path, settings)
