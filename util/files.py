"""Directories and small files, with this project's one-line errors."""
import hashlib
import json
import os
from pathlib import Path

from models import FlowARError
from models.weights import first_line, writing


def make_directory(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlowARError(f"{path}: cannot be made ({error})") from error


def check_output(path):
    """FlowARError unless a file can be written at `path`: said before the work, not after it."""
    path = Path(path)
    make_directory(path.parent)
    if path.is_dir():
        raise FlowARError(f"{path}: is a directory, expected a file to write")
    if not os.access(path.parent, os.W_OK):
        raise FlowARError(f"{path}: cannot be written (no permission to write in {path.parent})")


def read_json(path):
    """The JSON object of a file, or FlowARError."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FlowARError(f"{path}: cannot be read ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise FlowARError(f"{path}: expected a JSON object")
    return content


def file_hash(path):
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    except OSError as error:
        raise FlowARError(f"{path}: cannot be read ({first_line(error)})") from error
    return digest.hexdigest()


def write_bytes(content, path, sync=True):
    """See models.weights.writing."""
    with writing(path, sync) as file:
        file.write(content)


def write_json(content, path):
    write_bytes((json.dumps(content, indent=2) + "\n").encode(), path)
