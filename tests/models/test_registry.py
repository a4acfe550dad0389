"""Sizes: recognised from tensors; a run's folder by its name; weights of another method are refused."""
import pytest
import torch
from helpers import SCALES, small_model

from models import FlowARError, build_model, load_flowar, registry

TINY = dict(img_size=16, vae_stride=4, vae_embed_dim=4, scale=SCALES, class_num=10)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return build_model("flowar_tiny", **TINY)


def test_size_is_recognised_from_the_tensors(tiny):
    state = tiny.state_dict()
    assert registry.recognise_size(state, "x") == {"model": "flowar_tiny", "diffloss_d": 3, "diffloss_w": 128}
    assert registry.recognise_geometry(state, "x", 4) == {"class_num": 10, "scales": SCALES, "patch_size": 1}
    assert registry.recognise_geometry(state, "x", 1)["patch_size"] == 2
    with pytest.raises(FlowARError, match="x: tokens have 4 channels, which no patch size makes from the VAE's 3 latent channels"):
        registry.recognise_geometry(state, "x", 3)


@pytest.mark.parametrize("name", ["flowar_small", "flowar_base", "flowar_large", "flowar_huge"])
def test_released_sizes_are_recognised(name):
    with torch.device("meta"):
        state = build_model(name).state_dict()
    state["mask"] = build_model("flowar_tiny").mask  # values matter here, so not on the meta device
    assert registry.recognise_size(state, "x")["model"] == name
    assert registry.recognise_geometry(state, "x", 16) == {"class_num": 1000, "scales": (1, 2, 4, 8, 16), "patch_size": 1}


# ---- by name ---------------------------------------------------------------------------------------------------


def test_a_file_or_a_folder_of_a_run_loads(tmp_path, tiny, monkeypatch):
    other = {name: value.clone() for name, value in tiny.state_dict().items()}
    other["z_proj.bias"] += 1
    torch.save(tiny.state_dict(), tmp_path / "weights.pth")
    content = {"model": other, "model_ema": tiny.state_dict(), "args": {"vae_embed_dim": 4, "vae_stride": 4}}
    torch.save({"model": other}, tmp_path / "checkpoint-000000009.pth")
    torch.save(content, tmp_path / "checkpoint-000000010.pth")  # the last, where there are no links
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    model = load_flowar(f"~/{tmp_path.name}")
    assert model.config == {**tiny.config, "patch_size": 1} and not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), tiny.state_dict().values()))
    with pytest.raises(FlowARError, match="tokens have 4 channels, which no patch size makes from the VAE's 16 latent channels"):
        load_flowar(tmp_path / "weights.pth")  # says nothing of its VAE: taken for KL-16's


@pytest.mark.parametrize("name,what", [("mask", "attention pattern"), ("encoder_blocks.0.attn.rope.freqs", "freqs")])
def test_weights_of_another_method_are_refused(tiny, name, what):
    """Buffers are computed, not loaded: a file that disagrees was trained with other code."""
    state = {key: value.clone() for key, value in tiny.state_dict().items()}
    state[name] = state[name].half()  # of a file that was converted: still the same
    registry.load_model(build_model("flowar_tiny", **TINY), state, "x.pth")
    state[name][..., 0] = 7
    with pytest.raises(FlowARError, match=f"x.pth: {name} differs from the model's: the weights were trained with another {what}"):
        registry.load_model(build_model("flowar_tiny", **TINY), state, "x.pth")


@pytest.mark.parametrize("sees", [lambda k: range(k + 1), lambda k: {0, k}, lambda k: [k]])
def test_scales_are_recognised_whatever_sees_what(sees, monkeypatch):
    monkeypatch.setattr("models.flowar.visible_scales", lambda k: sorted(sees(k)))
    state = small_model(scale=(1, 2, 4, 8), img_size=32).state_dict()
    assert registry.recognise_geometry(state, "x", 4)["scales"] == (1, 2, 4, 8)
