"""Statistics of a folder of images for --fid_stats: an .npz with mu and sigma in one feature extractor or several.

In Inception's features also mu_s and sigma_s, for sFID.
With --keep_features also the features, which KID, precision and recall need. Of class folders also how many images each
has: an evaluation warns if its own are of another mix. With --held_out also the distance of those images, for FDr:

    torchrun --standalone --nproc_per_node=8 scripts/reference_stats.py --ref_images imagenet/val --img_size 256 \\
        --output val_stats.npz
    torchrun --standalone --nproc_per_node=8 scripts/reference_stats.py --ref_images imagenet/train --img_size 256 \\
        --held_out imagenet/val --feature_extractor inception,dinov2-vit-l-14,clip-vit-l-14 --output train_stats.npz
"""
from dataclasses import fields
from pathlib import Path

import numpy as np

from models import FlowARError
from models.weights import tensors_hash, writing
from util import cluster
from util.data.tables import Columns
from util.evaluation.extractors import build_extractors
from util.evaluation.metrics import frechet_distance, warn_of_few
from util.evaluation.references import extract_folder, list_reference
from util.files import check_output
from util.command_line import PIXELS, Parser, add_options, as_type, color, path
from util.options import Extractors


def parse_args():
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--ref_images", type=as_type(path), required=True, help="folder of images, with or without class folders")
    add("--held_out", type=as_type(path), help="folder of other real images for FDr, such as the validation set")
    add("--output", type=as_type(path), required=True, help=".npz file to write")
    add("--img_size", type=as_type(PIXELS), help="centre-crop images to this size in pixels; default: no crop")
    add("--background", type=as_type(color), default="white", help="colour behind transparent pixels: white (default), "
        "'#ff8000' or 255,128,0")
    add("--keep_features", action="store_true", help="also store the features, for KID, precision and recall")
    add_options(parser, (*fields(Extractors), *fields(Columns)))
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="device of the feature networks")
    return parser.parse_args()


def save_statistics(path, references, joint, held_out=None):
    """Write the Reference of each part of a Joint, with its features if there are any, to an .npz, see OWN of
    util.evaluation.references. held_out: those of other images, for FDr.
    """
    first = references[0]
    content = {"feature_extractor": joint.name, "num_images": first.images, "img_size": first.img_size,
               "left_out": sum(first.left_out.values())}
    if first.classes:
        content.update(classes=np.array(list(first.classes)), class_counts=np.array(list(first.classes.values())))
    for number, (extractor, reference) in enumerate(zip(joint.parts, references)):
        own = {**reference.statistics, "feature_extractor": extractor.name,
               "weights_sha256": tensors_hash(extractor.network.state_dict()), "resize": extractor.resize}
        if reference.spatial:
            own.update(mu_s=reference.spatial["mu"], sigma_s=reference.spatial["sigma"])
        if reference.features is not None:
            own["features"] = np.asarray(reference.features, dtype=np.float32)
        if held_out:
            other = held_out[number]
            warn_of_few(min(reference.images, other.images), extractor)
            distance = frechet_distance(other.statistics, reference.statistics)
            own["held_out"] = np.array([distance, other.images], dtype=np.float64)
        suffix = extractor.suffix if len(joint.parts) > 1 else ""
        content.update((name + suffix, value) for name, value in own.items())
    with writing(path) as file:
        np.savez(file, **content)


def main():
    args = parse_args()
    device = cluster.init(args.device)
    cluster.set_precision(None, device)  # as an evaluation does, whose features these are compared with
    check_output(args.output)
    if Path(args.output).exists() or not args.output.endswith(".npz"):
        raise FlowARError(f"--output {args.output}: expected a new .npz file")
    with cluster.first_on_host():  # one download
        joint = build_extractors(args.feature_extractor, device)
    listing = cluster.from_main(lambda: list_reference(args.ref_images, args))
    options = dict(crop=args.img_size is not None, background=args.background)
    size, held_out = args.img_size, None
    if args.held_out:  # first: they are fewer
        others = cluster.from_main(lambda: list_reference(args.held_out, args))
        if others.identity() == listing.identity():
            raise FlowARError(f"--held_out {args.held_out}: contains the same images as --ref_images {args.ref_images}")
        held_out = extract_folder(others, joint, device, size, keep=False, **options)
        size = cluster.from_main(lambda: held_out[0].img_size)
    references = extract_folder(listing, joint, device, size, keep=args.keep_features, **options)
    if references is None:
        return
    save_statistics(args.output, references, joint, held_out)
    print(f"{args.output}: {len(listing)} images of {args.ref_images}, {references[0].img_size} pixels, in features of "
          f"{joint.name}")


if __name__ == "__main__":
    cluster.run_main(main)
