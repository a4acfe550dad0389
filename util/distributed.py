"""Processes, devices and precision: torchrun on nccl or gloo, or one process without it."""
import contextlib
import ctypes
import os
import shutil
import signal
import sys
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

from models import FlowARError
from util.watch import LOST, Watch, say

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
TIMEOUT = 120  # seconds of silence after which a process counts as dead
COLLECTIVE_TIMEOUT = timedelta(hours=1)  # the others wait this long where rank 0 works alone
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)  # the first host waits this long for the last one
RESTART = 75  # exit status of a run that was asked to leave and has saved: start it again (EX_TEMPFAIL of sysexits.h)
_watch = None  # of this process, while it is one of several


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def barrier():
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def first_on_host():
    """The block runs on the first process of every host, then on its others: for files that are made once."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        barrier()
    yield
    if first:
        barrier()


def agree(what, value):
    """FlowARError unless all ranks found the same: they may see different disks."""
    if dist.is_initialized():
        values = [None] * world_size()
        dist.all_gather_object(values, value)
        odd = next((r for r in range(world_size()) if values[r] != values[0]), None)
        if odd is not None:
            raise FlowARError(f"{what} is {values[0]} on rank 0 but {values[odd]} on rank {odd}: all hosts must see the same files")


def log(message):
    """Print once, on rank 0."""
    if is_main():
        print(message, flush=True)


def select_device(name):
    """Device of this process. name: auto (CUDA if there is one), cpu or cuda."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise FlowARError("--device cuda: no CUDA device is available; use --device cpu or leave it out")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    keep_freed_memory()
    return torch.device(name)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory():
    """Tell glibc, where it is the C library, to keep freed memory for the next step: the kernel would clear it page by page."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def init(device_name, timeout=TIMEOUT):
    """Join the process group that torchrun described, if any, and return this process's device.

    timeout: seconds after which a process that shows no sign of life ends the job, see util.watch.
    """
    global _watch
    device = select_device(device_name)
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise FlowARError(f"local rank {device.index} has no GPU: this host has {torch.cuda.device_count()}; "
                              "lower --nproc_per_node")
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise FlowARError(f"the environment has RANK but not {' and '.join(missing)}: start with torchrun, or unset RANK for one process")
        store, number, size = next(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
        store = fresh(store, number, size)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=number, world_size=size,
                                timeout=COLLECTIVE_TIMEOUT)
        _watch = Watch(store, number, size, timeout)
        _watch.start()
        barrier()  # every heart beats before anyone looks
    return device


def fresh(store, number, size):
    """The part of the rendezvous' store that belongs to this start of the job alone.

    torchrun's store may outlive a restart (PyTorch 2.14 keeps it), and a rank that reads an address of the start before waits for the dead.
    So rank 0 makes up a name for this start and answers every rank that asks for it with a token of its own.
    """
    token = uuid.uuid4().hex
    store.set(f"flowar/token/{number}", token)
    if number == 0:
        name, waiting = uuid.uuid4().hex, set(range(1, size))
        while waiting:
            for r in sorted(waiting):
                if store.check([f"flowar/token/{r}"]):
                    store.set(f"flowar/start/{store.get(f'flowar/token/{r}').decode()}", name)
                if store.check([f"flowar/joined/{name}/{r}"]):
                    waiting.discard(r)
            time.sleep(0.02)
    else:
        name = store.get(f"flowar/start/{token}").decode()
        store.set(f"flowar/joined/{name}/{number}", "yes")
    return dist.PrefixStore(name, store)


def shutdown():
    global _watch
    if _watch:
        barrier()  # rank 0 may hold the store: nobody leaves before the others are done
        _watch.stop()
        _watch = None
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(tensor):
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


class HostCopy:
    """A small tensor on its way to the host. tolist() waits for what came before it on the device, and for no more."""

    def __init__(self, tensor):
        self.copied = None
        if tensor.device.type == "cuda":
            self.values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.values.copy_(tensor, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()
        else:
            self.values = tensor

    def tolist(self):
        if self.copied is not None:
            self.copied.synchronize()
        return self.values.tolist()


def from_main(function):
    """What function() returns on rank 0, on every rank; it is called there alone. The value is picklable."""
    value = [function() if is_main() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(value)
    return value[0]


def gather_to_main(value):
    """List of every rank's value on rank 0, None elsewhere. Values are picklable."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values


