"""Sizes of FlowAR: build one, recognise one from its tensors, load one from a file."""
import torch

from models.errors import FlowARError
from models.files import check_content, notify, reading
from models.files.checkpoints import depth, find_model, recognise_geometry, saved_vae
from models.files.exports import read_weights
from models.files.hub import weights_file
from models.files.states import check_fits
from models.flowar import FlowAR

LAST = "checkpoint-last.pth"  # of a training run's folder
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
    """A FlowAR of the size `name`; overrides are FlowAR's arguments, None meaning the size's own."""
    if name not in MODELS:
        raise FlowARError(f"model {name!r} is unknown: expected one of {', '.join(MODELS)}")
    return FlowAR(**{**MODELS[name], **{key: value for key, value in overrides.items() if value is not None}})


def load_model(model, state, path):
    """Load all tensors; see check_fits. FlowARError too if a buffer says that they were trained otherwise."""
    left_out = check_fits(model, state, path)
    with reading(path):
        for name, own in model.named_buffers():
            if not torch.allclose(state[name].to(own), own, rtol=HALF_PRECISION):
                what = "attention pattern" if name == "mask" else "rotary frequencies"
                raise FlowARError(f"{path}: {name} is not the model's: these weights were trained with another {what}")
        model.load_state_dict({name: state[name] for name in model.state_dict()} | dict(model.named_buffers()))
    return left_out


def recognise_size(state, path):
    """{model, diffloss_d, diffloss_w} that a state dict's tensors tell."""
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
    names.sort(key=lambda name: MODELS[name] != {**body, **head})  # the exact size before one with another flow head
    if not names:
        raise FlowARError(f"{path}: no model of the registry has this size ({body}); give --model")
    return {"model": names[0], **head}


def load_flowar(source, weights=None):
    """The FlowAR of weights in eval mode on the CPU: of a file, by path or name (models.files.hub), or of the folder of
    a training run or an export. Raises FlowARError. weights: "ema", the average, or "raw"; by default the average
    where there is one. Which it is goes to stderr.

    Its size is recognised from the tensors. Channels and stride of the VAE, which they do not tell, are those of the
    run's options, else KL-16's.
    """
    path = weights_file(source, LAST)
    content = read_weights(path)
    check_content(content, path)
    found, vae = find_model(content, path, weights), saved_vae(content, path)
    geometry = recognise_geometry(found.tensors, path, vae["vae_embed_dim"])
    size, scale = recognise_size(found.tensors, path), geometry.pop("scales")
    img_size = scale[-1] * geometry["patch_size"] * vae["vae_stride"]
    known = dict(img_size=img_size, scale=scale, **geometry, **size, **vae)
    model, left_out = open_model(found.tensors, path, known.pop("model"), **known)
    notify(f"{path}: {found.describe(left_out)}")
    return model


def open_model(state, path, name, **options):
    """(Model of a state dict, in eval mode, names that it leaves out); options: see build_model, errors: check_fits."""
    with torch.device("meta"):  # sizes that a file claims are compared with its tensors before memory is taken
        check_fits(build_model(name, **options), state, path)
    model = build_model(name, **options)
    left_out = load_model(model, state, path)
    return model.eval(), left_out
