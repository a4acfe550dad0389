"""How programs end: signals are noted or end a report, errors are one line, data workers end with their rank alone."""
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, finish, make_project, read_checkpoint, training_command, wait_for

from util import cluster
from util.cluster import stopping


@pytest.fixture(autouse=True)
def default_handlers():
    """As at the start of a program: SIGINT is ignored where the tests run in the background."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in cluster.STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", cluster.STOP_SIGNALS)
def test_a_signal_is_noted(number):
    with cluster.stop_signals() as signals:
        assert not signals.asked
        signal.raise_signal(number)
        assert signals.asked and signals.status == (130 if number == signal.SIGINT else cluster.RESTART)
    assert signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.parametrize("before", [True, False])
def test_a_signal_before_or_in_a_report_ends_it(before):
    with cluster.stop_signals() as signals:
        if before:
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(cluster.Preempted, match="saved after step 5 .exit status 75.") as ended, signals.at_once("saved after step 5"):
            assert not before
            signal.raise_signal(signal.SIGTERM)
        assert ended.value.status == cluster.RESTART == 75
        signal.raise_signal(signal.SIGTERM)  # after it, it is noted again


def test_signals_that_were_ignored_stay_so():
    ignored = signal.SIGHUP, signal.SIGINT  # by nohup, by a shell in the background
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    with cluster.stop_signals() as signals:
        for number in ignored:
            signal.raise_signal(number)
        assert not signals.asked
    assert all(signal.getsignal(number) == signal.SIG_IGN for number in ignored)


ENDS = """
import os, signal, time
import torch
from models import FlowARError
from util import cluster
from util.command_line import Parser
from util.data import build_loader

class Torn(torch.utils.data.Dataset):
    __len__ = lambda self: 4

    def __getitem__(self, key):
        raise FlowARError("torn.png: cannot be read")

def ctrl_c_twice():
    with cluster.stop_signals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.asked
        signal.raise_signal(signal.SIGINT)

def ctrl_c_before_training():
    signal.raise_signal(signal.SIGINT)

def refused():
    raise FlowARError("--lr: is too large")

def refused_on_another_rank():
    os.environ.update(RANK="1", LOCAL_RANK="1")
    refused()

def wrong_option_on_another_rank():
    os.environ.update(RANK="1", LOCAL_RANK="1")
    Parser("").parse_args(["--no_such_option"])

def torn_image():
    next(iter(build_loader(Torn(), 1, num_workers=1)))

def left():
    raise cluster.Preempted("saved after step 5")

def defect():
    raise ValueError("a defect")

