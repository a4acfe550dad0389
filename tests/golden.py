"""Formula weights and seeded inputs of the golden files; see goldens/README.md."""
import json
import zlib
from pathlib import Path

import numpy as np
import torch

GOLDENS = Path(__file__).parent / "goldens"
TOLERANCE = 1e-5  # of the largest value


def load(name):
    """(arrays, meta) of goldens/<name>.npz."""
    with np.load(GOLDENS / f"{name}.npz") as data:
        arrays = {key: data[key] for key in data.files}
    return arrays, json.loads(str(arrays.pop("meta")))


def released_shapes(name):
    return json.loads((GOLDENS / "released_state_dicts.json").read_text())[name]


def formula_tensor(name, shape, seed):
    a = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32).standard_normal(shape)
    if name.endswith(("_ln.weight", "norm.weight")) or "norm2_" in name:
        a *= 0.1
        a += 1
    elif len(shape) == 2 and not name.startswith("class_emb"):
        a *= 0.7
        a /= np.sqrt(shape[1])
    elif len(shape) == 4:
        a *= 0.7
        a /= np.sqrt(shape[1] * shape[2] * shape[3])
    elif "norm" in name and name.endswith(".weight"):
        a *= 0.1
        a += 1
    else:
        a *= 0.1
    return torch.from_numpy(np.asarray(a, dtype=np.float32))


def fill(module, seed):
    """Give the module the formula weights."""
    for name, value in module.state_dict().items():
        if name != "mask" and not name.endswith("rope.freqs"):
            value.copy_(formula_tensor(name, tuple(value.shape), seed))
    return module.eval()


def normal(seed, shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def noise(seed, batch, scale, channels=16):
    rs = np.random.RandomState(seed)
    return [torch.from_numpy(rs.standard_normal((batch, s * s, channels)).astype(np.float32)) for s in scale]


def times(seed, scales, batch):
    return torch.from_numpy(np.random.RandomState(seed).random_sample((scales, batch)).astype(np.float32))


def assert_close(actual, expected, tolerance=TOLERANCE):
    """Largest difference at most `tolerance` of the largest expected value."""
    actual = torch.as_tensor(actual).detach().double()
    expected = torch.as_tensor(np.asarray(expected)).double()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error, limit = (actual - expected).abs().max(), tolerance * expected.abs().max()
    assert error <= limit, f"largest difference {error:.2e}, allowed {limit:.2e}"


def check_flowar_small():
    from models import build_model

    arrays, meta = load("flowar_small")
    model = fill(build_model(meta["model"], **meta["kwargs"]), meta["weights_seed"])
    latents = model.sample_tokens(torch.from_numpy(arrays["labels"]), cfg=meta["cfg"], guidance=meta["guidance"],
                                  num_steps=meta["num_steps"], noise=noise(meta["noise_seed"], 1, model.scale))
    assert_close(latents, arrays["sample"])
