"""Limits of the system: each has its own name and remedy; whoever is busy is alive."""
import errno
import os
import signal
import socket
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from helpers import ROOT
from torch.utils.data import Dataset

from models import FlowARError
from util import cluster
from util.cluster import limits
from util.cluster.ending import explain
from util.data import build_loader
from util.training import checkpoint


class Items(Dataset):
    """Four items; what getting one does is given."""
    classes = []

    def __init__(self, act):
        self.act = act

    def __len__(self):
        return 4

    def __getitem__(self, key):
        return self.act() or 0


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def without_shared_memory():
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_3275_2002614362_0>: No space left on device (28)")


def left():
    os._exit(7)


def first_batch(act, timeout=1.0):
    return next(iter(build_loader(Items(act), 1, num_workers=1, timeout=timeout)))


@pytest.mark.parametrize("act,expected", [
    (killed, "a data worker ended by itself (DataLoader worker"),
    (without_shared_memory, "shared memory is too small (/dev/shm has"),
    (left, "a data worker ended by itself (DataLoader worker"),
])
def test_a_worker_that_dies_is_explained(act, expected):
    with pytest.raises(RuntimeError) as caught:
        first_batch(act, timeout=60)
    message, status = explain(caught.value)
    assert message.startswith(expected) and "is its disk there" not in message and "\n" not in message and status == 2


def real(act):
    """The error that it raises."""
    with pytest.raises((RuntimeError, MemoryError, OSError)) as caught:
        act()
    return caught.value


@pytest.mark.parametrize("error,expected", [
    (lambda: real(lambda: torch.empty(1 << 55)), "out of memory ("),
    (lambda: real(lambda: np.empty(1 << 50)), "out of memory (MemoryError: Unable to allocate"),
    (MemoryError, "out of memory (MemoryError"),
    (lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB)"),
    (lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out of memory (CUDA error"),
    (lambda: RuntimeError("received 0 items of ancillary data"), "too many open files ("),
    (lambda: OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "too many open files ("),
    (lambda: RuntimeError("unable to open shared memory object </torch_1_2_3> in read-write mode: Too many open files (24)"), "too many open files ("),
    (lambda: RuntimeError("unable to open shared memory object </torch_1_2_3> in read-write mode: No space left on device (28)"), "shared memory is too small ("),
    (lambda: RuntimeError("can't start new thread"), "too many processes or threads ("),
    (lambda: BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "too many processes or threads ("),
    (lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/log.jsonl"), "out/log.jsonl: No space left on device: the disk is full; make room"),
    (lambda: OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "out/log.jsonl"), "out/log.jsonl: Disk quota exceeded: the quota on this disk is used up;"),
    (lambda: OSError(errno.ENOENT, os.strerror(errno.ENOENT), "data"), "data: No such file or directory"),
    (lambda: real(lambda: socket.create_connection(("127.0.0.1", 1))), "a file or connection: Connection refused"),
    (lambda: BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)), "a file or connection: Broken pipe"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_every_limit_has_its_own_name(error, expected):
    message, status = explain(error())
    assert message.startswith(expected) and "is its disk there" not in message and "\n" not in message and status == 2


def test_semaphores_without_a_name_are_in_shared_memory(monkeypatch):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(limits.os, "statvfs", lambda path: types.SimpleNamespace(f_frsize=4096, f_blocks=16384, f_bavail=1))
    assert explain(error)[0].startswith("shared memory is too small (/dev/shm has 64.0 MiB, 0.0 free;")
    monkeypatch.setattr(limits.os, "statvfs", lambda path: types.SimpleNamespace(f_frsize=4096, f_blocks=16384, f_bavail=16384))
    assert explain(error)[0].startswith("the disk is full (")


def test_errors_of_the_program_itself_keep_their_traceback():
    assert explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == (None, None)


ENDS = """
import os, signal, sys, threading, time
from util import cluster

def training(count):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with cluster.stop_signals():
        def press():
            for _ in range(count):
                time.sleep(0.2)
                os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=press).start()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # the main thread is held up, as in a collective
        time.sleep(60)

def script():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)

def unread():
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    print("x" * 100000)

for way in (lambda: training(2), script, unread):
    if os.fork() == 0:
        cluster.run_main(way)
        os._exit(0)
    print("status", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_ctrl_c_twice_ctrl_c_in_a_script_and_a_closed_pipe():
    done = subprocess.run([sys.executable, "-c", ENDS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["status", "130", "status", "130", "status", "141"], done
    assert [line for line in done.stderr.splitlines() if line] == [
        "interrupted: saving first; Ctrl-C again leaves at once",
        "error: interrupted again: left without saving; start it again", "interrupted; start it again"]


def test_a_port_in_use_is_named(monkeypatch):
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("::", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, value in dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with pytest.raises(FlowARError, match=f"--master_port .MASTER_PORT. of 127.0.0.1:{port} is in use on this host"):
            cluster.init("cpu")


def test_a_compiler_that_cannot_compile_is_tried_once(monkeypatch, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1:10: fatal error: Python.h: No such file' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))

    def compile(function):
        """As PyTorch's fails, whose compiler takes seconds to be loaded."""
        done = subprocess.run([os.environ["CXX"]], stderr=subprocess.PIPE, text=True)
        raise RuntimeError(f"backend='inductor' raised:\nCppCompileError: C++ compile error\n\nCommand:\ng++ x.cpp\n\nOutput:\n{done.stderr}")

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(FlowARError, match="--compile: nothing can be compiled on cpu .x.cpp:1:10: fatal error: Python.h: No such file.: mend that"):
        cluster.check_compiler(torch.device("cpu"))


def test_waiting_for_a_locked_folder_is_announced_once(tmp_path, capsys, monkeypatch):
    held = checkpoint.lock(tmp_path)
    child = os.fork()  # a lock is a process's own
    if child == 0:
        try:
            checkpoint.lock(tmp_path, patience=1)
        except FlowARError as error:
            print(error, flush=True)
        (tmp_path / "said").write_text(capsys.readouterr().out)
        os._exit(0)
    os.waitpid(child, 0)
    waiting, refused = (tmp_path / "said").read_text().splitlines()
    who = f"{tmp_path}: another run writes here (process {os.getpid()} on {socket.gethostname()}): "
    assert waiting == f"{who}waiting up to 1 s for it to leave" and refused.startswith(f"{who}wait for it or stop it")
    held.close()
