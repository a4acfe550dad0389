"""Directories and small files, with this project's one-line errors."""
import json

from models import FlowARError


def make_directory(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlowARError(f"{path}: cannot be made ({error})") from error


def write_json(content, path):
    """Written under a temporary name and renamed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise FlowARError(f"{path}: cannot be written ({error})") from error
