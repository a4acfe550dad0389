"""An order of images that depends on (seed, epoch) alone, and loaders that follow it. A dataset's key is (epoch,
index): crop and flip of an image follow from (seed, epoch, index), whoever loads it.
"""
import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Sampler

from util.cluster import STOP_SIGNALS

MOST_WORKERS = 10


class EpochSampler(Sampler):
    """Keys (epoch, index) of one rank. In training the epoch's order is a permutation, order(seed, epoch), a random one
    if None, of which a rest that not all ranks have a part of is left out.

    Rank r takes elements r, r + world, ..., so that the k-th batches of all ranks together are the same images for
    every number of ranks. set_epoch(e, start=n) begins with image n of epoch e's order.
    """
    def __init__(self, length, *, rank=0, world_size=1, seed=0, train=False, order=None):
        self.total, self.length = length, length
        if train:
            self.length -= length % world_size
        self.rank, self.world_size, self.seed, self.train, self.order = rank, world_size, seed, train, order
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch, start=0):
        self.epoch, self.start = epoch, start

    def indices(self, first, last):
        """This rank's images among first..last - 1 of the epoch's order; first is a multiple of the world size."""
        if not self.train:
            order = np.arange(self.total)
        elif self.order is None:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.total)
        else:
            order = self.order(self.seed, self.epoch)
        return order[first + self.rank:last:self.world_size].tolist()

    def __iter__(self):
        for index in self.indices(self.start, self.length):
            yield self.epoch, index

    def __len__(self):
        return len(range(self.start + self.rank, self.length, self.world_size))


def build_loader(dataset, batch_size, *, rank=0, world_size=1, seed=0, train=False, num_workers=0, pin_memory=False,
                 timeout=0):
    """Loader of one rank. In training only whole global batches, in an order drawn anew for every epoch. num_workers:
    None for default_workers(). timeout: seconds after which a batch that does not come ends in an error, 0 for never.
    """
    sampler = EpochSampler(len(dataset), rank=rank, world_size=world_size, seed=seed, train=train,
                           order=getattr(dataset, "order", None))
    return with_workers(dataset, num_workers, timeout, batch_size=batch_size, sampler=sampler, pin_memory=pin_memory,
                        drop_last=train, persistent_workers=train and num_workers != 0)


def with_workers(dataset, num_workers, timeout=0, **options):
    """A DataLoader whose workers leave the signals of a job to their rank; num_workers: None for default_workers()."""
    if num_workers is None:
        num_workers = default_workers()
    if num_workers == 0:
        return DataLoader(dataset, **options)
    if multiprocessing.get_start_method() == "forkserver":
        # The process that workers are forked from outlives a signal to the whole job: it inherits what is ignored.
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
        forkserver.ensure_running()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    options.update(num_workers=num_workers, timeout=timeout / 2, worker_init_fn=ignore_signals)
    return WorkersLoader(dataset, **options)


class WorkersLoader(DataLoader):
    """Waits for a batch twice: a job that was suspended (Ctrl-Z) wakes when its first wait is over."""

    def __iter__(self):
        return self.wait_twice(super().__iter__())  # its workers start now, not at the first batch

    def wait_twice(self, batches):
        for _ in range(len(self)):
            start = time.monotonic()
            try:
                batch = next(batches)
            except RuntimeError as error:
                if error.__cause__ or not self.timeout or time.monotonic() - start < self.timeout:
                    raise  # with a cause it is a worker that died, early an error in a worker
                batch = next(batches)
            yield batch


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
