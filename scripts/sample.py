"""Draw samples: a grid of classes, and what a scale-wise model can do: grow, vary, edit, interpolate, inpaint.

    python scripts/sample.py --resume output/quickstart/run                                     # grid.png
    python scripts/sample.py --resume released:flowar_small --labels "golden retriever,207" --seeds 0-7 --grid --strip
    python scripts/sample.py --resume output/quickstart/run --labels 7_sneaker --variations --keep_scales 2

A PNG holds the settings that it was made with: --again PICTURE makes it once more.
"""
import argparse
import re
from pathlib import Path

import project_root  # noqa: F401

from scripts.pictures import check_picture, draw_table, read_settings, save
from models import FlowARError
from util.cluster import run_main, select_device
from util.data import center_crop, list_images, open_image
from util.evaluation.pipeline import open_pipeline
from util.files import make_directory
from util.manifest import code_version
from util.options import count, positive, sampling_parser, seed, single_point, some_path

KINDS = {  # option: what it draws
    "grid": "a row for each class, of --seeds, or of --per_class images",
    "strip": "the first image after every scale",
    "trajectory": "the last scale of the first image on its way from noise",
    "variations": "--per_class images that share their first --keep_scales scales",
    "interpolate": "--per_class images from the first of --seeds to the last",
    "edit": "an image of the first of --labels, and its fine scales drawn for the others"}

FILES = (*KINDS, "inpaint", "folder")


def names_or_numbers(text):
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise argparse.ArgumentTypeError(f"{text!r}: nothing between two commas, expected names or numbers")
    return parts


