"""Training checkpoints: written whole or not at all, read without running code.

checkpoint-last.pth is the release's {model, model_ema, optimizer, epoch, scaler, args} and `progress`, `images` and
`checksum`; a released file is a bare state dict of EMA weights. No random state: draws follow from (seed, step, rank).
"""
import contextlib
import fcntl
import os
import re
import socket
import threading
import time
from pathlib import Path

import torch

from models import FlowARError
from models.hub import EXPORTED, is_remote, local_file
from models.registry import LAST, load_model
from models.weights import (BARE, check_content, content_hash, find_model, read_file, read_weights, recognise_geometry,
                            saved_options, write_file)
from util.cluster import before_leaving, fetch, from_main, log
from util.files import check_place, make_directory
from util.training.progress import Progress
from util.training.provenance import LatentOrigin, check_data, check_origin, saved_origin
from util.training.parallel import cut, spread

STEP, POWERS = "checkpoint-{:09d}.pth", "posthoc-{:09d}.pth"
OWN = re.compile(r"(?:checkpoint|posthoc)-(\d{9})\.pth")  # a backup's name has other digits
WRITER = "checkpoint writer"  # name of its thread
LEARNING = ("global_batch", "lr", "min_lr", "lr_schedule", "epochs", "warmup_epochs", "weight_decay", "grad_clip",
            "t_dist", "condition_noise", "ema_rate", "ema_warmup", "attn_dropout", "proj_dropout", "label_drop_prob",
            "flip", "background", "precision", "seed")
SAMPLED = ("num_step", "num_step_last", "num_step_schedule", "time_grid", "solver", "cfg", "cfg_schedule", "guidance",
           "guidance_low", "temperature")  # with which a run's weights are sampled by default
MOMENTS = "exp_avg", "exp_avg_sq"  # of AdamW, a parameter
LOCK, LOCK_PATIENCE = ".lock", 30  # seconds: the ranks of a launcher that was killed need some to leave


class CheckpointWriter:
    """Writes the checkpoints of a run in the background, on rank 0, and keeps the last `keep` of them, and for ever
    those after a multiple of `keep_every` epochs, of this run's or of that which wrote them. resume: the run's option;
    a file that it names in this folder stays.

    A file appears as checkpoint-<step>.pth when it is whole and on the disk, then as checkpoint-last.pth too (a hard or
    symbolic link). A failed write raises FlowARError from the next call; older files go after a newer one is there.
    Files that are not this class's, see of_steps, are left alone. A snapshot of a checkpoint's power averages, where it
    is due, is written before it and stays.
    """

    def __init__(self, folder, keep, minutes=None, step=0, keep_every=0, resume=""):
        self.folder, self.keep, self.minutes, self.keep_every = Path(folder), keep, minutes, keep_every
        self.writer = self.error = None
        self.saved, self.saved_at = step, time.monotonic()
        for torn in self.folder.glob("*.pth.tmp"):  # of a run that was killed while it wrote
            if OWN.fullmatch(torn.stem) or torn.stem == LAST:
                torn.unlink()
        last, owned = self.folder / LAST, of_steps(self.folder)
        self.spared = {path.name for path in numbered(self.folder) if path not in owned}  # and milestones
        if Path(resume).is_file() and Path(resume).parent.samefile(self.folder):
            self.spared.add(Path(resume).name)
        aside = [later for later in owned if step_of(later) > step]
        left = [path for path in owned if path not in aside]
        if left and last.is_file() and any(last.samefile(later) for later in aside):
            link(left[0], last)  # it must not be another name of one that goes
        for later in [*aside, *(path for path in numbered(self.folder, "posthoc") if step_of(path) > step)]:
            rename_later(later, step)
        before_leaving(self.wait)

    def is_due(self):
        """Whether the last checkpoint is older than `minutes`."""
        return self.minutes is not None and time.monotonic() - self.saved_at >= 60 * self.minutes

    def wants(self, step):
        """Whether there is no checkpoint of this step yet; waits for the write before, as two copies may not fit."""
        self.wait()
        return self.saved != step

    def save(self, content, step):
        """Begin to write `content`, which nothing may change (snapshot); waits for the write before, if it is not done.
        """
        self.wait()
        arguments = content, self.folder / STEP.format(step)
        self.saved, self.saved_at = step, time.monotonic()
        self.writer = threading.Thread(target=self._write, name=WRITER, args=arguments)
        self.writer.start()

    def wait(self):
        """Until nothing is being written."""
        if self.writer is not None:
            self.writer.join()
        self.check()

    def check(self):
        """FlowARError if a write has failed."""
        if self.error is not None:
            raise self.error

    def _remove_old(self):
        mine = [path for path in numbered(self.folder) if path.name not in self.spared]
        for old in mine[self.keep:]:
            content = saved_content(old)
            progress, every = progress_of(content) or {}, saved_options(content).get("keep_every")
            if progress.get("step") != step_of(old) or any(is_milestone(progress, n) for n in (self.keep_every, every)):
                self.spared.add(old.name)
            else:
                old.unlink(missing_ok=True)

    def _write(self, content, path):
        try:
            if powers_due(content):
                write_whole(powers_of(content), self.folder / POWERS.format(content["progress"]["step"]))
            write_whole(content, path)
            link(path, self.folder / LAST)
            self._remove_old()
        except FlowARError as error:
            self.error = error
        except OSError as error:
            self.error = FlowARError(f"{error.filename}: {error.strerror}")


