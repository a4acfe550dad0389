"""A run's checkpoints: whole or not at all, the newest whole one opened once, later ones renamed, power averages beside them."""
import copy
import errno
import itertools
import os
import socket
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers import SCALES, make_project, train, training_command

import engine_flowar
from models import FlowARError, build_model
from models.weights import read_file
from util import files
from util.command_line import parse_options
from util.options import TrainingOptions
from util.recipe import build_run
from util.training import checkpoint, parallel
from util.training.checkpoint import Checkpoint
from util.training.optimization import EMA, build_optimizer
from util.training.progress import Progress

TINY = dict(img_size=16, vae_stride=4, vae_embed_dim=4, scale=SCALES, class_num=10)


@pytest.fixture(scope="module")
def tiny():
    return build_model("flowar_tiny", **TINY)


def content(step=0, epoch=0, done=1):
    return {"model": {"class_emb.weight": torch.full((3, 2), float(step))}, "args": {"lr": 0.1, "scales": (1, 2)}, "epoch": step,
            "progress": {**vars(Progress()), "step": step, "epoch": epoch, "done": done}}


def write(folder, *steps, keep=2, **options):
    """Write checkpoints of these steps, numbers or (step, epoch, done)."""
    writer = checkpoint.CheckpointWriter(folder, keep, **options)
    for step in steps:
        writer.save(content(*step) if isinstance(step, tuple) else content(step), step[0] if isinstance(step, tuple) else step)
    writer.wait()
    return writer


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".json")


def test_the_last_are_kept(tmp_path):
    write(tmp_path, 1, 20, 300)
    assert names(tmp_path) == ["checkpoint-000000020.pth", "checkpoint-000000300.pth", checkpoint.LAST]
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == ["checkpoint-000000020", "checkpoint-000000300"]
    assert torch.load(tmp_path / checkpoint.LAST, weights_only=True)["epoch"] == 300
    assert checkpoint.open_newest(tmp_path).path.name == "checkpoint-000000300.pth"


def test_a_checkpoint_is_that_of_the_moment(tmp_path):
    value = content()
    writer = checkpoint.CheckpointWriter(tmp_path, 1)
    writer.save(parallel.snapshot(value), 1)
    value["model"]["class_emb.weight"] += 1
    writer.wait()
    assert not torch.load(tmp_path / checkpoint.LAST, weights_only=True)["model"]["class_emb.weight"].any()


@pytest.mark.parametrize("damage", ["torn", "empty", "text"])
def test_a_torn_newest_checkpoint_falls_back(tmp_path, damage, capsys):
    write(tmp_path, 1, 2)
    newest = tmp_path / "checkpoint-000000002.pth"
    newest.write_bytes({"torn": newest.read_bytes()[:-300], "empty": b"", "text": b"hello"}[damage])
    assert checkpoint.open_newest(tmp_path).path.name == "checkpoint-000000001.pth"
    printed = capsys.readouterr().out
    assert printed.count("\n") == printed.count(str(newest)) == 1 and f"warning: {newest}: " in printed and "using the previous checkpoint" in printed
    (tmp_path / "checkpoint-000000001.pth").write_bytes(b"x")
    with pytest.raises(FlowARError, match="checkpoint-000000001.pth: "):  # nothing starts from scratch
        checkpoint.open_newest(tmp_path)


def test_later_checkpoints_are_renamed_and_the_last_is_the_one_that_is_resumed(tmp_path):
    write(tmp_path, 1, 2, 3, keep=5)
    checkpoint.CheckpointWriter(tmp_path, 1, step=1)
    assert names(tmp_path) == ["checkpoint-000000001.pth", "checkpoint-000000002.pth.later", "checkpoint-000000003.pth.later", checkpoint.LAST]
    assert (tmp_path / checkpoint.LAST).samefile(tmp_path / "checkpoint-000000001.pth")


def test_files_of_others_are_left_alone(tmp_path):
    """Copies and dated backups, and a checkpoint without facts beside it, as earlier versions wrote."""
    write(tmp_path, 1, 2, 3, keep=3)
    (tmp_path / "checkpoint-000000001.json").unlink()
    others = ["checkpoint-100.pth", "checkpoint-20261101.pth", "checkpoint-best.pth", "checkpoint-0000000004.pth", "checkpoint-100.pth.tmp"]
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    before = names(tmp_path)
    assert checkpoint.open_newest(tmp_path).path.name == "checkpoint-000000003.pth"
    writer = checkpoint.CheckpointWriter(tmp_path, 1, step=3)
    assert names(tmp_path) == before
    writer.save(content(4), 4)
    writer.wait()
    assert names(tmp_path) == sorted([*others, "checkpoint-000000001.pth", "checkpoint-000000004.pth", checkpoint.LAST])


