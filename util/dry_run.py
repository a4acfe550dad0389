"""--dry_run N: what a training of N processes would be, from one, without a GPU, and without writing anything.

The training's own code (util/recipe.py) checks the options, opens the data and builds everything up to its first
step, with the weights on the meta device; here is the report.
"""
import contextlib
import os
import shutil
import warnings
from pathlib import Path

import torch

from models import FlowARError
from models.variants.ablated import describe
from util import cluster
from util.cluster import AUTOCAST, log
from util.files import check_place
from util.training.optimization import POWER_WIDTHS

GIB, MIB = 2**30, 2**20
HALF, FLOAT = 2, 4  # bytes


def run(args, build_run):
    """build_run(options, device) as if it were one of --dry_run processes."""
    if args.evaluate or os.environ.get("WORLD_SIZE", "1") != "1":
        raise FlowARError("--dry_run checks a training in a single process: leave out --evaluate and torchrun, or set "
                          "GPUS=1 NNODES=1 for scripts/train_*.sh")
    with cluster.pretend(args.dry_run), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")  # of a checkpoint
        build_run(args, cluster.select_device("cpu"))


def device_of(args, device):
    """That of the job, which decides on the precision: a dry run is of GPUs, unless --device cpu says otherwise."""
    return torch.device("cuda") if args.dry_run and args.device != "cpu" else device


def place(build, device, dry_run, fsdp):
    """(build(), the device to train on): the given one, to which --fsdp brings one part after the other, or the meta
    device, where tensors have shapes and no numbers.
    """
    if not dry_run:
        return build().to("cpu" if fsdp and cluster.world_size() > 1 else device), device
    with torch.device("meta"):
        network = build()
    network.mask = network.pattern.mask()[None, None]  # its numbers are compared with a checkpoint's
    return network, torch.device("meta")


def report(args, source, network, optimizer, progress):
    """Print what the training would be that has come this far. args: resolved; progress: where it begins."""
    check_place(Path(args.log_dir or args.output_dir))
    log(f"dry run of {args.dry_run} processes: nothing was written")
    parameters = sum(p.numel() for p in network.parameters())

    # ---- what is trained, and how
    groups, moments = [], 0  # AdamW keeps two moments, Muon and SGD one
    for group in optimizer.param_groups:
        size = sum(p.numel() for p in group["params"])
        moments += size * (2 if "betas" in group else 1)
        groups.append(f"{size:,} with weight decay {group['weight_decay']:g}{', by Muon' * ('ns_steps' in group)}")
    row("model", f"{args.model}{describe(network)}, {parameters:,} parameters ({' and '.join(groups)}), "
        f"{args.precision}")
    row("geometry", f"{args.img_size} pixels, VAE stride {args.vae_stride}, {args.vae_embed_dim} channels, patch "
        f"{args.patch_size}, {args.class_num} classes; {network.tokens} tokens per image, in scales "
        f"{','.join(map(str, network.scale))}")
    row("batch", f"{args.global_batch:,} images per step: {args.batch_size} x {args.dry_run} processes x "
        f"{args.accum_iter} forward passes")
    end = args.lr_schedule if args.lr_schedule == "constant" else f"{args.lr_schedule} to {args.min_lr:g}"
    row("learning rate", f"{args.lr:.3g}, after {args.warmup_epochs:g} of {args.epochs} epochs; then {end}; gradients "
        f"clipped at {args.grad_clip:g}; EMA {args.ema_rate:g}")

    # ---- on what, and how long
    images, kind = len(source.loader.dataset), "cached latents" if source.is_moments else "images, encoded on the fly"
    steps = images // args.global_batch
    row("data", f"{images:,} {kind}; {images % args.global_batch:,} dropped per epoch")
    row("steps", f"{steps:,} per epoch, {steps * args.epochs:,} in total; {network.tokens * args.global_batch:,} "
        "tokens per step")
    row("start", f"at step {progress.step:,}, in epoch {progress.epoch + 1}" if progress.step else "a new run")

    # ---- what it takes of the disk at most: a checkpoint has weights, EMA, moments, power averages
    size, snapshots, milestones = FLOAT * (2 * parameters + moments), 0, 0
    if args.posthoc_ema:
        size += FLOAT * parameters * len(POWER_WIDTHS)
        snapshots = steps * args.epochs // args.posthoc_ema
    if args.keep_every:
        milestones = args.epochs // args.keep_every
    total = size * (args.keep + 1 + milestones) + snapshots * len(POWER_WIDTHS) * parameters * HALF
    place, free = check_place(Path(args.output_dir)), ""
    with contextlib.suppress(OSError):  # a file system that does not know
        space = shutil.disk_usage(place).free
        free = f"; {space / 1e9:.1f} GB free here" + (", too few" if space < total else "")
    row("disk", f"{total / 1e9:.1f} GB at most: {size / 1e9:.2f} per checkpoint, {args.keep} and the one being "
        f"written, {milestones} kept by --keep_every, {snapshots} snapshots for --posthoc_ema{free}")
    report_memory(args, network, parameters, moments)


def row(name, text):
    log(f"{name:<14}{text}")


def report_memory(args, network, parameters, moments):
    """Print what a GPU's memory holds, with and without --use_checkpoint."""
    from util.speed.memory import image_bytes, largest_block  # here: it needs a private class of torch
    dtype = AUTOCAST.get(args.precision)
    averages = 1 + (len(POWER_WIDTHS) if args.posthoc_ema else 0)
    states = FLOAT * ((2 + averages) * parameters + moments)  # weights, gradients
    copies = HALF * parameters if dtype else 0
    # A GPU's kernels of attention hold no weights, with or without dropout.
    an_image = [image_bytes(network, dtype, attn_dropout=0.0, use_checkpoint=recompute) for recompute in (True, False)]
    activations = [args.batch_size * size for size in an_image]
    sharded = states / args.dry_run + largest_block(network)
    log(f"memory per GPU, GiB{'':<49}{'with':>10}{'without':>12} --use_checkpoint")
    line(f"weights, gradients, moments, EMA{', power averages' * bool(args.posthoc_ema)}", [states] * 2)
    if dtype:
        line(f"copies of the weights in {args.precision}", [copies] * 2)
    line(f"activations of {args.batch_size} images ({an_image[0] / MIB:.0f} and {an_image[1] / MIB:.0f} MiB each)",
         activations)
    line("total", [states + copies + size for size in activations])
    if args.optimizer != "muon":  # refused with --fsdp
        line(f"total with --fsdp: first line / {args.dry_run}, plus one whole block",
             [sharded + copies + size for size in activations])
    log("  not counted: CUDA and NCCL, fragmentation, and the VAE if it encodes images on the fly")


def line(name, sizes):
    """Print bytes with and without --use_checkpoint in GiB."""
    first, second = (f"{size / GIB:.{1 if size > GIB / 10 else 3}f}" for size in sizes)
    log(f"  {name:<66}{first:>8}{second:>12}")
