"""Images and cached latents."""
from util.data.images import Images, find_split, list_images
from util.data.loaders import EpochSampler, build_loader
from util.data.pixels import center_crop, open_image, random_crop, to_tensor, to_uint8

__all__ = ["EpochSampler", "Images", "build_loader", "center_crop", "find_split", "list_images", "open_image",
           "random_crop", "to_tensor", "to_uint8"]
