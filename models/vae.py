"""The KL autoencoder (KL-16 of MAR) and the latent scale that travels with it.

Anything with the attributes embed_dim, stride, latent_scale and the methods encode and decode can stand in its place:
give VAES a function that opens it, and --vae takes it.
"""
import reprlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models.errors import FlowARError
from models.weights import first_line, name_some, read_file, reading, tensors_hash, write_file

GROUPS = 32
MIN_GROUP = 4  # channels
LARGEST_SCALE = 1e6
# What a file may ask for: beyond, even the names of the layers would take memory.
WIDEST, DEEPEST, MOST_LEVELS = 8192, 32, 12


class LatentScale(NamedTuple):
    """The affine map between a VAE's raw latents and those that FlowAR models, whose std is about 1."""

    scale: float
    shift: float = 0.0

    def normalize(self, raw):
        return (raw - self.shift) * self.scale

    def restore(self, latents):
        return latents / self.scale + self.shift


KL16_LATENT_SCALE = LatentScale(0.2325)


def read_latent_scale(value, path):
    """LatentScale of what a file says, a sequence (scale, shift) or (scale,); FlowARError if it says something else."""
    numbers = isinstance(value, (list, tuple)) and len(value) in (1, 2) and all(type(x) in (int, float) for x in value)
    if not numbers or not all(abs(x) < LARGEST_SCALE for x in value) or value[0] <= 0:
        raise FlowARError(f"{path}: latent_scale is {reprlib.repr(value)}, expected [scale, shift], two numbers, the scale above 0")
    return LatentScale(*map(float, value))


class DiagonalGaussian:
    """Posterior of the encoder. parameters: (B, 2C, h, w), mean and logvar, the latter clamped to [-30, 20]."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

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
    return nn.GroupNorm(min(GROUPS, channels // MIN_GROUP), channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


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


def _middle(channels):
    middle = nn.Module()
    middle.block_1 = ResnetBlock(channels, channels)
    middle.attn_1 = AttnBlock(channels)
    middle.block_2 = ResnetBlock(channels, channels)
    return middle


def _run_middle(middle, h):
    return middle.block_2(middle.attn_1(middle.block_1(h)))


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
                if last:
                    level.attn.append(AttnBlock(channels))
            if not last:
                level.downsample = Downsample(channels)
            self.down.append(level)
        self.mid = _middle(channels)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down:
            for i, block in enumerate(level.block):
                h = block(h)
                if level.attn:
                    h = level.attn[i](h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(_run_middle(self.mid, h))))


class Decoder(nn.Module):
    def __init__(self, ch, ch_mult, num_res_blocks, in_channels):
        super().__init__()
        channels = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.mid = _middle(channels)
        self.up = nn.ModuleList()
        for i, mult in reversed(list(enumerate(ch_mult))):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                level.block.append(ResnetBlock(channels, ch * mult))
                channels = ch * mult
            if i > 0:
                level.upsample = Upsample(channels)
            self.up.insert(0, level)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, latents):
        h = _run_middle(self.mid, self.conv_in(latents))
        for level in reversed(self.up):
            for block in level.block:
                h = block(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """KL autoencoder of latent diffusion; the defaults are MAR's KL-16, and `kl16.ckpt` loads into them.

    Args:
        embed_dim: latent channels C.
        ch, ch_mult: base width and the multiplier of every level; each level but the first halves the resolution,
            so that stride = 2 ** (len(ch_mult) - 1).
        num_res_blocks: residual blocks a level in the encoder (one more in the decoder).
        latent_scale: (scale, shift); a FlowAR latent is (raw latent - shift) * scale.
        ckpt_path: file to load, see load_state.
    """

    def __init__(self, embed_dim=16, ch_mult=(1, 1, 2, 2, 4), ch=128, ckpt_path=None, num_res_blocks=2,
                 latent_scale=KL16_LATENT_SCALE):
        super().__init__()
        for mult in ch_mult:
            if ch * mult < MIN_GROUP or ch * mult % min(GROUPS, ch * mult // MIN_GROUP):
                raise FlowARError(f"VAE width ch x ch_mult = {ch} x {mult}: expected a multiple of {GROUPS}, or of "
                                  f"{MIN_GROUP} below {GROUPS * MIN_GROUP} (GroupNorm)")
        self.config = dict(embed_dim=embed_dim, ch_mult=tuple(ch_mult), ch=ch, num_res_blocks=num_res_blocks)
        self.latent_scale = LatentScale(*latent_scale)
        self.embed_dim = embed_dim
        self.stride = 2 ** (len(ch_mult) - 1)
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, 2 * embed_dim)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, embed_dim)
        self.quant_conv = nn.Conv2d(2 * embed_dim, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, embed_dim, 1)
        if ckpt_path is not None:
            load_state(self, vae_tensors(read_file(ckpt_path), ckpt_path), ckpt_path)

    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> DiagonalGaussian over raw latents (B, C, H / stride, W / stride)."""
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % self.stride or images.shape[3] % self.stride:
            raise FlowARError(f"images are {tuple(images.shape)}: expected (batch, 3, height, width), both multiples "
                              f"of the VAE's stride {self.stride}")
        return DiagonalGaussian(self.quant_conv(self.encoder(images)))

    def decode(self, latents):
        """Raw latents (B, C, h, w) -> images (B, 3, h * stride, w * stride), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents))


def check_state(vae, state, path):
    """Raises FlowARError naming tensors of the VAE (it may be on the meta device) that `state` lacks or has misshapen."""
    own = vae.state_dict()
    missing = [name for name in own if name not in state]
    if missing:
        raise FlowARError(f"{path}: {len(missing)} tensors of the VAE are missing: {name_some(missing)}")
    wrong = [f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}" for name in own
             if state[name].shape != own[name].shape]
    if wrong:
        raise FlowARError(f"{path}: {len(wrong)} tensors do not fit the VAE: {name_some(wrong, 3)}")


def load_state(vae, state, path):
    """Load `state` into the VAE. Raises FlowARError, see check_state; returns the extra names."""
    check_state(vae, state, path)
    with reading(path):
        vae.load_state_dict({name: state[name] for name in vae.state_dict()})
    return [name for name in state if name not in vae.state_dict()]


def vae_tensors(content, path):
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(name, str) and isinstance(value, torch.Tensor)
                                              for name, value in state.items()):
        raise FlowARError(f"{path}: expected the state dict of a VAE, or a dict with one under 'model'")
    return state


def load_vae(path):
    """The VAE of a file: KL-16 (`kl16.ckpt`), or what scripts/train_vae.py wrote with its configuration inside.

    Returns (vae in eval mode without gradients, names of tensors in the file that it does not use). The configuration is
    the file's word: nothing is allocated before the file's tensors are found to be of the sizes that it asks for.
    """
    content = read_file(path)
    state, config = vae_tensors(content, path), vae_config(content, path)
    try:
        with torch.device("meta"):
            vae = AutoencoderKL(**config)
    except (FlowARError, RuntimeError) as error:
        raise FlowARError(f"{path}: bad VAE configuration ({first_line(error)})") from error
    check_state(vae, state, path)
    extra = load_state(vae.to_empty(device="cpu"), state, path)
    return vae.eval().requires_grad_(False), extra


def vae_config(content, path):
    """AutoencoderKL's arguments that a VAE file holds beside its tensors, {} if none; FlowARError for what none can be."""
    config = dict(content["config"]) if isinstance(content.get("config"), dict) else {}
    if "latent_scale" in config:
        config["latent_scale"] = read_latent_scale(config["latent_scale"], path)
    ranges = {"embed_dim": (1, WIDEST), "ch": (1, WIDEST), "num_res_blocks": (0, DEEPEST)}
    for name, value in config.items():
        if name == "ch_mult":
            good = isinstance(value, (list, tuple)) and 0 < len(value) <= MOST_LEVELS and all(within(x, 1, WIDEST) for x in value)
        else:
            good = name == "latent_scale" or name in ranges and within(value, *ranges[name])
        if not good:
            raise FlowARError(f"{path}: bad VAE configuration ({reprlib.repr(name)}: {reprlib.repr(value)})")
    return config


