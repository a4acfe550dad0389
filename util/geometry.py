"""The geometry of latents and tokens: what options leave open follows from a checkpoint, the data or the release."""
from dataclasses import replace

from models import FlowARError

GEOMETRY = dict(model="flowar_small", img_size=256, vae_stride=16, vae_embed_dim=16, patch_size=1, class_num=1000)


def resolve_geometry(args, known=None):
    """The options with the geometry that was not given: from `known` (of checkpoint and VAE), else the release's."""
    known = {**GEOMETRY, **(known or {})}
    args = replace(args, **{name: value for name, value in known.items() if getattr(args, name) is None})
    if args.scales is None:
        args = replace(args, scales=default_scales(args.img_size // (args.vae_stride * args.patch_size)))
    return args


def default_scales(side):
    """1, 2, 4, ... up to `side`; 32 for 512-pixel images."""
    side = max(side, 1)
    return (*(2**k for k in range(side.bit_length()) if 2**k < side), side)


def check_geometry(args, known, file):
    """FlowARError that names the first option that contradicts what a checkpoint's tensors say."""
    for option, value in known.items():
        if getattr(args, option) not in (None, value):
            why = " (they follow from --img_size, --vae_stride and --patch_size)" if option == "scales" else ""
            raise FlowARError(f"--{option} is {getattr(args, option)}, but {file} was trained with {value}{why}")


def check_vae(vae, args, name):
    """FlowARError unless a VAE, called `name`, has the channels and the stride of the options, where they are given."""
    for option, value in (("vae_embed_dim", vae.embed_dim), ("vae_stride", vae.stride)):
        if getattr(args, option) not in (None, value):
            raise FlowARError(f"--{option} is {getattr(args, option)}, but the VAE {name} has {value}")
