"""Statistics of a folder of images for --fid_stats: mu and sigma in a feature extractor, in one .npz that says what it is.

With --keep_features also the features, which KID, precision and recall need.

    torchrun --nproc_per_node=8 scripts/reference_stats.py --ref_images imagenet/val --img_size 256 --output val_stats.npz
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from util.files import check_output  # noqa: E402
from util import distributed, metrics  # noqa: E402
from util.options import pixels, some_path  # noqa: E402


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--ref_images", type=some_path, required=True, help="folder of images, searched recursively")
    parser.add_argument("--output", type=some_path, required=True, help=".npz to write")
    parser.add_argument("--img_size", type=pixels, help="centre-crop the images to this size; default: as they are")
    parser.add_argument("--keep_features", action="store_true", help="store the features too")
    parser.add_argument("--feature_extractor", default="inception", choices=metrics.EXTRACTORS, help="network")
    parser.add_argument("--fid_weights", help="local file of torch-fidelity's Inception weights")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    return parser.parse_args()


def main():
    args = parse_args()
    device = distributed.init(args.device)
    check_output(args.output)
    extractor = metrics.build_extractor(args, device)
    found = metrics.folder_features(args.ref_images, extractor, device, args.img_size, crop=True,
                                    keep=args.keep_features)
    if found is not None:
        metrics.save_statistics(args.output, found, extractor)
        print(f"{args.output}: {found.count} images of {args.ref_images}, {found.img_size} pixels, in {extractor.name} features")


if __name__ == "__main__":
    distributed.run_main(main)
