"""Distance between two folders of images in an evaluation's features, with the floor to compare it with.

A distance falls as the images become more. So it is given for all images, and for as many as the floor has, which is
the distance of two random halves of one folder: what is left between images of one source.

    python scripts/distance.py samples/images imagenet/val --img_size 256        # two folders
    python scripts/distance.py imagenet/val --img_size 256 --vae_path kl16.ckpt  # a folder and itself through a VAE
    python scripts/distance.py --halves imagenet/val --img_size 256              # the floor alone
"""

from dataclasses import fields

import torch

from models import FlowARError
from models.vaes import find_vae
from util import cluster
from util.data import to_uint8
from util.data.source import open_vae_on
from util.data.tables import Columns
from util.evaluation.extractors import build_extractors
from util.evaluation.metrics import frechet_distance, statistics, warn_of_few
from util.evaluation.references import extract_folder, list_reference
from util.evaluation.sampler import decoded_at_once
from util.command_line import PIXELS, SEED, Parser, add_options, as_type, color, path
from util.options import Extractors

LARGEST_HALF = 50000  # images; more than the distances of the literature have


def parse_args():
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("folders", type=as_type(path), nargs="+", help="one or two folders of images, in class folders or not")
    add("--halves", action="store_true", help="only the floor of one folder: the distance of its halves")
    add("--vae_path", type=as_type(path), help="compare the folder with itself through this VAE")
    add("--img_size", type=as_type(PIXELS), help="centre-crop images to this size in pixels; default: no crop")
    add_options(parser, (*fields(Extractors), *fields(Columns)))
    add("--background", type=as_type(color), default="white", help="colour behind transparent pixels: white (default), "
        "'#ff8000' or 255,128,0")
    add("--seed", type=as_type(SEED), default=0, help="seed of the random halves")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="device of the feature networks")
    args = parser.parse_intermixed_args()  # folders may stand after options
    if len(args.folders) - 1 + args.halves + bool(args.vae_path) > 1:
        raise FlowARError("expected two folders, or one folder and --vae_path, or one folder and --halves")
    return args


def through_vae(vae):
    """A function: images (B, 3, H, W) uint8 -> those encoded (the posterior's mode) and decoded again."""
    @torch.no_grad()
    def reconstruct(images):
        parts = (images.float() / 127.5 - 1).split(decoded_at_once(images[0, 0].numel()))
        return torch.cat([to_uint8(vae.decode(vae.encode(part).mode())) for part in parts])
    return reconstruct


def halves(features, count, seed):
    """Two random sets, without an image in common, of `count` of the features (n, dim)."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    return features[order[:count]], features[order[count:2 * count]]


def main():
    args = parse_args()
    device = cluster.init(args.device)
    cluster.set_precision(None, device)  # as an evaluation does
    with cluster.first_on_host():  # one download
        joint = build_extractors(args.feature_extractor, device)
    passes = [(folder, None) for folder in args.folders]
    if args.vae_path:
        named = find_vae(args.vae_path)
        passes.append((args.folders[0], through_vae(open_vae_on(named, device))))
    measured, crop = [], args.img_size is not None
    for folder, through in passes:
        listing = cluster.from_main(lambda: list_reference(folder, args))
        measured.append(extract_folder(listing, joint, device, args.img_size, crop, through=through,
                                       background=args.background))
    if measured[0] is None:  # rank 0 has them
        return
    sizes = [references[0].img_size for references in measured]
    counts = [references[0].images for references in measured]
    if len(set(sizes)) > 1:
        raise FlowARError(f"{args.folders[0]} has images of {sizes[0]} pixels, {args.folders[1]} of {sizes[1]}: set "
                          "--img_size")
    half = min(LARGEST_HALF, min(counts) // 2)
    for extractor, *references in zip(joint.parts, *measured):
        warn_of_few(half, extractor)
        name, parts = extractor.distance, [halves(reference.features, half, args.seed) for reference in references]
        if len(references) == 2:
            first, second = references
            what = f"{first.name} to {second.name}"
            if passes[1][1]:
                what = f"{first.name} to itself through the VAE {named.name}"
            value = frechet_distance(first.statistics, second.statistics)
            print(f"{name} of {what}: {value:.4f} ({counts[0]} and {counts[1]} images)")
            value = frechet_distance(statistics(parts[0][0]), statistics(parts[1][1]))
            print(f"{name} of {what}: {value:.4f} ({half} and {half} images)")
        for folder, (one, other) in zip(args.folders, parts):
            value = frechet_distance(statistics(one), statistics(other))
            print(f"{name} of two halves of {folder}, the floor: {value:.4f} ({half} and {half} images)")


if __name__ == "__main__":
    cluster.run_main(main)
