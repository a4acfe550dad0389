"""Images, cached latents, and the door to them: open_data."""
from util.data.door import DATASETS, DataSettings, find_data, open_data
from util.data.images import Images, center_crop, random_crop, to_uint8
from util.data.loaders import EpochSampler, build_loader
from util.data.pixels import open_image

__all__ = ["DATASETS", "DataSettings", "EpochSampler", "Images", "build_loader", "center_crop", "find_data",
           "open_data", "open_image", "random_crop", "to_uint8"]
