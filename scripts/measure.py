"""Measuring speed: alternating timings, the machine's matmul peak, operations and bytes."""
import statistics
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PEAK_SIZE = {"cpu": 4096, "cuda": 8192}


def seconds(function, device):
    """Wall seconds of function(), the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Peak:
    """Operations a second of a large matrix product in dtype: the best of three in every turn, their median."""

    def __init__(self, device, dtype):
        n = PEAK_SIZE[device.type]
        self.a, self.b = torch.randn(2, n, n, device=device).to(dtype).unbind(0)
        self.device, self.operations, self.turns = device, 2 * n**3, []

    def __call__(self):
        self.turns.append(self.operations / min(seconds(lambda: self.a @ self.b, self.device) for _ in range(3)))

    @property
    def reached(self):
        return statistics.median(self.turns)


def alternate(functions, device, repeats):
    """{name: median seconds} of functions that take turns, after one call each that is not timed."""
    found = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            taken = seconds(function, device)
            if turn:
                found[name].append(taken)
    return {name: statistics.median(values) for name, values in found.items()}


class Work(TorchDispatchMode):
    """Counts the operations that PyTorch dispatches one by one, a kernel each or nearly, and the bytes they move.

    Views and allocations do no work and are left out. What torch.compile fuses is not seen.
    """

    def __init__(self):
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not (function.is_view or function.name().startswith(("aten::empty", "aten::_unsafe_view", "aten::detach"))):
            self.operations += 1
            for value in tree_leaves((args, kwargs, result)):
                if isinstance(value, torch.Tensor):
                    self.bytes += value.numel() * value.element_size()
        return result


def count_work(function):
    """(operations, bytes) of function()."""
    with Work() as work:
        function()
    return work.operations, work.bytes


def count_kernels(function):
    """CUDA kernels that function() launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)
