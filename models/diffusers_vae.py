"""Autoencoders of the diffusers library behind the interface of models.vae: AutoencoderKL (SD, SDXL, SD3, FLUX),
AutoencoderDC (stride 32) and AutoencoderTiny. Stride, channels, latent scale and shift come from their configuration.
"""
from pathlib import Path

import torch
from torch import nn

from models.errors import FlowARError
from models.weights import first_line

CLASSES = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny")
WIDEST, DEEPEST, MOST_LEVELS = 8192, 32, 12  # what a configuration may ask for: numbers, numbers of layers, lengths of lists
MOST_WEIGHTS = 2**30  # of a repository, whose file is not here yet
NO_VARIANCE = -30.0  # log-variance of a deterministic encoder's "posterior": a sample is the mean


class DiffusersVAE(nn.Module):
    """A diffusers autoencoder with the attributes embed_dim, stride, latent_scale and the methods encode and decode."""

    def __init__(self, network, latent_scale, posterior):
        super().__init__()
        self.network, self.latent_scale, self.posterior = network, latent_scale, posterior
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
        """images (B, 3, H, W) in [-1, 1] -> posterior over raw latents (B, C, H / stride, W / stride)."""
        encoded = self.network.encode(images)
        if hasattr(encoded, "latent_dist"):
            return self.posterior(encoded.latent_dist.parameters)
        latents = encoded.latent if hasattr(encoded, "latent") else encoded.latents
        return self.posterior(torch.cat((latents, torch.full_like(latents, NO_VARIANCE)), dim=1))

    def decode(self, latents):
        """Raw latents (B, C, h, w) -> images (B, 3, h * stride, w * stride), about [-1, 1]."""
        return self.network.decode(latents).sample


def open_network(spec):
    """The pretrained network of '<path or repository>[:subfolder]', from safetensors only."""
    try:
        import diffusers
    except ImportError as error:
        raise FlowARError(f"--vae diffusers:{spec} needs: pip install diffusers") from error
    source, _, subfolder = spec.partition(":")
    options = {"subfolder": subfolder} if subfolder else {}
    try:
        config = diffusers.AutoencoderKL.load_config(source, **options)
        if config.get("_class_name") not in CLASSES:
            raise FlowARError(f"--vae diffusers:{spec}: its class is {config.get('_class_name')}, expected one of {', '.join(CLASSES)}")
        kind = getattr(diffusers, config["_class_name"])
        check_size(kind, config, Path(source) / subfolder, spec)
        return kind.from_pretrained(source, use_safetensors=True, low_cpu_mem_usage=False, **options)
    except FlowARError:
        raise
    except Exception as error:  # of a configuration that makes no network, or of what is no configuration
        raise FlowARError(f"--vae diffusers:{spec}: cannot be opened ({first_line(error)})") from error


def check_size(kind, config, folder, spec):
    """FlowARError for a configuration whose network has more weights than the files in `folder` can hold; nothing is allocated."""
    for name, value in config.items():
        high = DEEPEST if "layers_per_block" in name or "num_" in name and "_blocks" in name else WIDEST
        if beyond(value, high):
            raise FlowARError(f"--vae diffusers:{spec}: {name} is {str(value)[:60]}, expected numbers of at most {high} and at most "
                              f"{MOST_LEVELS} of them")
    with torch.device("meta"):
        network = kind.from_config(config)
    weights = sum(value.numel() for value in network.state_dict().values())
    most = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else MOST_WEIGHTS
    if weights > most:
        raise FlowARError(f"--vae diffusers:{spec}: its configuration asks for {weights} weights, its file has room for at most {most}")


def beyond(value, high):
    """Whether a number, or one in nested lists, is above `high`, or a list too long."""
    if isinstance(value, (list, tuple)):
        return len(value) > MOST_LEVELS or any(beyond(part, high) for part in value)
    return isinstance(value, (int, float)) and value > high
