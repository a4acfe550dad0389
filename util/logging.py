"""What a person sees of a training run: progress bar, TensorBoard and log.jsonl (one JSON object a line)."""
import json
import resource
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from models import FlowARError
from util.distributed import is_main
from util.files import make_directory

QUIET_INTERVAL = 30  # seconds between lines of the bar when nobody watches a terminal


def memory_gib(device):
    """Peak memory in GiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class TrainingLog:
    """Writes on rank 0 and does nothing elsewhere."""

    def __init__(self, log_dir, device):
        self.device = device
        self.writer = self.lines = None
        if is_main():
            make_directory(Path(log_dir))
            try:
                self.writer = SummaryWriter(log_dir)
                self.lines = open(Path(log_dir) / "log.jsonl", "a")
            except OSError as error:
                raise FlowARError(f"{log_dir}: the log cannot be written ({error})") from error
        self.bar = None

    def start_epoch(self, epoch, epochs, images):
        """A bar over the images of one epoch; its rate is images per second over all ranks."""
        interval = 0.5 if sys.stderr.isatty() else QUIET_INTERVAL
        self.bar = tqdm(total=images, desc=f"epoch {epoch + 1}/{epochs}", unit="img", disable=not is_main(),
                        mininterval=interval, maxinterval=max(interval, 10), dynamic_ncols=True)
        self.since, self.images = time.time(), 0

    def advance(self, images):
        self.bar.update(images)
        self.images += images

    def end_epoch(self):
        self.bar.close()

    def rate(self):
        """Images per second over all ranks since it was last asked for."""
        images, since = self.images, self.since
        self.since, self.images = time.time(), 0
        return images / max(self.since - since, 1e-9)

    def training(self, step, epoch, seconds_left, rate, loss, grad_norm, lr, scales):
        """scales: {scale: loss}."""
        memory = memory_gib(self.device)
        left = timedelta(seconds=int(seconds_left))
        self.bar.set_postfix_str(
            f"loss {loss:.4f}, grad {grad_norm:.2f}, lr {lr:.2e}, {memory:.1f} GiB, {left} left", refresh=False)
        self.scalars("train", step, epoch, {
            "loss": loss, "grad_norm": grad_norm, "lr": lr, "images_per_second": rate, "memory_gib": memory,
            **{f"loss_scale_{s}": value for s, value in scales.items()}})

    def scalars(self, group, step, epoch, values):
        if self.writer is None:
            return
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)
        self.lines.write(json.dumps({"group": group, "step": step, "epoch": epoch, **values}) + "\n")
        self.lines.flush()

    def image(self, name, image, step):
        """image: (3, H, W) uint8."""
        if self.writer is not None:
            self.writer.add_image(name, image, step)

    def close(self):
        if self.writer is not None:
            self.writer.close()
            self.lines.close()
