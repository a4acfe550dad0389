"""The geometry of latents and tokens: what options leave open follows from a checkpoint, the data or the release."""
from dataclasses import replace

from models import FlowARError

GEOMETRY = dict(model="flowar_small", img_size=256, vae_stride=16, vae_embed_dim=16, patch_size=1, class_num=1000)


def resolve_geometry(args, geometry=None):
    """The options with what they do not give: from `geometry`, of checkpoint and VAE, else the release's."""
    for name, value in {**GEOMETRY, **(geometry or {})}.items():
        if getattr(args, name) is None:
            args = replace(args, **{name: value})
    if args.scales is None:
        args = replace(args, scales=default_scales(args.img_size // (args.vae_stride * args.patch_size)))
    return args


def default_scales(side):
    """1, 2, 4, ... up to `side`, at least 1."""
    scales = [1]
    while scales[-1] < side:
        scales.append(min(2 * scales[-1], side))
    return tuple(scales)


def compare_geometry(args, geometry, file):
    """FlowARError that names the first option that contradicts what a checkpoint's tensors say."""
    for option, value in geometry.items():
        if getattr(args, option) not in (None, value):
            why = " (determined by --img_size, --vae_stride and --patch_size)" if option == "scales" else ""
            raise FlowARError(f"--{option} is {getattr(args, option)}, but {file} was trained with {value}{why}")


def check_vae(vae, args, name):
    """FlowARError unless a VAE, called `name`, has the channels and the stride of the options, where they are given."""
    for option, value in (("vae_embed_dim", vae.embed_dim), ("vae_stride", vae.stride)):
        if getattr(args, option) not in (None, value):
            raise FlowARError(f"--{option} is {getattr(args, option)}, but the VAE {name} has {value}")
