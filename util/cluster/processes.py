"""Processes: torchrun on nccl or gloo, or one process without it."""
import _thread
import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from models import FlowARError
from models.hub import is_remote, local_file
from util.cluster.devices import select_device

TIMEOUT = 1800  # seconds that a rank waits for the others, or for a batch of data
LAUNCHER_PATIENCE = 60  # seconds that a rank which starts looks for torchrun's store
ORPHAN_PATIENCE = 60  # seconds that a rank may wait in one call when its launcher is gone
FOREVER = timedelta(days=20)  # in milliseconds it still fits poll()
PR_SET_PDEATHSIG = 1  # of Linux's prctl
_pretended = 1  # processes, where there is no process group


def init(device_name, timeout=TIMEOUT):
    """Join the process group that torchrun (or srun) described, if any; returns this process's device."""
    device = select_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ or dist.is_initialized():
        return device
    patience = timeout
    if dist.is_torchelastic_launched():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # when torchrun dies: its ranks save and leave
        if os.getppid() == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes():  # in a container it may be 1
            raise FlowARError("torchrun was killed while its ranks started")
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's own, there before its ranks
            patience = min(timeout, LAUNCHER_PATIENCE)
    store, number, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=patience)))
    store.set_timeout(timedelta(seconds=timeout))
    # torchrun may keep its store when it restarts the ranks (torch 2.14 does): addresses of the dead are still there.
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    if size > 1:
        end_if_stuck(number, timeout)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=number, world_size=size,
                            timeout=FOREVER)
    return device


def end_if_stuck(number, timeout):
    """End this process, rank `number`, when its main thread has waited `timeout` seconds in one call, such as a
    collective; seconds in which the process is stopped do not count. gloo and NCCL count wall time, so a job that was
    suspended (Ctrl-Z, scontrol suspend) for longer than their timeout would die when it wakes: theirs is FOREVER. What
    hangs with Python's lock held, such as an import from a dead disk, is not seen.
    """
    waited, tick, limit, launcher = 0, min(1, timeout / 10), timeout, os.getppid()

    def answer(*signal_and_frame):
        nonlocal waited
        waited = 0

    def ask():
        nonlocal waited, limit
        while waited < limit:
            waited += tick
            _thread.interrupt_main(signal.SIGVTALRM)  # answer() runs before the next instruction of the main thread
            time.sleep(tick)
            if os.getppid() != launcher:
                limit = min(timeout, ORPHAN_PATIENCE)
        try:
            print(f"\nerror: rank {number} waited {limit:g} seconds in one call, probably for a rank that hangs or "
                  "died; stack trace:", file=sys.stderr)
            faulthandler.dump_traceback()
        finally:
            os._exit(1)

    signal.signal(signal.SIGVTALRM, answer)  # a signal that nobody else uses
    threading.Thread(target=ask, daemon=True).start()


def shutdown():
    """Leave the process group. Rank 0 may hold the store, so nobody leaves before the others are done."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else _pretended


@contextlib.contextmanager
def pretend(size):
    """Inside, this process is rank 0 of `size`, the others of which are not there: for a dry run."""
    global _pretended
    _pretended = size
    try:
        yield
    finally:
        _pretended = 1


def is_main():
    return rank() == 0


def log(message):
    """Print once, on rank 0."""
    if is_main():
        print(message, flush=True)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor):
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_to_main(value):
    """List of every rank's value on rank 0, None elsewhere. Values are picklable."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values


def from_main(function):
    """Call function() on rank 0 and return its (picklable) result, or raise its FlowARError, on every rank."""
    shared = [None, None]
    if is_main():
        try:
            shared[0] = function()
        except FlowARError as error:
            shared[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    result, error = shared
    if error is not None:
        error.on_all_ranks = True
        raise error
    return result


def agree(what, value):
    """FlowARError on a rank whose `value` is not that of rank 0: they may see different disks."""
    expected = from_main(lambda: value)
    if value != expected:
        raise FlowARError(f"{what} is {expected} on rank 0 but {value} on rank {rank()}: all hosts must see the same "
                          "files")


@contextlib.contextmanager
def first_on_host():
    """The block runs on the first process of every host, then on its others: for files that are made once."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        barrier()
    try:
        yield
    finally:  # an error there must not leave the others waiting
        if first:
            barrier()


def fetch(*names):
    """Download files of the hub, see models.hub, once on every host."""
    if any(map(is_remote, names)):
        with first_on_host():
            for name in names:
                local_file(name)
