"""Ranks: what they share, an error of one or of all, a restart, a rank or a launcher that dies."""
import os
import re
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
from helpers import finish, ranks_of, run, start, wait_for

from models import FlowARError
from util.cluster import processes

# Under torchrun: rank 1 has an error of its own at the first start, then all is well, until the launcher is killed. Without: rank 0 has one for all.
RANKS = """
import os, time
import torch
from models import FlowARError
from util import cluster

def refuse(message):
    raise FlowARError(message)

def main():
    assert cluster.init("cpu") == torch.device("cpu")
    rank, attempt = cluster.rank(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "none")
    print(f"start {{attempt}}", flush=True)
    if attempt == "0":
        cluster.barrier()  # both have joined and printed
        if rank == 1:
            refuse("a disk of rank 1 alone")
        cluster.barrier()
    if attempt == "none":
        cluster.from_main(lambda: refuse("a folder of all"))
    assert cluster.from_main(lambda: rank + 5) == 5
    assert cluster.gather_to_main([rank]) == ([[0], [1]] if rank == 0 else None)
    assert cluster.all_reduce_sum(torch.tensor([1.0 + rank])).item() == 3
    with cluster.first_on_host():
        if rank == 0:
            open("made", "w").close()
        assert os.path.exists("made")
    cluster.agree("the first epoch", 3)
    try:
        cluster.agree("the first epoch", 5 * rank)
    except FlowARError as error:
        print(error, flush=True)
    cluster.log("the end")
    with cluster.stop_signals() as signals:
        open(f"end {{rank}}", "w").close()
        while not signals.asked:
            time.sleep(0.02)
    open(f"saved {{rank}}", "w").close()

os.chdir({folder!r})
cluster.run_main(main)
"""


def test_ranks_share_values_a_restart_meets_no_stale_store_and_no_rank_outlives_its_launcher(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS.format(folder=str(tmp_path)))
    process = start(f"{tmp_path}/ranks.py", processes=2, restarts=1)
    for rank in range(2):
        wait_for(tmp_path / f"end {rank}", process)
    ranks = ranks_of(process)
    process.kill()
    end = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{rank}") for rank in ranks) and time.monotonic() < end:
        time.sleep(0.02)
    assert len(ranks) == 2 and not any(os.path.exists(f"/proc/{rank}") for rank in ranks)
    assert sorted(path.name for path in tmp_path.glob("saved *")) == ["saved 0", "saved 1"]
    _, output = finish(process)
    assert output.count("start 0") == output.count("start 1") == 2, output
    assert output.count("error (rank 1): a disk of rank 1 alone\n") == 1
    assert "the first epoch is 0 on rank 0 but 5 on rank 1: all hosts must see the same files" in output
    assert output.count("the end\n") == 1


def test_an_error_of_all_ranks_is_told_once(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS.format(folder=str(tmp_path)))
    done = run(f"{tmp_path}/ranks.py", processes=2, check=False)
    assert done.returncode == 1 and re.findall("error.*", done.stderr) == ["error (rank 0): a folder of all"]


def test_a_rank_whose_launcher_was_killed_before_it_joined_ends(monkeypatch):
    """Its parent is then process 1, unless that is torchrun; other processes may adopt it, but nobody serves torchrun's store."""
    rendezvous = mock.Mock(side_effect=ConnectionError)
    monkeypatch.setattr(processes.dist, "rendezvous", rendezvous)
    monkeypatch.setattr(processes, "ctypes", mock.Mock())
    monkeypatch.setattr(os, "getppid", lambda: 1)
    for name, value in (("RANK", "0"), ("TORCHELASTIC_RUN_ID", "none"), ("TORCHELASTIC_USE_AGENT_STORE", "True")):
        monkeypatch.setenv(name, value)
    for first, error in ((b"/sbin/init", FlowARError), (b"/usr/bin/python\0torchrun", ConnectionError)):
        monkeypatch.setattr(Path, "read_bytes", lambda path: first)
        with pytest.raises(error):
            processes.init("cpu")
    assert rendezvous.call_args.kwargs["timeout"] <= timedelta(seconds=60)


SUSPENDED = """
import os, subprocess, time
from util import cluster

def main():
    cluster.init("cpu", timeout=2)
    pids = cluster.gather_to_main(os.getpid())
    if cluster.rank() == 0:  # it waits for rank 1 when both are stopped
        pause = "sleep 0.5; kill -STOP {0} {1}; sleep 3; kill -CONT {0}; sleep 0.3; kill -CONT {1}"
        subprocess.Popen(pause.format(*pids), shell=True)
    else:
        time.sleep(1)
    cluster.barrier()
    cluster.log("goes on")
    if cluster.rank() == 1:
        time.sleep(60)
    cluster.barrier()

cluster.run_main(main)
"""


def test_a_job_that_is_suspended_goes_on_and_a_rank_that_is_waited_for_in_vain_ends_it(tmp_path):
    (tmp_path / "suspended.py").write_text(SUSPENDED)
    done = run(f"{tmp_path}/suspended.py", processes=2, check=False)
    assert done.stdout == "goes on\n" and done.returncode == 1, done.stdout + done.stderr
    assert "error: rank 0 waited 2 seconds in one call" in done.stderr and "in barrier" in done.stderr
