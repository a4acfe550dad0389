"""Measuring speed: alternating timings, the machine's matmul peak, operations and bytes."""
import statistics
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

NO_WORK = "aten::empty", "aten::_unsafe_view", "aten::detach", "prim::"
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
    """Counts the operations that PyTorch dispatches one by one, a kernel each or nearly, the bytes they move, and the FLOP of
    matrix products and convolutions.

    Views and allocations do no work and are left out. What torch.compile fuses is not seen.
    """

    def __init__(self):
        super().__init__()
        self.each = []  # (FLOP, bytes) of every operation

    @property
    def operations(self):
        return len(self.each)

    @property
    def flop(self):
        return sum(flop for flop, _ in self.each)

    @property
    def bytes(self):
        return sum(size for _, size in self.each)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if not (function.is_view or function.name().startswith(NO_WORK)):
            size = nbytes((args, kwargs, result)) + nbytes(overwritten(function, args, kwargs))
            count = flop_registry.get(function.overloadpacket)
            self.each.append((count(*args, **kwargs, out_val=result) if count else 0, size))
        return result


def nbytes(values):
    """Of all tensors in a tree."""
    return sum(value.numel() * value.element_size() for value in tree_leaves(values) if isinstance(value, torch.Tensor))


def overwritten(function, args, kwargs):
    """The arguments that an operation which returns nothing writes to, such as the optimizer's."""
    if function._schema.returns:
        return []
    given = {**kwargs, **{argument.name: value for argument, value in zip(function._schema.arguments, args)}}
    return [given.get(argument.name) for argument in function._schema.arguments if argument.is_write]


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
