"""Where the loops' batches come from: a loader, and the way from a batch to scaled latents."""
from pathlib import Path

import torch
import torch.nn.functional as F

from models import FlowARError
from models.errors import name_some
from models.variants.ablated import pack
from models.vae import DiagonalGaussian, LatentScale
from models.vaes import find_vae
from util.cluster import fetch, from_main, log, rank, world_size
from util.data.door import DATASETS, DataSettings, find_data, open_data
from util.data.folders import advice
from util.data.images import Images
from util.data.inspection import sample_advice
from util.data.loaders import build_loader
from util.data.pixels import WHITE
from util.data.places import find_split, name_images
from util.data.tables import is_hub, is_table
from util.options import check_vae, resolve_geometry, with_options
from util.training.record import LatentOrigin, check_origin, origin_of


class Source:
    """Batches of a loader's dataset (see util.data.door) as latents of a LatentScale on a device. vae: encodes images,
    None without. sides: of the coarser latents of --pyramid image, else none.
    """

    def __init__(self, loader, vae, device, latent_scale, sides=()):
        self.loader, self.vae, self.device, self.latent_scale = loader, vae, device, latent_scale
        self.sides = sides
        self.is_moments = loader.dataset.is_moments
        self.said = False  # what was converted

    @torch.no_grad()
    def latents(self, batch, noise):
        """Scaled latents of a batch on the device: samples of the posterior with this noise, both (B, C, H, W); with
        `sides` packed with those of the downsampled images, their posteriors' means.
        """
        moments = batch.float() if self.is_moments else self.vae.encode(batch).parameters
        latents = self.latent_scale.normalize(DiagonalGaussian(moments).sample(noise=noise))
        if not self.sides:
            return latents
        small = [F.interpolate(batch, size=(side * self.vae.stride,) * 2, mode="area") for side in self.sides]
        coarse = [self.latent_scale.normalize(self.vae.encode(images).mode()) for images in small]
        return pack([*coarse, latents])

    def identity(self):
        """What a checkpoint remembers of the data, see util.training.record."""
        data = self.loader.dataset
        return data.identity() if hasattr(data, "identity") else {
            "classes": list(data.classes), "counts": None, "images": len(data), "sha256": None}

    def report_images(self):
        """Say how many images were unreadable so far and, once, what was converted, on all ranks together."""
        if hasattr(self.loader.dataset, "say_counts"):
            self.loader.dataset.say_counts(conversions=not self.said)
        self.said = True


def open_sources(args, device, class_num=None):
    """From options: (they with the geometry filled in, Source of training, Source of validation or None, VAE or None,
    its LatentOrigin). class_num: of the checkpoint to go on from.
    """
    kind, named = from_main(lambda: find_cache(args)), find_vae(args.vae, args.vae_path)
    fetch(named.path)
    if args.pyramid == "image" and (kind or args.cached_val_path):
        raise FlowARError("--pyramid image encodes images at every scale: leave out --cached_path, --cached_val_path")
    if args.pyramid == "image" and args.latent_norm == "channel":
        raise FlowARError("--latent_norm channel needs cached latents, which --pyramid image cannot take: choose one")
    vae = open_if_there(named, device, needed=kind is None)
    known = DATASETS[kind].geometry(args.cached_path) if kind else {
        "vae_embed_dim": vae.embed_dim, "vae_stride": vae.stride}  # which will encode the images
    asked, args = args.class_num or class_num, resolve_geometry(args, known)
    if vae is not None:
        check_vae(vae, args)
    origin = LatentOrigin() if vae is None else origin_of(named, vae)
    settings = DataSettings(args.img_size, args.vae_embed_dim, args.vae_stride, args.seed, True, args.flip,
                            args.on_bad_image, args.background or WHITE)
    path = args.cached_path if kind else find_split(args.data_path, "train")
    data = open_data(path, settings, cached=bool(kind))
    say_what_is_there(data, path, args.img_size)
    if kind and (other := other_classes(data, args.data_path)):
        log(f"warning: {path}: {other}; if the images are the newer ones, run scripts/cache_latents.py again")
    args = with_options(args, class_num=asked or len(data.classes),
                        background=args.background if kind else settings.background)
    if data.is_moments:
        found = cache_origin(data, path)
        check_origin(path, found, origin)
        origin = LatentOrigin(*(new if old is None else old for old, new in zip(origin, found)))
    workers = dict(rank=rank(), world_size=world_size(), num_workers=args.num_workers,
                   pin_memory=args.pin_mem and device.type == "cuda", timeout=args.timeout)
    loader = build_loader(data, args.batch_size, seed=args.seed, train=True, **workers)
    if len(loader) < args.accum_iter:
        raise FlowARError(f"{len(data)} training images are fewer than one global batch of {args.global_batch} "
                          f"(--batch_size {args.batch_size} x {world_size()} processes x "
                          f"--accum_iter {args.accum_iter})")
    held_out = open_validation(args, settings._replace(train=False), vae, data.classes, origin)
    scale = choose_scale(args.latent_norm, data, path, origin)
    origin = origin._replace(latent_scale=tuple(scale))
    if args.latent_norm == "channel" and vae is not None:
        vae.latent_scale = scale
    sides = [s * args.patch_size for s in args.scales[:-1]] if args.pyramid == "image" else ()
    source, validation = Source(loader, vae, device, scale, sides), None
    if held_out is not None:
        validation = Source(build_loader(held_out, args.batch_size, **workers), vae, device, scale, sides)
    if validation and from_main(lambda: validation.identity()["sha256"] == source.identity()["sha256"] is not None):
        log("warning: the images of the validation set have the names and sizes of the training set's: if they are the "
            "same, the validation loss says nothing of images that were not seen")
    if vae is None and args.online_eval:
        raise FlowARError("--online_eval needs the VAE to decode with: give --vae_path")
    if vae is None:
        log(f"no VAE at {named.name} (--vae_path): no sample grids")
    return args, source, validation, vae, origin