def write_whole(content, path):
    """write_file, with a checksum of the content."""
    write_file({**content, "checksum": content_hash(content)}, path)


def powers_due(content):
    """Whether a checkpoint's power averages are kept as a snapshot: every --posthoc_ema steps, but no bad ones."""
    every, progress = saved_options(content).get("posthoc_ema"), content["progress"]
    return bool(every and progress["step"] % every == 0 and not progress["bad_in_a_row"])


def powers_of(content):
    """A snapshot of a checkpoint's power averages: float16, which halves it, but tensors that this cannot hold."""
    def half(value):
        return value.half() if value.abs().max() <= torch.finfo(torch.half).max else value

    return {"step": content["progress"]["step"],
            "posthoc": {width: {name: half(value) for name, value in power.items()}
                        for width, power in content["posthoc"].items()}}


def lock(folder, patience=LOCK_PATIENCE):
    """Hold a folder until this process ends; FlowARError if another still does after `patience` s. Keep the file."""
    end, told = time.monotonic() + patience, False
    try:
        file = open(Path(folder) / LOCK, "a+")
    except OSError as error:
        raise FlowARError(f"{folder}: cannot be written ({error.strerror})") from error
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = f"{folder}: another run writes here ({file.read().strip() or 'unknown'})"
            if time.monotonic() > end:
                raise FlowARError(f"{holder}: wait for it or stop it, or choose another --output_dir") from None
            if not told:
                log(f"{holder}: waiting up to {patience} s for it to leave")
            told = True
            time.sleep(0.5)
        except OSError:  # a file system without locks
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def refuse_locked(folder):
    """FlowARError if another run holds a folder."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), open(Path(folder) / LOCK) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # until the file is closed
        except (BlockingIOError, PermissionError):
            raise FlowARError(f"{folder}: another run writes here ({file.read().strip() or 'unknown'}): wait for it or "
                              "stop it, or choose another --output_dir") from None


def hold(folder, resume, look=False):
    """A run's output folder, made and locked; FlowARError if it would overwrite another run's checkpoints there.
    look: only that; nothing is made, and nobody has to wait.
    """
    if look:
        check_place(Path(folder))
        refuse_overwriting(folder, resume)
        return refuse_locked(folder)
    make_directory(Path(folder))
    refuse_overwriting(folder, resume)
    held = lock(folder)
    refuse_overwriting(folder, resume)  # those of the run that it waited for
    return held


def rename_later(later, step):
    """Rename a checkpoint later than `step`, where a run goes on. Of damaged ones one stays: they fill the disk."""
    name = later.with_name(f"{later.name}.aside")
    try:
        check_whole(later)
    except FlowARError:
        name = later.with_name(f"{later.name}.damaged")
        for old in later.parent.glob("checkpoint-*.pth.damaged"):
            if OWN.fullmatch(old.stem):
                old.unlink()
    later.replace(name)
    log(f"{later}: is later than step {step} that this run goes on from; renamed to {name.name}")


def link(path, name):
    """Make `name` another name of the file `path`, whatever it was before."""
    temporary = Path(f"{name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        temporary.symlink_to(path.name)
    temporary.replace(name)


def of_steps(folder):
    """checkpoint-<step>.pth of a folder, the latest step first: of nine digits, and of that step, or damaged."""
    progress = {path: progress_of(saved_content(path)) or {"step": step_of(path)} for path in numbered(folder)}
    return [path for path, found in progress.items() if found.get("step") == step_of(path)]


def numbered(folder, kind="checkpoint"):
    """Files that are named as a run's checkpoints, or as its snapshots ("posthoc"), the latest step first."""
    found = Path(folder).glob(f"{kind}-*.pth")
    return sorted((path for path in found if OWN.fullmatch(path.name)), key=step_of, reverse=True)


