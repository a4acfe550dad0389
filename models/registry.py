"""Sizes of FlowAR: build one, recognise one from its tensors, load one from a file."""
import sys
from pathlib import Path

import torch

from models.errors import FlowARError
from models.flowar import FlowAR
from models.hub import EXPORTED, local_file
from models.variants.ablated import RELEASED, AblatedFlowAR
from models.weights import (BARE, KL16, find_model, load_state, read_weights, recognise_body, recognise_geometry,
                            saved_options)

LAST = "checkpoint-last.pth"  # of a training run's folder: a link to the newest of these, if there are links
NUMBERED = f"checkpoint-{9 * '[0-9]'}.pth"
HALF_PRECISION = 1e-2  # by which a buffer differs in a file that was converted to it


def _size(dim, depth, heads, diffloss_d, diffloss_w, cross=False):
    return dict(encoder_embed_dim=dim, encoder_depth=depth, encoder_num_heads=heads, decoder_embed_dim=dim,
                decoder_depth=depth, decoder_num_heads=heads, diffloss_d=diffloss_d, diffloss_w=diffloss_w, cross=cross)


MODELS = {
    #                    D  depth of a half  heads  flow depth x width
    "flowar_tiny": _size(128, 1, 4, 3, 128),  # 1.6 M, for demonstrations and tests
    "flowar_small": _size(768, 6, 12, 2, 1024),  # 172 M parameters, FID 3.61 (paper)
    "flowar_base": _size(768, 8, 12, 6, 1024),  # about 290 M, FID 2.90 (paper; never released)
    "flowar_large": _size(1024, 8, 16, 12, 1024, cross=True),  # 587 M, FID 1.90 (paper)
    "flowar_huge": _size(1536, 15, 16, 12, 1536, cross=True),  # 1.91 B, FID 1.65 (paper)
}


def build_model(name, **overrides):
    """A FlowAR of the size `name`; overrides: its arguments, or choices of RELEASED, None meaning the size's own."""
    if name not in MODELS:
        raise FlowARError(f"model {name!r} is unknown: expected one of {', '.join(MODELS)}")
    config = {**MODELS[name], **{key: value for key, value in overrides.items() if value is not None}}
    choices = {key: config.pop(key, value) for key, value in RELEASED.items()}
    return FlowAR(**config) if choices == RELEASED else AblatedFlowAR(**choices, **config)


def read_variant(state, path):
    """{name of RELEASED: value} that a state dict's buffer `variant` tells, {} of released weights."""
    if "variant" not in state:
        return {}
    values = bytes(state["variant"].tolist()).decode("ascii", "replace").split(",")
    if len(values) != len(RELEASED):
        raise FlowARError(f"{path}: unknown variant {','.join(values)!r}, written by another version of this code")
    return dict(zip(RELEASED, values))


def differences(model, state, path):
    """'--head token (here scale)': what a FlowAR's weights were trained with and it is not made with, '' if nothing."""
    trained, unlike = {**RELEASED, **read_variant(state, path)}, []
    for name, released in RELEASED.items():
        here = model.config.get(name, released)
        if trained[name] != here:
            unlike.append(f"--{name} {trained[name]} (here {here})")
    return ", ".join(unlike)


def load_model(model, state, path):
    """Load all tensors; returns the names that are left out, see load_state. Buffers are computed, not loaded:
    FlowARError for a file that was trained with others.
    """
    if other := differences(model, state, path):
        raise FlowARError(f"{path}: was trained with {other}: use the same options")
    own = {name: buffer.clone() for name, buffer in model.named_buffers()}
    left_out = load_state(model, state, path)
    for name, buffer in model.named_buffers():
        if not buffer.is_meta and not torch.allclose(buffer, own[name], rtol=HALF_PRECISION):
            raise FlowARError(f"{path}: {name} differs from the model's: the weights were trained with another "
                              f"{'attention pattern' if name == 'mask' else name.rpartition('.')[2]}")
        buffer.copy_(own[name])
    return left_out


def recognise_size(state, path):
    """{model, diffloss_d, diffloss_w, and what read_variant has} that a state dict's tensors tell."""
    (body, head), variant = recognise_body(state), read_variant(state, path)
    body["cross"] &= variant.get("condition") != "cross_attention"
    names = [name for name, size in MODELS.items() if body.items() <= size.items()]
    if not names:
        raise FlowARError(f"{path}: no model in the registry has this size ({body}): set --model")
    names.sort(key=lambda name: MODELS[name] != {**body, **head})  # the exact size before one with another flow head
    return {"model": names[0], **head, **variant}


def load_flowar(source, weights=None):
    """The FlowAR of a file, by path or name (models.hub), or of the folder of a training run or an export, in eval mode
    on the CPU. weights: "ema", the average, "raw", or a key of the file; by default the average where there is one; a
    line on stderr says which. The tensors tell its size; the VAE's channels and stride are those of the run's options,
    else KL-16's.
    """
    path = local_file(source)
    if path.is_dir():
        files = [path / LAST, *sorted(path.glob(NUMBERED), reverse=True), path / EXPORTED, path / BARE]
        path = next(filter(Path.is_file, files), files[0])
    content = read_weights(path)
    chosen, options = find_model(content, path, weights), saved_options(content)
    vae = {name: options.get(name) or value for name, value in KL16.items()}
    geometry = recognise_geometry(chosen.tensors, path, vae["vae_embed_dim"])
    scale = geometry.pop("scales")
    geometry["img_size"] = scale[-1] * geometry["patch_size"] * vae["vae_stride"]
    size = recognise_size(chosen.tensors, path)
    model, left_out = open_model(chosen.tensors, path, size.pop("model"), scale=scale, **geometry, **size, **vae)
    print(f"{path}: {chosen.describe(left_out)}", file=sys.stderr)
    return model


def open_model(state, path, name, **options):
    """(Model of a state dict, in eval mode, names that it leaves out); options: see build_model, errors: load_model."""
    model = build_model(name, **options)
    left_out = load_model(model, state, path)
    return model.eval(), left_out
