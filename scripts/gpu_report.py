"""Measure what the pages say of speed on this machine's GPU, and write docs/gpu/<the GPU's name>.md and .json.

    bash scripts/gpu_report.sh --minutes 30

Each stage is a command of its own with a time limit. Its result lies in --store, and the same command goes on with the stages that have none:
remove a stage's file to measure it again. A stage that fails is in the report with its last lines, and the next one follows.
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
from util.files import make_directory, read_json, write_bytes, write_json
from util.manifest import code_version, describe_machine
from util.command_line import POSITIVE, REAL, Parser, as_type, list_of

ROOT = Path(__file__).resolve().parents[1]

LAST_LINES = 12
PUBLISHED = {  # options of the published commands: of training, of sampling
    "flowar_small": ("", "--cfg 4.3 --guidance 0.9 --num_step 25"),
    "flowar_large": ("--use_checkpoint", "--cfg 2.4 --guidance 0.9 --num_step 25"),
    "flowar_huge": ("--use_checkpoint", "--cfg 2.4 --guidance 0.7 --num_step 50"),
    "flowar_tiny": ("", "--cfg 3 --num_step 5")}


class Stage(NamedTuple):
    name: str
    command: list
    limit: int = 120  # seconds

    @property
    def file(self):
        return re.sub(r"[^a-z0-9]+", "-", self.name) + ".json"


def parse_args():
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="cpu: a rehearsal, with small sizes")
    add("--minutes", type=as_type(REAL), default=10, help="stages that do not begin within are left to the next command")
    add("--sizes", type=as_type(list_of(one_of(*PUBLISHED))), default=("flowar_small", "flowar_large", "flowar_huge"), help="models")
    add("--batches", type=as_type(list_of(POSITIVE)), default=(64, 256, 1), help="images at once, the most important first")
    add("--repeats", type=as_type(POSITIVE), default=3, help="timings of each benchmark")
    add("--extra", type=shlex.split, default=[], help="options for every benchmark, such as a small geometry")
    add("--store", type=Path, default="output/gpu_report", help="folder for what each stage measured")
    add("--output", type=Path, default="docs/gpu", help="folder for the report")
    return parser.parse_args()


def plan(args, device):
    """Stages, the most important first."""
    stages, first, on_cuda = [], args.batches[0], device.type == "cuda"
    compiled = "--compile" if on_cuda else ""  # a rehearsal waits for no compiler

    def bench(name, what, size, options, limit=120):
        command = f"scripts/benchmark.py {what} --model {size} --device {device.type} --repeats {args.repeats} {options}"
        stages.append(Stage(name, [*shlex.split(command), *args.extra], limit))

    def train_and_sample(size, batch, options):
        for what, published, of_batch in zip(("train", "sample"), PUBLISHED[size], ("--batch_size", "--eval_bsz")):
            bench(f"{what} {size}, batch {batch} {options}", what, size, f"{published} {of_batch} {batch} --precision bf16 {options}")

    if on_cuda:
        stages.append(Stage("checks", ["-m", "pytest", "-q", "-rs", "-n", "4", "tests/test_cuda.py"], 480))
    for size in args.sizes:
        train_and_sample(size, first, compiled)
    base = args.sizes[0]
    bench("vae", "vae", base, "--batch_size 8" if on_cuda else "--batch_size 2")
    bench("features", "features", base, f"--batch_size {first} {compiled}", 240)
    bench("evaluate", "evaluate", base, f"{PUBLISHED[base][1]} --eval_bsz {first} --num_images {2 * first} --precision bf16 {compiled}", 240)
    for size in args.sizes:
        bench(f"memory {size}", "memory", size, f"{PUBLISHED[size][0]} --batch_size {first} --precision bf16")
    for size in args.sizes:
        for batch in args.batches[1:]:
            train_and_sample(size, batch, compiled)
        train_and_sample(size, first, "--beside tests/plain.py")
    return stages


def run_stage(stage):
    """{command, status, seconds, last_lines, figures} of a stage."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        command = [sys.executable, *stage.command, *(["--json", str(figures)] if "scripts/benchmark.py" in stage.command else [])]
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=stage.limit)
            output, status = done.stdout, f"failed with status {done.returncode}" if done.returncode else "ok"
        except subprocess.TimeoutExpired as error:
            output, status = error.stdout or b"", f"not done after {stage.limit} s"
        figures = read_json(figures) if figures.is_file() else None
    lines = output.decode(errors="replace").replace(f"{ROOT}/", "").strip().splitlines()[-LAST_LINES:]
    return {"command": stage.command, "status": status, "seconds": time.monotonic() - start, "last_lines": lines, "figures": figures}


