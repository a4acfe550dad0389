"""Programs of the project in processes that are forked from one which has imported what they need: a start takes 0.1 s in place of 5."""
import multiprocessing
import os
import runpy
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["main_flowar", "eval", "scripts.cache_latents", "torchvision", "torch.utils.tensorboard", "efficientnet_lite_pytorch"])


def run_program(words, environment, output, error):
    """A program's main(), in a process of its own whose output goes to files."""
    for stream, path in ((1, output), (2, error)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(environment)
    tempfile.tempdir = None  # that of TMPDIR, which the preloaded modules have asked for before
    os.chdir(ROOT)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def run(command, processes=0, timeout=300):
    """A program alone, or as so many ranks on gloo; if one of them fails, the others get SIGTERM, as torchrun does. subprocess.CompletedProcess."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
        environments = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)] or [{}]
        free.close()
        output, error = f"{folder}/output", f"{folder}/error"
        gpus = {} if "--device cuda" in command else {"CUDA_VISIBLE_DEVICES": ""}
        ranks = [FORKS.Process(target=run_program, args=(shlex.split(command), {**environment, **gpus}, output, error)) for environment in environments]
        for rank in ranks:
            rank.start()
        end = time.monotonic() + timeout
        while any(rank.is_alive() for rank in ranks):
            if any(rank.exitcode for rank in ranks):
                for rank in ranks:
                    rank.terminate()
                break
            assert time.monotonic() < end, f"{command}: not done in {timeout} s"
            time.sleep(0.02)
        for rank in ranks:
            rank.join(30)
        failed = [rank.exitcode for rank in ranks if rank.exitcode]
        status = failed[0] if failed and not processes else min(1, len(failed))  # torchrun's own is 1
        return subprocess.CompletedProcess(command, status, Path(output).read_text(), Path(error).read_text())
