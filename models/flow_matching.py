"""Flow matching and its sampler as pure functions: interpolation, target, times, guidance, solvers.

Time runs from t = 1 (noise) to t = 0 (data), as in the released model; the paper has it the other way round.
Nothing here knows a network, a device or a file.
"""
import functools
import inspect
import itertools

import torch

from models.errors import FlowARError

UNIFORM_STEPS = 50  # the one step count that the release integrates on a uniform grid
TIME_GRIDS = {"release": 2, "uniform": 1}  # the fewest steps of each
CFG_SCHEDULES = ("linear", "constant")


def interpolate(x, noise, t):
    """x_t = (1 - t) x + t e. x, noise: B N C; t: broadcastable to them."""
    return (1 - t) * x + t * noise


def velocity_target(x, noise):
    """dx_t / dt = e - x."""
    return noise - x


# ---- times of training: each function maps u, uniform in [0, 1), to times ---------------------------------------


def uniform(u):
    return u


def logit_normal(u, mean, std):
    """sigmoid(mean + std n), n normal; a mean above 0 spends more on noise."""
    if std <= 0:
        raise FlowARError(f"logit_normal: STD is {std:g}, expected above 0")
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def shift(u, k):
    """k u / (1 + (k - 1) u); k > 1 spends more on noise."""
    if k <= 0:
        raise FlowARError(f"shift: K is {k:g}, expected above 0")
    return k * u / (1 + (k - 1) * u)


TIME_DISTRIBUTIONS = {"uniform": uniform, "logit_normal": logit_normal, "shift": shift}


def read_time_distribution(text):
    """The function u -> t of "uniform", "logit_normal:MEAN,STD", "shift:K", ... FlowARError for another text, and for
    numbers that give times outside of [0, 1].
    """
    name, _, numbers = text.partition(":")
    if name not in TIME_DISTRIBUTIONS:
        raise FlowARError(f"t_dist is {text!r}: expected one of {', '.join(TIME_DISTRIBUTIONS)}")
    function = TIME_DISTRIBUTIONS[name]
    parameters = [*inspect.signature(function).parameters][1:]
    values = numbers.split(",") if numbers else []
    try:
        distribution = functools.partial(function, **dict(zip(parameters, map(float, values), strict=True)))
    except ValueError:
        usage = f"{name}:{','.join(parameters).upper()}".removesuffix(":")
        raise FlowARError(f"t_dist is {text!r}: expected {usage}") from None
    times = distribution(torch.linspace(0, 1, 1025, device="cpu")[:-1])
    if not ((times >= 0) & (times <= 1)).all():
        raise FlowARError(f"t_dist is {text!r}: times range from {times.min():g} to {times.max():g}, expected [0, 1]")
    return distribution


# ---- times and guidance of sampling ------------------------------------------------------------------------------


def time_grid(num_steps, kind="release"):
    """Times from 1 to 0 in float64, one more than there are Euler steps: uniform, or the release's, which for 50 is so
    too, and for any other n puts floor(n/2) points on [1, 0.3] and floor(n/2) + 1 on [0.25, 0]: "25" makes 24 steps.
    """
    if num_steps < TIME_GRIDS[kind]:
        raise FlowARError(f"num_steps is {num_steps}: the {kind} time grid needs at least {TIME_GRIDS[kind]}")
    if kind == "uniform" or num_steps == UNIFORM_STEPS:
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    half = num_steps // 2
    early = torch.linspace(1, 0.3, half, dtype=torch.float64)
    late = torch.linspace(0.25, 0, half + 1, dtype=torch.float64)
    return torch.cat((early, late))


def scale_steps(num_steps, num_steps_last, num_scales):
    """num_steps of each scale's time_grid: a list as it is, else one number for all, or in a straight line from
    num_steps at the first to num_steps_last at the last scale (DiSA, arXiv 2505.20297).
    """
    if num_steps_last is None or num_scales == 1:
        return of_each_scale("num_steps", num_steps, num_scales)
    steps, last = [], num_scales - 1
    for k in range(num_scales):
        steps.append(int((num_steps - num_steps_last) * ((last - k) / last) + num_steps_last))
    return steps