def step_of(path):
    return int(OWN.fullmatch(path.name)[1])


def saved_content(path):
    """What a file holds, memory-mapped; None if it cannot be read."""
    try:
        return read_file(path, mmap=True)
    except FlowARError:
        return None


def progress_of(content):
    """`progress` of a file's content, of step None where it has none; None of none."""
    if content is None:
        return None
    progress = content.get("progress") if isinstance(content, dict) else None
    return progress if isinstance(progress, dict) and progress else {"step": None}


def is_milestone(progress, epochs):
    """Whether a checkpoint was saved after a multiple of so many epochs; 0, or what is no number of them: none is."""
    done = progress.get("epoch") if progress.get("done") == 0 else None
    return all(type(number) is int and number > 0 for number in (done, epochs)) and done % epochs == 0


def all_in(folder):
    """The checkpoints of a folder, the newest first: checkpoint-last.pth too where it is none of the others."""
    found, last = of_steps(folder), Path(folder) / LAST
    alone = last.is_file() and not any(last.samefile(other) for other in found)
    return [last, *found] if alone else found


def find(resume):
    """Path of the newest whole checkpoint of --resume, a file or directory; FlowARError if none. Names damaged ones."""
    path = local_file(resume)
    if not path.is_file() and not path.is_dir():
        raise FlowARError(f"{resume}: no such checkpoint file or directory")
    found = [path]
    if path.is_dir():
        found = all_in(path) or list(filter(Path.is_file, (path / EXPORTED, path / BARE)))[:1]
    if not found:
        raise FlowARError(f"{resume}: no {LAST} in this directory, nor {EXPORTED} or {BARE}")
    for candidate, before in zip(found, [*found[1:], None]):
        try:
            check_whole(candidate)
            return candidate
        except FlowARError as error:
            if before is None:
                none_left = f"; no whole one is left in {resume}: put one there, or begin anew in another folder"
                raise FlowARError(f"{error}{none_left if path.is_dir() else ''}") from error
            log(f"warning: {error}; going back to {before.name}")


def check_whole(path):
    """FlowARError unless the file can be read and, if it carries a checksum, agrees with it."""
    check_content(read_file(path, mmap=True), path)


def read_model_file(resume):
    """(path, content) of --resume, memory-mapped: the ranks of a host share its pages."""
    fetch(resume)
    path = from_main(lambda: find(resume))
    path = local_file(resume) if is_remote(resume) else path  # each host has its own cache
    return path, read_weights(path)


def record(options, data, origin):
    """What checkpoints say of a run beside its state. options: {name: value} of the program; data, origin: see
    util.training.provenance.
    """
    return {"args": {name: tuple(value) if isinstance(value, tuple) else value  # no named tuples
                     for name, value in options.items()},
            "images": data["images"], "data": data, "vae": origin._asdict()}


