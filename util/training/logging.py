"""What a person sees of a training run: progress bar, TensorBoard and log.jsonl (one JSON object a line)."""
import contextlib
import itertools
import json
import os
import sys
import time
import uuid
from datetime import timedelta
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from models import FlowARError
from models.errors import first_line
from util.cluster import is_main, log, memory_gib
from util.files import make_directory, read_json, write_bytes, write_json

REPORT = "report"  # the group of the line that ends a report
EACH_STEP = ("train", "spike", "bad_step", "device")  # groups that belong to a step, not to the report after it
WANDB, WANDB_PATIENCE = "wandb.json", 60  # which run; seconds to reach it
QUIET_INTERVAL = 30  # seconds between lines of the bar when nobody watches a terminal


class TrainingLog:
    """Writes on rank 0 alone. A run that goes on after `step` takes back what was logged later, as if it never was.

    wandb: project of Weights & Biases that gets what TensorBoard gets, None: none; options: of the run, for it.
    """

    def __init__(self, log_dir, device, step=0, wandb=None, options=None):
        self.bar = self.writer = self.lines = self.wandb = None
        self.device, self.reported = device, set()  # steps whose report is complete
        if not is_main():
            return
        self.path = Path(log_dir) / "log.jsonl"
        make_directory(self.path.parent)
        with self._one_line():
            self._take_back(step) if step else self._set_aside()
            self.writer = SummaryWriter(log_dir, purge_step=step + 1)
            self.lines = open(self.path, "a")
        if wandb:
            self.wandb = Wandb(Path(log_dir), wandb, step, options)

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
        if self.wandb is not None:
            self.wandb.log(step, {f"{group}/{name}": value for name, value in values.items()})
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
        if self.wandb is not None:
            self.wandb.image(step, name, image)

    def flush(self):
        """Bring the lines to the disk."""
        if self.lines is not None:
            with self._one_line():
                os.fsync(self.lines.fileno())

    def close(self):
        if self.writer is not None:
            self.writer.close()
            self.lines.close()
        if self.wandb is not None:
            self.wandb.close()


class Wandb:
    """A run of Weights & Biases that follows TensorBoard, by the same names, against "step". A training that goes on
    goes on in the run whose id stands in wandb.json. Whatever goes wrong there is said once, and the training goes on.
    """

    def __init__(self, folder, project, step, options):
        self.run, known = None, self._known(folder / WANDB, project) if step else None
        with self._warning():
            import wandb
            identity = known or uuid.uuid4().hex[:8]
            write_json({"project": project, "id": identity}, folder / WANDB)
            settings = wandb.Settings(console="off", silent=True, init_timeout=WANDB_PATIENCE)
            run = wandb.init(project=project, id=identity, resume="allow", dir=str(folder), settings=settings)
            run.config.update(json.loads(json.dumps(options or {})), allow_val_change=True)
            run.define_metric("step")
            run.define_metric("*", step_metric="step")  # its own count never goes back, a training does
            self.run = run
            log(f"wandb: run {identity} of project {project}" + self._what_of_before(step, known))

    @staticmethod
    def _known(path, project):
        """Id of this project's run before, None if there is none."""
        with contextlib.suppress(FlowARError):
            saved = read_json(path) if path.is_file() else {}
            if saved.get("project") == project and isinstance(saved.get("id"), str):
                return saved["id"]

    @staticmethod
    def _what_of_before(step, known):
        if not step:
            return ""
        return (f": goes on after step {step}; what it was told of later steps cannot be taken back and stays there, "
                "beside what comes now") if known else f", a new one: it begins after step {step}"

    def log(self, step, values):
        if self.run is not None:
            with self._warning():
                self.run.log({"step": step, **values})

    def image(self, step, name, image):
        """image: (3, H, W) uint8."""
        if self.run is not None:
            with self._warning():
                from wandb import Image
                self.run.log({"step": step, name: Image(image.permute(1, 2, 0).cpu().numpy())})

    def close(self):
        if self.run is not None:
            with self._warning():
                self.run.finish()

    @contextlib.contextmanager
    def _warning(self):
        try:
            yield
        except (Exception, SystemExit) as error:  # of its service, the network, an account
            self.run = None
            log(f"warning: --wandb: {first_line(error)}; training goes on without it, TensorBoard and log.jsonl have "
                "everything")


def read_lines(path):
    """The lines of a log.jsonl as dicts; what is torn or of another kind is left out."""
    for text in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int) and isinstance(line.get("group"), str):
                yield line
