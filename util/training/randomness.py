"""Seeds: every random draw follows from (seed, step or image), never from what was drawn before.

So a resumed run continues the same stream, the number of processes changes nothing but dropout, and image 4711 is the
same image on 1 GPU or 64. What is drawn is the method's: FlowAR.draw, FlowAR.draw_noise.
"""
from typing import NamedTuple

import numpy as np
import torch

from models.flowar import Draws
from util.cluster import rank

TRAINING, DROPOUT, VALIDATION, SAMPLING = range(4)  # streams


def derive_seed(*numbers):
    """A 63-bit seed that depends on all the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_dropout(seed, step):
    """Dropout draws from PyTorch's own generator: the one stream that depends on the rank."""
    torch.manual_seed(derive_seed(seed, DROPOUT, step, rank()))


class BatchDraws(NamedTuple):
    """What a batch of n images draws: of the method, and of the VAE's posterior."""

    draws: Draws
    posterior: torch.Tensor  # (n, C, H, W) normal

    def take(self, images):
        """Those of a slice of the images."""
        return BatchDraws(self.draws.take(images), self.posterior[images])


def draw(model, count, seed, device):
    """BatchDraws of a global batch of `count` images; each rank takes its own slice."""
    generator = torch.Generator(device).manual_seed(seed)
    draws, side = model.draw(count, generator), model.scale[-1] * model.patch_size
    return BatchDraws(draws, torch.randn(count, model.vae_embed_dim, side, side, generator=generator, device=device))


def draw_each(model, seed, stream, indices, device="cpu"):
    """BatchDraws of images by their index, drawn on the CPU: they do not depend on what else is in a batch. model: in
    eval mode, which draws no condition_noise.
    """
    parts = [draw(model, 1, derive_seed(seed, stream, index), "cpu") for index in indices]
    t, noise, drop, _ = zip(*(part.draws for part in parts))
    noise = [torch.cat(scale).to(device) for scale in zip(*noise)]
    draws = Draws(torch.cat(t, dim=1).to(device), noise, torch.cat(drop).to(device))
    return BatchDraws(draws, torch.cat([part.posterior for part in parts]).to(device))


def image_noise(model, seed, indices):
    """Starting noise of images by their index: list of (n, s*s, token_channels) on the CPU, coarse to fine."""
    generators = (torch.Generator().manual_seed(derive_seed(seed, SAMPLING, index)) for index in indices)
    return [torch.cat(scale) for scale in zip(*(model.draw_noise(1, generator) for generator in generators))]
