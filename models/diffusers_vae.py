"""Autoencoders of the diffusers library behind the interface of models.vae: AutoencoderKL (SD, SDXL, SD3, FLUX),
AutoencoderDC (stride 32) and AutoencoderTiny. Stride, channels, latent scale and shift come from their configuration.
"""
import torch
from torch import nn

from models.errors import FlowARError
from models.weights import first_line

CLASSES = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny")
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
        name = diffusers.AutoencoderKL.load_config(source, **options).get("_class_name")
        if name not in CLASSES:
            raise FlowARError(f"--vae diffusers:{spec}: its class is {name}, expected one of {', '.join(CLASSES)}")
        return getattr(diffusers, name).from_pretrained(source, use_safetensors=True, low_cpu_mem_usage=False, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, FlowARError):
            raise
        raise FlowARError(f"--vae diffusers:{spec}: cannot be opened ({first_line(error)})") from error
