"""From an image file to RGB: what a viewer shows, for training, caches, references and scripts alike.

* Transparency, of any kind, lies over a background (white unless --background says otherwise).
* The EXIF orientation is applied; a damaged EXIF block counts as none.
* Grey values of 16 or 32 bits are scaled from the range of their type (0 is black) to 8 bits.
* Floats from 0 to 1 are scaled to 8 bits; others have no agreed range and are refused.
* Of several frames the first is taken. Colour profiles are not applied, as in the loaders of ImageNet.

Everything else is Pillow's convert("RGB"), bit for bit: 8-bit JPEGs and PNGs, CMYK, palettes, LAB.
"""
import contextlib
import functools
import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, UnidentifiedImageError

from models import FlowARError
from models.errors import first_sentence

# Of any name; others start programs (Ghostscript). HEIF is pillow-heif's.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "PPM", "TIFF", "JPEG2000", "AVIF", "HEIF")
WHITE = (255, 255, 255)
ORIENTATION, BITS, PHOTOMETRIC, SAMPLE_FORMAT = 0x0112, 258, 262, 339  # of EXIF; of TIFF
SIGNED, WHITE_IS_ZERO = 2, 0  # values of SAMPLE_FORMAT, PHOTOMETRIC

TRANSPARENT, TURNED, DEEP, FLOATS = range(4)
CONVERSIONS = ("with transparency over the background", "turned upright", "of deep grey scaled to 8 bits",
               "of floats scaled to 8 bits")
TRANSPOSED = dict(enumerate((Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180,
                             Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270,
                             Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90), start=2))  # by EXIF orientation

EXPANDED = {"L;2": 85, "L;4": 17}  # Pillow expands a PNG's grey of 2 or 4 bits to 8, but not the transparent one


class Pixels(NamedTuple):
    """An image as a viewer shows it."""
    image: Image.Image  # RGB
    conversions: tuple  # which of CONVERSIONS it took, as indices


def describe_conversions(images, counts):
    """'of 900 images read: 62 with transparency ..., 14 turned upright', '' if nothing was converted. counts: how many
    images took each of CONVERSIONS, by its index.
    """
    parts = [f"{counts[number]:,} {how}" for number, how in enumerate(CONVERSIONS) if counts[number]]
    return f"of {images:,} images read: {', '.join(parts)}" if parts else ""


def parse_color(text):
    """'white', '#ffffff' or '255,255,255' -> (r, g, b); ValueError."""
    color = ImageColor.getrgb(f"rgb({text})" if text[:1].isdecimal() else text)[:3]
    if max(color) > 255:
        raise ValueError(f"{color} is beyond 255")
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
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=readable_formats()) as image:
            return convert(image, background)
    except UnidentifiedImageError:
        hint = ": pip install pillow-heif" if str(name).lower().endswith((".heic", ".heif")) else ""
        raise FlowARError(f"{name}: cannot be read as an image (it is of no known format{hint})") from None
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost anything
        raise FlowARError(f"{name}: cannot be read as an image ({first_sentence(error)})") from error


def convert(image, background):
    """Pixels of a Pillow image that was opened and not decoded yet."""
    raw, exif = str(image.tile[0][3]) if image.tile else "", orientation(image)
    box = image.tile[0][1] if image.format == "GIF" and image.tile else None
    image.load()  # which turns a TIFF
    if "transparency" in image.info:
        if raw == "RGB;16B":
            raise ValueError("colours of 16 bits, one of which is transparent: Pillow decodes 8 of them, which do not "
                             "tell it; save it with an alpha channel")
        if raw in EXPANDED:
            image.info["transparency"] *= EXPANDED[raw]
    conversions, turn = [TURNED] if exif in TRANSPOSED else [], TRANSPOSED.get(orientation(image))
    if image.mode == "I" or image.mode.startswith("I;16"):
        conversions.append(DEEP)
        image = scale_integers(image)
    elif image.mode == "F":
        conversions.append(FLOATS)
        image = scale_floats(image)
    if box not in (None, (0, 0, *image.size)):
        image = on_canvas(image, box)
    image, shows = over(image, background)
    conversions += [TRANSPARENT] * shows
    return Pixels(image if turn is None else image.transpose(turn), tuple(conversions))


def orientation(image):
    """Its EXIF orientation, 1 to 8, or None."""
    try:
        value = image.getexif().get(ORIENTATION)
        return value if isinstance(value, int) else None
    except Exception:  # a damaged block makes Pillow raise almost anything
        return None


def on_canvas(image, box):
    """RGBA image that is transparent outside of the box: what a GIF's first frame leaves of its canvas."""
    canvas = Image.new("RGBA", image.size)
    canvas.paste(image.convert("RGBA").crop(box), box)
    return canvas


def over(image, background):
    """(RGB image, over a colour where it is transparent; whether any of that shows)."""
    if not image.has_transparency_data:
        return image.convert("RGB"), False
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    alpha = image.getchannel("A")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=alpha)
    return canvas, alpha.getextrema()[0] < 255


def scale_integers(image):
    """8-bit grey image of one of 16 or 32 bits: 0 is black, the largest number of its type white."""
    tags, values = getattr(image, "tag_v2", {}), np.asarray(image)
    bits = tags.get(BITS, (16,))[0]  # PNG's and PGM's are of 16
    signed = tags.get(SAMPLE_FORMAT, (1,))[0] == SIGNED
    if bits == 32 and not signed:
        values = values.view(np.uint32)
    if values.min() < 0:
        raise ValueError(f"negative grey values, down to {values.min()}: save it with values from 0 on")
    top = 2 ** (bits - signed) - 1
    return grey(values / top, tags, transparent=None if (t := image.info.get("transparency")) is None else values == t)


def scale_floats(image):
    """8-bit grey image of one of floats from 0 to 1."""
    values = np.asarray(image)
    if not (values.min() >= 0 and values.max() <= 1):  # not a number fails too
        raise ValueError(f"floats from {values.min():g} to {values.max():g}, expected 0 to 1: their range is known "
                         "to you alone, so divide by it, or save 8 or 16 bits")
    return grey(values, getattr(image, "tag_v2", {}))


def grey(values, tags, transparent=None):
    """L image, or LA where some pixels are transparent, of values in 0..1."""
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = 1 - values
    image = Image.fromarray(np.round(values * 255).astype(np.uint8))
    if transparent is not None:
        image.putalpha(Image.fromarray(np.where(transparent, 0, 255).astype(np.uint8)))
    return image
