"""--fsdp: the run of DDP, cut among the processes; its checkpoints are whole, and it goes on from them like any other."""
import shutil

import pytest
import torch
from helpers import assert_same_run, make_project, read_checkpoint, read_log, run, training_command

from models import FlowARError
from util.command_line import parse_options
from util.options import TrainingOptions, check_training
from util.training import checkpoint

LONG = "--epochs 1 --log_freq 1 --eval_freq 1 --save_every 3 --keep 20 --posthoc_ema 3 --ema_rate 0.9 --use_checkpoint"


def command(project, output, extra="", processes=2):
    return training_command(project, output, f"{LONG} --batch_size {16 // processes} {extra} --resume {output}")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def sharded(project, tmp_path_factory):
    output = tmp_path_factory.mktemp("sharded")
    run(command(project, output, "--fsdp"), processes=2)
    return output


def close(found, expected, tolerance=1e-6):
    """Two checkpoints have tensors of the same names, kinds and shapes, and of nearly the same numbers; other values are equal."""
    if isinstance(expected, torch.Tensor):
        assert type(found) is torch.Tensor and found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=1e-4)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            close(found[key], expected[key], tolerance)
    elif isinstance(expected, (list, tuple)):
        for pair in zip(found, expected, strict=True):
            close(*pair, tolerance)
    else:
        assert found == expected


def test_it_trains_as_ddp_does(project, sharded, tmp_path):
    """Weights, averages, moments, validation, samples; with recomputed activations."""
    run(command(project, tmp_path), processes=2)
    found, expected = read_checkpoint(sharded), read_checkpoint(tmp_path)
    for key in ("model", "model_ema", "optimizer", "posthoc", "scaler", "epoch"):
        close(found[key], expected[key])
    a, b = read_log(sharded), read_log(tmp_path)
    assert [line.keys() for line in a] == [line.keys() for line in b]
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (a, b)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and {line["group"] for line in a} >= {"train", "val", "val_ema"}
    assert {path.name for path in sharded.iterdir() if "events" not in path.name} == {path.name for path in tmp_path.iterdir() if "events" not in path.name}


@pytest.mark.slow  # more processes than most machines that test have cores
def test_two_processes_four_and_then_one_go_on(project, sharded, tmp_path):
    """Two to the same bits. Without --fsdp too. Dropout's draws are a process's own: the losses before them part from the run of two alone."""
    for processes, extra in ((2, "--fsdp"), (4, "--fsdp"), (1, "")):
        output = tmp_path / f"{processes}"
        shutil.copytree(sharded, output)
        (output / checkpoint.LAST).unlink()
        for later in checkpoint.list_numbered(output):
            if checkpoint.step_of(later) > 3:
                later.unlink()
        run(command(project, output, extra, processes), processes=processes)
        if processes == 2:
            assert_same_run(output, sharded)
        a, b = (next(line["loss"] for line in read_log(folder) if line.get("group") == "train" and line["step"] == 4) for folder in (output, sharded))
        assert a == pytest.approx(b, rel=0.05) and checkpoint.step_of(checkpoint.list_numbered(output)[0]) == 5


@pytest.mark.parametrize("other", ["--precision fp16", "--optimizer muon"])
def test_what_would_train_otherwise_is_refused(other):
    with pytest.raises(FlowARError, match=f"--fsdp does not support {other}"):
        check_training(parse_options(TrainingOptions, ["--fsdp", *other.split()]))
