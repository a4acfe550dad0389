"""How a program ends: on signals, on errors that a user can put right, when a process is lost."""
import contextlib
import os
import signal
import sys

import torch
import torch.distributed as dist

from models import FlowARError
from util.cluster.processes import is_main, rank, shutdown, watch, world_size
from util.cluster.watch import LOST, print_error

RESTART = 75  # exit status of a run that was asked to leave and has saved: start it again (EX_TEMPFAIL of sysexits.h)


class Preempted(Exception):
    """The run was asked to leave, and has saved. together: all ranks leave at this point."""

    def __init__(self, message, together):
        super().__init__(f"{message}; the same command goes on (exit status {RESTART})")
        self.together = together


class StopSignals:
    """Whether SIGTERM or SIGUSR1 (SLURM's warning) came; inside at_once() they raise Preempted where the process is."""

    def __init__(self):
        self.asked, self.message = False, None

    def handle(self, number, frame):
        self.asked = True
        if self.message:
            raise Preempted(self.message, together=False)

    @contextlib.contextmanager
    def at_once(self, message):
        self.message = message
        try:
            if self.asked:
                raise Preempted(message, together=False)
            yield
        finally:
            self.message = None


@contextlib.contextmanager
def stop_signals():
    """Inside, SIGTERM and SIGUSR1 do not end the process but are noted in the StopSignals that it yields."""
    signals = StopSignals()
    before = {number: signal.signal(number, signals.handle) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_main(main):
    """Run main(). One line and exit status 2: what a user can put right; 1: a lost process; RESTART: asked to leave."""
    try:
        main()
        shutdown()
    except FlowARError as error:
        # A data loader's worker wraps the message in its traceback: the last line is the message.
        end_process(str(error).strip().splitlines()[-1].removeprefix("models.errors.FlowARError: "), 2)
    except OSError as error:
        end_process(f"{error.filename or 'a file'}: {error.strerror or error}", 2)
    except Preempted as preempted:
        if watch() is None or watch().is_first(str(preempted)):
            print(preempted, flush=True)
        if preempted.together:
            shutdown()
        os._exit(RESTART)
    except (RuntimeError, MemoryError) as error:
        message, status = explain(error)
        if message is None:
            raise
        end_process(message, status)
    except KeyboardInterrupt:
        if is_main():
            print("\ninterrupted: the same command goes on from what was saved\n", end="", file=sys.stderr, flush=True)
        os._exit(130)


def end_process(message, status):
    """Say why, if no other rank has, and end without joining the others, which may be waiting in a collective."""
    if watch() is None or watch().is_first(message):
        print_error(f"rank {rank()}" if world_size() > 1 else "", message)
    os._exit(status)


def explain(error):
    """(message, exit status) of an exception from memory, a loader's worker or a lost rank, (None, None) of others."""
    text = str(error).partition("\n")[0]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return (f"out of memory ({text.split('. ')[0]}): lower --batch_size or --eval_bsz, use --use_checkpoint, or a "
                "smaller model"), 2
    if text.startswith("DataLoader"):  # raised wherever this process happens to be
        return (f"the data cannot be read: {text.split('. ')[0]}; is its disk there, are the files whole, is it fast "
                "enough for --timeout?"), 2
    if watch() is None or not (isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text):
        return None, None
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which comes before there is a name to tell
    lost = " and ".join(watch().silent_ranks()) or "the connection to another rank"
    return f"lost {lost}: {text}; the same command goes on from the last checkpoint", LOST
