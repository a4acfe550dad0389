"""Train FlowAR on an image folder or on cached latents.

    torchrun --nproc_per_node=8 --nnodes=4 --node_rank=$WORKER_ID --master_addr=... --master_port=... main_flowar.py \\
        --img_size 256 --vae_path kl16.ckpt --vae_embed_dim 16 --vae_stride 16 --patch_size 1 \\
        --model flowar_small --diffloss_d 2 --diffloss_w 1024 --epochs 400 --warmup_epochs 100 --batch_size 64 \\
        --blr 5e-5 --output_dir output --resume output --data_path imagenet --cached_path imagenet_feature

Run the same command again to go on. Everything that can be asked for is in util/options.py.
"""
import argparse
import functools
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from engine_flowar import (Run, build_judge, check_vae, evaluate, evaluate_checkpoint, sample_grid, save_checkpoint, train_one_epoch,
                           validate)
from models import FlowARError, build_model
from models.vae import open_vae
from models.weights import name_some, read_file
from util import checkpoint, distributed
from util.data import Images, build_loader, check_classes
from util.distributed import agree, all_reduce_sum, from_main, is_main, log, rank, world_size
from util.evaluation import FIGURES, single_point, write_png
from util.files import make_directory
from util.latents import (NpzMoments, ShardedMoments, check_index, kind_of_cache, npz_latent_scale, read_index, vae_identity,
                          verify_checksums)
from util.logging import TrainingLog
from util.optimization import EMA, build_optimizer
from util.options import check_training, model_options, resolve_geometry, resolve_training, training_parser
from util.progress import Progress


def find_cache(args):
    """The kind of cache in --cached_path, see util.latents; without one, say how to make it."""
    kind = kind_of_cache(args.cached_path) if args.cached_path else None
    vae = f"--vae_path {args.vae_path}" if args.vae == "kl16" else f"--vae {args.vae}"
    command = (f"torchrun --nproc_per_node=8 scripts/cache_latents.py --data_path {args.data_path} --cached_path "
               f"{args.cached_path} {vae} --img_size {args.img_size or 256}")
    if kind is None and args.use_cached:
        raise FlowARError(f"--cached_path {args.cached_path}: no cached latents there; make them with: {command}")
    if kind is None and args.cached_path:
        log(f"no cached latents in {args.cached_path}: encoding images on the fly. To make a cache: {command}")
    return kind


