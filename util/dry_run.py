"""--dry_run: what a training of many processes would be, found out by one, without a GPU, and without writing anything.

The training's own code checks the options, opens the data and builds everything up to its first step (main_flowar.py),
with the weights on the meta device; here is what is particular: the processes that are not there, and the report.
"""
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
from util.speed.memory import FLOAT, STATES, image_bytes, largest_block

GIB, MIB = 2**30, 2**20
UNCOUNTED = "not counted: CUDA and NCCL themselves, fragments, and the VAE where it encodes images"


def run(args, train):
    """train(options, device) as if it were one of --world processes."""
    if args.evaluate:
        raise FlowARError("--dry_run is of a training: leave out --evaluate")
    if args.world is None:
        raise FlowARError("--dry_run needs --world, the number of processes (GPUs) of the job")
    if "RANK" in os.environ:
        raise FlowARError("--dry_run is one process for all: start it without torchrun (the environment has RANK)")
    with cluster.pretend(args.world), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")  # a checkpoint's fit is asked
        train(args, cluster.select_device("cpu"))


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
    """Print what the training would be that has come this far. args: resolved; progress: to go on from."""
    check_place(Path(args.log_dir or args.output_dir))
    steps = len(source.loader.dataset) // args.global_batch
    hours = args.images_per_second and steps * args.global_batch / args.images_per_second / 3600  # an epoch
    lines = [*describe_recipe(args, network, optimizer), *describe_data(args, source, network, steps, progress),
             *describe_time(args, steps, hours, progress), rates(args, source, network),
             *describe_checkpoints(args, network, steps, hours), *describe_memory(args, network)]
    log("\n".join([f"dry run of {args.world} processes: nothing was written", *lines]))


def row(name, text):
    return f"{name:<14}{text}"


def describe_recipe(args, network, optimizer):
    decays = " and ".join(f"{sum(p.numel() for p in group['params']):,} with weight decay {group['weight_decay']:g}"
                          for group in optimizer.param_groups)
    end = f"cosine to {args.min_lr:g}" if args.lr_schedule == "cosine" else "constant"
    end = "which it does not reach" if args.warmup_epochs >= args.epochs else f"then {end}"
    scales = ",".join(map(str, network.scale))
    yield row("model", f"{args.model}{describe(network)}, {parameters(network):,} parameters ({decays}), "
              f"{args.precision}")
    yield row("geometry", f"{args.img_size} pixels, VAE stride {args.vae_stride}, {args.vae_embed_dim} channels, patch "
              f"{args.patch_size}, {args.class_num} classes; {network.tokens} tokens an image, in scales {scales}")
    yield row("batch", f"{args.global_batch:,} images a step: {args.batch_size} x {args.world} processes x "
              f"{args.accum_iter} forward passes")
    yield row("learning rate", f"{args.lr:.3g}, after {args.warmup_epochs:g} of {args.epochs} epochs; {end}; "
              f"gradients clipped at {args.grad_clip:g}; EMA {args.ema_rate:g}")


def describe_data(args, source, network, steps, progress):
    images, held = len(source.loader.dataset), "cached latents" if source.is_moments else "images, encoded on the fly"
    yield row("data", f"{images:,} {held}; the last {images - steps * args.global_batch:,} of each epoch's order are "
              "left out")
    yield row("steps", f"{steps:,} an epoch, {steps * args.epochs:,} in all; {network.tokens * args.global_batch:,} "
              "tokens a step")
    yield row("start", f"after step {progress.step:,}, in epoch {progress.epoch + 1}" if progress.step else "a new run")


def describe_time(args, steps, hours, progress):
    if not hours:
        yield row("time", "give --images_per_second, of the whole job, for hours, days and bytes a second")
        return
    left = args.epochs - progress.epoch - progress.done / steps
    rest = f", {hours * left / 24:.1f} days left" if progress.step else ""
    yield row("time", f"at {args.images_per_second:,g} images/s: {hours:.2f} hours an epoch, "
              f"{hours * args.epochs / 24:.1f} days in all{rest}; {3600 * hours / steps:.2f} s a step")


