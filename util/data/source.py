"""What a training reads: training and validation set, and the way from their batches to scaled latents.

A dataset has `classes` (their names, a label's order), a length, identity(), see Listing, and items (tensor, label) for
a key (epoch, index). With is_moments = False the tensor is an image (3, img_size, img_size) in [-1, 1]. With is_moments
= True it holds posterior moments (2C, h, w), and the dataset has `shape`, (C, h, w); `geometry`, the options that it
decides; `origin`, a LatentOrigin; perhaps channel_scale() -> LatentScale, see --latent_norm, and order(seed, epoch) ->
permutation.
"""
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from models import FlowARError
from models.errors import name_some
from models.variants.ablated import flatten_pyramid
from models.vae import DiagonalGaussian, LatentScale
from models.vaes import find_vae
from util.cluster import agree, fetch, from_main, log, rank, world_size
from util.data.images import Images, find_split
from util.data.latents import ShardedMoments
from util.data.loaders import build_loader
from util.data.other_latents import LightningLatents, NpzMoments
from util.data.pixels import WHITE
from util.data.tables import Columns
from util.geometry import check_vae, resolve_geometry
from util.training.record import LatentOrigin, check_origin, origin_of

CACHES = [ShardedMoments, LightningLatents, NpzMoments]  # of the first that is_at(path), a dataset is opened


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
        pyramid = []
        for side in self.sides:
            images = F.interpolate(batch, size=(side * self.vae.stride,) * 2, mode="area")
            pyramid.append(self.latent_scale.normalize(self.vae.encode(images).mode()))
        return flatten_pyramid([*pyramid, latents])


class TrainingData(NamedTuple):
    """What a training reads."""
    options: object  # those of the program, with what the data decides filled in: geometry, classes, background
    source: Source
    validation: Source | None
    vae: torch.nn.Module | None
    origin: LatentOrigin
    identity: dict  # of the training set, see Listing


def open_training_data(args, device, class_num=None):
    """The TrainingData of a program's options. class_num: of the checkpoint that training resumes from.

    The ranks meet three times: every host downloads the VAE once, all agree on it, and rank 0 lists the data for all.
    """
    # ---- 1. the VAE, which every rank opens by itself
    named, vae, origin = find_vae(args.vae_path), None, LatentOrigin()
    fetch(named.name)
    if named.is_there():
        vae = open_vae_on(named, device)
        origin = origin_of(named, vae)
    agree("the VAE", origin)

    # ---- 2. the training and the validation set, and the geometry that is left to them
    args, training, held_out, identity = from_main(lambda: list_data(args, named, vae, class_num))
    if vae is not None:
        check_vae(vae, args, named.name)
    elif args.online_eval:
        raise FlowARError("--online_eval needs a VAE to decode images: set --vae_path")
    else:
        log(f"no VAE found at {named.name} (--vae_path): no sample grids")

    # ---- 3. the VAE and the scale of the latents: one for both sets
    if training.is_moments:
        check_origin(args.cached_path, training.origin, origin)
        if vae is None:
            origin = training.origin
    if held_out is not None and held_out.is_moments:
        check_origin(f"--cached_val_path {args.cached_val_path}", held_out.origin, origin)
    if args.latent_norm == "channel":
        if not hasattr(training, "channel_scale"):
            raise FlowARError("--latent_norm channel needs channel statistics: use shards of scripts/cache_latents.py "
                              "as --cached_path")
        scale = training.channel_scale()
    elif origin.latent_scale is None:
        raise FlowARError(f"{args.cached_path}: contains no latent scale: pass its VAE with --vae_path, or use "
                          "--latent_norm channel")
    else:
        scale = LatentScale(*origin.latent_scale)
    origin = origin._replace(latent_scale=tuple(scale))
    if vae is not None:
        vae.latent_scale = scale

    # ---- 4. loaders
    workers = dict(rank=rank(), world_size=world_size(), num_workers=args.num_workers,
                   pin_memory=args.pin_mem and device.type == "cuda", timeout=args.timeout)
    loader = build_loader(training, args.batch_size, seed=args.seed, train=True, **workers)
    if len(loader) < args.accum_iter:
        raise FlowARError(f"{len(training)} training images are fewer than one global batch of {args.global_batch}: "
                          "lower --batch_size or --global_batch")
    sides = [s * args.patch_size for s in args.scales[:-1]] if args.pyramid == "image" else ()
    source, validation = Source(loader, vae, device, scale, sides), None
    if held_out is not None:
        validation = Source(build_loader(held_out, args.batch_size, **workers), vae, device, scale, sides)
    return TrainingData(args, source, validation, vae, origin, identity)


