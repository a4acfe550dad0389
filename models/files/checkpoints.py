"""What a checkpoint's file says: the state dict of a FlowAR, its blocks, its scales, the options of its run."""
import argparse
import math
import re

from models.errors import FlowARError
from models.files.states import find_weights, grouped, of_averages
from models.files.tensors import first_line, name_some

KL16 = {"vae_embed_dim": 16, "vae_stride": 16}
DEEPEST = 256  # blocks of a kind: building far more, even without memory for them, would take minutes
MARKERS = "class_emb.weight", "z_proj.weight"  # of the names of any FlowAR
COMPUTED = re.compile(r"mask|.*\.rope\.freqs")  # buffers


def find_model(content, path, wanted=None):
    """The Weights of a FlowAR in a file's content; wanted: see find_weights."""
    weights = find_weights(content, path, "FlowAR", MARKERS, wanted, COMPUTED)
    lost = of_averages([*weights.others, *weights.tensors]) if wanted is None and weights.kind != "ema" else []
    if 2 * len(lost) > len(weights.tensors.keys() - lost):
        raise FlowARError(f"{path}: its average (EMA) cannot be used, as names or shapes are not the model's: "
                          f"{name_some(grouped(lost))}; sample with --weights raw, or leave it out of the file")
    return weights


def recognise_geometry(state, path, vae_embed_dim):
    """{class_num, scales, patch_size} that a state dict's tensors tell, given the VAE's latent channels."""
    try:
        channels, class_num = state["z_proj.weight"].shape[1], len(state["class_emb.weight"]) - 1
        scales = scales_of(state["mask"])
    except KeyError as error:
        raise FlowARError(f"{path}: the geometry cannot be recognised: {error} is missing (an average of "
                          "parameters lacks the buffers; they are read from a state dict beside it)") from error
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        raise FlowARError(f"{path}: the geometry cannot be recognised ({first_line(error)})") from error
    patch_size = math.isqrt(channels // vae_embed_dim)
    if patch_size < 1 or patch_size ** 2 * vae_embed_dim != channels:
        raise FlowARError(f"{path}: tokens have {channels} channels, which {vae_embed_dim} latent channels of the VAE "
                          "do not make with any patch size: the VAE is another one than the model was trained with")
    return {"class_num": class_num, "scales": scales, "patch_size": patch_size}


def recognise_body(state, path):
    """({argument of FlowAR: value} of the transformer, the same of the flow head) that a state dict's tensors tell."""
    try:
        width, cond = state["class_emb.weight"].shape[1], state["flownet.cond_embed.weight"]
        body = dict(
            encoder_embed_dim=width, encoder_depth=depth(state, "encoder_blocks."),
            encoder_num_heads=width // (4 * len(state["encoder_blocks.0.attn.rope.freqs"])),
            decoder_embed_dim=cond.shape[1], decoder_depth=depth(state, "decoder_blocks."),
            decoder_num_heads=cond.shape[1] // (4 * len(state["decoder_blocks.0.attn.rope.freqs"])),
            cross="flownet.res_blocks.0.crossattn.q.weight" in state)
        return body, dict(diffloss_d=depth(state, "flownet.res_blocks."), diffloss_w=cond.shape[0])
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise FlowARError(f"{path}: the model's size cannot be recognised ({error}); give --model") from error


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


def saved_vae(content, path):
    """{vae_embed_dim, vae_stride} of those options, KL-16's where there are none."""
    options = saved_options(content)
    vae = {name: options.get(name) or value for name, value in KL16.items()}
    if any(type(value) is not int for value in vae.values()):
        raise FlowARError(f"{path}: its options have {vae}, expected whole numbers")
    return vae
