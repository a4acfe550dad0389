"""Tensor files: read without running code from them, written whole or not at all."""
import argparse
import contextlib
import hashlib
import os
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from models.errors import FlowARError


def read_file(path, mmap=False):
    """Contents of a .safetensors or torch file on the CPU. Nothing but tensors and plain values is unpickled.

    With mmap=True the tensors of a zip-format torch file stay on disk until they are copied.
    argparse.Namespace is let through: training checkpoints of the release carry their options as one.
    """
    path = Path(path)
    if not path.is_file():
        raise FlowARError(f"{path}: {'is a directory, expected a file' if path.is_dir() else 'no such file'}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise FlowARError(f"{path}: not a file of tensors ({first_line(error)})") from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile, SafetensorError) as error:
        raise FlowARError(f"{path}: cannot be read, truncated or not a weights file ({first_line(error)})") from error


@contextlib.contextmanager
def writing(path, sync=True):
    """A binary file to write, under a temporary name until the block ends: a reader sees the old file or the new one.

    FlowARError if it cannot be written; nothing half-written stays. sync=False leaves the moment of reaching the disk
    to the system: for a million small files.
    """
    temporary = Path(f"{path}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise FlowARError(f"{path}: cannot be written ({first_line(error)})") from error


def write_file(content, path):
    """torch.save, see writing."""
    with writing(path) as file:
        torch.save(content, file)


def tensors_hash(state):
    """SHA-256 over the tensors of a state dict, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def first_line(error):
    """First sentence of an error's message, or its type where there is none."""
    lines = str(error).splitlines()
    return lines[0].split(". ")[0] if lines and not isinstance(error, KeyError) else type(error).__name__


def name_some(names, limit=5):
    """'a, b, c and 7 more' for a message."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
