"""Training checkpoints and released weights: written whole or not at all, read without running code.

A training checkpoint, checkpoint-last.pth, is {model, model_ema, optimizer, epoch, scaler, args}; a released file is a
bare state dict of EMA weights. Random state needs no place in it: every draw follows from (seed, step, rank).
"""
import math
from pathlib import Path

import torch

from models import MODELS, FlowARError
from models.weights import name_some, read_file, write_file

LAST = "checkpoint-last.pth"
PREFIXES = ("module.", "_orig_mod.")


def save_training(path, model, ema, optimizer, scaler, epoch, args):
    write_file({
        "model": model.state_dict(),
        "model_ema": ema.module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "scaler": scaler.state_dict(),
        "args": vars(args),
    }, path)


def find(resume):
    """Path of the file that --resume means: itself, or checkpoint-last.pth in a directory. FlowARError if none."""
    path = Path(resume)
    if path.is_dir():
        path = path / LAST
        if not path.is_file():
            raise FlowARError(f"{resume}: no {LAST} in this directory")
    if not path.is_file():
        raise FlowARError(f"{resume}: no such checkpoint file or directory")
    return path


def model_state(content, path, key="model_ema"):
    """State dict of a file's content: `key` of a training checkpoint, or the bare state dict. Names are cleaned."""
    state = content.get(key, content.get("model", content)) if isinstance(content, dict) else content
    if not isinstance(state, dict) or "class_emb.weight" not in (state := strip_prefixes(state)):
        raise FlowARError(f"{path}: no FlowAR weights in this file (expected a state dict with class_emb.weight, or a "
                          "training checkpoint)")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise FlowARError(f"{path}: {name} is {type(value).__name__}, expected a tensor")
    return state


def strip_prefixes(state):
    """Drop what DDP and torch.compile put in front of names."""
    def clean(name):
        while name.startswith(PREFIXES):
            name = name.split(".", 1)[1]
        return name
    return {clean(str(name)): value for name, value in state.items()}


def load_model(model, state, path):
    """Load all tensors, or FlowARError with the first that do not fit."""
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is not in the model" for name in state if name not in own]
    wrong = [f"{name} is {tuple(state[name].shape)}, the model's is {tuple(own[name].shape)}" for name in own
             if name in state and state[name].shape != own[name].shape]
    if problems or wrong:
        raise FlowARError(f"{path}: {len(wrong) + len(problems)} tensors do not fit the model: "
                          f"{name_some(wrong + problems, 3)}")
    model.load_state_dict(state)


def load_optimizer(optimizer, scaler, content, path):
    try:
        saved = content["optimizer"]
        groups = [{**group, "weight_decay": own["weight_decay"], "fused": own["fused"]}  # the options', not the checkpoint's
                  for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True)]
        optimizer.load_state_dict({**saved, "param_groups": groups})
        for state in optimizer.state.values():  # nothing may stay mapped to the file, which will be replaced
            state.update({key: value.clone() for key, value in state.items() if isinstance(value, torch.Tensor) and value.device.type == "cpu"})
        if content.get("scaler"):
            scaler.load_state_dict(content["scaler"])
        return int(content["epoch"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise FlowARError(f"{path}: optimizer state cannot be used ({error})") from error


LEARNING = ("batch_size", "accum_iter", "global_batch", "lr", "min_lr", "lr_schedule", "epochs", "warmup_epochs", "weight_decay", "grad_clip",
            "ema_rate", "attn_dropout", "proj_dropout", "label_drop_prob", "flip", "precision", "seed")


def changed_options(content, args):
    """'lr 0.001 -> 0.002, ...': options that decide what is learned and differ from those of a checkpoint."""
    before = content.get("args") or {}
    before = before if isinstance(before, dict) else vars(before)
    return ", ".join(f"{name} {before[name]} -> {getattr(args, name)}" for name in LEARNING
                     if name in before and before[name] != getattr(args, name))


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
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
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
    except (KeyError, IndexError) as error:
        raise FlowARError(f"{path}: the geometry cannot be recognised: {error} is missing") from error
    patch_size = math.isqrt(channels // vae_embed_dim)
    if patch_size ** 2 * vae_embed_dim != channels:
        raise FlowARError(f"{path}: tokens have {channels} channels, which {vae_embed_dim} latent channels of the VAE do "
                          "not make with any patch size: the VAE is another one than the model was trained with")
    return {"class_num": class_num, "scales": scales, "patch_size": patch_size}


def depth(state, prefix):
    return 1 + max(int(name[len(prefix):].split(".")[0]) for name in state if name.startswith(prefix))


def scales_of(mask):
    """Scales of a block-causal mask: a row of scale k sees 1 + ... + s_k^2 tokens."""
    visible = (mask[0, 0] == 0).sum(dim=1).unique().tolist()
    return tuple(round((end - start) ** 0.5) for start, end in zip([0, *visible], visible))


def read_model_file(resume):
    """(path, content) of --resume, memory-mapped: the ranks of a host share its pages."""
    path = find(resume)
    return path, read_file(path, mmap=True)
