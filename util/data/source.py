"""Where the loops' batches come from: a dataset at a path, its loader, and the way from a batch to scaled latents.

A dataset has `classes` (their names, a label's order), a length, summary(), and items (tensor, label) for a key (epoch,
index). The tensor is an image (3, img_size, img_size) in [-1, 1] with is_moments = False; with is_moments = True it
holds posterior moments (2C, h, w), and the dataset has `latent_scale`, None if it does not know it, and `origin`, a
LatentOrigin. It may have channel_scale() -> LatentScale, see --latent_norm; and order(seed, epoch) -> permutation.
identity(): see Listing.
"""
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from models import FlowARError
from models.errors import name_some
from models.variants.ablated import flatten_pyramid
from models.vae import DiagonalGaussian, LatentScale
from models.vaes import find_vae
from util.cluster import agree, fetch, from_main, log, rank, sharers, world_size
from util.data.images import Images, find_split
from util.data.latents import ShardedMoments, is_shards, verify_checksums
from util.data.loaders import build_loader
from util.data.other_latents import LightningLatents, NpzMoments
from util.data.pixels import WHITE
from util.geometry import check_vae, resolve_geometry
from util.training.record import LatentOrigin, check_origin, origin_of

CACHES = {"shards": ShardedMoments, "lightning": LightningLatents, "npz": NpzMoments}


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


def kind_of_cache(path):
    """The name in CACHES of the cached latents at a path, None without; FlowARError for one that is not finished."""
    if not Path(path).is_dir():
        return None
    if is_shards(path):
        return "shards"
    return next((kind for kind in ("lightning", "npz") if CACHES[kind].is_at(path)), None)


def open_data(path, settings, cached=False):
    """The dataset at a path: images, or cached latents. What differs from the settings is a FlowARError."""
    train, flip, seed = settings.train, settings.flip, settings.seed
    if not cached:
        return Images(path, settings.img_size, seed, train, flip=flip, on_bad=settings.on_bad,
                      background=settings.background)
    kind = kind_of_cache(path)
    if kind is None:
        raise FlowARError(f"{path}: no cached latents there")
    if kind == "npz":
        side = settings.img_size // settings.vae_stride
        return NpzMoments(path, (2 * settings.vae_embed_dim, side, side), seed, train, flip)
    data = CACHES[kind](path, seed, train, flip)
    data.check(settings)
    return data


class Source:
    """Batches of a loader's dataset as latents of a LatentScale on a device. vae: encodes images, None without. sides:
    of the coarser latents of --pyramid image, else none.
    """

    def __init__(self, loader, vae, device, latent_scale, sides=()):
        self.loader, self.vae, self.device, self.latent_scale = loader, vae, device, latent_scale
        self.sides = sides
        self.is_moments = loader.dataset.is_moments

    @torch.no_grad()
    def latents(self, batch, noise):
        """Scaled latents of a batch on the device: samples of the posterior with this noise, both (B, C, H, W); with
        `sides` in one tensor with those of the downsampled images, their posteriors' means.
        """
        moments = batch.float() if self.is_moments else self.vae.encode(batch).parameters
        latents = self.latent_scale.normalize(DiagonalGaussian(moments).sample(noise=noise))
        if not self.sides:
            return latents
        small = [F.interpolate(batch, size=(side * self.vae.stride,) * 2, mode="area") for side in self.sides]
        coarse = [self.latent_scale.normalize(self.vae.encode(images).mode()) for images in small]
        return flatten_pyramid([*coarse, latents])

    def identity(self):
        """What a checkpoint records of the data, see util.training.record."""
        return self.loader.dataset.identity()


class TrainingData(NamedTuple):
    """What a training reads. options: those of the program with what the data decides filled in: geometry, classes."""
    options: object
    source: Source
    validation: Source | None
    vae: torch.nn.Module | None
    origin: LatentOrigin


