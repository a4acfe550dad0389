"""Where the loops' batches come from: a loader, and the way from a batch to scaled latents."""
from pathlib import Path

import torch

from models import FlowARError
from models.files import name_some
from models.vae import DiagonalGaussian
from models.vaes import find_vae
from util.cluster import all_reduce_sum, log, rank, world_size
from util.data.door import DATASETS, DataSettings, find_data, open_data
from util.data.loaders import build_loader
from util.options import check_vae, resolve_geometry


class LazyVAE:
    """The VAE of --vae and --vae_path on a device, opened when it is first asked for: cached latents need none."""

    def __init__(self, named, device):
        self.named, self.device, self.opened, self.check = named, device, None, lambda vae: None

    def is_there(self):
        return self.named.is_there()

    def must_pass(self, check):
        """check(vae) raises FlowARError where the VAE does not fit the model: now, or else when it is opened."""
        self.check = check
        if self.opened is not None:
            check(self.opened)

    def open(self):
        if self.opened is None:
            vae, unused = self.named.open()
            if unused:
                log(f"{self.named.name}: {len(unused)} tensors are not the VAE's and were left out")
            self.check(vae)
            self.opened = vae.eval().requires_grad_(False).to(self.device)
        return self.opened


class Source:
    """Batches of a loader's dataset (see util.data.door) as latents on a device. vae: LazyVAE, which encodes images."""

    def __init__(self, loader, vae):
        self.loader, self.vae, self.device = loader, vae, vae.device
        self.is_moments = loader.dataset.is_moments
        self.latent_scale = (loader.dataset if self.is_moments else vae.open()).latent_scale

    @torch.no_grad()
    def latents(self, batch, noise):
        """Scaled latents of a batch on the device: samples of the posterior with this noise, both (B, C, H, W)."""
        moments = batch.float() if self.is_moments else self.vae.open().encode(batch).parameters
        return self.latent_scale.normalize(DiagonalGaussian(moments).sample(noise=noise))

    def report_skipped(self):
        """Say how many unreadable images were skipped so far, on all ranks together."""
        data = self.loader.dataset
        if hasattr(data, "skipped") and getattr(data, "on_bad", "") == "skip":
            skipped = torch.tensor([data.skipped.value], dtype=torch.float64, device=self.device)
            if total := int(all_reduce_sum(skipped).item()):
                log(f"{total} times an image could not be read and the next one took its place")


def open_sources(args, device):
    """From options: (they with the geometry filled in, Source of training, Source of validation or None, LazyVAE)."""
    kind, vae = find_cache(args), LazyVAE(find_vae(args.vae, args.vae_path), device)
    if kind:
        known = DATASETS[kind].geometry(args.cached_path)
    else:  # the VAE will encode images
        known = {"vae_embed_dim": vae.open().embed_dim, "vae_stride": vae.open().stride} if vae.is_there() else {}
    args = resolve_geometry(args, known)
    vae.must_pass(lambda opened: check_vae(opened, args))
    settings = DataSettings(args.img_size, args.vae_embed_dim, args.vae_stride, args.class_num, vae.named,
                            vae.open() if kind and vae.named.needs_opening else None,
                            args.seed, True, args.flip, args.on_bad_image)
    path = args.cached_path if kind else f"{args.data_path}/train"
    data = open_data(path, settings, cached=bool(kind))
    what, how = ("cached latents", "") if data.is_moments else ("images", ", encoded on the fly")
    log(f"{len(data)} {what} in {path}{how}")
    if len(data.classes) > args.class_num:
        raise FlowARError(f"{path if kind else args.data_path}: {len(data.classes)} class folders, "
                          f"but --class_num is {args.class_num}")
    if len(data.classes) < args.class_num:
        log(f"warning: {len(data.classes)} class folders for --class_num {args.class_num}: "
            "the other classes are not trained")
    workers = dict(rank=rank(), world_size=world_size(), num_workers=args.num_workers,
                   pin_memory=args.pin_mem and device.type == "cuda", timeout=args.timeout)
    loader = build_loader(data, args.batch_size, seed=args.seed, train=True, **workers)
    if len(loader) < args.accum_iter:
        raise FlowARError(f"{len(data)} training images are fewer than one global batch of {args.global_batch} "
                          f"(--batch_size {args.batch_size} x {world_size()} processes x "
                          f"--accum_iter {args.accum_iter})")
    source, held_out = Source(loader, vae), open_validation(args, settings._replace(train=False), vae)
    if held_out is not None and held_out.classes != data.classes:
        other = sorted(set(held_out.classes) ^ set(data.classes))
        raise FlowARError(
            f"{args.cached_val_path or args.data_path}: the classes of the validation set are not those of the "
            f"training set (only in one of them: {name_some(other)}), so its labels would be others")
    validation = None if held_out is None else Source(build_loader(held_out, args.batch_size, **workers), vae)
    if not vae.is_there():
        log(f"no VAE at {args.vae_path}: no sample grids")
    return args, source, validation, vae


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


def open_validation(args, settings, vae):
    """The validation set: cached, or the images in val/ where the VAE is there to encode them; None without either."""
    if args.cached_val_path:
        if find_data(args.cached_val_path, cached=True) is None:
            raise FlowARError(f"--cached_val_path {args.cached_val_path}: no cached latents there")
        return open_data(args.cached_val_path, settings, cached=True)
    if (Path(args.data_path) / "val").is_dir() and vae.is_there():
        return open_data(f"{args.data_path}/val", settings)
    log("no validation set (--cached_val_path, or val/ in --data_path and the VAE): no validation loss")
    return None
