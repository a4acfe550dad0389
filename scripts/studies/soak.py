"""Train for some minutes while everything goes wrong, and compare the weights with those of an undisturbed run.

    python scripts/studies/soak.py --minutes 15 --output output/soak

Two processes under torchrun train FlowAR-tiny on scikit-learn's digits, with dropout, a checkpoint every 20 steps and
data workers. Every few seconds a rank or all of them are killed (SIGKILL), a rank gets SIGUSR1 or the launcher SIGTERM,
or the newest checkpoint is cut short. The same command is then run again. In the end weights, EMA, optimizer state and
logged losses must be those of the undisturbed run, bit by bit; the figures go to <output>/soak.json.
"""
import collections
import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

from models import FlowARError
from scripts.studies.runs import assert_same_run, finish, make_project, ranks_of, start, training_command
from util.cluster import run_main
from util.command_line import Parser, as_type, path
from util.files import write_bytes, write_json
from util.training import checkpoint
from util.training.logging import read_lines

PROCESSES = 2
LIFE = (1.0, 10.0)  # seconds of training before something happens


def parse_args():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15, help="of disturbance; then the run is left to end")
    parser.add_argument("--epochs", type=int, default=60, help="of 50 steps; enough that the run does not end before")
    parser.add_argument("--output", type=as_type(path), default="output/soak", help="folder for everything, new")
    parser.add_argument("--seed", type=int, default=0, help="of what happens when")
    return parser.parse_args()


def command(project, output, epochs):
    return training_command(project, output, f"--epochs {epochs} --batch_size 8 --save_every 20 --keep 2 --log_freq 1 "
                            f"--num_workers 1 --attn_dropout 0.2 --proj_dropout 0.2 --timeout 10 --resume {output}")


def last_step(output):
    """In the log, 0 without one."""
    log = output / "log.jsonl"
    lines = read_lines(log) if log.is_file() else ()
    return max((line["step"] for line in lines if line["group"] == "train"), default=0)


def wait_for_progress(process, output, seconds):
    """Until the run has trained for so long since it began to, or has ended."""
    start_time, first = None, last_step(output)
    while process.poll() is None and (start_time is None or time.monotonic() - start_time < seconds):
        if start_time is None and last_step(output) != first:
            start_time = time.monotonic()
        time.sleep(0.1)


def kill(pid, number=signal.SIGKILL):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def strike(what, process, output, rng):
    """Let one thing happen; returns (exit status, output) of the run."""
    ranks = ranks_of(process)
    if what == "kill a rank" and ranks:
        kill(rng.choice(ranks))
    elif what == "stop a rank" and ranks:
        kill(rng.choice(ranks), signal.SIGUSR1)
    elif what == "stop the launcher":
        kill(process.pid, signal.SIGTERM)
    else:
        for pid in (process.pid, *ranks):
            kill(pid)
    result = finish(process)
    kept = checkpoint.list_numbered(output)
    if what == "cut the checkpoint" and len(kept) > 1:
        os.truncate(kept[0], rng.randrange(kept[0].stat().st_size))
    return result


def main():
    args = parse_args()
    folder, rng = Path(args.output).resolve(), random.Random(args.seed)
    folder.mkdir(parents=True)
    project, output = make_project(folder / "project", per_class=80), folder / "run"
    status, text = finish(start(command(project, folder / "undisturbed", args.epochs), PROCESSES), timeout=3600)
    assert status == 0, text
    events, statuses, start_time, ended = collections.Counter(), collections.Counter(), time.monotonic(), False
    while not ended:
        process = start(command(project, output, args.epochs), PROCESSES)
        disturbed = time.monotonic() - start_time < 60 * args.minutes
        wait_for_progress(process, output, rng.uniform(*LIFE) if disturbed else 1e9)
        ended = process.poll() is not None
        what = rng.choice(("kill a rank", "kill all", "stop a rank", "stop the launcher", "cut the checkpoint"))
        status, text = finish(process) if ended else strike(what, process, output, rng)
        if ended and status != 0:
            write_bytes(text.encode(), folder / "output.txt")
            raise FlowARError(f"the run exited early with status {status}: see {folder}/output.txt")
        if not ended:
            events[what] += 1
            statuses[status] += 1
            print(f"{time.monotonic() - start_time:5.0f} s, step {last_step(output)}: {what}; status {status}",
                  flush=True)
    result = {"minutes": (time.monotonic() - start_time) / 60, "steps": last_step(output), "events": events,
              "exit_statuses": statuses, "temporary_files": [path.name for path in output.glob("*.tmp")]}
    print(json.dumps(result, indent=2))
    write_json(result, folder / "soak.json")
    assert_same_run(output, folder / "undisturbed")


if __name__ == "__main__":
    run_main(main)
