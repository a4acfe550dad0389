"""An order of images that depends on (seed, epoch) alone, and loaders that follow it. A dataset's key is (epoch,
index): crop and flip of an image follow from (seed, epoch, index), whoever loads it.
"""
import os
import signal
import threading

import numpy as np
from torch.utils.data import DataLoader, Sampler


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
    """Loader of one rank. In training only whole global batches, in an order drawn anew for every epoch.
    timeout: seconds to wait for a batch of the workers; 0 waits for ever.
    """
    sampler = EpochSampler(len(dataset), rank=rank, world_size=world_size, seed=seed, shuffle=train, drop_last=train,
                           order=getattr(dataset, "order", None))
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, num_workers=num_workers, pin_memory=pin_memory,
                      drop_last=train, persistent_workers=train and num_workers > 0,
                      timeout=timeout if num_workers else 0, worker_init_fn=obey_the_rank_alone)


def obey_the_rank_alone(worker):
    """A signal to the whole job must not kill the workers of a rank that is about to save: only that rank ends them."""
    if not hasattr(signal, "sigwaitinfo"):
        return
    signals, parent = {signal.SIGTERM, signal.SIGUSR1}, os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait():
        while True:
            found = signal.sigwaitinfo(signals)
            if found.si_signo == signal.SIGTERM and found.si_pid == parent:
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
