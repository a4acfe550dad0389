"""The loops: train_one_epoch, validate, and evaluate (sample, measure, report)."""
import argparse
import contextlib
import functools
import math
import platform
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from torchvision.utils import make_grid
from tqdm import tqdm

from models import FlowARError, build_model
from models import flow_matching as fm
from models.vae import DiagonalGaussian, open_vae
from models.weights import name_some, tensors_hash
from util import checkpoint, metrics
from util.data import EpochSampler, to_uint8
from util.diagnosis import first_not_finite
from util.distributed import (AUTOCAST, HostCopy, Leaving, Preempted, all_reduce_sum, autocast, barrier, check_compiler, from_main,
                              gather_to_main, is_main, log, rank, set_precision, world_size)
from util.evaluation import (RESULTS, STAGES, FinishedBatches, PngWriter, Stopwatch, check_settings, plot_sweep, point_name,
                             sweep_points, sweep_rows, write_npz, write_table)
from util.files import file_hash, make_directory, write_json
from util.latents import vae_identity
from util.logging import TrainingLog
from util.optimization import EMA, adjust_learning_rate
from util.options import model_options, resolve_geometry, sampling_options
from util.progress import Progress
from util.randomness import DROPOUT, TRAINING, VALIDATION, derive_seed, draw, draw_each, image_noise

DEFAULT_STATS = Path("fid_stats/adm_in256_stats.npz")
GRID_IMAGES = 16
DECODED_AT_ONCE = 32  # a batch of 256 images of 256 pixels would take tens of GiB in the VAE
PARTIAL = "partial"


# ---- training ------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What a training run consists of."""

    model: torch.nn.Module  # the network, or DDP around it
    network: torch.nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    keeper: checkpoint.Keeper | None  # on rank 0
    logger: TrainingLog
    args: argparse.Namespace
    device: torch.device
    images: int  # of the training set
    sampler: EpochSampler
    leaving: Leaving

    @property
    def steps(self):
        """Optimizer steps of an epoch: whole global batches."""
        return self.images // self.args.global_batch


class Step(NamedTuple):
    """An optimizer step that the device may still be working on."""

    number: int  # since the start of training
    index: int  # in its epoch
    lr: float
    batches: list  # of (latents, labels, draws), one a forward pass
    scale: torch.Tensor  # that the loss was multiplied with
    result: HostCopy  # see step_result
    queued: float  # time.time() when the host was done with it


def train_one_epoch(run, loader, to_moments, latent_scale):
    """Optimizer steps from where run.progress is to the end of its epoch.

    The host reads what came of a step when it has queued the next one's passes: neither it nor the device waits, and yet
    the weights are still those that the step left. That is where a step is counted, logged, averaged into the EMA, saved.

    Args:
        loader: batches (images or moments, labels) of this rank, see util.data.build_loader.
        to_moments: maps a batch on the device to posterior moments (B, 2C, H, W).
        latent_scale: models.vae.LatentScale.
    """
    args, progress, network = run.args, run.progress, run.network
    run.model.train()
    loader.sampler.set_epoch(progress.epoch, start=progress.done * args.global_batch)
    batches = iter(loader)
    run.logger.start_epoch(progress.epoch, args.epochs, run.steps * args.global_batch, progress.done * args.global_batch)
    epoch, first, number, last = progress.epoch, progress.done, progress.step, None
    for index in range(first, run.steps):
        lr = adjust_learning_rate(run.optimizer, epoch + index / run.steps, lr=args.lr, min_lr=args.min_lr, epochs=args.epochs,
                                  warmup_epochs=args.warmup_epochs, schedule=args.lr_schedule)
        draws = draw(network, args.global_batch, derive_seed(args.seed, TRAINING, number), run.device)
        parts = [prepare_batch(run, next(batches), draws, part, to_moments, latent_scale) for part in range(args.accum_iter)]
        losses = forward_and_backward(run, parts, number)
        if last is not None:
            finish_step(run, last)
        scale = run.scaler.scale(torch.ones((), device=run.device))
        run.scaler.unscale_(run.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), args.grad_clip or math.inf)
        result = step_result(run, norm, losses)
        run.optimizer.found_inf = (~result[:2].isfinite().all()).float()  # fused AdamW then leaves weights and moments alone
        run.optimizer.step()
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)
        last = Step(number, index, lr, parts, scale, HostCopy(result), time.time())
        number += 1
    finish_step(run, last)
    run.logger.end_epoch()


