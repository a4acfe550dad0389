"""Autoencoders of the diffusers library, opened from safetensors only and no larger than their file."""
from pathlib import Path

import torch
from torch import nn

from models.errors import FlowARError
from models.files.states import printable, unused
from models.files.tensors import first_line, name_some, reading
from models.files.vaes import DEEPEST, MOST_LEVELS, WIDEST, beyond, read_latent_scale
from models.vae import DiagonalGaussian, LatentScale

CLASSES = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny")
MOST_WEIGHTS = 2**30  # of a repository, whose file is not here yet


def open_diffusers(spec):
    """(DiffusersVAE of '<path or repository>[:subfolder]', lines for a log)."""
    network, notes = open_network(spec)
    with reading(f"--vae diffusers:{spec}"):
        config = network.config
        scale = read_latent_scale((config.scaling_factor, config.get("shift_factor") or 0.0), f"--vae diffusers:{spec}")
        return DiffusersVAE(network, LatentScale(*scale)).eval().requires_grad_(False), notes


class DiffusersVAE(nn.Module):
    """A diffusers autoencoder as a VAE."""

    def __init__(self, network, latent_scale):
        super().__init__()
        self.network, self.latent_scale = network, latent_scale
        config = network.config
        self.embed_dim = config.latent_channels
        if "spatial_compression_ratio" in config or hasattr(network, "spatial_compression_ratio"):
            self.stride = network.spatial_compression_ratio
        else:
            widths = config.get("block_out_channels") or config.encoder_block_out_channels
            self.stride = 2 ** (len(widths) - 1)
        if type(self.stride) is not int or self.stride < 1:
            raise ValueError(f"its stride is {self.stride!r}, expected a number above 0")

    def encode(self, images):
        encoded = self.network.encode(images)
        if hasattr(encoded, "latent_dist"):
            return DiagonalGaussian(encoded.latent_dist.parameters)
        return DiagonalGaussian.of_mean(encoded.latent if hasattr(encoded, "latent") else encoded.latents)

    def decode(self, latents):
        return self.network.decode(latents).sample


def open_network(spec):
    """(The pretrained network of '<path or repository>[:subfolder]', from safetensors only, lines for a log)."""
    try:
        import diffusers
    except ImportError as error:
        raise FlowARError(f"--vae diffusers:{spec} needs: pip install diffusers") from error
    source, _, subfolder = spec.partition(":")
    options = {"subfolder": subfolder} if subfolder else {}
    try:
        config = diffusers.AutoencoderKL.load_config(source, **options)
        if config.get("_class_name") not in CLASSES:
            raise FlowARError(f"--vae diffusers:{spec}: its class is {config.get('_class_name')}, expected one of "
                              f"{', '.join(CLASSES)}")
        kind = getattr(diffusers, config["_class_name"])
        check_size(kind, config, Path(source) / subfolder, spec)
        network, found = kind.from_pretrained(source, use_safetensors=True, low_cpu_mem_usage=False,
                                              output_loading_info=True, **options)
        return network, check_loaded(network, found, spec)
    except FlowARError:
        raise
    except Exception as error:  # of a configuration that makes no network, or of what is no configuration
        raise FlowARError(f"--vae diffusers:{spec}: cannot be opened ({first_line(error)})") from error


def check_loaded(network, found, spec):
    """Lines on tensors that were not used. FlowARError as of check_fits: diffusers draws at random what is missing."""
    others, modules = found["unexpected_keys"], {name for name, _ in network.named_children()}
    inside = [name for name in others if name.split(".")[0] in modules]
    wrong = [f"{name} is missing" for name in found["missing_keys"]]
    wrong += [f"{printable(name)} is not in the VAE" for name in inside]
    if wrong:
        raise FlowARError(f"--vae diffusers:{spec}: {len(wrong)} tensors do not fit the VAE: {name_some(wrong, 3)}")
    return [f"--vae diffusers:{spec}: {unused(others)}"] if others else []


def check_size(kind, config, folder, spec):
    """FlowARError for a configuration whose network has more weights than the files in `folder` can hold."""
    for name, value in config.items():
        high = DEEPEST if "layers_per_block" in name or "num_" in name and "_blocks" in name else WIDEST
        if beyond(value, high):
            raise FlowARError(f"--vae diffusers:{spec}: {name} is {str(value)[:60]}, expected numbers of at most "
                              f"{high} and at most {MOST_LEVELS} of them")
    with torch.device("meta"):
        network = kind.from_config(config)
    weights = sum(value.numel() for value in network.state_dict().values())
    most = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else MOST_WEIGHTS
    if weights > most:
        raise FlowARError(f"--vae diffusers:{spec}: its configuration asks for {weights} weights, its file has room "
                          f"for at most {most}")