def seed_list(text):
    """'0-15' or '1,4,9-11' -> (0, 1, ..., 15)."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0-15, or 1,4,9")
    parts = [part.partition("-") for part in text.split(",")]
    found = tuple(value for first, _, last in parts for value in range(seed(first), seed(last or first) + 1))
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} holds no number: expected 0-15, or 1,4,9")
    return found


def make_parser():
    parser = sampling_parser(__doc__.splitlines()[0])
    for kind, what in KINDS.items():
        parser.add_argument(f"--{kind}", type=some_path, nargs="?", const=f"{kind}.png", metavar="FILE", help=f"picture of {what}; default {kind}.png")
    parser.add_argument("--inpaint", nargs="+", metavar=("IMAGE MASK", "FILE"),
                        help="--per_class images with the white parts of MASK drawn anew, to FILE (inpaint.png)")
    parser.add_argument("--folder", help="folder for single pictures of the grid, <label>-<seed or number>.png")
    parser.add_argument("--labels", type=names_or_numbers, help="classes, by number or name; default: the first 10 that had training images")
    parser.add_argument("--seeds", type=seed_list, help="a picture of each class for each of these seeds, as 0-15 or 1,4,9")
    parser.add_argument("--per_class", type=positive, default=8, help="samples of each class")
    parser.add_argument("--keep_scales", type=count, help="scales that --variations and --edit keep; default: 3, or all but one of fewer")
    parser.add_argument("--class_names", help="folder whose class folders name the classes; default: the checkpoint's names, or ImageNet's")
    parser.add_argument("--again", metavar="PICTURE", help="take the options that a picture was made with; those given here come first")
    return parser


def parse_args():
    """(options, the words that ask for them). Of --again: those of one picture, then the words that are given."""
    again = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    again.add_argument("--again")
    (picture, words), args = again.parse_known_args(), None
    if picture.again:
        said = read_settings(picture.again)
        before, commit = list(map(str, said.get("command", []))), code_version()
        if said.get("commit") != commit:
            print(f"{picture.again}: drawn by commit {said.get('commit')}, this is {commit}")
        args = make_parser().parse_args(before)
        for kind in {*FILES} - {said.get("picture")}:
            setattr(args, kind, None)
        if said.get("picture") == "folder" and "seed" in said:  # that picture alone
            args.labels, args.seeds = (str(said["label"]),), (said["seed"],)
        words, args = before + words, make_parser().parse_args(words, args)
    args = args or make_parser().parse_args(words)
    if not any(getattr(args, kind) for kind in FILES):
        args.grid = "grid.png"
    if args.inpaint and len(args.inpaint) not in (2, 3):
        raise FlowARError(f"--inpaint has {len(args.inpaint)} values: expected IMAGE MASK, or IMAGE MASK FILE")
    return single_point(args), words


def outputs(args):
    """{kind: file to write}; FlowARError for what cannot be written, or two of one name."""
    files = {kind: getattr(args, kind) for kind in KINDS if getattr(args, kind)}
    if args.inpaint:
        files["inpaint"] = [*args.inpaint, "inpaint.png"][2]
    for kind, file in files.items():
        check_picture(file)
        same = [other for other in files if Path(files[other]).resolve() == Path(file).resolve()]
        if len(same) > 1:
            raise FlowARError(f"--{same[0]} and --{same[1]} are one file, {file}: give two")
    if args.folder:
        make_directory(Path(args.folder))
    return files


def name_the_classes(pipe, folder):
    """Let class folders name the classes."""
    names = list_images(folder).classes
    if len(names) > len(pipe.names):
        raise FlowARError(f"--class_names {folder}: {len(names)} class folders, but the model has {len(pipe.names)} classes")
    pipe.names[:len(names)] = names


def find_labels(pipe, asked):
    """Labels of --labels, by default the first 10 that had training images."""
    try:
        return [pipe.label(one) for one in asked or pipe.classes.sampled()[:10].tolist()]
    except FlowARError as error:
        raise FlowARError(f"--labels: {error}") from error


def samples(pipe, labels, args):
    """(rows of images, a title for each column)."""
    if args.seeds:
        rows = [[pipe(label, seed=number)[0] for number in args.seeds] for label in labels]
        return rows, [f"seed {number}" for number in args.seeds]
    images = pipe([label for label in labels for _ in range(args.per_class)], seed=args.seed)
    return [images[i:i + args.per_class] for i in range(0, len(images), args.per_class)], []


def draw(kind, pipe, labels, args):
    """(rows of images, a name for each, a title for each column) of a picture."""
    first, names, start = labels[0], [pipe.names[label] for label in labels], (args.seeds or (args.seed,))[0]
    if kind == "grid":
        rows, titles = samples(pipe, labels, args)
        return rows, names, titles
    if kind == "strip":
        return [pipe.grow(first, seed=start)], names[:1], [f"{s}x{s}" for s in pipe.sampler.model.scale]
    if kind == "trajectory":
        return [pipe.trajectory(first, seed=start)], names[:1], []
    if kind == "variations":
        return [pipe.variations(first, keep_scales=args.keep_scales, count=args.per_class, seed=start)], names[:1], []
    if kind == "interpolate":
        if not args.seeds or len(args.seeds) < 2:
            raise FlowARError("--interpolate needs two seeds, its ends: --seeds 0,1")
        return [pipe.interpolate(first, start, args.seeds[-1], args.per_class)], names[:1], []
    if kind == "edit":
        edited = [pipe.edit(first, label, args.keep_scales, seed=start)[0] for label in labels[1:]]
        if not edited:
            raise FlowARError("--edit needs two classes or more: --labels FROM,TO")
        return [[pipe(first, seed=start)[0], *edited]], [""], names
    image, mask = map(open_image, args.inpaint[:2])
    size = pipe.sampler.model.img_size
    drawn = pipe.inpaint(image, mask, first, count=args.per_class, seed=start)
    return [[center_crop(image, size), center_crop(mask, size), *drawn]], names[:1], ["image", "mask"]


def main():
    args, words = parse_args()
    files = outputs(args)
    pipe = open_pipeline(args, select_device(args.device), identify=True)
    if args.class_names:
        name_the_classes(pipe, args.class_names)
    labels = find_labels(pipe, args.labels)
    made = {**pipe.settings(), "commit": code_version(), "command": words}
    for kind, file in files.items():
        rows, names, titles = draw(kind, pipe, labels, args)
        save(draw_table(rows, names, titles), file, {**made, "picture": kind})
    if args.folder:
        rows, _ = samples(pipe, labels, args)
        numbers = args.seeds or range(args.per_class)
        for label, row in zip(labels, rows):
            for number, image in zip(numbers, row):
                one = {"picture": "folder", "label": label, "class_name": pipe.names[label], **({"seed": number} if args.seeds else {"number": number})}
                save(image, Path(args.folder) / f"{label:04d}-{number:04d}.png", {**made, **one})


if __name__ == "__main__":
    run_main(main)
