"""Small caches of latents."""
import pytest
from helpers import call


def cache_command(project, folder, extra=""):
    return (f"scripts/cache_latents.py --data_path {project}/images --cached_path {folder} --vae_path {project}/vae.pth "
            f"--img_size 16 --shard_size 30 --num_workers 0 --device cpu {extra}")


def make(command):
    """call() for fixtures too."""
    with pytest.MonkeyPatch.context() as patch:
        call(patch, command)
