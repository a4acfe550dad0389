"""What a checkpoint's file says: the state dict of a FlowAR, its blocks, its scales, the options of its run."""
import argparse
import math
import re

import torch

from models.errors import FlowARError
from models.files.tensors import first_line, name_some

DEEPEST = 256  # blocks of a kind: building far more, even without memory for them, would take minutes
PREFIXES = re.compile(r"(module\.|_orig_mod\.)*")  # of DDP and torch.compile


def model_state(content, path, key="model_ema"):
    """State dict of a file's content: `key` of a training checkpoint, or the bare state dict. Names are cleaned."""
    state = content.get(key, content.get("model", content)) if isinstance(content, dict) else content
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    state = {name[PREFIXES.match(name).end():]: value for name, value in state.items()} if named else {}
    if "class_emb.weight" not in state:
        raise FlowARError(f"{path}: no FlowAR weights in this file (expected a state dict with class_emb.weight, or a "
                          "training checkpoint)")
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise FlowARError(f"{path}: {name} is {type(value).__name__}, expected a tensor")
    return state


def check_fits(model, state, path):
    """FlowARError with the first names and shapes that are not the model's, which may be on the meta device."""
    own = model.state_dict()
    wrong = [f"{name} is {tuple(state[name].shape)}, the model's is {tuple(own[name].shape)}" for name in own
             if name in state and state[name].shape != own[name].shape]
    wrong += [f"{name} is missing" for name in own if name not in state]
    wrong += [f"{name} is not in the model" for name in state if name not in own]
    if wrong:
        raise FlowARError(f"{path}: {len(wrong)} tensors do not fit the model: {name_some(wrong, 3)}")


def recognise_geometry(state, path, vae_embed_dim):
    """{class_num, scales, patch_size} that a state dict's tensors tell, given the VAE's latent channels."""
    try:
        channels, class_num = state["z_proj.weight"].shape[1], len(state["class_emb.weight"]) - 1
        scales = scales_of(state["mask"])
    except KeyError as error:
        raise FlowARError(f"{path}: the geometry cannot be recognised: {error} is missing") from error
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        raise FlowARError(f"{path}: the geometry cannot be recognised ({first_line(error)})") from error
    patch_size = math.isqrt(channels // vae_embed_dim)
    if patch_size < 1 or patch_size ** 2 * vae_embed_dim != channels:
        raise FlowARError(f"{path}: tokens have {channels} channels, which {vae_embed_dim} latent channels of the VAE "
                          "do not make with any patch size: the VAE is another one than the model was trained with")
    return {"class_num": class_num, "scales": scales, "patch_size": patch_size}


def depth(state, prefix):
    """Number of blocks whose names begin with `prefix`; ValueError unless they are numbered 0, 1, ... without a gap."""
    numbers = {int(name[len(prefix):].split(".")[0]) for name in state if name.startswith(prefix)}
    if numbers != set(range(len(numbers))) or not 0 < len(numbers) <= DEEPEST:
        raise ValueError(f"{len(numbers)} blocks {prefix}*, expected 1 to {DEEPEST}, numbered without a gap")
    return len(numbers)


def scales_of(mask):
    """Scales of a mask in which the tokens of a scale, and they alone, see the same: runs of s^2 equal rows."""
    if mask.ndim != 4 or mask.shape != (1, 1, mask.shape[2], mask.shape[2]) or not mask.numel():
        raise ValueError(f"mask is {tuple(mask.shape)}, expected (1, 1, tokens, tokens)")
    sees = mask[0, 0] == 0
    ends = (sees[1:] != sees[:-1]).any(dim=1).nonzero().flatten().add(1).tolist()
    sizes = [end - start for start, end in zip([0, *ends], [*ends, len(sees)])]
    scales = tuple(map(math.isqrt, sizes))
    if [s * s for s in scales] != sizes:  # the model's mask will be no larger than the file's
        raise ValueError("mask has no rows of square scales")
    return scales


def saved_options(content):
    """{name: value} of the options a checkpoint was written with; the release's are a Namespace, weights have none."""
    args = content.get("args") if isinstance(content, dict) else None
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    return args if isinstance(args, dict) else {}
