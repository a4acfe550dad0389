"""The loops: train_one_epoch, validate, and evaluate (sample, measure, report)."""
import contextlib
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm

from models import FlowARError, build_model
from models import flow_matching as fm
from models.vae import DiagonalGaussian, load_vae
from util import checkpoint, metrics
from util.data import to_uint8
from util.distributed import (all_reduce_sum, autocast, barrier, gather_to_main, is_main, log, rank, set_precision,
                              world_size)
from util.files import make_directory, write_json
from util.optimization import adjust_learning_rate
from util.options import model_options, resolve_geometry, sampling_options
from util.randomness import DROPOUT, TRAINING, VALIDATION, derive_seed, draw, image_noise

DEFAULT_STATS = Path("fid_stats/adm_in256_stats.npz")
GRID_IMAGES = 16


# ---- training ------------------------------------------------------------------------------------------------


def train_one_epoch(model, ema, optimizer, scaler, loader, to_moments, latent_scale, args, epoch, device, logger):
    """One epoch of optimizer steps; returns the number of steps taken since the start of training.

    Args:
        model: the network, or DDP around it; ema: util.optimization.EMA of the network.
        loader: batches (images or moments, labels) of this rank, see util.data.build_loader.
        to_moments: maps a batch on the device to posterior moments (B, 2C, H, W).
        latent_scale: models.vae.LatentScale.
    """
    network = getattr(model, "module", model)
    model.train()
    loader.sampler.set_epoch(epoch)
    steps = len(loader) // args.accum_iter
    batches = iter(loader)
    running = None
    logger.start_epoch(epoch, args.epochs, steps * args.global_batch)
    for i in range(steps):
        step = epoch * steps + i
        lr = adjust_learning_rate(optimizer, epoch + i / steps, lr=args.lr, min_lr=args.min_lr, epochs=args.epochs,
                                  warmup_epochs=args.warmup_epochs, schedule=args.lr_schedule)
        torch.manual_seed(derive_seed(args.seed, DROPOUT, step, rank()))
        draws = draw(network, args.global_batch, derive_seed(args.seed, TRAINING, step), device)
        losses = []
        for part in range(args.accum_iter):
            batch, labels = (value.to(device, non_blocking=True) for value in next(batches))
            first = part * args.batch_size * world_size()
            mine = draws.take(slice(first + rank(), first + args.batch_size * world_size(), world_size()))
            latents = latent_scale.normalize(DiagonalGaussian(to_moments(batch)).sample(noise=mine.posterior))
            last = part + 1 == args.accum_iter
            with contextlib.nullcontext() if last or model is network else model.no_sync():
                with autocast(device, args.precision):
                    loss, scales = model(latents, labels, t=mine.t, noise=mine.noise, drop=mine.drop,
                                         return_scales=True)
                scaler.scale(loss / args.accum_iter).backward()
            losses.append(torch.cat((loss.detach()[None], scales)))
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), args.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        ema.update(network)
        # Read on the host only every log_freq steps: no synchronisation in between.
        values = torch.cat((norm[None], torch.stack(losses).mean(dim=0)))
        running = values if running is None else running + values
        logger.advance(args.global_batch)
        done = i % args.log_freq + 1
        if done == args.log_freq or i + 1 == steps:
            norm_mean, loss_mean, *scale_means = (all_reduce_sum(running) / (done * world_size())).tolist()
            running = None
            if not math.isfinite(loss_mean):
                raise FlowARError(f"loss is {loss_mean} between steps {step + 1 - done} and {step} (epoch {epoch}): stopped "
                                  "before it reaches a checkpoint; lower --lr or --blr, or use --precision fp32")
            logger.training(step + 1, epoch + (i + 1) / steps, (args.epochs - epoch) * steps - i - 1, loss_mean,
                            norm_mean, lr, dict(zip(network.scale, scale_means)), args.global_batch)
    logger.end_epoch()
    return (epoch + 1) * steps


