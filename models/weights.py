"""Weights files: read without running code from them, written whole or not at all; what their tensors tell."""
import argparse
import contextlib
import errno
import hashlib
import json
import math
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file

from models.errors import FlowARError, first_sentence, name_some

# ---- files -------------------------------------------------------------------------------------------------------

LFS = b"version https://git-lfs"
EXPORTED, BARE, CONFIG = "model.safetensors", "model.pth", "config.json"  # of a folder of scripts/export.py
DESCRIBED = "flowar"  # in the header of our own safetensors files: what a checkpoint says beside its tensors
DESCRIPTION = "args", "data", "vae", "weights_key"  # the same, of config.json


def read_file(path):
    """Contents of a safetensors or torch file on the CPU, memory-mapped: processes of one host share its pages. Nothing
    in it is run: of a torch file, tensors, plain values and the release's argparse.Namespace alone are unpickled.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FlowARError(f"{path}: file not found")
    with open(path, "rb") as file:
        head = file.read(len(LFS))
    if head == LFS:
        raise FlowARError(f"{path}: a Git LFS pointer, not the file itself: run git lfs install; git lfs pull")
    try:
        if head[8:9] == b"{":
            return read_safetensors(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:  # PyTorch before 1.6 wrote no zip file, and no other can be mapped
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            except RuntimeError:  # a file system that maps no files, or a file that is cut short
                return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, LookupError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise FlowARError(f"{path}: cannot be read: truncated (download it again), or not a file of tensors "
                          f"({first_sentence(error)})") from error


def read_safetensors(path):
    """{name: tensor}, or of a file of write_safetensors what it was given."""
    try:
        tensors = load_file(path)
    except (OSError, RuntimeError):  # a file system that maps no files
        tensors = load(path.read_bytes())
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    description = header.get("__metadata__", {}).get(DESCRIBED)
    if description is None:
        return tensors
    description = json.loads(description)
    return {**description, description["weights_key"]: tensors}


def write_safetensors(tensors, description, path):
    """A file that read_file gives back as {**description, description["weights_key"]: tensors}."""
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    with writing(path) as file:
        mode = os.fstat(file.fileno()).st_mode  # the user's, where save_file's is 0600
        save_file(tensors, file.name, {DESCRIBED: json.dumps(description)})
        with contextlib.suppress(OSError):  # a file system without modes
            os.chmod(file.name, mode)


def read_weights(path):
    """read_file; an exported model.pth comes with what the config.json beside it says."""
    content, config = read_file(path), Path(path).with_name(CONFIG)
    if Path(path).name == BARE and config.is_file():
        description = json.loads(config.read_text())
        if "weights_key" in description:  # else it is another program's
            content = {description["weights_key"]: content}
            content.update({name: description.get(name) for name in DESCRIPTION})
    return content


@contextlib.contextmanager
def writing(path, sync=True):
    """A binary file to write, under a temporary name until the block ends: a reader sees the old file or the new one.
    FlowARError if it cannot be written; nothing half-written stays. sync=False, for a million small files, leaves the
    moment of reaching the disk to the system.
    """
    temporary = Path(f"{path}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            if sync:
                file.flush()
                sync_file(file)
        rename(temporary, Path(path))
    except (OSError, RuntimeError) as error:
        # torch.save says less than the system.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise FlowARError(f"{path}: cannot be written ({first_sentence(cause)})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # if it is still there


def rename(path, name):
    """Path.replace; where the file system does not rename over a file, that one is called <name>.old for a moment."""
    try:
        path.replace(name)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.EPERM, errno.EACCES) or not name.is_file():
            raise
        old = Path(f"{name}.old")
        name.rename(old)
        try:
            path.rename(name)
        except OSError:
            old.rename(name)
            raise
        old.unlink()


def sync_file(file):
    """Bring a file to the disk, where the file system can be asked to."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE):  # its bytes are lost
            raise


def write_file(content, path):
    """torch.save, see writing."""
    with writing(path) as file:
        torch.save(content, file)


# ---- hashes ------------------------------------------------------------------------------------------------------


