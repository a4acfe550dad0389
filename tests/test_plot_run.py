"""scripts/plot_run.py: what it reads of a run, and that it ends in one line where there is nothing to draw."""
import json
import os

import numpy as np
from scripts import plot_run
import pytest
from helpers import call
from PIL import Image


FRECHET = "frechet_distance_efficientnet_lite0"
REPORT = {"metrics": [FRECHET], FRECHET: 80.0, "images_per_second": 1.0, "cfg": 1.0, "guidance": 0.9, "nfe": [24], "seconds_per_image": {},
          "num_step": 25, "num_step_last": None, "solver": "euler", "weights": "ema", "checkpoint": "o/a/checkpoint-000000040.pth"}


def training(step, loss=1.0):
    return {"group": "train", "step": step, "epoch": step / 10, "loss": loss, "lr": 1e-3, "images_per_second": 9.0, "loss_scale_1": loss,
            "loss_scale_2": 2 * loss}


def write_run(folder, more=(), steps=range(10, 50, 10)):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [training(step, 10 / step) for step in steps] + list(more)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"group": "train", "st')
    return folder


@pytest.fixture
def folder(tmp_path):
    """A run with everything: validation, --online_eval, evaluations beside it."""
    more = [{"group": group, "step": step, "loss": 1 / step, "epoch": 1} for group in ("val", "val_ema") for step in (20, 40)]
    more += [{"group": "eval", "step": 20, "epoch": 1, FRECHET: 90.0, "kid_mean": 0.1}, training(20, 7.0)]
    run = write_run(tmp_path / "a", more)
    for name, changes in (("eval", {}), ("raw", {"weights": "raw", FRECHET: 95.0}), ("of_another", {"checkpoint": "o/b/checkpoint-000000040.pth"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps({**REPORT, **changes}))
    return run


def titles(figure):
    return [axis.get_title() for axis in figure.axes]


def test_what_a_run_holds(folder):
    run = plot_run.read_run(folder)
    assert run.points("train", "loss") == ([10, 20, 30, 40], [1.0, 7.0, pytest.approx(1 / 3), 0.25])  # the later line of a step counts
    assert run.scales() == [1, 2] and run.metric == FRECHET
    assert run.distances == [(20, 90.0, "in training, EMA"), (40, 80.0, "eval.py, EMA"), (40, 95.0, "eval.py, raw")]


def test_every_panel_is_drawn_and_labelled(folder):
    figure = plot_run.draw([plot_run.read_run(folder)])
    assert titles(figure) == ["Training loss", "Training loss of each scale", "Validation loss", "Learning rate", "Training speed",
                              "frechet distance\nefficientnet lite0"]
    assert all(axis.get_xlabel() == "optimizer step" and axis.get_ylabel() for axis in figure.axes)
    scales = figure.axes[1]
    assert [text.get_text() for text in scales.get_legend().get_texts()] == ["1×1", "2×2"] and scales.get_yscale() == "log"
    assert [text.get_text() for text in figure.axes[5].get_legend().get_texts()] == ["in training, EMA", "eval.py, EMA", "eval.py, raw"]


def test_what_is_not_there_has_no_panel(tmp_path, monkeypatch):
    run = write_run(tmp_path / "a")
    assert titles(plot_run.draw([plot_run.read_run(run)])) == ["Training loss", "Training loss of each scale", "Learning rate", "Training speed"]
    os.rename(run / "log.jsonl", run / "log.1.jsonl")  # of a run before in the same folder: by its name
    call(monkeypatch, f"scripts/plot_run.py {run}/log.1.jsonl")
    picture = Image.open(run / "plot_run.png")
    assert picture.width == 1400 and np.asarray(picture.convert("L")).min() < 50


def test_sweeps_are_compared(tmp_path, monkeypatch):
    """Rows whose place on the axis would be a list are left out."""
    (tmp_path / "results.csv").write_text("cfg,solver,fid\n2.0,euler,5\n1:2:3,euler,4\n3.0,euler,6\n")
    call(monkeypatch, f"scripts/plot_results.py {tmp_path}/results.csv --x cfg --output {tmp_path}/x.png")
    assert Image.open(tmp_path / "x.png").size == (700, 450)
