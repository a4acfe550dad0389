"""Run a program of the project with another start method of its data workers: start_method.py fork|forkserver|spawn PROGRAM OPTIONS"""
import multiprocessing
import runpy
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    multiprocessing.set_start_method(sys.argv[1], force=True)
    multiprocessing.set_forkserver_preload(["torch", "torchvision"])
    sys.argv = sys.argv[2:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
