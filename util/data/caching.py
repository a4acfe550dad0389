"""What the data workers of scripts/cache_latents.py make: here, as they may be started without that script."""
import hashlib
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from models import FlowARError
from util.cluster import is_shortage
from util.data.folders import open_file
from util.data.latents import DIGEST_BYTES


class Row(NamedTuple):
    """What a shard holds of an image beside its moments."""
    index: int
    label: int
    converted: int  # bits: which of CONVERSIONS were made
    digest: bytes  # of its file


class Crops(Dataset):
    """Item i: (all crops of image i (crops, 3, size, size), what goes with them), or the error of an unreadable image.
    What goes with them: Row.
    """

    def __init__(self, images, crops, skip):
        self.images, self.crops, self.skip = images, crops, skip
        if skip:
            images.way_on = ""  # in what the cache remembers of them

    def __getitem__(self, index):
        try:
            pixels, label = self.images.load(index)
            crops = [self.images.crop(pixels.image, (crop, index)) for crop in range(self.crops)]
            converted = sum(1 << number for number in pixels.conversions)
            return torch.stack(crops), Row(index, label, converted, digest(self.images.folder[index][0]))
        except FlowARError as error:
            if not self.skip or is_shortage(error):
                raise
            return str(error)


def digest(path):
    with open_file(path) as file:
        return hashlib.blake2b(file.read(), digest_size=DIGEST_BYTES).digest()
