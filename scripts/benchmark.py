"""Measure this code on this machine. Every run times the plain way beside the fast one and prints the ratio.

    python scripts/benchmark.py evaluate --model flowar_small --num_images 1000 --eval_bsz 100 --device cuda

`evaluate`: sampling, decoding and features of N images in memory, against writing PNGs one by one and reading them again
for the features, as the release does. Weights are random: time does not depend on them.

    python scripts/benchmark.py data --latents 200000 --scratch /path/to/disk

`data`: images a second through the training loader from shards, from MAR's .npz files, and from JPEGs with the VAE, for 1, 2
and 4 workers, cold (files dropped from the page cache) and warm. Latents are synthetic, in --scratch, and kept there.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine_flowar import evaluate, generate, image_label, machine  # noqa: E402
from models import AutoencoderKL, build_model  # noqa: E402
from util import latents, metrics  # noqa: E402
from util.data import Images, build_loader  # noqa: E402
from util.distributed import run_main, select_device, set_precision  # noqa: E402
from util.evaluation import single_point  # noqa: E402
from util.files import file_hash, make_directory, write_bytes, write_json  # noqa: E402
from util.latents import NpzMoments, ShardedMoments  # noqa: E402
from util.options import evaluation_parser, integer_list, model_options, positive, resolve_geometry  # noqa: E402


def parse_args():
    parser = evaluation_parser()
    parser.description = __doc__.splitlines()[0]
    parser.add_argument("what", choices=("evaluate", "data"), help="what to measure")
    parser.add_argument("--latents", type=positive, default=200000, help="data: synthetic latents of each layout")
    parser.add_argument("--scratch", default="output/benchmark", help="data: folder for them (3 MiB a hundred in shards, 6 in npz)")
    parser.add_argument("--workers", type=integer_list, default=(1, 2, 4), help="data: numbers of loader workers")
    parser.add_argument("--seconds", type=positive, default=10, help="data: length of each measurement")
    parser.add_argument("--vae_ch", type=positive, default=128, help="base width of the VAE (KL-16 has 128)")
    parser.add_argument("--vae_ch_mult", type=integer_list, default=(1, 1, 2, 2, 4), help="its levels")
    parser.add_argument("--json", help="file to write the figures to")
    return parser.parse_args()


def build(args, device):
    torch.manual_seed(args.seed)
    resolve_geometry(args)
    vae = AutoencoderKL(embed_dim=args.vae_embed_dim, ch=args.vae_ch, ch_mult=args.vae_ch_mult)
    return build_model(args.model, **model_options(args)).to(device).eval(), vae.to(device).eval().requires_grad_(False)


def in_memory(model, vae, args, device, extractor, folder):
    return evaluate(model, vae, args, device, {"model": args.model}, folder, (extractor, None))


def through_files(model, vae, args, device, extractor, folder):
    """The release's way: PNGs one after the other, then a second pass over the files."""
    for first in range(0, args.num_images, args.eval_bsz):
        indices = range(first, min(first + args.eval_bsz, args.num_images))
        labels = [image_label(i, args.num_images, model.class_num) for i in indices]
        images, _ = generate(model, vae, labels, indices, args, device)
        for index, image in zip(indices, images.cpu()):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:06d}.png")
    return metrics.folder_features(folder, extractor, device)


def benchmark_evaluate(args, device):
    model, vae = build(args, device)
    extractor = metrics.build_extractor(args, device)
    seconds = {"in_memory": 0.0, "through_files": 0.0}
    for warm_up in (True, False):
        run = argparse.Namespace(**{**vars(args), "num_images": args.eval_bsz if warm_up else args.num_images})
        for way in (in_memory, through_files):
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                result = way(model, vae, run, device, extractor, Path(folder))
                seconds[way.__name__] = time.perf_counter() - start
                report = result if way is in_memory else report
    return {"model": args.model, "num_images": args.num_images, "eval_bsz": args.eval_bsz, "num_step": args.num_step,
            "cfg": args.cfg, "precision": args.precision, "feature_extractor": extractor.name,
            **{f"seconds_{way}": value for way, value in seconds.items()},
            "images_per_second": args.num_images / seconds["in_memory"],
            "ratio": seconds["through_files"] / seconds["in_memory"], "seconds_per_image": report["seconds_per_image"],
            **machine(device)}


# ---- data ----------------------------------------------------------------------------------------------------


