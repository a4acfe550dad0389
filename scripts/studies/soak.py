"""Train for some minutes while everything goes wrong, and compare the weights with those of an undisturbed run.

    python scripts/studies/soak.py --minutes 15 --output output/soak

Two processes under torchrun train FlowAR-tiny on scikit-learn's digits, with dropout, a checkpoint every 20 steps and data workers. Every few
seconds one thing happens: a rank or all of them are killed (SIGKILL), a rank is asked to leave (SIGUSR1), or the launcher (SIGTERM), the disk
fills up, or the newest checkpoint is torn or has a bit flipped. The same command is then run again. In the end weights, EMA, optimizer state
and logged losses must be those of a run that was left alone, bit by bit; the figures go to <output>/soak.json.

Filling the disk needs the right to mount a small one (root); without it that is left out, and said.
"""
import argparse
import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import project_root  # noqa: F401

import torch

from scripts.studies.runs import assert_same_run, finish, make_project, ranks_of, read_checkpoint, run, start, training_command
from models import FlowARError
from util.cluster import run_main
from util.files import make_directory, write_bytes, write_json
from util.training.logging import read_lines
from util.options import count, positive
from util.training import checkpoint

PROCESSES, SAVE_EVERY, KEEP, DISK = 2, 20, 2, "130m"  # a checkpoint has 26 MB
LIFE = (1.0, 10.0)  # seconds of training before something happens
DISASTERS = ("kill a rank", "kill all", "ask a rank to leave", "stop the launcher", "fill the disk", "tear the checkpoint")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=positive, default=15, help="of disturbance; then the run is left to end")
    parser.add_argument("--epochs", type=positive, default=60, help="of 50 steps; enough that the run does not end before")
    parser.add_argument("--output", default="output/soak", help="folder for everything")
    parser.add_argument("--seed", type=count, default=0, help="of what happens when")
    return parser.parse_args()


def command(project, output, epochs):
    return training_command(project, output, f"--epochs {epochs} --batch_size 8 --save_every {SAVE_EVERY} --keep {KEEP} --log_freq 1 --num_workers 1 "
                            f"--attn_dropout 0.2 --proj_dropout 0.2 --timeout 10 --resume {output}")


class Disk:
    """A small disk of its own for a folder, where one can be mounted."""

    def __init__(self, folder):
        self.folder = folder
        make_directory(folder)
        self.mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", folder], capture_output=True).returncode == 0

    def fill(self):
        with contextlib.suppress(OSError), open(self.folder / "filler", "wb", buffering=0) as file:
            while file.write(bytes(1 << 20)):
                pass

    def free(self):
        (self.folder / "filler").unlink(missing_ok=True)

    def remove(self):
        if self.mounted:
            subprocess.run(["umount", "-l", self.folder])


def reached(output):
    """The last step in the log, 0 without one."""
    log = output / "log.jsonl"
    return max((line["step"] for line in read_lines(log) if line["group"] == "train"), default=0) if log.is_file() else 0


def wait_for_progress(process, output, seconds):
    """Until the run has trained for so long since it began to, or has ended."""
    began, first = None, reached(output)
    while process.poll() is None and (began is None or time.monotonic() - began < seconds):
        if began is None and reached(output) != first:
            began = time.monotonic()
        time.sleep(0.1)


def kill(pid, number=signal.SIGKILL):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def strike(what, process, disk, output, rng):
    """Let one thing happen; returns (exit status, output) of the run."""
    ranks = ranks_of(process)
    if what == "kill a rank" and ranks:
        kill(rng.choice(ranks))
    elif what == "ask a rank to leave" and ranks:
        kill(rng.choice(ranks), signal.SIGUSR1)
    elif what == "stop the launcher":
        kill(process.pid, signal.SIGTERM)
    elif what == "fill the disk":
        disk.fill()
    else:
        for pid in (process.pid, *ranks):
            kill(pid)
    ended = finish(process)
    disk.free()
    kept = checkpoint.numbered(output)
    if what == "tear the checkpoint" and len(kept) > 1:
        os.truncate(kept[0], rng.randrange(kept[0].stat().st_size))
    return ended


def soak(args):
    folder, rng = Path(args.output).resolve(), random.Random(args.seed)
    if folder.exists():
        raise FlowARError(f"--output {folder}: is there already; remove it or choose another")
    project = make_project(folder / "project", per_class=80)
    disk = Disk(folder / "disk")
    output = disk.folder / "run"
    began = time.monotonic()
    run(command(project, folder / "undisturbed", args.epochs), processes=PROCESSES, timeout=3600)
    alone = time.monotonic() - began
    possible = [what for what in DISASTERS if what != "fill the disk" or disk.mounted]
    happened, statuses, lost, end, ended = collections.Counter(), collections.Counter(), [], time.monotonic() + 60 * args.minutes, False
    began = time.monotonic()
    while not ended:
        before = reached(output)
        process = start(command(project, output, args.epochs), PROCESSES)
        disturbed = time.monotonic() < end
        wait_for_progress(process, output, rng.uniform(*LIFE) if disturbed else 1e9)
        ended = process.poll() is not None
        what = rng.choice(possible)
        status, said = finish(process) if ended else strike(what, process, disk, output, rng)
        if ended and status != 0:
            write_bytes(said.encode(), folder / "output.txt")
            raise FlowARError(f"the run ended by itself with status {status}: {folder}/output.txt is what it said")
        if before and (going_on := [line for line in said.splitlines() if "resumes at step" in line]):
            lost.append(before - int(going_on[0].split("resumes at step ")[1].split(",")[0]))
        if not ended:
            happened[what] += 1
            statuses[status] += 1
            print(f"{time.monotonic() - began:5.0f} s, step {reached(output)}: {what}; status {status}", flush=True)
    return {"minutes": (time.monotonic() - began) / 60, "minutes_undisturbed": alone / 60, "steps": read_checkpoint(output)["progress"]["step"],
            "lives": sum(happened.values()) + 1, "happened": dict(happened), "exit_statuses": dict(statuses), "disk_filled": disk.mounted,
            "steps_lost": sum(lost), "steps_lost_at_most": max(lost, default=0), "left_over": [path.name for path in output.glob("*.tmp")],
            "bytes_lost": different_bytes(output, folder / "undisturbed"), "same_log": same_run(output, folder / "undisturbed")}, disk


def different_bytes(found, expected):
    """Bytes of weights, EMA and optimizer state that differ."""
    total = 0
    a, b = read_checkpoint(found), read_checkpoint(expected)
    pairs = [(a[key][name], b[key][name]) for key in ("model", "model_ema") for name in b[key]]
    pairs += [(a["optimizer"]["state"][n][name], state[name]) for n, state in b["optimizer"]["state"].items() for name in state]
    for x, y in pairs:
        total += int((x.flatten().view(torch.uint8) != y.flatten().view(torch.uint8)).sum())
    return total


def same_run(found, expected):
    try:
        assert_same_run(found, expected)
        return True
    except AssertionError:
        return False


def main():
    args = parse_args()
    result, disk = soak(args)
    write_json(result, Path(args.output) / "soak.json")
    disk.remove()
    print(json.dumps(result, indent=2))
    if result["bytes_lost"] or not result["same_log"]:
        raise FlowARError(f"{args.output}: the disturbed run did not end as the undisturbed one")


if __name__ == "__main__":
    run_main(main)
