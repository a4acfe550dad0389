"""Small runs on real images (scikit-learn's digits): start, watch, kill and compare them. For soak.py and the tests."""
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from models import AutoencoderKL
from models.vae import LatentScale
from models.vaes import save_vae
from models.weights import content_hash

ROOT = Path(__file__).resolve().parents[2]

GEOMETRY = "--img_size 16 --vae_embed_dim 4 --vae_stride 4 --class_num 10 --model flowar_tiny --diffloss_d 1"
CLASSES = 10


def small_vae():
    torch.manual_seed(1)
    return AutoencoderKL(embed_dim=4, ch=16, ch_mult=(1, 1, 2), num_res_blocks=1, latent_scale=LatentScale(2.0, 0.1))


def write_digits(root, per_class, size=16, splits=("train", "val"), val_per_class=None):
    """Class folders of scikit-learn's digits, real handwriting: <root>/<split>/<digit>/<number>.png."""
    digits = load_digits()
    for label in range(CLASSES):
        images = digits.images[digits.target == label]
        for split, chosen in zip(splits, (images[:per_class], images[per_class:per_class + (val_per_class or per_class)])):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for i, image in enumerate(chosen):
                picture = Image.fromarray((image * (255 / 16)).astype(np.uint8))
                picture.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")


def make_project(root, per_class=8, val_per_class=2):
    """images/{train,val} and vae.pth in a temporary folder."""
    write_digits(root / "images", per_class, val_per_class=val_per_class)
    save_vae(small_vae(), root / "vae.pth")
    return root


def training_command(project, output, extra=""):
    return (f"main_flowar.py {GEOMETRY} --vae_path {project}/vae.pth --data_path {project}/images --output_dir {output} --epochs 2 "
            f"--warmup_epochs 1 --batch_size 16 --blr 1e-2 --num_workers 0 --device cpu --log_freq 2 --eval_freq 100 "
            f"--num_step 4 --num_images 4 {extra}")


def started(command, processes, restarts=0, **options):
    """Arguments of subprocess for a program of the project: under torchrun for processes > 0, one thread each, no GPU unless it asks for one."""
    words, environment = shlex.split(command), {**os.environ, "OMP_NUM_THREADS": "1"}
    if processes:
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", f"--max_restarts={restarts}",
                 "--monitor_interval=0.1", *words]
    if "--device cuda" not in command:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return {"args": [sys.executable, *words], "cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "text": True, **options}


def run(command, processes=0, check=True, timeout=300):
    """Run a program of the project. Returns the process."""
    done = subprocess.run(**started(command, processes, stderr=subprocess.PIPE, timeout=timeout))
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


# ---- runs that are killed --------------------------------------------------------------------------------------


def start(command, processes=0, restarts=0):
    """run() in the background; its output goes on to finish(). In a process group of its own."""
    return subprocess.Popen(**started(command, processes, restarts, stderr=subprocess.STDOUT, start_new_session=True))


def finish(process, timeout=240):
    """(exit status, output) of a process of start(); what is left of its group is killed."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def wait_for(path, process, timeout=240):
    """Until a file is there; AssertionError if the process ends before."""
    end = time.monotonic() + timeout
    while not Path(path).exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.02)


def ranks_of(process):
    """Process numbers of the ranks under a launcher of start(), rank 0 first."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    of = {int(dict(field.split("=", 1) for field in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in field).get("RANK", -1)): int(child)
          for child in children}
    return [of[r] for r in sorted(of) if r >= 0]


def read_log(output):
    """Lines of a log.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("images_per_second", "memory_gib")} for line in lines]


def read_checkpoint(output):
    return torch.load(Path(output) / "checkpoint-last.pth", weights_only=True)


def snapshots(folder):
    """{name: hash of the content} of those of the power averages (--posthoc_ema)."""
    return {path.name: content_hash(torch.load(path, weights_only=True)) for path in Path(folder).glob("posthoc-*.pth")}


def assert_same_run(output, expected):
    """Two output folders hold the same weights, averages, optimizer, progress and logged losses, bit by bit."""
    a, b = read_checkpoint(output), read_checkpoint(expected)
    assert content_hash(a.get("posthoc")) == content_hash(b.get("posthoc")), "power averages"
    assert snapshots(output) == snapshots(expected)
    for key in ("model", "model_ema", "optimizer", "scaler", "epoch", "progress"):
        assert content_hash(a[key]) == content_hash(b[key]), key
    assert read_log(output) == read_log(expected)