def test_milestones_stay_whatever_a_later_run_asks_for(tmp_path):
    write(tmp_path, (1, 0, 5), (2, 1, 0), (3, 2, 0), (4, 2, 3), (5, 3, 0), (6, 4, 0), (7, 5, 0), keep=1, keep_every=2)
    assert names(tmp_path) == [f"checkpoint-{step:09d}.pth" for step in (3, 6, 7)] + [checkpoint.LAST]
    write(tmp_path, (8, 6, 0), (9, 7, 0), keep=1, step=7)
    assert names(tmp_path) == [f"checkpoint-{step:09d}.pth" for step in (3, 6, 9)] + [checkpoint.LAST]


def test_the_file_that_a_run_was_told_to_resume_stays(tmp_path):
    write(tmp_path, 1, 2, 3, keep=3)
    named = tmp_path / "checkpoint-000000002.pth"
    write(tmp_path, 4, 5, keep=1, step=2, resume=str(named))
    assert names(tmp_path) == [named.name, "checkpoint-000000003.pth.later", "checkpoint-000000005.pth", checkpoint.LAST]


def test_one_run_writes_to_a_folder(tmp_path):
    file = files.lock_folder(tmp_path, patience=0)
    if (child := os.fork()) == 0:
        try:
            files.lock_folder(tmp_path, patience=0)
        except FlowARError as error:  # of this host: status 2, the job is not queued again
            os._exit(9 if error.status == 2 and f"{tmp_path}: another run is writing here (process {os.getppid()} on " in str(error) else 8)
        finally:
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    file.close()
    files.lock_folder(tmp_path, patience=0)


@pytest.mark.parametrize("host,alive,status,patience", [(socket.gethostname(), True, 2, 30), ("another", True, 2, 100), ("another", False, 75, 100)])
def test_the_lock_of_another_host_is_waited_for_longer_and_where_nothing_is_written_the_job_is_queued_again(tmp_path, monkeypatch, host, alive, status, patience):
    clock, slept, lockf = itertools.count(), [], mock.Mock(side_effect=OSError(errno.EACCES, "locked"))

    def sleep(seconds):
        slept.append(seconds)
        if alive:
            os.utime(tmp_path / "log.jsonl", (2**32, 2**32))

    monkeypatch.setattr(files, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=sleep))
    monkeypatch.setattr(files.fcntl, "lockf", lockf)
    (tmp_path / "log.jsonl").touch()
    (tmp_path / files.LOCK).write_text(f"process 7 on {host}\n")
    with pytest.raises(FlowARError, match=f"{tmp_path}: another run is writing here .process 7 on {host}.") as error:
        files.lock_folder(tmp_path)
    assert getattr(error.value, "status", 2) == status and abs(len(slept) - patience) < 5
    lockf.side_effect = OSError(errno.EPERM, "no locks here")
    files.lock_folder(tmp_path)


@pytest.mark.parametrize("refused", [["link"], ["link", "symlink"]])
def test_the_last_is_found_without_hard_links_and_without_any(tmp_path, monkeypatch, refused):
    """Nor does an older file of that name stay, as it lies in a folder that was copied."""
    def refuse(*args):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")
    torch.save(content(0), tmp_path / checkpoint.LAST)
    assert checkpoint.open_newest(tmp_path).path.name == checkpoint.LAST  # where it is all there is
    for name in refused:
        monkeypatch.setattr(os, name, refuse)
    write(tmp_path, 1, 2)
    assert names(tmp_path)[:2] == ["checkpoint-000000001.pth", "checkpoint-000000002.pth"]
    assert (tmp_path / checkpoint.LAST).is_symlink() == os.path.lexists(tmp_path / checkpoint.LAST) == (refused == ["link"])
    assert checkpoint.open_newest(tmp_path).path.name == "checkpoint-000000002.pth"