def open_if_there(named, device, needed):
    """The VAE on a device; None if rank 0 does not see it and it is not needed: cached latents need none."""
    if not from_main(named.is_there) and not (needed and Path(named.path).exists()):
        if needed:
            raise FlowARError(f"{named.option}: no such file: give the VAE's path (training alone needs none, where "
                              "--cached_path has latents)")
        return None
    vae, notes = named.open()
    for note in notes:
        log(note)
    return vae.eval().requires_grad_(False).to(device)


def cache_origin(data, path):
    """LatentOrigin of a cache."""
    origin, scale = getattr(data, "origin", LatentOrigin()), data.latent_scale
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


def say_what_is_there(data, path, img_size):
    """Log what a dataset holds and what looks like a mistake in it."""
    if not isinstance(data, Images):
        log(f"{len(data):,} {'cached latents' if data.is_moments else 'images'} in {path}")
        return
    log(f"{data.folder.summary()} in {path}, encoded on the fly")
    for line in from_main(lambda: advice(data.folder) + sample_advice(data.folder, img_size)):
        log(f"warning: {path}: {line}")


def other_classes(cache, data_path):
    """In which classes a cache and the images in data_path differ, as far as these are at hand; "" if they do not."""
    at_hand = data_path and not is_hub(data_path)
    if not at_hand or (place := find_split(data_path, "train", needed=False)) is None:
        return ""
    images = from_main(lambda: None if is_table(place) else name_images(place))  # which would convert a dataset
    unlike = sorted(set(images) ^ set(cache.classes)) if images else []
    return f"its classes are not those of {place} (only in one of them: {name_some(unlike)})" if unlike else ""


def check_classes(classes, class_num):
    """FlowARError if the data has more classes than the model, a warning if it has fewer."""
    found = f"the training set has {len(classes)} classes ({name_some(classes, 3)})"
    if len(classes) > class_num:
        raise FlowARError(f"{found}, but the model has {class_num} (--class_num, or the checkpoint's)")
    if len(classes) < class_num:
        log(f"warning: {found} for --class_num {class_num}: the others are not trained")


def find_cache(args):
    """The kind of dataset in --cached_path, None without one; then say how to make it."""
    if args.cached_path and (kind := find_data(args.cached_path, cached=True)):
        return kind
    command = (f"torchrun --standalone --nproc_per_node=8 scripts/cache_latents.py --data_path {args.data_path} "
               f"--cached_path {args.cached_path} {find_vae(args.vae, args.vae_path).option} "
               f"--img_size {args.img_size or 256}")
    if args.use_cached:
        raise FlowARError(f"--cached_path {args.cached_path}: no cached latents there; make them with: {command}")
    if args.cached_path:
        log(f"no cached latents in {args.cached_path}: encoding images on the fly. To make a cache: {command}")
    return None


def open_validation(args, settings, vae, classes, origin):
    """The validation set: cached, or the images in val/ where the VAE is there to encode them; None without either.

    A cache that was asked for must be one of the same classes and VAE; a val/ that is merely there is left out with a
    word if it cannot be used.
    """
    if args.no_val:
        return None
    if path := args.cached_val_path:
        if from_main(lambda: find_data(path, cached=True)) is None:
            raise FlowARError(f"--cached_val_path {path}: no cached latents there")
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
    if not isinstance(data, Images):
        log(f"{len(data):,} images in {path}, for validation")
        return data
    log(f"{data.folder.summary()} in {path}, for validation")
    data.way_on += ", or leave the validation out with --no_val"
    for line in from_main(lambda: sample_advice(data.folder)):
        log(f"warning: {path}: {line}")
    return data


def check_same_classes(data, path, classes):
    if list(data.classes) != list(classes):
        other = sorted(set(data.classes) ^ set(classes))
        raise FlowARError(f"{path}: the classes of the validation set are not those of the training set (only in one "
                          f"of them: {name_some(other)}), so its labels would be others")
