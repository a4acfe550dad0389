"""Train a small KL autoencoder on an image folder and write a file that --vae_path takes.

The loss is L1 + MSE reconstruction plus a weighted KL term; there is no adversarial or perceptual part, so this is
for small images and demonstrations, not a replacement for KL-16. The latent scale and shift are measured at the end
and stored in the file. The same command resumes a run that was killed at its last snapshot (`<output>.training`); --resume trains a finished
VAE further, with a new schedule.

    python scripts/train_vae.py --data_path images --output vae.pth --img_size 32 --ch_mult 1,2,2 --embed_dim 4
"""
import argparse
import itertools
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.utils import make_grid
from tqdm import tqdm

from models import AutoencoderKL, FlowARError
from models.vae import LatentScale
from models.vaes import load_vae, save_vae
from models.weights import load_state, read_file, write_file
from util.data import Images, build_loader, find_split, to_uint8
from util.cluster import autocast, run_main, select_device, set_precision
from util.evaluation.store import write_png
from util.files import check_output
from util.command_line import COUNT, PIXELS, POSITIVE, REAL, SEED, WORKERS, Parser, as_type, color, list_of, path

LEARNING = ("resume", "img_size", "crop", "flip", "steps", "batch_size", "lr", "kl_weight", "seed", "background")
SNAPSHOT_STEPS = 200
WARMUP_STEPS = 50
STATISTICS_IMAGES = 2048
PICTURES = 12


def parse_args():
    parser = Parser(__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data_path", type=as_type(path), required=True, help="folder or archive with train/ and val/, or hf:OWNER/NAME, see docs/data.md")
    parser.add_argument("--output", type=as_type(path), required=True, help="file to write; <output>.png shows reconstructions")
    parser.add_argument("--resume", help="finished VAE of this script to train further, with its own sizes; may be --output itself")
    parser.add_argument("--no_val", action="store_true", help="no held-out images: no PSNR")
    parser.add_argument("--background", type=as_type(color), default="white", help="under transparent pixels: white, '#ff8000' or 255,128,0")
    parser.add_argument("--img_size", type=as_type(PIXELS), default=256, help="pixels a side")
    parser.add_argument("--embed_dim", type=as_type(POSITIVE), default=4, help="latent channels")
    parser.add_argument("--ch", type=as_type(POSITIVE), default=32, help="base width, a multiple of 4")
    parser.add_argument("--ch_mult", type=as_type(list_of(POSITIVE)), default=(1, 2, 2), help="width multiplier of every level")
    parser.add_argument("--num_res_blocks", type=as_type(COUNT), default=1, help="residual blocks a level")
    parser.add_argument("--crop", default="random", choices=("random", "center"), help="training crops")
    parser.add_argument("--no_flip", dest="flip", action="store_false", help="do not flip half of the images")
    parser.add_argument("--steps", type=as_type(POSITIVE), default=1000, help="optimizer steps")
    parser.add_argument("--batch_size", type=as_type(POSITIVE), default=64, help="images a step")
    parser.add_argument("--lr", type=as_type(REAL), default=1e-3, help="peak learning rate (cosine to zero)")
    parser.add_argument("--kl_weight", type=as_type(REAL), default=1e-4, help="weight of the KL term, per latent element")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), help="default: tf32 on CUDA, fp32 elsewhere")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to train")
    parser.add_argument("--num_workers", type=as_type(WORKERS), help="data loading processes; default: as in training")
    parser.add_argument("--seed", type=as_type(SEED), default=0, help="seed of weights, order, crops and posterior noise")
    return parser.parse_args()


def autoencoder_loss(vae, images, kl_weight, generator=None):
    posterior = vae.encode(images)
    decoded = vae.decode(posterior.sample(generator)).float()
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + kl_weight * kl


def learning_rate(step, args):
    return args.lr * min(1, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / args.steps))


