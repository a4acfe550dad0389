"""Measure what the pages say of speed on this machine's GPU, and write docs/gpu/<the GPU's name>.md and .json.

    bash scripts/gpu_report.sh --minutes 30

Each stage is a command of its own with a time limit. Its result lies in --store, and the same command goes on with the
stages that have none: remove a stage's file to measure it again. A stage that fails is in the report with its last
lines, and the next one follows.
"""
import re
import shlex
import subprocess
import sys
import tempfile
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
PUBLISHED = {  # options of the published commands: of training, of sampling
    "flowar_small": ("", "--cfg 4.3 --guidance 0.9 --num_step 25"),
    "flowar_large": ("--use_checkpoint", "--cfg 2.4 --guidance 0.9 --num_step 25"),
    "flowar_huge": ("--use_checkpoint", "--cfg 2.4 --guidance 0.7 --num_step 50"),
    "flowar_tiny": ("", "--cfg 3 --num_step 5")}


class Stage(NamedTuple):
    name: str
    command: list  # of python
    limit: int = 120  # seconds


def file_name(text):
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def parse_args():
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", type=as_type(DEVICE), default="auto", help="cpu: a rehearsal, with small sizes")
    add("--minutes", type=as_type(REAL), default=10, help="stages that have not begun are left to the next command")
    add("--sizes", type=as_type(list_of(one_of(*PUBLISHED))), default=tuple(PUBLISHED)[:3], help="models")
    add("--batches", type=as_type(list_of(POSITIVE)), default=(64, 256, 1), help="images at once")
    add("--extra", type=shlex.split, default=[], help="options for every benchmark, such as a small geometry")
    add("--store", type=as_type(path), default="output/gpu_report", help="folder for what each stage measured")
    add("--output", type=as_type(path), default="docs/gpu", help="folder for the report")
    return parser.parse_args()


def list_stages(args, device):
    """Stages, the most important first."""
    stages, first, on_cuda = [], args.batches[0], device.type == "cuda"
    base, compiled = args.sizes[0], "--compile" * on_cuda  # a rehearsal waits for no compiler

    def bench(name, what, size, options, limit=120):
        command = f"scripts/benchmark.py {what} --model {size} --device {device.type} --repeats 3 {options}"
        stages.append(Stage(name, [*shlex.split(command), *args.extra], limit))

    def train_and_sample(size, batch, options):
        training, sampling = PUBLISHED[size]
        bench(f"train {size}, batch {batch} {options}", "train", size,
              f"{training} --batch_size {batch} --precision bf16 {options}")
        bench(f"sample {size}, batch {batch} {options}", "sample", size,
              f"{sampling} --eval_bsz {batch} --precision bf16 {options}")

    if on_cuda:
        stages.append(Stage("checks", ["-m", "pytest", "-q", "-rs", "-n", "4", "tests/test_cuda.py"], 480))
    for size in args.sizes:
        train_and_sample(size, first, compiled)
    _, sampling = PUBLISHED[base]
    bench("evaluate", "evaluate", base,
          f"{sampling} --eval_bsz {first} --num_images {2 * first} --precision bf16 {compiled}", 240)
    for size in args.sizes:
        for batch in args.batches[1:]:
            train_and_sample(size, batch, compiled)
        train_and_sample(size, first, "--beside tests/plain.py")
    return stages


def run_stage(stage):
    """{command, status, seconds, last_lines, figures} of a stage."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures, command = Path(folder) / "figures.json", [sys.executable, *stage.command]
        if "scripts/benchmark.py" in stage.command:
            command += ["--json", str(figures)]
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  timeout=stage.limit)
            output, status = done.stdout, f"failed with status {done.returncode}" if done.returncode else "ok"
        except subprocess.TimeoutExpired as error:
            output, status = error.stdout or b"", f"not done after {stage.limit} s"
        figures = read_json(figures) if figures.is_file() else None
    lines = output.decode(errors="replace").replace(f"{ROOT}/", "").strip().splitlines()[-LAST_LINES:]
    return {"command": stage.command, "status": status, "seconds": time.monotonic() - start, "last_lines": lines,
            "figures": figures}


def as_markdown(about, stages, results):
    """The report. results: {name of a stage: of run_stage} of those that have run."""
    speed = ["| | ms an image | GFLOP an image | GFLOP/s of a matrix product | share | GiB | ratio |", "|---" * 7 + "|"]
    evaluation, runs, outputs = ["| | ms an image |", "|---|---|"], ["| | | s |", "|---|---|---|"], []
    for stage in stages:
        if stage.name not in results:
            runs.append(f"| {stage.name} | not run: no time was left | |")
            continue
        result = results[stage.name]
        runs.append(f"| {stage.name} | {result['status']} | {result['seconds']:.0f} |")
        if result["status"] != "ok" or stage.name == "checks":
            command, lines = shlex.join(result["command"]), "\n".join(result["last_lines"])
            outputs.append(f"### {stage.name}: {result['status']}\n\n`{command}`\n\n```\n{lines}\n```")
        figures = result["figures"] or {}
        if "share_of_peak" in figures:
            ratio = f"{figures['ratio']:.2f}" if "ratio" in figures else ""
            speed.append(f"| {stage.name} | {1000 / figures['images_per_second']:.2f} | "
                         f"{figures['gigaflop_per_image']:,.0f} | {figures['matmul_gigaflops']:,.0f} | "
                         f"{figures['share_of_peak']:.0%} | {figures['memory_gib']:.1f} | {ratio} |")
        for part, seconds in figures.get("seconds_per_image", {}).items():
            evaluation.append(f"| {part} | {1000 * seconds:.2f} |")
    heads = [f"# {about['device']}", *(f"* {name}: {value}" for name, value in about.items()), ""]
    words = ("*Share*: of the matrix product measured beside it. *GiB*: peak memory. *Ratio*: time of the plain "
             "implementation to this one's.")
    return "\n".join([*heads, words, "", "## Training and sampling", "", *speed, "",
                      "## An evaluation", "", *evaluation, "", "## Stages", "", *runs, "", *outputs, ""])


def main():
    args = parse_args()
    device, end = select_device(args.device), time.monotonic() + 60 * args.minutes
    store, output = Path(args.store), Path(args.output)
    make_directory(store)
    make_directory(output)
    stages, results = list_stages(args, device), {}
    for stage in stages:
        file = store / f"{file_name(stage.name)}.json"
        if file.is_file() and (before := read_json(file))["command"] == stage.command:
            results[stage.name] = before
        elif time.monotonic() < end:
            print(f"== {stage.name}", flush=True)
            results[stage.name] = run_stage(stage)
            write_json(results[stage.name], file)
            print(f"   {results[stage.name]['status']}, {results[stage.name]['seconds']:.0f} s", flush=True)
    about = {"device": describe_machine(device)["device"], "devices": torch.cuda.device_count(),
             "torch": torch.__version__, "cuda": torch.version.cuda, "commit": code_version()}
    path = output / file_name(about["device"])
    write_bytes(as_markdown(about, stages, results).encode(), path.with_suffix(".md"))
    write_json({**about, "stages": results}, path.with_suffix(".json"))
    left = "" if len(results) == len(stages) else ": the same command goes on"
    print(f"{len(results)} of {len(stages)} stages are done; {path}.md{left}")


if __name__ == "__main__":
    run_main(main)
