"""scripts/studies/ablations.py: every variant's options are real ones, a training is shared by those that differ in sampling, the table is of the reports."""
import json
import shlex
from dataclasses import replace

import numpy as np
import torch
from helpers import call, inputs, small_model
from PIL import Image

from models import build_model
from models.settings import Sampling
from scripts.studies import ablations  # as call() imports it
from util.command_line import parse_options
from util.options import EvaluationOptions, TrainingOptions, check_training, given_settings, model_options, sweep


def test_every_variant_is_a_command():
    for group in ablations.VARIANTS.values():
        assert ablations.BASE in group
        for training, sampling in group.values():
            words = shlex.split(f"{ablations.TRAINING.format(root='x')} {training} --epochs 1")[1:]
            args = parse_options(TrainingOptions, words)
            check_training(args)
            build_model(args.model, **model_options(replace(args, scales=args.scales or (1, 2, 4), class_num=10)))
            args = parse_options(EvaluationOptions, shlex.split(f"{ablations.SAMPLING.format(root='x')} {sampling.format(first='x')}")[1:])
            assert len(sweep(args)) == 1 and Sampling.of({}, given_settings(args)).guidance_weights(3)


def test_the_table(tmp_path, monkeypatch, capsys):
    """Two variants that differ in sampling share a run; distances are means over seeds with their standard deviation."""
    (tmp_path / "images" / "train" / "0").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / "train" / "0" / name).touch()
    (tmp_path / "val_stats.npz").touch()
    commands = []

    def run_program(args, command, output):
        commands.append(command)
        output.mkdir(parents=True, exist_ok=True)
        if command.startswith("main"):
            (output / "log.jsonl").write_text(json.dumps({"step": 1, "group": "val_ema", "loss": 0.5}))
            return
        guided, seed = "--guidance_low 0.1" in command, int(command.split("--seed ")[1].split()[0])
        values = {"frechet_distance_x": 100 + 10 * seed + 50 * guided, "kid_mean_x": 0.1, "precision_k3_x": 0.2, "recall_k3_x": 0.3}
        report = {**values, "metrics": list(values), "num_images": 4, "class_num": 2, "parameters": 1000, "images_per_second": 1.0, "cfg": 3.0,
                  "guidance": 1.0, "nfe": [1], "seconds_per_image": {}, "num_step": 25, "num_step_last": None, "solver": "euler"}
        (output / "results.json").write_text(json.dumps(report))
        (output / "images").mkdir(exist_ok=True)
        for i in range(4):
            Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(output / "images" / f"{i:06d}.png")

    monkeypatch.setattr(ablations, "run_program", run_program)
    monkeypatch.setattr(ablations, "load_classifier", lambda device: lambda images: torch.tensor([[1.0, 0.0]]).expand(len(images), 2))
    monkeypatch.setattr(ablations, "own_scales_losses", lambda run, root, device: [0.6, 0.7])
    monkeypatch.setitem(ablations.VARIANTS, "guidance", {ablations.BASE: ("", ""), "t > 0.1": ("", "--guidance_low 0.1")})
    monkeypatch.setitem(ablations.PAPER, ("guidance", "t > 0.1"), 4.88)
    call(monkeypatch, f"scripts/studies/ablations.py --root {tmp_path} --variants guidance --seeds 0,1 --images 6 --at_once 1 --device cpu")
    trainings = [command for command in commands if command.startswith("main")]
    assert len(trainings) == 2 and len(commands) == 6 and all("--epochs 3" in command for command in trainings)
    out = tmp_path / "ablations"
    assert (out / "ablations-guidance.md").read_text().splitlines()[2:] == [
        "| guidance: released | 105.0 ± 7.1 | 0.100 ± 0.000 | 0.200 ± 0.000 | 0.300 ± 0.000 | 50.0% ± 0.0 | 0.5000 ± 0.0000 | 0.6000 ± 0.0000 | 0.7000 ± 0.0000 | 1,000 |  |",
        "| guidance: t > 0.1 | 155.0 ± 7.1 | 0.100 ± 0.000 | 0.200 ± 0.000 | 0.300 ± 0.000 | 50.0% ± 0.0 | 0.5000 ± 0.0000 | 0.6000 ± 0.0000 | 0.7000 ± 0.0000 | 1,000 | 4.88 |"]
    assert Image.open(out / "ablations-guidance.png").size[0] == 900


def test_the_loss_under_own_scales(monkeypatch):
    """From t = 1 on the transformer reads what the model samples, whatever the image; from 0 on the image's own scales, as validation does."""
    model = small_model().eval()
    latents, labels = inputs(model, 3)[:2]
    generator = torch.Generator().manual_seed(0)
    t, noise, _, _ = model.draw(3, generator)
    drawn = model.sample_pyramid(labels, num_steps=ablations.OWN_STEPS, time_grid="uniform", noise=model.draw_noise(3, generator))
    seen, condition_on = [], model.condition_on
    monkeypatch.setattr(model, "condition_on", lambda pyramid, labels: seen.append(pyramid) or condition_on(pyramid, labels))
    with torch.no_grad():
        assert torch.allclose(ablations.own_scales_error(model, latents, labels, 0.0), model.scale_losses(latents, labels, t=t, noise=noise))
        own = ablations.own_scales_error(model, latents, labels, 1.0)
    for read, sampled in zip(seen[-1][:-1], drawn):
        assert torch.allclose(read, sampled, atol=1e-4)
    assert torch.equal(seen[-1][-1], model.pyramid(latents)[-1]) and not torch.allclose(own, model.scale_losses(latents, labels, t=t, noise=noise))
