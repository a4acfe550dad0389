"""Directories and small files, with this project's one-line errors."""
import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path

from models import FlowARError
from models.weights import writing
from util.cluster import RESTART

LOCK, LOCK_PATIENCE = ".lock", 30  # seconds: the ranks of a launcher that was killed need some to leave
LEASE = 100  # seconds after which NFS has let go of the lock of a host that died: 90, and some


def make_directory(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlowARError(f"{path}: cannot be created ({error})") from error


def check_place(path):
    """FlowARError unless make_directory would make it, or it is there, and it can be written in; nothing is made."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if os.path.exists(place))
    if not there.is_dir():
        raise FlowARError(f"{path}: cannot be created ({there} is a file)")
    if not os.access(there, os.W_OK | os.X_OK):
        raise FlowARError(f"{path}: cannot be created (no write permission in {there})")
    return there


def last_change(folder):
    """Time of the last change of a file in a folder, or of a folder in it."""
    newest = 0
    for path in Path(folder).iterdir():
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            newest = max(newest, path.lstat().st_mtime)
    return newest


def lock_folder(folder, patience=LOCK_PATIENCE):
    """Lock a folder for as long as the file that this returns is open; FlowARError if another process still has it
    after `patience` seconds. One of another host may be dead: it is waited for until LEASE, and if nothing was written
    in the folder meanwhile, the error's status has the command started again.
    """
    check_place(Path(folder))
    file, here = open(Path(folder) / LOCK, "a+"), f" on {socket.gethostname()}"
    start, before, told = time.monotonic(), last_change(folder), False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):  # a file system without locks
                break
        file.seek(0)
        owner = file.read().strip() or f"unknown{here}"
        elsewhere = not owner.endswith(here)
        if not told:
            print(f"{folder}: another run is writing here ({owner}): waiting for it", file=sys.stderr)
            told = True
        if time.monotonic() > start + (LEASE if elsewhere else patience):
            error = FlowARError(f"{folder}: another run is writing here ({owner}): wait for it, stop it, or choose "
                                "another --output_dir")
            if elsewhere and last_change(folder) == before:
                error.status = RESTART
            raise error
        time.sleep(0.5)
    file.truncate(0)
    file.write(f"process {os.getpid()}{here}\n")
    file.flush()
    return file


def check_output(path):
    """FlowARError unless a file can be written at `path`, before the work and not after it; makes its folder."""
    path = Path(path)
    make_directory(path.parent)
    if path.is_dir():
        raise FlowARError(f"{path}: is a directory, expected the path of a file")
    check_place(path.parent)


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise FlowARError(f"{path}: damaged: expected JSON ({error})") from error


def holds_bytes(path):
    """Whether a file is there and not empty, as a power cut leaves one that was renamed and not yet on the disk."""
    return os.path.isfile(path) and os.path.getsize(path) > 0


def write_bytes(content, path, sync=True):
    """See models.weights.writing."""
    with writing(path, sync) as file:
        file.write(content)


def write_json(content, path):
    write_bytes((json.dumps(content, indent=2) + "\n").encode(), path)
