"""--wandb: TensorBoard's scalars and grids by the same names, and no training that ends because of it; a log that was torn."""
import importlib.machinery
import sys
import types

import numpy as np
import pytest
import torch
from helpers import make_project, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.training.logging import TrainingLog


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"), 2)


class Stub(types.ModuleType):
    """A wandb that keeps what it is told, or fails where it is asked to."""

    def __init__(self, fails=()):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="a stub")
        self.fails, self.told, self.inits, self.config = fails, [], [], self
        self.Settings, self.Image = dict, lambda pixels: pixels.shape

    def call(self, what):
        if what in self.fails:
            raise (SystemExit if what == "finish" else RuntimeError)("the service is gone\nand more")

    def init(self, **options):
        self.call("init")
        self.inits.append(options)
        return self

    def update(self, options, allow_val_change):
        self.options = options

    def define_metric(self, *names, **options):
        pass

    def log(self, values):
        self.call("log")
        self.told.append(values)

    def finish(self):
        self.call("finish")


@pytest.fixture
def stub(monkeypatch):
    def make(*fails):
        monkeypatch.setitem(sys.modules, "wandb", Stub(fails))
        return sys.modules["wandb"]
    return make


def test_it_gets_what_tensorboard_gets(project, tmp_path, stub):
    wandb = stub()
    train(project, tmp_path, "--epochs 1 --eval_freq 1 --wandb of-mine --log_freq 1")
    train(project, tmp_path, f"--epochs 2 --eval_freq 1 --wandb of-mine --log_freq 1 --resume {tmp_path}")
    board = EventAccumulator(str(tmp_path)).Reload()
    scalars = {(tag, event.step): event.value for tag in board.Tags()["scalars"] for event in board.Scalars(tag)}
    told = {(name, line["step"]): value for line in wandb.told for name, value in line.items() if name != "step"}
    assert {("train/loss", 1), ("val/loss", 1), ("val_ema/loss_scale_2", 2), ("train/lr", 2)} < scalars.keys()
    assert {key: np.float32(told[key]) for key in scalars} == pytest.approx(scalars, rel=1e-6)
    images = {(tag, event.step) for tag in board.Tags()["images"] for event in board.Images(tag)}
    assert images == told.keys() - scalars.keys() >= {("samples/ema", 1), ("samples/ema", 2)}


def write(folder, step=0, project="p"):
    log = TrainingLog(folder, torch.device("cpu"), step, project, {"scales": (1, 2)})
    log.scalars("val", step + 1, 1, {"loss": 0.5})
    log.image("samples/ema", torch.zeros(3, 4, 5, dtype=torch.uint8), step + 1)
    log.scalars("val", step + 2, 1, {"loss": 0.25})
    log.close()


def test_the_id_stays_with_the_folder(stub, tmp_path, capsys):
    wandb = stub()
    write(tmp_path)
    assert wandb.told == [{"step": 1, "val/loss": 0.5}, {"step": 1, "samples/ema": (4, 5, 3)}, {"step": 2, "val/loss": 0.25}]
    assert wandb.options == {"scales": [1, 2]}
    write(tmp_path, step=1)
    assert len({options["id"] for options in wandb.inits}) == 1 and wandb.inits[1]["resume"] == "allow"
    assert "of project p; its entries after step 1, if any, stay" in capsys.readouterr().out
    write(tmp_path)  # from scratch: as log.jsonl, a new one
    write(tmp_path, step=1, project="other")
    assert len({options["id"] for options in wandb.inits}) == 3


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_what_fails_there_is_said_once(stub, tmp_path, capsys, fails):
    stub(fails)
    write(tmp_path)
    out = capsys.readouterr().out
    assert out.count("warning: --wandb: the service is gone; training continues without it") == 1 and "and more" not in out
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_a_log_is_mended(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"group": "train", "step": 2, "epoch": 0.1, "loss": 1.5}\n[1]\n{"group": "val", "step": 2}\n'
                                        '{"group": "train", "step": 4}\n{"group": "tra')
    TrainingLog(tmp_path, torch.device("cpu"), step=2).close()
    assert (tmp_path / "log.jsonl").read_text() == '{"group": "train", "step": 2, "epoch": 0.1, "loss": 1.5}\n'
