"""A look at images before hours of work: whether they can be read, and how large they are."""
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from models import FlowARError
from util.data.loaders import default_workers
from util.data.pixels import opened, read_image

SAMPLE = 512  # images looked at when a training starts
THREADS = 16
CHUNK = 256  # images a task of a process


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


def look_at_all(paths, whole):
    return [look_at(path, whole) for path in paths]


def inspect(listing, indices, workers=0, whole=False):
    """Yield (index, Look) of files of a Listing, looked at by so many processes (None: default_workers()), or for 0 by
    threads of this one.
    """
    workers = default_workers() if workers is None else workers
    chunks = np.array_split(indices, max(1, -(-len(indices) // CHUNK)))
    pool = ProcessPoolExecutor(workers) if workers else ThreadPoolExecutor(THREADS)
    with pool:
        paths = ([listing[int(i)][0] for i in chunk] for chunk in chunks)
        for chunk, looks in zip(chunks, pool.map(look_at_all, paths, [whole] * len(chunks))):
            yield from zip(chunk.tolist(), looks)


def sample_advice(listing, img_size):
    """Lines about unreadable or small images among a sample of them, each with what to do."""
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