@torch.no_grad()
def validate(network, loader, to_moments, latent_scale, args, device):
    """(loss, {scale: loss}) over a validation set, without dropout and label drop, with the same draws every time."""
    training = network.training
    network.eval()
    total = torch.zeros(len(network.scale) + 1, dtype=torch.float64, device=device)  # sums per scale, count
    for i, (batch, labels) in enumerate(loader):
        count = loader.batch_size * world_size()
        draws = draw(network, count, derive_seed(args.seed, VALIDATION, i), device)
        mine = draws.take(slice(rank(), count, world_size()))
        mine = mine.take(slice(0, len(labels)))
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
def generate(model, vae, labels, indices, args, device):
    """Images (n, 3, H, W) uint8 on the device. Image i starts from the noise of (seed, i), whoever samples it."""
    noise = image_noise(model, args.seed, indices)
    labels = torch.tensor(labels, device=device)
    with autocast(device, args.precision):
        latents = model.sample_tokens(labels, noise=noise, **sampling_options(args))
        images = vae.decode(vae.latent_scale.restore(latents))
    finite = images.isfinite().flatten(1).all(dim=1).tolist()
    if not all(finite):
        bad = [index for index, ok in zip(indices, finite) if not ok]
        raise FlowARError(f"images {', '.join(map(str, bad[:8]))} are not finite: the weights may be damaged, or "
                          f"--precision {args.precision} overflows (try fp32)")
    return to_uint8(images)


def sample_grid(model, vae, args, device):
    """(3, H, W) uint8: a grid of images of classes spread over all."""
    count = min(GRID_IMAGES, args.num_images)
    labels = [image_label(i, count, model.class_num) for i in range(count)]
    images = torch.cat([generate(model, vae, labels[i:i + args.eval_bsz], range(i, min(i + args.eval_bsz, count)),
                                 args, device) for i in range(0, count, args.eval_bsz)])
    return make_grid(images.cpu(), nrow=int(count**0.5), padding=1)


# ---- evaluation ----------------------------------------------------------------------------------------------


def load_for_evaluation(args, device):
    """(model, vae, description) of --resume and --vae_path; fills in the geometry that was not given."""
    if not args.resume:
        raise FlowARError("--resume is missing: give a checkpoint, a directory with checkpoint-last.pth or a .safetensors")
    path, content = checkpoint.read_model_file(args.resume)
    state = checkpoint.model_state(content, path)
    del content
    vae, extra = load_vae(args.vae_path)
    if extra:
        log(f"{args.vae_path}: {len(extra)} tensors are not the VAE's and were left out")
    known = {"vae_embed_dim": vae.embed_dim, "vae_stride": vae.stride,
             **checkpoint.recognise_geometry(state, path, vae.embed_dim)}
    known["img_size"] = known["scales"][-1] * known["patch_size"] * vae.stride
    if args.model is None:
        known.update(checkpoint.recognise_size(state, path))
    resolve_geometry(args, known)
    check_vae(vae, args)
    model = build_model(args.model, **model_options(args))
    checkpoint.load_model(model, state, path)
    description = {"model": args.model, "parameters": sum(p.numel() for p in model.parameters()),
                   "checkpoint": str(path), "vae": str(args.vae_path)}
    if is_main():
        description.update(checkpoint_sha256=checkpoint.file_hash(path), vae_sha256=checkpoint.file_hash(args.vae_path))
    return model.to(device).eval(), vae.to(device), description


def check_vae(vae, args):
    for option, found in (("vae_embed_dim", vae.embed_dim), ("vae_stride", vae.stride)):
        if getattr(args, option) != found:
            raise FlowARError(f"--{option} is {getattr(args, option)}, but the VAE {args.vae_path} has {found}")


def evaluate(model, vae, args, device, description, output):
    """Sample args.num_images on all ranks, write them to output/images and the figures to output/results.json.

    Returns the report on rank 0 and None elsewhere. Global random state is left as it was.
    """
    extractor = metrics.build_extractor(args, device)  # before sampling: what is missing is said at once
    reference, reference_name = find_reference(args, extractor, device)
    folder = Path(output) / "images"
    if is_main():
        make_directory(folder)
    barrier()
    start = time.time()
    mine = range(rank(), args.num_images, world_size())
    features, logits = [], []
    progress = tqdm(total=args.num_images, desc="sampling", unit="img", disable=not is_main(), mininterval=2)
    for first in range(0, len(mine), args.eval_bsz):
        indices = mine[first:first + args.eval_bsz]
        labels = [image_label(i, args.num_images, model.class_num) for i in indices]
        images = generate(model, vae, labels, indices, args, device)
        write_images(images.cpu(), indices, folder)
        with torch.no_grad():
            found, classes = extractor(images)
        features.append(found.float().cpu())
        if classes is not None:
            logits.append(classes.float().cpu())
        progress.update(min(len(indices) * world_size(), args.num_images - progress.n))
    progress.close()
    parts = gather_to_main((list(mine), torch.cat(features) if features else torch.zeros(0, extractor.dim),
                            torch.cat(logits) if logits else None))
    if parts is None:
        return None
    seconds = time.time() - start
    report = {**figures(parts, extractor, reference), "reference": reference_name,
              **settings(model, extractor, args, device, description), "seconds": round(seconds, 1)}
    write_json(report, Path(output) / "results.json")
    return report


