"""Measure speed and memory on this machine's GPU: a report, <the GPU's name>.md and .json, in --store.

    bash scripts/gpu_report.sh --minutes 9

Each stage is a command of its own with a time limit. Its result is kept in --store: the same command runs the stages
that failed or are missing, and all of them after a change of code, torch or machine. A stage that fails is in the
report with its last lines, and the next one follows.
"""
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from models.settings import one_of
from util.cluster import run_main, select_device
from util.command_line import DEVICE, POSITIVE, REAL, Parser, as_type, list_of, path
from util.files import make_directory, read_json, write_bytes, write_json
from util.manifest import code_version, describe_machine

ROOT = Path(__file__).resolve().parents[1]
LAST_LINES = 12
SAMPLING = {  # as published; of the student that scripts/distill.py makes
    "flowar_small": "--cfg 4.3 --guidance 0.9 --num_step 25",
    "flowar_large": "--cfg 2.4 --guidance 0.9 --num_step 25",
    "flowar_huge": "--cfg 2.4 --guidance 0.7 --num_step 50",
    "flowar_tiny": "--cfg 3 --num_step 5"}
STUDENT = "--cfg 1 --time_grid uniform --num_step"


class Stage(NamedTuple):
    name: str
    command: list  # of python
    limit: int = 120  # seconds


def file_name(text):
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def parse_args():
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", type=as_type(DEVICE), default="auto", help="cpu: a trial run with small sizes")
    add("--minutes", type=as_type(REAL), default=9, help="a stage starts only if its limit fits into this time; the "
        "same command continues with the rest")
    add("--sizes", type=as_type(list_of(one_of(*SAMPLING))), default=tuple(SAMPLING)[:3], help="three models to "
        "measure")
    add("--batches", type=as_type(list_of(POSITIVE)), default=(1, 64, 256), help="three batch sizes")
    add("--extra", type=shlex.split, default=[], help="extra options for every benchmark, such as a small geometry")
    add("--store", type=as_type(path), default="output/gpu_report", help="folder for report and results")
    return parser.parse_args()


def list_stages(args, device):
    """Stages, the most important first; what one compiles is on disk for the others."""
    stages, on_cuda = [], device.type == "cuda"
    small, large, huge = (*args.sizes, *args.sizes[-1:] * 2)[:3]
    one, some, many = args.batches
    compiled = "--compile" if on_cuda else ""  # a rehearsal waits for no compiler

    def bench(what, size, batch, options, limit=90):
        batch_option = "--batch_size" if what == "train" else "--eval_bsz"
        command = (f"scripts/benchmark.py {what} --model {size} {batch_option} {batch} --device {device.type} "
                   f"--repeats 3 --precision bf16 {options}")
        name = f"{what} {size}, batch {batch} {options}".strip()
        if name not in [stage.name for stage in stages]:  # with fewer than three sizes some are equal
            stages.append(Stage(name, [*shlex.split(command), *args.extra], limit))

    if on_cuda:
        stages.append(Stage("checks", ["-m", "pytest", "-q", "-rs", "-n", "8", "tests/test_cuda.py"], 200))
    bench("train", small, some, compiled)
    bench("train", large, some, compiled, 120)
    for batch in (many, some, one):
        bench("sample", small, batch, f"{SAMPLING[small]} {compiled}")
    for steps in (2, 1):
        bench("sample", small, many, f"{STUDENT} {steps} {compiled}")
    bench("evaluate", small, many, f"{SAMPLING[small]} --num_images {2 * many} {compiled}", 150)
    for batch in (some, many, one):
        for size in (large, huge):
            bench("sample", size, batch, f"{SAMPLING[size]} {compiled}", 120)
    bench("train", small, many, compiled)
    bench("sample", small, many, f"{SAMPLING[small]} --precision fp16 {compiled}")
    bench("sample", small, one, f"{SAMPLING[small]} {'--compile graphs' if on_cuda else ''}")
    for what, options in (("train", ""), ("sample", SAMPLING[small])):
        bench(what, small, some, f"{options} --beside tests/plain.py", 150)
    return stages


