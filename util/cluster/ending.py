"""How a program ends: on signals, on errors that a user can put right, when a process is lost."""
import contextlib
import os
import re
import select
import signal
import sys
import threading

import torch.distributed as dist

from models import FlowARError
from util.cluster.devices import compiler_line
from util.cluster.flight import trace_hint, write_trace
from util.cluster.limits import named, with_remedy
from util.cluster.processes import is_main, rank, shutdown, watch, world_size
from util.cluster.watch import LOST, leave, print_error, way_on

RESTART = 75  # exit status of a run that was asked to leave and has saved: start it again (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 128 + signal.SIGINT  # of one that was left with Ctrl-C, as shells have it
UNHEARD = 128 + signal.SIGPIPE  # of one whose output nobody reads any more
SAID = 3  # of a data worker that has said why it ends


class Preempted(BaseException):  # whoever handles the errors of a file does not mean it
    """The run was asked to leave, and has saved. together: all ranks leave at this point. status: of the process."""

    def __init__(self, message, together, status=RESTART):
        super().__init__(f"{message}; {way_on(whole=False)} (exit status {status})")
        self.together, self.status = together, status


class StopSignals:
    """Whether SIGTERM, SIGUSR1 (SLURM's warning) or SIGINT (Ctrl-C) came; inside at_once() they raise Preempted where
    the process is. status: with which it then leaves.
    """

    def __init__(self):
        self.asked, self.message, self.status = False, None, RESTART

    def handle(self, number, frame):
        self.asked, self.status = True, INTERRUPTED if number == signal.SIGINT else self.status
        if self.message:
            raise Preempted(self.message, together=False, status=self.status)

    @contextlib.contextmanager
    def at_once(self, message):
        self.message = message
        try:
            if self.asked:
                raise Preempted(message, together=False, status=self.status)
            yield
        finally:
            self.message = None


@contextlib.contextmanager
def stop_signals():
    """Inside, SIGTERM, SIGUSR1 and a first SIGINT do not end the process but are noted in the StopSignals it yields."""
    signals, numbers = StopSignals(), [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as shells have it for what runs in the background
        numbers.remove(signal.SIGINT)
    before = {number: signal.signal(number, signals.handle) for number in numbers}
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    heard_before = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    threading.Thread(target=answer_interrupts, args=(receiver,), daemon=True).start()
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(heard_before)
        os.write(sender, bytes(1))
        os.close(sender)


def answer_interrupts(receiver):
    """Say that a first SIGINT was heard and leave at the second, even where the main thread waits for other ranks."""
    heard = False
    while number := os.read(receiver, 1)[0]:
        if heard and number in (signal.SIGINT, signal.SIGTERM):  # the second: torchrun makes a SIGTERM of it
            if is_main():
                print_error("", f"interrupted again: left without saving; {way_on()}")
            os._exit(INTERRUPTED)
        if number == signal.SIGINT and is_main():
            print("\ninterrupted: saving first; Ctrl-C again leaves at once", file=sys.stderr, flush=True)
        heard |= number == signal.SIGINT
    os.close(receiver)


def run_main(main):
    """Run main(). One line and exit status 2: what a user can put right; 1: a lost process; RESTART: asked to leave."""
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        main()
        shutdown()
        flush()
    except SystemExit:  # of argparse, which may have printed its help
        flush()
        raise
    except FlowARError as error:
        end_process(with_remedy(line_of(error)), 2)
    except Preempted as preempted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if watch() is None or watch().is_first(str(preempted)):
            with contextlib.suppress(OSError):  # nobody may read any more
                print(preempted, flush=True)
        if preempted.together:
            with contextlib.suppress(RuntimeError):  # the others may have left already
                shutdown()
        leave(preempted.status)
    except (OSError, RuntimeError, MemoryError) as error:
        message, status = explain(error)
        if message is None:
            raise
        end_process(message, status)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if watch() is None or watch().is_first("interrupted"):
            with contextlib.suppress(OSError):
                print(f"\ninterrupted; {way_on()}", file=sys.stderr, flush=True)
        leave(INTERRUPTED)


def flush():
    """Bring what was printed to its reader, and end as other programs do if there is none any more."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        os._exit(UNHEARD)


def is_unheard():
    """Whether nobody reads this program's output or errors any more (`| head`)."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def end_process(message, status):
    """Say why, if no other rank has, and end without joining the others, which may be waiting in a collective."""
    if (watch() is None or watch().is_first(message)) and message:
        print_error(f"rank {rank()}" if world_size() > 1 else "", message)
    leave(status, said=message)


def end_worker(error, *_):
    """End a data worker whose connection to its rank fails: the batch would be missing, and nobody would know."""
    print_error("data worker", named(line_of(error)) or f"{type(error).__name__}: {line_of(error)}")
    os._exit(SAID)


def line_of(error):
    """An error's message in one line. A data loader's worker wraps it in its traceback: there the end has it. The name
    of a file may hold line breaks.
    """
    text, ours = str(error).strip() or type(error).__name__, "models.errors.FlowARError: "
    if text.startswith("Caught "):
        text = text.rpartition(ours)[2] if ours in text else text.splitlines()[-1]
    elif not isinstance(error, FlowARError):
        text = text.splitlines()[0]
    return text.replace("\n", "\\n")


def explain(error):
    """(message, exit status) of an exception from a limit of the system, a loader's worker, the compiler or a lost
    rank, (None, None) of others.
    """
    text = line_of(error)
    if watch() is not None and (isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which comes before there is a name to tell
        lost = " and ".join(watch().silent_ranks()) or "the connection to another rank"
        write_trace(rank())
        return f"lost {lost}: {text}{trace_hint()}; {way_on()}", LOST
    if isinstance(error, BrokenPipeError) and is_unheard():
        return "", UNHEARD
    if re.search(rf"DataLoader worker .*exit code {SAID}\b", text):
        return "", 2
    if isinstance(error, OSError) and error.filename:
        return with_remedy(f"{error.filename}: {error.strerror}"), 2
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile: {compiler_line(error)}: leave out --compile, or mend the compiler", 2
    if message := named(f"MemoryError: {text}" if isinstance(error, MemoryError) else text):
        return message, 2
    return (f"a file or connection: {error.strerror or text}", 2) if isinstance(error, OSError) else (None, None)
