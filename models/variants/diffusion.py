"""Diffusion in flow matching's place: cosine schedule, 1000 steps, epsilon prediction, DDIM
and ancestral sampling (arXiv 2102.09672, 2010.02502). t = 1 is noise, as everywhere; the network is the same.
"""
import itertools
import math

import torch

STEPS, OFFSET = 1000, 0.008
LARGEST = 5.0  # of a predicted latent, whose std is about 1: near t = 1 it is a small error of epsilon, enlarged


def signal(t):
    """Factor of the image at time t, a number or a tensor; that of the noise is sqrt(1 - signal^2)."""
    angle = (t + OFFSET) / (1 + OFFSET) * (math.pi / 2)
    cos, start = torch.cos(torch.as_tensor(angle)), math.cos(OFFSET / (1 + OFFSET) * math.pi / 2)
    return (cos / start).clamp(0.0, 1.0)


def interpolate(x, noise, t):
    """x at times t, which broadcast."""
    factor = signal(t)
    return factor * x + (1 - factor.square()).sqrt() * noise


def velocity_target(x, noise):
    """What the network predicts, in the velocity's place: epsilon."""
    return noise


def step_of(t):
    """The time that the network gets for t in [0, 1): of steps 1 to 1000, their middle, as it reads floor(1000 t)."""
    return ((t * STEPS).floor().clamp(max=STEPS - 1) + 1.5) / STEPS


def predict(epsilon, x, t, t_next):
    """(x at t = 0, epsilon that agrees with it, factors of image and noise at t and t_next) of a network's epsilon."""
    a, a_next = (signal(torch.tensor(time, dtype=torch.float64)) for time in (t, t_next))
    s, s_next = ((1 - factor.square()).sqrt() for factor in (a, a_next))
    image = ((x - s * epsilon(x, t).double()) / a.clamp(min=1e-6)).clamp(-LARGEST, LARGEST)
    return image, (x - a * image) / s, (a, s, a_next, s_next)


def ddim(epsilon, x, times, generator=None):
    """Deterministic; epsilon(x, t) is what flow_matching's solvers call velocity."""
    x = x.double()
    for t, t_next in itertools.pairwise(times.tolist()):
        image, noise, (_, _, a_next, s_next) = predict(epsilon, x, t, t_next)
        x = a_next * image + s_next * noise
    return x


def ancestral(epsilon, x, times, generator=None):
    """DDPM's: noise of the posterior's variance is drawn at every step but the last."""
    x = x.double()
    device = (generator or x).device
    for t, t_next in itertools.pairwise(times.tolist()):
        image, noise, (a, s, a_next, s_next) = predict(epsilon, x, t, t_next)
        variance = (s_next / s).square() * (1 - (a / a_next).square())
        fresh = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
        x = a_next * image + (s_next.square() - variance).clamp(min=0).sqrt() * noise + variance.sqrt() * fresh
    return x


SOLVERS = {"euler": ddim, "ancestral": ancestral}
