"""What FlowAR and its VAE refuse, as it would give wrong numbers: geometry that does not work, labels outside of the
classes, wrong shapes.
"""
from models import kernels
from models.errors import FlowARError


def check_geometry(img_size, vae_stride, patch_size, scale):
    """Raise FlowARError unless the scales fit the latent: increasing, from 1 to img_size / vae_stride / patch_size."""
    if patch_size < 1 or vae_stride < 1 or img_size % (vae_stride * patch_size):
        raise FlowARError(f"img_size {img_size} is not a multiple of vae_stride x patch_size = "
                          f"{vae_stride} x {patch_size}")
    side = img_size // (vae_stride * patch_size)
    text = ",".join(map(str, scale))
    if not scale or scale[0] != 1 or any(a >= b for a, b in zip(scale, scale[1:])):
        raise FlowARError(f"scale is {text}: expected an increasing list that starts with 1, the class token")
    if scale[-1] != side:
        raise FlowARError(f"scale ends with {scale[-1]}: expected {side}, the latent's size in tokens (img_size "
                          f"{img_size} / vae_stride {vae_stride} / patch_size {patch_size})")


def check_labels(labels, limit, wait=True):
    """Refuse labels outside 0..limit - 1; wait: see kernels.is_sure."""
    if not kernels.is_sure(((labels >= 0) & (labels < limit)).all(), wait):
        bad = labels[(labels < 0) | (labels >= limit)][0].item()
        raise FlowARError(f"label {bad} is outside 0..{limit - 1}")


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
    """FlowARError unless a guide, if there is one, reads and draws what the model does."""
    for name in ("scale", "vae_embed_dim", "patch_size", "class_num"):
        if guide is not None and getattr(guide, name) != getattr(model, name):
            raise FlowARError(f"guide: its {name} is {getattr(guide, name)}, the model's is {getattr(model, name)}: "
                              "give a weaker checkpoint of the same geometry")


def check_images(shape, stride):
    """FlowARError unless a VAE of this stride can encode images of this shape."""
    if len(shape) != 4 or shape[1] != 3 or shape[2] % stride or shape[3] % stride:
        raise FlowARError(f"images are {tuple(shape)}: expected (batch, 3, height, width), both multiples of the VAE's "
                          f"stride {stride}")


def check_latent_scale(shape, latents):
    """FlowARError unless a latent scale of this shape is one of these latents' channels or positions."""
    channels, positions = tuple(latents[-3:-2]), tuple(latents[-3:])
    if shape not in (channels, positions):
        raise FlowARError(f"the latent scale is of {as_sides(shape)} numbers, the latents are {as_sides(positions)}: "
                          f"expected one number, one of every channel or of every position; it is of another VAE or "
                          "image size")


def as_sides(shape):
    return " x ".join(map(str, shape))
