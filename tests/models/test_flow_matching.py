"""Path, time grid, guidance and solver as pure functions."""
import math

import pytest
import torch

from models import FlowARError
from models import flow_matching as fm


def test_path_and_target():
    x, e, t = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([0.0, 1.0])[:, None, None]
    path = fm.interpolate(x, e, t)
    assert torch.equal(path[0], x[0]) and torch.equal(path[1], e[1])
    small = 1e-3
    slope = (fm.interpolate(x, e, t + small) - path) / small
    torch.testing.assert_close(slope, fm.velocity_target(x, e), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("n,steps", [(50, 50), (25, 24), (24, 24), (15, 14), (100, 100), (2, 2), (3, 2)])
def test_time_grid(n, steps):
    grid = fm.time_grid(n)
    assert grid.dtype == torch.float64 and len(grid) == steps + 1
    assert grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()
    if n == 50:
        assert grid[15] == 0.7  # on the grid exactly: guidance 0.7 includes it
    else:
        assert (grid >= 0.3).sum() == n // 2 and (grid <= 0.25).sum() == n // 2 + 1


@pytest.mark.parametrize("n,expected", [(1, [1, 0]), (2, [1, 0.5, 0]), (4, [1, 0.75, 0.5, 0.25, 0])])
def test_uniform_time_grid(n, expected):
    grid = fm.time_grid(n, "uniform")
    assert grid.dtype == torch.float64 and grid.tolist() == expected


def test_what_is_no_time_grid_is_refused():
    with pytest.raises(FlowARError, match="num_steps is 1: the release time grid needs at least 2"):
        fm.time_grid(1)
    with pytest.raises(KeyError):
        fm.time_grid(4, "cosine")


@pytest.mark.parametrize("first,last,expected", [
    (25, 15, [25, 22, 20, 17, 15]), (25, None, [25] * 5), (50, 15, [50, 41, 32, 23, 15])])
def test_steps_of_each_scale(first, last, expected):
    assert fm.scale_steps(first, last, 5) == expected


def test_a_list_has_a_value_for_each_scale():
    assert fm.scale_steps([5, 6, 7, 8], None, 4) == [5, 6, 7, 8]
    assert fm.guidance_weights([1, 2, 4], 3) == fm.guidance_weights((1, 2, 4), 3, "constant") == [1, 2, 4]
    with pytest.raises(FlowARError, match=r"cfg has 2 values \(\[1, 2\]\): expected 3, one per scale"):
        fm.guidance_weights([1, 2], 3)


@pytest.mark.parametrize("text,message", [
    ("normal", "expected one of uniform, logit_normal, shift"), ("shift:2,3", "expected shift:K"), ("uniform:1", "expected uniform$"),
    ("logit_normal:a,b", "expected logit_normal:MEAN,STD"), ("shift:0", "K is 0, expected above 0"),
    ("logit_normal:0,-1", "STD is -1, expected above 0"), ("logit_normal:nan,1", "times range from")])
def test_what_is_no_distribution_of_times_is_refused(text, message):
    with pytest.raises(FlowARError, match=message):
        fm.read_time_distribution(text)


def test_a_distribution_checks_its_own_numbers_and_must_stay_within_0_and_1(monkeypatch):
    """One place to add one; its last number may be negative or 0."""
    monkeypatch.setitem(fm.TIME_DISTRIBUTIONS, "power", lambda u, exponent: u ** math.exp(-exponent))
    monkeypatch.setitem(fm.TIME_DISTRIBUTIONS, "line", lambda u, start, slope: start + slope * u)
    u = torch.rand(9)
    assert torch.equal(fm.read_time_distribution("power:0")(u), u)
    assert torch.equal(fm.read_time_distribution("power:-1")(u), u ** math.exp(1))
    assert torch.equal(fm.read_time_distribution("line:1,-1")(u), 1 - u)
    for text, message in (("line:0.5,1", r"'line:0.5,1': times range from 0.5 to 1.49\d+, expected \[0, 1\]"), ("line:0,-1", "times range"),
                          ("power", "expected power:EXPONENT")):
        with pytest.raises(FlowARError, match=message):
            fm.read_time_distribution(text)


def test_guidance_weights():
    assert fm.guidance_weights(4.3, 5) == pytest.approx([1, 1.825, 2.65, 3.475, 4.3])
    assert fm.guidance_weights(3, 4, "constant") == [3, 3, 3, 3]
    assert fm.guidance_weights(3, 1) == [3]


@pytest.mark.parametrize("low,high,doubled", [(0.0, 0.7, 35), (0.0, 1.0, 50), (0.0, 0.0, 0), (0.3, 0.7, 20)])
def test_guidance_acts_only_inside_its_interval(low, high, doubled):
    """low < t <= high of the 51 times 0, 0.02, ..., 1."""
    calls = []

    def network(x, t):
        calls.append(1)
        return torch.ones_like(x)

    def pair(x, t):
        calls.append(2)
        return torch.ones_like(x), torch.zeros_like(x)

    velocity = fm.guided_velocity(network, pair, 3.0, low, high)
    values = [velocity(torch.zeros(2, 1), round(t, 6))[0].item() for t in fm.time_grid(50).tolist()]
    assert calls.count(2) == doubled == values.count(3.0)
    assert values.count(1.0) == 51 - doubled


def test_euler_is_exact_for_straight_paths():
    x, e = torch.randn(2, 5), torch.randn(2, 5)
    result = fm.euler(lambda state, t: fm.velocity_target(x, e), e, fm.time_grid(10))
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, x.double(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("solver,order", [("euler", 1), ("heun", 2), ("ab2", 2), ("midpoint", 2), ("rk4", 4)])
def test_order_of_the_solvers(solver, order):
    """dx/dt = (1 + t) x on an uneven grid: halving the steps divides the error by 2 ** order."""
    errors = []
    for n in (100, 200):
        grid = torch.linspace(1, 0, n + 1, dtype=torch.float64) ** 2
        x = fm.SOLVERS[solver](lambda state, t: (1 + t) * state, torch.ones(1), grid)
        errors.append(abs(x.item() - math.exp(-1.5)))
    assert 0.85 * 2**order < errors[0] / errors[1] < 1.15 * 2**order


@pytest.mark.parametrize("solver,nfe", [("euler", 24), ("heun", 48), ("ab2", 24), ("midpoint", 48), ("rk4", 96)])
def test_evaluations_are_counted(solver, nfe):
    calls = []
    velocity = fm.guided_velocity(lambda x, t: calls.append(3) or x, lambda x, t: calls.append(6) or (x, x), 2.0, 0.0, 0.28)
    fm.SOLVERS[solver](velocity, torch.zeros(3, 1), fm.time_grid(25))
    assert len(calls) == nfe and set(calls) == {3, 6}
    # 12 steps lie below 0.28; of the one from 0.3 to 0.25, Heun also looks at its end, the midpoint at 0.275, RK4 at all three;
    # at 0, where Heun and RK4 look once, guidance does not act
    late = {"euler": 12, "ab2": 12, "heun": 24, "midpoint": 24 + 1, "rk4": 48 + 2}[solver]
    assert calls.count(6) == late
