"""Training checkpoints and released weights: written whole or not at all, read without running code.

A training checkpoint, checkpoint-last.pth, is the release's {model, model_ema, optimizer, epoch, scaler, args} and `progress`,
`images` and `checksum`; a released file is a bare state dict of EMA weights. Random state needs no place in it: every draw
follows from (seed, step, rank).
"""
import argparse
import fcntl
import hashlib
import math
import os
import socket
import re
import threading
import time
from pathlib import Path

import torch

from models import MODELS, FlowARError
from models.weights import first_line, name_some, read_file, reading, write_file
from util.distributed import from_main, log
from util.progress import Progress

LAST = "checkpoint-last.pth"
STEP = "checkpoint-{:09d}.pth"
WRITER = "checkpoint writer"  # name of its thread
LOCK, LOCK_PATIENCE = ".lock", 30  # seconds: the ranks of a launcher that was killed need some to leave
PREFIXES = re.compile(r"(module\.|_orig_mod\.)*")
DEEPEST = 256  # blocks of a kind: building far more, even without memory for them, would take minutes


# ---- writing -------------------------------------------------------------------------------------------------


class Keeper:
    """Writes the checkpoints of a run in the background and keeps the last `keep` of them. Rank 0 has one.

    A file appears under its own name, checkpoint-<step>.pth, when it is whole and on the disk, and then also as
    checkpoint-last.pth (a hard link, or a symbolic one where the file system has none). A failed write raises FlowARError
    from the next call; older checkpoints are only removed after a newer one is there.
    """

    def __init__(self, folder, keep, minutes=None, step=0):
        self.folder, self.keep = Path(folder), keep
        self.writer, self.error = None, None
        self.minutes, self.saved, self.saved_at = minutes, step, time.monotonic()
        for torn in self.folder.glob("checkpoint-*.pth.tmp"):  # of a run that was killed while it wrote
            torn.unlink()
        aside = [later for later in of_steps(self.folder) if step_of(later) > step]
        for later in aside:
            set_aside(later, step)
        if aside:  # checkpoint-last.pth must not be another name of one of them
            (self.folder / LAST).unlink(missing_ok=True)
            for newest in of_steps(self.folder)[:1]:
                link(newest, self.folder / LAST)
        for old in of_steps(self.folder)[keep:]:
            old.unlink()

    def is_due(self):
        """Whether the last checkpoint is older than `minutes`."""
        return self.minutes is not None and time.monotonic() - self.saved_at >= 60 * self.minutes

    def save(self, content, step):
        """Copy `content` and begin to write it; waits for the write before, if that is not done."""
        self.wait()
        content = snapshot(content)
        self.saved, self.saved_at = step, time.monotonic()
        self.writer = threading.Thread(target=self._write, name=WRITER, args=(content, self.folder / STEP.format(step)))
        self.writer.start()

    def wait(self):
        """Until nothing is being written."""
        if self.writer is not None:
            self.writer.join()
            self.writer = None
        self.check()

    def check(self):
        """FlowARError if a write has failed."""
        if self.error is not None:
            raise self.error

    def _write(self, content, path):
        try:
            write_file({**content, "checksum": content_hash(content)}, path)
            link(path, self.folder / LAST)
            for old in of_steps(self.folder)[self.keep:]:
                old.unlink(missing_ok=True)
        except FlowARError as error:
            self.error = error
        except OSError as error:
            self.error = FlowARError(f"{error.filename}: {error.strerror}")


def lock(folder, patience=LOCK_PATIENCE):
    """Hold a folder for this process until it ends; FlowARError if another one still does after `patience` seconds.

    The system lets go of it with the process, however that ends. Returns the open file, to be kept.
    """
    path = Path(folder) / LOCK
    end = time.monotonic() + patience
    try:
        file = open(path, "a+")
    except OSError as error:
        raise FlowARError(f"{folder}: cannot be written ({error.strerror})") from error
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            if time.monotonic() > end:
                file.seek(0)
                raise FlowARError(f"{folder}: another run writes here ({file.read().strip() or 'unknown'}): wait for it or stop it, or choose "
                                  "another --output_dir") from None
            time.sleep(0.5)
        except OSError:  # a file system without locks
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def set_aside(later, step):
    """Rename a checkpoint that is later than the step that a run goes on from. Of damaged ones only the last stays: they would fill the disk."""
    try:
        check_whole(later)
        name = f"{later}.aside"
    except FlowARError:
        name = f"{later}.damaged"
        for old in later.parent.glob("checkpoint-*.pth.damaged"):
            old.unlink()
    later.replace(name)
    log(f"{later}: is later than step {step} that this run goes on from; renamed to {Path(name).name}")


