"""From an image file to RGB, what a viewer shows, and on to the recipe's crops and tensors in [-1, 1]; and back.

* Transparency, of any kind, lies over a background (white unless --background says otherwise).
* The EXIF orientation is applied; a damaged EXIF block counts as none.
* Grey values of 16 or 32 bits are scaled from the range of their type (0 is black) to 8 bits.
* Floats from 0 to 1 are scaled to 8 bits; others have no agreed range and are refused.
* Of several frames the first is taken. Colour profiles are not applied, as in the loaders of ImageNet.

Everything else is Pillow's convert("RGB"), bit for bit: 8-bit JPEGs and PNGs, CMYK, palettes, LAB.
Training, caches, references and scripts share this file.
"""
import contextlib
import functools
import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageColor, PngImagePlugin, UnidentifiedImageError

from models import FlowARError
from models.errors import first_sentence
from models.weights import LFS

# Of any name; others start programs (Ghostscript). HEIF is pillow-heif's.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "PPM", "TIFF", "JPEG2000", "AVIF", "HEIF")
WHITE = (255, 255, 255)
# Pillow's limits are a web server's: a picture with large texts or profiles, or of 196 megapixels, is no attack here.
Image.MAX_IMAGE_PIXELS = 2**31
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28
ORIENTATION, BITS, PHOTOMETRIC, SAMPLE_FORMAT = 0x0112, 258, 262, 339  # of EXIF; of TIFF
SIGNED, WHITE_IS_ZERO = 2, 0  # values of SAMPLE_FORMAT, PHOTOMETRIC

RESIZE_MARGIN = 1.125  # training images are resized to 288 for crops of 256

TRANSPARENT, TURNED, DEEP, FLOATS = range(4)
CONVERSIONS = ("with transparency over the background", "turned upright", "of deep grey scaled to 8 bits",
               "of floats scaled to 8 bits")
TRANSPOSED = dict(enumerate((Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180,
                             Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270,
                             Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90), start=2))  # by EXIF orientation

EXPANDED = {"L;2": 85, "L;4": 17}  # Pillow expands a PNG's grey of 2 or 4 bits to 8, but not the transparent one


# ---- RGB and tensors ---------------------------------------------------------------------------------------------


def to_tensor(image):
    """RGB image -> float tensor (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255) * 2 - 1


def to_uint8(images):
    """[-1, 1] -> uint8, rounded as the release saves its PNGs: clip((x + 1) / 2 * 255, 0, 255)."""
    return ((images.float() + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8)


def random_crop(image, size, rng):
    """The recipe's training crop: shorter side to size x 1.125, then a random size x size window. The resize is
    torchvision's of a PIL image, bilinear and antialiased.
    """
    side, shorter = int(size * RESIZE_MARGIN), min(image.size)
    image = image.resize([int(side * length / shorter) for length in image.size], Image.Resampling.BILINEAR)
    left = rng.integers(image.width - size + 1)
    top = rng.integers(image.height - size + 1)
    return image.crop((left, top, left + size, top + size))


def center_crop(image, size):
    """ADM's preprocessing, which MAR's cache uses: halve with a box filter while possible, bicubic, centre crop."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = size / min(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


# ---- files and RGB -----------------------------------------------------------------------------------------------


class Pixels(NamedTuple):
    """An image as a viewer shows it."""
    image: Image.Image  # RGB
    conversions: tuple  # which of CONVERSIONS it took, as indices


def parse_color(text):
    """'white', '#ffffff' or '255,255,255' -> (r, g, b); ValueError."""
    color = ImageColor.getrgb(f"rgb({text})" if text[:1].isdecimal() else text)[:3]
    if max(color) > 255:
        raise ValueError(f"{color}: expected values up to 255")
    return color


@functools.cache
def readable_formats():
    with contextlib.suppress(ImportError):
        import pillow_heif
        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_image(file, background=WHITE):
    """RGB image of a file by the rules above, or FlowARError with its name."""
    return read_image(file, background).image


