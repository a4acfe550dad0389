"""What a person sees of a training run: progress bar, TensorBoard and log.jsonl (one JSON object a line)."""
import contextlib
import itertools
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from models import FlowARError
from util.cluster import is_main, log, memory_gib
from util.files import make_directory, write_bytes

REPORT = "report"  # the group of the line that ends a report
EACH_STEP = ("train", "spike", "bad_step")  # groups that belong to a step, not to the report after it
QUIET_INTERVAL = 30  # seconds between lines of the bar when nobody watches a terminal


class TrainingLog:
    """Writes on rank 0 alone. A run that goes on after `step` takes back what was logged later, as if it never was."""

    def __init__(self, log_dir, device, step=0):
        self.bar = self.writer = self.lines = None
        self.device, self.reported = device, set()  # steps whose report is complete
        if not is_main():
            return
        self.path = Path(log_dir) / "log.jsonl"
        make_directory(self.path.parent)
        with self._one_line():
            self._take_back(step) if step else self._set_aside()
            self.writer = SummaryWriter(log_dir, purge_step=step + 1)
            self.lines = open(self.path, "a")

    def _set_aside(self):
        """A run from scratch begins a file of its own; that of a run before stays."""
        if self.path.is_file() and self.path.stat().st_size:
            number = next(n for n in itertools.count(1) if not self.path.with_name(f"log.{n}.jsonl").exists())
            self.path.rename(self.path.with_name(f"log.{number}.jsonl"))

    def _take_back(self, step):
        """Drop lines after `step`, those of a report that was not finished, and what was torn."""
        lines = [line for line in read_lines(self.path) if line["step"] <= step] if self.path.is_file() else []
        self.reported = {line["step"] for line in lines if line["group"] == REPORT}
        kept = [line for line in lines if line["step"] < step or line["group"] in EACH_STEP or step in self.reported]
        write_bytes("".join(json.dumps(line) + "\n" for line in kept).encode(), self.path)

    @contextlib.contextmanager
    def _one_line(self):
        try:
            yield
        except OSError as error:
            raise FlowARError(f"{self.path.parent}: the log cannot be written ({error})") from error

    def start_epoch(self, epoch, epochs, images, done=0):
        """A bar over the images of an epoch, `done` of which are behind; its rate is images per second."""
        interval = 0.5 if sys.stderr.isatty() else QUIET_INTERVAL
        self.bar = tqdm(total=images, initial=done, desc=f"epoch {epoch + 1}/{epochs}", unit="img", dynamic_ncols=True,
                        disable=not is_main(), mininterval=interval, maxinterval=max(interval, 10))
        self.since, self.images = time.time(), 0

    def advance(self, images):
        self.bar.update(images)
        self.images += images

    def end_epoch(self):
        self.bar.close()

    def rate(self, now):
        """Images per second over all ranks between the last call's time and this one's."""
        images, since = self.images, self.since
        self.since, self.images = now, 0
        return images / max(now - since, 1e-9)

    def training(self, progress, epoch, seconds_left, rate, values):
        """values: {loss, grad_norm, lr, loss_scale_<s>}; progress: for the step and the skipped ones."""
        shown, memory = {name: values[name] for name in ("loss", "grad_norm", "lr")}, memory_gib(self.device)
        self.bar.set_postfix_str("loss {loss:.4f}, grad {grad_norm:.2f}, lr {lr:.2e}".format(**shown)
                                 + f", {memory:.1f} GiB, {timedelta(seconds=int(seconds_left))} left", refresh=False)
        more = {"images_per_second": rate, "memory_gib": memory, "bad_steps": progress.bad_steps}
        self.scalars("train", progress.step, epoch, {**shown, **more, **values})

    def scalars(self, group, step, epoch, values):
        if self.writer is not None:
            with self._one_line():
                for name, value in values.items():
                    self.writer.add_scalar(f"{group}/{name}", value, step)
        self._write({"group": group, "step": step, "epoch": epoch, **values})

    def event(self, group, step, message, **details):
        """Something that happened at a step: a line for people and one for programs."""
        log(f"step {step}: {group.replace('_', ' ')}: {message}")
        self._write({"group": group, "step": step, "message": message, **details})

    def report_done(self, step, epoch):
        """Remember that the report at a step is complete: a run that is killed before repeats it."""
        self.reported.add(step)
        self._write({"group": REPORT, "step": step, "epoch": epoch})

    def _write(self, line):
        if self.lines is not None:
            with self._one_line():
                self.lines.write(json.dumps(line) + "\n")
                self.lines.flush()

    def image(self, name, image, step):
        """image: (3, H, W) uint8."""
        if self.writer is not None:
            self.writer.add_image(name, image, step)

    def flush(self):
        """Bring the lines to the disk."""
        if self.lines is not None:
            with self._one_line():
                os.fsync(self.lines.fileno())

    def close(self):
        if self.writer is not None:
            self.writer.close()
            self.lines.close()


def read_lines(path):
    """The lines of a log.jsonl as dicts; what is torn or of another kind is left out."""
    for text in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int) and isinstance(line.get("group"), str):
                yield line
