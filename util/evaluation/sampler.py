"""Images of a model: an image's label and index, with the seed, decide it, not the batch or process that makes it."""
import contextlib
import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from models import flow_matching as fm
from models.errors import FlowARError, name_some
from models.settings import Sampling
from util.cluster import autocast
from util.data import to_uint8
from util.evaluation.extractors import extract
from util.evaluation.labels import image_label
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
    (solver, times, weights), passes = model.plan_sampling(sampling), []
    for grid, weight in zip(times, weights):
        counts = []
        velocity = fm.guided_velocity(lambda x, t: counts.append(1) or x, lambda x, t: counts.append(2) or (x, x),
                                      weight, sampling.guidance_low, sampling.guidance)
        solver(velocity, torch.zeros(1), grid, torch.Generator())
        passes.append(counts)
    return passes


class Sampler(NamedTuple):
    """Makes images with a model and a VAE, which lie on one device."""
    model: torch.nn.Module
    vae: torch.nn.Module
    sampling: Sampling
    precision: str
    seed: int
    batch: int  # images at once
    weights: str = "the EMA"  # where they come from, for messages
    classes: np.ndarray | None = None  # labels that a grid may have; None: all
    guide: torch.nn.Module | None = None  # see FlowAR.sample_pyramid

    @property
    def device(self):
        return self.model.z_proj.weight.device

    @property
    def vae_precision(self):
        """On a CPU a VAE takes 1.7 times as long in bf16 (docs/performance.md)."""
        return "fp32" if self.device.type == "cpu" else self.precision

    def noise(self, indices):
        """Starting noise of images by their index, see FlowAR.draw_noise."""
        return image_noise(self.model, self.seed, indices)

    def passes(self):
        """See count_passes."""
        return count_passes(self.model, self.sampling)

    @torch.no_grad()
    def pyramid(self, labels, noise, **known):
        """Latents of every scale for a list of labels and noise(indices); known: see FlowAR.sample_pyramid."""
        labels = torch.tensor(labels, device=self.device)
        with autocast(self.device, self.precision):
            return self.model.sample_pyramid(labels, noise=noise, guide=self.guide, **known, **vars(self.sampling))

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
            some = labels[start:start + self.batch]
            indices = range(first + start, first + start + len(some))
            pixels, finite = self.decode(self.model.unpatchify(self.pyramid(some, self.noise(indices))[-1]))
            images.append(pixels.cpu())
            bad += [index for index, ok in zip(indices, finite.tolist()) if not ok]
        self.refuse_not_finite(bad, len(labels))
        return torch.cat(images)

    def grid(self):
        """(3, H, W) uint8: a grid of images of classes spread over all."""
        from torchvision.utils import make_grid  # heavy: not for those who draw none
        classes = range(self.model.class_num) if self.classes is None else self.classes.tolist()
        labels = [classes[image_label(i, GRID_IMAGES, len(classes))] for i in range(GRID_IMAGES)]
        return make_grid(self.images(labels), nrow=math.isqrt(GRID_IMAGES), padding=1)

    def refuse_not_finite(self, bad, count):
        """FlowARError that names images whose pixels are not finite, if there are any."""
        if bad:
            raise FlowARError(f"{len(bad)} of {count} images are not finite: {name_some(map(str, sorted(bad)), 8)}; "
                              f"the weights of {self.weights} are damaged, or --precision {self.precision} overflows")

    def settings(self):
        """What a reader needs to make the images again."""
        scales = self.model.scale
        return {"class_num": self.model.class_num, "img_size": self.model.img_size, "scales": scales,
                **self.sampling.by_option(), "steps": [len(times) - 1 for times in self.sampling.times(len(scales))],
                "precision": self.precision, "seed": self.seed, "eval_bsz": self.batch}


# ---- a batch of an evaluation: decoded, measured and written while the next one is sampled ---------------------


def measure_batches(sampler, plan, extractor, batches, writer, watch, beside):
    """Yield (number, indices, {features, logits if any, bad: indices of images that are not finite}, images
    (n, 3, H, W) uint8 on the CPU, a function that waits for their files) of {batch number: indices of its images}.

    While a batch is sampled, the one before is decoded, measured and written. writer: PngWriter or None; watch:
    Stopwatch; beside: SideStream.
    """
    before = None
    for number, indices in batches.items():
        with watch("sampling"):
            pyramid = sampler.pyramid(plan.labels.of(indices), sampler.noise(indices))
            latents = sampler.model.unpatchify(pyramid[-1])
        if before:
            yield *before[:2], *before[2]()
        before = number, indices, beside(decode_and_measure, sampler, extractor, writer, watch, latents, indices)
    if before:
        yield *before[:2], *before[2]()


def decode_and_measure(sampler, extractor, writer, watch, latents, indices):
    """The last three of what measure_batches yields, of a batch's scaled latents."""
    with watch("decoding"):
        images, finite = sampler.decode(latents)
    with watch("features"):
        features, logits = extract(extractor, images)
    with watch("writing"):
        images = images.cpu()
        wait = writer.start(images, indices) if writer else list
    bad = [index for index, ok in zip(indices, finite.tolist()) if not ok]
    tensors = {"features": features, "bad": torch.tensor(bad, dtype=torch.long)}
    if logits is not None:
        tensors["logits"] = logits
    return tensors, images, wait


class SideStream:
    """Calls functions beside the caller's own work: on CUDA on another thread and stream, in order; elsewhere at once,
    where all cores are busy anyway.
    """

    def __init__(self, device, threaded=None):
        self.device, self.stream = device, None
        self.pool = ThreadPoolExecutor(1) if (device.type == "cuda" if threaded is None else threaded) else None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def __call__(self, function, *args):
        """A function that waits for the result of function(*args) and returns it, or raises what it raised."""
        if self.pool is None:
            result = function(*args)
            return lambda: result
        ready = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None
        return self.pool.submit(self.run, ready, function, *args).result

    def run(self, ready, function, *args):
        with torch.no_grad(), self.own_stream(ready):
            return function(*args)

    @contextlib.contextmanager
    def own_stream(self, ready):
        """What this thread gives the device does not wait for what others give it, but for `ready`."""
        if ready is None:
            yield
            return
        self.stream = self.stream or torch.cuda.Stream(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            self.stream.wait_event(ready)
            yield
            self.stream.synchronize()  # the arguments' memory may go back to the stream that made them