def open_vae_on(named, device):
    """The VAE of a NamedVAE, on a device."""
    vae, notes = named.open()
    for note in notes:
        log(note)
    return vae.eval().requires_grad_(False).to(device)


def list_data(args, named, vae, class_num):
    """(resolved options, training set, validation set or None, identity of the training set)."""
    data = open_latents(args.cached_path, args.seed, train=True, flip=args.flip)
    if args.pyramid == "image" and (data is not None or args.cached_val_path):
        raise FlowARError("--pyramid image encodes images at every scale: leave out --cached_path, --cached_val_path")
    if data is not None:
        args = resolve_geometry(args, {"class_num": class_num, **data.geometry})
        check_cache(data, args.cached_path, args)
        log(f"{len(data):,} cached latents in {args.cached_path}")
    else:
        explain_caching(args, named)
        if vae is None:
            raise FlowARError(f"--vae_path {named.name}: not found: pass the path of the VAE (not needed to train on "
                              "latents in --cached_path)")
        args = resolve_geometry(args, {"class_num": class_num, "vae_embed_dim": vae.embed_dim,
                                       "vae_stride": vae.stride, "background": WHITE})
        data = Images(find_split(args.data_path, "train", columns=args), args.img_size, args.seed, train=True,
                      flip=args.flip, on_bad=args.on_bad_image, background=args.background, columns=args)
        log(f"{data.listing.summary()} in {data.listing.root}, encoded on the fly")
    if args.class_num is None:
        args = replace(args, class_num=len(data.classes))
    return args, data, open_validation(args, data.classes, vae), data.identity()


def open_latents(path, seed=0, train=False, flip=True):
    """The dataset of the cached latents at a path, None without any; FlowARError for a cache that is not finished."""
    if path and Path(path).is_dir():
        for cache in CACHES:
            if cache.is_at(path):
                return cache(path, seed, train, flip)
    return None


def explain_caching(args, named):
    """How to make the cache that is not there: a line, or with --use_cached an error."""
    command = (f"torchrun --standalone --nproc_per_node=8 scripts/cache_latents.py --data_path {args.data_path} "
               f"--cached_path {args.cached_path} --vae_path {named.name} "
               f"--img_size {args.img_size or 256}")
    for field in fields(Columns):
        if value := getattr(args, field.name):
            command += f" --{field.name} {value}"
    if args.use_cached:
        raise FlowARError(f"--cached_path {args.cached_path}: no cached latents found: make them with: {command}")
    if args.cached_path:
        log(f"no cached latents found in {args.cached_path}: encoding images on the fly. To cache them: {command}")


def check_cache(data, path, args):
    """FlowARError that names the first thing in which cached latents differ from the options."""
    given = {**vars(args), "background": args.background or WHITE}
    for option, value in data.geometry.items():
        if given[option] != value:
            raise FlowARError(f"{path}: this cache has {option} {value}, but --{option} is {given[option]}")
    side = args.img_size // args.vae_stride
    if data.shape[1:] != (side, side):
        raise FlowARError(f"{path}: latents are {data.shape}, but --img_size / --vae_stride is {side}")


def open_validation(args, classes, vae):
    """The validation set: cached latents that were asked for, else the images in val/ where the VAE is there to encode
    them, else None. A val/ that cannot be used is left out with a line.
    """
    if args.cached_val_path:
        data = open_latents(args.cached_val_path)
        if data is None:
            raise FlowARError(f"--cached_val_path {args.cached_val_path}: no cached latents found")
        check_cache(data, args.cached_val_path, args)
        check_same_classes(data, args.cached_val_path, classes)
        return data
    try:
        path = None if vae is None else find_split(args.data_path, "val", needed=False, columns=args)
        if path is None:
            log("no validation loss: it needs --cached_val_path, or a VAE and val/ in --data_path")
            return None
        data = Images(path, args.img_size, on_bad=args.on_bad_image, background=args.background or WHITE, columns=args)
        check_same_classes(data, path, classes)
    except FlowARError as error:
        log(f"warning: no validation loss: {error}")
        return None
    log(f"{data.listing.summary()} in {path}, for validation")
    return data


def check_same_classes(data, path, classes):
    if data.classes != classes:
        other = sorted(set(data.classes) ^ set(classes))
        raise FlowARError(f"{path}: classes of the validation and training set differ (only in one of them: "
                          f"{name_some(other)}), so labels would not match")


def check_classes(classes, class_num):
    """FlowARError if the data has more classes than the model."""
    if len(classes) > class_num:
        raise FlowARError(f"the training set has {len(classes)} classes ({name_some(classes, 3)}), but the model has "
                          f"{class_num} (--class_num, or the checkpoint's)")
