"""Draw samples: a labelled grid of classes, and a strip that shows one image growing scale by scale.

    python scripts/sample.py --resume output/quickstart/run --vae_path output/quickstart/vae.pth --cfg 3 \\
        --grid grid.png --strip strip.png
"""
from pathlib import Path

import project_root  # noqa: F401  first: it names what is too old

import torch
import torch.nn.functional as F

from pictures import check_picture, draw_table, save
from models import FlowARError
from util.cluster import run_main, select_device
from util.data.folders import name_classes
from util.evaluation.labels import read_classes
from util.evaluation.setup import build_sampler, open_for_sampling
from util.options import integer_list, positive, sampling_parser, single_point


def parse_args():
    parser = sampling_parser(__doc__.splitlines()[0])
    parser.add_argument("--grid", help="PNG to write: a row of --per_class samples of each class")
    parser.add_argument("--strip", help="PNG to write: the first sample of the first class after every scale")
    parser.add_argument("--labels", type=integer_list, help="classes to draw; default: the first 10 that had training images")
    parser.add_argument("--per_class", type=positive, default=8, help="samples of each class")
    parser.add_argument("--class_names", help="folder whose class folders name the classes; default: the checkpoint's names")
    return parser.parse_args()


def class_names(folder, classes):
    """Names of a model's Classes: of class folders, or else those that the checkpoint knows; others are numbers."""
    names = name_classes(folder) if folder else classes.names or []
    if len(names) > classes.number:
        raise FlowARError(f"--class_names {folder}: {len(names)} class folders, but the model has {classes.number} classes")
    return names + [str(label) for label in range(len(names), classes.number)]


def grid(sampler, labels, names, per_class):
    asked = [label for label in labels for _ in range(per_class)]
    images = sampler.images(asked).unflatten(0, (len(labels), per_class))
    return draw_table(images, [names[label] for label in labels])


def strip(sampler, label, name):
    """Each scale's latent, enlarged to full size and decoded."""
    model = sampler.model
    size = (model.scale[-1] * model.patch_size,) * 2
    scales = [F.interpolate(model.unpatchify(x), size=size, mode="bicubic") for x in sampler.pyramid([label], [0])]
    images, _ = sampler.decode(torch.cat(scales))
    return draw_table(images.cpu()[None], [name], [f"{s}x{s}" for s in model.scale])


def main():
    args = single_point(parse_args())
    if not (args.grid or args.strip):
        raise FlowARError("nothing to draw: give --grid or --strip")
    if args.grid and args.strip and Path(args.grid).resolve() == Path(args.strip).resolve():
        raise FlowARError(f"--grid and --strip are one file, {args.grid}: give two")
    for output in filter(None, (args.grid, args.strip)):
        check_picture(output)
    model, vae, description, precision = open_for_sampling(args, select_device(args.device))
    sampler, classes = build_sampler(args, model, vae, precision), read_classes(Path(description["checkpoint"]), model.class_num)
    labels = args.labels or tuple(classes.sampled()[:10].tolist())
    wrong = [label for label in labels if not 0 <= label < model.class_num]
    if wrong:
        raise FlowARError(f"--labels {wrong[0]}: the model has classes 0..{model.class_num - 1}")
    names = class_names(args.class_names, classes)
    if args.grid:
        save(grid(sampler, labels, names, args.per_class), args.grid)
    if args.strip:
        save(strip(sampler, labels[0], names[labels[0]]), args.strip)


if __name__ == "__main__":
    run_main(main)
