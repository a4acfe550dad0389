"""NCCL's flight recorder: what collectives every rank came to last, for when a rank is lost. Has not run on a GPU yet.

The watch ends a job long before a collective times out, so it writes what NCCL would have written then.
"""
import contextlib
import os
import tempfile
import threading
from pathlib import Path

import torch

BUFFER = 2000  # collectives that a rank remembers
PATIENCE = 10  # seconds that a dump may take
SIZE = "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"  # PyTorch's names, of now and before
FILE = "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"  # the rank's number is added
ON_TIMEOUT = "TORCH_NCCL_DUMP_ON_TIMEOUT",
PREFIX = "nccl_trace_rank_"
_recording = False


def record_collectives(folder=""):
    """Before a process group of NCCL is made: have it record, and write what it has at a timeout of its own into a
    folder (default: that of temporary files). What is set in the environment stays.
    """
    global _recording
    prefix = Path(folder or tempfile.gettempdir()).absolute() / PREFIX
    for names, value in ((SIZE, BUFFER), (FILE, prefix), (ON_TIMEOUT, 1)):
        if not any(name in os.environ for name in names):
            os.environ[names[0 if torch.__version__ >= (2, 10) else -1]] = str(value)
    _recording = setting(SIZE) != "0"


def setting(names):
    return next((os.environ[name] for name in names if name in os.environ), "")


def trace_hint():
    """What the line that names a lost rank says of the dumps; "" where there are none."""
    return f"; what every rank came to last may be in {setting(FILE)}<rank>, for torchfrtrace" if _recording else ""


def write_trace(rank):
    """Write what this rank recorded, if it did; whatever hangs or fails, the program ends all the same."""
    def write():
        with contextlib.suppress(Exception):
            content = torch._C._distributed_c10d._dump_nccl_trace()
            Path(f"{setting(FILE)}{rank}").write_bytes(content)

    if _recording:
        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(PATIENCE)
