"""Train a small KL autoencoder on an image folder and write a file that --vae_path takes.

    python scripts/train_vae.py --data_path images --output vae.pth --img_size 32 --ch_mult 1,2,2 --embed_dim 4

The loss is L1 + MSE reconstruction plus a weighted KL term, with --perceptual also a distance in the features of a
network trained on ImageNet; there is no adversarial part. This is for small images and demonstrations, not a
replacement for KL-16. The latent scale and shift are measured at the end and stored in the file. The same command
resumes a run that was killed at its last snapshot (`<output>.training`).
"""
import itertools
import math
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from models import AutoencoderKL, FlowARError
from models.vae import LatentScale
from models.vaes import save_vae
from models.weights import load_state, read_file, write_file
from util.cluster import autocast, run_main, select_device, set_precision
from util.command_line import (BELOW_ONE, COUNT, DEVICE, PIXELS, POSITIVE, REAL, SEED, WORKERS, Parser, add_options,
                               as_type, color, list_of, path)
from util.data import Images, build_loader, find_split, to_uint8
from util.data.tables import Columns
from util.evaluation.extractors import EfficientNetLite0
from util.evaluation.store import write_png
from util.files import check_output

LEARNING = ("img_size", "crop", "flip", "background", "steps", "batch_size", "lr", "kl_weight", "perceptual",
            "perceptual_from", "ema_rate", "precision", "seed")
SNAPSHOT_STEPS = 200
WARMUP_STEPS = 50
STATISTICS_IMAGES = 2048
PICTURES = 12


def parse_args():
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data_path", type=as_type(path), required=True, help="folder or archive with train/ and val/, or "
        "hf:OWNER/NAME")
    add_options(parser, fields(Columns))
    add("--output", type=as_type(path), required=True, help="file to write; <output>.png shows reconstructions")
    add("--background", type=as_type(color), default="white", help="colour behind transparent pixels: '#ff8000' or "
        "255,128,0")
    add("--img_size", type=as_type(PIXELS), default=256, help="image size in pixels")
    add("--embed_dim", type=as_type(POSITIVE), default=4, help="latent channels")
    add("--ch", type=as_type(POSITIVE), default=32, help="base width, a multiple of 4")
    add("--ch_mult", type=as_type(list_of(POSITIVE)), default=(1, 2, 2), help="width multiplier of each level")
    add("--num_res_blocks", type=as_type(COUNT), default=1, help="residual blocks per level")
    add("--crop", default="random", choices=("random", "center"), help="training crops")
    add("--no_flip", action="store_true", help="disable random horizontal flips")
    add("--steps", type=as_type(POSITIVE), default=1000, help="optimizer steps")
    add("--batch_size", type=as_type(POSITIVE), default=64, help="images per step")
    add("--lr", type=as_type(REAL), default=1e-3, help="peak learning rate (cosine to zero)")
    add("--kl_weight", type=as_type(REAL), default=1e-4, help="weight of the KL term, per latent element")
    add("--perceptual", type=as_type(REAL), default=0.0, help="weight of the distance in EfficientNet-lite0 features")
    add("--perceptual_from", type=as_type(COUNT), default=0, help="first step with --perceptual; those before are "
        "twice as fast")
    add("--ema_rate", type=as_type(BELOW_ONE), default=0.0, help="decay rate of the weights' EMA to write; 0: the last "
        "weights")
    add("--precision", choices=("fp32", "tf32", "bf16"), help="default: tf32 on CUDA, fp32 elsewhere")
    add("--device", type=as_type(DEVICE), default="auto", help="auto uses CUDA if available")
    add("--num_workers", type=as_type(WORKERS), help="data loading processes; default: as in training")
    add("--seed", type=as_type(SEED), default=0, help="random seed")
    args = parser.parse_args()
    args.flip = not args.no_flip
    return args


