"""From a file to RGB: what a viewer shows, whatever the mode; what ImageNet's files give is Pillow's convert("RGB"), bit for bit."""
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin

from models import FlowARError
from util.data import Images, open_image
from util.data.pixels import DEEP, FLOATS, TRANSPARENT, TURNED, read_image

INK, PAPER, HIDDEN = (10, 20, 30), (255, 255, 255), (255, 0, 255)


def drawing(mode="RGBA"):
    """A dark square on a hidden colour: 8x8, the square in its middle half."""
    pixels = np.full((8, 8, 4), (*HIDDEN, 0), np.uint8)
    pixels[2:6, 2:6] = (*INK, 255)
    return Image.fromarray(pixels).convert(mode)


def palette_drawing():
    image = Image.new("P", (8, 8), 0)
    image.putpalette([*HIDDEN, *INK] + [0] * 762)
    image.paste(1, (2, 2, 6, 6))
    return image


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def palette_alpha():
    return saved(palette_drawing(), "PNG", transparency=bytes([0, 255]))


def rgb_key():
    image = Image.new("RGB", (8, 8), HIDDEN)
    image.paste(INK, (2, 2, 6, 6))
    return saved(image, "PNG", transparency=HIDDEN)


def grey_key():
    image = Image.new("L", (8, 8), 200)
    image.paste(18, (2, 2, 6, 6))
    return saved(image, "PNG", transparency=200)


def grey_key_of(bits):
    """A PNG of 2, 4 or 16 bits of grey, of which 2 is transparent and 0 the ink: Pillow writes none."""
    values = np.full((8, 8), 2)
    values[2:6, 2:6] = 0
    return png_of(bits, 0, [int("".join(f"{value:0{bits}b}" for value in row), 2).to_bytes(bits) for row in values], b"\0\2")


def png_of(bits, color, rows, transparent):
    """An 8x8 PNG of rows of bytes; one row stands for all."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    rows = [rows] * 8 if isinstance(rows, bytes) else rows
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, bits, color, 0, 0, 0)) + chunk(b"tRNS", transparent)
                      + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))) + chunk(b"IEND", b""))


def two_frames():
    first = palette_drawing()
    return saved(first, "GIF", save_all=True, append_images=[Image.new("P", (8, 8), 1)], transparency=0, disposal=2)


TRANSPARENCY = {
    "RGBA PNG": lambda: saved(drawing(), "PNG"), "LA PNG": lambda: saved(drawing("LA"), "PNG"), "RGBA TIFF": lambda: saved(drawing(), "TIFF"),
    "RGBA WebP": lambda: saved(drawing(), "WEBP", lossless=True, exact=True), "palette, one colour": lambda: saved(palette_drawing(), "PNG", transparency=0),
    "palette, alpha": palette_alpha, "RGB with a transparent colour": rgb_key, "L with a transparent grey": grey_key,
    "16 bits of grey with a transparent one": lambda: grey_key_of(16), "GIF": lambda: saved(palette_drawing(), "GIF", transparency=0), "GIF of two frames": two_frames,
    "2 bits of grey": lambda: grey_key_of(2), "4 bits of grey": lambda: grey_key_of(4),
    "APNG": lambda: saved(drawing(), "PNG", save_all=True, append_images=[Image.new("RGBA", (8, 8), (0, 255, 0, 255))]),
}


@pytest.mark.parametrize("kind", TRANSPARENCY)
def test_transparency_lies_over_the_background(kind):
    image, conversions = read_image(TRANSPARENCY[kind]())
    pixels = np.asarray(image)
    assert TRANSPARENT in conversions and image.mode == "RGB"
    assert (pixels[0, 0] == PAPER).all() and pixels[4, 4].max() <= 30
    assert (np.asarray(open_image(TRANSPARENCY[kind](), background=(0, 128, 255)))[0, 0] == (0, 128, 255)).all()


def test_half_transparent_pixels_mix():
    pixels = np.asarray(open_image(saved(Image.new("RGBA", (4, 4), (0, 0, 0, 51)), "PNG")))
    assert (pixels == 204).all()


def test_alpha_that_hides_nothing_changes_nothing():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    image, conversions = read_image(saved(Image.fromarray(pixels), "PNG"))
    assert not conversions and (np.asarray(image) == pixels[..., :3]).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(kind, orientation):
    upright = np.zeros((24, 40, 3), np.uint8)
    upright[:12, :20], upright[12:, 20:] = (255, 0, 0), (0, 0, 255)
    turns = [None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE,
             Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_270]  # the other way round
    stored, exif = Image.fromarray(upright), Image.Exif()
    if orientation > 1:
        stored = stored.transpose(turns[orientation - 1])
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    image, conversions = read_image(saved(stored, kind, exif=exif, **options))
    assert np.abs(np.asarray(image).astype(int) - upright).max() < 12
    assert conversions == ((TURNED,) if orientation > 1 else ())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_a_turned_tiff_is_the_same_whether_it_is_compressed(tmp_path, mode):
    """Pillow maps the file of one that is not, by its name, with the sides of one that is not turned."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 32, 4), dtype=np.uint8))
    noise = Image.fromarray(np.asarray(noise.convert("L")).astype(np.uint16) * 200) if mode == "I;16" else noise.convert("RGB").convert(mode)
    for orientation in range(1, 9):
        for name, compression in (("raw.tif", None), ("packed.tif", "tiff_lzw")):
            noise.save(tmp_path / name, tiffinfo={274: orientation}, compression=compression)
        found, expected = (np.asarray(open_image(tmp_path / name)) for name in ("raw.tif", "packed.tif"))
        assert found.shape == ((32, 16, 3) if orientation > 4 else (16, 32, 3)) and np.array_equal(found, expected), orientation


