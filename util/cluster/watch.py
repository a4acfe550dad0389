"""Who is alive: every rank of a job shows a heartbeat, and a rank that falls silent or fails ends the job by name.

A collective cannot do that: on NCCL the others would wait for a dead process until they are killed, and on gloo they
learn that a connection broke, not whose. Heartbeats are a few bytes a second in the store of the rendezvous.
"""
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from torch.distributed import DistError

from models import FlowARError
from util.cluster.flight import trace_hint, write_trace

FAILED = "flowar/failed"
DONE = b"done"
LOST = 1  # exit status of a process that lost another one
_waits = []  # functions that wait until something is written
_leaving = threading.Lock()
_way_on = "start it again", ""  # what to do after this program ended before it was done, and from where it then goes on


class Watch:
    """Heartbeats of this process in the rendezvous' store, and an eye on the next rank's, from start() to stop().

    store: a connection to it that nobody else waits on.
    timeout: seconds of silence after which a rank, or the store itself, counts as dead.
    """

    def __init__(self, store, rank, world_size, timeout):
        self.store, self.rank, self.world_size, self.timeout = store, rank, world_size, timeout
        self.interval = min(timeout / 5, 2.0)
        self.stopped = threading.Event()
        self.answered = time.monotonic()
        self.threads = [threading.Thread(target=run, daemon=True) for run in (self._beat, self._guard)]

    def start(self):
        self.store.set(self._key(self.rank, "host"), socket.gethostname())
        self.store.set(self._key(self.rank), "0")
        for thread in self.threads:
            thread.start()

    def stop(self):
        """This rank is done and will be silent."""
        self.stopped.set()
        self.threads[0].join()
        with contextlib.suppress(DistError):  # the store may have gone with its process
            self.store.set(self._key(self.rank), DONE)

    def is_first(self, message):
        """Whether this rank is the first to tell why the job ends. The others then end by themselves."""
        mine = f"rank {self.rank}: {message}"
        try:
            return self.store.compare_set(FAILED, "", mine).decode() == mine
        except DistError:
            return True

    def silent_ranks(self):
        """Names of the ranks whose heart stopped: for when a connection broke. Takes about five seconds at the most."""
        try:
            others = [r for r in range(self.world_size) if r != self.rank]
            before = [self.store.get(self._key(r)) for r in others]
            time.sleep(2.5 * self.interval)
            return [self.name(r) for r, value in zip(others, before) if self.store.get(self._key(r)) == value != DONE]
        except DistError:
            return []

    def name(self, rank):
        return f"rank {rank} (host {self.store.get(self._key(rank, 'host')).decode()})"

    def _key(self, rank, what="beat"):
        return f"flowar/{what}/{rank}"

    def _beat(self):
        neighbour, seen, since, beats = (self.rank + 1) % self.world_size, None, time.monotonic(), 0
        try:
            while not self.stopped.wait(self.interval):
                beats += 1
                self.store.set(self._key(self.rank), str(beats))
                found, now = self.store.get(self._key(neighbour)), time.monotonic()
                if found != seen:
                    seen, since = found, now
                elif found != DONE and now - since > self.timeout:
                    self._end(f"{self.name(neighbour)} was silent for {self.timeout:g} s")
                if self.store.check([FAILED]):
                    self._leave()  # who failed has said so
                self.answered = now
        except DistError:
            if not self.stopped.is_set():
                self._end("the process that holds the rendezvous does not answer")

    def _guard(self):
        """The store may not answer at all: then no exception comes."""
        before = time.monotonic()
        while not self.stopped.wait(self.interval):
            now = time.monotonic()
            if now - before > 2 * self.interval:  # this process itself was held up: its heart goes first
                self.answered = now
            elif now - self.answered > self.timeout + 2 * self.interval:
                print_error(f"rank {self.rank}", f"no contact with the other ranks for {self.timeout:g} s: this host's "
                                                 "network is down, or that of the rendezvous")
                self._leave()
            before = now

    def _end(self, message):
        if self.is_first(message):
            print_error(f"rank {self.rank}", f"{message}: it was killed (for memory?), or its host or network is "
                                             f"down{trace_hint()}; {way_on()}")
        self._leave()

    def _leave(self):
        self.stopped.set()  # the other thread has nothing to say any more
        write_trace(self.rank)
        leave(LOST)


def before_leaving(wait):
    """wait(): until what a thread of this process writes is whole, or FlowARError; leave() calls it first."""
    _waits.append(wait)


def leave(status, said=""):
    """End this process at once, without the other ranks, but for what it is writing: a checkpoint would be lost. What
    fails meanwhile and was not said yet is told after what was.
    """
    _leaving.acquire()  # for ever: the first decides on the status
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever does not want to wait
        for number in (signal.SIGTERM, signal.SIGUSR1):  # torchrun's, when another rank has left
            signal.signal(number, signal.SIG_IGN)
    try:
        for wait in _waits:
            try:
                wait()
            except FlowARError as error:
                if str(error) not in said:
                    print_error("", str(error))
    finally:
        os._exit(status)


def set_way_on(command, start):
    """What the last line of a program that did not come to its end says: which command goes on, and from where."""
    global _way_on
    _way_on = command, start


def way_on(whole=True):
    command, start = _way_on
    return f"{command} {start}" if whole and start else command


def activity(processes):
    """(CPU seconds, bytes read and pages fetched) of processes so far, as Linux counts them: who is busy is alive."""
    seconds = moved = 0
    for process in processes:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            moved += int(fields[9])
            moved += int(Path(f"/proc/{process.pid}/io").read_text().split()[1])
    return seconds, moved


def print_error(who, message):
    """One error line, in one write and on a line of its own: ranks and progress bars share the terminal."""
    with contextlib.suppress(OSError, AttributeError):  # nobody may read any more, or ever did
        print(f"\nerror{f' ({who})' if who else ''}: {message}\n", end="", file=sys.stderr, flush=True)
        sys.stdout.flush()
