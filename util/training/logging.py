"""What a person sees of a training run: progress bar, TensorBoard and log.jsonl (one JSON object a line)."""
import contextlib
import json
import sys
import time
import uuid
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

from models.errors import first_sentence
from models.weights import sync_file
from util.cluster import is_main, log, memory_gib
from util.files import holds_bytes, make_directory, read_json, write_bytes, write_json

REPORT = "report"  # the group of the line that ends a report
EACH_STEP = ("train", "bad_step", "spike", "device")  # groups that belong to a step; the last two: of earlier versions
WANDB, WANDB_PATIENCE = "wandb.json", 60  # which run; seconds to reach it
QUIET_INTERVAL = 30  # seconds between lines of the bar when nobody watches a terminal


class TrainingLog:
    """Writes on rank 0 alone. A run that resumes at `step` removes what was logged later.

    wandb: project of Weights & Biases that gets what TensorBoard gets, None: none; options: of the run, for it.
    """

    def __init__(self, log_dir, device, step=0, wandb=None, options=None):
        self.device, self.main, self.wandb = device, is_main(), None
        self.reported = set()  # steps whose report is complete
        if not self.main:
            return
        path = Path(log_dir) / "log.jsonl"
        make_directory(path.parent)
        if step:
            self._truncate(path, step)
        elif holds_bytes(path):  # of a run before, which stays
            number = 1
            while (old := path.with_name(f"log.{number}.jsonl")).exists():
                number += 1
            path.rename(old)
        from torch.utils.tensorboard import SummaryWriter  # here, as it takes a third of a second
        self.writer = SummaryWriter(log_dir, purge_step=step + 1)
        self.lines = open(path, "a")
        if wandb:
            self.wandb = Wandb(path.parent, wandb, step, options)

    def _truncate(self, path, step):
        """Remove lines after `step`, those of a report that was not finished, and what was cut off."""
        lines = [line for line in read_lines(path) if line["step"] <= step] if path.is_file() else []
        self.reported = {line["step"] for line in lines if line["group"] == REPORT}
        lines = [line for line in lines if line["step"] < step or line["group"] in EACH_STEP or step in self.reported]
        write_bytes("".join(json.dumps(line) + "\n" for line in lines).encode(), path)

    def start_epoch(self, epoch, epochs, images, done=0):
        """A bar over the images of an epoch, `done` of which are behind; its rate is images per second."""
        interval = 0.5 if sys.stderr.isatty() else QUIET_INTERVAL
        self.bar = tqdm(total=images, initial=done, desc=f"epoch {epoch + 1}/{epochs}", unit="img", dynamic_ncols=True,
                        disable=not self.main, mininterval=interval, maxinterval=max(interval, 10))
        self.since, self.images = time.time(), 0

    def advance(self, images):
        self.bar.update(images)
        self.images += images

    def end_epoch(self):
        self.bar.close()

    def training(self, progress, epoch, images_left, values):
        """values: {loss, grad_norm, lr, loss_scale_<s>}; progress: for the step and the skipped ones; images_left: of
        the training. The rate is that of all ranks since the last call.
        """
        now, memory = time.time(), memory_gib(self.device)
        rate = self.images / max(now - self.since, 1e-9)
        self.since, self.images = now, 0
        text = "loss {loss:.4f}, grad {grad_norm:.2f}, lr {lr:.2e}".format(**values)
        left = timedelta(seconds=int(images_left / rate))
        self.bar.set_postfix_str(f"{text}, {memory:.1f} GiB, {left} left", refresh=False)
        more = {"images_per_second": rate, "memory_gib": memory, "bad_steps": progress.bad_steps}
        self.scalars("train", progress.step, epoch, {**values, **more})

    def scalars(self, group, step, epoch, values):
        """values: {name: number}."""
        if self.main:
            for name, value in values.items():
                self.writer.add_scalar(f"{group}/{name}", value, step)
        if self.wandb is not None:
            self.wandb.log(step, {f"{group}/{name}": value for name, value in values.items()})
        self._write({"group": group, "step": step, "epoch": epoch, **values})

    def image(self, name, image, step):
        """image: (3, H, W) uint8."""
        if self.main:
            self.writer.add_image(name, image, step)
        if self.wandb is not None:
            self.wandb.log(step, {name: image})

    def event(self, group, step, message, **details):
        """Something that happened at a step: a line for people and one for programs."""
        log(f"step {step}: {group.replace('_', ' ')}: {message}")
        self._write({"group": group, "step": step, "message": message, **details})

    def report_done(self, step, epoch):
        """Remember that the report at a step is complete: a run that is killed before repeats it."""
        self.reported.add(step)
        self._write({"group": REPORT, "step": step, "epoch": epoch})

    def _write(self, line):
        if self.main:
            self.lines.write(json.dumps(line) + "\n")
            self.lines.flush()

    def flush(self):
        """Bring the lines to the disk, on rank 0."""
        sync_file(self.lines)

    def close(self):
        if self.main:
            self.writer.close()
            self.lines.close()
        if self.wandb is not None:
            self.wandb.close()


class Wandb:
    """A run of Weights & Biases that follows TensorBoard, by the same names, against "step". A training that resumes
    continues the run whose id stands in wandb.json. Whatever goes wrong there is logged once, and the training goes on.
    """

    def __init__(self, folder, project, step, options):
        self.run, path, before = None, folder / WANDB, {}
        if step and path.is_file():
            before = read_json(path)
        identity = before["id"] if before.get("project") == project else uuid.uuid4().hex[:8]
        with self._warning():
            import wandb
            write_json({"project": project, "id": identity}, path)
            settings = wandb.Settings(console="off", silent=True, init_timeout=WANDB_PATIENCE)
            run = wandb.init(project=project, id=identity, resume="allow", dir=str(folder), settings=settings)
            run.config.update(json.loads(json.dumps(options or {})), allow_val_change=True)
            run.define_metric("step")
            run.define_metric("*", step_metric="step")  # its own count never goes back, a training does
            self.run, self.picture = run, wandb.Image
            log(f"wandb: run {identity} of project {project}; its entries after step {step}, if any, stay")

    def log(self, step, values):
        """values: {name: number, or image (3, H, W) uint8}."""
        if self.run is None:
            return
        with self._warning():
            line = {"step": step}
            for name, value in values.items():
                image = hasattr(value, "permute")
                line[name] = self.picture(value.permute(1, 2, 0).cpu().numpy()) if image else value
            self.run.log(line)

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
            log(f"warning: --wandb: {first_sentence(error)}; training continues without it, TensorBoard and log.jsonl "
                "are complete")


def read_lines(path):
    """The lines of a log.jsonl as dicts; one that was cut off is left out."""
    for text in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and {"step", "group"} <= line.keys():
                yield line
