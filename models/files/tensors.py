"""Tensor files: read without running code from them, written whole or not at all."""
import argparse
import contextlib
import copy
import hashlib
import json
import os
import pickle
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.files.archives import DEEPEST, check_torch_file, extraction_command
from models.files.downloads import check_download, is_safetensors
from models.errors import FlowARError

DESCRIBED = "flowar"  # in the header of our own safetensors files: what their tensors are


def read_file(path, mmap=False, legacy=False):
    """Contents of a safetensors or torch file, whatever its suffix, on the CPU; FlowARError, whatever is in it. Only
    tensors, plain values and argparse.Namespace are unpickled: the release's checkpoints carry their options as one.

    With mmap=True the tensors of a zip-format torch file stay on disk until they are copied. Files of PyTorch before
    1.6 are read only with legacy=True: published feature networks are such, and torch allocates what they claim.
    """
    path = Path(path)
    if not path.is_file():
        raise FlowARError(f"{path}: {'is a directory, expected a file' if path.is_dir() else 'no such file'}")
    try:
        if is_safetensors(path):
            return read_safetensors(path)
        check_download(path)
        length, zipped = check_torch_file(path, legacy)
        with torch.serialization.safe_globals([argparse.Namespace]), open(path, "rb") as file:
            # Always mapped: a storage that claims more than its member ends with the file, not in foreign memory. By
            # the open file's name, as torch goes by the suffix.
            content = torch.load(f"/dev/fd/{file.fileno()}", map_location="cpu", weights_only=True, mmap=zipped)
        check_claims(content, path, 8 * length)
        return content if mmap or not zipped else copy.deepcopy(content)
    except FlowARError:
        raise
    except pickle.UnpicklingError as error:
        raise FlowARError(f"{path}: not a file of tensors ({first_line(error)}); {extraction_command(path)}") from error
    except Exception as error:  # a damaged file makes torch, zipfile and safetensors raise almost anything
        raise FlowARError(f"{path}: cannot be read, truncated or not a weights file ({first_line(error)})") from error


def read_safetensors(path):
    """{name: tensor}, or of a file of write_safetensors what it was given."""
    with safe_open(path, framework="pt") as file:
        said = json.loads((file.metadata() or {}).get(DESCRIBED, "null"))
    tensors = load_file(path)
    return {**said, said.get("weights_key") or "model": tensors} if isinstance(said, dict) else tensors


def write_safetensors(tensors, said, path):
    """A file that read_file gives back as {**said, said["weights_key"]: tensors}; said: plain values."""
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    with writing(path) as file:
        mode = os.fstat(file.fileno()).st_mode  # the user's, where save_file's is 0600
        save_file(tensors, file.name, {DESCRIBED: json.dumps(said)})
        os.chmod(file.name, mode)


def check_claims(content, path, limit):
    """FlowARError for tensors of more bytes than their file (views that repeat a number, storages that overlap), and
    for containers that hold themselves, or each other many times: more than `limit` values, or deeper than DEEPEST.
    """
    size, waiting, visited, storages, stored = path.stat().st_size, [([content], 0)], 0, set(), 0
    while waiting:
        values, depth = waiting.pop()
        visited += len(values)
        if visited > limit or depth > DEEPEST:
            raise FlowARError(f"{path}: not a file of tensors (containers in containers without end)")
        views = {}  # what two names share counts once
        for value in values:
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                view = storage._cdata, value.storage_offset(), value.shape, value.stride(), value.dtype
                views[view] = value.numel() * value.element_size()
                stored += 0 if storage._cdata in storages else storage.nbytes()
                storages.add(storage._cdata)
            elif isinstance(value, (dict, list, tuple)):
                waiting.append(([*value, *value.values()] if isinstance(value, dict) else value, depth + 1))
            elif isinstance(value, argparse.Namespace):
                waiting.append(([vars(value)], depth + 1))
        if (claimed := max(sum(views.values()), stored)) > size:
            raise FlowARError(f"{path}: its tensors claim {claimed} bytes, but the file has {size}")


@contextlib.contextmanager
def reading(path):
    """Whatever a damaged or hostile file makes a library raise in this block becomes a FlowARError that names it."""
    try:
        yield
    except FlowARError:
        raise
    except Exception as error:
        raise FlowARError(f"{path}: cannot be read ({first_line(error)})") from error


@contextlib.contextmanager
def writing(path, sync=True):
    """A binary file to write, under a temporary name until the block ends: a reader sees the old file or the new one.
    FlowARError if it cannot be written; nothing half-written stays. sync=False, for a million small files, leaves the
    moment of reaching the disk to the system.
    """
    temporary = Path(f"{path}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, (OSError, RuntimeError)):
            raise
        # torch.save says less than the system.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise FlowARError(f"{path}: cannot be written ({first_line(cause)})") from error


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


def content_hash(value):
    """SHA-256 over nested dicts, lists, tensors and plain values, hexadecimal."""
    digest = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(value, (dict, list, tuple)):
            digest.update(f"{type(value).__name__}{len(value)}".encode())
            for part in value.items() if isinstance(value, dict) else value:
                add(part)
        else:
            digest.update(f"{type(value).__name__}{value!r}".encode())

    add(value)
    return digest.hexdigest()


def check_content(content, path):
    """FlowARError unless what a file holds agrees with the checksum that it carries, if it carries one."""
    said = content.get("checksum") if isinstance(content, dict) else None
    if isinstance(said, str) and content_hash({name: content[name] for name in content if name != "checksum"}) != said:
        raise FlowARError(f"{path}: its content is not what was written (checksum): damaged")


def file_hash(path):
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with reading(path), open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def notify(*lines):
    """What the user of a function should know who has no log."""
    for line in lines:
        print(line, file=sys.stderr)


def first_line(error):
    """First sentence of an error's message, or its type where there is none. A line that ends with a colon goes on."""
    lines = str(error).splitlines()
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] += " " + lines[1].strip()
    return lines[0].split(". ")[0] if lines and not isinstance(error, KeyError) else type(error).__name__


def name_some(names, limit=5):
    """'a, b, c and 7 more' for a message."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
