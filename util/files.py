"""Directories and small files, with this project's one-line errors."""
import json

from models import FlowARError
from models.weights import writing


def make_directory(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlowARError(f"{path}: cannot be made ({error})") from error


def write_bytes(content, path, sync=True):
    """See models.weights.writing."""
    with writing(path, sync) as file:
        file.write(content)


def write_json(content, path):
    write_bytes((json.dumps(content, indent=2) + "\n").encode(), path)