def guidance_weights(cfg, num_scales, schedule="linear"):
    """The guidance weight w of each scale: a list as it is, else a ramp from 1 to cfg, or cfg everywhere."""
    if schedule == "constant" or num_scales == 1 or isinstance(cfg, (list, tuple)):
        return of_each_scale("cfg", cfg, num_scales)
    return [1 + (cfg - 1) * k / (num_scales - 1) for k in range(num_scales)]


def of_each_scale(name, values, num_scales):
    """A list with a value for each scale, of one for all or of such a list; FlowARError for one of another length."""
    if not isinstance(values, (list, tuple)):
        return [values] * num_scales
    if len(values) != num_scales:
        raise FlowARError(f"{name} has {len(values)} values ({values}): expected {num_scales}, one per scale")
    return list(values)


def guided_velocity(network, pair, weight, low, high):
    """velocity(x, t) = v_other + weight (v - v_other) where low < t <= high, and v = network(x, t) elsewhere.

    pair(x, t) -> (v, v_other): v_other is of the null class (classifier-free guidance), or of a weaker network
    (autoguidance, arXiv 2406.02507), at the same x. With weight <= 1 v everywhere.
    """

    def velocity(x, t):
        if weight <= 1 or not low < t <= high:
            return network(x, t)
        v, v_other = pair(x, t)
        return v_other + weight * (v - v_other)

    return velocity


def keep_cells(velocity, x_known, noise, cells):
    """A velocity(x, t) that keeps known cells, (B or 1, N, 1) bool, on the straight line from their noise to x_known:
    the network reads them there at every t, and every solver follows it.
    """

    def velocity_of_the_others(x, t):
        v = velocity(torch.where(cells, interpolate(x_known, noise, t), x), t)
        return torch.where(cells, velocity_target(x_known, noise), v)

    return velocity_of_the_others


# ---- solvers -------------------------------------------------------------------------------------------------
# Each integrates dx/dt = velocity(x, t) along `times` (n + 1,) float64 and returns the last x. velocity takes any t, a
# float; the state is float64 whatever the network computes in; a solver that draws uses `generator`.


def euler(velocity, x, times, generator=None):
    """First order, one evaluation a step: the release's solver."""
    x = x.double()
    for t, t_next in itertools.pairwise(times.tolist()):
        x = x + (t_next - t) * velocity(x, t).double()
    return x


def second_order(part):
    """Two evaluations a step: the slope here and after `part` of a step; 1 is Heun's method, 1/2 the midpoint's."""

    def solver(velocity, x, times, generator=None):
        x = x.double()
        for t, t_next in itertools.pairwise(times.tolist()):
            step, v = t_next - t, velocity(x, t).double()
            later = velocity(x + part * step * v, t + part * step if part < 1 else t_next).double()
            x = x + step * (v + (later - v) / (2 * part))
        return x

    return solver


def rk4(velocity, x, times, generator=None):
    """Fourth order, four evaluations a step: the classical Runge-Kutta method."""
    x = x.double()
    for t, t_next in itertools.pairwise(times.tolist()):
        half = (t_next - t) / 2
        v1 = velocity(x, t).double()
        v2 = velocity(x + half * v1, t + half).double()
        v3 = velocity(x + half * v2, t + half).double()
        v4 = velocity(x + 2 * half * v3, t_next).double()
        x = x + half / 3 * (v1 + 2 * v2 + 2 * v3 + v4)
    return x


def adams_bashforth2(velocity, x, times, generator=None):
    """Second order, one evaluation a step: the slope extrapolated from the last two. The first step is Euler's."""
    x, last, last_step = x.double(), None, 0.0
    for t, t_next in itertools.pairwise(times.tolist()):
        step, v = t_next - t, velocity(x, t).double()
        slope = v if last is None else v + step / (2 * last_step) * (v - last)
        x = x + step * slope
        last, last_step = v, step
    return x


SOLVERS = {"euler": euler, "heun": second_order(1), "ab2": adams_bashforth2, "midpoint": second_order(0.5), "rk4": rk4}
