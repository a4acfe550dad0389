"""Seeds: what is drawn follows from (seed, step or image) alone, and is drawn where the loss is."""
import pickle

import golden
import numpy as np
import pytest
import torch
from helpers import make_project, read_log, small_model, train

from models import build_model
from models.flowar import Draws, FlowAR
from util.training.randomness import SAMPLING, TRAINING, VALIDATION, derive_seed, draw, draw_each, image_noise

CPU = torch.device("cpu")


def recorded():
    with np.load(golden.GOLDENS / "draws.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def assert_drawn(found, expected, prefix):
    assert torch.equal(found.draws.t, expected[f"{prefix}_t"]) and torch.equal(found.posterior, expected[f"{prefix}_posterior"])
    assert all(torch.equal(e, expected[f"{prefix}_noise{k}"]) for k, e in enumerate(found.draws.noise))


def test_the_streams_are_those_of_earlier_versions():
    """So a checkpoint of an earlier version goes on with the very draws it would have had, but for validation, which always has seed 0's."""
    model, expected = small_model(), recorded()
    for step in (0, 7):
        found = draw(model, 4, derive_seed(5, TRAINING, step), CPU)
        assert_drawn(found, expected, f"train{step}")
        assert torch.equal(found.draws.drop, expected[f"train{step}_drop"])
    assert_drawn(draw_each(model, 5, VALIDATION, [3, 10]), expected, "val")
    assert all(torch.equal(e, expected[f"sample_noise{k}"]) for k, e in enumerate(image_noise(model, 5, [0, 4711])))


@pytest.mark.parametrize("t_dist", ["uniform", "logit_normal:0,1"])
def test_initial_weights_are_those_of_earlier_versions(t_dist):
    """All that building draws is the weights, in their order."""
    torch.manual_seed(0)
    model = build_model("flowar_tiny", img_size=16, vae_stride=4, vae_embed_dim=4, class_num=10, scale=(1, 2, 4), t_dist=t_dist)
    found = [model.z_proj.weight.double().sum().item(), model.flownet.final_layer.linear.weight.double().sum().item(), torch.rand(1).item()]
    pickle.dumps(model)
    assert found == pytest.approx([-1.2093054710421711, 3.2086148087255424, 0.86063152551651], rel=1e-6)


def test_seeds_differ_by_every_number():
    seeds = {derive_seed(seed, stream, step) for seed in range(3) for stream in (TRAINING, VALIDATION, SAMPLING) for step in range(50)}
    assert len(seeds) == 450 and all(0 <= seed < 2**63 for seed in seeds)


def test_an_image_draws_the_same_in_any_company():
    model = small_model()
    together, alone = draw_each(model, 1, VALIDATION, [4, 5, 6]), draw_each(model, 1, VALIDATION, [5])
    assert torch.equal(together.take(slice(1, 2)).posterior, alone.posterior)
    assert all(torch.equal(a, b) for a, b in zip(together.take(slice(1, 2)).draws.noise, alone.draws.noise))
    assert all(torch.equal(a[1:], b) for a, b in zip(image_noise(model, 1, [4, 5]), image_noise(model, 1, [5])))


def test_draws_are_distributed_as_the_method_says():
    model = small_model(label_drop_prob=0.3)
    t, noise, drop, condition_noise = model.draw(20000, torch.Generator().manual_seed(0))
    assert t.shape == (3, 20000) and 0 <= t.min() and t.max() < 1 and abs(t.mean() - 0.5) < 0.01 and abs(t.var() - 1 / 12) < 0.01
    assert not torch.equal(t[0], t[1])  # each scale has a time of its own
    assert [tuple(e.shape) for e in noise] == [(20000, s * s, 4) for s in model.scale]
    assert all(abs(e.mean()) < 0.02 and abs(e.var() - 1) < 0.03 for e in noise) and abs(drop.float().mean() - 0.3) < 0.01
    assert condition_noise == ()


def test_training_times_and_noise_on_what_is_read_are_drawn_after_all_else_and_not_in_validation():
    model, plain = (small_model(**options).train() for options in ({"t_dist": ("uniform", "shift:3", "logit_normal:0,1"), "condition_noise": 0.5}, {}))
    found, expected = (network.draw(20000, torch.Generator().manual_seed(0)) for network in (model, plain))
    assert torch.equal(found.t[0], expected.t[0]) and torch.equal(found.drop, expected.drop) and all(map(torch.equal, found.noise, expected.noise))
    torch.testing.assert_close(found.t[1], 3 * expected.t[1] / (1 + 2 * expected.t[1]))
    logits = found.t[2].logit()
    assert abs(logits.mean()) < 0.03 and abs(logits.std() - 1) < 0.03
    assert [e.shape for e in found.condition_noise] == [e.shape for e in found.noise[:-1]]
    std = found.condition_noise[1].flatten(1).square().mean(dim=1).sqrt()  # uniform up to 0.5: an image, not a scale
    assert abs(std.mean() - 0.25) < 0.02 and torch.corrcoef(torch.stack([std, found.condition_noise[0].flatten(1).abs().mean(dim=1)]))[0, 1] > 0.5
    mine = draw(model, 6, 1, "cpu").take(slice(1, 6, 2)).draws
    assert torch.equal(mine.condition_noise[0], draw(model, 6, 1, "cpu").draws.condition_noise[0][1::2])
    for drawn in (model.eval().draw(4, torch.Generator().manual_seed(0)), draw_each(model, 1, VALIDATION, [4, 5]).draws):
        assert drawn.condition_noise == ()
    assert torch.equal(model.draw(4, torch.Generator().manual_seed(0)).t, plain.draw(4, torch.Generator().manual_seed(0)).t)


def test_training_and_validation_draw_in_flowar_draw_and_nowhere_else(tmp_path, monkeypatch):
    """With all times at 0 the network sees the data itself: its error is that of guessing the noise, whatever else is drawn."""
    project, original = make_project(tmp_path), FlowAR.draw
    options = "--epochs 1 --attn_dropout 0 --proj_dropout 0 --log_freq 1"
    train(project, tmp_path / "plain", options)
    seen = []

    def at_zero(self, batch, generator=None):
        draws = original(self, batch, generator)
        seen.append(batch)
        return Draws(torch.zeros_like(draws.t), draws.noise, draws.drop)

    monkeypatch.setattr(FlowAR, "draw", at_zero)
    train(project, tmp_path / "zero", options)
    assert seen.count(16) == 5 and seen.count(1) == 2 * 20  # every step; every image of val/ for raw and EMA weights
    losses = [[line["loss"] for line in read_log(tmp_path / name) if line["group"] in ("train", "val", "val_ema")] for name in ("plain", "zero")]
    assert all(a != b for a, b in zip(*losses))
