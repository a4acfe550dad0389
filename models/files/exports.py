"""Folders of scripts/export.py: weights, and beside them what a checkpoint knows besides its tensors."""
import json
from pathlib import Path

from models.files.hub import BARE
from models.files.tensors import read_file, reading

CONFIG = "config.json"
SAID = "args", "data", "vae", "weights_key"  # of a checkpoint; model.safetensors has it in itself


def read_weights(path):
    """read_file, memory-mapped, of any weights; a bare state dict gets what the config.json beside it says."""
    path = Path(path)
    content, config = read_file(path, mmap=True), path.with_name(CONFIG)
    if path.name != BARE or not config.is_file():
        return content
    with reading(config):
        said = json.loads(config.read_text())
    if not isinstance(said, dict) or not isinstance(said.get("weights_key"), str):  # another program's
        return content
    return {**{name: said.get(name) for name in SAID}, said["weights_key"]: content}
