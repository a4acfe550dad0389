"""An order of images that depends on (seed, epoch) alone, and loaders that follow it. A dataset's key is (epoch,
index): crop and flip of an image follow from (seed, epoch, index), whoever loads it.
"""
import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Sampler

from util.cluster import STOP_SIGNALS

MOST_WORKERS = 10


class EpochSampler(Sampler):
    """Keys (epoch, index) of one rank. The epoch's order is a permutation: order(seed, epoch), a random one if None.

    Rank r takes elements r, r + world, ..., so that the k-th batches of all ranks together are the same images for
    every number of ranks. set_epoch(e, start=n) begins with image n of epoch e's order.
    """
    def __init__(self, length, *, rank=0, world_size=1, seed=0, shuffle=False, drop_last=False, order=None):
        self.length = length - length % world_size if drop_last else length
        self.total, self.rank, self.world_size = length, rank, world_size
        self.seed, self.shuffle, self.epoch, self.start = seed, shuffle, 0, 0
        self.order = order or (lambda seed, epoch: np.random.default_rng((seed, epoch)).permutation(length))

    def set_epoch(self, epoch, start=0):
        self.epoch, self.start = epoch, start

    def indices(self, first, last):
        """This rank's images among first..last - 1 of the epoch's order; first is a multiple of the world size."""
        order = self.order(self.seed, self.epoch) if self.shuffle else np.arange(self.total)
        return order[first + self.rank:last:self.world_size].tolist()

    def __iter__(self):
        return ((self.epoch, index) for index in self.indices(self.start, self.length))

    def __len__(self):
        return len(range(self.start + self.rank, self.length, self.world_size))


def build_loader(dataset, batch_size, *, rank=0, world_size=1, seed=0, train=False, num_workers=0, pin_memory=False,
                 timeout=0):
    """Loader of one rank. In training only whole global batches, in an order drawn anew for every epoch. num_workers:
    None for default_workers(). timeout: seconds after which a batch that does not come ends in an error, 0 for never.
    """
    sampler = EpochSampler(len(dataset), rank=rank, world_size=world_size, seed=seed, shuffle=train, drop_last=train,
                           order=getattr(dataset, "order", None))
    return with_workers(dataset, num_workers, timeout, batch_size=batch_size, sampler=sampler, pin_memory=pin_memory,
                        drop_last=train, persistent_workers=train and num_workers != 0)


def with_workers(dataset, num_workers, timeout=0, **options):
    """A DataLoader whose workers leave the signals of a job to their rank; num_workers: None for default_workers()."""
    workers = default_workers() if num_workers is None else num_workers
    if workers and multiprocessing.get_start_method() == "forkserver":
        start_fork_server()
    return DataLoader(dataset, num_workers=workers, timeout=timeout if workers else 0, worker_init_fn=ignore_signals,
                      **options)


def start_fork_server():
    """The process that workers are forked from outlives a signal to the whole job too: it inherits what is ignored."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    forkserver.ensure_running()
    for number, handler in before.items():
        signal.signal(number, handler)


def ignore_signals(worker):
    """A signal to all processes of a job must not end the workers of a rank that is about to save. They end with it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def end_with_the_rank():  # which is not the parent where a fork server is
        multiprocessing.parent_process().join()
        os._exit(0)

    threading.Thread(target=end_with_the_rank, daemon=True).start()


@atexit.register
def kill_workers():
    """At the end multiprocessing sends them SIGTERM, which they ignore, and would wait for one whose disk hangs."""
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def rank_cpus():
    """The CPUs that this process may use, dealt to the ranks of its host."""
    cpus = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # of a container, "max" without a limit
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, int(quota) / int(period))
    return cpus / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def default_workers():
    """One for each CPU of a rank; at most 10, the release's number."""
    return int(min(max(rank_cpus(), 1), MOST_WORKERS))
