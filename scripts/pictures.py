"""Labelled tables of images, and PNGs that carry the settings they were made with."""
import json
from pathlib import Path

from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from models import FlowARError
from models.weights import writing
from util.files import check_output

SMALLEST_CELL = 64  # pixels; smaller images are enlarged by a whole factor
GAP = 2
SETTINGS = "flowar"  # name of the text chunk
LETTER = 7  # pixels of PIL's built-in font


def draw_table(rows, names, titles=()):
    """Picture of rows of PIL images of one size, named at the left and titled at the top."""
    factor = max(1, -(-SMALLEST_CELL // rows[0][0].width))
    width, height = (factor * side for side in rows[0][0].size)
    columns = max(map(len, rows))
    left, top = LETTER * max(map(len, names)) + 2 * GAP if any(names) else GAP, 2 * LETTER if titles else GAP
    picture = Image.new("RGB", (left + columns * (width + GAP), top + len(rows) * (height + GAP)), "white")
    pen = ImageDraw.Draw(picture)
    for i, (row, name) in enumerate(zip(rows, names)):
        y = top + i * (height + GAP)
        pen.text((GAP, y + height // 2 - LETTER), name, fill="black")
        for j, image in enumerate(row):
            picture.paste(image.resize((width, height), Image.Resampling.NEAREST), (left + j * (width + GAP), y))
    for j, title in enumerate(titles):
        pen.text((left + j * (width + GAP), 0), title, fill="black")
    return picture


def stack(*pictures):
    """Pictures one below the other, on white."""
    size = max(picture.width for picture in pictures), sum(picture.height for picture in pictures)
    whole, top = Image.new("RGB", size, "white"), 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    return whole


def check_picture(path):
    """FlowARError unless a picture can be written at `path`, before the work."""
    if Image.registered_extensions().get(Path(path).suffix.lower()) not in Image.SAVE:
        raise FlowARError(f"{path}: unknown picture format, expected a name such as grid.png")
    check_output(path)


def png_text(settings):
    """What Image.save takes as pnginfo: settings as JSON in a text chunk."""
    info = PngInfo()
    info.add_itxt(SETTINGS, json.dumps(settings))
    return info


def read_settings(path):
    """What png_text wrote into a PNG, or FlowARError."""
    with Image.open(path) as image:
        image.load()  # the chunk may lie behind the pixels
        settings = image.info.get(SETTINGS)
    if settings is None:
        raise FlowARError(f"{path}: contains no settings of scripts/sample.py")
    return json.loads(settings)


def save(picture, path, settings=None):
    """Write a picture; a PNG carries the settings that it was made with."""
    kind = Image.registered_extensions()[Path(path).suffix.lower()]
    with writing(path, sync=False) as file:
        picture.save(file, kind, pnginfo=png_text(settings) if settings and kind == "PNG" else None)
    print(path)
