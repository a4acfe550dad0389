"""Autoencoders of the diffusers library, opened from safetensors only and no larger than their file."""
import contextlib
import tempfile
from pathlib import Path

import torch
from torch import nn

from models.errors import FlowARError
from models.files.refusals import check_images
from models.files.states import printable, unused
from models.files.tensors import first_line, name_some, reading
from models.files.vaes import DEEPEST, MOST_LEVELS, WIDEST, beyond, read_latent_scale
from models.vae import DiagonalGaussian, LatentScale

WEIGHTS = "diffusion_pytorch_model.safetensors"
STATISTICS = "latents_mean", "latents_std"  # of a configuration: as many numbers as a latent has
MOST_WEIGHTS = 2**30  # of a repository, whose file is not here yet


def open_diffusers(spec):
    """(DiffusersVAE of '<path or repository>[:subfolder]', lines for a log). A path: of a folder, or of a .safetensors
    file with its config.json beside it.
    """
    network, notes = open_network(spec)
    with reading(f"--vae diffusers:{spec}"):
        return CLASSES[network.config._class_name](network, spec).eval().requires_grad_(False), notes


class DiffusersVAE(nn.Module):
    """A diffusers autoencoder as a VAE."""

    def __init__(self, network, spec):
        super().__init__()
        self.network, config = network, network.config
        self.embed_dim, self.stride = self.geometry(config)
        scale = read_latent_scale(self.scaling(config), f"--vae diffusers:{spec}", self.embed_dim)
        self.latent_scale = LatentScale(*scale)
        if type(self.stride) is not int or self.stride < 1:
            raise ValueError(f"its stride is {self.stride!r}, expected a number above 0")

    def scaling(self, config):
        return config.scaling_factor, config.get("shift_factor") or 0.0

    def geometry(self, config):
        """(latent channels, stride)."""
        if "spatial_compression_ratio" in config or hasattr(self.network, "spatial_compression_ratio"):
            return config.latent_channels, self.network.spatial_compression_ratio
        names = "block_out_channels", "down_block_out_channels", "encoder_block_out_channels"
        widths = next(config[name] for name in names if config.get(name))
        return config.get("vq_embed_dim") or config.latent_channels, 2 ** (len(widths) - 1)

    def encode(self, images):
        check_images(images.shape, self.stride)
        encoded = self.network.encode(images)
        if hasattr(encoded, "latent_dist"):
            return DiagonalGaussian(encoded.latent_dist.parameters)
        return DiagonalGaussian.of_mean(encoded.latent if hasattr(encoded, "latent") else encoded.latents)

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
        self.check(images.shape[2:])
        return super().encode((images + 1) / 2)

    def decode(self, latents):
        self.check([side * self.stride for side in latents.shape[2:]])
        return super().decode(latents) * 2 - 1

    def check(self, sides):
        size = self.network.decoder_image_size
        if list(sides) != [size, size]:
            raise FlowARError(f"this AutoencoderRAE is of {size} x {size} pixels, not of {' x '.join(map(str, sides))}:"
                              f" give --img_size {size}")


CLASSES = {"AutoencoderKL": DiffusersVAE, "AsymmetricAutoencoderKL": DiffusersVAE, "AutoencoderDC": DiffusersVAE,
           "AutoencoderTiny": DiffusersVAE, "VQModel": DiffusersVAE, "AutoencoderRAE": RepresentationAutoencoder}


def open_network(spec):
    """(The pretrained network of open_diffusers' spec, from safetensors only, lines for a log)."""
    try:
        import diffusers
    except ImportError as error:
        raise FlowARError(f"--vae diffusers:{spec} needs: pip install diffusers") from error
    source, _, subfolder = spec.partition(":")
    file = Path(source) if Path(source).is_file() else None
    options = {"subfolder": subfolder} if subfolder else {}
    try:
        config = diffusers.AutoencoderKL.load_config(file.parent if file else source, **options)
        name = config.get("_class_name")
        if name not in CLASSES:
            raise FlowARError(f"--vae diffusers:{spec}: its class is {name}, expected one of {', '.join(CLASSES)}")
        if name == "AutoencoderRAE" and not diffusers.utils.is_transformers_available():
            raise FlowARError(f"--vae diffusers:{spec}: an {name} needs: pip install transformers")
        kind = getattr(diffusers, name)
        check_size(kind, config, [file] if file else (Path(source) / subfolder).glob("*.safetensors"), spec)
        with as_folder(file, source) as folder:
            network, found, notes = load(kind, folder, options, spec)
        return network, notes + check_loaded(network, found, spec)
    except FlowARError:
        raise
    except Exception as error:  # of a configuration that makes no network, or of what is no configuration
        raise FlowARError(f"--vae diffusers:{spec}: cannot be opened ({first_line(error)})") from error


@contextlib.contextmanager
def as_folder(file, source):
    """What from_pretrained takes: a folder in which the file has the name that it looks for, else the source."""
    if file is None:
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        for target, name in ((file, WEIGHTS), (file.with_name("config.json"), "config.json")):
            (Path(folder) / name).symlink_to(target.resolve())
        yield folder


def load(kind, folder, options, spec):
    """(Network in float32, what from_pretrained says of its tensors, lines for a log)."""
    options = dict(options, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True)
    try:
        return *kind.from_pretrained(folder, **options), []
    except OSError as error:
        if "file named" not in str(error):  # it is there, but cannot be read
            raise
        try:
            loaded = kind.from_pretrained(folder, variant="fp16", **options)
        except OSError:
            raise error from None
        return *loaded, [f"--vae diffusers:{spec}: has only the fp16 variant of its weights, which was rounded"]
def check_loaded(network, found, spec):
    """Lines on tensors that were not used. FlowARError as of check_fits: diffusers draws at random what is missing."""
    others, modules = found["unexpected_keys"], {name for name, _ in network.named_children()}
    inside = [name for name in others if name.split(".")[0] in modules]
    wrong = [f"{name} is missing" for name in found["missing_keys"]]
    wrong += [f"{printable(name)} is not in the VAE" for name in inside]
    if wrong:
        raise FlowARError(f"--vae diffusers:{spec}: {len(wrong)} tensors do not fit the VAE: {name_some(wrong, 3)}")
    return [f"--vae diffusers:{spec}: {unused(others)}"] if others else []


def check_size(kind, config, files, spec):
    """FlowARError for a configuration whose network has more weights than the files, if there are any, can hold."""
    for name, value in config.items():
        high = DEEPEST if "layers" in name or "num_" in name and "_blocks" in name else WIDEST
        if name not in STATISTICS and beyond(value, high):
            raise FlowARError(f"--vae diffusers:{spec}: {name} is {str(value)[:60]}, expected numbers of at most "
                              f"{high} and at most {MOST_LEVELS} of them")
    with torch.device("meta"):
        network = kind.from_config(config)
    weights = sum(value.numel() for value in (*network.parameters(), *network.buffers()))
    most = sum(file.stat().st_size for file in files) or MOST_WEIGHTS
    if weights > most:
        raise FlowARError(f"--vae diffusers:{spec}: its configuration asks for {weights} weights, its file has room "
                          f"for at most {most}")
