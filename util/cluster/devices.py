"""Devices and precision."""
import contextlib
import ctypes
import os
import resource
import subprocess
import sys

import torch

from models import FlowARError

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def select_device(name):
    """Device of this process. name: auto (CUDA if there is one), cpu or cuda."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and (gpu := first_gpu()):
            warn(f"nvidia-smi says '{gpu}', but PyTorch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it: "
                 "running on the CPU. Update the driver, or install PyTorch for its CUDA version; --device cpu hides "
                 "this warning")
    if name == "cuda":
        if not torch.cuda.is_available():
            raise FlowARError("--device cuda: no CUDA device is available; use --device cpu or leave it out")
        # Under srun --gpus-per-task=1 a rank sees its own alone.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    keep_freed_memory()
    return torch.device(name)


def first_gpu():
    """What nvidia-smi says of the first GPU, or of a driver that does not work; "" if there is none or it is hidden."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            output = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20).stdout
            if output and "No devices" not in output:
                return output.splitlines()[0]
    return ""


def warn(message):
    """Print a line on stderr, once on every host."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: {message}", file=sys.stderr, flush=True)


def keep_freed_memory():
    """glibc keeps what is freed for the next step: the kernel would clear it page by page, 2 to 3 % of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def memory_gib(device):
    """Peak memory in GiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def set_precision(precision, device):
    """Resolve the default (tf32 on CUDA, as in the release, fp32 elsewhere) and set the matmul mode."""
    if precision is None:
        precision = "tf32" if device.type == "cuda" else "fp32"
    if precision == "tf32" and device.type != "cuda":
        raise FlowARError(f"--precision tf32 needs CUDA: the device is {device.type}; use fp32 or bf16")
    if precision == "bf16" and is_bf16_emulated(device):
        warn(f"this {device.type} emulates bf16, several times slower: use --precision "
             + ("fp16 or fp32" if device.type == "cuda" else "fp32"))
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    return precision


def is_bf16_emulated(device):
    """Whether the hardware computes in bf16 by way of float32: GPUs before Ampere, CPUs without its instructions."""
    if device.type == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        return {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(file.read().split())
    return False


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
