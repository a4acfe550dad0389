"""Limits of the system: what the error of a library means where one is reached, and what helps."""
import errno
import os
import re
import resource
from typing import Callable, NamedTuple

SHARED_MEMORY = "/dev/shm"


class Limit(NamedTuple):
    pattern: str  # of the error's text
    name: str
    remedy: str
    measured: Callable = lambda: ""  # in words


def shared_memory():
    """(size, what is free of it) in MiB; 0, 0 where there is none."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0, 0
    return tuple(found.f_frsize * blocks / 2**20 for blocks in (found.f_blocks, found.f_bavail))


def room():
    return "{} has {:.1f} MiB, {:.1f} free".format(SHARED_MEMORY, *shared_memory())


def open_files():
    return f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]} a process"


SMALLER = "lower --batch_size or --eval_bsz, use --use_checkpoint, or a smaller model"
MORE = "docker run --shm-size=16g or --ipc=host, fewer --num_workers, or a smaller --batch_size"
LIMITS = [  # the first that fits
    Limit(r"Too many open files|ancillary data|ancdata", "too many open files",
          "raise the limit (ulimit -n 65536), or use fewer --num_workers", open_files),
    Limit(r"killed by signal: Bus error", "a data worker met a bus error",
          f"if shared memory is too small: {MORE}; if not, a mapped file was cut short, or its disk is gone", room),
    Limit(r"shared memory ?\(shm\)|shared memory (object|file)|, in shared memory|shm_open|</torch_\d+_",
          "shared memory is too small", MORE, room),
    Limit(r"killed by signal: Killed", "a data worker was killed, as the system does when memory runs out",
          "use fewer --num_workers, a smaller --batch_size, or more memory (of the container, of the job)"),
    Limit(r"killed by signal", "a data worker crashed", "--num_workers 0 shows where"),
    Limit(r"DataLoader worker.* exited", "a data worker ended by itself", "--num_workers 0 shows why"),
    Limit(r"CUDA out of memory|CUDA error: out of memory|HIP out of memory|STATUS_ALLOC_FAILED",
          "out of memory", f"{SMALLER}: the GPU's is meant"),
    Limit(r"can't allocate memory|Cannot allocate memory|Unable to allocate|MemoryError|bad_alloc",
          "out of memory", f"{SMALLER}, or use fewer --num_workers: the host's is meant"),
    Limit(r"can't start new thread|Resource temporarily unavailable", "too many processes or threads",
          "raise the limit (ulimit -u, the container's --pids-limit), or use fewer --num_workers"),
    Limit(r"No space left on device", "the disk is full", "make room there, or write to another"),
    Limit(r"Disk quota exceeded", "the quota on this disk is used up", "make room there, or write to another"),
    Limit(r"File too large", "the largest size of a file is reached", "raise the limit (ulimit -f)"),
    Limit(r"No usable temporary directory", "no temporary file can be made", "let TMPDIR name a folder with room"),
    Limit(r"Input/output error|Stale file handle|Transport endpoint is not connected", "the disk does not answer",
          "look whether it is mounted and whole"),
]


def find_limit(text):
    """The Limit that an error's text tells of, None if it tells of none."""
    return next((limit for limit in LIMITS if re.search(limit.pattern, text)), None)


def is_shortage(error):
    """Whether a file could not be opened or read for want of something else: it is not damaged, nor to be skipped."""
    return getattr(error.__cause__, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def with_remedy(text):
    """An error's one line, which names its file or option, and what helps where it tells of a limit."""
    limit = find_limit(text)
    return f"{text}: {limit.name}; {limit.remedy}" if limit else text


def named(text):
    """An error of a library, in one line with the limit's name and remedy; None if it tells of no limit."""
    if "No space left on device" in text and shared_memory()[1] < 1:  # semaphores are files there, without a name
        text = f"{text}, in shared memory"
    limit, shown = find_limit(text), ". ".join(text.split(". ")[:2])
    return limit and f"{limit.name} ({'; '.join(filter(None, (limit.measured(), shown)))}): {limit.remedy}"
