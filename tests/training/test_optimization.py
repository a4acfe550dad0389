"""Parameter groups, schedule, EMA."""
import math

import pytest
import torch
from helpers import needs_muon, small_model
from torch import nn

from scripts.posthoc_ema import rebuild_power
from util.training.optimization import PowerEMA, build_optimizer, learning_rate, peak_learning_rate, power_exponent

SCHEDULE = dict(lr=4e-4, min_lr=1e-5, epochs=400, warmup_epochs=100)


def test_schedule_of_the_release():
    assert peak_learning_rate(5e-5, 2048) == pytest.approx(4e-4)
    assert learning_rate(0, **SCHEDULE) == 0
    assert learning_rate(50.5, **SCHEDULE) == pytest.approx(4e-4 * 50.5 / 100)
    assert learning_rate(100, **SCHEDULE) == pytest.approx(4e-4)
    expected = 1e-5 + (4e-4 - 1e-5) / 2 * (1 + math.cos(math.pi * (175 - 100) / 300))
    assert learning_rate(175, **SCHEDULE) == pytest.approx(expected)
    assert learning_rate(400, **SCHEDULE) == pytest.approx(1e-5)
    assert learning_rate(300, **SCHEDULE, schedule="constant") == 4e-4
    rates = [learning_rate(epoch, **SCHEDULE, schedule="linear_end") for epoch in (50, 100, 340, 370, 400)]
    assert rates == pytest.approx([2e-4, 4e-4, 4e-4, 1e-5 + 3.9e-4 / 2, 1e-5])


def test_weight_decay_on_matrices_and_tables_alone():
    model = small_model()
    groups = build_optimizer(model, 1e-3, 0.02).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in decayed) == (p.ndim >= 2), name
    assert {group["weight_decay"] for group in groups} == {0.0, 0.02}
    assert all(group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 and group["fused"] for group in groups)


@needs_muon
def test_muon_trains_the_matrices_of_all_blocks_and_adamw_the_rest():
    model = small_model(cross=True)
    names = {p: name for name, p in model.named_parameters()}
    *others, found = ({names[p] for p in group["params"]} for group in build_optimizer(model, 1e-3, 0.02, "muon").param_groups)
    of_head, expected = "crossattn.q crossattn.kv crossattn.proj ada_lin_attn ada_lin_mlp", set()
    for block, own in (("encoder_blocks.0", "ada_lin.1"), ("decoder_blocks.0", "ada_lin.1"), ("flownet.res_blocks.0", of_head)):
        expected |= {f"{block}.{layer}.weight" for layer in f"attn.qkv attn.proj mlp.fc1_g mlp.fc1_x mlp.fc2 {own}".split()}
    assert found == expected and set.union(*others) == set(names.values()) - expected


@needs_muon
@pytest.mark.parametrize("name,cut", [("attn.proj", 1), ("attn.qkv", 3)])
def test_muons_update_is_that_of_the_method(name, cut):
    """Two steps of one weight, by hand in float64, whole or of queries, keys and values apart; torch's products are bf16."""
    model, rate, decay = small_model(), 0.01, 0.5
    optimizer, weight = build_optimizer(model, 1.0, decay, "muon"), model.decoder_blocks[0].get_submodule(name).weight
    optimizer.param_groups[-1]["lr"] = rate
    before = expected = weight.detach().double()
    momentum = torch.zeros_like(expected)
    for seed in (1, 2):
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
        momentum = 0.95 * momentum + weight.grad
        update = (weight.grad + 0.95 * momentum).unflatten(0, (cut, -1))
        update = update / update.norm(dim=(1, 2), keepdim=True)
        for _ in range(5):
            square = update @ update.mT
            update = 3.4445 * update + (-4.775 * square + 2.0315 * square @ square) @ update
        expected = (1 - rate * decay) * expected - rate * 0.2 * max(update.shape[1:]) ** 0.5 * update.flatten(0, 1)
    assert (weight - expected).norm() < 0.02 * (weight - before).norm()


def walk(widths, steps):
    """A module of 256 numbers that walk at random, and {width: its power average} after each of so many steps."""
    model, generator = nn.Linear(256, 1, bias=False), torch.Generator().manual_seed(0)
    powers = {width: PowerEMA(model, width) for width in widths}
    for step in range(1, steps + 1):
        model.weight.data += torch.randn(1, 256, generator=generator)
        for power in powers.values():
            power.update(model, step)
        yield model.weight.detach().clone(), {width: power.tensors["weight"].clone() for width, power in powers.items()}


def test_a_power_average_weighs_by_a_power_of_the_step():
    assert [round(power_exponent(width), 2) for width in (0.05, 0.10)] == [16.97, 6.94]
    passed = list(walk((0.05, 0.2), 50))
    for n, (_, found) in enumerate(passed, 1):
        for width, average in found.items():
            g = power_exponent(width)
            weights = [(i ** (g + 1) - (i - 1) ** (g + 1)) / n ** (g + 1) for i in range(1, n + 1)]
            assert sum(weights) == pytest.approx(1)
            torch.testing.assert_close(average, sum(w * value for w, (value, _) in zip(weights, passed)), rtol=1e-4, atol=1e-4)


def test_any_other_is_rebuilt():
    """Of 16 snapshots, to less than 0.5 % of how far apart 0.05 and 0.10 are; 0.02 to 5 %, which the profile's error tells before."""
    wanted = (0.04, 0.07, 0.15, 0.02)
    found = {step: averages for step, (_, averages) in enumerate(walk((0.05, 0.10, *wanted), 800), 1) if step % 50 == 0}
    stored = [(step, width) for step in found for width in (0.05, 0.10)]
    errors = {}
    for width in wanted:
        factors, error = rebuild_power(stored, (800, width))
        rebuilt = sum(factor * found[step][stored_width] for factor, (step, stored_width) in zip(factors, stored))
        between = (found[800][0.05] - found[800][0.10]).norm()
        errors[width] = error, ((rebuilt - found[800][width]).norm() / between).item()
        assert sum(factors) == pytest.approx(1)
    assert all(profile < 0.011 and found < 0.005 for profile, found in (errors[width] for width in (0.04, 0.07, 0.15)))
    assert errors[0.02][0] > 0.1 and errors[0.02][1] > 0.02
    assert rebuild_power(stored, (400, 0.10)) == ([float(one == (400, 0.10)) for one in stored], 0.0)
    assert rebuild_power(stored[:8], (200, 0.07))[1] > 3 * errors[0.07][0]
    assert rebuild_power(stored, (900, 0.07))[1] > 0.5  # of steps that no snapshot has seen
