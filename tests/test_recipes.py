"""scripts/studies/recipes.py: every recipe is a command; the table is of logs and reports, at the best guidance."""
import json
import shlex

import numpy as np
import pytest
import torch
from helpers import call
from PIL import Image
from scripts.quickstart_data import GARMENTS
from scripts.studies import ablations, recipes  # as call() imports them

from models import FlowARError
from util.command_line import parse_options
from util.options import EvaluationOptions, TrainingOptions, check_training, sweep


def test_every_recipe_is_a_command():
    for options in [options for group in recipes.GROUPS.values() for options in group.values()]:
        check_training(parse_options(TrainingOptions, shlex.split(f"{ablations.TRAINING.format(root='x')} {options}")[1:]))
    assert len(sweep(parse_options(EvaluationOptions, shlex.split(recipes.SAMPLING.format(root="x"))[1:]))) == 1


def test_the_table(tmp_path, monkeypatch, capsys):
    (tmp_path / "images" / "train" / "0").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / "train" / "0" / name).touch()

    def run_program(args, command, output):
        output.mkdir(parents=True, exist_ok=True)
        seed = int(command.split("--seed ")[1].split()[0])
        if "main_flowar" in command:
            assert f"--epochs {3 if '/6/' in str(output) else 5}" in command and ("torch.Tensor.float" in command) == ("muon" in command)
            lines = [{"group": "train", "step": 1, "epoch": 0.5, "loss": 1.0}]
            lines += [{"group": group, "step": 2, "epoch": 1, "loss": loss + 0.1 * seed} for group, loss in (("val", 0.3), ("val_ema", 0.4))]
            (output / "run.json").write_text(json.dumps({"data": {"classes": [f"{i}_{name}" for i, name in enumerate(GARMENTS)]}}))
            (output / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
            return
        cfg = float(command.split("--cfg ")[1].split()[0])
        values = {"frechet_distance_x": 100 + 10 * seed + 50 * abs(cfg - 2), "precision_k3_x": 0.2, "recall_k3_x": 0.1 * cfg}
        (output / "results.json").write_text(json.dumps({**values, "metrics": list(values), "num_images": 4, "class_num": 2}))
        (output / "images").mkdir(exist_ok=True)
        for i in range(4):
            Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(output / "images" / f"{i:06d}.png")

    monkeypatch.setattr(recipes, "run_program", run_program)
    monkeypatch.setattr(recipes, "load_classifier", lambda device: lambda images: torch.tensor([[1.0, 0.0]]).expand(len(images), 2))
    monkeypatch.setitem(recipes.GROUPS, "two", {"adamw": "--lr 1e-3", "muon": recipes.MUON})
    common = f"scripts/studies/recipes.py --root {tmp_path} --groups two --seeds 0,1 --at_once 1 --device cpu"
    call(monkeypatch, f"{common} --images 6,10 --cfg 1.5,2,3 --step_seconds 0.5,0.7")
    row = "0.3500 ± 0.0707 | 0.4500 ± 0.0707 | 105.0 ± 7.1 | 0.200 ± 0.000 | 0.200 ± 0.000 | 50.0% ± 0.0 | 2 |"
    out = tmp_path / "recipes"
    assert (out / "two.md").read_text().splitlines()[2:] == [f"| {name} | {images} | {row}" for name in ("adamw", "muon") for images in (6, 10)]
    assert set(json.loads((out / "two.json").read_text())["rows"]["muon, 10 images"]["samples"]) == {"1.5", "2.0", "3.0"}
    assert Image.open(out / "two.png").size[0] == 1500
    call(monkeypatch, f"{common} --images 6")  # losses alone
    assert Image.open(out / "two.png").size[0] == 500
    assert (out / "two.md").read_text().splitlines()[2] == f"| adamw | 6 | {' | '.join(row.split(' | ')[:2])} |"
    with pytest.raises(FlowARError, match="--images 7: expected a multiple of the 2"):
        call(monkeypatch, f"{common} --images 7")
    monkeypatch.setattr(recipes, "GARMENTS", ("cat", "dog"))
    call(monkeypatch, f"{common} --images 6 --cfg 2")
    assert "| 0.200 ± 0.000 |  | 2 |" in (out / "two.md").read_text()  # no label is looked for in other data