class PerceptualLoss:
    """Distance of images (B, 3, H, W) in [-1, 1] in the features of EfficientNet-lite0, as LPIPS (Zhang et al., 2018)
    without its learned weights: the mean over some blocks of |a - b|^2, a and b scaled to length 1 at every position.
    """
    side, blocks = 64, (0, 2, 4, 7, 10, 15)

    def __init__(self, device):
        self.extractor, self.features = EfficientNetLite0(device), []
        self.extractor.size = self.side
        self.extractor.network.requires_grad_(False)
        for block in self.blocks:
            self.extractor.network._blocks[block].register_forward_hook(self.keep)

    def keep(self, block, inputs, output):
        self.features.append(output)

    def directions(self, images):
        self.features.clear()
        self.extractor.forward(images * 127.5 + 127.5)
        return [F.normalize(x, dim=1, eps=1e-3) for x in self.features]

    def __call__(self, decoded, images):
        with torch.no_grad():
            expected = self.directions(images)
        distances = [(a - b).square().sum(1).mean() for a, b in zip(self.directions(decoded), expected)]
        return sum(distances) / len(distances)


def autoencoder_loss(vae, images, kl_weight, generator=None):
    """(loss, reconstructions)"""
    posterior = vae.encode(images)
    decoded = vae.decode(posterior.sample(generator)).float()
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + kl_weight * kl, decoded


def learning_rate(step, args):
    return args.lr * min(1, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / args.steps))


def train(vae, data, args, device, precision):
    """args.steps optimizer steps, from the last snapshot on; returns the weights to write."""
    perceptual = PerceptualLoss(device) if args.perceptual else None
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(args.ema_rate))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, weight_decay=0.0)
    snapshot, first = Path(f"{args.output}.training"), 0
    record = {**{name: getattr(args, name) for name in LEARNING}, "data_sha256": data.identity()["sha256"]}
    if snapshot.is_file():
        content = read_file(snapshot)
        if content["record"] != record:
            raise FlowARError(f"{snapshot}: was made with other options or data: remove it to train from scratch")
        load_state(vae, content["model"], snapshot)
        average.load_state_dict(content["average"])
        optimizer.load_state_dict(content["optimizer"])
        first = content["step"]
        print(f"resumes from step {first} of {snapshot}")
    loader = build_loader(data, args.batch_size, seed=args.seed, train=True, num_workers=args.num_workers,
                          pin_memory=device.type == "cuda")
    if len(loader) == 0:
        raise FlowARError(f"{args.data_path}/train: {len(data)} images are fewer than --batch_size {args.batch_size}")
    progress = tqdm(batches(loader, first), initial=first, total=args.steps, desc="VAE", unit="step", mininterval=2)
    for step, (images, _) in zip(range(first, args.steps), progress):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        generator = torch.Generator(device).manual_seed(args.seed * 1_000_003 + step)
        with autocast(device, precision):
            images = images.to(device, non_blocking=True)
            loss, decoded = autoencoder_loss(vae, images, args.kl_weight, generator)
            if perceptual and step >= args.perceptual_from:
                loss = loss + args.perceptual * perceptual(decoded, images)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(vae)
        if (step + 1) % SNAPSHOT_STEPS == 0:
            if not math.isfinite(loss.item()):
                raise FlowARError(f"VAE loss is {loss.item()} at step {step}: lower --lr, or use --precision fp32")
            progress.set_postfix(loss=f"{loss.item():.4f}")
            write_file({"step": step + 1, "model": vae.state_dict(), "average": average.state_dict(),
                        "optimizer": optimizer.state_dict(), "record": record}, snapshot)
    return average.module