def prepare_batch(run, batch, draws, part, to_moments, latent_scale):
    """(latents, labels, draws) of forward pass `part` of a step, on the device, given the draws of its global batch."""
    count = run.args.batch_size * world_size()
    inputs, labels = (value.to(run.device, non_blocking=True) for value in batch)
    mine = draws.take(slice(part * count + rank(), (part + 1) * count, world_size()))
    return latent_scale.normalize(DiagonalGaussian(to_moments(inputs)).sample(noise=mine.posterior)), labels, mine


def forward_and_backward(run, parts, number):
    """Gradients of the mean loss over the forward passes; returns (1 + scales,), the loss and that of every scale."""
    seed_dropout(run, number)
    losses = []
    for part, (latents, labels, draws) in enumerate(parts):
        last = part + 1 == len(parts)
        with contextlib.nullcontext() if last or run.model is run.network else run.model.no_sync():
            with autocast(run.device, run.args.precision):
                loss, scales = run.model(latents, labels, t=draws.t, noise=draws.noise, drop=draws.drop, return_scales=True)
            run.scaler.scale(loss / len(parts)).backward()
        losses.append(torch.cat((loss.detach()[None], scales)))
    return torch.stack(losses).mean(dim=0)


def seed_dropout(run, number):
    torch.manual_seed(derive_seed(run.args.seed, DROPOUT, number, rank()))


def step_result(run, norm, losses):
    """What the host will read of a step: [gradient norm, loss, losses of scales, leave, save, this rank's loss].

    All but the norm, which DDP made equal everywhere, and the last are means over the ranks, by one small collective a step:
    so all ranks agree at every step on whether it was finite and whether to leave or save, without waiting for each other.
    """
    asked = [losses.new_full((1,), float(wish)) for wish in (run.leaving.asked, run.keeper is not None and run.keeper.is_due())]
    shared = all_reduce_sum(torch.cat((losses, *asked))) / world_size()
    return torch.cat((norm.detach()[None], shared, losses[:1]))


def finish_step(run, step):
    """What follows from a step's result: EMA, log, checkpoint. Raises FlowARError or Preempted to end the training."""
    args, progress = run.args, run.progress
    norm, loss, *scales, leave, save, own_loss = step.result.tolist()
    if math.isfinite(norm) and math.isfinite(loss):
        run.ema.update(run.network)
        progress.bad_in_a_row = 0
        usual = progress.usual
        if progress.add([norm, loss, *scales]):
            log_spike(run, step, loss, usual, own_loss)
    else:
        log_bad_step(run, step, norm, loss)
    epoch = progress.epoch
    progress.advance(run.steps)
    run.logger.advance(args.global_batch)
    if (step.index + 1) % args.log_freq == 0 or progress.done == 0:
        log_period(run, epoch + (step.index + 1) / run.steps, step)
    if run.keeper is not None:
        run.keeper.check()
    due = save or args.save_every.steps and progress.step % args.save_every.steps == 0
    if leave or due and not progress.bad_in_a_row:  # a run that went bad does not push its good checkpoints out
        save_checkpoint(run)
    if leave:
        leave_saved(run)


def save_checkpoint(run):
    """Begin to write a checkpoint of the last finished step, unless there is one."""
    if run.keeper is not None and run.keeper.saved != run.progress.step:
        run.logger.flush()
        run.keeper.save(checkpoint.content_of(run.network, run.ema, run.optimizer, run.scaler, run.progress, run.images, run.args), run.progress.step)


