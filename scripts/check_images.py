"""List the unreadable images of a folder and other likely mistakes, before hours of training.

    python scripts/check_images.py imagenet/train            # or an archive, a dataset, a folder of reference images
"""
from dataclasses import fields

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from models import FlowARError
from models.errors import name_some
from util.cluster import run_main
from util.data import list_images
from util.data.loaders import with_workers
from util.data.pixels import read_image
from util.data.tables import Columns
from util.command_line import PIXELS, WORKERS, Parser, add_options, as_type, path

BATCH = 64


class Sides(Dataset):
    """Item i: (shorter side of image i in pixels, None), or (None, the error) if it cannot be read."""

    def __init__(self, listing):
        self.listing = listing

    def __len__(self):
        return len(self.listing)

    def __getitem__(self, index):
        try:
            return min(read_image(self.listing.read(index), name=self.listing.path(index)).image.size), None
        except FlowARError as error:
            return None, str(error)


def advice(listing, sides, img_size):
    """Lines on what may be a mistake, each with what to do."""
    classes, counts = listing.classes, listing.counts
    if empty := [name for name, count in zip(classes, counts) if not count]:
        yield (f"{len(empty)} of {len(classes)} class folders contain no images ({name_some(empty, 3)}), but count as "
               "classes")
    if len(classes) == 1:
        yield f"one class folder, {classes[0]}: every image gets the same label"
    if not listing.labels_from:
        direct = np.bincount(listing.labels[listing.depths == 1], minlength=len(classes))
        nested = [name for name, count, images in zip(classes, counts, direct) if count and not images]
        if nested:
            yield (f"{len(nested)} of {len(classes)} class folders contain only folders ({name_some(nested, 3)}): if "
                   "those are the classes, move them up")
    if all(name.isdecimal() for name in classes) and classes != sorted(classes, key=int):
        yield "class names are numbers but sorted as text (10 before 2): use leading zeros"
    if small := [side for side in sides if side < img_size]:
        yield (f"{len(small)} of {len(sides)} images are smaller than --img_size {img_size} (shorter side: minimum "
               f"{min(small)} pixels, median of all {int(np.median(sides))}): they are enlarged, and the model learns "
               "the blur")


def main():
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", type=as_type(path), help="folder, archive or dataset, with or without classes (see docs/data.md)")
    add("--img_size", type=as_type(PIXELS), default=256, help="training image size in pixels: smaller images are "
        "counted")
    add("--num_workers", type=as_type(WORKERS), help="reading processes; default: number of CPUs, at most 10")
    add_options(parser, fields(Columns))
    args = parser.parse_args()
    listing = list_images(args.folder, flat=True, columns=args)
    print(f"{args.folder}: {listing.summary()}")
    if listing.classes or listing.left_out[".cls"]:
        listing.check_classes()
    loader = with_workers(Sides(listing), args.num_workers, batch_size=BATCH, collate_fn=list)
    bad, sides = 0, []
    with tqdm(total=len(listing), unit="img", mininterval=2, leave=False) as progress:
        for batch in loader:
            progress.update(len(batch))
            for side, error in batch:
                if error is None:
                    sides.append(side)
                else:
                    bad += 1
                    print(error, flush=True)
    for line in advice(listing, sides, args.img_size):
        print(f"warning: {line}")
    if bad:
        raise FlowARError(f"{args.folder}: {bad} of {len(listing)} images cannot be read (listed above)")


if __name__ == "__main__":
    run_main(main)
