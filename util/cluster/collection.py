"""Python's garbage collector, at steps that all ranks share: one that pauses alone holds up the others' collectives."""
import contextlib
import gc
import os

_by_hand = False


@contextlib.contextmanager
def collect_by_hand():
    """Inside, no cycle is looked for but by collect_garbage(), and what is there already is left out of it."""
    global _by_hand
    automatic = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    _by_hand = True
    try:
        yield
    finally:
        _by_hand = False
        gc.unfreeze()
        if automatic:
            gc.enable()


def collect_garbage():
    """Free cycles of objects that nobody can reach any more, inside collect_by_hand(): milliseconds, as it then has
    little to look at.
    """
    if _by_hand:
        gc.collect()


def collect_in_child():
    """A data worker that is a fork collects by itself: nobody waits for it alone."""
    if _by_hand:
        gc.enable()


os.register_at_fork(after_in_child=collect_in_child)