def leave_saved(run):
    """Wait for the checkpoint and end with Preempted."""
    if run.keeper is not None:
        run.keeper.wait()
    barrier()
    raise Preempted(f"asked to leave: saved after step {run.progress.step}", together=True)


def log_period(run, epoch, step):
    means = run.progress.take_means()
    if means is None:
        return
    rate, left = run.logger.rate(step.queued), (run.args.epochs - epoch) * run.steps * run.args.global_batch
    run.logger.training(run.progress.step, epoch, left / rate, rate, means[1], means[0], step.lr, dict(zip(run.network.scale, means[2:])),
                        run.progress.bad_steps)


def log_spike(run, step, loss, usual, own_loss):
    """Name the rank with the largest loss, and its images."""
    of_ranks = gather_to_main((own_loss, images_of(run, step)))
    if of_ranks is not None:
        worst = max(range(len(of_ranks)), key=lambda r: of_ranks[r][0])
        run.logger.event("spike", step.number + 1, f"loss {loss:.4f}, usually {usual:.4f}; {of_ranks[worst][0]:.4f} on rank {worst}",
                         loss=loss, usual=usual, rank=worst, loss_rank=of_ranks[worst][0], images=of_ranks[worst][1])


def log_bad_step(run, step, norm, loss):
    """Count a step that was skipped and name what was not finite first; FlowARError after --max_bad_steps in a row."""
    progress, args = run.progress, run.args
    progress.bad_steps += 1
    progress.bad_in_a_row += 1
    of_ranks = gather_to_main((diagnose(run, step), images_of(run, step)))
    if of_ranks is not None:
        guilty = next((r for r, (what, _) in enumerate(of_ranks) if what), None)
        what = f"{of_ranks[guilty][0]} on rank {guilty}" if guilty is not None else "no module's output or gradient, but their sum over all"
        run.logger.event("bad_step", step.number + 1, f"skipped: not finite: first {what} (gradient norm {norm}, loss {loss})",
                         first=what, rank=guilty, images=of_ranks[guilty or 0][1], in_a_row=progress.bad_in_a_row)
    if progress.bad_in_a_row >= args.max_bad_steps:
        raise FlowARError(f"{progress.bad_in_a_row} steps in a row were not finite, up to step {step.number + 1} (--max_bad_steps "
                          f"{args.max_bad_steps}): stopped, the last checkpoint is as it was; lower --lr or --blr, or use --precision fp32")


def diagnose(run, step):
    """See util.diagnosis: the step's passes again, with the weights, draws and dropout that they had."""
    def loss_of(latents, labels, draws):
        with autocast(run.device, run.args.precision):
            loss = run.network(latents, labels, t=draws.t, noise=draws.noise, drop=draws.drop)
        return loss / len(step.batches) * step.scale

    seed_dropout(run, step.number)
    return first_not_finite(run.network, [functools.partial(loss_of, *batch) for batch in step.batches], [batch[0] for batch in step.batches])


def images_of(run, step):
    """Indices in the training set of this rank's images of a step."""
    first = step.index * run.args.global_batch
    return run.sampler.indices(first, first + run.args.global_batch)


@torch.no_grad()
def validate(network, loader, to_moments, latent_scale, args, device):
    """(loss, {scale: loss}) over a validation set, without dropout and label drop, with the same draws for an image every time."""
    training = network.training
    network.eval()
    total = torch.zeros(len(network.scale) + 1, dtype=torch.float64, device=device)  # sums per scale, count
    for i, (batch, labels) in enumerate(loader):
        first = rank() + i * loader.batch_size * world_size()
        mine = draw_each(network, args.seed, VALIDATION, range(first, first + len(labels) * world_size(), world_size())).to(device)
        batch, labels = batch.to(device), labels.to(device)
        latents = latent_scale.normalize(DiagonalGaussian(to_moments(batch)).sample(noise=mine.posterior))
        with autocast(device, args.precision):
            losses = network.scale_losses(latents, labels, t=mine.t, noise=mine.noise)
        total[:-1] += losses.double().sum(dim=1)
        total[-1] += len(labels)
    network.train(training)
    all_reduce_sum(total)
    means = total[:-1] / total[-1]
    weights = network.scale_weights(device).double()
    return (means * weights).sum().item(), dict(zip(network.scale, means.tolist()))


