"""An order of images that depends on (seed, epoch) alone, and loaders that follow it. A dataset's key is (epoch,
index): crop and flip of an image follow from (seed, epoch, index), whoever loads it.
"""
import contextlib
import multiprocessing.queues
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Sampler

from models import FlowARError
from util.cluster import TIMEOUT, activity, end_worker

OF_THE_JOB = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}  # signals that are sent to all of its processes
MOST_WORKERS = 10
BUSY, TICKS = 0.02, 0.03  # of a core, and seconds that idle workers may take an interval to look whether they are asked


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
                 timeout=TIMEOUT):
    """Loader of one rank, see Loader. In training only whole global batches, in an order drawn anew for every epoch."""
    sampler = EpochSampler(len(dataset), rank=rank, world_size=world_size, seed=seed, shuffle=train, drop_last=train,
                           order=getattr(dataset, "order", None))
    return Loader(dataset, timeout, batch_size=batch_size, sampler=sampler, num_workers=num_workers,
                  pin_memory=pin_memory, drop_last=train, persistent_workers=train and num_workers != 0)


class Loader(DataLoader):
    """A DataLoader whose workers, started in whatever way, end with this process or at its wish, and by no signal.

    FlowARError when a batch does not come and for `timeout` seconds no worker computed or read anything: a batch of
    large images on a small machine may take longer, a disk that hangs must end in a line. num_workers: None for
    default_workers().
    """
    def __init__(self, dataset, timeout=TIMEOUT, *, num_workers=None, **options):
        workers = default_workers() if num_workers is None else num_workers
        self.patience, self.interval = timeout, min(timeout / 5, 5.0)
        super().__init__(dataset, num_workers=workers, timeout=self.interval if workers else 0,
                         worker_init_fn=obey_the_rank_alone, **options)

    def __iter__(self):
        if not self.num_workers:
            return super().__iter__()
        if multiprocessing.get_start_method() != "fork":
            multiprocessing.resource_tracker.ensure_running()  # it would undo the mask
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_JOB)  # inherited by workers, and by who starts them
        try:
            iterator = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return self._watched(iterator, iterator._workers)

    def _watched(self, iterator, workers):
        quiet, (seconds, moved) = 0, activity(workers)
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if lost := [worker.exitcode for worker in workers if worker.exitcode]:  # whoever started it
                    how = f"killed by signal: {signal.strsignal(-lost[0])}" if lost[0] < 0 else "exited"
                    raise RuntimeError(f"DataLoader worker {how}, exit code {lost[0]}") from error
                if not str(error).startswith("DataLoader timed out"):
                    raise
                before, (seconds, moved) = (seconds, moved), activity(workers)
                busy = moved != before[1] or seconds - before[0] > max(BUSY * self.interval, TICKS)
                quiet = 0 if busy else quiet + self.interval
                if quiet >= self.patience:
                    raise FlowARError(f"the data cannot be read: for {self.patience:g} s (--timeout) no data worker "
                                      "read or computed anything; is its disk there, does it answer?") from error
                continue
            quiet = 0
            yield batch


def default_workers():
    """The CPUs that this process may use, dealt to the ranks of its host; at most 10, the release's number."""
    cpus = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # of a container, "max" without a limit
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, int(quota) / int(period))
    return int(min(max(cpus / int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1), MOST_WORKERS))


def obey_the_rank_alone(worker):
    """A signal to the whole job must not kill the workers of a rank that is about to save: only that rank ends them,
    or its own end does. The rank is not always the parent: that may be a fork server.
    """
    rank = multiprocessing.parent_process()

    def wait_for_its_wish():
        while True:
            found = signal.sigwaitinfo(OF_THE_JOB)
            if found.si_signo == signal.SIGTERM and found.si_pid == rank.pid:
                os._exit(0)

    def wait_for_its_end():
        rank.join()
        os._exit(0)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end_worker)  # else the batch would be dropped
    sys.excepthook = lambda kind, error, trace: end_worker(error)  # of the thread that shares memory
    signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_JOB)
    for wait in (wait_for_its_wish, wait_for_its_end):
        threading.Thread(target=wait, daemon=True).start()
