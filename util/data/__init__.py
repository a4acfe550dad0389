"""Images and cached latents."""
from util.data.images import Images, center_crop, find_split, list_images, random_crop, to_tensor, to_uint8
from util.data.loaders import EpochSampler, build_loader
from util.data.pixels import open_image

__all__ = ["EpochSampler", "Images", "build_loader", "center_crop", "find_split", "list_images", "open_image",
           "random_crop", "to_tensor", "to_uint8"]
