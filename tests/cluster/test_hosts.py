"""Two hosts and their network, small disks, a batch system: with --slow, and where this system lets a test make them."""
import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, assert_same_run, finish, make_project, ranks_of, read_checkpoint, run, start, training_command, wait_for

from util.training import checkpoint

pytestmark = pytest.mark.slow
HOSTS = {"flowar-a": "10.77.0.1", "flowar-b": "10.77.0.2"}  # network namespaces
LONG = "--epochs 16 --save_every 5 --attn_dropout 0.2 --proj_dropout 0.2 --batch_size 8"


def system(command, check=True):
    return subprocess.run(command, shell=True, check=check, capture_output=True, text=True)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def undisturbed(project, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    run(training_command(project, output, LONG), processes=2)
    return output


# ---- two hosts -------------------------------------------------------------------------------------------------


@pytest.fixture
def hosts():
    """Two network namespaces with a cable between them; yields a function that plugs it in or out."""
    try:
        for host in HOSTS:
            system(f"ip netns add {host}")
        system("ip link add cable-a type veth peer name cable-b")
        for (host, address), cable in zip(HOSTS.items(), ("cable-a", "cable-b")):
            system(f"ip link set {cable} netns {host} && ip -n {host} addr add {address}/24 dev {cable} && ip -n {host} link set {cable} up "
                   f"&& ip -n {host} link set lo up")
    except (subprocess.CalledProcessError, OSError) as error:
        remove_hosts()
        pytest.skip(f"no network namespaces here: {error}")
    yield lambda state: system(f"ip -n flowar-b link set cable-b {state}")
    remove_hosts()


def remove_hosts():
    for host in HOSTS:
        system(f"ip netns del {host}", check=False)


def on_host(number, command, port):
    """A host's torchrun of a job of two hosts with one process each."""
    host, cable = list(HOSTS)[number], ("cable-a", "cable-b")[number]
    launcher = (f"ip netns exec {host} {sys.executable} -m torch.distributed.run --nnodes=2 --node_rank={number} --nproc_per_node=1 "
                f"--master_addr={HOSTS['flowar-a']} --master_port={port} {command}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": cable}
    return subprocess.Popen(launcher.split(), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)


def test_a_host_that_is_cut_off_ends_the_job_by_name_and_it_goes_on(project, undisturbed, tmp_path, hosts):
    command = training_command(project, tmp_path, f"{LONG} --timeout 4 --resume {tmp_path}")
    a, b = (on_host(number, command, 29611) for number in (0, 1))
    wait_for(tmp_path / "checkpoint-000000015.pth", a)
    hosts("down")
    (status_a, output_a), (status_b, output_b) = finish(a), finish(b)
    assert status_a != 0 and status_b != 0
    assert "error (rank 0): rank 1 (host " in output_a and "was silent for 4 s" in output_a, output_a
    assert "error (rank 1): " in output_b and ("no contact with the other ranks for 4 s" in output_b or "does not answer" in output_b), output_b
    assert read_checkpoint(tmp_path)["progress"]["step"] < 80
    hosts("up")
    time.sleep(1)
    a, b = (on_host(number, command, 29612) for number in (0, 1))
    (status_a, output_a), (status_b, output_b) = finish(a), finish(b)
    assert status_a == status_b == 0, output_a + output_b
    assert_same_run(tmp_path, undisturbed)


# ---- a process that is frozen ----------------------------------------------------------------------------------


def test_a_frozen_rank_ends_the_job_by_name(project, tmp_path):
    process = start(training_command(project, tmp_path, f"{LONG} --timeout 4"), processes=2)
    wait_for(tmp_path / "checkpoint-000000010.pth", process)
    frozen = ranks_of(process)[1]
    os.kill(frozen, signal.SIGSTOP)
    time.sleep(10)
    os.kill(frozen, signal.SIGKILL)  # the launcher would wait 30 s for it
    status, output = finish(process)
    assert status != 0 and "error (rank 0): rank 1 (host " in output and "was silent for 4 s" in output, output


def test_a_rank_does_not_outlive_its_launcher(project, tmp_path):
    process = start(training_command(project, tmp_path, f"{LONG} --epochs 1000 --timeout 4"), processes=1)
    wait_for(tmp_path / "checkpoint-000000010.pth", process)
    rank, = ranks_of(process)
    process.kill()
    for _ in range(200):
        if not os.path.exists(f"/proc/{rank}"):
            break
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{rank}")
    assert "the process that holds the rendezvous does not answer" in finish(process)[1]


# ---- small and read-only disks ---------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own of 70 MB: two checkpoints and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if system(f"mount -t tmpfs -o size=70m none {folder}", check=False).returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    system(f"umount -l {folder}")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_that_fills_costs_nothing(project, undisturbed, small_disk, processes):
    command = training_command(project, small_disk / "out", f"{LONG} --batch_size {16 // processes} --keep 1 --resume {small_disk}/out")
    process = start(command, processes if processes > 1 else 0)
    wait_for(small_disk / "out" / "checkpoint-000000010.pth", process)
    end = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError):  # between a new checkpoint and the removal of the one before there is no room
            (small_disk / "filler").write_bytes(b"x" * (30 << 20))
            break
        assert time.monotonic() < end
    status, output = finish(process)
    assert status != 0 and output.count("\nerror") == 1 and "cannot be written" in output and "No space left on device" in output, output
    assert not list((small_disk / "out").glob("*.tmp"))
    assert 10 <= checkpoint.step_of(checkpoint.open_newest(small_disk / "out").path) < 80
    (small_disk / "filler").unlink()
    assert finish(start(command, processes if processes > 1 else 0))[0] == 0
    if processes == 2:
        assert_same_run(small_disk / "out", undisturbed)