def batches(loader, first):
    """Batches from step `first` on, epoch after epoch (the skipped ones of a resumed epoch are loaded and dropped)."""
    for epoch in itertools.count(first // len(loader)):
        loader.sampler.set_epoch(epoch)
        skip = first - epoch * len(loader)
        yield from itertools.islice(loader, max(skip, 0), None)


@torch.no_grad()
def measure_latent_scale(vae, data, args, device):
    """(1 / std, mean) of posterior samples of training images."""
    order = np.random.default_rng(args.seed).permutation(len(data))[:STATISTICS_IMAGES]
    generator = torch.Generator(device).manual_seed(args.seed)
    samples = []
    for indices in np.array_split(order, max(1, len(order) // args.batch_size)):
        images = torch.stack([data[0, int(i)][0] for i in indices]).to(device)
        samples.append(vae.encode(images).sample(generator).cpu())
    raw = torch.cat(samples)
    return LatentScale(1 / raw.std().item(), raw.mean().item())


@torch.no_grad()
def evaluate(vae, data, args, device):
    """Mean PSNR in dB over a dataset (posterior means, pixels not rounded), and a picture: originals above
    reconstructions.
    """
    from torchvision.utils import make_grid  # heavy: not for --help

    loader = build_loader(data, args.batch_size, num_workers=args.num_workers)
    psnr = []
    for images, _ in loader:
        decoded = vae.decode(vae.encode(images.to(device)).mode()).clamp(-1, 1).cpu()
        error = ((images - decoded) / 2).square().mean(dim=(1, 2, 3))
        psnr.append(-10 * error.clamp_min(1e-10).log10())
    pictures = torch.stack([data[0, int(i)][0] for i in np.linspace(0, len(data) - 1, PICTURES).astype(int)])
    decoded = vae.decode(vae.encode(pictures.to(device)).mode()).clamp(-1, 1).cpu()
    grid = make_grid(to_uint8(torch.cat((pictures, decoded))), nrow=PICTURES)
    write_png(grid.permute(1, 2, 0).numpy(), Path(f"{args.output}.png"))
    return torch.cat(psnr).mean().item()


def main():
    args = parse_args()
    device, output, start = select_device(args.device), Path(args.output), time.time()
    precision = set_precision(args.precision, device)
    check_output(output)
    if output.is_file() and not Path(f"{output}.training").is_file():
        raise FlowARError(f"{output}: already exists: choose another --output, or remove it")
    data = Images(find_split(args.data_path, "train", columns=args), args.img_size, args.seed, train=True,
                  center=args.crop == "center", flip=args.flip, background=args.background, columns=args)
    print(f"{data.listing.summary()} in {data.listing.root}")
    val = find_split(args.data_path, "val", needed=False, columns=args)
    held_out = val and Images(val, args.img_size, background=args.background, columns=args)
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(embed_dim=args.embed_dim, ch=args.ch, ch_mult=args.ch_mult, num_res_blocks=args.num_res_blocks)
    if args.img_size % vae.stride:
        raise FlowARError(f"--img_size {args.img_size} is not a multiple of the VAE's stride {vae.stride} "
                          f"({len(args.ch_mult)} levels)")
    vae = train(vae.to(device), data, args, device, precision).eval()
    if not all(value.isfinite().all() for value in vae.state_dict().values()):
        raise FlowARError("the VAE's weights are not finite, nothing was written: lower --lr, or use --precision fp32")
    vae.latent_scale = measure_latent_scale(vae, data, args, device)
    psnr = evaluate(vae, held_out or data, args, device)
    save_vae(vae, output)
    Path(f"{output}.training").unlink(missing_ok=True)
    print(f"{output}: {sum(p.numel() for p in vae.parameters()):,} parameters, stride {vae.stride}, {vae.embed_dim} "
          f"channels, latent scale {vae.latent_scale.scale:.4f}, shift {vae.latent_scale.shift:.4f}")
    which = f"{len(held_out)} held-out" if held_out else f"the {len(data)} training"
    print(f"PSNR on {which} images: {psnr:.2f} dB ({time.time() - start:.0f} s; see {output}.png)")


if __name__ == "__main__":
    run_main(main)
