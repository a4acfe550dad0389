"""A batch of an evaluation: decoded, measured and written while the next one is sampled."""
import contextlib
from concurrent.futures import ThreadPoolExecutor

import torch

from util.evaluation.extractors import extract


def decode_and_measure(sampler, extractor, writer, watch, latents, indices):
    """({features, logits if any, bad: indices of images that are not finite}, images (n, 3, H, W) uint8 on the CPU, a
    function that waits for their files) of scaled latents. writer: PngWriter or None; watch: Stopwatch.
    """
    with watch("decoding"):
        images, finite = sampler.decode(latents)
    with watch("features"):
        features, logits = extract(extractor, images)
    with watch("writing"):
        images = images.cpu()
        wait = writer.start(images, indices) if writer else list
    bad = torch.tensor([index for index, ok in zip(indices, finite.tolist()) if not ok], dtype=torch.long)
    return {"features": features, "bad": bad, **({} if logits is None else {"logits": logits})}, images, wait


class Aside:
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
        return self.pool.submit(self._call, ready, function, *args).result

    def _call(self, ready, function, *args):
        with torch.no_grad(), self._own_stream(ready):
            return function(*args)

    @contextlib.contextmanager
    def _own_stream(self, ready):
        """What this thread gives the device does not wait for what others give it, but for `ready`."""
        if ready is None:
            yield
            return
        self.stream = self.stream or torch.cuda.Stream(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            self.stream.wait_event(ready)
            yield
            self.stream.synchronize()  # the arguments' memory may go back to the stream that made them
