"""Every random draw follows from (seed, step or image), never from what was drawn before.

So a resumed run continues the same stream, the number of processes changes nothing but dropout, and image 4711 is the
same image on 1 GPU or 64.
"""
from typing import NamedTuple

import numpy as np
import torch

TRAINING, DROPOUT, VALIDATION, SAMPLING = range(4)  # streams


def derive_seed(*numbers):
    """A 63-bit seed that depends on all the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Draws(NamedTuple):
    """What one training or validation step draws, for n images."""

    t: torch.Tensor  # (scales, n)
    noise: list  # of (n, s*s, token_channels)
    drop: torch.Tensor  # (n,) bool
    posterior: torch.Tensor  # (n, C, H, W)

    def take(self, images):
        """The draws of a slice of the images."""
        return Draws(self.t[:, images], [e[images] for e in self.noise], self.drop[images], self.posterior[images])

    def to(self, device):
        return Draws(self.t.to(device), [e.to(device) for e in self.noise], self.drop.to(device), self.posterior.to(device))


def draw(model, count, seed, device):
    """Draws for a global batch of `count` images; each rank takes its own slice."""
    generator = torch.Generator(device).manual_seed(seed)
    side = model.scale[-1] * model.patch_size
    return Draws(
        torch.rand(len(model.scale), count, generator=generator, device=device),
        [torch.randn(count, s * s, model.token_channels, generator=generator, device=device) for s in model.scale],
        torch.rand(count, generator=generator, device=device) < model.label_drop_prob,
        torch.randn(count, model.vae_embed_dim, side, side, generator=generator, device=device),
    )


def draw_each(model, seed, stream, indices):
    """Draws of images by their index, on the CPU: they do not depend on what else is in a batch."""
    t, noise, drop, posterior = zip(*(draw(model, 1, derive_seed(seed, stream, index), "cpu") for index in indices))
    return Draws(torch.cat(t, dim=1), [torch.cat(scale) for scale in zip(*noise)], torch.cat(drop), torch.cat(posterior))


def image_noise(model, seed, indices):
    """Starting noise of images by their index: list of (n, s*s, token_channels) on the CPU, coarse to fine."""
    images = []
    for index in indices:
        generator = torch.Generator().manual_seed(derive_seed(seed, SAMPLING, index))
        images.append([torch.randn(s * s, model.token_channels, generator=generator) for s in model.scale])
    return [torch.stack(scale) for scale in zip(*images)]
