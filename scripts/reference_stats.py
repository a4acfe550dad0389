"""Statistics of a folder of images for --fid_stats: mu and sigma of a feature extractor, in one .npz.

    torchrun --nproc_per_node=8 scripts/reference_stats.py --ref_images imagenet/val --output val_stats.npz
"""
import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models.weights import writing  # noqa: E402
from util import distributed, metrics  # noqa: E402


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--ref_images", required=True, help="folder of images, searched recursively")
    parser.add_argument("--output", required=True, help=".npz to write")
    parser.add_argument("--feature_extractor", default="inception", choices=metrics.EXTRACTORS, help="network")
    parser.add_argument("--fid_weights", help="local file of torch-fidelity's Inception weights")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    return parser.parse_args()


def main():
    args = parse_args()
    device = distributed.init(args.device)
    extractor = metrics.build_extractor(args, device)
    stats = metrics.folder_statistics(args.ref_images, extractor, device)
    if stats is None:
        return
    with writing(args.output) as file:
        np.savez(file, **stats, feature_extractor=extractor.name)
    print(f"{args.output}: mu and sigma of {args.ref_images} in {extractor.name} features")


if __name__ == "__main__":
    distributed.run_main(main)