def within(value, low, high):
    return type(value) is int and low <= value <= high


def open_kl16(spec, path):
    """--vae kl16: the file of --vae_path, which may also be one of scripts/train_vae.py."""
    return load_vae(path)


def open_diffusers(spec, path):
    """--vae diffusers:<path or repository>[:subfolder]."""
    from models.diffusers_vae import DiffusersVAE, open_network
    network = open_network(spec)
    with reading(f"--vae diffusers:{spec}"):
        scale = read_latent_scale((network.config.scaling_factor, network.config.get("shift_factor") or 0.0), f"--vae diffusers:{spec}")
        return DiffusersVAE(network, scale, DiagonalGaussian).eval().requires_grad_(False), []


# Name before the colon of --vae -> function of (what follows the colon, --vae_path) -> (vae, unused tensor names).
VAES = {"kl16": open_kl16, "diffusers": open_diffusers}


def open_vae(vae, path):
    """The VAE of the options --vae and --vae_path, in eval mode, and the names of tensors that it does not use."""
    name, _, spec = vae.partition(":")
    if name not in VAES:
        raise FlowARError(f"--vae {vae}: expected one of {', '.join(VAES)}, or diffusers:<path or repository>[:subfolder]")
    return VAES[name](spec, path)


def vae_hash(vae):
    """SHA-256 over the VAE's tensors: what a cache remembers of it."""
    return tensors_hash(vae.state_dict())


def save_vae(vae, path):
    """Write a file that load_vae reads: {"model": state dict, "config": constructor arguments}."""
    state = {name: value.cpu() for name, value in vae.state_dict().items()}
    write_file({"model": state, "config": {**vae.config, "latent_scale": tuple(vae.latent_scale)}}, path)