def snapshot(value):
    """A copy on the CPU of nested dicts, lists and tensors, which later steps do not change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(part) for key, part in value.items()}
    return type(value)(map(snapshot, value)) if isinstance(value, (list, tuple)) else value


def content_hash(value):
    """SHA-256 over nested dicts, lists, tensors and plain values, hexadecimal."""
    digest = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(value, (dict, list, tuple)):
            digest.update(f"{type(value).__name__}{len(value)}".encode())
            for part in value.items() if isinstance(value, dict) else value:
                add(part)
        else:
            digest.update(f"{type(value).__name__}{value!r}".encode())

    add(value)
    return digest.hexdigest()


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
    """checkpoint-<step>.pth of a folder, the latest step first."""
    found = [path for path in Path(folder).glob("checkpoint-*.pth") if path.stem.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path):
    return int(path.stem.removeprefix("checkpoint-"))


# ---- reading -------------------------------------------------------------------------------------------------


def candidates(resume):
    """Files that --resume may mean, the newest first: a file itself, or the checkpoints of a directory. FlowARError if none."""
    path = Path(resume)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FlowARError(f"{resume}: no such checkpoint file or directory")
    found, last = of_steps(path), path / LAST
    if last.is_file() and not any(last.samefile(other) for other in found):
        found.insert(0, last)
    if not found:
        raise FlowARError(f"{resume}: no {LAST} in this directory")
    return found


def any_in(folder):
    """Whether a folder has checkpoints."""
    return bool(of_steps(folder)) or (Path(folder) / LAST).is_file()


def find(resume):
    """Path of the newest checkpoint of --resume that is whole. Damaged ones are named; FlowARError if there is no other."""
    found = candidates(resume)
    for path, before in zip(found, found[1:]):
        try:
            check_whole(path)
            return path
        except FlowARError as error:
            log(f"warning: {error}; going back to {before.name}")
    check_whole(found[-1])
    return found[-1]


def check_whole(path):
    """FlowARError unless the file can be read and, if it carries a checksum, agrees with it."""
    content = read_file(path, mmap=True)
    said = content.pop("checksum", None) if isinstance(content, dict) else None
    if isinstance(said, str) and content_hash(content) != said:
        raise FlowARError(f"{path}: its content is not what was written (checksum): damaged")


def read_model_file(resume):
    """(path, content) of --resume, see find. Memory-mapped: the ranks of a host share its pages."""
    path = from_main(lambda: find(resume))
    return path, read_file(path, mmap=True)


def model_state(content, path, key="model_ema"):
    """State dict of a file's content: `key` of a training checkpoint, or the bare state dict. Names are cleaned."""
    state = content.get(key, content.get("model", content)) if isinstance(content, dict) else content
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or "class_emb.weight" not in (state := strip_prefixes(state)):
        raise FlowARError(f"{path}: no FlowAR weights in this file (expected a state dict with class_emb.weight, or a "
                          "training checkpoint)")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise FlowARError(f"{path}: {name} is {type(value).__name__}, expected a tensor")
    return state


def strip_prefixes(state):
    """Drop what DDP and torch.compile put in front of names."""
    return {name[PREFIXES.match(name).end():]: value for name, value in state.items()}


def check_fits(model, state, path):
    """FlowARError with the first names and shapes that are not the model's, which may be on the meta device."""
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is not in the model" for name in state if name not in own]
    wrong = [f"{name} is {tuple(state[name].shape)}, the model's is {tuple(own[name].shape)}" for name in own
             if name in state and state[name].shape != own[name].shape]
    if problems or wrong:
        raise FlowARError(f"{path}: {len(wrong) + len(problems)} tensors do not fit the model: "
                          f"{name_some(wrong + problems, 3)}")


def load_model(model, state, path):
    """Load all tensors, or FlowARError with the first that do not fit."""
    check_fits(model, state, path)
    with reading(path):
        model.load_state_dict(state)


def content_of(network, ema, optimizer, scaler, progress, images, args):
    """What a training checkpoint holds; `images` is the size of the training set."""
    return {
        "model": network.state_dict(),
        "model_ema": ema.module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": progress.epoch - 1,  # the last one that is complete, as the release counts
        "scaler": scaler.state_dict(),
        "args": {name: tuple(value) if isinstance(value, tuple) else value for name, value in vars(args).items()},
        "progress": progress.state_dict(),
        "images": images,
    }


def load_optimizer(optimizer, scaler, content, path):
    """Load the state of AdamW and of the gradient scaler; FlowARError if it is not of these parameters."""
    try:
        saved = content["optimizer"]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, state in saved["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                if state[name].shape != parameters[number].shape:
                    raise ValueError(f"{name} {number} is {tuple(state[name].shape)}, its parameter {tuple(parameters[number].shape)}")
        groups = [{**group, "weight_decay": own["weight_decay"], "fused": own["fused"]}  # the options', not the checkpoint's
                  for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True)]
        optimizer.load_state_dict({**saved, "param_groups": groups})
        for state in optimizer.state.values():  # nothing may stay mapped to the file, which will be replaced
            state.update({key: value.clone() for key, value in state.items() if isinstance(value, torch.Tensor) and value.device.type == "cpu"})
        if content.get("scaler"):
            scaler.load_state_dict(content["scaler"])
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise FlowARError(f"{path}: optimizer state cannot be used ({error})") from error


