"""What a VAE's file says: tensors, configuration, latent scale. It is believed only as far as it fits."""
import reprlib

from models.errors import FlowARError
from models.files.checkpoints import KL16, depth
from models.files.states import check_fits, find_weights
from models.files.tensors import notify, read_file, reading

MARKERS = "encoder.conv_in.weight", "decoder.conv_in.weight"  # of the names of any AutoencoderKL
LARGEST_SCALE = 1e6
# What a file may ask for: beyond, even the names of the layers would take memory.
WIDEST, DEEPEST, MOST_LEVELS = 8192, 32, 12


def read_latent_scale(value, path, channels=None):
    """(scale, shift) of what a file says, a sequence of both or of the scale, each a number or nested lists (C,) or
    (C, h, w) of them, which become tuples; FlowARError if it says something else, or of other than `channels`.
    """
    try:
        if not isinstance(value, (list, tuple)) or len(value) not in (1, 2):
            raise ValueError
        parts = [read_numbers(part, 3, low) for part, low in zip(value, (0.0, -LARGEST_SCALE))]
        for shape in map(shape_of, parts):
            if len(shape) == 2 or shape and channels not in (None, shape[0]):
                raise ValueError
    except (ValueError, OverflowError):
        raise FlowARError(f"{path}: latent_scale is {reprlib.repr(value)[:200]}, expected [scale, shift], two numbers, "
                          f"the scale above 0, or lists of one for each channel{f' of {channels}' if channels else ''} "
                          "or position (channel, row, column)") from None
    return (*parts, 0.0)[:2]


def read_numbers(value, depth, low):
    """A number above `low` as a float, or lists, at most `depth` in each other and none ragged, as tuples of them."""
    if not isinstance(value, (list, tuple)):
        if type(value) not in (int, float) or not low < value < LARGEST_SCALE:
            raise ValueError
        return float(value)
    parts = tuple(read_numbers(part, depth - 1, low) for part in value) if depth else ()
    if not parts or len(set(map(shape_of, parts))) > 1:
        raise ValueError
    return parts


def shape_of(numbers):
    """Shape of nested tuples of numbers, () of a number."""
    return (len(numbers), *shape_of(numbers[0])) if isinstance(numbers, tuple) else ()


def find_vae_weights(content, path):
    """The Weights of a VAE in a file's content."""
    weights = find_weights(content, path, "VAE", MARKERS)
    if any(".down_blocks." in name for name in weights.tensors):
        raise FlowARError(f"{path}: a VAE of the diffusers library, by its names: give --vae diffusers:FOLDER, where "
                          "its config.json is, or its repository")
    return weights


def vae_config(content, state, path):
    """AutoencoderKL's arguments that a VAE file holds beside its tensors, else those that its tensors tell; FlowARError
    for what none can be.
    """
    ranges = {"embed_dim": (1, WIDEST), "ch": (1, WIDEST), "ch_mult": (1, WIDEST), "num_res_blocks": (0, DEEPEST)}
    held = content.get("config") if isinstance(content, dict) else None
    ours = isinstance(held, dict) and any(name in held for name in (*ranges, "latent_scale"))
    config = {**recognise_config(state), **(held if ours else {})}
    for name, value in config.items():
        numbers, (low, high) = value if name == "ch_mult" else [value], ranges.get(name, (1, 0))
        if name != "latent_scale" and not (
                isinstance(numbers, (list, tuple)) and 0 < len(numbers) <= MOST_LEVELS
                and all(type(number) is int and low <= number <= high for number in numbers)):
            raise FlowARError(f"{path}: bad VAE configuration ({reprlib.repr(name)}: {reprlib.repr(value)})")
    if "latent_scale" in config:
        config["latent_scale"] = read_latent_scale(config["latent_scale"], path, config.get("embed_dim"))
    return config


def recognise_config(state):
    """AutoencoderKL's arguments that a state dict's tensors tell, none where they tell nothing; no latent scale."""
    try:
        ch, levels = len(state["encoder.conv_in.weight"]), depth(state, "decoder.up.")
        widths = [len(state[f"decoder.up.{level}.block.0.conv1.weight"]) for level in range(levels)]
        return {"embed_dim": len(state["post_quant_conv.weight"]), "ch": ch, "ch_mult": tuple(w // ch for w in widths),
                "num_res_blocks": depth(state, "decoder.up.0.block.") - 1}
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return {}


def load_state(vae, state, path):
    """Load `state` into the VAE; see check_fits. From the meta device it comes to the CPU for that."""
    left_out = check_fits(vae, state, path, "VAE")
    with reading(path):
        if next(vae.parameters()).is_meta:
            vae.to_empty(device="cpu")
        vae.load_state_dict({name: state[name] for name in vae.state_dict()})
    return left_out


def load_vae_file(vae, path):
    """Load the weights of a file into an AutoencoderKL; what else there is to say of it goes to stderr."""
    weights = find_vae_weights(read_file(path, mmap=True), path)
    notify(*vae_notes(vae, weights, load_state(vae, weights.tensors, path), {"latent_scale": vae.latent_scale}, path))


def vae_notes(vae, weights, left_out, config, path):
    """Lines that say which weights of a file a VAE has, where there was a choice, and what of the file is not used."""
    notes = []
    if weights.kind == "ema" or weights.others or left_out:
        notes.append(f"{path}: {weights.describe(left_out)}")
    if "latent_scale" not in config and (vae.embed_dim, vae.stride) != tuple(KL16.values()):
        notes.append(f"warning: {path} does not tell its latent scale: KL-16's is taken, {vae.latent_scale.scale}; its "
                     "own is (1 / standard deviation, mean) of its latents, kept as 'config': {'latent_scale': [...]}")
    return notes


def beyond(value, high):
    """Whether a number, or one in nested lists, is above `high`, or a list too long."""
    if isinstance(value, (list, tuple)):
        return len(value) > MOST_LEVELS or any(beyond(part, high) for part in value)
    return isinstance(value, (int, float)) and value > high