def test_what_a_gifs_first_frame_leaves_of_its_canvas_is_transparent(tmp_path):
    for transparent in (False, True):
        frame = saved(palette_drawing(), "GIF", **({"transparency": 0} if transparent else {})).getvalue()
        at = frame.index(b",\0\0\0\0\x08\0\x08\0")
        canvas = frame[:6] + struct.pack("<HH", 20, 12) + frame[10:at + 1] + struct.pack("<HH", 10, 3) + frame[at + 5:]
        image, conversions = read_image(io.BytesIO(canvas), background=(0, 128, 255))
        pixels = np.asarray(image)
        assert pixels.shape == (12, 20, 3) and TRANSPARENT in conversions
        assert (pixels[0, 0] == (0, 128, 255)).all() and (pixels[7, 14] == INK).all()
        assert (pixels[3, 10] == ((0, 128, 255) if transparent else HIDDEN)).all()


def test_a_damaged_exif_block_is_none():
    assert open_image(saved(Image.new("RGB", (8, 8), INK), "JPEG", exif=b"Exif\0\0garbage" * 3)).size == (8, 8)


def tiff_of(values, photometric=1):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = photometric
    return saved(Image.fromarray(values), "TIFF", tiffinfo=tags)


def steps(top, dtype):
    return np.array([0, top // 5, top]).astype(dtype)[None].repeat(3, axis=0)


def unsigned32():
    """Pillow writes no unsigned TIFF of 32 bits; readers get one by its sample format."""
    content = tiff_of(steps(2**31 - 1, np.int32)).getvalue()
    values = steps(2**32 - 1, np.uint32)
    content = content.replace(steps(2**31 - 1, np.int32).tobytes(), values.tobytes())
    entry = content.index(b"\x53\x01\x03\x00")  # tag 339, a short
    return io.BytesIO(content[:entry + 8] + b"\x01" + content[entry + 9:])


DEEP_GREY = {
    "16-bit PNG": lambda: saved(Image.fromarray(steps(65535, np.uint16)), "PNG"), "16-bit TIFF": lambda: tiff_of(steps(65535, np.uint16)),
    "16-bit PGM": lambda: io.BytesIO(b"P5 3 3 65535\n" + steps(65535, ">u2").tobytes()), "10-bit PGM": lambda: io.BytesIO(
        b"P5 3 3 1020\n" + steps(1020, ">u2").tobytes()), "32-bit TIFF": lambda: tiff_of(steps(2**31 - 1, np.int32)), "unsigned 32-bit TIFF": unsigned32,
    "big-endian TIFF": lambda: saved(Image.frombytes("I;16B", (3, 3), steps(65535, ">u2").tobytes()), "TIFF")}


@pytest.mark.parametrize("kind", DEEP_GREY)
def test_deep_grey_is_scaled_over_its_range(kind):
    image, conversions = read_image(DEEP_GREY[kind]())
    assert conversions == (DEEP,) and np.asarray(image)[1, :, 0].tolist() == [0, 51, 255]


def test_zero_may_be_white():
    values = np.asarray(open_image(tiff_of(steps(65535, np.uint16), photometric=0)))[0, :, 1]
    assert values.tolist() == [255, 204, 0]


@pytest.mark.parametrize("values,message", [
    (np.linspace(0, 255, 9, dtype=np.float32), "float values from 0 to 255: expected 0 to 1"), (np.array([np.nan, 1] * 3, np.float32), "float values from nan to nan"),
    (np.array([-5, 7] * 3, np.int32), "negative grey values, down to -5")])
def test_values_without_an_agreed_range_are_refused(tmp_path, values, message):
    path = tmp_path / "depth.tif"
    Image.fromarray(values.reshape(3, -1)).save(path)
    with pytest.raises(FlowARError, match=f"depth.tif: cannot be read as an image .{message}"):
        open_image(path)


def test_floats_from_0_to_1_are_scaled():
    image, conversions = read_image(tiff_of(np.array([[0, 0.2, 1]] * 3, np.float32)))
    assert conversions == (FLOATS,) and np.asarray(image)[0, :, 2].tolist() == [0, 51, 255]


def test_a_transparent_colour_of_16_bits_is_refused():
    """Pillow compares the upper 8 bits: it would show what is hidden, or hide what is not."""
    with pytest.raises(FlowARError, match="16-bit RGB with a transparent colour"):
        open_image(png_of(16, 2, struct.pack(">3H", 1000, 2000, 3000) * 8, struct.pack(">3H", 1000, 2000, 3000)))


@pytest.mark.parametrize("mode,kind", [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("L", "PNG"), ("P", "PNG"), ("1", "PNG"),
                                       ("LAB", "TIFF"), ("RGB", "BMP"), ("RGB", "PPM")])
def test_all_else_is_pillows_conversion(mode, kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    file = saved(noise.convert(mode), kind)
    image, conversions = read_image(file)
    assert not conversions and np.array_equal(np.asarray(image), np.asarray(Image.open(file).convert("RGB")))


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>", saved(drawing(), "PNG").getvalue()[:60]])
def test_what_is_no_image_is_named(tmp_path, content):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(FlowARError, match="x.jpg: cannot be read as an image"):
        open_image(tmp_path / "x.jpg")


def test_a_dataset_lays_its_background_under_transparency(tmp_path):
    (tmp_path / "a").mkdir()
    drawing().save(tmp_path / "a" / "0.png")
    assert Images(tmp_path, 8, background=(0, 0, 255))[(0, 0)][0][:, 0, 0].tolist() == [-1, -1, 1]


def test_pictures_beyond_pillows_limits_are_read():
    texts = PngImagePlugin.PngInfo()
    texts.add_text("x", "y" * 2**21, zip=True)
    for _ in range(70):
        texts.add_text("x", "y" * 2**20, zip=True)
    image = Image.new("RGB", (4, 4), INK)
    assert open_image(saved(image, "PNG", pnginfo=texts, icc_profile=bytes(2**21))).tobytes() == image.tobytes()
    large = bytearray(saved(image, "PNG").getvalue())
    large[16:24] = struct.pack(">II", 14000, 14000)  # its header alone
    large[29:33] = struct.pack(">I", zlib.crc32(large[12:29]))
    assert Image.open(io.BytesIO(large)).size == (14000, 14000)
