"""Training checkpoints: written whole or not at all, opened once, read without running code.

checkpoint-last.pth is the release's {model, model_ema, optimizer, epoch, scaler, args} and what this code resumes
from; a released file is a bare state dict of EMA weights. checkpoint-<step>.json stands beside checkpoint-<step>.pth,
{step, epoch, done, milestone}, so that no listing opens tensors. No random state: draws follow from (seed,
step), dropout also from the rank. No checksum: a file gets its name when all of it is on the disk, and one that was
cut lacks the zip's directory, which is its end.
"""
import contextlib
import functools
import os
import re
import threading
import time
from dataclasses import asdict
from pathlib import Path

import torch

from models import FlowARError
from models.hub import EXPORTED, is_name, local_file
from models.registry import LAST, load_model
from models.weights import (BARE, count_classes, find_model, read_weights, recognise_geometry, rename, saved_options,
                            write_file)
from util.cluster import fetch, from_main, log
from util.files import lock_folder, make_directory, read_json, write_json
from util.training.parallel import shard, shard_like
from util.training.progress import Progress
from util.training.record import LatentOrigin, check_data, check_origin, saved_origin

STEP, POWERS = "checkpoint-{:09d}.pth", "posthoc-{:09d}.pth"
OWN = re.compile(r"(?:checkpoint|posthoc)-(\d{9})\.pth")  # a backup's name has other digits
WRITER = "checkpoint writer"  # name of its thread
UNNAMED = ("output_dir", "log_dir", "resume", "dry_run")  # options that may change freely
# Of an optimizer's group: those of the command, not of the checkpoint.
OPTIONS = "lr", "weight_decay", "betas", "fused", "foreach"


# ---- a folder of checkpoints -----------------------------------------------------------------------------------


def list_numbered(folder, kind="checkpoint"):
    """Files that are named as a run's checkpoints, or as its power averages ("posthoc"), the latest step first."""
    paths = [path for path in Path(folder).glob(f"{kind}-*.pth") if OWN.fullmatch(path.name)]
    return sorted(paths, key=step_of, reverse=True)


def step_of(path):
    return int(OWN.fullmatch(path.name)[1])


def list_checkpoints(folder):
    """The checkpoints of a folder, the newest first: checkpoint-last.pth too where it is none of the others."""
    paths, last = list_numbered(folder), Path(folder) / LAST
    if last.is_file() and not any(map(last.samefile, paths)):
        return [last, *paths]
    return paths


def claim_folder(output_dir, resume, dry_run=False):
    """Make and lock a run's folder, see lock_folder. FlowARError if it holds checkpoints of a run that this one does
    not resume. dry_run: nothing is made.
    """
    resumed = Path(resume).parent if Path(resume).is_file() else resume
    if list_checkpoints(output_dir) and not is_same_folder(resumed, output_dir):
        raise FlowARError(f"--output_dir {output_dir} contains checkpoints that this run would overwrite: resume with "
                          f"--resume {output_dir}, or choose another --output_dir")
    if dry_run:
        return None
    make_directory(Path(output_dir))
    return lock_folder(output_dir)


def is_same_folder(resume, output_dir):
    return bool(resume) and Path(resume).resolve() == Path(output_dir).resolve()


def link(path, name):
    """Make `name` another name of the file `path`, whatever it was before; without links there is no such name."""
    temporary = Path(f"{name}.tmp")
    for make_link, target in ((os.link, path), (os.symlink, path.name)):
        temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # of a file system that has no such links
            make_link(target, temporary)
            return rename(temporary, Path(name))
    Path(name).unlink(missing_ok=True)


# ---- writing ---------------------------------------------------------------------------------------------------


