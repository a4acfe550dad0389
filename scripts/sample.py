"""Draw samples: a labelled grid of classes, and a strip that shows one image growing scale by scale.

    python scripts/sample.py --resume output/quickstart/run --vae_path output/quickstart/vae.pth --cfg 3 \\
        --class_names output/quickstart/images/train --grid grid.png --strip strip.png
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine_flowar import evaluation_precision, generate_all, load_for_evaluation  # noqa: E402
from models import FlowARError  # noqa: E402
from util.data import to_uint8  # noqa: E402
from util.distributed import autocast, run_main, select_device  # noqa: E402
from util.evaluation import single_point  # noqa: E402
from util.options import integer_list, positive, sampling_options, sampling_parser  # noqa: E402
from util.pictures import check_picture, draw_table, save  # noqa: E402
from util.randomness import image_noise  # noqa: E402


def parse_args():
    parser = sampling_parser(__doc__.splitlines()[0])
    parser.add_argument("--grid", help="PNG to write: a row of --per_class samples of each class")
    parser.add_argument("--strip", help="PNG to write: the first sample of the first class after every scale")
    parser.add_argument("--labels", type=integer_list, help="classes to draw; default: the first 10")
    parser.add_argument("--per_class", type=positive, default=8, help="samples of each class")
    parser.add_argument("--class_names", help="folder whose class folders name the classes")
    return parser.parse_args()


def class_names(folder, class_num):
    if not folder:
        return [str(label) for label in range(class_num)]
    if not Path(folder).is_dir():
        raise FlowARError(f"--class_names {folder}: no such folder")
    names = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    if len(names) > class_num:
        raise FlowARError(f"--class_names {folder}: {len(names)} class folders, but the model has {class_num} classes")
    return names + [str(label) for label in range(len(names), class_num)]


def grid(model, vae, labels, names, args, device):
    asked = [label for label in labels for _ in range(args.per_class)]
    images = generate_all(model, vae, asked, args, device).unflatten(0, (len(labels), args.per_class))
    return draw_table(images, [names[label] for label in labels])


@torch.no_grad()
def strip(model, vae, label, name, args, device):
    """Each scale's latent, enlarged to full size and decoded."""
    side = model.scale[-1] * model.patch_size
    with autocast(device, args.precision):
        scales = model.sample_pyramid(torch.tensor([label], device=device), noise=image_noise(model, args.seed, [0]),
                                      **sampling_options(args))
        latents = torch.cat([F.interpolate(model.unpatchify(x), size=(side, side), mode="bicubic") for x in scales])
        images = vae.decode(vae.latent_scale.restore(latents))
    return draw_table(to_uint8(images).cpu()[None], [name], [f"{s}x{s}" for s in model.scale])


def main():
    args = single_point(parse_args())
    if not (args.grid or args.strip):
        raise FlowARError("nothing to draw: give --grid or --strip")
    if args.grid == args.strip:
        raise FlowARError(f"--grid and --strip are one file, {args.grid}: give two")
    for output in filter(None, (args.grid, args.strip)):
        check_picture(output)
    device = select_device(args.device)
    args.precision = evaluation_precision(args.precision, device)
    model, vae, _ = load_for_evaluation(args, device)
    labels = args.labels or tuple(np.arange(min(10, model.class_num)))
    wrong = [label for label in labels if not 0 <= label < model.class_num]
    if wrong:
        raise FlowARError(f"--labels {wrong[0]}: the model has classes 0..{model.class_num - 1}")
    names = class_names(args.class_names, model.class_num)
    if args.grid:
        save(grid(model, vae, labels, names, args, device), args.grid)
    if args.strip:
        save(strip(model, vae, labels[0], names[labels[0]], args, device), args.strip)


if __name__ == "__main__":
    run_main(main)
