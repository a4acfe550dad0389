"""Sizes of FlowAR: build one, recognise one from its tensors, load one from a file."""
import torch

from models.errors import FlowARError
from models.files import check_content, notify, reading
from models.files.checkpoints import find_model, recognise_body, recognise_geometry, saved_vae
from models.files.exports import read_weights
from models.files.hub import weights_file
from models.files.states import check_buffers, check_fits
from models.variants import ablated

LAST = "checkpoint-last.pth"  # of a training run's folder


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
    """A FlowAR of the size `name`; overrides: its arguments or AblatedFlowAR's, None meaning the size's own."""
    if name not in MODELS:
        raise FlowARError(f"model {name!r} is unknown: expected one of {', '.join(MODELS)}")
    return ablated.build(**{**MODELS[name], **{key: value for key, value in overrides.items() if value is not None}})


def load_model(model, state, path):
    """Load all tensors; see check_fits and check_buffers. Returns the names that are left out."""
    ablated.check_variant(model, state, path)
    left_out = check_fits(model, state, path)
    check_buffers(model, state, path)
    with reading(path):
        model.load_state_dict({name: state[name] for name in model.state_dict()} | dict(model.named_buffers()))
    return left_out


def recognise_size(state, path):
    """{model, diffloss_d, diffloss_w, and what variants.ablated has} that a state dict's tensors tell."""
    (body, head), variant = recognise_body(state, path), ablated.read_variant(state, path)
    body["cross"] &= variant.get("condition") != "cross_attention"
    names = [name for name, size in MODELS.items() if {key: size[key] for key in body} == body]
    names.sort(key=lambda name: MODELS[name] != {**body, **head})  # the exact size before one with another flow head
    if not names:
        raise FlowARError(f"{path}: no model of the registry has this size ({body}); give --model")
    return {"model": names[0], **head, **variant}


def load_flowar(source, weights=None):
    """The FlowAR of weights in eval mode on the CPU: of a file, by path or name (models.files.hub), or of the folder of
    a training run or an export. Raises FlowARError. weights: "ema", the average, or "raw"; by default the average
    where there is one. Which it is goes to stderr. Its size is recognised from the tensors. Channels and stride of the
    VAE, which they do not tell, are those of the run's options, else KL-16's.
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