signal.signal(signal.SIGINT, signal.default_int_handler)
for end in (ctrl_c_twice, ctrl_c_before_training, refused, refused_on_another_rank,
            wrong_option_on_another_rank, torn_image, left, defect, lambda: None):
    if os.fork() == 0:
        cluster.run_main(end)
        raise SystemExit
    print("status", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_how_a_program_ends():
    done = subprocess.run([sys.executable, "-c", ENDS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["status -2", "status 130", "status 2", "status 2", "status 2", "status 2",
                                        "saved after step 5 (exit status 75)", "status 75", "status 1", "status 0"], done
    lines = [line for line in done.stderr.splitlines() if line]
    assert lines[:4] == ["interrupted: saving; press Ctrl-C again to quit at once", "interrupted", "error: --lr: is too large",
                         "error: torn.png: cannot be read"]
    assert lines[4].startswith("Traceback") and lines[-1] == "ValueError: a defect"


# ---- data workers ----------------------------------------------------------------------------------------------

RANK = """
import multiprocessing, sys, time
from torch.utils.data import Dataset
from util import cluster
from util.data import build_loader

class Items(Dataset):
    classes = []
    __len__ = lambda self: 20
    __getitem__ = lambda self, key: key[1]

def main():
    loader = build_loader(Items(), 1, train=True, num_workers=1)
    batches = iter(loader)
    next(batches)
    with cluster.stop_signals() as signals:
        print("ready", flush=True)
        sys.stdin.readline()
        time.sleep(0.1)  # another thread may have met the signal
        print(signals.asked, len(list(batches)), flush=True)
        sys.stdin.read()

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    main()
"""


@pytest.mark.parametrize("method", ["fork", "forkserver"])  # the default on Linux until Python 3.13, and from 3.14
def test_workers_outlive_signals_and_end_with_their_rank(tmp_path, method):
    (tmp_path / "rank.py").write_text(RANK)
    process = subprocess.Popen([sys.executable, tmp_path / "rank.py", method], env={**os.environ, "PYTHONPATH": str(ROOT)},
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "ready\n"
    for number in cluster.STOP_SIGNALS[2:]:  # a Ctrl-C would end the rank at the next SIGTERM
        os.killpg(process.pid, number)
    os.killpg(process.pid, signal.SIGTERM)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "True 19\n"
    members = ["pgrep", "-g", str(process.pid)]
    assert len(subprocess.run(members, capture_output=True, text=True).stdout.split()) >= 2
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while subprocess.run(members, capture_output=True).stdout and time.monotonic() < end:
        time.sleep(0.1)
    assert not subprocess.run([*members, "-a"], capture_output=True, text=True).stdout


def test_text_for_a_reader_that_is_gone_ends_no_run():
    reader, writer = os.pipe()
    os.close(reader)
    output = stopping.Output(open(writer, "w"))
    assert output.write(100_000 * "x") == 100_000 and output.flush() is None and output.fileno() == writer


# ---- SLURM -----------------------------------------------------------------------------------------------------

SRUN = """#!/bin/sh
while [ "$1" != bash ]; do shift; done
SLURM_PROCID=9 SLURM_LOCALID=1 SLURM_NTASKS=16 "$@"
"""
SCONTROL = '#!/bin/sh\n[ "$1" = requeue ] && echo "$@" >> "$REQUEUED" || printf "a1\\na2\\n"\n'
PROGRAM = '#!/bin/sh\nenv > "$ENV"\necho "$@" >> "$ENV"\n[ -z "$SAVES" ] || touch "$HOME/out/checkpoint-00000000$SAVES.pth"\nexit $STATUS\n'


def test_slurm_counts_failures_in_a_row_and_tells_ranks_who_they_are(tmp_path):
    """However often the job was queued before; tasks get the CPUs that the job asked for."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("program", PROGRAM)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    out, environment = tmp_path / "out", {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "a", "OUTPUT": "~/out", "HOME": str(tmp_path),
        "REQUEUED": str(tmp_path / "requeued"), "SLURM_RESTART_COUNT": "80", "SLURM_CPUS_PER_TASK": "12", "MAX_FAILURES": "2", "ENV": str(tmp_path / "env"),
        "PYTHON": str(tmp_path / "program")}

    def is_queued_again(status, saves=""):
        (tmp_path / "requeued").unlink(missing_ok=True)
        done = subprocess.run(["bash", str(ROOT / "scripts" / "slurm.sh"), "--epochs", "3"], env={**environment, "STATUS": str(status), "SAVES": saves})
        assert done.returncode == status
        return (tmp_path / "requeued").exists() and (tmp_path / "requeued").read_text() == "requeue 4711\n"

    ends = [(1,), (75, "1"), (1, "2"), (1,), (75,), (2,), (75,), (0,), (1,)]  # status, and the step of a checkpoint, whose link there may not be
    assert [is_queued_again(*end) for end in ends] == [True, True, True, True, False, False, True, False, True]
    *variables, command = (tmp_path / "env").read_text().splitlines()
    expected = {"SRUN_CPUS_PER_TASK=12", "RANK=9", "LOCAL_RANK=1", "WORLD_SIZE=16", "MASTER_ADDR=a1", "MASTER_PORT=24711"}
    assert expected <= set(variables) and command.startswith("main_flowar.py ") and command.endswith("--epochs 3") and f"--resume {out} " in command


SRUN_OF_TWO = """#!/usr/bin/env python3
import os, signal, subprocess, sys
command = sys.argv[sys.argv.index("bash"):]
tasks = [subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(r), "SLURM_LOCALID": str(r), "SLURM_NTASKS": "2"}) for r in range(2)]
signal.signal(signal.SIGUSR1, lambda *_: [t.send_signal(signal.SIGUSR1) for t in tasks])
open(os.environ["SRUN_PID"], "w").write(str(os.getpid()))
sys.exit(max(t.wait() % 256 for t in tasks))
"""


@pytest.mark.slow
def test_slurm_script(tmp_path):
    """With stand-ins for srun and scontrol: a warning makes both ranks save, the job is queued again, and resumes."""
    for name, text in (("srun", SRUN_OF_TWO), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    options = training_command(make_project(tmp_path / "project"), tmp_path / "out", "--epochs 16 --save_every 5 --batch_size 8 --global_batch 16")
    options += " --precision fp32 --model flowar_tiny --diffloss_d 3 --diffloss_w 128 --patch_size 1"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711", "MASTER_ADDR": "127.0.0.1",
                   "SLURM_SUBMIT_DIR": str(ROOT), "OUTPUT": str(tmp_path / "out"), "SRUN_PID": str(tmp_path / "pid"),
                   "REQUEUED": str(tmp_path / "requeued"), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def submit(*words):
        return subprocess.Popen(["bash", str(ROOT / "scripts" / "slurm.sh"), *words], env=environment, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True, start_new_session=True)

    job = submit(*options.split()[1:])
    wait_for(tmp_path / "out" / "checkpoint-000000010.pth", job)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGUSR1)
    status, output = finish(job)
    assert status == 75 and (tmp_path / "requeued").read_text() == "requeue 4711\n", output
    assert 10 <= read_checkpoint(tmp_path / "out")["progress"]["step"] < 80
    status, output = finish(submit(*options.split()[1:]))
    assert status == 0 and "resumes from step" in output and read_checkpoint(tmp_path / "out")["progress"]["epoch"] == 16, output
    status, output = finish(submit("--no_such_option"))
    assert status == 2 and (tmp_path / "requeued").read_text() == "requeue 4711\n", output
