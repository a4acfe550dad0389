"""Lay out real images as an ImageFolder of 32x32 RGB: <output>/{train,val}/<class>/<number>.png.

Of Fashion-MNIST, the first --train and --val images of each class (of 6,000 and 1,000): from Debian's package
dataset-fashion-mnist where it is installed, else by torchvision's download.

    python scripts/quickstart_data.py --output output/quickstart/images
"""
import argparse
import gzip
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from models import FlowARError
from util.cluster import run_main
from util.command_line import POSITIVE, as_type, path

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
GARMENTS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
SPLITS = {"train": "train", "val": "t10k"}  # names of its files


def read_idx(path):
    """Array of a gzipped IDX file: magic (two zeros, type 8, dimensions), big-endian sizes, bytes."""
    data = gzip.open(path).read()
    dimensions = data[3]
    shape = np.frombuffer(data, ">i4", dimensions, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def write_images(folder, images, labels, limit):
    """The first `limit` images of each class, padded from 28 to 32 pixels; returns how many there are."""
    written = [0] * len(GARMENTS)
    for label, name in enumerate(GARMENTS):
        (folder / f"{label}_{name}").mkdir(parents=True)
    for i, (image, label) in enumerate(zip(images, labels)):
        if written[label] < limit:
            image = Image.fromarray(np.pad(image, 2)).convert("RGB")
            image.save(folder / f"{label}_{GARMENTS[label]}" / f"{i:05d}.png", compress_level=1)
            written[label] += 1
    return sum(written)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=as_type(path), required=True, help="folder to create")
    parser.add_argument("--train", type=as_type(POSITIVE), default=1000, help="training images per class")
    parser.add_argument("--val", type=as_type(POSITIVE), default=200, help="test images per class")
    args = parser.parse_args()
    output = Path(args.output)
    if output.is_dir():
        counts = [sum(1 for _ in (output / split).glob("*/*.png")) for split in SPLITS]
        if counts != [len(GARMENTS) * args.train, len(GARMENTS) * args.val]:
            raise FlowARError(f"{output}: {counts[0]} training and {counts[1]} test images, expected "
                              f"{len(GARMENTS) * args.train} and {len(GARMENTS) * args.val}: move or remove the folder")
        print(f"{counts[0]} training and {counts[1]} test images are already in {output}")
        return
    temporary, folder = output.with_name(output.name + ".tmp"), DEBIAN
    shutil.rmtree(temporary, ignore_errors=True)
    if not DEBIAN.is_dir():
        from torchvision.datasets import FashionMNIST
        try:
            folder = Path(FashionMNIST(output.parent / "download", download=True).raw_folder)
        except RuntimeError as error:
            raise FlowARError(f"{error}: without network access, install Debian's package dataset-fashion-mnist, or "
                              "copy Fashion-MNIST's four files into "
                              f"{output.parent}/download/FashionMNIST/raw") from error
    counts = []
    for split, name in SPLITS.items():
        images, labels = (read_idx(folder / f"{name}-{what}-ubyte.gz") for what in ("images-idx3", "labels-idx1"))
        counts.append(write_images(temporary / split, images, labels, getattr(args, split)))
    temporary.rename(output)
    print(f"Fashion-MNIST: {counts[0]} training and {counts[1]} test images in {output}")


if __name__ == "__main__":
    run_main(main)
