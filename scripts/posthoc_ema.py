"""Rebuild the EMA of any width of a training with --posthoc_ema, after it (EDM2, arXiv 2312.02696).

    python scripts/posthoc_ema.py --resume output/run --width 0.07                        # output/run/ema_width0.07.pth
    python scripts/posthoc_ema.py --resume output/run --width 0.03,0.05,0.1 --output output/widths

The width is relative: an EMA of 0.07 averages over 7 % of the training, by a power of the step. Those of 0.05 and 0.10 were tracked; any other
is made of their snapshots in the run's folder, by least squares over the profiles, and the error of its profile is said. eval.py,
scripts/sample.py, load_flowar and load_pipeline take the file as any weights, with the run's settings of sampling, class names and VAE.
"""
import argparse
from pathlib import Path

import project_root  # noqa: F401

import torch

from models import FlowARError
from models.weights import find_model, read_file, write_file
from util.cluster import log, run_main
from util.files import check_output
from util.options import between, fraction, positive, several, some_path
from util.training.checkpoint import numbered, read_model_file, shapes_of, step_of
from util.training.optimization import POWER_WIDTHS, rebuild_power

LARGEST_ERROR = 0.05  # of a profile, relative


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--resume", type=some_path, required=True, help="run: a folder with checkpoint-last.pth, or a checkpoint, beside its snapshots posthoc-*.pth")
    add("--width", type=several(between(float, 0.001, 0.28)), required=True, help="relative width of the EMA; of several, separated by commas, a file each")
    add("--step", type=positive, help="optimizer step that it is the EMA of; default: the checkpoint's")
    add("--output", type=some_path, help="file to write, of several widths a folder; default: ema_width<WIDTH>.pth in the run's folder")
    add("--largest_error", type=fraction, default=LARGEST_ERROR, help="relative error of a profile above which a width is refused")
    return parser.parse_args()


def read_averages(path, content, wanted):
    """{(step, width): {name: tensor}} of a checkpoint and of the snapshots beside it, up to the step that is wanted; memory-mapped."""
    step = content.get("progress", {}).get("step")
    if type(step) is not int or "posthoc" not in content:
        raise FlowARError(f"{path}: it has no averages to rebuild others from: expected a checkpoint of a training with --posthoc_ema")
    if wanted > step:
        raise FlowARError(f"--step {wanted}: {path} is of step {step}")
    found = averages_of({"step": step, "posthoc": content["posthoc"]}, path)  # float32: of one step they are taken
    shapes = shapes_of(next(iter(found.values())))
    for file in numbered(path.parent, "posthoc"):
        if step_of(file) <= wanted:
            said = read_file(file, mmap=True)
            averages = averages_of(said, file)
            if any(shapes_of(tensors) != shapes for tensors in averages.values()):
                raise FlowARError(f"{file}: its tensors are not those of {path}, as if of another model: move it away")
            found = {**averages, **found}
    return {key: tensors for key, tensors in found.items() if key[0] <= wanted}


def averages_of(said, file):
    """Those of a snapshot, or of what a checkpoint says in its place."""
    try:
        found = {(said["step"], width): said["posthoc"][f"{width:g}"] for width in POWER_WIDTHS}
        if type(said["step"]) is int and all(map(shapes_of, found.values())):
            return found
    except (KeyError, TypeError, AttributeError, IndexError):
        pass
    raise FlowARError(f"{file}: it is no snapshot of --posthoc_ema, with a step and averages of widths {POWER_WIDTHS}: move it away")


def combine(averages, factors):
    """The sum of {name: tensor} times factors, added up in float64; float32."""
    used = [(tensors, factor) for tensors, factor in zip(averages, factors) if factor]
    return {name: sum(tensors[name].double() * factor for tensors, factor in used).float() for name in used[0][0]}


def rebuild(path, content, averages, step, width, limit):
    """Content of a file with the EMA of a width: with what the checkpoint knows besides its weights."""
    factors, error = rebuild_power(list(averages), (step, width))
    made = "tracked" if error == 0 else f"of {len(averages)} averages, error of its profile {error:.2%}"
    if error > limit:
        raise FlowARError(f"--width {width} at step {step}: {made}, more than {limit:.0%}: give another (those between 0.05 and 0.1 are "
                          "made best), train with more snapshots (a smaller --posthoc_ema), or accept it with --largest_error")
    log(f"{path}: width {width} at step {step}: {made}")
    tensors = find_model(content, path, "raw first").tensors
    said = {name: content[name] for name in ("args", "images", "data", "vae") if name in content}
    return {**said, "model_ema": {**tensors, **combine(averages.values(), factors)}, "profile": {"width": width, "step": step, "error": error}}


def main():
    args = parse_args()
    path, content = read_model_file(args.resume)
    folder = Path(args.output or path.parent)
    files = {width: folder / f"ema_width{width}.pth" for width in args.width}
    if args.output and len(files) == 1:
        files = {args.width[0]: folder}
    for file in files.values():
        check_output(file)
        if file.exists():
            raise FlowARError(f"{file}: is there already: give another --output, or remove it")
    step = args.step or content.get("progress", {}).get("step") or 0
    averages = read_averages(path, content, step)
    with torch.no_grad():
        for width, file in files.items():
            write_file(rebuild(path, content, averages, step, width, args.largest_error), file)
            print(f"{file}: EMA of width {width}")


if __name__ == "__main__":
    run_main(main)