# ---- sampling ------------------------------------------------------------------------------------------------


def image_label(index, num_images, class_num):
    """Label of image `index` of `num_images`: classes in order, as evenly as can be (50 each for 50,000 of 1000)."""
    return index * class_num // num_images


@torch.no_grad()
def generate(model, vae, labels, indices, args, device, watch=None, calls=None):
    """(images (n, 3, H, W) uint8 on the device, finite (n,) bool). Image i starts from the noise of (seed, i).

    watch: util.evaluation.Stopwatch; calls: see FlowAR.sample_pyramid.
    """
    watch = watch or Stopwatch(device)
    noise = image_noise(model, args.seed, indices)
    labels = torch.tensor(labels, device=device)
    with autocast(device, args.precision):
        with watch("sampling"):
            latents = model.sample_tokens(labels, noise=noise, calls=calls, **sampling_options(args))
        with watch("decoding"):
            parts = [decode(vae, part) for part in latents.split(DECODED_AT_ONCE)]
            images, finite = (torch.cat(values) for values in zip(*parts))
    return images, finite


def decode(vae, latents):
    """(images (n, 3, H, W) uint8, finite (n,) bool) of scaled latents."""
    images = vae.decode(vae.latent_scale.restore(latents))
    return to_uint8(images), images.isfinite().flatten(1).all(dim=1)


def refuse_not_finite(bad, count, args):
    """FlowARError that names images whose pixels are not finite, if there are any."""
    if bad:
        raise FlowARError(f"{len(bad)} of {count} images are not finite: {name_some(map(str, sorted(bad)), 8)}; the weights "
                          f"of {args.resume or 'the EMA'} may be damaged" + ("" if args.precision == "fp32" else f", or --precision {args.precision} overflows (try fp32)"))


def generate_all(model, vae, labels, args, device):
    """Images (n, 3, H, W) uint8 on the CPU, of labels in order, args.eval_bsz at a time; FlowARError if not finite."""
    images, bad = [], []
    for first in range(0, len(labels), args.eval_bsz):
        indices = range(first, min(first + args.eval_bsz, len(labels)))
        some, finite = generate(model, vae, labels[first:indices.stop], indices, args, device)
        images.append(some.cpu())
        bad += [index for index, ok in zip(indices, finite.tolist()) if not ok]
    refuse_not_finite(bad, len(labels), args)
    return torch.cat(images)


def sample_grid(model, vae, args, device):
    """(3, H, W) uint8: a grid of images of classes spread over all."""
    labels = [image_label(i, GRID_IMAGES, model.class_num) for i in range(GRID_IMAGES)]
    return make_grid(generate_all(model, vae, labels, args, device), nrow=math.isqrt(GRID_IMAGES), padding=1)


# ---- evaluation ----------------------------------------------------------------------------------------------