class CheckpointWriter:
    """Writes the checkpoints of a run in the background, on rank 0. The last `keep` of them stay, and for ever those
    after a multiple of `keep_every` epochs and the file that `resume`, the run's option, names.

    A file appears as checkpoint-<step>.pth when it is whole and on the disk, then as checkpoint-last.pth too (a hard or
    symbolic link, if there are links). What makes a write fail is raised by the next call; older files go after a newer
    one is there. Files without facts in a .json beside them are others', and stay. Power averages, where they are due,
    are written before their checkpoint and stay. Files of steps after `step`, where this run begins, are renamed.
    """

    def __init__(self, folder, keep, minutes=None, step=0, keep_every=0, resume=""):
        self.folder, self.keep, self.minutes, self.keep_every = Path(folder), keep, minutes, keep_every
        self.thread = self.error = None
        self.saved, self.saved_at = step, time.monotonic()
        self.resumed = Path(resume).name
        for unfinished in self.folder.glob("*.pth.tmp"):  # of a run that was killed while it wrote
            if OWN.fullmatch(unfinished.stem) or unfinished.stem == LAST:
                unfinished.unlink()
        last, paths = self.folder / LAST, list_numbered(self.folder)
        later = [path for path in paths if step_of(path) > step]
        if len(later) < len(paths) and last.is_file() and any(map(last.samefile, later)):
            link(paths[len(later)], last)
        for path in paths + list_numbered(self.folder, "posthoc"):
            if step_of(path) > step:
                path.replace(f"{path}.later")
                log(f"{path}: later than step {step}, where this run starts; renamed to {path.name}.later")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        """Whatever ends a training, what is being written gets finished."""
        self.wait()

    def is_due(self):
        """Whether the last checkpoint is older than `minutes`."""
        return self.minutes is not None and time.monotonic() - self.saved_at >= 60 * self.minutes

    def wants(self, step):
        """Whether there is no checkpoint of this step yet; waits for the write before, as two copies may not fit."""
        self.wait()
        return self.saved != step

    def save(self, content, step):
        """Begin to write `content`, which nothing may change (snapshot); waits for the write before."""
        self.wait()
        self.saved, self.saved_at = step, time.monotonic()
        self.thread = threading.Thread(target=self._write, name=WRITER, args=(content, self.folder / STEP.format(step)))
        self.thread.start()

    def wait(self):
        """Until nothing is being written; raises what made a write fail."""
        if self.thread is not None:
            self.thread.join()
        if self.error is not None:
            raise self.error

    def _write(self, content, path):
        try:
            progress, every = content["progress"], content["args"].get("posthoc_ema")
            if every and progress["step"] % every == 0 and not progress["bad_in_a_row"]:
                write_file(halve_powers(content), self.folder / POWERS.format(progress["step"]))
            facts = {name: progress[name] for name in ("step", "epoch", "done")}
            milestone = self.keep_every and progress["done"] == 0 and progress["epoch"] % self.keep_every == 0
            write_json({**facts, "milestone": bool(milestone)}, path.with_suffix(".json"))
            write_file(content, path)
            link(path, self.folder / LAST)
            self._remove_old()
        except Exception as error:
            self.error = error

    def _remove_old(self):
        removable = []
        for path in list_numbered(self.folder):
            facts = path.with_suffix(".json")
            if path.name != self.resumed and facts.is_file() and not read_json(facts)["milestone"]:
                removable.append(path)
        for path in removable[self.keep:]:
            path.unlink()
            path.with_suffix(".json").unlink()


def content_of(network, ema, optimizer, scaler, progress, record):
    """What a training checkpoint holds; record: see util.training.record.make_record."""
    content = {
        **record,
        "model": network.state_dict(),
        "model_ema": ema.module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "optimizer_of": describe_optimizer(optimizer, network),
        "epoch": progress.epoch - 1,  # the last one that is complete, as the release counts
        "scaler": scaler.state_dict(),
        "progress": asdict(progress),
    }
    if ema.powers:
        content["posthoc"] = {width: power.tensors for width, power in ema.powers.items()}
    return content


def describe_optimizer(optimizer, network):
    """What a checkpoint says of an optimizer, so that no other one resumes with its state, nor one of other parameters:
    its class, and the parameters' names in the order of its groups.
    """
    names = {parameter: name for name, parameter in network.named_parameters()}
    groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    return {"class": type(optimizer).__name__, "parameters": groups}


def halve_powers(content):
    """The power averages of a checkpoint in float16, but for tensors that this cannot hold."""
    largest, powers = torch.finfo(torch.half).max, {}
    for width, tensors in content["posthoc"].items():
        powers[width] = {name: value.half() if value.abs().max() <= largest else value
                         for name, value in tensors.items()}
    return {"step": content["progress"]["step"], "posthoc": powers}


# ---- opening ---------------------------------------------------------------------------------------------------


