"""Rebuild an EMA of any width after a training with --posthoc_ema (EDM2, arXiv 2312.02696).

    python scripts/posthoc_ema.py --resume output/run --width 0.07                        # output/run/ema_width0.07.pth
    python scripts/posthoc_ema.py --resume output/run --width 0.03,0.05,0.1 --output output/widths

The width is relative: an EMA of 0.07 averages over 7 % of the training, by a power of the step. Those of 0.05 and 0.10
were tracked; any other is made of their snapshots in the run's folder, by least squares over the profiles; a line has
the error of its profile. eval.py, scripts/sample.py, load_flowar and load_pipeline take the file as any weights, with
the run's settings of sampling, class names and VAE.
"""
import math
from pathlib import Path

import numpy as np
import torch

from models import FlowARError
from models.settings import FRACTION, number
from models.weights import find_model, read_file, write_file
from util.cluster import log, run_main
from util.command_line import POSITIVE, Parser, as_type, list_of, path
from util.files import check_output
from util.training.checkpoint import list_numbered, open_newest, shapes_of, step_of
from util.training.optimization import POWER_WIDTHS, power_exponent

LARGEST_ERROR = 0.05  # of a profile, relative


def parse_args():
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--resume", type=as_type(path), required=True,
        help="run folder with checkpoint-last.pth, or a checkpoint, beside its snapshots posthoc-*.pth")
    add("--width", type=as_type(list_of(number(float, 0.001, 0.28))), required=True,
        help="relative width of the EMA, such as 0.07; comma-separated widths are written to one file each")
    add("--step", type=as_type(POSITIVE), help="optimizer step of the EMA; default: the checkpoint's")
    add("--output", type=as_type(path),
        help="file to write, or folder for several widths; default: ema_width<WIDTH>.pth in the run's folder")
    add("--largest_error", type=as_type(FRACTION), default=LARGEST_ERROR,
        help="maximum relative error of the EMA profile")
    return parser.parse_args()


def read_averages(checkpoint, step):
    """{(step, width): {name: tensor}} of a checkpoint and of the snapshots beside it, up to a step; memory-mapped."""
    content, files = checkpoint.content, reversed(list_numbered(checkpoint.path.parent, "posthoc"))
    shapes = shapes_of(content["posthoc"][f"{POWER_WIDTHS[0]:g}"])
    snapshots = [(file, read_file(file)) for file in files if step_of(file) <= step]
    if content["progress"]["step"] <= step:  # the last, in place of its snapshot: it is float32
        snapshots.append((checkpoint.path, {"step": content["progress"]["step"], "posthoc": content["posthoc"]}))
    averages = {}
    for file, snapshot in snapshots:
        for width in POWER_WIDTHS:
            tensors = snapshot["posthoc"][f"{width:g}"]
            if shapes_of(tensors) != shapes:
                raise FlowARError(f"{file}: tensors do not match those of {checkpoint.path}, probably of another "
                                  "model: move the file away")
            averages[snapshot["step"], width] = tensors
    return averages


def rebuild_power(stored, wanted):
    """How to make the power average `wanted` of those `stored`: (the factor of each, relative error of the profile).

    wanted, and each of stored: (step, width). Least squares over the profiles p(u) = (g + 1) u^g / n^(g + 1) on [0, n],
    in float64, by factors that sum to 1: what they lacked would scale the weights. One that is stored is itself alone.
    """
    if wanted in stored:
        return [float(one == wanted) for one in stored], 0.0
    n, g = np.array([(step, power_exponent(width)) for step, width in [*stored, wanted]]).T[..., None]
    inner = ((g + 1) * (g.T + 1) / (g + g.T + 1) / np.maximum(n, n.T)
             * (np.minimum(n, n.T) / np.maximum(n, n.T)) ** np.where(n > n.T, g, g.T))
    norms = np.sqrt(inner.diagonal())
    inner, sizes = inner / norms / norms[:, None], norms[-1] / norms[:-1]  # of profiles of length 1
    among, with_it = inner[:-1, :-1], inner[:-1, -1]
    system = np.block([[among, sizes[:, None]], [sizes, 0]])
    factors = np.linalg.lstsq(system, np.append(with_it, 1), rcond=None)[0][:-1]
    error = math.sqrt(max(0, 1 - 2 * factors @ with_it + factors @ among @ factors))
    return (factors * sizes).tolist(), error


def combine(averages, factors):
    """The sum of {name: tensor} times factors, added up in float64; float32."""
    used = [(tensors, factor) for tensors, factor in zip(averages, factors) if factor]
    return {name: sum(tensors[name].double() * factor for tensors, factor in used).float() for name in used[0][0]}


def rebuild(checkpoint, averages, step, width, largest_error):
    """Content of a file with the EMA of a width, and with what the checkpoint says of its run."""
    path, content = checkpoint.path, checkpoint.content
    factors, error = rebuild_power(list(averages), (step, width))
    source = "tracked" if error == 0 else f"combined from {len(averages)} averages, profile error {error:.2%}"
    if error > largest_error:
        raise FlowARError(f"--width {width} at step {step}: {source}, more than {largest_error:.0%}: choose another "
                          "width (the error is smallest from 0.05 to 0.1), train with a smaller --posthoc_ema, or "
                          "raise --largest_error")
    log(f"{path}: width {width} at step {step}: {source}")
    record = {name: content[name] for name in ("args", "images", "data", "vae") if name in content}
    tensors = {**find_model(content, path, "raw first").tensors, **combine(averages.values(), factors)}
    return {**record, "model_ema": tensors, "profile": {"width": width, "step": step, "error": error}}


def main():
    args = parse_args()
    checkpoint = open_newest(args.resume)
    if "posthoc" not in checkpoint.content:
        raise FlowARError(f"{checkpoint.path}: contains no averages to rebuild from: expected a checkpoint trained "
                          "with --posthoc_ema")
    last = checkpoint.content["progress"]["step"]
    step = args.step or last
    if step > last:
        raise FlowARError(f"--step {step}: {checkpoint.path} ends at step {last}")
    files = {width: Path(args.output or checkpoint.path.parent, f"ema_width{width}.pth") for width in args.width}
    if args.output and len(files) == 1:
        files = {args.width[0]: Path(args.output)}
    for file in files.values():
        check_output(file)
        if file.exists():
            raise FlowARError(f"{file}: already exists: choose another --output, or remove it")
    averages = read_averages(checkpoint, step)
    with torch.no_grad():
        for width, file in files.items():
            write_file(rebuild(checkpoint, averages, step, width, args.largest_error), file)
            print(f"{file}: EMA of width {width}")


if __name__ == "__main__":
    run_main(main)