def open_sources(args, device, class_num=None):
    """The TrainingData of a program's options. class_num: of the checkpoint that training resumes from.

    Rank 0 lists the data for all, training and validation each in one broadcast; all else a rank opens by itself, and
    FlowARError where it has another VAE or cache.
    """
    # ---- the VAE, and the geometry that it or the cache has
    named = find_vae(args.vae, args.vae_path)
    fetch(named.path)
    kind = find_cache(args)
    if args.pyramid == "image" and (kind or args.cached_val_path):
        raise FlowARError("--pyramid image encodes images at every scale: leave out --cached_path, --cached_val_path")
    if args.pyramid == "image" and args.latent_norm == "channel":
        raise FlowARError("--latent_norm channel needs cached latents, which --pyramid image cannot take: choose one")
    vae = open_if_there(named, device, needed=kind is None)
    origin = LatentOrigin() if vae is None else origin_of(named, vae)
    agree("what latents are made with (kind of --cached_path, VAE)", (kind, *origin))
    if vae is None and args.online_eval:
        raise FlowARError("--online_eval needs the VAE to decode with: give --vae_path")
    if vae is None:
        log(f"no VAE at {named.name} (--vae_path): no sample grids")
    known = CACHES[kind].geometry(args.cached_path) if kind else {
        "vae_embed_dim": vae.embed_dim, "vae_stride": vae.stride}  # which will encode the images
    asked, args = args.class_num or class_num, resolve_geometry(args, known)
    if vae is not None:
        check_vae(vae, args, named.name)

    # ---- the training set
    settings = DataSettings(args.img_size, args.vae_embed_dim, args.vae_stride, args.seed, True, args.flip,
                            args.on_bad_image, args.background or WHITE)
    path, data = from_main(lambda: open_training(args, settings, cached=bool(kind)))
    log(data.summary())
    if kind == "shards":
        verify_checksums(path, data.index, *sharers())
    args = replace(args, class_num=asked or len(data.classes),
                   background=args.background if kind else settings.background)
    if data.is_moments:
        cached = cache_origin(data, path)
        check_origin(path, cached, origin)
        origin = LatentOrigin(*(new if old is None else old for old, new in zip(origin, cached)))
    workers = dict(rank=rank(), world_size=world_size(), num_workers=args.num_workers,
                   pin_memory=args.pin_mem and device.type == "cuda", timeout=args.timeout)
    loader = build_loader(data, args.batch_size, seed=args.seed, train=True, **workers)
    if len(loader) < args.accum_iter:
        raise FlowARError(f"{len(data)} training images are fewer than one global batch of {args.global_batch} "
                          f"(--batch_size {args.batch_size} x {world_size()} processes x "
                          f"--accum_iter {args.accum_iter})")

    # ---- the validation set, and the way of both to scaled latents
    held_out = from_main(lambda: open_validation(args, settings._replace(train=False), vae, data.classes, origin))
    scale = choose_scale(args.latent_norm, data, path, origin)
    origin = origin._replace(latent_scale=tuple(scale))
    if args.latent_norm == "channel" and vae is not None:
        vae.latent_scale = scale
    sides = [s * args.patch_size for s in args.scales[:-1]] if args.pyramid == "image" else ()
    source, validation = Source(loader, vae, device, scale, sides), None
    if held_out is not None:
        validation = Source(build_loader(held_out, args.batch_size, **workers), vae, device, scale, sides)
    return TrainingData(args, source, validation, vae, origin)


def open_if_there(named, device, needed):
    """The VAE on a device; None if it is not there and not needed: cached latents need none."""
    if not named.is_there():
        if needed:
            raise FlowARError(f"{named.option}: no such file: give the VAE's path (training alone needs none, where "
                              "--cached_path has latents)")
        return None
    vae, notes = named.open()
    for note in notes:
        log(note)
    return vae.eval().requires_grad_(False).to(device)


def open_training(args, settings, cached):
    """(path, dataset) of training."""
    path = args.cached_path if cached else find_split(args.data_path, "train")
    return path, open_data(path, settings, cached)


def open_validation(args, settings, vae, classes, origin):
    """The validation set: cached, or the images in val/ where the VAE is there to encode them; None without either.

    A cache that was asked for must be one of the same classes and VAE; a val/ that is merely there is left out, with a
    line, if it cannot be used.
    """
    if args.no_val:
        return None
    if path := args.cached_val_path:
        data = open_data(path, settings, cached=True)
        check_origin(f"--cached_val_path {path}", cache_origin(data, path), origin)
        check_same_classes(data, path, classes)
        return data
    try:
        path = None if vae is None else find_split(args.data_path, "val", needed=False)
        if path is None:
            log("no validation set (--cached_val_path, or val/ in --data_path and the VAE): no validation loss")
            return None
        data = open_data(path, settings)
        check_same_classes(data, path, classes)
    except FlowARError as error:
        log(f"warning: no validation loss: {error}; mend it, or leave it out with --no_val")
        return None
    log(f"{data.summary()}, for validation")
    return data


def find_cache(args):
    """The kind of cached latents in --cached_path, None without; then say how to make them."""
    if args.cached_path and (kind := kind_of_cache(args.cached_path)):
        return kind
    command = (f"torchrun --standalone --nproc_per_node=8 scripts/cache_latents.py --data_path {args.data_path} "
               f"--cached_path {args.cached_path} {find_vae(args.vae, args.vae_path).option} "
               f"--img_size {args.img_size or 256}")
    if args.use_cached:
        raise FlowARError(f"--cached_path {args.cached_path}: no cached latents there; make them with: {command}")
    if args.cached_path:
        log(f"no cached latents in {args.cached_path}: encoding images on the fly. To make a cache: {command}")
    return None


def cache_origin(data, path):
    """LatentOrigin of a cache."""
    origin, scale = data.origin, data.latent_scale
    return origin._replace(name=origin.name or f"that of {path}", latent_scale=scale and tuple(scale))


def choose_scale(norm, data, path, origin):
    """The LatentScale of --latent_norm for the data at a path; FlowARError where it is not known. origin: of it."""
    if norm == "channel":
        if not hasattr(data, "channel_scale"):
            raise FlowARError(f"--latent_norm channel needs cached latents whose channels were measured: {path} is no "
                              "cache of shards (scripts/cache_latents.py makes them); give one as --cached_path")
        return data.channel_scale()
    if origin.latent_scale is None:
        raise FlowARError(f"{path}: does not tell the scale of its latents: give the VAE that they are of (--vae, "
                          f"--vae_path), or --latent_norm channel")
    return LatentScale(*origin.latent_scale)


def check_classes(classes, class_num):
    """FlowARError if the data has more classes than the model."""
    if len(classes) > class_num:
        raise FlowARError(f"the training set has {len(classes)} classes ({name_some(classes, 3)}), but the model has "
                          f"{class_num} (--class_num, or the checkpoint's)")


def check_same_classes(data, path, classes):
    if list(data.classes) != list(classes):
        other = sorted(set(data.classes) ^ set(classes))
        raise FlowARError(f"{path}: the classes of the validation set are not those of the training set (only in one "
                          f"of them: {name_some(other)}), so its labels would be others")
