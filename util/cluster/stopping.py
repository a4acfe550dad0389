"""How a program ends: when a signal asks it to, or with an error that its user can put right."""
import contextlib
import errno
import os
import signal
import sys

import torch.distributed as dist

from models import FlowARError
from util.cluster.processes import is_main, log, rank, shutdown, world_size

# Asked to leave: by torchrun, a terminal, SLURM (--signal, a preemption, a limit), a batch system.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
                signal.SIGXCPU)
RESTART = 75  # exit status of a run that was told to stop and has saved: start it again (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 128 + signal.SIGINT  # of one that was left with Ctrl-C, as shells have it


class Preempted(BaseException):  # no `except Exception` on the way means it
    """The run was told to stop, and has saved. status: of the process."""

    def __init__(self, message, status=RESTART):
        super().__init__(f"{message} (exit status {status})")
        self.status = status


class StopSignals:
    """asked: whether one of STOP_SIGNALS came; status: the exit status to leave with. Inside at_once() a signal raises
    Preempted where the process is.
    """

    def __init__(self):
        self.asked, self.status, self.message = False, RESTART, None

    def handle(self, number, frame):
        self.asked = True
        if number == signal.SIGINT:
            self.status = INTERRUPTED
            if is_main():
                with contextlib.suppress(OSError):  # of | tee, which Ctrl-C ends too
                    os.write(2, b"\ninterrupted: saving; press Ctrl-C again to quit at once\n")
            for second in (signal.SIGINT, signal.SIGTERM):  # torchrun makes a SIGTERM of the second Ctrl-C
                signal.signal(second, signal.SIG_DFL)
        if self.message:
            raise Preempted(self.message, self.status)

    @contextlib.contextmanager
    def at_once(self, message):
        self.message = message
        try:
            if self.asked:
                raise Preempted(message, self.status)
            yield
        finally:
            self.message = None


@contextlib.contextmanager
def stop_signals():
    """Inside, STOP_SIGNALS do not end the process but are noted in the StopSignals that this yields. Those that were
    ignored at the start (SIGHUP by nohup, SIGINT in the background of a shell) stay so.
    """
    signals = StopSignals()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, signals.handle)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Output:
    """Text to a stream whose reader may go, | tee by Ctrl-C or a terminal that closes: a run still saves and leaves.
    What a file does not take, on a full disk, is an error as ever.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, function, *args):
        try:
            function(*args)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise

    def __getattr__(self, name):
        return getattr(self.stream, name)


def run_main(main):
    """Run a program. Exit status 2, or the error's own: a FlowARError, in one line; RESTART or 130: told to stop."""
    with contextlib.redirect_stdout(Output(sys.stdout)), contextlib.redirect_stderr(Output(sys.stderr)):
        run(main)


def run(main):
    try:
        main()
        shutdown()
        return
    except FlowARError as error:
        status = error.status
        # Before the ranks join all have the same error, of an option: the first of each host prints it.
        is_first = is_main() and int(os.environ.get("LOCAL_RANK", 0)) == 0 or "RANK" not in os.environ
        if is_first or dist.is_initialized() and not error.on_all_ranks:
            who = f" (rank {rank()})" if world_size() > 1 else ""
            message = str(error).rpartition("FlowARError: ")[2]  # a data worker's has its traceback before it
            print(f"\nerror{who}: {message}", file=sys.stderr)
    except Preempted as preempted:
        status = preempted.status
        log(preempted)
    except KeyboardInterrupt:
        status = INTERRUPTED
        if is_main():
            print("\ninterrupted", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # at once: the usual way out joins threads of collectives in which other ranks may wait
