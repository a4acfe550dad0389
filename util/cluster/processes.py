"""Processes: torchrun on nccl or gloo, or one process without it."""
import contextlib
import os
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

from models import FlowARError
from models.errors import first_line
from models.hub import is_remote, local_file
from util.cluster.devices import select_device
from util.cluster.flight import record_collectives
from util.cluster.watch import Watch

TIMEOUT = 120  # seconds of silence after which a process counts as dead
COLLECTIVE_TIMEOUT = timedelta(hours=1)  # the others wait this long where rank 0 works alone
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)  # the first host waits this long for the last one
_watch = None  # of this process, while it is one of several
_pretended = 1  # processes, where there is no process group


def watch():
    """The Watch of this process, None where it is the only one."""
    return _watch


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


def sharers():
    """(rank, number) of the processes that are there to share work: in a dry run there is one."""
    return rank(), dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def barrier():
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def first_on_host():
    """The block runs on the first process of every host, then on its others: for files that are made once."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        barrier()
    try:
        yield
    finally:  # what goes wrong there must not leave the others waiting
        if first:
            barrier()


def fetch(*names):
    """Download files of the hub, see models.hub, once on every host."""
    if any(map(is_remote, names)):
        with first_on_host():
            for name in names:
                local_file(name)


def agree(what, value):
    """FlowARError unless all ranks found the same: they may see different disks."""
    if dist.is_initialized():
        values = [None] * world_size()
        dist.all_gather_object(values, value)
        for number, found in enumerate(values):
            if found != values[0]:
                raise FlowARError(f"{what} is {values[0]} on rank 0 but {found} on rank {number}: all hosts must see "
                                  "the same files")


def log(message):
    """Print once, on rank 0."""
    if is_main():
        print(message, flush=True)


def init(device_name, timeout=TIMEOUT, folder=""):
    """Join the process group that torchrun described, if any; returns this process's device. timeout: see watch.py;
    folder: for what flight.py writes.
    """
    global _watch
    device = select_device(device_name)
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise FlowARError(f"local rank {device.index} has no GPU: this host has {torch.cuda.device_count()}; "
                              "lower --nproc_per_node")
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise FlowARError(f"the environment has RANK but not {' and '.join(missing)}: start with torchrun, or "
                              "unset RANK for one process")
        store, number, size = rendezvous()
        name = fresh_name(store, number, size)
        if device.type == "cuda":
            record_collectives(folder)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.PrefixStore(name, store),
                                rank=number, world_size=size, timeout=COLLECTIVE_TIMEOUT)
        connection = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                                   timeout=RENDEZVOUS_TIMEOUT)
        _watch = Watch(dist.PrefixStore(name, connection), number, size, timeout)
        _watch.start()
        barrier()  # every heart beats before anyone looks
    return device


def rendezvous():
    """(store, rank, world size); FlowARError where the port is in use, or rank 0 is not there."""
    place = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
    try:
        return next(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
    except RuntimeError as error:  # DistError is one, and torch 2.6's plain
        if "EADDRINUSE" in str(error):
            raise FlowARError(f"--master_port (MASTER_PORT) of {place} is in use on this host, by another run or "
                              "program: choose another, the same on all hosts") from error
        raise FlowARError(f"--master_addr, --master_port: rank 0 was not found at {place} ({first_line(error)}): does "
                          "it run there, do all hosts name the same, does a firewall close the port?") from error


def fresh_name(store, number, size):
    """The name, in the rendezvous' store, of what belongs to this start of the job alone.

    torchrun's store may outlive a restart (PyTorch 2.14 keeps it), and a rank that reads an address of the start before
    waits for the dead. So rank 0 makes up a name for this start and answers every rank that asks with its own token.
    """
    token = uuid.uuid4().hex
    store.set(f"flowar/token/{number}", token)
    if number == 0:
        name, waiting = uuid.uuid4().hex, set(range(1, size))
        while waiting:
            for r in sorted(waiting):
                if store.check([f"flowar/token/{r}"]):
                    store.set(f"flowar/start/{store.get(f'flowar/token/{r}').decode()}", name)
                if store.check([f"flowar/joined/{name}/{r}"]):
                    waiting.discard(r)
            time.sleep(0.02)
    else:
        name = store.get(f"flowar/start/{token}").decode()
        store.set(f"flowar/joined/{name}/{number}", "yes")
    return name


def shutdown():
    global _watch
    if _watch:
        barrier()  # rank 0 may hold the store: nobody leaves before the others are done
        _watch.stop()
        _watch = None
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(tensor):
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def from_main(function):
    """What function() returns, or the FlowARError that it raises, on rank 0, on every rank; it is called there alone.
    The value is picklable.
    """
    value = [None, None]
    if is_main():
        try:
            value[0] = function()
        except FlowARError as error:
            value[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(value)
    if value[1] is not None:
        raise value[1]
    return value[0]


def together(function):
    """What function() returns on this rank, or on all ranks the FlowARError that one of them met; no collective is in
    it that a rank with an error would leave out.
    """
    value = error = None
    try:
        value = function()
    except FlowARError as found:
        error = found
    errors = [error]
    if dist.is_initialized():
        errors = [None] * world_size()
        dist.all_gather_object(errors, error)
    if first := next(filter(None, errors), None):
        raise first
    return value


def gather_to_main(value):
    """List of every rank's value on rank 0, None elsewhere. Values are picklable."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values
