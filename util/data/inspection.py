"""A look at images before hours of work: whether they can be read, and how large they are."""
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from models import FlowARError
from util.data.loaders import Loader
from util.data.pixels import opened, read_image

SAMPLE = 512  # images looked at when a training starts
BATCH = 64  # images that a process looks at before it tells


class Look(NamedTuple):
    """What a look at an image file gave."""
    error: str | None  # why it cannot be read
    side: int = 0  # the shorter one, in pixels


def look_at(path, whole=False):
    """Look of a file's header, or with whole=True of all of it."""
    try:
        if whole:
            return Look(None, min(read_image(path).image.size))
        with opened(path) as image:
            return Look(None, min(image.size))
    except FlowARError as error:
        return Look(str(error))


class Looks(Dataset):
    """Item i: (index, Look) of the i-th of some files of a Listing."""

    def __init__(self, listing, indices, whole):
        self.listing, self.indices, self.whole = listing, indices, whole

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        index = int(self.indices[i])
        return index, look_at(self.listing[index][0], self.whole)


def inspect(listing, indices, workers=0, whole=False):
    """Yield (index, Look) of files of a Listing, looked at by so many processes, see Loader."""
    for batch in Loader(Looks(listing, indices, whole), batch_size=BATCH, num_workers=workers, collate_fn=list):
        yield from batch


def sample_advice(listing, img_size=0):
    """Lines about unreadable images, or those smaller than img_size, among a sample of them, each with what to do."""
    indices = np.unique(np.linspace(0, len(listing) - 1, SAMPLE).astype(int))
    looks = [look for _, look in inspect(listing, indices)]
    bad, sides = [look.error for look in looks if look.error], [look.side for look in looks if not look.error]
    lines = []
    if bad:
        lines.append(f"{len(bad)} of {len(looks)} images looked at cannot be read, such as {bad[0]}; all of them: "
                     f"python scripts/check_images.py {listing.root}")
    return lines + small_advice(sides, img_size)


def small_advice(sides, img_size):
    """A line where images of these shorter sides are smaller than img_size."""
    small = [side for side in sides if side < img_size]
    if not small:
        return []
    return [f"{len(small)} of {len(sides)} images looked at are smaller than --img_size {img_size} (shorter side "
            f"{min(small)} to {max(small)} pixels, median of all {int(np.median(sides))}): they will be enlarged and "
            "the model learns their blur; use larger images or a smaller --img_size"]
