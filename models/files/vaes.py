"""What a VAE's file says: tensors, configuration, latent scale. It is believed only as far as it fits."""
import reprlib

import torch

from models.errors import FlowARError
from models.files.tensors import name_some, reading

LARGEST_SCALE = 1e6
# What a file may ask for: beyond, even the names of the layers would take memory.
WIDEST, DEEPEST, MOST_LEVELS = 8192, 32, 12


def read_latent_scale(value, path):
    """(scale, shift) of what a file says, a sequence of both or of the scale; FlowARError if it says something else."""
    numbers = isinstance(value, (list, tuple)) and len(value) in (1, 2) and all(type(x) in (int, float) for x in value)
    if not numbers or not all(abs(x) < LARGEST_SCALE for x in value) or value[0] <= 0:
        raise FlowARError(f"{path}: latent_scale is {reprlib.repr(value)}, "
                          "expected [scale, shift], two numbers, the scale above 0")
    return tuple(map(float, (*value, 0.0)[:2]))


def vae_tensors(content, path):
    """The state dict of a VAE file's content."""
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()):
        raise FlowARError(f"{path}: expected the state dict of a VAE, or a dict with one under 'model'")
    return state


def vae_config(content, path):
    """AutoencoderKL's arguments that a VAE file holds beside its tensors, if any; FlowARError for what none can be."""
    config = dict(content["config"]) if isinstance(content.get("config"), dict) else {}
    if "latent_scale" in config:
        config["latent_scale"] = read_latent_scale(config["latent_scale"], path)
    ranges = {"embed_dim": (1, WIDEST), "ch": (1, WIDEST), "ch_mult": (1, WIDEST), "num_res_blocks": (0, DEEPEST)}
    for name, value in config.items():
        numbers, (low, high) = value if name == "ch_mult" else [value], ranges.get(name, (1, 0))
        if name != "latent_scale" and not (
                isinstance(numbers, (list, tuple)) and 0 < len(numbers) <= MOST_LEVELS
                and all(type(number) is int and low <= number <= high for number in numbers)):
            raise FlowARError(f"{path}: bad VAE configuration ({reprlib.repr(name)}: {reprlib.repr(value)})")
    return config


def check_state(vae, state, path):
    """FlowARError naming tensors of the VAE (it may be on the meta device) that `state` lacks or has misshapen."""
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


def beyond(value, high):
    """Whether a number, or one in nested lists, is above `high`, or a list too long."""
    if isinstance(value, (list, tuple)):
        return len(value) > MOST_LEVELS or any(beyond(part, high) for part in value)
    return isinstance(value, (int, float)) and value > high
