"""VAEs by name: open one, save one, say which one it is.

A VAE has attributes embed_dim (latent channels C), stride (pixels a latent cell) and latent_scale (LatentScale), and
methods encode(images (B, 3, H, W) in [-1, 1]) -> DiagonalGaussian and decode(raw latents (B, C, h, w)) -> images. A row
in VAES makes --vae_path, the caches and the reports know it.
"""
import os
import sys

import torch
from torch import nn

from models.checks import check_images
from models.errors import FlowARError, name_some
from models.hub import ask_hub, is_name, local_file
from models.vae import AutoencoderKL, DiagonalGaussian, LatentScale
from models.weights import KL16, VAE, depth, file_hash, find_weights, load_state, read_file, tensors_hash, write_file

DEFAULT_PATH = "pretrained_models/vae/kl16.ckpt"
DEMO_VAE = "vae.safetensors"


class NamedVAE:
    """What --vae_path names, before anything is opened: KIND:SPEC, or a file. One's own kind needs open() alone."""

    def __init__(self, name, spec):
        self.name, self.spec = name, spec

    def is_there(self):
        """Whether it can be opened, as far as one sees without trying."""
        return True

    def open(self):
        """(VAE, lines for a log on what else is in its file)."""
        raise NotImplementedError

    def identity(self, opened=None):
        """What a cache remembers of it: SHA-256 over its tensors; None if it is not at hand."""
        return None if opened is None else tensors_hash(opened.state_dict())


class VAEFile(NamedVAE):
    """A file, by path or name: KL-16's or one of scripts/train_vae.py."""

    def is_there(self):
        return is_name(self.name) or local_file(self.name).is_file()

    def open(self):
        return read_vae(self.name)

    def identity(self, opened=None):
        return file_hash(local_file(self.name, DEMO_VAE)) if self.is_there() else None


def find_vae(name=None):
    """The NamedVAE of --vae_path, by default KL-16's file."""
    name = name or DEFAULT_PATH
    kind, _, spec = name.partition(":")
    return VAES.get(kind, VAEFile)(name, spec)


def saved_vae_path(options):
    """--vae_path of the options in a checkpoint; earlier versions had a KIND:SPEC in an option of its own, `vae`."""
    vae = options.get("vae")
    return vae if isinstance(vae, str) and vae != "kl16" else options.get("vae_path")


# ---- files of AutoencoderKL --------------------------------------------------------------------------------------