def file_hash(path):
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_hash(state):
    """SHA-256 over the tensors of a state dict, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


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


# ---- the weights in a file's content -----------------------------------------------------------------------------

EMA, RAW = ("model_ema", "ema"), ("model", "state_dict")  # the keys of weights in a file; "" means the file itself
ORDER = {None: (*EMA, *RAW, ""), "raw first": (*RAW, "", *EMA), "ema": EMA, "raw": RAW}  # for each choice
WRAPPERS = re.compile(r"\b(?:module|_orig_mod)\.")  # what DDP and torch.compile put into names
FLOWAR = "class_emb.weight", "z_proj.weight", "mask"  # names of any FlowAR
VAE = "encoder.conv_in.weight", "decoder.up.0.block.0.conv1.weight", "post_quant_conv.weight"  # of any AutoencoderKL


class Weights(NamedTuple):
    """The weights of one network out of a file."""

    tensors: dict  # {name: tensor}, names without the prefixes of wrappers
    key: str  # in the file, "" of a state dict by itself

    @property
    def kind(self):
        """"ema", "raw", or "unnamed": a state dict by itself, or under a key that says nothing."""
        if self.key in EMA:
            return "ema"
        return "raw" if self.key in RAW else "unnamed"

    def describe(self, left_out=()):
        """Which weights these are, and what of them is not used."""
        text = {"ema": "EMA weights", "raw": "raw weights", "unnamed": "weights, unknown if EMA or raw"}[self.kind]
        if self.key:
            text += f" under {self.key!r}"
        if left_out:
            text += f"; not used: {name_some(left_out)}"
        return text


def find_weights(content, path, what, names, choice=None):
    """The Weights of a network, called `what`, in a file's content; FlowARError where there are none.

    Args:
        names: of tensors that every network of the kind has.
        choice: "ema" or "raw"; None is the average where there is one; "raw first" the other way round, for training
            that goes on; anything else is a key of the file.
    """
    content = content if isinstance(content, dict) else {}
    states = {key: value for key, value in content.items() if isinstance(value, dict)}
    states[""] = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    for key in ORDER.get(choice, [choice]):
        if states.get(key):
            break
    else:
        raise FlowARError(f"{path}: no {choice or ''} weights of a {what} found; the file contains "
                          f"{name_some(map(str, content)) or 'nothing'}: expected a bare state dict, or one under "
                          f"{', '.join(EMA + RAW)} or the key of --weights KEY")
    tensors = {WRAPPERS.sub("", name): value for name, value in states[key].items() if isinstance(value, torch.Tensor)}
    for name in names:
        if name not in tensors:
            raise FlowARError(f"{path}: no {what} weights under {key!r}: {name} is missing (choose another key with "
                              "--weights)")
    return Weights(tensors, key)


def find_model(content, path, choice=None):
    """The Weights of a FlowAR in a file's content; choice: see find_weights."""
    return find_weights(content, path, "FlowAR", FLOWAR, choice)


def load_state(network, state, path, what="model"):
    """Load a state dict. Returns its names that are not the network's and mean nothing to it: of a loss, counters.
    FlowARError with the first names that are missing, of other shapes or kinds of numbers, or that the network lacks in
    one of its own modules: without them it would compute something else.
    """
    own, wrong, left_out = network.state_dict(), [], []
    modules = {name.partition(".")[0] for name in own}
    for name, tensor in own.items():
        if name not in state:
            wrong.append(f"{name} is missing")
        elif state[name].shape != tensor.shape:
            wrong.append(f"{name} is {tuple(state[name].shape)}, the {what}'s is {tuple(tensor.shape)}")
        elif state[name].is_floating_point() != tensor.is_floating_point():
            wrong.append(f"{name} is {state[name].dtype}, the {what}'s is {tensor.dtype}")
    for name, tensor in state.items():
        module, _, inner = name.partition(".")
        if name not in own and (module in modules or not inner and tensor.numel() > 1):
            wrong.append(f"{name} is not in the {what}")
        elif name not in own:
            left_out.append(name)
    if wrong:
        hint = "; check the size (--model, --diffloss_d, --diffloss_w)" if what == "model" else ""
        raise FlowARError(f"{path}: {len(wrong)} tensors do not fit the {what}: {name_some(wrong, 3)}{hint}")
    network.load_state_dict({name: state[name] for name in own})
    return left_out


# ---- what a FlowAR's file tells ----------------------------------------------------------------------------------

KL16 = {"vae_embed_dim": 16, "vae_stride": 16}


def count_classes(state):
    """Classes of the table in a state dict, whose last row is the null class."""
    return len(state["class_emb.weight"]) - 1


def recognise_geometry(state, path, vae_embed_dim):
    """{class_num, scales, patch_size} that a state dict's tensors tell, given the VAE's latent channels."""
    channels = state["z_proj.weight"].shape[1]
    patch_size = math.isqrt(channels // vae_embed_dim)
    if patch_size ** 2 * vae_embed_dim != channels:
        raise FlowARError(f"{path}: tokens have {channels} channels, which no patch size makes from the VAE's "
                          f"{vae_embed_dim} latent channels: use the VAE that the model was trained with")
    return {"class_num": count_classes(state), "scales": scales_of(state["mask"]), "patch_size": patch_size}


def recognise_body(state):
    """({argument of FlowAR: value} of the transformer, the same of the flow head) that a state dict's tensors tell."""
    width, cond = state["class_emb.weight"].shape[1], state["flownet.cond_embed.weight"]
    body = dict(
        encoder_embed_dim=width, encoder_depth=depth(state, "encoder_blocks."),
        encoder_num_heads=width // (4 * len(state["encoder_blocks.0.attn.rope.freqs"])),
        decoder_embed_dim=cond.shape[1], decoder_depth=depth(state, "decoder_blocks."),
        decoder_num_heads=cond.shape[1] // (4 * len(state["decoder_blocks.0.attn.rope.freqs"])),
        cross="flownet.res_blocks.0.crossattn.q.weight" in state)
    return body, dict(diffloss_d=depth(state, "flownet.res_blocks."), diffloss_w=cond.shape[0])


def depth(state, prefix):
    """Number of blocks whose names begin with `prefix`."""
    return len({name[len(prefix):].partition(".")[0] for name in state if name.startswith(prefix)})


def scales_of(mask):
    """Scales of a mask in which the tokens of a scale, and they alone, see the same: runs of s^2 equal rows."""
    sees = mask[0, 0] == 0
    ends = [*(sees[1:] != sees[:-1]).any(dim=1).nonzero().flatten().add(1).tolist(), len(sees)]
    return tuple(math.isqrt(end - start) for start, end in zip([0, *ends], ends))


def saved_options(content):
    """{name: value} of the options a checkpoint was written with; the release's are a Namespace, weights have none."""
    args = content.get("args") if isinstance(content, dict) else None
    if isinstance(args, argparse.Namespace):
        return vars(args)
    return args if isinstance(args, dict) else {}
