"""run.json: what a folder's training or evaluation was started with, so that it can be cited and made again.

    {"starts": [{time, program, step, options, versions, hardware, git, data_sha256, ...}, ...],
     "data": {classes, counts, images, sha256}, "vae": {name, sha256, latent_scale, tensors}}

The newest start stands last; "data" and "vae" are its own.
"""
import contextlib
import functools
import os
import platform
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from util.cluster import gather_to_main, world_size
from util.files import make_directory, read_json, write_json
from util.training.record import shorten

RUN = "run.json"
ROOT = Path(__file__).parents[1]
PACKAGES = ("torchvision", "numpy", "torch_fidelity", "timm", "safetensors", "huggingface_hub", "diffusers")


def describe_start(record, device, **more):
    """What add_start writes; all ranks together, None but on rank 0. record: {args (resolved), data, vae}, as
    checkpoints have it; more: what else there is to say of this start.
    """
    machine, data, vae = describe_machine(device), record["data"], record["vae"]
    devices = gather_to_main(machine["device"])
    if devices is None:
        return None
    hardware = {"world_size": machine["world_size"], "devices": dict(Counter(devices)), "cpus": os.cpu_count()}
    start = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "program": Path(sys.argv[0]).name,
             **more, "options": record["args"], "versions": machine["versions"], "hardware": hardware,
             "git": git_state(), "images": data.get("images"), "data_sha256": data.get("sha256"),
             "vae_sha256": vae.get("sha256")}
    return {"start": start, "data": data, "vae": {**vae, "latent_scale": shorten(vae.get("latent_scale"))}}


def add_start(folder, description):
    """Write what describe_start returned into a folder's run.json, after the starts that are there; None: nothing."""
    if description is None:
        return
    path = Path(folder) / RUN
    make_directory(path.parent)
    earlier = read_json(path)["starts"] if path.exists() else []
    write_json({"starts": [*earlier, description["start"]], "data": description["data"], "vae": description["vae"]},
               path)


def describe_machine(device):
    """{world_size, device, versions}: where figures come from."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {"world_size": world_size(), "device": name, "versions": versions}


def processor_name():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "cpu"


def git_state(root=ROOT):
    """{commit, dirty: whether a tracked file differs from it} of the code; None where it is in no git repository."""
    git = "git", "--no-optional-locks", "-C", str(root)
    tracked = "ls-files", "--error-unmatch", "util/manifest.py"  # a copy of the code may lie in another repository
    describe = "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"
    try:
        for command in tracked, describe:
            answer = subprocess.run([*git, *command], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    commit, _, dirty = answer.strip().partition("-")
    return {"commit": commit, "dirty": dirty == "dirty"}


@functools.cache  # the code that runs is that of the start
def code_version():
    """The commit of the code, followed by -dirty where tracked files differ from it; None outside a repository."""
    state = git_state()
    return state and state["commit"] + "-dirty" * state["dirty"]
