"""Measure this code on this machine. Every run times the plain way beside the fast one and prints the ratio.

    python scripts/benchmark.py evaluate --model flowar_small --num_images 1000 --eval_bsz 100 --device cuda

`evaluate`: sampling, decoding and features of N images in memory, against writing PNGs one by one and reading them again
for the features, as the release does. Weights are random: time does not depend on them.
"""
import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine_flowar import evaluate, generate, image_label, machine  # noqa: E402
from models import AutoencoderKL, build_model  # noqa: E402
from util import metrics  # noqa: E402
from util.distributed import run_main, select_device, set_precision  # noqa: E402
from util.evaluation import single_point  # noqa: E402
from util.options import evaluation_parser, integer_list, model_options, positive, resolve_geometry  # noqa: E402


def parse_args():
    parser = evaluation_parser()
    parser.description = __doc__.splitlines()[0]
    parser.add_argument("what", choices=("evaluate",), help="what to measure")
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


def main():
    args = single_point(parse_args())
    device = select_device(args.device)
    args.precision = set_precision(args.precision, device)
    result = benchmark_evaluate(args, device)
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        Path(args.json).write_text(text + "\n")


if __name__ == "__main__":
    run_main(main)
