"""List every image of a folder that cannot be read, and say what else looks wrong, before hours of work.

    python scripts/check_images.py imagenet/train            # headers; --whole decodes every image
"""
import argparse

import project_root  # noqa: F401  first: it names what is too old

import numpy as np
from tqdm import tqdm

from models import FlowARError
from util.cluster import run_main
from util.data.folders import advice, list_files
from util.data.inspection import inspect, small_advice
from util.data.places import list_images
from util.options import pixels, some_path, workers


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", type=some_path, help="class folders of images, an archive or a dataset, see docs/data.md, or with --flat images at any depth")
    parser.add_argument("--flat", action="store_true", help="no class folders: a folder of reference images")
    parser.add_argument("--whole", action="store_true", help="decode every image, not only its header")
    parser.add_argument("--img_size", type=pixels, default=256, help="pixels a side of training, to name smaller images")
    parser.add_argument("--num_workers", type=workers, help="processes that look; default: the CPUs, at most 10")
    args = parser.parse_args()
    listing = list_images(args.folder) if not args.flat else list_files(args.folder)
    print(f"{args.folder}: {listing.summary()}")
    bad, sides = [], []
    for _, look in tqdm(inspect(listing, np.arange(len(listing)), args.num_workers, args.whole), total=len(listing),
                        unit="img", mininterval=2, leave=False):
        if look.error:
            bad.append(look.error)
            print(look.error, flush=True)
        else:
            sides.append(look.side)
    for line in ([] if args.flat else advice(listing)) + small_advice(sides, args.img_size):
        print(f"warning: {line}")
    if bad:
        raise FlowARError(f"{args.folder}: {len(bad)} of {len(listing)} images cannot be read; they are named above")


if __name__ == "__main__":
    run_main(main)