class Checkpoint:
    """A file that training starts from, opened once and memory-mapped: the ranks of a host share its pages."""

    def __init__(self, path, content):
        self.path, self.content = Path(path), content
        self.options = saved_options(content)  # of the run that wrote it, {} of weights alone
        self.has_optimizer = "optimizer" in content
        self.global_batch = self.options.get("global_batch") if self.has_optimizer else None

    @classmethod
    def open(cls, path):
        """FlowARError unless the file is whole."""
        return cls(path, read_weights(path))

    def __reduce__(self):
        return Checkpoint.open, (self.path,)  # what is sent to another rank is the path, and that rank opens it

    @functools.cached_property
    def raw(self):
        """The raw weights, or what there is."""
        return find_model(self.content, self.path, "raw first")

    @property
    def class_num(self):
        return count_classes(self.raw.tensors)

    def geometry(self, vae_embed_dim):
        """What its tensors say of the options, see recognise_geometry."""
        return recognise_geometry(self.raw.tensors, self.path, vae_embed_dim)

    def continues(self, start_epoch):
        """Whether a training from it continues its run: it has more than weights, and --start_epoch asks for no other
        epoch than its run was started with.
        """
        return self.has_optimizer and start_epoch in (None, self.options.get("start_epoch"))

    def check_trained_on(self, record):
        """FlowARError if it is of another VAE, or its labels were other classes."""
        check_origin(self.path, saved_origin(self.content), LatentOrigin(**record["vae"]))
        if self.continues(record["args"]["start_epoch"]):
            check_data(self.content, self.path, record["data"], record["args"]["class_num"])

    def progress(self, steps):
        """Its Progress; one without it, such as the release's, was written after a whole epoch of `steps`."""
        if "progress" not in self.content:
            epochs = self.content["epoch"] + 1
            return Progress(epoch=epochs, step=epochs * steps)
        saved = dict(self.content["progress"])
        saved.pop("recent", None)  # losses, of earlier versions
        return Progress(**saved)

    def changes(self, options):
        """'lr 0.1 -> 0.2, ...': options that are others now."""
        changed = []
        for name, before in self.options.items():
            if name in options and name not in UNNAMED and options[name] != before:
                changed.append(f"{name} {before} -> {options[name]}")
        if self.options.get("ema_warmup"):  # of earlier versions
            changed.append("--ema_warmup no longer exists: use a lower --ema_rate")
        return ", ".join(changed)


def open_newest(name):
    """The newest whole Checkpoint of a file or directory, by path or name; FlowARError without one. A damaged one is
    logged.
    """
    path = local_file(name)
    candidates = [path]
    if path.is_dir():
        candidates = list_checkpoints(path) or [path / EXPORTED, path / BARE]
    candidates = [candidate for candidate in candidates if candidate.is_file()]
    if not candidates:
        what = "no checkpoint in it" if path.is_dir() else "not found"
        raise FlowARError(f"{name}: {what}: expected a checkpoint file, or a directory with {LAST}, {EXPORTED} or "
                          f"{BARE}")
    for candidate in candidates[:-1]:
        try:
            return Checkpoint.open(candidate)
        except (FlowARError, OSError) as error:
            log(f"warning: {error}; using the previous checkpoint")
    return Checkpoint.open(candidates[-1])


def open_on_all(name):
    """open_newest on every rank: rank 0 chooses the file. A collective."""
    fetch(name)
    if is_name(name):  # each host has its own copy
        return Checkpoint.open(local_file(name))
    return from_main(lambda: open_newest(name))


def find_start(resume, output_dir):
    """The Checkpoint that --resume names, None to start from scratch: without it, or where it is a new --output_dir, as
    in the published command. A collective.
    """
    if not resume:
        return None
    if from_main(lambda: is_same_folder(resume, output_dir) and not list_checkpoints(resume)):
        log(f"no {LAST} in {resume}: starting from scratch")
        return None
    return open_on_all(resume)


# ---- resuming --------------------------------------------------------------------------------------------------