def load_progress(content, path, steps):
    """util.progress.Progress of a checkpoint; one without it, such as the release's, was written after a whole epoch of `steps`."""
    if "progress" in content:
        return Progress.of(content["progress"], path)
    if not isinstance(content.get("epoch"), int) or content["epoch"] < 0:
        raise FlowARError(f"{path}: its epoch is {content.get('epoch')!r}: expected a number of 0 or more")
    return Progress(epoch=content["epoch"] + 1, step=(content["epoch"] + 1) * steps)


LEARNING = ("global_batch", "lr", "min_lr", "lr_schedule", "epochs", "warmup_epochs", "weight_decay", "grad_clip",
            "ema_rate", "attn_dropout", "proj_dropout", "label_drop_prob", "flip", "precision", "seed")


def changed_options(content, args):
    """'lr 0.001 -> 0.002, ...': options that decide what is learned and differ from those of a checkpoint."""
    before = saved_options(content)
    return ", ".join(f"{name} {before[name]} -> {getattr(args, name)}" for name in LEARNING
                     if name in before and before[name] != getattr(args, name))


def saved_options(content):
    """{name: value} of the options that a checkpoint was written with; the release's carry a Namespace, weights nothing."""
    args = content.get("args") if isinstance(content, dict) else None
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return args if isinstance(args, dict) else {}


def check_geometry(args, known, path):
    """FlowARError that names the first option that contradicts what a checkpoint's tensors say."""
    for option, value in known.items():
        given = getattr(args, option)
        if given is not None and given != value:
            raise FlowARError(f"--{option} is {given}, but {path} was trained with {value}")


def recognise_size(state, path):
    """The registry's name and the flow head's size that a state dict's tensors tell."""
    try:
        width, cond = state["class_emb.weight"].shape[1], state["flownet.cond_embed.weight"]
        body = dict(
            encoder_embed_dim=width, encoder_depth=depth(state, "encoder_blocks."),
            encoder_num_heads=width // (4 * len(state["encoder_blocks.0.attn.rope.freqs"])),
            decoder_embed_dim=cond.shape[1], decoder_depth=depth(state, "decoder_blocks."),
            decoder_num_heads=cond.shape[1] // (4 * len(state["decoder_blocks.0.attn.rope.freqs"])),
            cross="flownet.res_blocks.0.crossattn.q.weight" in state)
        head = dict(diffloss_d=depth(state, "flownet.res_blocks."), diffloss_w=cond.shape[0])
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise FlowARError(f"{path}: the model's size cannot be recognised ({error}); give --model") from error
    names = [name for name, size in MODELS.items() if {key: size[key] for key in body} == body]
    names.sort(key=lambda name: MODELS[name] != {**body, **head})  # the exact size first, then one with another flow head
    if not names:
        raise FlowARError(f"{path}: no model of the registry has this size ({body}); give --model")
    return {"model": names[0], **head}


def recognise_geometry(state, path, vae_embed_dim):
    """Class count, scales and patch size that a state dict's tensors tell, given the VAE's latent channels."""
    try:
        channels, class_num = state["z_proj.weight"].shape[1], len(state["class_emb.weight"]) - 1
        scales = scales_of(state["mask"])
    except KeyError as error:
        raise FlowARError(f"{path}: the geometry cannot be recognised: {error} is missing") from error
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        raise FlowARError(f"{path}: the geometry cannot be recognised ({first_line(error)})") from error
    patch_size = math.isqrt(channels // vae_embed_dim)
    if patch_size < 1 or patch_size ** 2 * vae_embed_dim != channels:
        raise FlowARError(f"{path}: tokens have {channels} channels, which {vae_embed_dim} latent channels of the VAE do "
                          "not make with any patch size: the VAE is another one than the model was trained with")
    return {"class_num": class_num, "scales": scales, "patch_size": patch_size}


def depth(state, prefix):
    """Number of blocks whose names begin with `prefix`; ValueError unless they are numbered 0, 1, ... without a gap."""
    numbers = {int(name[len(prefix):].split(".")[0]) for name in state if name.startswith(prefix)}
    if numbers != set(range(len(numbers))) or not 0 < len(numbers) <= DEEPEST:
        raise ValueError(f"{len(numbers)} blocks {prefix}*, expected 1 to {DEEPEST}, numbered without a gap")
    return len(numbers)


def scales_of(mask):
    """Scales of a block-causal mask: a row of scale k sees 1 + ... + s_k^2 tokens."""
    if mask.ndim != 4 or mask.shape != (1, 1, mask.shape[2], mask.shape[2]) or not mask.numel():
        raise ValueError(f"mask is {tuple(mask.shape)}, expected (1, 1, tokens, tokens)")
    visible = (mask[0, 0] == 0).sum(dim=1).unique().tolist()
    scales = tuple(round((end - start) ** 0.5) for start, end in zip([0, *visible], visible))
    if sum(s * s for s in scales) != len(mask[0, 0]):  # the model's mask will be no larger than the file's
        raise ValueError("mask is not block-causal")
    return scales