class Data:
    """Training and validation loaders and how their batches become moments.

    The VAE is opened at the first call of vae(): at once to encode images, later or never with a cache. Geometry that
    the options leave open comes from the cache's index or from the VAE.
    """

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.kind = find_cache(args)
        self.resolve_geometry(args)
        self.workers = dict(rank=rank(), world_size=world_size(), num_workers=args.num_workers,
                            pin_memory=args.pin_mem and device.type == "cuda", timeout=args.timeout)
        if self.kind:
            train, self.latent_scale = self.open_cache(args.cached_path, self.kind, train=True)
            log(f"{len(train)} cached latents in {args.cached_path}")
        else:
            self.latent_scale = self.vae().latent_scale
            train = Images(Path(args.data_path) / "train", args.img_size, args.seed, train=True, flip=args.flip,
                           on_bad=args.on_bad_image)
            log(f"{len(train)} images in {args.data_path}/train, encoded on the fly")
        check_classes(train, args.class_num, args.cached_path if self.kind else args.data_path)
        if len(train.classes) < args.class_num:
            log(f"warning: {len(train.classes)} class folders for --class_num {args.class_num}: the other classes are not trained")
        self.train = build_loader(train, args.batch_size, seed=args.seed, train=True, **self.workers)
        if len(self.train) < args.accum_iter:
            raise FlowARError(f"{len(train)} training images are fewer than one global batch of {args.global_batch} "
                              f"(--batch_size {args.batch_size} x {world_size()} processes x --accum_iter {args.accum_iter})")

    def resolve_geometry(self, args):
        if self.kind == "shards":
            index = read_index(args.cached_path)
            known = {"vae_embed_dim": index["channels"], "vae_stride": index["stride"], "img_size": index["img_size"]}
        elif self.has_vae() and not self.kind:
            known = {"vae_embed_dim": self.vae().embed_dim, "vae_stride": self.vae().stride}
        else:
            known = {}
        resolve_geometry(args, known)
        if "img_size" not in known and known:
            check_vae(self.vae(), args)

    def open_cache(self, path, kind, train=False):
        """(dataset, LatentScale) of a cache, after comparing what it says of itself with the options."""
        args = self.args
        if kind == "npz":
            side = args.img_size // args.vae_stride
            data = NpzMoments(path, (2 * args.vae_embed_dim, side, side), args.seed, train, args.flip)
            return data, npz_latent_scale(path, args.vae_embed_dim)
        data = ShardedMoments(path, args.seed, train, args.flip)
        opened = self.vae() if args.vae != "kl16" else None
        check_index(path, data.index, {
            "vae_sha256": ("that of --vae" if opened else "that of --vae_path", vae_identity(args.vae, args.vae_path, opened)),
            "stride": ("--vae_stride", args.vae_stride), "channels": ("--vae_embed_dim", args.vae_embed_dim),
            "img_size": ("--img_size", args.img_size), "classes": ("--class_num", args.class_num),
            "latent_scale": ("that of --vae", opened.latent_scale if opened else None)})
        verify_checksums(path, data.index, rank(), world_size())
        return data, data.index["latent_scale"]

    @functools.cache
    def vae(self):
        vae, extra = open_vae(self.args.vae, self.args.vae_path)
        if extra:
            log(f"{self.args.vae_path}: {len(extra)} tensors are not the VAE's and were left out")
        if self.args.vae_stride is not None and self.args.vae_embed_dim is not None:
            check_vae(vae, self.args)
        return vae.to(self.device)

    def has_vae(self):
        return self.args.vae != "kl16" or Path(self.args.vae_path).is_file()

    @torch.no_grad()
    def encode(self, images):
        return self.vae().encode(images).parameters

    def training_moments(self, batch):
        return batch.float() if self.kind else self.encode(batch)

    def report_skipped(self):
        """Say how many unreadable images were skipped so far, on all ranks together."""
        skipped = getattr(self.train.dataset, "skipped", None)
        if skipped is not None and self.args.on_bad_image == "skip":
            total = int(all_reduce_sum(torch.tensor([skipped.value], dtype=torch.float64, device=self.device)).item())
            if total:
                log(f"{total} times an image could not be read and the next one took its place")

    def validation(self):
        """(loader, to_moments) of the validation set, or None if there is none."""
        args = self.args
        if args.cached_val_path:
            kind = kind_of_cache(args.cached_val_path)
            if kind is None:
                raise FlowARError(f"--cached_val_path {args.cached_val_path}: no cached latents there")
            (data, _), to_moments = self.open_cache(args.cached_val_path, kind), torch.Tensor.float
        elif (Path(args.data_path) / "val").is_dir() and self.has_vae():
            data, to_moments = Images(Path(args.data_path) / "val", args.img_size, on_bad=args.on_bad_image), self.encode
        else:
            return None
        if data.classes != self.train.dataset.classes:
            other = sorted(set(data.classes) ^ set(self.train.dataset.classes))
            raise FlowARError(f"{args.cached_val_path or args.data_path}: the classes of the validation set are not those of the "
                              f"training set (only in one of them: {name_some(other)}), so its labels would be others")
        return build_loader(data, args.batch_size, **self.workers), to_moments


def refuse_overwriting(args):
    """FlowARError if --output_dir holds checkpoints of a run that this one does not go on from."""
    output, resumed = Path(args.output_dir), Path(args.resume)
    folder = resumed.parent if resumed.is_file() else resumed
    if checkpoint.any_in(output) and not (args.resume and folder.is_dir() and folder.samefile(output)):
        raise FlowARError(f"--output_dir {args.output_dir} holds checkpoints that this run would overwrite: go on from them with "
                          f"--resume {args.output_dir}, or choose another --output_dir")