def load_for_evaluation(args, device):
    """(model, vae, description) of --resume and --vae_path; fills in the geometry that was not given."""
    if not args.resume:
        raise FlowARError("--resume is missing: give a checkpoint, a directory with checkpoint-last.pth or a .safetensors")
    path, content = checkpoint.read_model_file(args.resume)
    state = checkpoint.model_state(content, path)
    del content
    vae, extra = open_vae(args.vae, args.vae_path)
    if extra:
        log(f"{args.vae_path}: {len(extra)} tensors are not the VAE's and were left out")
    geometry = checkpoint.recognise_geometry(state, path, vae.embed_dim)
    checkpoint.check_geometry(args, geometry, path)
    known = {"vae_embed_dim": vae.embed_dim, "vae_stride": vae.stride, **geometry}
    known["img_size"] = known["scales"][-1] * known["patch_size"] * vae.stride
    checkpoint.check_geometry(args, {"img_size": known["img_size"]}, path)
    if args.model is None:
        known.update(checkpoint.recognise_size(state, path))
    resolve_geometry(args, known)
    check_vae(vae, args)
    with torch.device("meta"):  # sizes that a file claims are compared with its tensors before memory is taken
        checkpoint.check_fits(build_model(args.model, **model_options(args)), state, path)
    model = build_model(args.model, **model_options(args))
    checkpoint.load_model(model, state, path)
    description = {"model": args.model, "parameters": sum(p.numel() for p in model.parameters()),
                   "checkpoint": str(path), "vae": args.vae if args.vae != "kl16" else str(args.vae_path)}
    if is_main():
        description.update(checkpoint_sha256=file_hash(path), vae_sha256=vae_identity(args.vae, args.vae_path, vae))
    model.to(device).for_sampling(AUTOCAST.get(args.precision))
    if args.compile:
        check_compiler(device)
        model.compile_sampler(args.compile)
    log(f"attention kernel: {model.attention_kernel(AUTOCAST.get(args.precision))}")
    return model, vae.to(device), description


def check_vae(vae, args):
    for option, found in (("vae_embed_dim", vae.embed_dim), ("vae_stride", vae.stride)):
        if getattr(args, option) != found:
            raise FlowARError(f"--{option} is {getattr(args, option)}, but the VAE {args.vae_path if args.vae == 'kl16' else args.vae} has {found}")


def evaluate(model, vae, args, device, description, output, judge, persistent=True):
    """Sample args.num_images on all ranks and measure them at once; the figures go to <output>/results.json.

    Batches of args.eval_bsz consecutive images are dealt to the ranks, so that a picture does not depend on their
    number. Finished batches are kept in <output>/partial until the end: the same command goes on where it was killed.

    Args:
        description: what is evaluated, for the report.
        judge: (extractor, metrics.Reference or None) of build_judge.
        persistent: False keeps nothing and starts anew (the evaluations during training).

    Returns the report on rank 0 and None elsewhere. Global random state is left as it was.
    """
    extractor, reference = judge
    output = Path(output)
    batches = [range(first, min(first + args.eval_bsz, args.num_images))
               for first in range(0, args.num_images, args.eval_bsz)]
    planned = settings(model, extractor, reference, args, description)
    done, missing = from_main(lambda: prepare(output, planned, batches, extractor.dim, persistent))
    if done is not None:
        log(f"{output}: evaluated already, with the same settings")
        return done if is_main() else None
    start = time.time()
    mine = missing[rank()::world_size()]
    found = sample_and_measure(model, vae, args, device, output, extractor, batches, mine, persistent)
    seconds = time.time() - start
    parts = gather_to_main(found)
    if parts is None:
        return None
    found = {number: tensors for part in parts for number, tensors in part.items()}
    sampled = sum(len(batches[number]) for number in found)
    kept = FinishedBatches(output / PARTIAL) if persistent else None
    found.update({number: kept.load(number) for number in range(len(batches)) if number not in found})
    report = {**figures(found, batches, args, extractor, reference, device), **planned,
              **timing(found, args), "images_per_second": sampled / max(seconds, 1e-9), **machine(device)}
    if args.save_npz:
        labels = [image_label(i, args.num_images, model.class_num) for i in range(args.num_images)]
        write_npz(output / "samples.npz", kept, len(batches), labels)
    write_json(report, output / RESULTS)
    if persistent:
        kept.remove()
    return report


def prepare(output, planned, batches, dim, persistent):
    """(results if there are any, numbers of the batches to sample), on rank 0. dim: of the features."""
    make_directory(output)
    if not persistent:
        return None, list(range(len(batches)))
    done, kept = check_settings(output, planned), FinishedBatches(output / PARTIAL)
    if done is not None:
        kept.remove()  # if the program was killed before it could
        return done, []
    missing = [number for number, batch in enumerate(batches) if not kept.has(number, (len(batch), dim))]
    if len(missing) < len(batches):
        log(f"{output}: going on, {len(missing)} of {len(batches)} batches are missing")
    return None, missing


