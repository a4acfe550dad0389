"""Draw samples: a grid of classes, and what a scale-wise model can do: grow, vary, edit, interpolate, inpaint.

    python scripts/sample.py --resume demo:fashion                                              # grid.png
    python scripts/sample.py --resume released:flowar_small --labels "golden retriever,207" --seeds 0-7 --grid --strip
    python scripts/sample.py --resume demo:fashion --labels 7_sneaker --variations --keep_scales 2

A PNG holds its settings: --again PICTURE draws it again.
"""
import argparse
import re
from pathlib import Path

from models import FlowARError
from models.settings import REMOVED
from scripts.pictures import check_picture, draw_table, read_settings, save
from util.cluster import run_main, select_device
from util.command_line import COUNT, POSITIVE, SEED, as_type, list_of, make_parser, path, take_options
from util.data import center_crop, open_image
from util.evaluation.pipeline import open_pipeline
from util.files import make_directory
from util.manifest import code_version
from util.options import SamplingOptions

KINDS = {  # option: what it draws
    "grid": "a grid with one row per class, of --seeds or --per_class images",
    "strip": "the first image after each scale",
    "trajectory": "the first image's last scale on its way from noise",
    "variations": "--per_class images that share their first --keep_scales scales",
    "interpolate": "--per_class images between the first and the last of --seeds",
    "edit": "an image of the first label, and its finer scales sampled again for each other label"}

FILES = (*KINDS, "inpaint", "folder")


def seed_list(text):
    """'0-15' or '1,4,9-11' -> (0, 1, ..., 15)."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise ValueError("expected seeds such as 0-15 or 1,4,9")
    seeds = []
    for first, _, last in (part.partition("-") for part in text.split(",")):
        if SEED(last or first) < SEED(first):
            raise ValueError("expected the smaller seed first")
        seeds += range(SEED(first), SEED(last or first) + 1)
    return tuple(seeds)


def sample_parser():
    parser = make_parser(SamplingOptions, __doc__.splitlines()[0])
    add = parser.add_argument_group("pictures").add_argument
    for kind, what in KINDS.items():
        add(f"--{kind}", type=as_type(path), nargs="?", const=f"{kind}.png", metavar="FILE",
            help=f"picture of {what}; default {kind}.png")
    add("--inpaint", type=as_type(path), nargs="+", metavar=("IMAGE MASK", "FILE"),
        help="--per_class images with the white parts of MASK sampled again, written to FILE; default inpaint.png")
    add("--folder", type=as_type(path), help="folder for single images of the grid, <label>-<seed or number>.png")
    add("--labels", type=as_type(list_of(str)), help="class numbers or names; default: the first 10 trained classes")
    add("--seeds", type=as_type(seed_list), help="one image per class and seed, such as 0-15 or 1,4,9")
    add("--per_class", type=as_type(POSITIVE), default=8, help="images per class")
    add("--keep_scales", type=as_type(COUNT), help="scales kept by --variations and --edit; default: at most 3")
    add("--again", type=as_type(path), metavar="PICTURE",
        help="use the options stored in a picture; options passed here override them")
    return parser


def by_options_of_now(words):
    """The command of a picture that an earlier version drew, in the options of this one."""
    renewed = []
    for word, value in zip(words, [*words[1:], ""]):
        if renewed and renewed[-1] is None:  # the value of what is left out
            renewed.pop()
        elif word == "--class_names" or (word, value) == ("--vae", "kl16"):
            renewed.append(None)
        elif word.startswith("--") and REMOVED.get(word[2:]) == value:
            renewed.append(None)
        else:
            renewed.append("--vae_path" if word == "--vae" else word)
    return renewed


def parse_args():
    """(options, the words that ask for them). Of --again: those of one picture, then the words that are given."""
    again = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    again.add_argument("--again", type=as_type(path))
    (picture, words), before, args = again.parse_known_args(), [], None
    if picture.again:
        settings = read_settings(picture.again)
        before, kind = by_options_of_now(settings["command"]), settings["picture"]
        if settings.get("commit") != (commit := code_version()):
            print(f"{picture.again}: made with commit {settings.get('commit')}, the current commit is {commit}")
        args = sample_parser().parse_args(before)
        for other in {*FILES} - {kind}:
            setattr(args, other, None)
        if kind == "folder" and "seed" in settings:  # that picture alone
            args.labels, args.seeds = [str(settings["label"])], (settings["seed"],)
    args = sample_parser().parse_args(words, args)
    if not any(getattr(args, kind) for kind in FILES):
        args.grid = "grid.png"
    if args.inpaint and len(args.inpaint) not in (2, 3):
        raise FlowARError(f"--inpaint has {len(args.inpaint)} values: expected IMAGE MASK, or IMAGE MASK FILE")
    return args, before + words


def outputs(args):
    """{kind: file to write}; FlowARError for what cannot be written, before the work."""
    files = {kind: getattr(args, kind) for kind in KINDS if getattr(args, kind)}
    if args.inpaint:
        files["inpaint"] = [*args.inpaint, "inpaint.png"][2]
    for file in files.values():
        check_picture(file)
    if args.folder:
        make_directory(Path(args.folder))
    return files


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
            raise FlowARError("--interpolate needs two seeds: --seeds 0,1")
        return [pipe.interpolate(first, start, args.seeds[-1], args.per_class)], names[:1], []
    if kind == "edit":
        if len(labels) < 2:
            raise FlowARError("--edit needs two labels: --labels 9,7")
        edited = [pipe.edit(first, label, args.keep_scales, seed=start)[0] for label in labels[1:]]
        return [[pipe(first, seed=start)[0], *edited]], [""], names
    image, mask = map(open_image, args.inpaint[:2])
    size = pipe.sampler.model.img_size
    drawn = pipe.inpaint(image, mask, first, count=args.per_class, seed=start)
    return [[center_crop(image, size), center_crop(mask, size), *drawn]], names[:1], ["image", "mask"]


def main():
    args, words = parse_args()
    files = outputs(args)
    pipe = open_pipeline(take_options(SamplingOptions, args), select_device(args.device), identify=True)
    labels = [pipe.label(label) for label in args.labels or pipe.classes.sampled()[:10]]
    settings = {**pipe.settings(), "commit": code_version(), "command": words}
    for kind, file in files.items():
        rows, names, titles = draw(kind, pipe, labels, args)
        save(draw_table(rows, names, titles), file, {**settings, "picture": kind})
    if args.folder:
        rows, _ = samples(pipe, labels, args)
        kind, numbers = ("seed", args.seeds) if args.seeds else ("number", range(args.per_class))
        for label, row in zip(labels, rows):
            for number, image in zip(numbers, row):
                one = {"picture": "folder", "label": label, "class_name": pipe.names[label], kind: number}
                save(image, Path(args.folder) / f"{label:04d}-{number:04d}.png", {**settings, **one})


if __name__ == "__main__":
    run_main(main)