def rates(args, source, network):
    """What passes in a second of the given rate."""
    size, rate = getattr(source.loader.dataset, "bytes_an_image", None), args.images_per_second
    disk = "an unknown size" if size is None else f"{size / 1000:.1f} kB"
    if not rate:
        return row("rates", f"an image is read as {disk}")
    reading = "" if size is None else f", {rate * size / 1e6:,.1f} MB/s from the disk"
    return row("rates", f"{rate * network.tokens:,.0f} tokens/s{reading} (an image is read as {disk}); a process takes "
               f"{rate / args.world:,.1f} images/s")


def describe_checkpoints(args, network, steps, hours):
    """Size, when they are written, and what they take of the disk at most."""
    posthoc = 2 if args.posthoc_ema else 0
    size = FLOAT * parameters(network) * (4 + posthoc)  # weights, EMA, two moments, power averages
    snapshots = steps * args.epochs // args.posthoc_ema if posthoc else 0
    forever = args.epochs // args.keep_every if args.keep_every else 0
    total = size * (args.keep + 1 + forever) + snapshots * 2 * parameters(network) * 2  # float16
    every, between = args.save_every, ""
    if every.minutes:
        often = f", {60 * hours / every.minutes:.1f} times an epoch" if hours else ""
        between = f" and every {every.minutes:g} minutes{often}"
    elif every.steps:
        between = f" and every {every.steps} steps, {steps / every.steps:.1f} times an epoch"
    yield row("checkpoints", f"{size / 1e9:.2f} GB each, after every {args.save_last_freq} epochs{between}; rank 0 "
              "holds a copy while it writes")
    kept = f", {forever} for ever" * bool(forever) + f", {snapshots} snapshots for --posthoc_ema" * bool(snapshots)
    free = shutil.disk_usage(check_place(Path(args.output_dir))).free
    yield row("disk", f"{total / 1e9:.1f} GB at most: {args.keep} and the one that is written{kept}; {free / 1e9:.1f} "
              "GB are free here" + (", too few" if free < total else ""))


def describe_memory(args, network):
    """A GPU's, with and without --use_checkpoint."""
    dtype, one = AUTOCAST.get(args.precision), FLOAT * parameters(network)
    fixed = one * (STATES + (2 if args.posthoc_ema else 0))
    low = 2 * parameters(network) if dtype else 0
    an_image = []
    for recompute in (True, False):  # a GPU's kernels of attention hold no weights, with or without dropout
        an_image.append(image_bytes(network, dtype, attn_dropout=0.0, use_checkpoint=recompute))
    activations = [args.batch_size * size for size in an_image]
    sharded = fixed / args.world + largest_block(network)
    asked = ", ".join(f"--{name} {'' if getattr(args, name) else 'not '}given" for name in ("use_checkpoint", "fsdp"))

    def gib(value):
        return f"{value / GIB:.1f}" if value > GIB / 10 else f"{value / GIB:.1g}"

    def line(name, values):
        first, second = map(gib, values)
        return f"  {name:<66}{first:>8}{second:>12}"

    yield f"memory of a GPU, GiB ({asked})"
    yield f"{'':<66}{'with':>10}{'without':>12} --use_checkpoint"
    yield line(f"weights {gib(one)}, gradients {gib(one)}, moments {gib(2 * one)}, EMA {gib(one)}"
               + f", power averages {gib(2 * one)}" * bool(args.posthoc_ema), [fixed] * 2)
    if low:
        yield line(f"copies of the weights in {args.precision}", [low] * 2)
    each = " and ".join(f"{size / MIB:.0f}" for size in an_image)
    yield line(f"activations of {args.batch_size} images ({each} MiB each)", activations)
    yield line("together", [fixed + low + size for size in activations])
    yield line(f"together with --fsdp: the first line over {args.world}, one block whole",
               [sharded + low + size for size in activations])
    yield f"  {UNCOUNTED}"


def parameters(network):
    return sum(p.numel() for p in network.parameters())
