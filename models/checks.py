"""What FlowAR and its VAE refuse, as it would give wrong numbers: scales that do not fit, labels of no class, wrong
shapes.
"""
import torch

from models.errors import FlowARError


def check_scales(img_size, vae_stride, patch_size, scale):
    """FlowARError unless the scales fit the latent: increasing, from 1 to img_size / vae_stride / patch_size."""
    if patch_size < 1 or vae_stride < 1 or img_size % (vae_stride * patch_size):
        raise FlowARError(f"img_size {img_size} is not a multiple of vae_stride x patch_size = "
                          f"{vae_stride} x {patch_size}")
    side = img_size // (vae_stride * patch_size)
    if not scale or scale[0] != 1 or any(a >= b for a, b in zip(scale, scale[1:])):
        raise FlowARError(f"scale is {','.join(map(str, scale))}: expected an increasing list that starts with 1")
    if scale[-1] != side:
        raise FlowARError(f"scale ends with {scale[-1]}: expected {side}, the latent's size in tokens (img_size "
                          f"{img_size} / vae_stride {vae_stride} / patch_size {patch_size})")


def check_labels(labels, limit):
    """FlowARError for a label outside 0..limit - 1; on a GPU an assertion, for which the host does not wait."""
    try:
        torch.empty(limit, device=labels.device).index_select(0, labels.long())
    except IndexError:
        bad = labels[(labels < 0) | (labels >= limit)][0].item()
        raise FlowARError(f"label {bad} is outside 0..{limit - 1}") from None


def check_shapes(what, tensors, shapes):
    """FlowARError unless the tensors have these shapes."""
    given = [tuple(x.shape) for x in tensors]
    if given != shapes:
        raise FlowARError(f"{what} has shapes {given}: expected {shapes}")


def check_grids(model, batch, noise, given, known):
    """FlowARError unless what FlowAR.sample_pyramid is given is of the model's shapes: others would broadcast."""
    grids = [(batch, model.token_channels, s, s) for s in model.scale]
    check_shapes("noise", noise, [(batch, s * s, model.token_channels) for s in model.scale])
    check_shapes("given", given, grids[:len(given)])
    if known:
        latents, cells = known
        check_shapes("known latents", latents, grids)
        check_shapes("known cells", cells, [(1 if len(m) == 1 else batch, 1, s, s) for m, s in zip(cells, model.scale)])


def check_guide(model, guide):
    """FlowARError unless a guide reads and draws what the model does."""
    for name in ("scale", "vae_embed_dim", "patch_size", "class_num"):
        if getattr(guide, name) != getattr(model, name):
            raise FlowARError(f"guide: {name} is {getattr(guide, name)}, expected the model's {getattr(model, name)}: "
                              "use a checkpoint of the same geometry")


def check_images(shape, stride):
    """FlowARError unless a VAE of this stride can encode images of this shape."""
    if len(shape) != 4 or shape[1] != 3 or shape[2] % stride or shape[3] % stride:
        raise FlowARError(f"images are {tuple(shape)}: expected (batch, 3, height, width), both multiples of the VAE's "
                          f"stride {stride}")
