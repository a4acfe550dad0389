"""Statistics of a folder of images for --fid_stats: mu and sigma in a feature extractor, in one .npz that says what it is.

With --keep_features also the features, which KID, precision and recall need. Of class folders also how many images each
has: an evaluation says if its own are of another mix.

    torchrun --standalone --nproc_per_node=8 scripts/reference_stats.py --ref_images imagenet/val --img_size 256 --output val_stats.npz
"""
import argparse
from pathlib import Path

import project_root  # noqa: F401  first: it names what is too old

import numpy as np

from models import FlowARError
from models.files import tensors_hash, writing
from util import cluster
from util.evaluation.metrics import EXTRACTORS, build_extractor
from util.evaluation.references import folder_features
from util.files import check_output
from util.options import color, pixels, some_path


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--ref_images", type=some_path, required=True, help="folder of images, searched recursively")
    parser.add_argument("--output", type=some_path, required=True, help=".npz to write")
    parser.add_argument("--img_size", type=pixels, help="centre-crop the images to this size; default: as they are")
    parser.add_argument("--background", type=color, default="white", help="under transparent pixels: white, '#ff8000' or 255,128,0")
    parser.add_argument("--keep_features", action="store_true", help="store the features too")
    parser.add_argument("--feature_extractor", default="inception", choices=EXTRACTORS, help="network")
    parser.add_argument("--fid_weights", help="local file of torch-fidelity's Inception weights")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    return parser.parse_args()


def save_statistics(path, found, extractor):
    """Write FolderFeatures, mu, sigma and features if they were kept, with their description to an .npz."""
    content = {**found.statistics, "feature_extractor": extractor.name,
               "weights_sha256": tensors_hash(extractor.network.state_dict()), "resize": extractor.resize,
               "num_images": found.count, "img_size": found.img_size, "left_out": sum(found.listing.left_out.values())}
    if found.classes:
        content.update(classes=np.array(list(found.classes)), class_counts=np.array(list(found.classes.values())))
    if found.features is not None:
        content["features"] = np.asarray(found.features, dtype=np.float32)
    with writing(path) as file:
        np.savez(file, **content)


def main():
    args = parse_args()
    device = cluster.init(args.device)
    check_output(args.output)
    if Path(args.output).exists() or not args.output.endswith(".npz"):
        raise FlowARError(f"--output {args.output}: expected the name of an .npz file that is not there yet")
    extractor = build_extractor(args.feature_extractor, args.fid_weights, device)
    found = folder_features(args.ref_images, extractor, device, args.img_size, crop=True, keep=args.keep_features,
                            background=args.background)
    if found is not None:
        save_statistics(args.output, found, extractor)
        print(f"{args.output}: {found.count} images of {args.ref_images}, {found.img_size} pixels, in {extractor.name} features")


if __name__ == "__main__":
    cluster.run_main(main)
