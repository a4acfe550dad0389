"""Take tensors and plain values out of a torch file that safe loading refuses: Lightning's callbacks, NumPy scalars, paths.

For files whose origin you trust. Objects are made of what tensors are made of; whatever else the file names becomes an
empty stand-in, so that what wrote it need not be installed, and nothing of it runs.

    python scripts/take_tensors.py model.ckpt model.tensors.pth
"""
import argparse
import pickle
import types
from pathlib import Path

import project_root  # noqa: F401  first: it names what is too old

import torch

from models import FlowARError
from models.files import reading, write_file
from models.files.archives import NAMES
from util.cluster import run_main
from util.files import check_output
from util.options import some_path


class StandIn(dict):
    """In the place of an object of another library; keeps what its state names."""
    dump_patches = False  # torch asks a module's class

    def __init__(self, *args, **options):
        pass

    def __hash__(self):
        return 0

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.update(state)


class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        return super().find_class(module, name) if NAMES.fullmatch(f"{module} {name}") else StandIn


def plain(value):
    """Tensors, numbers, texts, and dicts and lists of them; None for all else."""
    if isinstance(value, torch.Tensor):
        return value.data
    if isinstance(value, dict):
        return {key if type(key) is int else str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value if type(value) in (int, float, bool, str) else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("file", type=some_path, help="torch file that you trust")
    parser.add_argument("output", type=some_path, help="file to write")
    args = parser.parse_args()
    check_output(args.output)
    if Path(args.output).exists():
        raise FlowARError(f"{args.output}: is there already: give another name, or remove it")
    reader = types.SimpleNamespace(Unpickler=Unpickler, load=lambda *args, **options: Unpickler(*args, **options).load(),
                                   __name__="stand-ins")
    with reading(args.file):
        content = torch.load(args.file, map_location="cpu", pickle_module=reader, weights_only=False)
    write_file(plain(content), args.output)
    print(f"{args.output}: the tensors and plain values of {args.file}")


if __name__ == "__main__":
    run_main(main)
