"""Small models, and the programs run in this process. run(): in forks, see forked.py; start(): in real ones, see scripts/studies/runs.py."""
import gc
import importlib
import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from scripts.studies.runs import (CLASSES, GEOMETRY, ROOT, AutoencoderKL, LatentScale, assert_same_run, finish, make_project, ranks_of,  # noqa: F401
                                  read_checkpoint, read_log, save_vae, small_vae, start, training_command, wait_for, write_digits)

import engine_flowar
from models import FlowAR
from util.evaluation.pipeline import open_evaluation
from util.command_line import parse_options
from util.options import EvaluationOptions, TrainingOptions
from util.recipe import build_run
from util.training import checkpoint

SCALES = (1, 2, 4)
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
engine_flowar.gc = SimpleNamespace(collect=gc.collect, freeze=int, unfreeze=int)  # conftest.py's freeze stays


def small_model(**options):
    """A FlowAR of 4x4x4 latents that takes milliseconds, randomly initialised from a fixed seed."""
    torch.manual_seed(0)
    size = dict(img_size=16, vae_stride=4, vae_embed_dim=4, scale=SCALES, class_num=CLASSES, encoder_embed_dim=32,
                encoder_depth=1, encoder_num_heads=2, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2,
                diffloss_d=1, diffloss_w=64)
    return FlowAR(**{**size, **options}).eval()


def inputs(model, batch=2, seed=3):
    """latents, labels, t, noise."""
    g = torch.Generator().manual_seed(seed)
    side = model.scale[-1] * model.patch_size
    return (torch.randn(batch, model.vae_embed_dim, side, side, generator=g),
            torch.randint(model.class_num, (batch,), generator=g),
            torch.rand(len(model.scale), batch, generator=g),
            [torch.randn(batch, s * s, model.token_channels, generator=g) for s in model.scale])


def run(command, processes=0, check=True, timeout=300):
    """Run a program of the project in a process of its own, on so many ranks; its subprocess.CompletedProcess."""
    done = forked.run(command, processes, timeout)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def steps_of(folder, kind="checkpoint"):
    return [checkpoint.step_of(path) for path in checkpoint.list_numbered(folder, kind)]  # the latest first


def call(monkeypatch, command):
    """Run a program's main() in this process."""
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    importlib.import_module(sys.argv[0].removesuffix(".py").replace("/", ".")).main()


def train(project, output, extra="", device="cpu"):
    """Train as main_flowar.py in this process; returns the checkpoint."""
    engine_flowar.train(build_run(parse_options(TrainingOptions, shlex.split(training_command(project, output, extra))[1:]), torch.device(device)))
    return torch.load(Path(output) / "checkpoint-last.pth", weights_only=True)


def run_with_settings(root):
    """A run of a few steps that was told how to sample; its folder."""
    project = make_project(root, 2)
    train(project, project / "run", "--cfg 2 --guidance 1 --ema_rate 0.5")
    return project / "run"


def evaluation_command(project, checkpoint, output, extra=""):
    return (f"eval.py --resume {checkpoint} --vae_path {project}/vae.pth --num_images 10 --num_step 6 --cfg 2 --device cpu "
            f"--output_dir {output} --feature_extractor efficientnet-lite0 --evaluate {extra}")


def evaluate(project, checkpoint, output, extra=""):
    """Run eval.py's evaluation in this process; returns the report, None for a sweep."""
    args = parse_options(EvaluationOptions, shlex.split(evaluation_command(project, checkpoint, output, extra))[1:])
    engine_flowar.evaluate_sweep(*open_evaluation(args, torch.device("cpu")))
    results = Path(output) / "results.json"
    return json.loads(results.read_text()) if results.is_file() else None
