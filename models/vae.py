"""The KL autoencoder (KL-16 of MAR) and the latent scale that travels with it. Others in its place: see vaes.py."""
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models.checks import check_images
from models.errors import FlowARError
from models.weights import VAE, find_weights, load_state, read_file


class LatentScale(NamedTuple):
    """The affine map between a VAE's raw latents and those that FlowAR models, whose std is about 1: both parts are
    numbers, or nested tuples of one for each channel, (C,), or position, (C, h, w).
    """
    scale: float | tuple
    shift: float | tuple = 0.0

    def normalize(self, raw):
        scale, shift = (as_tensor(part, raw.shape[-3:], raw.dtype, raw.device) for part in self)
        return (raw - shift) * scale

    def restore(self, latents):
        scale, shift = (as_tensor(part, latents.shape[-3:], latents.dtype, latents.device) for part in self)
        return latents / scale + shift


@functools.lru_cache(maxsize=8)  # on the device already: no copy holds up the host
def as_tensor(part, shape, dtype, device):
    """A part of a LatentScale as what broadcasts over latents of a shape (C, h, w)."""
    if not isinstance(part, tuple):
        return part
    numbers = torch.tensor(part, dtype=dtype, device=device)
    if numbers.shape not in (shape[:1], shape):
        raise FlowARError(f"the latent scale has shape {tuple(numbers.shape)}, the latents {tuple(shape)}: expected "
                          "one number, or one per channel or position; it belongs to another VAE or image size")
    return numbers if numbers.ndim == 3 else numbers[:, None, None]


KL16_LATENT_SCALE = LatentScale(0.2325)


class DiagonalGaussian:
    """Posterior of the encoder. parameters: (B, 2C, h, w), mean and logvar, the latter clamped to [-30, 20]."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @classmethod
    def of_mean(cls, mean):
        """Of a deterministic encoder: a sample is the mean."""
        return cls(torch.cat((mean, torch.full_like(mean, -30.0)), dim=1))

    def sample(self, generator=None, noise=None):
        """mean + std * noise; noise (B, C, h, w) is drawn with `generator` if None."""
        if noise is None:
            noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + (0.5 * self.logvar).exp() * noise

    def mode(self):
        return self.mean

    def kl(self):
        """KL divergence from N(0, I) per image, (B,)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


def group_norm(channels):
    """32 groups, as in the release; fewer in layers under 128 channels, whose groups would be single channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Identity()
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """Single-head self-attention over positions, all projections 1x1 convolutions."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, ch, ch_mult, num_res_blocks, out_channels):
        super().__init__()
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels = ch
        for i, mult in enumerate(ch_mult):
            last = i == len(ch_mult) - 1
            level = nn.Module()
            level.block, level.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(num_res_blocks):
                level.block.append(ResnetBlock(channels, ch * mult))
                channels = ch * mult
                level.attn.append(AttnBlock(channels) if last else nn.Identity())
            level.downsample = nn.Identity() if last else Downsample(channels)
            self.down.append(level)
        self.mid = Middle(channels)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down:
            for block, attn in zip(level.block, level.attn):
                h = attn(block(h))
            h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    def __init__(self, ch, ch_mult, num_res_blocks, in_channels):
        super().__init__()
        channels = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.mid = Middle(channels)
        self.up = nn.ModuleList()
        for i, mult in reversed(list(enumerate(ch_mult))):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                level.block.append(ResnetBlock(channels, ch * mult))
                channels = ch * mult
            level.upsample = Upsample(channels) if i > 0 else nn.Identity()
            self.up.insert(0, level)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, latents):
        h = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            for block in level.block:
                h = block(h)
            h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """KL autoencoder of latent diffusion; the defaults are MAR's KL-16, and `kl16.ckpt` loads into them.

    Args:
        embed_dim: latent channels C.
        ch, ch_mult: base width, and multiplier of every level; stride = 2 ** (len(ch_mult) - 1).
        num_res_blocks: residual blocks a level in the encoder (one more in the decoder).
        latent_scale: (scale, shift); a FlowAR latent is (raw latent - shift) * scale.
        ckpt_path: file to load; its latent scale is not read, see vaes.load_vae.
    """

    def __init__(self, embed_dim=16, ch_mult=(1, 1, 2, 2, 4), ch=128, ckpt_path=None, num_res_blocks=2,
                 latent_scale=KL16_LATENT_SCALE):
        super().__init__()
        self.config = dict(embed_dim=embed_dim, ch_mult=tuple(ch_mult), ch=ch, num_res_blocks=num_res_blocks)
        self.latent_scale = LatentScale(*latent_scale)
        self.embed_dim, self.stride = embed_dim, 2 ** (len(ch_mult) - 1)
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, 2 * embed_dim)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, embed_dim)
        self.quant_conv = nn.Conv2d(2 * embed_dim, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, embed_dim, 1)
        if ckpt_path is not None:
            weights = find_weights(read_file(ckpt_path), ckpt_path, "VAE", VAE)
            load_state(self, weights.tensors, ckpt_path, "VAE")

    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> DiagonalGaussian over raw latents (B, C, H / stride, W / stride)."""
        check_images(images.shape, self.stride)
        return DiagonalGaussian(self.quant_conv(self.encoder(images)))

    def decode(self, latents):
        """Raw latents (B, C, h, w) -> images (B, 3, h * stride, w * stride), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents))