def test_a_read_only_disk_is_said_before_training(project, small_disk):
    system(f"mount -o remount,ro {small_disk}")
    for processes in (0, 2):
        status, output = finish(start(training_command(project, small_disk, LONG), processes))
        assert status != 0 and f"{small_disk}: cannot be written (Read-only file system)" in output
        assert output.count("\nerror") == 1, output


# ---- a batch system --------------------------------------------------------------------------------------------

SRUN = """#!/usr/bin/env python3
import os, signal, subprocess, sys
command = [a for a in sys.argv[1:] if not a.startswith("--kill-on-bad-exit")]
tasks = [subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(r), "SLURM_LOCALID": str(r), "SLURM_NTASKS": "2"}) for r in range(2)]
signal.signal(signal.SIGUSR1, lambda *_: [t.send_signal(signal.SIGUSR1) for t in tasks])
open(os.environ["SRUN_PID"], "w").write(str(os.getpid()))
sys.exit(max(t.wait() % 256 for t in tasks))
"""


def test_slurm_script(project, tmp_path):
    """With stand-ins for srun and scontrol: a warning makes both ranks save, the job asks to be queued again, and goes on."""
    for name, text in (("srun", SRUN), ("scontrol", '#!/bin/sh\n[ "$1" = requeue ] && echo "$@" >> "$REQUEUED" || echo 127.0.0.1\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    options = training_command(project, tmp_path / "out", f"{LONG} --diffloss_d 3 --diffloss_w 128 --patch_size 1 --global_batch 16").split(" ", 1)[1]
    options += " --precision fp32 --model flowar_tiny"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "a", "OUTPUT": str(tmp_path / "out"),
                   "SLURM_SUBMIT_DIR": str(ROOT), "SRUN_PID": str(tmp_path / "pid"), "REQUEUED": str(tmp_path / "requeued"), "PYTHON": sys.executable,
                   "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def submit():
        return subprocess.Popen(["bash", str(ROOT / "scripts" / "slurm.sh"), *options.split()], env=environment, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True, start_new_session=True)

    job = submit()
    wait_for(tmp_path / "out" / "checkpoint-000000010.pth", job)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGUSR1)
    status, output = finish(job)
    assert status == 75 and (tmp_path / "requeued").read_text() == "requeue 4711\n", output
    status, output = finish(submit())
    assert status == 0 and "resumes at step" in output, output
    assert read_checkpoint(tmp_path / "out")["progress"]["epoch"] == 16
    job = subprocess.run(["bash", str(ROOT / "scripts" / "slurm.sh"), "--no_such_option"], env=environment, capture_output=True, text=True)
    assert job.returncode == 2 and (tmp_path / "requeued").read_text() == "requeue 4711\n"