def content_of(network, ema, optimizer, scaler, progress, record):
    """What a training checkpoint holds; record: see record()."""
    return {
        **record,
        "model": network.state_dict(),
        "model_ema": ema.module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": progress.epoch - 1,  # the last one that is complete, as the release counts
        "scaler": scaler.state_dict(),
        "progress": progress.state_dict(),
        **({"posthoc": {width: power.tensors for width, power in ema.powers.items()}} if ema.powers else {}),
    }


def load_optimizer(optimizer, scaler, content, path):
    """Load the state of AdamW and of the gradient scaler; FlowARError if it is not of these parameters."""
    try:
        saved = content["optimizer"]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, state in saved["state"].items():
            for name in MOMENTS:
                found, own = state[name].shape, parameters[number].shape
                if found != own:
                    raise ValueError(f"{name} {number} is {tuple(found)}, its parameter {tuple(own)}")
        groups = [{**group, **{name: own[name] for name in ("weight_decay", "fused")}}  # the options', not the file's
                  for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True)]
        moments = {number: {name: cut(value, parameters[number]) if name in MOMENTS else value
                            for name, value in state.items()} for number, state in saved["state"].items()}
        optimizer.load_state_dict({**saved, "state": moments, "param_groups": groups})
        for state in optimizer.state.values():  # nothing may stay mapped to the file, which will be replaced
            for name, value in state.items():
                state[name] = value.clone() if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value
        if content.get("scaler"):
            scaler.load_state_dict(content["scaler"])
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise FlowARError(f"{path}: optimizer state cannot be used ({error})") from error


def load_powers(ema, content, path):
    """Load the power averages; FlowARError unless the checkpoint has them, of these parameters."""
    for width, power in ema.powers.items():
        saved = content["posthoc"].get(width) if isinstance(content.get("posthoc"), dict) else None
        if not isinstance(saved, dict) or shapes_of(saved) != shapes_of(power.tensors):
            raise FlowARError(f"{path}: it has no averages of --posthoc_ema of this model: they begin with a training: "
                              "leave the option out, or begin anew in another folder")
        for name, value in power.tensors.items():
            value.copy_(cut(saved[name], value))


def shapes_of(tensors):
    """{name: shape}, None for what is no tensor."""
    return {name: getattr(value, "shape", None) for name, value in tensors.items()}


def load_progress(content, path, steps):
    """Progress of a checkpoint; one without it, such as the release's, was written after a whole epoch of `steps`."""
    if "progress" in content:
        return Progress.of(content["progress"], path)
    if not isinstance(content.get("epoch"), int) or content["epoch"] < 0:
        raise FlowARError(f"{path}: its epoch is {content.get('epoch')!r}: expected a number of 0 or more")
    return Progress(epoch=content["epoch"] + 1, step=(content["epoch"] + 1) * steps)


def refuse_overwriting(output_dir, resume):
    """FlowARError if --output_dir holds checkpoints of a run that this one does not go on from."""
    folder = Path(resume).parent if Path(resume).is_file() else Path(resume)
    if all_in(output_dir) and not (resume and folder.is_dir() and folder.samefile(output_dir)):
        raise FlowARError(f"--output_dir {output_dir} holds checkpoints that this run would overwrite: go on from them "
                          f"with --resume {output_dir}, or choose another --output_dir")


def way_on(output_dir, resume):
    """What cluster.set_way_on takes: without --resume the same command would be refused, with a file it would go back.
    """
    same = resume and Path(resume).resolve() == Path(output_dir).resolve()
    return f"the same command{'' if same else f' with --resume {output_dir}'} goes on", "from the last checkpoint"


def find_start(resume, output_dir):
    """(path, content) of the checkpoint of --resume, (None, {}) to start from scratch. Rank 0 decides for all."""
    def choose():
        asked, own = Path(resume), Path(output_dir)  # which a dry run does not make
        same = asked.samefile(own) if asked.is_dir() and own.is_dir() else asked.absolute() == own.absolute()
        here = resume and same
        if here and not all_in(resume):  # the published first run
            log(f"no {LAST} in {resume}: starting from scratch")
            return None
        return find(resume) if resume else None

    fetch(resume)
    path = from_main(choose)
    path = local_file(resume) if is_remote(resume) else path
    return (path, read_weights(path)) if path else (None, {})