def train(vae, data, args, device, precision):
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, weight_decay=0.0)
    snapshot = Path(f"{args.output}.training")
    record = {**{name: getattr(args, name) for name in LEARNING}, "data_sha256": data.identity()["sha256"]}
    first = resume(vae, optimizer, snapshot, record)
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
            loss = autoencoder_loss(vae, images.to(device, non_blocking=True), args.kl_weight, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % SNAPSHOT_STEPS == 0:
            if not math.isfinite(loss.item()):
                raise FlowARError(f"VAE loss is {loss.item()} at step {step}: lower --lr, or use --precision fp32")
            progress.set_postfix(loss=f"{loss.item():.4f}")
            write_file({"step": step + 1, "model": vae.state_dict(), "optimizer": optimizer.state_dict(),
                        "record": record}, snapshot)


def resume(vae, optimizer, snapshot, record):
    """Load a snapshot if there is one; the number of steps done. A line names the options that differ from before."""
    if not snapshot.is_file():
        return 0
    content = read_file(snapshot)
    before = content["record"]
    if before["resume"] != record["resume"]:
        raise FlowARError(f"{snapshot}: it began with --resume {before['resume']}, now it is {record['resume']}: remove it to start again")
    load_state(vae, content["model"], snapshot)
    own = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": content["optimizer"]["state"], "param_groups": own})
    changed = [f"{name} {before[name]} -> {value}" for name, value in record.items() if before.get(name) != value]
    print(f"resumes {snapshot} at step {content['step']}" + (f", with other options or data than before: {', '.join(changed)}" if changed else ""))
    return content["step"]


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
    for chunk in np.array_split(order, max(1, len(order) // args.batch_size)):
        images = torch.stack([data[(0, int(i))][0] for i in chunk]).to(device)
        samples.append(vae.encode(images).sample(generator).cpu())
    raw = torch.cat(samples)
    return LatentScale(1 / raw.std().item(), raw.mean().item())


@torch.no_grad()
def evaluate(vae, data, args, device):
    """Mean PSNR in dB over a dataset (posterior means, pixels not rounded), and a picture: originals above reconstructions."""
    loader = build_loader(data, args.batch_size, num_workers=args.num_workers)
    psnr = []
    for images, _ in loader:
        decoded = vae.decode(vae.encode(images.to(device)).mode()).clamp(-1, 1).cpu()
        error = ((images - decoded) / 2).square().mean(dim=(1, 2, 3))
        psnr.append(-10 * error.clamp_min(1e-10).log10())
    chosen = [data[(0, int(i))][0] for i in np.linspace(0, len(data) - 1, PICTURES).astype(int)]
    pictures = torch.stack(chosen)
    decoded = vae.decode(vae.encode(pictures.to(device)).mode()).clamp(-1, 1).cpu()
    grid = make_grid(to_uint8(torch.cat((pictures, decoded))), nrow=PICTURES)
    write_png(grid.permute(1, 2, 0).numpy(), Path(f"{args.output}.png"))
    return torch.cat(psnr).mean().item()


def main():
    args = parse_args()
    device, output, start = select_device(args.device), Path(args.output), time.time()
    precision = set_precision(args.precision, device)
    check_output(output)
    same = args.resume and Path(args.resume).is_file() and output.is_file() and Path(args.resume).samefile(output)
    if output.is_file() and not same and not Path(f"{output}.training").is_file():
        raise FlowARError(f"{output}: a file is there already: train it further with --resume {output}, choose another --output, or remove it")
    data = Images(find_split(args.data_path, "train"), args.img_size, args.seed, train=True, center=args.crop == "center", flip=args.flip,
                  background=args.background)
    print(data.summary())
    val = None if args.no_val else find_split(args.data_path, "val", needed=False)
    held_out = val and Images(val, args.img_size, background=args.background)
    if args.resume:
        vae = load_vae(args.resume).train().requires_grad_(True)
        print(f"training {args.resume} further: {vae.embed_dim} channels, stride {vae.stride}; its sizes replace the options'")
    else:
        torch.manual_seed(args.seed)
        vae = AutoencoderKL(embed_dim=args.embed_dim, ch=args.ch, ch_mult=args.ch_mult, num_res_blocks=args.num_res_blocks)
    if args.img_size % vae.stride:
        raise FlowARError(f"--img_size {args.img_size} is not a multiple of the VAE's stride {vae.stride} ({len(args.ch_mult)} levels)")
    train(vae.to(device), data, args, device, precision)
    vae.eval()
    if not all(value.isfinite().all() for value in vae.state_dict().values()):
        raise FlowARError("the VAE's weights are not finite: lower --lr, or use --precision fp32; nothing was written")
    vae.latent_scale = measure_latent_scale(vae, data, args, device)
    psnr = evaluate(vae, held_out or data, args, device)
    save_vae(vae, output)
    Path(f"{output}.training").unlink(missing_ok=True)
    parameters = sum(p.numel() for p in vae.parameters())
    print(f"{output}: {parameters:,} parameters, stride {vae.stride}, {vae.embed_dim} channels, latent scale "
          f"{vae.latent_scale.scale:.4f}, shift {vae.latent_scale.shift:.4f}")
    which = f"{len(held_out)} held-out" if held_out else f"the {len(data)} training"
    print(f"PSNR on {which} images: {psnr:.2f} dB ({time.time() - start:.0f} s; see {output}.png)")


if __name__ == "__main__":
    run_main(main)