def run_stages(stages, store, minutes):
    """{name: result} of the stages that are done: of those before from the store, of the others while there is time."""
    end, results = time.monotonic() + 60 * minutes, {}
    for stage in stages:
        file = store / stage.file
        if file.is_file() and (before := read_json(file))["command"] == stage.command:
            results[stage.name] = before
        elif time.monotonic() < end:
            print(f"== {stage.name}", flush=True)
            results[stage.name] = run_stage(stage)
            write_json(results[stage.name], file)
            print(f"   {results[stage.name]['status']}, {results[stage.name]['seconds']:.0f} s", flush=True)
    return results


# ---- the report ------------------------------------------------------------------------------------------------


def table(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def report(about, stages, results):
    """Markdown."""
    speed, ways, rest = [], [], []
    for name, figures in ((name, result["figures"] or {}) for name, result in results.items()):
        if "share_of_peak" in figures:
            speed.append([name, f"{1000 / figures['images_per_second']:.2f}", f"{figures['gigaflop_per_image']:,.0f}", f"{figures['matmul_gigaflops']:,.0f}",
                          f"{figures['share_of_peak']:.0%}", f"{figures['ratio']:.2f}" if "ratio" in figures else "", f"{figures['memory_gib']:.1f}"])
        elif "rows" in figures:
            ways += [[row["what"], row["way"], f"{row['ms_per_image']:.2f}", f"{row['ratio']:.2f}", f"{row['difference']:.0e}"] for row in figures["rows"]]
        elif figures:
            rest += [[name, key, f"{value:.2f}"] for key, value in {**figures, **figures.get("seconds_per_image", {})}.items() if isinstance(value, float)]
    runs = [[stage.name, results[stage.name]["status"], f"{results[stage.name]['seconds']:.0f}"] if stage.name in results
            else [stage.name, "not run: no time was left", ""] for stage in stages]
    parts = [f"# {about['device']}", "\n".join(f"* {key}: {value}" for key, value in about.items()), "## Training and sampling",
             "*Share*: of the matrix product measured beside it. *Ratio*: time of the plain way to this one's. *GiB*: peak memory.",
             table(["", "ms an image", "GFLOP an image", "GFLOP/s of the matrix product", "share", "ratio", "GiB"], speed),
             "## The VAE and feature networks", "Ratio: to the first way of each.", table(["", "", "ms an image", "ratio", "difference"], ways),
             "## An evaluation; memory of training, counted", table(["", "", ""], rest), "## Stages", table(["", "", "s"], runs)]
    for name, result in results.items():
        if result["status"] != "ok" or name == "checks":
            parts.append("\n".join([f"### {name}: {result['status']}", "", f"`{shlex.join(result['command'])}`", "", "```", *result["last_lines"], "```"]))
    return "\n\n".join(parts) + "\n"


def main():
    args = parse_args()
    device = select_device(args.device)
    make_directory(args.store)
    make_directory(args.output)
    stages = plan(args, device)
    results = run_stages(stages, args.store, args.minutes)
    about = {"device": describe_machine(device)["device"], "devices": torch.cuda.device_count(), "torch": torch.__version__,
             "cuda": torch.version.cuda, "commit": code_version()}
    path = args.output / re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    write_bytes(report(about, stages, results).encode(), path.with_suffix(".md"))
    write_json({**about, "stages": results}, path.with_suffix(".json"))
    print(f"{len(results)} of {len(stages)} stages are done; {path}.md" + ("" if len(results) == len(stages) else ": the same command goes on"))


if __name__ == "__main__":
    run_main(main)
