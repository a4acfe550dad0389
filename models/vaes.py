"""VAEs by name: open one, save one, say which one it is.

A VAE has attributes embed_dim (latent channels C), stride (pixels a latent cell) and latent_scale (LatentScale), and
methods encode(images (B, 3, H, W) in [-1, 1]) -> DiagonalGaussian and decode(raw latents (B, C, h, w)) -> images. A row
in VAES makes --vae, the caches and the reports know it.
"""
from pathlib import Path

import torch

from models.errors import FlowARError
from models.files import file_hash, first_line, load_state, notify, read_file, tensors_hash, write_file
from models.files.diffusers import open_diffusers
from models.files.hub import is_remote, local_file
from models.files.vaes import find_vae_weights, vae_config, vae_notes
from models.vae import AutoencoderKL

DEFAULT_PATH = "pretrained_models/vae/kl16.ckpt"


class NamedVAE:
    """What --vae NAME:SPEC means, before anything is opened. One's own kind needs open() alone."""

    def __init__(self, name, spec, path):
        self.spec, self.path = spec, path
        self.name, self.option = name, f"--vae {name}"  # for messages and reports, and to name it on a command line

    def is_there(self):
        """Whether it can be opened, as far as one sees without trying."""
        return True

    def open(self):
        """(VAE, lines for a log on what its file holds besides), or FlowARError."""
        raise NotImplementedError

    def identity(self, opened=None):
        """What a cache remembers of it: SHA-256 over its tensors; None if it is not at hand."""
        return None if opened is None else tensors_hash(opened.state_dict())


class VAEFile(NamedVAE):
    """--vae kl16: the file of --vae_path, KL-16's or one of scripts/train_vae.py."""

    def __init__(self, name, spec, path):
        super().__init__(name, spec, path)
        self.name, self.option = str(path), f"--vae_path {path}"

    def is_there(self):
        return is_remote(self.path) or Path(self.path).is_file()

    def open(self):
        return read_vae(self.path)

    def identity(self, opened=None):
        return file_hash(local_file(self.path)) if self.is_there() else None


class Diffusers(NamedVAE):
    """--vae diffusers:PATH_OR_REPOSITORY[:SUBFOLDER]: see models.files.diffusers."""

    def open(self):
        return open_diffusers(self.spec)


VAES = {"kl16": VAEFile, "diffusers": Diffusers}


def find_vae(vae, path=None):
    """The NamedVAE of the options --vae and --vae_path."""
    name, _, spec = vae.partition(":")
    if name not in VAES:
        raise FlowARError(f"--vae {vae}: expected one of {', '.join(VAES)} (diffusers:<path or hub name>[:subfolder])")
    return VAES[name](vae, spec, path or DEFAULT_PATH)


def read_vae(path):
    """(AutoencoderKL of a file, lines for a log: see vae_notes): `kl16.ckpt`, what save_vae wrote, or the like; by path
    or by name, see models.files.hub. Nothing is allocated before the tensors are found to fit the configuration.
    """
    path = local_file(path)
    content = read_file(path, mmap=True)
    weights = find_vae_weights(content, path)
    config = vae_config(content, weights.tensors, path)
    try:
        with torch.device("meta"):
            vae = AutoencoderKL(**config)
    except (FlowARError, RuntimeError) as error:
        raise FlowARError(f"{path}: bad VAE configuration ({first_line(error)})") from error
    left_out = load_state(vae, weights.tensors, path)
    return vae.eval().requires_grad_(False), vae_notes(vae, weights, left_out, config, path)


def load_vae(path):
    """The AutoencoderKL of a file, in eval mode without gradients; see read_vae."""
    vae, notes = read_vae(path)
    notify(*notes)
    return vae


def save_vae(vae, path):
    """Write a file that load_vae reads: {"model": state dict, "config": constructor arguments}."""
    state = {name: value.cpu() for name, value in vae.state_dict().items()}
    write_file({"model": state, "config": {**vae.config, "latent_scale": tuple(vae.latent_scale)}}, path)