def find_start(args):
    """(path, content) of the checkpoint that --resume means, or (None, {}) to start from scratch. Rank 0 decides for all."""
    def choose():
        here = args.resume and Path(args.resume).is_dir() and Path(args.resume).samefile(args.output_dir)
        if here and not checkpoint.any_in(args.resume):  # the published first run
            log(f"no {checkpoint.LAST} in {args.resume}: starting from scratch")
            return None
        return checkpoint.find(args.resume) if args.resume else None

    path = from_main(choose)
    return (path, read_file(path, mmap=True)) if path else (None, {})


def resume(args, path, content, network, ema, optimizer, scaler, images):
    """Load a checkpoint's content; returns the progress to go on from."""
    steps = images // args.global_batch
    if path is None:
        return Progress(epoch=args.start_epoch or 0, step=(args.start_epoch or 0) * steps)
    checkpoint.load_model(network, checkpoint.model_state(content, path, "model"), path)
    checkpoint.load_model(ema.module, checkpoint.model_state(content, path, "model_ema"), path)
    if "optimizer" not in content:
        log(f"{path}: weights alone; the optimizer starts fresh")
        return Progress(epoch=args.start_epoch or 0, step=(args.start_epoch or 0) * steps)
    checkpoint.load_optimizer(optimizer, scaler, content, path)
    if args.start_epoch not in (None, checkpoint.saved_options(content).get("start_epoch")):
        log(f"{path}: --start_epoch: going on with epoch {args.start_epoch + 1}")
        return Progress(epoch=args.start_epoch, step=args.start_epoch * steps)
    progress = checkpoint.load_progress(content, path, steps)
    before = {"images": content.get("images"), "global batch": checkpoint.saved_options(content).get("global_batch")}
    if progress.done:
        for what, now in (("images", images), ("global batch", args.global_batch)):
            if before[what] not in (None, now):
                raise FlowARError(f"{path}: it is in the middle of an epoch with {what} {before[what]}, now {what} is {now}: go on with the "
                                  "same until the epoch ends, or give --start_epoch")
    changed = checkpoint.changed_options(content, args)
    log(f"{path}: going on after step {progress.step}, in epoch {progress.epoch + 1}"
        + (f", with other options than before: {changed}" if changed else ""))
    return progress


def report(run, data, validation, judge):
    """Validation loss of raw and EMA weights, a sample grid, --online_eval, all after the last finished epoch."""
    network, ema, args, device, logger = run.network, run.ema, run.args, run.device, run.logger
    epoch, step = run.progress.epoch - 1, run.progress.step
    if validation is not None:
        for name, module in (("val", network), ("val_ema", ema.module)):
            loss, scales = validate(module, *validation, data.latent_scale, args, device)
            logger.scalars(name, step, epoch + 1, {"loss": loss, **{f"loss_scale_{s}": v for s, v in scales.items()}})
            log(f"epoch {epoch + 1}: {name} loss {loss:.4f}")
    if data.has_vae():
        sample_report(run, data, judge, epoch, step)
    logger.report_done(step, epoch + 1)
    distributed.barrier()


def report_or_leave(run, data, validation, judge):
    """report(); a signal ends it at once, since the step before it is saved, or is being saved. It is then made again."""
    try:
        with run.leaving.at_once(f"asked to leave: saved after step {run.progress.step}, the report after it will be made again"):
            report(run, data, validation, judge)
    except distributed.Preempted:
        if run.keeper is not None:
            run.keeper.wait()
        raise


def sample_report(run, data, judge, epoch, step):
    ema, args, device, logger = run.ema, run.args, run.device, run.logger
    if is_main():
        grid = sample_grid(ema.module, data.vae(), args, device)
        logger.image("samples/ema", grid, step)
        write_png(grid.permute(1, 2, 0).numpy(), Path(args.output_dir) / f"samples_epoch{epoch + 1:04d}.png")
    if judge is not None:
        description = {"model": args.model, "epoch": epoch + 1, "weights": "ema"}
        online = argparse.Namespace(**{**vars(args), "num_images": args.eval_num_images, "save_images": False, "save_npz": False})
        result = evaluate(ema.module, data.vae(), online, device, description,
                          Path(args.output_dir) / f"eval_epoch{epoch + 1:04d}", judge, persistent=False)
        if result is not None:
            figures = {key: value for key, value in result.items() if key.startswith(FIGURES)}
            logger.scalars("eval", step, epoch + 1, figures)
            log(f"epoch {epoch + 1}: {figures}")