def test_a_failed_write_leaves_the_old_file_and_what_a_killed_one_left_is_removed(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-000000007.pth.tmp").write_bytes(b"half")
    write(tmp_path, 1)
    before = names(tmp_path)
    assert before == ["checkpoint-000000001.pth", checkpoint.LAST]

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    writer = checkpoint.CheckpointWriter(tmp_path, 2, step=1)
    writer.save(content(2), 2)
    with pytest.raises(FlowARError, match="No space left"):
        writer.wait()
    assert names(tmp_path) == before and torch.load(tmp_path / checkpoint.LAST, weights_only=True)["epoch"] == 1


def test_a_resume_opens_the_newest_file_once_and_no_other(tmp_path, monkeypatch):
    project, opened = make_project(tmp_path / "project"), []
    train(project, tmp_path / "run", "--epochs 1 --save_every 1 --keep 9")
    original = torch.load

    def count(file, *args, **options):
        opened.append(os.path.realpath(file))
        return original(file, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", count)
        words = training_command(project, tmp_path / "run", f"--epochs 2 --resume {tmp_path}/run").split()[1:]
        engine_flowar.train(build_run(parse_options(TrainingOptions, words), torch.device("cpu")))
    files = [path for path in opened if "checkpoint" in path]
    assert files == [str(tmp_path / "run" / "checkpoint-000000005.pth")]


def test_progress_of_a_file_without_it_is_after_its_whole_epochs():
    assert Checkpoint("x.pth", {"epoch": 3}).progress(10) == Progress(epoch=4, step=40)


def test_training_starts_from_the_weights_of_other_code(tiny, capsys):
    """Raw weights go into the network, the average into the EMA."""
    network, average = build_model("flowar_tiny", **TINY), tiny.state_dict()
    raw = {name: value if name == "mask" or "freqs" in name else value + 1 for name, value in average.items()}
    ema = EMA(network, 0.9)
    start = Checkpoint("x.ckpt", {"model": raw, "model_ema": average})
    progress = checkpoint.resume(start, (network, ema, None, None), {"images": 80, "args": {"global_batch": 16, "start_epoch": None}})
    assert progress == Progress()
    assert torch.equal(network.z_proj.bias, raw["z_proj.bias"]) and torch.equal(ema.module.z_proj.bias, average["z_proj.bias"])
    assert "the optimizer starts from scratch" in capsys.readouterr().out


# ---- power averages ----------------------------------------------------------------------------------------------


def with_powers(step, bad=0, every=2):
    """The content of a checkpoint with averages of 1/3, and of what float16 cannot hold."""
    powers = {width: {"weight": torch.full((3,), 1 / 3), "large": torch.full((2,), 1e5)} for width in ("0.05", "0.1")}
    return {"model": {}, "args": {"posthoc_ema": every}, "progress": {**vars(Progress()), "step": step, "bad_in_a_row": bad}, "posthoc": powers}


def test_snapshots_of_power_averages(tmp_path):
    """Every --posthoc_ema steps, however few checkpoints are kept, unless the step was a bad one; those of later steps are renamed."""
    writer = checkpoint.CheckpointWriter(tmp_path, 1)
    for step, bad in ((1, 0), (2, 0), (4, 0), (6, 1), (8, 0)):
        writer.save(with_powers(step, bad), step)
    writer.wait()
    assert names(tmp_path) == ["checkpoint-000000008.pth", checkpoint.LAST, *(f"posthoc-00000000{step}.pth" for step in (2, 4, 8))]
    snapshot = read_file(tmp_path / "posthoc-000000004.pth")
    assert snapshot["step"] == 4 and snapshot["posthoc"]["0.1"]["weight"].dtype == torch.float16
    assert snapshot["posthoc"]["0.1"]["large"].tolist() == 2 * [1e5] and snapshot["posthoc"]["0.1"]["large"].dtype == torch.float32
    checkpoint.CheckpointWriter(tmp_path, 1, step=5)
    assert [path.name for path in checkpoint.list_numbered(tmp_path, "posthoc")] == ["posthoc-000000004.pth", "posthoc-000000002.pth"]
    assert (tmp_path / "posthoc-000000008.pth.later").is_file()


def test_power_averages_begin_with_a_training(tiny, capsys):
    """A run without them cannot resume with them, nor from another step."""
    network, scaler = copy.deepcopy(tiny), torch.amp.GradScaler(enabled=False)
    optimizer = build_optimizer(network, 1e-3, 0.02)
    args = {"global_batch": 16, "start_epoch": None, "epochs": 3, "cfg": 3.0, "num_step": None, "output_dir": "here"}
    record = {"images": 80, "args": args, "data": {}, "vae": {}}
    averages = {posthoc: EMA(network, 0.9, posthoc=posthoc) for posthoc in (True, False)}
    saved = {posthoc: parallel.snapshot(checkpoint.content_of(network, ema, optimizer, scaler, Progress(step=5, epoch=1), record))
             for posthoc, ema in averages.items()}

    def resume(before, posthoc, **changed):
        parts = network, averages[posthoc], optimizer, scaler
        return checkpoint.resume(Checkpoint("x.pth", saved[before]), parts, {**record, "args": {**args, **changed}})

    assert "posthoc" not in saved[False]
    saved[True]["posthoc"]["0.1"]["z_proj.bias"] += 1
    assert resume(True, True).step == 5
    assert torch.equal(averages[True].powers["0.1"].tensors["z_proj.bias"], saved[True]["posthoc"]["0.1"]["z_proj.bias"])
    assert resume(True, False).step == 5
    with pytest.raises(FlowARError, match="x.pth: no --posthoc_ema averages of this model found, and they must begin at step 0"):
        resume(False, True)
    with pytest.raises(FlowARError, match="--start_epoch 2 and --posthoc_ema: the averages must begin at step 0"):
        resume(True, True, start_epoch=2)
    assert resume(True, True, start_epoch=0).step == 0
    capsys.readouterr()
    resume(True, True, cfg=2.0, num_step=9, output_dir="there")
    assert capsys.readouterr().out == "x.pth: resumes from step 5, in epoch 2, with other options than before: cfg 3.0 -> 2.0, num_step None -> 9\n"
    saved[True]["posthoc"]["0.1"]["z_proj.bias"] = torch.zeros(3)
    with pytest.raises(FlowARError, match="x.pth: no --posthoc_ema averages of this model found"):
        resume(True, True)