def read_image(file, background=WHITE, name=None):
    """Pixels of an image file by the rules above: its path, its bytes, or an open file. FlowARError with the name (by
    default the path) if it cannot be decoded, OSError if it cannot be read.
    """
    name = name or file
    if isinstance(file, (str, os.PathLike)):
        file = Path(file).read_bytes()  # by a path, Pillow would map a TIFF that is turned, and scramble it
    if isinstance(file, bytes):
        file = io.BytesIO(file)
    try:
        with Image.open(file, formats=readable_formats()) as image:
            return convert(image, background)
    except UnidentifiedImageError:
        file.seek(0)
        reason = "unknown format"
        if file.read(len(LFS)) == LFS:
            reason = "it is a Git LFS pointer: run git lfs install; git lfs pull"
        elif str(name).lower().endswith((".heic", ".heif")):
            reason += ": pip install pillow-heif"
        raise FlowARError(f"{name}: cannot be read as an image ({reason})") from None
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost anything
        raise FlowARError(f"{name}: cannot be read as an image ({first_sentence(error)})") from error


def convert(image, background):
    """Pixels of a Pillow image that was opened and not decoded yet."""
    coding = str(image.tile[0][3]) if image.tile else ""
    frame = image.tile[0][1] if image.format == "GIF" and image.tile else None
    conversions = [TURNED] if orientation(image) in TRANSPOSED else []
    image.load()  # which turns a TIFF
    turn = TRANSPOSED.get(orientation(image))
    if "transparency" in image.info:
        if coding == "RGB;16B":
            raise ValueError("16-bit RGB with a transparent colour, which Pillow does not decode exactly: save it with "
                             "an alpha channel")
        if coding in EXPANDED:
            image.info["transparency"] *= EXPANDED[coding]
    if image.mode == "F" or image.mode == "I" or image.mode.startswith("I;16"):
        conversions.append(FLOATS if image.mode == "F" else DEEP)
        image = scale_grey(image)
    if frame not in (None, (0, 0, *image.size)):  # what a GIF's first frame leaves of its canvas is transparent
        canvas = Image.new("RGBA", image.size)
        canvas.paste(image.convert("RGBA").crop(frame), frame)
        image = canvas
    image, shows = over(image, background)
    if shows:
        conversions.append(TRANSPARENT)
    if turn is not None:
        image = image.transpose(turn)
    return Pixels(image, tuple(conversions))


def orientation(image):
    """Its EXIF orientation, 1 to 8, or None."""
    try:
        value = image.getexif().get(ORIENTATION)
    except Exception:  # a damaged block makes Pillow raise almost anything
        return None
    return value if isinstance(value, int) else None


def over(image, background):
    """(RGB image, over a colour where it is transparent; whether any of that shows)."""
    if not image.has_transparency_data:
        return image.convert("RGB"), False
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=alpha)
    return canvas, alpha.getextrema()[0] < 255


def scale_grey(image):
    """8-bit grey image, or LA where one value is transparent, of one of 16 or 32 bits, from 0 to the largest number of
    its type, or of floats from 0 to 1.
    """
    tags, values, transparent = getattr(image, "tag_v2", {}), np.asarray(image), None
    if image.mode == "F":
        top = 1
        if not (values.min() >= 0 and values.max() <= 1):  # not a number fails too
            raise ValueError(f"float values from {values.min():g} to {values.max():g}: expected 0 to 1; rescale them, "
                             "or save with 8 or 16 bits")
    else:
        bits = tags.get(BITS, (16,))[0]  # PNG's and PGM's are of 16
        signed = tags.get(SAMPLE_FORMAT, (1,))[0] == SIGNED
        top, transparent = 2 ** (bits - signed) - 1, image.info.get("transparency")
        if bits == 32 and not signed:
            values = values.view(np.uint32)
        if values.min() < 0:
            raise ValueError(f"negative grey values, down to {values.min()}: save it with values of at least 0")
    shares = values / top
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        shares = 1 - shares
    grey = Image.fromarray(np.round(shares * 255).astype(np.uint8))
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey
