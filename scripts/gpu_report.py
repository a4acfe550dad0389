"""Measure all that this project says of speed on this machine's GPU, and write docs/gpu/<the GPU's name>.md and .json.

    bash scripts/gpu_report.sh

Each stage is a command of its own with a time limit; what it found lies in --store, and the same command goes on with the stages
that are missing, or were of other code. One that fails is in the report with its last lines, and the next one follows.
"""
import argparse
import re
import shlex
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from project_root import ROOT

import torch

from scripts import flops
from models import MODELS, FlowARError
from util.cluster import run_main, select_device
from util.files import check_output, make_directory, read_json, write_bytes, write_json
from util.manifest import code_version, describe_machine
from util.options import one_of, positive, real, several, some_path

LAST_LINES = 12
CUT_OFF = "not done after"
PUBLISHED = {  # options of the published commands: of training, of sampling
    "flowar_small": ("", "--cfg 4.3 --guidance 0.9 --num_step 25"),
    "flowar_base": ("", "--cfg 2.4 --guidance 0.9 --num_step 25"),
    "flowar_large": ("--use_checkpoint", "--cfg 2.4 --guidance 0.9 --num_step 25"),
    "flowar_huge": ("--use_checkpoint", "--cfg 2.4 --guidance 0.7 --num_step 50"),
    "flowar_tiny": ("", "--cfg 3 --num_step 5")}
HALF_BATCH = "flowar_huge"  # is trained with 32 images where the others are with 64


class Stage(NamedTuple):
    name: str
    command: list
    limit: int  # seconds


def words(text):
    """Options, as a shell takes them."""
    try:
        shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    return text


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="cpu: a rehearsal, with small sizes")
    parser.add_argument("--minutes", type=real, default=10, help="what does not fit is not run; the same command goes on")
    parser.add_argument("--sizes", type=several(one_of(MODELS)), default=("flowar_small", "flowar_large", "flowar_huge"), help="models")
    parser.add_argument("--batches", type=several(positive), default=(64, 256, 1), help="images at once, the most important first")
    parser.add_argument("--repeats", type=positive, default=3, help="timings of each benchmark")
    parser.add_argument("--extra", type=words, default="", help="options for every benchmark, such as a small geometry")
    parser.add_argument("--checks", type=some_path, help="file of checks that pytest runs")
    parser.add_argument("--beside", type=some_path, help="Python file with the plain way, see scripts/benchmark.py")
    parser.add_argument("--store", type=some_path, default="output/gpu_report", help="folder for what each stage found")
    parser.add_argument("--output", type=some_path, default="docs/gpu", help="folder for the report")
    return parser.parse_args()


# ---- the stages ------------------------------------------------------------------------------------------------


def plan(args, device):
    """(stages, the most important first; lines on what is left out)."""
    stages, left_out, base = [], [], args.sizes[0]
    on_cuda, first = device.type == "cuda", args.batches[0]
    compiled = ("compiled", "--compile") if on_cuda else ("eager", "")  # a rehearsal waits for no compiler

    def bench(name, what, size, options, limit=120):
        repeats = "" if what in ("evaluate", "memory") else f"--repeats {args.repeats}"
        command = f"scripts/benchmark.py {what} --model {size} --device {device.type} {repeats} {options} {args.extra}"
        stages.append(Stage(name, [sys.executable, *shlex.split(command)], limit))

    def train(size, precision, how, option, batch=None):
        batch = batch or (max(first // 2, 1) if size == HALF_BATCH else first)
        bench(f"train {size}, batch {batch}, {precision}, {how}", "train", size,
              f"{PUBLISHED[size][0]} --batch_size {batch} --precision {precision} {option}")

    def sample(size, precision, how, option, batch=first):
        bench(f"sample {size}, batch {batch}, {precision}, {how}", "sample", size,
              f"{PUBLISHED[size][1]} --eval_bsz {batch} --precision {precision} {option}")

    def check(name, chosen):
        stages.append(Stage(name, [sys.executable, "-m", "pytest", "-q", "-rs", "-n", "4", "-k", chosen, args.checks], 240))

    if args.checks and on_cuda:
        check("checks", "not two_gpus")
    elif args.checks:
        left_out.append("the checks, which need CUDA")
    for size in args.sizes:
        train(size, "bf16", *compiled)
        sample(size, "bf16", *compiled)
    bench("vae", "vae", base, "--batch_size 8" if on_cuda else "--batch_size 2")
    bench("features", "features", base, f"--batch_size {first} {compiled[1]}", 240)
    bench("evaluate", "evaluate", base, f"{PUBLISHED[base][1]} --eval_bsz {first} --num_images {2 * first} --precision bf16 {compiled[1]}", 240)
    for size in args.sizes:
        bench(f"memory {size}, bf16", "memory", size, f"{PUBLISHED[size][0]} --batch_size {first} --precision bf16")
    if torch.cuda.device_count() < 2 or not on_cuda:
        left_out.append("DDP and --fsdp on two GPUs, and a dead rank of theirs: there are no two")
    elif args.checks:
        check("checks of two GPUs", "two_gpus")
    beside = f"--beside {args.beside}" if args.beside else ""
    for size in args.sizes:
        if on_cuda:
            sample(size, "bf16", "graphs", "--compile graphs", min(args.batches))
        for batch in args.batches[1:]:
            sample(size, "bf16", *compiled, batch)
        for precision in ("bf16", "fp16"):
            sample(size, precision, "eager, beside the plain way", beside)
            train(size, precision, "eager, beside the plain way", beside)
        for batch in args.batches[1:]:
            train(size, "bf16", *compiled, batch)
    return stages, left_out


def run_stage(stage, seconds):
    """What it found: {command, code, status, seconds, last_lines, figures}."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        command = stage.command + (["--json", str(figures)] if "scripts/benchmark.py" in stage.command else [])
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                                  timeout=seconds)
            text, status = done.stdout, "ok" if done.returncode == 0 else f"failed with status {done.returncode}"
            if stage.name.startswith("checks") and status == "ok" and " passed" not in text:
                status = "nothing was checked: all were skipped"
        except subprocess.TimeoutExpired as error:
            text, status = (error.stdout or b"").decode(errors="replace"), f"failed: {CUT_OFF} {seconds:.0f} s"
        found = read_json(figures) if status == "ok" and figures.is_file() else None
    return {"name": stage.name, "command": stage.command, "code": code_version(), "status": status, "seconds": time.monotonic() - start,
            "last_lines": without_places(text).strip().splitlines()[-LAST_LINES:], "figures": found}


def without_places(text):
    """What a program wrote, without this machine's folders."""
    return text.replace(f"{ROOT}/", "").replace(f"{Path.home()}/", "~/")


def done_before(file):
    """What a stage found; nothing where there is no file, or a damaged one."""
    try:
        return read_json(file) if file.is_file() else {}
    except FlowARError:
        print(f"{file}: damaged, measured again")
        return {}


def run_stages(stages, store, minutes):
    """{name: what was found} of the stages that are done; those before are read, the others run while there is time."""
    end, found = time.monotonic() + 60 * minutes, {}
    for stage in stages:
        file = store / f"{re.sub(r'[^a-z0-9]+', '-', stage.name)}.json"
        before = done_before(file)
        if (before.get("command"), before.get("code")) == (stage.command, code_version()):
            found[stage.name] = before
            continue
        left = end - time.monotonic()
        if left <= min(stage.limit, 60 * minutes) / 4:  # it would be cut off
            continue
        print(f"== {stage.name}", flush=True)
        result = run_stage(stage, min(stage.limit, left))
        if left < stage.limit and CUT_OFF in result["status"]:  # the next command gives it its whole time
            print(f"   cut off: it may take {stage.limit} s, --minutes {minutes:g} left {left:.0f}", flush=True)
            found[stage.name] = {**result, "status": f"cut off after {left:.0f} s of the {stage.limit} that it may take; run again next time"}
            continue
        write_json(result, file)
        found[stage.name] = result
        print(f"   {result['status']}, {result['seconds']:.0f} s", flush=True)
    return found


# ---- the report ------------------------------------------------------------------------------------------------


def limits(figures, gpu):
    """(least ms an image, ms an image when every operation reads and writes memory, if they were counted): of a GPU of scripts/flops.py,
    else of the matrix product beside it.
    """
    images = figures.get("eval_bsz", figures.get("batch_size"))
    if gpu is None:
        return figures["gigaflop_per_image"] / figures["matmul_gigaflops"] * 1000, None
    least, work = figures["gigaflop_per_image"] * 1e9 / gpu.reached, figures["work"].get("fast")
    return 1000 * least, 1000 * max(least, work["gigabytes"] * 1e9 / gpu.bandwidth / images) if work else None


def speed_rows(found, gpu):
    """Rows of a table of the train and sample stages."""
    rows = []
    for name, result in found.items():
        figures = result["figures"]
        if figures is None or figures["what"] not in ("train", "sample"):
            continue
        ms, (least, eager) = 1000 / figures["images_per_second"], limits(figures, gpu)
        work = figures["work"].get("fast", {})
        rows.append([name, f"{ms:.2f}", f"{least:.2f}", f"{ms / least:.1f}", f"{eager:.2f}" if eager else "",
                     f"{100 * figures['share_of_peak']:.0f} %", f"{figures['ratio']:.2f}" if "ratio" in figures else "",
                     f"{work['kernels']:,}" if "kernels" in work else "", f"{figures['memory_gib']:.1f}"])
    return rows


def table(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def versions(device):
    """Lines on the machine, the libraries and the code."""
    def said(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
        except OSError:
            return ""

    count = torch.cuda.device_count() if device.type == "cuda" else 1
    driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[:1]
    changed = " and what is not committed" if said("git", "status", "--porcelain", "--untracked-files=no") else ""
    return {"device": f"{count} x {describe_machine(device)['device']}", "torch": torch.__version__, "cuda": torch.version.cuda or "none",
            "driver": driver[0] if driver else "none", "commit": said("git", "rev-parse", "--short", "HEAD") + changed or "unknown"}


def ways_part(title, figures):
    heads = ["", "", "ms an image", "ratio", "difference"]
    rows = [[row["what"], row["way"], f"{row['ms_per_image']:.2f}", f"{row['ratio']:.2f}", f"{row['difference']:.0e}"] for row in figures["rows"]]
    return [f"## {title}", f"Images of {figures['img_size']} pixels; ratio to the first way of each.", table(heads, rows)]


def evaluation_part(figures):
    seconds = figures["seconds_per_image"]
    rows = [[stage, f"{1000 * value:.2f}", f"{value / sum(seconds.values()):.0%}"] for stage, value in seconds.items()]
    return ["## An evaluation", f"{figures['images_per_second']:.2f} images/s, features of {figures['feature_extractor']}.",
            table(["", "ms an image", "share"], rows)]


def memory_part(figures):
    rows = [[name, *(f"{one[key]:.1f}" for key in ("fixed_gib", "low_precision_weights_gib", "activations_gib"))]
            for name, one in figures.items() if one["what"] == "memory"]
    return ["## Memory of training, counted", "To hold against the GiB measured above, of the same batch.",
            table(["", "fixed, GiB", "low-precision weights, GiB", "activations, GiB"], rows)] if rows else []


def speed_part(found, gpu):
    peak = "as the matrix product beside it reaches" if gpu is None else f"at {gpu.reached / 1e12:.0f} TFLOP/s"
    heads = ["", "ms", "least", "times the least", "eager limit", "share", "plain", "kernels", "GiB"]
    rows = speed_rows(found, gpu)
    text = (f"Milliseconds an image. *Least*: the counted FLOP {peak}. *Eager limit*: what the counted bytes need when every operation reads "
            "and writes memory. *Share*: of the matrix product measured beside it. *Plain*: how often as long the plain way takes; "
            "*kernels*: of the eager way beside it. *GiB*: peak memory.")
    return ["## Training and sampling", text, table(heads, rows)] if rows else []


def stages_part(stages, left_out, found):
    """What was run, and the last lines of the checks and of what failed."""
    rows = [[stage.name, found[stage.name]["status"], f"{found[stage.name]['seconds']:.0f}"] if stage.name in found
            else [stage.name, "not run: no time was left", ""] for stage in stages]
    parts = ["## Stages", table(["", "", "s"], rows), *(f"Left out: {line}." for line in left_out)]
    for name, result in found.items():
        if result["status"] != "ok" or name.startswith("checks"):
            lines = "\n".join(result["last_lines"])
            parts += [f"### {name}: {result['status']}", f"`{shlex.join(shown(result['command'][1:]))}`", f"```\n{lines}\n```"]
    return parts


def write_report(args, device, stages, left_out, found):
    """The .md, whose path is returned, and the .json."""
    about, name = versions(device), describe_machine(device)["device"] if device.type == "cuda" else "cpu"
    gpu = next((gpu for key, gpu in flops.GPUS.items() if key in name), None)
    command = shlex.join(["bash", "scripts/gpu_report.sh", *shown(sys.argv[1:])])
    figures = {stage: result["figures"] for stage, result in found.items() if result["figures"]}
    parts = [f"# {name}", "\n".join(f"* {key}: {value}" for key, value in {**about, "command": f"`{command}`"}.items()), *speed_part(found, gpu)]
    for key, part in (("vae", partial(ways_part, "The VAE")), ("features", partial(ways_part, "Feature networks")), ("evaluate", evaluation_part)):
        parts += part(figures[key]) if key in figures else []
    parts += memory_part(figures) + stages_part(stages, left_out, found)
    path = Path(args.output) / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    write_bytes(without_places("\n\n".join(parts) + "\n").encode(), path.with_suffix(".md"))
    stored = {stage: {**result, "command": shown(result["command"][1:])} for stage, result in found.items()}
    write_json({**about, "stages": stored, "not_run": [stage.name for stage in stages if stage.name not in found], "left_out": left_out},
               path.with_suffix(".json"))
    return path.with_suffix(".md")


def shown(words):
    """Of a command: without what scripts/gpu_report.sh gives."""
    kept = list(words)
    for option in ("--checks", "--beside"):
        if option in kept:
            at = kept.index(option)
            del kept[at:at + 2]
    return kept


def main():
    args = parse_args()
    device = select_device(args.device)
    for folder in (args.output, args.store):
        check_output(Path(folder) / "report.json")
        make_directory(Path(folder))
    stages, left_out = plan(args, device)
    found = run_stages(stages, Path(args.store), args.minutes)
    path = write_report(args, device, stages, left_out, found)
    done = sum(not result["status"].startswith("cut off") for result in found.values())
    print(f"{done} of {len(stages)} stages are done; {path}" + ("" if done == len(stages) else ": the same command goes on"))


if __name__ == "__main__":
    run_main(main)
