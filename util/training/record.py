"""What a model was trained on, as checkpoints and caches record it, and whether now is the same.

A checkpoint's `data` is {classes, counts (images of each), images, sha256 (of names and sizes)}, its `vae` a
LatentOrigin as a dict. Older ones, and released weights, have neither.
"""
from itertools import zip_longest
from typing import NamedTuple

import torch

from models import FlowARError
from models.vaes import read_latent_scale
from models.weights import content_hash, tensors_hash
from util.cluster import log


class LatentOrigin(NamedTuple):
    """The VAE that latents are of; None: not known."""
    name: str | None = None  # for messages: a path, or the option
    sha256: str | None = None  # NamedVAE.identity
    latent_scale: tuple | None = None  # (scale, shift), see models.vae.LatentScale
    tensors: str | None = None  # SHA-256 over its tensors: the same in whatever file


def make_record(options, data, origin):
    """What checkpoints say of a run beside its state. options: {name: value} of the program; data, origin: as above."""
    args = {name: tuple(value) if isinstance(value, tuple) else value  # no named tuples
            for name, value in options.items()}
    return {"args": args, "images": data["images"], "data": data, "vae": origin._asdict()}


def origin_of(named, vae):
    """LatentOrigin of an opened VAE; named: NamedVAE."""
    return LatentOrigin(f"--vae_path {named.name}", named.identity(vae), tuple(vae.latent_scale),
                        tensors_hash(vae.state_dict()))


def check_origin(what, saved, expected):
    """FlowARError unless two LatentOrigins are, as far as they are known, of one VAE. what: has the first."""
    name = "tensors" if saved.tensors and expected.tensors else "sha256"
    one, other = shorten(getattr(saved, name)), shorten(getattr(expected, name))
    if one and other and one != other:
        raise FlowARError(f"{what}: its VAE is {saved.name or 'another one'} ({name} {one}), but {expected.name} has "
                          f"{name} {other}: use the same VAE")
    one, other = shorten(saved.latent_scale), shorten(expected.latent_scale)
    if one and other and one != other:
        raise FlowARError(f"{what}: latent scale and shift are {one}, those of {expected.name} {other}: use the VAE it "
                          "was made with, the same --latent_norm, or store that scale in this VAE file ('config': "
                          "{'latent_scale': [scale, shift]})")


def shorten(value):
    """What a message says of a hash or a latent scale, equal for equal ones; of many numbers their shape and hash."""
    if value is None or isinstance(value, str):
        return value and value[:12]
    parts = [torch.tensor(part, dtype=torch.float64) for part in value]
    return tuple(f"{' x '.join(map(str, part.shape))} numbers {content_hash(part)[:12]}" if part.ndim else part.item()
                 for part in parts)


def saved_origin(content):
    """LatentOrigin of a checkpoint's content; of other programs' files nothing is known."""
    saved = content.get("vae")
    if not isinstance(saved, dict):
        return LatentOrigin()
    origin = LatentOrigin(**{name: saved.get(name) for name in LatentOrigin._fields})
    if origin.latent_scale is None:  # of a cache that does not tell it
        return origin
    return origin._replace(latent_scale=read_latent_scale(origin.latent_scale, "checkpoint"))


def saved_data(content):
    """`data` of a checkpoint's content, {} if it does not know it."""
    saved = content.get("data")
    return saved if isinstance(saved, dict) and "classes" in saved else {}


def check_data(content, path, now, class_num):
    """Compare a checkpoint's `data` with that of now: a label that moved, or for which a model of class_num classes has
    no room, is a FlowARError; other images are said.
    """
    before = saved_data(content)
    if not before:
        log(f"{path}: contains no record of its training data: classes, images and VAE are not checked")
        return
    for label, (old, new) in enumerate(zip_longest(before["classes"], now["classes"])):
        if old != new and (old is not None or label >= class_num):
            raise FlowARError(
                f"{path}: label {label} was {'no class' if old is None else f'class {old}'}, now it is "
                f"{'no class' if new is None else new}: a class folder was added, renamed or removed; restore the "
                "class folders, or start a new run without --resume in another --output_dir")
    if before.get("sha256") != now["sha256"]:
        log(f"warning: {path}: the data has changed: {before.get('images')} images of {len(before['classes'])} "
            f"classes, now {now['images']} of {len(now['classes'])} (names or sizes differ)")