def class_num_of(content, path):
    """Number of classes of a checkpoint's content, None without one."""
    return len(find_model(content, path, "raw first").tensors["class_emb.weight"]) - 1 if content else None


def global_batch_of(content):
    """That of the run that a checkpoint's content is of; None of weights alone, which begin a new training."""
    return saved_options(content).get("global_batch") if "optimizer" in content else None


def geometry_of(content, path, vae_embed_dim):
    """What a checkpoint's tensors say of the options, see recognise_geometry."""
    return recognise_geometry(find_model(content, path, "raw first").tensors, path, vae_embed_dim)


def begins_anew(content, options):
    """Whether --start_epoch asks for another epoch than the one after the checkpoint's."""
    return options["start_epoch"] not in (None, saved_options(content).get("start_epoch"))


def check_trained_on(content, path, record):
    """FlowARError if a checkpoint to go on from is of another VAE, or its labels were other classes."""
    check_origin(path, saved_origin(content), LatentOrigin(**record["vae"]))
    if "optimizer" in content and not begins_anew(content, record["args"]):
        check_data(content, path, record["data"], record["args"]["class_num"])


def resume(path, content, parts, record):
    """Load content into parts (network, EMA, optimizer, scaler); returns the Progress to go on from. record: of now, to
    compare with the content's.
    """
    network, ema, optimizer, scaler = parts
    options, images = record["args"], record["images"]
    batch, start, before = options["global_batch"], options["start_epoch"], saved_options(content)
    steps = images // batch
    fresh = Progress(epoch=start or 0, step=(start or 0) * steps)
    anew = "optimizer" not in content or begins_anew(content, options)
    if ema.powers and anew and fresh.step:
        raise FlowARError(f"--start_epoch {start} and --posthoc_ema: its averages begin with a training and go by the "
                          "step: leave out one of them")
    if path is None:
        return fresh
    raw, average = find_model(content, path, "raw first"), find_model(content, path)
    left_out = load_model(network, spread(raw.tensors, network.state_dict()), path)
    load_model(ema.module, spread(average.tensors, ema.module.state_dict()), path)
    if left_out or "optimizer" not in content:
        log(f"{path}: network: {raw.describe(left_out)}; EMA: {average.describe()}")
    if options.get("init_from") and options["init_from"] != before.get("init_from"):
        log(f"warning: {path}: these weights go on; --init_from {options['init_from']} is not read")
    if "optimizer" not in content:
        log(f"{path}: weights alone; the optimizer starts fresh")
        return fresh
    load_optimizer(optimizer, scaler, content, path)
    if anew:
        log(f"{path}: --start_epoch: going on with epoch {start + 1}")
        return fresh
    load_powers(ema, content, path)
    if "posthoc" in content and not ema.powers:
        log(f"warning: {path}: without --posthoc_ema its averages end here, for good, and none of later steps can be "
            "rebuilt: if that is not meant, stop, and give it again")
    progress = load_progress(content, path, steps)
    if progress.done:
        for what, saved, now in (("images", content.get("images"), images),
                                 ("global batch", before.get("global_batch"), batch)):
            if saved not in (None, now):
                raise FlowARError(f"{path}: it is in the middle of an epoch with {what} {saved}, now {what} is {now}: "
                                  "go on with the same until the epoch ends, or give --start_epoch")
    # Of what decides what is learned; None is not known, as a cache's background may be.
    changed = [name for name in LEARNING
               if None not in (before.get(name), options[name]) and before[name] != options[name]]
    changed += [name for name in SAMPLED if name in before and before[name] != options.get(name)]
    changed = ", ".join(f"{name} {' -> '.join('not given' if value is None else str(value) for value in pair)}"
                        for name, pair in ((name, (before[name], options.get(name))) for name in changed))
    log(f"{path}: going on after step {progress.step}, in epoch {progress.epoch + 1}"
        + (f", with other options than before: {changed}" if changed else ""))
    if progress.epoch >= options["epochs"]:
        log(f"nothing to train: the first epoch would be number {progress.epoch + 1} of --epochs {options['epochs']}")
    return progress
