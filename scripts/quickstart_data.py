"""Lay out real images as an ImageFolder of 32x32 RGB: <output>/{train,val}/<class>/<number>.png.

Of Fashion-MNIST, the first 2,000 training and 200 test images of each class.
Fashion-MNIST from Debian's package dataset-fashion-mnist where it is installed, else by torchvision's download, else
scikit-learn's digits, which come with the package.

    python scripts/quickstart_data.py --output output/quickstart/images
"""
import argparse
import gzip
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
GARMENTS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
SIZE = 32
LIMITS = {"train": 2000, "val": 200}  # images of a class: what 15 minutes on two cores can use


def read_idx(path):
    """Array of a gzipped IDX file: magic (two zeros, type 8, dimensions), big-endian sizes, bytes."""
    data = gzip.open(path).read()
    dimensions = data[3]
    shape = np.frombuffer(data, ">i4", dimensions, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def fashion_mnist_debian():
    return {split: (read_idx(DEBIAN / f"{name}-images-idx3-ubyte.gz"), read_idx(DEBIAN / f"{name}-labels-idx1-ubyte.gz"))
            for split, name in (("train", "train"), ("val", "t10k"))}


def fashion_mnist_download(folder):
    from torchvision.datasets import FashionMNIST

    parts = {split: FashionMNIST(folder, train=split == "train", download=True) for split in ("train", "val")}
    return {split: (part.data.numpy(), part.targets.numpy()) for split, part in parts.items()}


def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images * (255 / 16)).astype(np.uint8)
    held_out = np.arange(len(images)) % 5 == 0
    return {"train": (images[~held_out], data.target[~held_out]), "val": (images[held_out], data.target[held_out])}


def load_images(folder):
    """(name, class names, {split: (images (N, h, w) uint8, labels (N,))}) of the first source there is."""
    if DEBIAN.is_dir():
        return "Fashion-MNIST (Debian package)", GARMENTS, fashion_mnist_debian()
    try:
        return "Fashion-MNIST (downloaded)", GARMENTS, fashion_mnist_download(folder)
    except (OSError, RuntimeError) as error:
        print(f"Fashion-MNIST cannot be downloaded ({str(error).splitlines()[0]}): taking scikit-learn's digits")
        return "digits (scikit-learn)", tuple(map(str, range(10))), digits()


def to_rgb(image):
    """28x28 garments are padded to 32x32, which keeps them sharp; other sizes are resized."""
    if image.shape == (28, 28):
        return Image.fromarray(np.pad(image, 2)).convert("RGB")
    return Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")


def write_images(folder, classes, images, labels, limit):
    """The first `limit` images of each class; returns how many there are."""
    written = [0] * len(classes)
    for label, name in enumerate(classes):
        (folder / f"{label}_{name}").mkdir(parents=True)
    for i, (image, label) in enumerate(zip(images, labels)):
        if written[label] < limit:
            to_rgb(image).save(folder / f"{label}_{classes[label]}" / f"{i:05d}.png", compress_level=1)
            written[label] += 1
    return sum(written)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    output = parser.parse_args().output
    if output.is_dir():
        print(f"{output} is there already")
        return
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    name, classes, splits = load_images(output.parent / "download")
    counts = {split: write_images(temporary / split, classes, *arrays, LIMITS[split]) for split, arrays in splits.items()}
    temporary.rename(output)
    print(f"{name}: {counts['train']} training and {counts['val']} test images in {output}")


if __name__ == "__main__":
    main()
