"""Parameter groups, schedule, EMA."""
import math
import re

import pytest
import torch
from helpers import small_model

from models import FlowARError
from util.training.optimization import EMA, build_optimizer, ema_advice, learning_rate, peak_learning_rate

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
    with pytest.raises(FlowARError, match="'step'"):
        learning_rate(1, **SCHEDULE, schedule="step")


def test_weight_decay_on_matrices_and_tables_alone():
    model = small_model()
    groups = build_optimizer(model, 1e-3, 0.02).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in decayed) == (p.ndim >= 2), name
    assert {group["weight_decay"] for group in groups} == {0.0, 0.02}
    assert all(group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8 for group in groups)


def test_ema_starts_from_the_initial_weights():
    model = small_model()
    initial = [p.detach().clone() for p in model.parameters()]
    ema = EMA(model, 0.9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ema.update(model)
    for start, p, averaged in zip(initial, model.parameters(), ema.module.parameters()):
        torch.testing.assert_close(averaged, 0.9 * start + 0.1 * p)
        assert not averaged.requires_grad


def test_ema_is_told_on_the_device_to_skip_a_step():
    model, other = small_model(), small_model(diffloss_d=1)
    ema = EMA(model, 0.9)
    before = [p.clone() for p in ema.module.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    ema.update(model, torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(before, ema.module.parameters()))
    ema.update(model, torch.zeros(()))
    expected = torch._foreach_lerp(before, [p.detach() for p in model.parameters()], 0.1)
    for found, value, untouched, doubled in zip(ema.module.parameters(), expected, other.parameters(), model.parameters()):
        torch.testing.assert_close(found, value)
        assert torch.equal(doubled, 2 * untouched)  # what is averaged stays as it is


def test_the_rate_that_is_advised_suits():
    assert "93% random start" in ema_advice(0.9999, 765) and "--ema_rate 0.993 suits" in ema_advice(0.9999, 765)
    assert ema_advice(0.9999, 50000) is None
    for steps in (1, 2, 59, 307, 765, 12345, 45000):
        rate = float(re.search("--ema_rate (\\S+) suits", ema_advice(0.999999, steps))[1])
        assert 0 <= rate < 1 and ema_advice(rate, steps) is None
