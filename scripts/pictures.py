"""Labelled tables of images."""
from pathlib import Path

from PIL import Image, ImageDraw

from models import FlowARError
from util.files import check_output

SMALLEST_CELL = 64  # pixels; smaller images are enlarged by a whole factor
GAP = 2
LETTER = 7  # pixels of PIL's built-in font


def draw_table(rows, names, titles=()):
    """Picture of rows of images (rows, columns, 3, h, w) uint8, named at the left and titled at the top."""
    factor = max(1, -(-SMALLEST_CELL // rows.shape[-1]))
    rows = rows.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    height, width = rows.shape[-2:]
    left, top = LETTER * max(map(len, names)) + 2 * GAP if any(names) else GAP, 2 * LETTER if titles else GAP
    picture = Image.new("RGB", (left + rows.shape[1] * (width + GAP), top + rows.shape[0] * (height + GAP)), "white")
    pen = ImageDraw.Draw(picture)
    for i, (row, name) in enumerate(zip(rows, names)):
        y = top + i * (height + GAP)
        pen.text((GAP, y + height // 2 - LETTER), name, fill="black")
        for j, image in enumerate(row):
            picture.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), (left + j * (width + GAP), y))
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
    """FlowARError unless a picture can be written at `path`: said before the work, not after it."""
    if Image.registered_extensions().get(Path(path).suffix.lower()) not in Image.SAVE:
        raise FlowARError(f"{path}: no kind of picture ends so, expected .png or the like")
    check_output(path)


def save(picture, path):
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        raise FlowARError(f"{path}: cannot be written ({error})") from error
    print(path)