def train(args, device):
    args = single_point(args)
    check_training(args)
    args.precision = distributed.set_precision(args.precision, device)
    if is_main():
        make_directory(Path(args.output_dir))
        refuse_overwriting(args)
        held = checkpoint.lock(args.output_dir)  # noqa: F841: until this run ends
    path, content = find_start(args)
    resolve_training(args, world_size(), checkpoint.saved_options(content).get("global_batch"))
    data = Data(args, device)
    validation = data.validation()
    agree("whether there are cached latents, a validation set and a VAE", (data.kind, validation is not None, data.has_vae()))
    if validation is None:
        log("no validation set (--cached_val_path, or val/ in --data_path and the VAE): no validation loss")
    if not data.has_vae():
        log(f"no VAE at {args.vae_path}: no sample grids")

    if args.online_eval and not data.has_vae():
        raise FlowARError(f"--online_eval needs the VAE to decode with, and there is none at --vae_path {args.vae_path}")
    judge = build_judge(args, device) if args.online_eval else None
    torch.manual_seed(args.seed)
    network = build_model(args.model, **model_options(args)).to(device)
    ema = EMA(network, args.ema_rate)
    optimizer = build_optimizer(network, args.lr, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    images = len(data.train.dataset)
    progress = resume(args, path, content, network, ema, optimizer, scaler, images)
    del content
    agree("where to go on", (progress.epoch, progress.step))
    log(f"attention kernel: {network.attention_kernel(distributed.AUTOCAST.get(args.precision))}")
    if args.compile:
        distributed.check_compiler(device)
        network.compile_blocks()
        ema.module.compile_sampler(args.compile)
    model = network
    if world_size() > 1:
        model = DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None,
                                        gradient_as_bucket_view=True, static_graph=args.accum_iter == 1)  # no_sync needs the other kind
    log(f"{args.model}: {sum(p.numel() for p in network.parameters()):,} parameters, scales {network.scale}, "
        f"{world_size()} x {device.type}, {args.precision}, global batch {args.global_batch}, peak lr {args.lr:.2e}")
    if progress.epoch >= args.epochs:
        log(f"nothing to train: the first epoch would be number {progress.epoch + 1} of --epochs {args.epochs}")
    keeper = checkpoint.Keeper(args.output_dir, args.keep, args.save_every.minutes, progress.step) if is_main() else None
    logger = TrainingLog(args.log_dir or args.output_dir, device, progress.step)
    with distributed.leaving_on_signals() as leaving:
        run = Run(model, network, ema, optimizer, scaler, progress, keeper, logger, args, device, images, data.train.sampler, leaving)
        if progress.done == 0 and is_report_epoch(args, progress.epoch) and not from_main(lambda: progress.step in logger.reported):
            report_or_leave(run, data, validation, judge)  # the run before did not end this one
        while progress.epoch < args.epochs:
            train_one_epoch(run, data.train, data.training_moments, data.latent_scale)
            data.report_skipped()
            if progress.epoch % args.save_last_freq == 0 or is_report_epoch(args, progress.epoch):
                save_checkpoint(run)
            if is_report_epoch(args, progress.epoch):
                report_or_leave(run, data, validation, judge)
    if keeper is not None:
        keeper.wait()
    distributed.barrier()
    logger.close()


def is_report_epoch(args, finished):
    """Whether a report follows when `finished` epochs are done."""
    return finished > 0 and (finished % args.eval_freq == 0 or finished == args.epochs)


def main():
    args = training_parser().parse_args()
    if args.deterministic:
        distributed.set_deterministic()
    device = distributed.init(args.device, args.timeout)
    if args.evaluate:
        evaluate_checkpoint(args, device)
    else:
        train(args, device)


if __name__ == "__main__":
    distributed.run_main(main)