def run_stage(stage, figures):
    """{command, status, seconds, last_lines, figures} of a stage. figures: a file that a benchmark may write. All of
    its processes end with it, so that none is busy while the next stage is timed.
    """
    start, command = time.monotonic(), [sys.executable, *stage.command]
    if "scripts/benchmark.py" in stage.command:
        command += ["--json", str(figures)]
    figures.unlink(missing_ok=True)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          start_new_session=True) as process:
        try:
            output, _ = process.communicate(timeout=stage.limit)
            status = f"failed with status {process.returncode}" if process.returncode else "ok"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, status = process.communicate()[0], f"not done after {stage.limit} s"
    lines = output.decode(errors="replace").replace(f"{ROOT}/", "").strip().splitlines()[-LAST_LINES:]
    return {"command": stage.command, "status": status, "seconds": time.monotonic() - start, "last_lines": lines,
            "figures": read_json(figures) if figures.is_file() else None}


def describe_setup(device):
    """What a result is of; with another one it is measured again."""
    return {"device": describe_machine(device)["device"], "devices": torch.cuda.device_count(),
            "torch": torch.__version__, "cuda": torch.version.cuda, "commit": code_version()}


def as_markdown(about, stages, results):
    """The report. results: {name of a stage: of run_stage}."""
    rows = ["| stage | status | s | ms an image | GFLOP an image | share | GiB | ratio |", "|---" * 8 + "|"]
    outputs = []
    for stage in stages:
        if stage.name not in results:
            rows.append(f"| {stage.name} | not run: no time was left |")
            continue
        result = results[stage.name]
        row = [stage.name, result["status"], f"{result['seconds']:.0f}"]
        figures = result["figures"] or {}
        if "share_of_peak" in figures:
            row += [f"{1000 / figures['images_per_second']:.2f}", f"{figures['gigaflop_per_image']:,.0f}",
                    f"{figures['share_of_peak']:.0%} of {figures['matmul_gigaflops']:,.0f}",
                    f"{figures['memory_gib']:.1f}"]
        if "ratio" in figures:
            row.append(f"{figures['ratio']:.2f}")
        parts = figures.get("seconds_per_image", {}).items()
        row += [", ".join(f"{part} {1000 * seconds:.2f}" for part, seconds in parts)] if parts else []
        rows.append(f"| {' | '.join(row)} |")
        if result["status"] != "ok" or stage.name == "checks":
            command, lines = shlex.join(result["command"]), "\n".join(result["last_lines"])
            outputs.append(f"### {stage.name}: {result['status']}\n\n`{command}`\n\n```\n{lines}\n```")
    words = ("*Share*: of the GFLOP/s of a matrix product beside it. *GiB*: peak memory. *Ratio*: time of the textbook "
             "form to this one's.")
    return "\n".join([*(f"* {name}: {value}" for name, value in about.items()), "", words, "", *rows, "", *outputs, ""])


def main():
    args = parse_args()
    device, end = select_device(args.device), time.monotonic() + 60 * args.minutes
    store = Path(args.store)
    make_directory(store)
    about = describe_setup(device)
    stages, results = list_stages(args, device), {}
    for stage in stages:
        file = store / f"{file_name(stage.name)}.json"
        before = read_json(file) if file.is_file() else {}
        same = before.get("command") == stage.command and before.get("about") == about
        if same:
            results[stage.name] = before
        if (not same or before["status"] != "ok") and time.monotonic() + stage.limit <= end:
            print(f"== {stage.name}", flush=True)
            result = results[stage.name] = {"about": about, **run_stage(stage, file.with_suffix(".figures"))}
            write_json(result, file)
            print(f"   {result['status']}, {result['seconds']:.0f} s", flush=True)
    path = store / file_name(about["device"])
    write_bytes(as_markdown(about, stages, results).encode(), path.with_suffix(".md"))
    write_json({**about, "stages": results}, path.with_suffix(".json"))
    left = "" if len(results) == len(stages) else ": run the same command to continue"
    print(f"{len(results)} of {len(stages)} stages are done; {path}.md{left}")


if __name__ == "__main__":
    run_main(main)