def make_shards(folder, count, shape, shard_size=10000):
    """Synthetic float16 moments in shards with an index, as cache_latents.py writes them."""
    if (folder / latents.INDEX).is_file():
        return
    make_directory(folder)
    shards = []
    for number, first in enumerate(range(0, count, shard_size)):
        size = min(shard_size, count - first)
        file = folder / f"shard-{number:05d}.safetensors"
        write_bytes(save({"moments": torch.randn(size, 2, *shape).half(), "labels": torch.randint(1000, (size,)),
                          "names": torch.zeros(1, dtype=torch.uint8)}), file, sync=False)
        shards.append({"file": file.name, "images": size, "bytes": file.stat().st_size, "sha256": file_hash(file)})
    write_json({"format": latents.FORMAT, "images": count, "classes": [str(i) for i in range(1000)], "variants": 2,
                "latent_scale": [0.2325, 0.0], "shards": shards}, folder / latents.INDEX)


def make_npz(folder, count, shape, classes=1000):
    """Synthetic moments in MAR's layout: float32, with those of the flipped image."""
    done = folder / "done"
    if done.is_file():
        return
    for label in range(min(classes, count)):
        make_directory(folder / f"n{label:08d}")
    moments = np.random.default_rng(0).standard_normal((64, 2, *shape)).astype(np.float32)
    for i in range(count):
        np.savez(folder / f"n{i % classes:08d}" / f"{i:07d}.JPEG.npz", moments=moments[i % 64, 0], moments_flip=moments[i % 64, 1])
    done.touch()


def make_jpegs(folder, count=500, size=(500, 375)):
    """Smooth noise of ImageNet's usual size, about 100 KB each."""
    if folder.is_dir():
        return
    make_directory(folder / "0")
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        grain = rng.integers(-20, 20, (size[1], size[0], 3))
        Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(folder / "0" / f"{i:05d}.jpg", quality=90)


def forget(folder):
    """Drop a folder's files from the page cache; returns their bytes."""
    total = 0
    for path in folder.rglob("*"):
        if path.is_file():
            total += path.stat().st_size
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return total


def loader_rate(dataset, workers, seconds):
    """Images a second after the first batch."""
    loader = build_loader(dataset, 64, train=True, num_workers=workers)
    batches = iter(loader)
    next(batches)
    start, count = time.perf_counter(), 0
    for images, _ in batches:
        count += len(images)
        if time.perf_counter() - start > seconds:
            break
    return count / (time.perf_counter() - start)


@torch.no_grad()
def encoding_rate(args, device):
    """Images a second through the VAE's encoder."""
    resolve_geometry(args)
    vae = AutoencoderKL(embed_dim=args.vae_embed_dim, ch=args.vae_ch, ch_mult=args.vae_ch_mult).to(device).eval()
    images, count, start = torch.randn(4, 3, args.img_size, args.img_size, device=device), 0, time.perf_counter()
    while time.perf_counter() - start < args.seconds:
        vae.encode(images).parameters.sum().item()
        count += len(images)
    return count / (time.perf_counter() - start)


def benchmark_data(args, device):
    scratch = Path(args.scratch)
    resolve_geometry(args)
    side = args.img_size // args.vae_stride
    shape = (2 * args.vae_embed_dim, side, side)
    make_shards(scratch / "shards", args.latents, shape)
    make_npz(scratch / "npz", args.latents, shape)
    make_jpegs(scratch / "jpeg")
    os.sync()  # pages that are not written yet cannot be dropped
    kinds = {"shards": lambda: ShardedMoments(scratch / "shards", train=True),
             "npz": lambda: NpzMoments(scratch / "npz", shape, train=True),
             "jpeg": lambda: Images(scratch / "jpeg", args.img_size, train=True)}
    rows = []
    for kind, open_dataset in kinds.items():
        size = forget(scratch / kind) / len(open_dataset())
        for workers in args.workers:
            forget(scratch / kind)
            cold = loader_rate(open_dataset(), workers, args.seconds)
            warm = loader_rate(open_dataset(), workers, args.seconds)
            rows.append({"kind": kind, "workers": workers, "bytes_per_image": round(size), "cold": cold, "warm": warm})
            print("{kind:7s} {workers} workers  {bytes_per_image:7d} B/image  cold {cold:9.1f}  warm {warm:9.1f} images/s".format(**rows[-1]),
                  flush=True)
    rate = {(row["kind"], row["workers"]): row["warm"] for row in rows}
    return {"latents": args.latents, "rows": rows, "vae_images_per_second": encoding_rate(args, device),
            "ratio_shards_npz": {str(workers): rate["shards", workers] / rate["npz", workers] for workers in args.workers},
            **machine(device)}


def main():
    args = single_point(parse_args())
    device = select_device(args.device)
    args.precision = set_precision(args.precision, device)
    result = {"evaluate": benchmark_evaluate, "data": benchmark_data}[args.what](args, device)
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        Path(args.json).write_text(text + "\n")


if __name__ == "__main__":
    run_main(main)
