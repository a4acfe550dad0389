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

from models import AutoencoderKL
from models.vae import LatentScale
from models.vaes import save_vae
from models.weights import content_hash

ROOT = Path(__file__).resolve().parents[2]

GEOMETRY = ("--img_size 16 --vae_embed_dim 4 --vae_stride 4 --class_num 10 "
            "--model flowar_tiny --diffloss_d 1 --diffloss_w 64")
CLASSES = 10


def small_vae():
    torch.manual_seed(1)
    return AutoencoderKL(embed_dim=4, ch=16, ch_mult=(1, 1, 2), num_res_blocks=1, latent_scale=LatentScale(2.0, 0.1))


def write_digits(root, per_class, size=16, splits=("train", "val"), val_per_class=None):
    """Class folders of scikit-learn's digits, real handwriting: <root>/<split>/<digit>/<number>.png."""
    from sklearn.datasets import load_digits  # late: it is heavy

    digits = load_digits()
    for label in range(CLASSES):
        images = digits.images[digits.target == label]
        held_out = images[per_class:per_class + (val_per_class or per_class)]
        for split, chosen in zip(splits, (images[:per_class], held_out)):
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
    return (f"main_flowar.py {GEOMETRY} --vae_path {project}/vae.pth --data_path {project}/images "
            f"--output_dir {output} --epochs 2 --warmup_epochs 1 --batch_size 16 --blr 1e-2 --num_workers 0 "
            f"--device cpu --log_freq 2 --eval_freq 100 --num_step 4 --num_images 4 {extra}")


def start(command, processes=0, restarts=0):
    """Start a program of the project in a process group of its own: under torchrun for processes > 0, with one thread
    each, without a GPU unless it asks for one. Its output goes to finish().
    """
    words, environment = shlex.split(command), {**os.environ, "OMP_NUM_THREADS": "1"}
    if processes:
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                 f"--max_restarts={restarts}", "--monitor_interval=0.1", *words]
    if "--device cuda" not in command:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


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
    children, ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout, {}
    for child in children.split():
        for variable in Path(f"/proc/{child}/environ").read_text().split("\0"):
            if variable.startswith("RANK="):
                ranks[int(variable.removeprefix("RANK="))] = int(child)
    return [ranks[number] for number in sorted(ranks)]


def read_log(output):
    """Lines of a log.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("images_per_second", None), line.pop("memory_gib", None)
    return lines


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
