"""Devices and precision."""
import contextlib
import ctypes
import os
import resource
import shutil

import torch

from models import FlowARError

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def select_device(name):
    """Device of this process. name: auto (CUDA if there is one), cpu or cuda."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise FlowARError("--device cuda: no CUDA device is available; use --device cpu or leave it out")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc: keep freed memory for the next step, the kernel would clear it page by page
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
    return torch.device(name)


def memory_gib(device):
    """Peak memory in GiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class HostCopy:
    """A small tensor on its way to the host. tolist() waits for what came before it on the device, and for no more."""

    def __init__(self, tensor):
        self.values, self.copied = tensor, None
        if tensor.device.type == "cuda":
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.values = pinned.copy_(tensor, non_blocking=True)
            self.copied = torch.cuda.current_stream().record_event()

    def tolist(self):
        if self.copied is not None:
            self.copied.synchronize()
        return self.values.tolist()


def set_precision(precision, device):
    """Resolve the default (tf32 on CUDA, as in the release, fp32 elsewhere) and set the matmul mode."""
    if precision is None:
        precision = "tf32" if device.type == "cuda" else "fp32"
    if precision == "tf32" and device.type != "cuda":
        raise FlowARError(f"--precision tf32 needs CUDA: the device is {device.type}; use fp32 or bf16")
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    return precision


@contextlib.contextmanager
def exact_products():
    """Products of float32 matrices in full precision inside: in TF32 distances of equal features are not 0."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def set_deterministic():
    """The same bits on every run on one kind of machine; call it before CUDA is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def autocast(device, precision):
    """Context in which the network runs: autocast for bf16 and fp16, nothing for fp32 and tf32."""
    return torch.autocast(device.type, AUTOCAST[precision]) if precision in AUTOCAST else contextlib.nullcontext()


def check_compiler(device):
    """FlowARError unless --compile can make a small kernel: on a CPU with a C++ compiler, which launches CUDA's too."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if not any(map(shutil.which, names)):
        raise FlowARError(f"--compile needs a C++ compiler on {device.type}, and {' or '.join(names)} is not on PATH")
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever the compiler, its cache or its libraries raise
        raise FlowARError(f"--compile: nothing can be compiled on {device.type} ({compiler_line(error)}): mend that (a "
                          "compiler, Python's headers, room in TMPDIR), or leave out --compile") from error


def compiler_line(error):
    """The line of a compiler's error that says most: its first error, else the first line that is no heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.endswith(" raised:")]
    return next((line for line in lines if " error: " in line), (lines or [type(error).__name__])[0])
