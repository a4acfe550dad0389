"""Ranks: what they share, an error of one or of all, a restart, a rank or a launcher that dies."""
import os
import re
import time

from helpers import ROOT, finish, make_project, ranks_of, start, training_command, wait_for

# Under torchrun --max_restarts=2: first rank 1 has an error of its own, then rank 0 one for all, then all is well.
RANKS = """
import os, sys
import torch
from models import FlowARError
from util import cluster

def refuse(message):
    raise FlowARError(message)

def main():
    assert cluster.init("cpu") == torch.device("cpu")
    rank, attempt = cluster.rank(), os.environ["TORCHELASTIC_RESTART_COUNT"]
    print(f"start {{attempt}}", flush=True)
    if attempt == "0":
        if rank == 1:
            refuse("a disk of rank 1 alone")
        cluster.barrier()
    if attempt == "1":
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
        cluster.log(error)
    cluster.log("the end")

os.chdir({folder!r})
cluster.run_main(main)
"""


def test_ranks_share_errors_and_a_restart_meets_no_stale_store(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS.format(root=str(ROOT), folder=str(tmp_path)))
    status, output = finish(start(f"{tmp_path}/ranks.py", processes=2, restarts=2))
    assert status == 0 and output.count("start 0") == output.count("start 1") == output.count("start 2") == 2, output
    assert output.count("error (rank 1): a disk of rank 1 alone\n") == 1
    assert re.findall(r"error \(rank \d\): a folder of all\n", output) == ["error (rank 0): a folder of all\n"]
    assert "the first epoch is 0 on rank 0 but 5 on rank 1: all hosts must see the same files" in output
    assert output.count("the end\n") == 1


def test_a_rank_does_not_outlive_its_launcher(tmp_path):
    project = make_project(tmp_path / "project")
    process = start(training_command(project, tmp_path, "--epochs 1000 --save_every 5"), processes=1)
    wait_for(tmp_path / "checkpoint-000000005.pth", process)
    rank, = ranks_of(process)
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while os.path.exists(f"/proc/{rank}") and time.monotonic() < end:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{rank}")