def read_vae(path):
    """(AutoencoderKL of a file in eval mode without gradients, lines for a log): `kl16.ckpt`, what save_vae writes, or
    the like; by path or by name, see models.hub. Its tensors tell its size.
    """
    path = local_file(path, DEMO_VAE)
    if not path.is_file():
        raise FlowARError(f"{path}: file not found: pass the VAE with --vae_path")
    content = read_file(path)
    weights = find_weights(content, path, "VAE", VAE)
    state, ch = weights.tensors, len(weights.tensors["encoder.conv_in.weight"])
    widths = [len(state[f"decoder.up.{level}.block.0.conv1.weight"]) for level in range(depth(state, "decoder.up."))]
    config = {"embed_dim": len(state["post_quant_conv.weight"]), "ch": ch, "ch_mult": [width // ch for width in widths],
              "num_res_blocks": depth(state, "decoder.up.0.block.") - 1}
    saved = content.get("config") or {}
    if "latent_scale" in saved:
        config["latent_scale"] = read_latent_scale(saved["latent_scale"], path)
    with torch.device("meta"):  # its initial weights would be drawn for nothing
        vae = AutoencoderKL(**config)
    left_out = load_state(vae.to_empty(device="cpu"), state, path, "VAE")
    notes = []
    if weights.kind == "ema" or left_out:
        notes.append(f"{path}: {weights.describe(left_out)}")
    if "latent_scale" not in saved and (vae.embed_dim, vae.stride) != tuple(KL16.values()):
        notes.append(f"warning: {path} does not tell its latent scale: KL-16's is taken, {vae.latent_scale.scale}; its "
                     "own is (1 / standard deviation, mean) of its latents, kept as 'config': {'latent_scale': [...]}")
    return vae.eval().requires_grad_(False), notes


def load_vae(path):
    """The AutoencoderKL of a file, in eval mode without gradients; see read_vae."""
    vae, notes = read_vae(path)
    for note in notes:
        print(note, file=sys.stderr)
    return vae


def save_vae(vae, path):
    """Write a file that load_vae reads: {"model": state dict, "config": constructor arguments}."""
    state = {name: value.cpu() for name, value in vae.state_dict().items()}
    write_file({"model": state, "config": {**vae.config, "latent_scale": tuple(vae.latent_scale)}}, path)


def read_latent_scale(value, path):
    """(scale, shift) of a file, each a number or nested lists of them, which become tuples."""
    try:
        scale, shift = (torch.tensor(part, dtype=torch.float64) for part in value)
        is_one = (scale > 0).all() and scale.isfinite().all() and shift.isfinite().all()
    except (TypeError, ValueError):
        is_one = False
    if not is_one:
        raise FlowARError(f"{path}: latent_scale is {str(value)[:200]}, expected [scale, shift] with scale > 0, each a "
                          "number or a list with one per channel or position (channel, row, column)")
    return as_tuples(scale.tolist()), as_tuples(shift.tolist())


def as_tuples(value):
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


# ---- autoencoders of the diffusers library -----------------------------------------------------------------------


class DiffusersVAE(nn.Module):
    """A diffusers autoencoder as a VAE."""

    def __init__(self, network, spec):
        super().__init__()
        self.network, config = network, network.config
        self.embed_dim, self.stride = self.geometry(config)
        self.latent_scale = LatentScale(*read_latent_scale(self.scaling(config), f"diffusers:{spec}"))

    def scaling(self, config):
        """(scale, shift)."""
        return config.scaling_factor, config.get("shift_factor") or 0.0

    def geometry(self, config):
        """(latent channels, stride)."""
        if hasattr(self.network, "spatial_compression_ratio"):
            return config.latent_channels, self.network.spatial_compression_ratio
        names = "block_out_channels", "down_block_out_channels", "encoder_block_out_channels"
        widths = next(config[name] for name in names if config.get(name))
        return config.get("vq_embed_dim") or config.latent_channels, 2 ** (len(widths) - 1)

    def encode(self, images):
        check_images(images.shape, self.stride)
        encoded = self.network.encode(images)
        if hasattr(encoded, "latent_dist"):
            return DiagonalGaussian(encoded.latent_dist.parameters)
        return DiagonalGaussian.of_mean(encoded[0])

    def decode(self, latents):
        return self.network.decode(latents).sample


class RepresentationAutoencoder(DiffusersVAE):
    """AutoencoderRAE: its latents, a frozen encoder's tokens, leave encode() normalised by position and scaled, and its
    images are in [0, 1]. It knows one image size: others would be resized without a word.
    """

    def scaling(self, config):
        return 1.0, 0.0

    def geometry(self, config):
        return config.encoder_hidden_size, self.network.decoder_patch_size

    def encode(self, images):
        self.check_size(*images.shape[2:])
        return super().encode((images + 1) / 2)

    def decode(self, latents):
        self.check_size(*(side * self.stride for side in latents.shape[2:]))
        return super().decode(latents) * 2 - 1

    def check_size(self, height, width):
        size = self.network.decoder_image_size
        if (height, width) != (size, size):
            raise FlowARError(f"this AutoencoderRAE needs images of {size} x {size} pixels, got {height} x {width}: "
                              f"use --img_size {size}")


AUTOENCODERS = {  # classes of diffusers
    "AutoencoderKL": DiffusersVAE, "AsymmetricAutoencoderKL": DiffusersVAE, "AutoencoderDC": DiffusersVAE,
    "AutoencoderTiny": DiffusersVAE, "VQModel": DiffusersVAE, "AutoencoderRAE": RepresentationAutoencoder}


class Diffusers(NamedVAE):
    """diffusers:PATH_OR_REPOSITORY[:SUBFOLDER]: in float32, from safetensors alone."""

    def open(self):
        try:
            import diffusers  # here: it is heavy, and only some need it
        except ImportError as error:
            raise FlowARError(f"{self.name} needs diffusers: pip install diffusers") from error
        source, _, subfolder = os.path.expanduser(self.spec).partition(":")
        options = {"subfolder": subfolder} if subfolder else {}
        config = ask_hub(lambda **where: diffusers.AutoencoderKL.load_config(source, **options, **where))
        name = config.get("_class_name")
        if name not in AUTOENCODERS:
            raise FlowARError(f"{self.name}: class {name} is not supported, expected one of {', '.join(AUTOENCODERS)}")
        network, loaded = ask_hub(lambda **where: getattr(diffusers, name).from_pretrained(
            source, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True, **options, **where))
        # diffusers draws what is missing at random
        others, modules = loaded["unexpected_keys"], {name for name, _ in network.named_children()}
        wrong = [f"{name} is missing" for name in loaded["missing_keys"]]
        wrong += [f"{name} is not in the VAE" for name in others if name.partition(".")[0] in modules]
        if wrong:
            raise FlowARError(f"{self.name}: {len(wrong)} tensors do not fit the VAE: {name_some(wrong, 3)}")
        vae = AUTOENCODERS[name](network, self.spec).eval().requires_grad_(False)
        return vae, [f"{self.name}: not used: {name_some(others)}"] if others else []


VAES = {"diffusers": Diffusers}
