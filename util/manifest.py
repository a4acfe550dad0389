"""run.json: what a folder's training or evaluation was started with, so that it can be cited and made again.

    {"starts": [{time, program, step, options, versions, hardware, git, code_sha256, data_sha256, ...}, ...],
     "data": {classes, counts, images, sha256}, "vae": {name, sha256, latent_scale, tensors}}

The newest start stands last; "data" and "vae" are its own.
"""
import os
import subprocess
import sys
from collections import Counter
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from models import FlowARError
from util.cluster import gather_to_main, is_main, log
from util.evaluation.reports import CODE, machine
from util.files import check_fields, make_directory, read_json, write_json
from util.training.record import shorten

RUN = "run.json"
ROOT = Path(__file__).parents[1]  # the project's folder: where a program was started says nothing of its code
PACKAGES = "timm", "safetensors", "huggingface_hub", "diffusers"  # beside those of reports.machine
PATIENCE = 10  # seconds for git


def begin(record, device, **more):
    """What add_start writes; all ranks together, None but on rank 0. record: {args (resolved), data, vae}, as
    checkpoints have it; more: what else there is to say of this start.
    """
    here, data, vae = machine(device), record["data"], record["vae"]
    devices = gather_to_main(here["device"])
    if not is_main():
        return None
    hardware = {"world_size": here["world_size"], "devices": dict(Counter(devices)), "cpus": os.cpu_count()}
    start = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "program": Path(sys.argv[0]).name,
             **more, "options": record["args"], "versions": {**here["versions"], **versions()}, "hardware": hardware,
             "git": git_state(), "code_sha256": CODE, "images": data.get("images"), "data_sha256": data.get("sha256"),
             "vae_sha256": vae.get("sha256")}
    return {"start": start, "data": data, "vae": {**vae, "latent_scale": shorten(vae.get("latent_scale"))}}


def add_start(folder, begun):
    """Write what begin() returned into a folder's run.json, after the starts that are there; None: nothing."""
    if begun is None:
        return
    path = Path(folder) / RUN
    make_directory(path.parent)
    write_json({"starts": [*earlier_starts(path), begun["start"]], "data": begun["data"], "vae": begun["vae"]}, path)


def earlier_starts(path):
    """Those of a run.json; what cannot be read is set aside: no run stops for it."""
    try:
        return read_run(path)["starts"] if path.exists() else []
    except FlowARError as error:
        aside = path.with_name(f"{path.name}.damaged")
        log(f"warning: {error}; it is kept as {aside.name}, and a new one begun")
        path.replace(aside)
        return []


def read_run(path):
    """The content of a run.json, or FlowARError."""
    content = read_json(path)
    check_fields(content, {"starts": (lambda value: isinstance(value, list) and all(map(is_start, value)),
                                      "a list of starts")}, path)
    return content


def is_start(value):
    parts = [value.get(name) for name in ("hardware", "versions", "git")] if isinstance(value, dict) else [0]
    return all(part is None or isinstance(part, dict) for part in parts)


def versions():
    """{package: version} of those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def git_state(root=ROOT):
    """{commit, dirty (whether a file of it differs)} of the project's folder; None where it is no checkout or there is
    no git.
    """
    if git(root, "ls-files", "--error-unmatch", Path(__file__).relative_to(ROOT).as_posix()) is None:
        return None  # a copy of the code in some other project's folder
    commit, changes = git(root, "rev-parse", "HEAD"), git(root, "status", "--porcelain", "--untracked-files=no")
    return commit and {"commit": commit, "dirty": None if changes is None else changes != ""}


def git(root, *command):
    """What git says of a folder, None if it cannot. It is not led elsewhere by its variables, and writes nothing."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(["git", "-C", root, *command], env={**environment, "GIT_OPTIONAL_LOCKS": "0"},
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