def figures(parts, extractor, reference):
    """The metrics of all ranks' (indices, features, logits), put back in the images' order."""
    order = torch.cat([torch.tensor(indices, dtype=torch.long) for indices, _, _ in parts]).argsort()
    features = torch.cat([part for _, part, _ in parts])[order]
    result = {}
    if reference is not None:
        if len(features) <= extractor.dim:
            log(f"warning: {len(features)} images for {extractor.dim} features: the covariance is rank-deficient and the "
                "distance is biased upwards")
        result[extractor.distance] = metrics.frechet_distance(metrics.statistics(features), reference)
    logits = [part for _, _, part in parts if part is not None]
    if logits:
        mean, std = metrics.inception_score(torch.cat(logits)[order])
        result.update(inception_score_mean=mean, inception_score_std=std)
    return result


def find_reference(args, extractor, device):
    """({mu, sigma} or None, its name) of --fid_stats, --ref_images or the default statistics file."""
    if args.fid_stats and args.ref_images:
        raise FlowARError("--fid_stats and --ref_images are two references: give one")
    if args.ref_images:
        return metrics.folder_statistics(args.ref_images, extractor, device), args.ref_images
    if args.fid_stats:
        return metrics.load_statistics(args.fid_stats, extractor.dim), args.fid_stats
    hint = ""
    if extractor.name == metrics.Inception.name:
        if DEFAULT_STATS.is_file():
            return metrics.load_statistics(DEFAULT_STATS, extractor.dim), str(DEFAULT_STATS)
        hint = f", or put ADM's statistics at {DEFAULT_STATS}"
    log(f"warning: no reference: the {extractor.distance} is left out. Give --fid_stats or --ref_images{hint}")
    return None, None


def settings(model, extractor, args, device, description):
    """What a reader needs to repeat the figures."""
    return {
        **description,
        "num_images": args.num_images, "class_num": model.class_num, "scales": model.scale, "sampler": "euler",
        "num_step": args.num_step, "num_step_last": args.num_step_last,
        "euler_steps": [len(fm.time_grid(n)) - 1
                        for n in fm.annealed_steps(args.num_step, args.num_step_last, len(model.scale))],
        "cfg": args.cfg, "cfg_schedule": args.cfg_schedule, "guidance": args.guidance,
        "temperature": args.temperature, "precision": args.precision, "seed": args.seed,
        "feature_extractor": extractor.name, "eval_bsz": args.eval_bsz, "world_size": world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "torchvision": torchvision.__version__, "numpy": np.__version__,
                     "torch_fidelity": metrics.torch_fidelity_version()},
    }


def write_images(images, indices, folder):
    for image, index in zip(images, indices):
        path = folder / f"{index:06d}.png"
        try:
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            raise FlowARError(f"{path}: cannot be written ({error})") from error


def evaluate_checkpoint(args, device):
    """eval.py, and main_flowar.py --evaluate: load, sample, measure, print."""
    if args.precision is None and device.type == "cuda":
        args.precision = "fp16"  # as the release samples and decodes
    args.precision = set_precision(args.precision, device)
    model, vae, description = load_for_evaluation(args, device)
    log(f"{description['model']}: {description['parameters']:,} parameters from {description['checkpoint']}")
    report = evaluate(model, vae, args, device, description, args.output_dir)
    if report is not None:
        for name in ("fid", metrics.EfficientNetLite0.distance, "inception_score_mean"):
            if name in report:
                print(f"{name}: {report[name]:.4f}")
        print(f"{args.num_images} images in {report['seconds']:.0f} s: {args.output_dir}/images and results.json")