def resume(start, parts, record):
    """Load a Checkpoint, if any, into parts (network, EMA, optimizer, scaler); returns the Progress from which training
    continues: the checkpoint's, or the beginning of --start_epoch. record: of now, to compare with the checkpoint's.
    """
    network, ema, optimizer, scaler = parts
    options, steps = record["args"], record["images"] // record["args"]["global_batch"]
    first = options["start_epoch"] or 0
    beginning = Progress(epoch=first, step=first * steps)
    continues = start is not None and start.continues(options["start_epoch"])
    if ema.powers and first and not continues:
        raise FlowARError(f"--start_epoch {first} and --posthoc_ema: the averages must begin at step 0: leave out one "
                          "of the two")
    if start is None:
        return beginning

    # What a file of weights has too.
    path, average = start.path, find_model(start.content, start.path)
    left_out = load_model(network, shard_like(start.raw.tensors, network.state_dict()), path)
    load_model(ema.module, shard_like(average.tensors, ema.module.state_dict()), path)
    if not start.has_optimizer:
        log(f"{path}: network: {start.raw.describe(left_out)}; EMA: {average.describe()}; the optimizer starts from "
            "scratch")
        return beginning

    # What only a training's checkpoint has.
    load_optimizer(optimizer, scaler, network, start)
    if not continues:
        log(f"{path}: --start_epoch: resumes with epoch {first + 1}")
        return beginning
    load_powers(ema, start)
    progress = start.progress(steps)
    if progress.done:
        check_same_epoch(start, record)
    changes = start.changes(options)
    log(f"{path}: resumes from step {progress.step}, in epoch {progress.epoch + 1}"
        + (f", with other options than before: {changes}" if changes else ""))
    if progress.epoch >= options["epochs"]:
        log(f"nothing to train: the next epoch is {progress.epoch + 1}, --epochs is {options['epochs']}")
    return progress


def check_same_epoch(start, record):
    """FlowARError unless the rest of a checkpoint's epoch has the images and batches that it began with."""
    for what, saved, now in (("images", start.content.get("images"), record["images"]),
                             ("global batch", start.global_batch, record["args"]["global_batch"])):
        if saved not in (None, now):
            raise FlowARError(f"{start.path}: stopped within an epoch with {what} {saved}, now {what} is {now}: keep "
                              f"{saved} until the epoch ends, or set --start_epoch")


def load_optimizer(optimizer, scaler, network, start):
    """Load the whole state of an optimizer, whatever it is, and of the gradient scaler; FlowARError if it is another
    optimizer's, or of other parameters.
    """
    now, saved = describe_optimizer(optimizer, network), start.content["optimizer"]
    before = start.content.get("optimizer_of", {**now, "class": "AdamW"})  # the release's checkpoints do not name it
    if before["class"] != now["class"]:
        raise FlowARError(f"{start.path}: the optimizer is {before['class']}, this run uses {now['class']}: use the "
                          "same, or start a new run from its weights with --init_from")
    counts = [len(group["params"]) for group in saved["param_groups"]]
    if before != now or counts != list(map(len, now["parameters"])):
        raise FlowARError(f"{start.path}: the optimizer has other parameters or parameter groups "
                          f"({' + '.join(map(str, counts))} tensors) than this run: use the same, or start a new run "
                          "with --init_from")
    parameters, groups, state = [], [], {}
    for group, own in zip(saved["param_groups"], optimizer.param_groups):
        parameters += own["params"]
        groups.append({**group, **{name: own[name] for name in OPTIONS if name in own}})
    for number, values in saved["state"].items():
        state[number] = {name: shard(value, parameters[number]) for name, value in values.items()}
    optimizer.load_state_dict({**saved, "state": state, "param_groups": groups})
    for values in optimizer.state.values():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                values[name] = value.clone()  # nothing stays mapped to the file, which will be removed
    if start.content.get("scaler"):
        scaler.load_state_dict(start.content["scaler"])


def load_powers(ema, start):
    """Load the power averages; FlowARError unless the checkpoint has them, of these parameters."""
    for width, power in ema.powers.items():
        saved = start.content.get("posthoc", {}).get(width, {})
        if shapes_of(saved) != shapes_of(power.tensors):
            raise FlowARError(f"{start.path}: no --posthoc_ema averages of this model found, and they must begin at "
                              "step 0: leave the option out, or train from scratch in another folder")
        for name, value in power.tensors.items():
            value.copy_(shard(saved[name], value))


def shapes_of(tensors):
    return {name: value.shape for name, value in tensors.items()}
