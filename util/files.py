"""Directories and small files, with this project's one-line errors."""
import hashlib
import json

from models import FlowARError
from models.weights import first_line, writing


def make_directory(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlowARError(f"{path}: cannot be made ({error})") from error


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
