"""Steps of each scale from the path itself: for a number of evaluations, the list that --num_step takes.

    python scripts/studies/step_plan.py --resume output/quickstart/run --cfg 3 --guidance 1 --evaluations 36,18,9

Along paths of --reference uniform steps, with the guidance of the options, an Euler and a Heun step differ by
h^2 / 2 |dv/dt|, the local error of a step h: it says how straight the paths of a scale are. The errors of its steps add
up; `gain` is what an error of a scale's latent becomes in the last one, measured by drawing the finer scales again
from a latent that is off. Of all lists with as many evaluations in all, the one is printed whose predicted error, of
Euler's method, is the smallest.
"""
import math
from dataclasses import dataclass
from unittest import mock

import torch

from models import FlowARError
from models import flow_matching as fm
from models.settings import as_text, number, setting
from util.cluster import run_main, select_device
from util.command_line import POSITIVE, list_of, parse_options
from util.evaluation.labels import image_label
from util.evaluation.pipeline import change_settings, open_pipeline
from util.options import SamplingOptions

OFF = 8  # Euler steps of the latents that are off, for gain
MOST = 256  # length of a scale's time grid


@dataclass
class PlanOptions(SamplingOptions):
    """plan"""
    evaluations: tuple = setting((36,), "Euler steps of all scales together; several: a list for each",
                                 list_of(POSITIVE))
    reference: int = setting(200, "uniform steps of the paths that are measured", number(int, 2))
    images: int = setting(64, "paths, of classes spread over all", POSITIVE)


def integrate(velocity, x, times):
    """(x at the end, |dv/dt| at every step): root mean squares over paths and tokens along Euler steps."""
    rates = []
    for t, t_next in zip(times, times[1:]):
        step, v = t_next - t, velocity(x, t).double()
        later = velocity(x + step * v, t_next).double() if t_next > 0 else v  # Heun's second slope; the last has none
        rates.append(((later - v) / step).square().mean().sqrt().item())
        x = x + step * v
    rates[-1] = rates[-2]
    return x, torch.tensor(rates, dtype=torch.float64)


def straightness(sampler, labels, noise, steps):
    """(pyramid of the reference, |dv/dt| of each scale at the reference's steps)."""
    rates, times = [], fm.time_grid(steps, "uniform").tolist()

    def solver(velocity, x, _, generator=None):
        x, rate = integrate(velocity, x.double(), times)
        rates.append(rate)
        return x

    with mock.patch.dict(fm.SOLVERS, euler=solver):
        return change_settings(sampler, {"solver": "euler"}).pyramid(labels, noise), rates


def euler_error(rate, grid):
    """Sum over the steps of a time grid of the integral of (t - end of the step) |dv/dt|: h^2 / 2 |dv/dt| where that is
    constant. rate: of uniform steps from 1 on.
    """
    t = 1 - (torch.arange(len(rate), dtype=torch.float64) + 0.5) / len(rate)
    ends = grid[torch.searchsorted(-grid, -t)]
    return ((t - ends) * rate).mean().item()


def gains(sampler, labels, noise, pyramid):
    """What an error of each scale's latent becomes in the last one's: a ratio of root mean squares, 1 for the last."""
    euler, ratios = {"time_grid": "uniform", "solver": "euler"}, []
    reference = change_settings(sampler, {**euler, "num_steps": 3 * OFF})
    few = change_settings(sampler, {**euler, "num_steps": OFF})
    for k in range(len(pyramid) - 1):
        off = few.pyramid(labels, noise, given=pyramid[:k])[k]
        ends = [reference.pyramid(labels, noise, given=[*pyramid[:k], latent])[-1] for latent in (pyramid[k], off)]
        ratios.append(rms_difference(*ends) / max(rms_difference(pyramid[k], off), 1e-12))
    return [*ratios, 1.0]


def rms_difference(a, b):
    return (a.double() - b.double()).square().mean().sqrt().item()


def plan(errors, evaluations):
    """(num_step of each scale, predicted error) of the smallest root sum of squares with as many evaluations in all, or
    fewer if none has as many. errors: for each scale {length of its time grid: (evaluations, error)}.
    """
    best = {0: (0.0, ())}
    for options in errors:
        reached = {}
        for used, (total, chosen) in best.items():
            for n, (cost, error) in options.items():
                key, value = used + cost, (total + error * error, (*chosen, n))
                if key <= evaluations and (key not in reached or value < reached[key]):
                    reached[key] = value
        best = reached
    if not best:
        raise FlowARError(f"--evaluations {evaluations}: too few for {len(errors)} scales, each needs at least "
                          f"{min(cost for cost, _ in errors[0].values())}")
    total, chosen = best[max(best)]
    return chosen, math.sqrt(total)


def main():
    args = parse_options(PlanOptions, description=__doc__.splitlines()[0])
    device = select_device(args.device)
    sampler = open_pipeline(args, device).sampler
    classes, scales = sampler.model.class_num, sampler.model.scale
    labels = [image_label(i, args.images, classes) for i in range(args.images)]
    kind, noise = sampler.sampling.time_grid, sampler.noise(range(args.images))
    grids = {n: fm.time_grid(n, kind) for n in range(fm.TIME_GRIDS[kind], MOST + 1)
             if kind == "uniform" or n % 2 or n == fm.UNIFORM_STEPS}
    pyramid, rates = straightness(sampler, labels, noise, args.reference)
    factors = gains(sampler, labels, noise, pyramid)
    errors = [{n: (len(grid) - 1, gain * euler_error(rate, grid)) for n, grid in grids.items()}
              for rate, gain in zip(rates, factors)]
    print("| scale | mean abs dv/dt | at noise, middle, data | gain |\n|---|---|---|---|")
    for s, rate, gain in zip(scales, rates, factors):
        parts = ", ".join(f"{part.mean().item():.2f}" for part in rate.chunk(3))
        print(f"| {s} | {rate.mean().item():.2f} | {parts} | {gain:.2f} |")
    print(f"\nTime grid: {kind}.\n\n| evaluations | --num_step | predicted error | evenly |\n|---|---|---|---|")
    for evaluations in args.evaluations:
        chosen, error = plan(errors, evaluations)
        even, used = 0.0, 0
        for options, n in zip(errors, chosen):
            used += options[n][0]
            even += min(options.values(), key=lambda option: abs(option[0] - evaluations / len(scales)))[1] ** 2
        print(f"| {used} | {as_text(chosen)} | {error:.4f} | {math.sqrt(even):.4f} |")


if __name__ == "__main__":
    run_main(main)