def sample_and_measure(model, vae, args, device, output, extractor, batches, mine, persistent):
    """{batch number: {features, logits if any, bad, seconds, calls}} of this rank's batches."""
    kept = FinishedBatches(output / PARTIAL) if persistent else None
    writer = PngWriter(output / "images") if args.save_images else None
    watch, found, pending = Stopwatch(device), {}, None
    images_of_all = sum(map(len, batches))
    progress = tqdm(total=sum(len(batches[number]) for number in mine), desc="sampling (rank 0)", unit="img",
                    disable=not is_main(), mininterval=2)

    def finish(number, tensors, images, wait):
        with watch("writing"):
            wait()
            if kept:
                pixels = {"images": images.permute(0, 2, 3, 1).contiguous()} if args.save_npz else {}
                kept.save(number, {**tensors, **pixels})
        found[number] = tensors

    for number in mine:
        indices = batches[number]
        labels = [image_label(i, images_of_all, model.class_num) for i in indices]
        calls = []
        images, finite = generate(model, vae, labels, indices, args, device, watch, calls)
        bad = [index for index, ok in zip(indices, finite.tolist()) if not ok]
        if len(bad) == len(indices):
            refuse_not_finite(bad, images_of_all, args)  # all of a batch: no use in going on
        with watch("features"):
            features, logits = metrics.extract(extractor, images)
        if pending:
            finish(*pending)  # its files were written while this batch was sampled
        with watch("writing"):
            images = images.cpu()
            wait = writer.start(images, indices) if writer else list
        tensors = {"features": features, "bad": torch.tensor(bad, dtype=torch.long), "seconds": watch.take(),
                   "calls": torch.tensor([[len(scale), sum(scale)] for scale in calls])}
        if logits is not None:
            tensors["logits"] = logits
        pending = (number, tensors, images, wait)
        progress.update(len(indices))
    if pending:
        finish(*pending)
        tensors["seconds"] += watch.take()  # of writing the last batch
    progress.close()
    return found


def figures(found, batches, args, extractor, reference, device):
    """The metrics of all batches' features, in the images' order."""
    found = [found[number] for number in range(len(batches))]
    refuse_not_finite(torch.cat([part["bad"] for part in found]).tolist(), args.num_images, args)
    features = torch.cat([part["features"] for part in found])
    logits = torch.cat([part["logits"] for part in found]) if "logits" in found[0] else None
    if len(features) <= extractor.dim and reference is not None:
        log(f"warning: {len(features)} images for {extractor.dim} features: the covariance is rank-deficient and the "
            "distance is biased upwards")
    return metrics.figures(features, logits, reference, extractor, device)


def timing(found, args):
    """Device seconds per image of each stage, and how often the flow head was called."""
    seconds = sum(part["seconds"] for part in found.values()) / args.num_images
    calls = found[0]["calls"]
    return {"seconds_per_image": dict(zip(STAGES, seconds.tolist())), "nfe": calls[:, 0].tolist(),
            "flow_head_passes_per_image": calls[:, 1].sum().item() / min(args.eval_bsz, args.num_images)}


def build_judge(args, device):
    """(extractor, reference) of the options: what is missing is said before anything is sampled or trained."""
    extractor = metrics.build_extractor(args, device)
    reference = find_reference(args, extractor, device)
    if reference is not None and args.num_images < 2:
        raise FlowARError("--num_images 1: a distance needs the covariance of at least 2 images")
    return extractor, reference


