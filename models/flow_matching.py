"""Flow matching and its sampler as pure functions: path, target, time grid, guidance, solvers.

Time runs from t = 1 (noise) to t = 0 (data), as in the released model; the paper has it the other way round.
Nothing here knows a network, a device or a file. Times of training are drawn in FlowAR.draw.
"""
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


def time_grid(num_steps, kind="release"):
    """Times from 1 to 0 in float64, one more than there are Euler steps: uniform, or the release's, which for 50 is so
    too, and for any other n puts floor(n/2) points on [1, 0.3] and floor(n/2) + 1 on [0.25, 0]: "25" makes 24 steps.
    """
    if kind not in TIME_GRIDS:
        raise FlowARError(f"time_grid is {kind!r}: expected one of {', '.join(TIME_GRIDS)}")
    if num_steps < TIME_GRIDS[kind]:
        raise FlowARError(f"num_steps is {num_steps}: the {kind} time grid needs at least {TIME_GRIDS[kind]}")
    if kind == "uniform" or num_steps == UNIFORM_STEPS:
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    half = num_steps // 2
    early = torch.linspace(1, 0.3, half, dtype=torch.float64)
    late = torch.linspace(0.25, 0, half + 1, dtype=torch.float64)
    return torch.cat((early, late))


def annealed_steps(num_steps, num_steps_last, num_scales):
    """num_steps of each scale's time_grid, linear from num_steps to num_steps_last (DiSA, arXiv 2505.20297)."""
    if num_steps_last is None or num_scales == 1:
        return [num_steps] * num_scales
    last = num_scales - 1
    return [int((num_steps - num_steps_last) * (last - k) / last + num_steps_last) for k in range(num_scales)]


def guidance_scales(cfg, num_scales, schedule="linear"):
    """Classifier-free guidance scale of each scale: a ramp from 1 to cfg, or cfg everywhere."""
    if schedule not in CFG_SCHEDULES:
        raise FlowARError(f"cfg_schedule is {schedule!r}: expected one of {', '.join(CFG_SCHEDULES)}")
    if not cfg >= 1:
        raise FlowARError(f"cfg is {cfg}: expected 1 (no guidance) or more")
    if schedule == "constant" or num_scales == 1:
        return [float(cfg)] * num_scales
    return [1 + (cfg - 1) * k / (num_scales - 1) for k in range(num_scales)]


def guided_velocity(network, condition, both, weight, interval):
    """A velocity(x, t) that applies classifier-free guidance where t <= interval, and only there.

    network(x, t, condition) -> velocity. `both` is the condition of the images and then of their null branch, which is
    evaluated at the class branch's x. With weight <= 1 or without `both` the class branch alone decides.
    """

    def velocity(x, t):
        if both is None or weight <= 1 or t > interval:
            return network(x, t, condition)
        v, v_null = network(torch.cat((x, x)), t, both).chunk(2)
        return v_null + weight * (v - v_null)

    return velocity


def keep_known(velocity, x_known, noise, known):
    """A velocity(x, t) that holds known cells, (B or 1, N, 1) bool, on the straight path from their noise to x_known:
    the network reads them there at every t, and every solver follows it.
    """

    def held(x, t):
        v = velocity(torch.where(known, interpolate(x_known, noise, t), x), t)
        return torch.where(known, velocity_target(x_known, noise), v)

    return held


# ---- solvers -------------------------------------------------------------------------------------------------
# Each integrates dx/dt = velocity(x, t) along `times` (n + 1,) float64 and returns the last x. velocity takes any t, a
# float; the state is float64 whatever the network computes in; a solver that draws uses `generator`.


def euler(velocity, x, times, generator=None):
    """First order, one evaluation a step: the release's solver."""
    x = x.double()
    for t, t_next in itertools.pairwise(times.tolist()):
        x = x + (t_next - t) * velocity(x, t).double()
    return x


def heun(velocity, x, times, generator=None):
    """Second order, two evaluations a step: the mean of the slopes at both ends."""
    x = x.double()
    for t, t_next in itertools.pairwise(times.tolist()):
        v = velocity(x, t).double()
        v_next = velocity(x + (t_next - t) * v, t_next).double()
        x = x + (t_next - t) * (v + v_next) / 2
    return x


def midpoint(velocity, x, times, generator=None):
    """Second order, two evaluations a step: the slope halfway."""
    x = x.double()
    for t, t_next in itertools.pairwise(times.tolist()):
        half = (t_next - t) / 2
        x = x + 2 * half * velocity(x + half * velocity(x, t).double(), t + half).double()
    return x


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


SOLVERS = {"euler": euler, "heun": heun, "ab2": adams_bashforth2, "midpoint": midpoint, "rk4": rk4}