def set_precision(precision, device):
    """Resolve the default (tf32 on CUDA, as in the release, fp32 elsewhere) and set the matmul mode."""
    if precision is None:
        precision = "tf32" if device.type == "cuda" else "fp32"
    if precision == "tf32" and device.type != "cuda":
        raise FlowARError(f"--precision tf32 needs CUDA: the device is {device.type}; use fp32 or bf16")
    full = precision == "fp32"
    torch.set_float32_matmul_precision("highest" if full else "high")
    torch.backends.cudnn.allow_tf32 = not full
    return precision


def set_deterministic():
    """The same bits on every run on one kind of machine; call it before CUDA is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def autocast(device, precision):
    """Context in which the network runs: autocast for bf16 and fp16, nothing for fp32 and tf32."""
    if precision in AUTOCAST:
        return torch.autocast(device.type, AUTOCAST[precision])
    return contextlib.nullcontext()


def check_compiler(device):
    """FlowARError if --compile would find no C++ compiler: on a CPU for its kernels, on CUDA for what launches them."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if not any(map(shutil.which, names)):
        raise FlowARError(f"--compile needs a C++ compiler on {device.type}, and {' or '.join(names)} is not on PATH")


class Preempted(Exception):
    """The run was asked to leave, and has saved. together: all ranks leave at this point."""

    def __init__(self, message, together):
        super().__init__(f"{message}; the same command goes on (exit status {RESTART})")
        self.together = together


class Leaving:
    """Whether SIGTERM or SIGUSR1 (SLURM's warning) came; inside at_once() they raise Preempted where the process is."""

    def __init__(self):
        self.asked, self.message = False, None

    def handle(self, number, frame):
        self.asked = True
        if self.message:
            raise Preempted(self.message, together=False)

    @contextlib.contextmanager
    def at_once(self, message):
        self.message = message
        try:
            if self.asked:
                raise Preempted(message, together=False)
            yield
        finally:
            self.message = None


@contextlib.contextmanager
def leaving_on_signals():
    """Inside, SIGTERM and SIGUSR1 do not end the process but are noted in the Leaving that it yields."""
    leaving = Leaving()
    before = {number: signal.signal(number, leaving.handle) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield leaving
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_main(main):
    """Run a program's main(). What a user can put right becomes one line on stderr and exit status 2, a lost process status 1,
    a run that left on a signal status 75.
    """
    try:
        main()
        shutdown()
    except FlowARError as error:
        # A data loader's worker wraps the message in its traceback: the last line is the message.
        leave(str(error).strip().splitlines()[-1].removeprefix("models.errors.FlowARError: "), 2)
    except OSError as error:
        leave(f"{error.filename or 'a file'}: {error.strerror or error}", 2)
    except Preempted as left:
        if _watch is None or _watch.claim(str(left)):
            print(left, flush=True)
        if left.together:
            shutdown()
        os._exit(RESTART)
    except (RuntimeError, MemoryError) as error:
        message, status = explain(error)
        if message is None:
            raise
        leave(message, status)
    except KeyboardInterrupt:
        if is_main():
            sys.stderr.write("\ninterrupted: the same command goes on from what was saved\n")
            sys.stderr.flush()
        os._exit(130)


def leave(message, status):
    """Say why, if no other rank has, and end this process without joining the others, which may be waiting in a collective."""
    if _watch is None or _watch.claim(message):
        say(f"rank {rank()}" if world_size() > 1 else "", message)
    os._exit(status)


def explain(error):
    """(message, exit status) for an exception that the program is not to blame for: memory, a loader's worker, a rank that is gone.
    (None, None) for others.
    """
    text = str(error).partition("\n")[0]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return f"out of memory ({text.split('. ')[0]}): lower --batch_size or --eval_bsz, use --use_checkpoint, or a smaller model", 2
    if text.startswith("DataLoader"):  # raised wherever this process happens to be
        return f"the data cannot be read: {text.split('. ')[0]}; is its disk there, are the files whole, is it fast enough for --timeout?", 2
    if _watch is None or not (isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text):
        return None, None
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which comes before there is a name to tell
    names = " and ".join(_watch.silent_ranks())
    return f"lost {names or 'the connection to another rank'}: {text}; the same command goes on from the last checkpoint", LOST