def find_reference(args, extractor, device):
    """metrics.Reference of --fid_stats, --ref_images or the default statistics file, or None."""
    if args.fid_stats and args.ref_images:
        raise FlowARError("--fid_stats and --ref_images are two references: give one")
    if args.ref_images:
        found = metrics.folder_features(args.ref_images, extractor, device, args.img_size)
        if found is None:  # rank 0 has the features and computes the figures
            return metrics.Reference(args.ref_images, None, None)
        return metrics.Reference(args.ref_images, **found.statistics, features=found.features)
    if args.fid_stats:
        return metrics.load_statistics(args.fid_stats, extractor, args.img_size)
    hint = ""
    if extractor.name == metrics.Inception.name and args.img_size == metrics.ADM_STATISTICS["img_size"]:
        if DEFAULT_STATS.is_file():
            return metrics.load_statistics(DEFAULT_STATS, extractor, args.img_size)
        hint = f", or put ADM's statistics at {DEFAULT_STATS}"
    log(f"warning: no reference: the {extractor.distance} is left out. Give --fid_stats or --ref_images{hint}")
    return None


def settings(model, extractor, reference, args, description):
    """What a reader needs to repeat the figures, and what must agree when an evaluation goes on."""
    return {
        **description,
        "num_images": args.num_images, "class_num": model.class_num, "img_size": model.img_size, "scales": model.scale,
        "solver": args.solver, "num_step": args.num_step, "num_step_last": args.num_step_last,
        "steps": [len(fm.time_grid(n)) - 1
                  for n in fm.annealed_steps(args.num_step, args.num_step_last, len(model.scale))],
        "cfg": args.cfg, "cfg_schedule": args.cfg_schedule, "guidance": args.guidance,
        "temperature": args.temperature, "precision": args.precision, "seed": args.seed, "eval_bsz": args.eval_bsz,
        "save_images": args.save_images, "save_npz": args.save_npz,
        "reference": reference.name if reference else None, "feature_extractor": extractor.name,
        "extractor_sha256": tensors_hash(extractor.network.state_dict()), "extractor_resize": extractor.resize,
        "extractor_batch": extractor.batch,
    }


def machine(device):
    """Where the figures were made."""
    return {
        "world_size": world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "torchvision": torchvision.__version__, "numpy": np.__version__,
                     "torch_fidelity": metrics.torch_fidelity_version()},
    }


def evaluation_precision(precision, device):
    """Resolve and set the precision of sampling: fp16 on CUDA, as the release samples and decodes."""
    if precision is None and device.type == "cuda":
        precision = "fp16"
    return set_precision(precision, device)


def evaluate_checkpoint(args, device):
    """eval.py, and main_flowar.py --evaluate: load, sample, measure, print; several values of an option are a sweep."""
    args.precision = evaluation_precision(args.precision, device)
    model, vae, description = load_for_evaluation(args, device)
    log(f"{description['model']}: {description['parameters']:,} parameters from {description['checkpoint']}")
    judge = build_judge(args, device)
    points = list(sweep_points(args))
    for point in points:
        output = Path(args.output_dir) / point_name(args, point)
        report = evaluate(model, vae, point, device, description, output, judge)
        if report is None:
            continue
        print_report(report, judge[0], output)
        if len(points) > 1:
            rows = sweep_rows(args.output_dir)  # with those of earlier sweeps into the same folder
            write_table(rows, Path(args.output_dir) / "results.csv")
            metric = judge[0].distance if judge[1] else "inception_score_mean"
            if all(metric in row for row in rows):
                plot_sweep(rows, metric, Path(args.output_dir) / "sweep.png")


def print_report(report, extractor, output):
    shown = [key for key in report
             if key.startswith((extractor.distance, "inception_score_mean", "kid_mean", "precision_k3", "recall_k3"))]
    stages = ", ".join(f"{stage} {seconds:.4f}" for stage, seconds in report["seconds_per_image"].items())
    print("\n".join(f"{key}: {report[key]:.4f}" for key in shown))
    print(f"NFE {sum(report['nfe'])}; {report['images_per_second']:.2f} images/s; seconds per image and device: {stages}")
    print(f"{output}/results.json", flush=True)
