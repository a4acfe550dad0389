"""Images of a model: an image's label and index, with the seed, decide it, not the batch or process that makes it."""
import math
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from models import flow_matching as fm
from models.errors import FlowARError, name_some
from models.settings import Sampling
from util.cluster import autocast, is_main
from util.data import to_uint8
from util.evaluation.extractors import extract
from util.evaluation.labels import image_label
from util.evaluation.reports import Stopwatch
from util.evaluation.store import write_pngs
from util.training.randomness import image_noise

GRID_IMAGES = 16
DECODED_AT_ONCE = 32  # images of 256 pixels, about 5 GiB in KL-16 in float32; of larger ones fewer


def decoded_at_once(pixels):
    """Images of so many pixels that a VAE takes at once: not by what memory is free, on which no image is to depend."""
    return max(1, min(DECODED_AT_ONCE, DECODED_AT_ONCE * 256**2 // pixels))


def count_passes(model, sampling):
    """For each scale a list of the evaluations of the flow head (their number is its NFE): how many passes an image
    takes in each, 2 where guidance acts, else 1. Solvers ask for the same times whatever the velocity is.
    """
    solver, times, weights = model.schedule_sampling(sampling)
    passes = []

    def unguided(x, t):
        passes[-1].append(1)
        return x

    def guided(x, t):
        passes[-1].append(2)
        return x, x

    for grid, weight in zip(times, weights):
        passes.append([])
        velocity = fm.guided_velocity(unguided, guided, weight, sampling.guidance_low, sampling.guidance)
        solver(velocity, torch.zeros(1), grid, torch.Generator())
    return passes


class Sampler(NamedTuple):
    """Makes images with a model and a VAE, which lie on one device."""
    model: torch.nn.Module
    vae: torch.nn.Module
    sampling: Sampling
    precision: str
    seed: int
    batch: int  # images at once
    name: str = "the EMA"  # of the model, for messages
    guide: torch.nn.Module | None = None  # see FlowAR.sample_pyramid

    @property
    def device(self):
        return self.model.z_proj.weight.device

    @property
    def vae_precision(self):
        """On a CPU a VAE takes 1.7 times as long in bf16 (docs/measurements.md)."""
        return "fp32" if self.device.type == "cpu" else self.precision

    def noise(self, indices):
        """Starting noise of images by their index, see FlowAR.draw_noise."""
        return image_noise(self.model, self.seed, indices)

    @torch.no_grad()
    def pyramid(self, labels, noise, **fixed):
        """Latents of every scale for a list of labels and noise(indices). fixed: `given` and `known` of
        FlowAR.sample_pyramid.
        """
        labels = torch.tensor(labels, device=self.device)
        with autocast(self.device, self.precision):
            return self.model.sample_pyramid(labels, noise=noise, guide=self.guide, **fixed, **vars(self.sampling))

    def latents(self, labels, indices):
        """Scaled latents (n, C, h, w) of images: a list of their labels, and their indices."""
        return self.model.unpatchify(self.pyramid(labels, self.noise(indices))[-1])

    @torch.no_grad()
    def decode(self, latents):
        """(images (n, 3, H, W) uint8 on the device, finite (n,) bool) of scaled latents (n, C, h, w)."""
        images, finite = [], []
        with autocast(self.device, self.vae_precision):
            for part in latents.split(decoded_at_once(self.model.img_size**2)):
                pixels = self.vae.decode(self.vae.latent_scale.restore(part))
                images.append(to_uint8(pixels))
                finite.append(pixels.isfinite().flatten(1).all(dim=1))
        return torch.cat(images), torch.cat(finite)

    def images(self, labels, first=0):
        """(n, 3, H, W) uint8 on the CPU of labels in order, with indices from `first` on; FlowARError if not finite."""
        images, bad = [], []
        for start in range(0, len(labels), self.batch):
            some, index = labels[start:start + self.batch], first + start
            pixels, finite = self.decode(self.latents(some, range(index, index + len(some))))
            images.append(pixels.cpu())
            bad += (index + (~finite).nonzero().flatten()).tolist()
        self.refuse_not_finite(bad, len(labels))
        return torch.cat(images)

    def grid(self, classes):
        """(3, H, W) uint8: a grid of images of classes spread over all of an array of labels."""
        from torchvision.utils import make_grid  # heavy: not for those who draw none
        labels = classes[image_label(np.arange(GRID_IMAGES), GRID_IMAGES, len(classes))].tolist()
        return make_grid(self.images(labels), nrow=math.isqrt(GRID_IMAGES), padding=1)

    def refuse_not_finite(self, bad, count):
        """FlowARError that names images whose pixels are not finite, if there are any."""
        if bad:
            raise FlowARError(f"{len(bad)} of {count} images are not finite: {name_some(map(str, sorted(bad)), 8)}; "
                              f"the weights of {self.name} are damaged, or --precision {self.precision} overflows")

    def settings(self):
        """What a reader needs to make the images again."""
        scales = self.model.scale
        return {"class_num": self.model.class_num, "img_size": self.model.img_size, "scales": scales,
                **self.sampling.by_option(), "steps": [len(times) - 1 for times in self.sampling.times(len(scales))],
                "precision": self.precision, "seed": self.seed, "eval_bsz": self.batch}


# ---- an evaluation's batches -----------------------------------------------------------------------------------


def sample_and_measure(sampler, plan, extractor, batches, store):
    """{batch number: what measure_batch returns} of {batch number: range of the indices of its images}.

    On CUDA a batch is decoded, measured and written while the next one is sampled.
    """
    measuring, before = {}, None
    progress = tqdm(total=sum(map(len, batches.values())), desc="sampling (rank 0)", unit="img", disable=not is_main(),
                    mininterval=2)
    with open_executor(sampler.device) as executor, progress:
        for number, indices in batches.items():
            watch = Stopwatch(sampler.device)
            with watch("sampling"):
                latents = sampler.latents(plan.labels.of(indices), indices)
            if before is not None:
                before.result()
            before = executor.submit(measure_batch, sampler, plan, extractor, store, number, indices, latents, watch)
            measuring[number] = before
            progress.update(len(indices))
        return {number: future.result() for number, future in measuring.items()}


def measure_batch(sampler, plan, extractor, store, number, indices, latents, watch):
    """{what the extractor has, bad: indices of images that are not finite, seconds of each stage} of scaled latents;
    the store keeps them and the images, as the plan wants it.
    """
    with watch("decoding"):
        images, finite = sampler.decode(latents)
    with watch("features"):
        measured = extract(extractor, images)
    bad = indices.start + (~finite).nonzero().flatten().cpu()
    if plan.persistent and len(bad) == len(images):  # those of the other batches will be, too
        sampler.refuse_not_finite(bad.tolist(), plan.num_images)
    measured |= {"bad": bad, "seconds": watch.seconds}
    with watch("writing"):
        images = images.permute(0, 2, 3, 1).contiguous().cpu()
        if plan.save_images:
            write_pngs(images.numpy(), store.folder, indices)
        if plan.persistent:
            store.save(number, {**measured, "images": images} if plan.save_npz else measured)
    return measured


class AtOnce(Executor):
    """Calls what is submitted there and then."""

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


def open_executor(device):
    """An Executor for what is done while the next batch is sampled: on CUDA a thread with its own stream. A Stopwatch's
    stage ends when the device is done, so each stream finds what the other one made. A CPU's cores are busy anyway.
    """
    if device.type != "cuda":
        return AtOnce()
    return ThreadPoolExecutor(1, initializer=torch.cuda.set_stream, initargs=[torch.cuda.Stream(device)])
