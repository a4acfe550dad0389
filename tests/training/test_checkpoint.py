"""A run's checkpoints: whole or not at all, the newest whole one found, optimizer and progress refused where they are not."""
import copy
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, SCALES

import models.weights
from models import FlowARError, build_model
from models.weights import content_hash, read_file
from util.options import SAMPLING
from util.training import checkpoint, parallel
from util.training.optimization import EMA, build_optimizer
from util.training.progress import Progress

TINY = dict(img_size=16, vae_stride=4, vae_embed_dim=4, scale=SCALES, class_num=10)


@pytest.fixture(scope="module")
def tiny():
    return build_model("flowar_tiny", **TINY)


def content(number=0):
    return {"model": {"class_emb.weight": torch.full((3, 2), float(number))}, "args": {"lr": 0.1, "scales": (1, 2)}, "epoch": number,
            "progress": {"step": number, "epoch": number, "done": 1}}


def keep(folder, *steps, keep=2):
    """Write checkpoints of these steps."""
    keeper = checkpoint.CheckpointWriter(folder, keep)
    for step in steps:
        keeper.save(content(step), step)
    keeper.wait()
    return keeper


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_last_are_kept(tmp_path):
    keep(tmp_path, 1, 20, 300)
    assert names(tmp_path) == ["checkpoint-000000020.pth", "checkpoint-000000300.pth", checkpoint.LAST]
    found = torch.load(tmp_path / checkpoint.LAST, weights_only=True)
    assert found.pop("checksum") == content_hash(content(300)) and found["epoch"] == 300
    assert checkpoint.find(tmp_path).name == "checkpoint-000000300.pth"


def test_a_checkpoint_is_that_of_the_moment(tmp_path):
    value = content()
    keeper = checkpoint.CheckpointWriter(tmp_path, 1)
    keeper.save(parallel.snapshot(value), 1)
    value["model"]["class_emb.weight"] += 1
    keeper.wait()
    assert not torch.load(tmp_path / checkpoint.LAST, weights_only=True)["model"]["class_emb.weight"].any()


@pytest.mark.parametrize("damage", ["torn", "empty", "flipped", "text"])
def test_a_damaged_newest_checkpoint_falls_back(tmp_path, damage, capsys):
    keep(tmp_path, 1, 2)
    newest = tmp_path / "checkpoint-000000002.pth"
    whole = newest.read_bytes()
    place = whole.index(torch.full((3, 2), 2.0).numpy().tobytes())
    newest.write_bytes({"torn": whole[:-300], "empty": b"", "text": b"hello", "flipped": whole[:place] + b"\x01" + whole[place + 1:]}[damage])
    assert checkpoint.find(tmp_path).name == "checkpoint-000000001.pth"
    said = capsys.readouterr().out
    assert f"warning: {newest}: " in said and "; going back to checkpoint-000000001.pth" in said
    assert ("checksum" in said) == (damage == "flipped")
    checkpoint.CheckpointWriter(tmp_path, 1, step=1)  # a run that goes on from step 1
    assert names(tmp_path)[:2] == ["checkpoint-000000001.pth", "checkpoint-000000002.pth.damaged"]
    with pytest.raises(FlowARError, match="checkpoint-000000002.pth.damaged: "):
        checkpoint.find(tmp_path / "checkpoint-000000002.pth.damaged")  # asked for by name there is nothing else


def test_later_checkpoints_are_set_aside_and_one_of_the_damaged(tmp_path):
    """A run that goes on from an older checkpoint loses none that is whole."""
    keep(tmp_path, 1, 2, 3, 4, 5, keep=5)
    for step in (3, 4):
        (tmp_path / f"checkpoint-{step:09d}.pth").write_bytes(b"torn")
    checkpoint.CheckpointWriter(tmp_path, 1, step=1)
    assert names(tmp_path) == ["checkpoint-000000001.pth", "checkpoint-000000002.pth.aside", "checkpoint-000000003.pth.damaged",
                               "checkpoint-000000005.pth.aside", checkpoint.LAST]


def test_where_all_are_damaged_nothing_starts_from_scratch(tmp_path):
    keep(tmp_path, 1, 2)
    for path in tmp_path.iterdir():
        path.write_bytes(b"x")
    with pytest.raises(FlowARError, match="checkpoint-000000001.pth: .* no whole one is left in .*: put one there, or begin"):
        checkpoint.find(tmp_path)


def test_going_back_holds_before_the_first_save(tmp_path):
    """checkpoint-last.pth follows: it is no other name of one that was set aside."""
    keep(tmp_path, 1, 2)
    checkpoint.CheckpointWriter(tmp_path, 2, step=1)
    assert (tmp_path / checkpoint.LAST).samefile(tmp_path / "checkpoint-000000001.pth")
    assert checkpoint.find(tmp_path).name == "checkpoint-000000001.pth"


def test_files_of_the_user_are_left_alone(tmp_path):
    """Copies and dated backups are neither the newest, nor in the way, nor old; nothing goes before something newer is there."""
    keep(tmp_path, 1, 2, 3, keep=3)
    mine = ["checkpoint-100.pth", "checkpoint-20261101.pth", "checkpoint-best.pth", "checkpoint-0000000004.pth", "checkpoint-000020000.pth"]
    torch.save(content(2), tmp_path / mine[-1])
    torch.save(content(2)["model"], tmp_path / "checkpoint-000000001.pth")  # bare weights under a name like ours
    mine.append("checkpoint-000000001.pth")
    for name in mine[:-2]:
        (tmp_path / name).write_bytes((tmp_path / mine[-2]).read_bytes())
    (tmp_path / "checkpoint-100.pth.tmp").write_bytes(b"mine")
    before = names(tmp_path)
    assert checkpoint.find(tmp_path).name == "checkpoint-000000003.pth"
    keeper = checkpoint.CheckpointWriter(tmp_path, 1, step=3)
    assert names(tmp_path) == before
    keeper.save(content(4), 4)
    keeper.wait()
    assert names(tmp_path) == sorted([*mine, "checkpoint-100.pth.tmp", "checkpoint-000000004.pth", checkpoint.LAST])


def test_a_checkpoint_that_is_all_there_is_stays(tmp_path):
    """checkpoint-last.pth of another folder, beside later ones: it is set aside under no name before something newer is there."""
    keep(tmp_path, 5, 6)
    (tmp_path / checkpoint.LAST).unlink()
    torch.save(content(3), tmp_path / checkpoint.LAST)
    checkpoint.CheckpointWriter(tmp_path, 1, step=3)
    assert names(tmp_path) == ["checkpoint-000000005.pth.aside", "checkpoint-000000006.pth.aside", checkpoint.LAST]
    assert checkpoint.find(tmp_path).name == checkpoint.LAST


def test_milestones_are_kept(tmp_path):
    keeper = checkpoint.CheckpointWriter(tmp_path, 1, keep_every=2)
    for step, (epoch, done) in enumerate([(0, 5), (1, 0), (2, 0), (2, 3), (3, 0), (4, 0), (5, 0)], start=1):
        keeper.save({**content(step), "progress": {"step": step, "epoch": epoch, "done": done}}, step)
    keeper.wait()
    assert names(tmp_path) == [f"checkpoint-{step:09d}.pth" for step in (3, 6, 7)] + [checkpoint.LAST]


def test_milestones_stay_when_a_later_run_does_not_ask_for_them(tmp_path):
    """What is one is in the file: its own run's options and its epoch."""
    def save(keeper, *epochs, **args):
        for epoch in epochs:
            keeper.save({**content(epoch), "args": args, "progress": {"step": epoch, "epoch": epoch, "done": 0}}, epoch)
        keeper.wait()

    save(checkpoint.CheckpointWriter(tmp_path, 1, keep_every=2), 1, 2, 3, keep_every=2)
    save(checkpoint.CheckpointWriter(tmp_path, 1, step=3), 4, 5, 6, keep_every=0)
    save(checkpoint.CheckpointWriter(tmp_path, 1, step=6, keep_every=3), 7, 8, keep_every="a text")
    assert names(tmp_path) == [f"checkpoint-{step:09d}.pth" for step in (2, 6, 8)] + [checkpoint.LAST]


def test_the_file_that_a_run_was_told_to_go_on_from_stays(tmp_path):
    keep(tmp_path, 1, 2, 3, keep=3)
    named = tmp_path / "checkpoint-000000002.pth"
    keeper = checkpoint.CheckpointWriter(tmp_path, 1, step=2, resume=str(named))
    for step in (4, 5):
        keeper.save(content(step), step)
    keeper.wait()
    assert names(tmp_path) == [named.name, "checkpoint-000000003.pth.aside", "checkpoint-000000005.pth", checkpoint.LAST]


def test_one_run_writes_to_a_folder(tmp_path):
    held = checkpoint.lock(tmp_path, patience=0)
    other = subprocess.run([sys.executable, "-c", f"from util.training import checkpoint; checkpoint.lock({str(tmp_path)!r}, patience=0)"], cwd=ROOT,
                           capture_output=True, text=True)
    assert f"{tmp_path}: another run writes here (process {os.getpid()} on " in other.stderr
    held.close()
    checkpoint.lock(tmp_path, patience=0)


def test_without_hard_links_the_last_is_a_symbolic_one(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError("no hard links here")
    monkeypatch.setattr(checkpoint.os, "link", refuse)
    keep(tmp_path, 1, 2)
    assert (tmp_path / checkpoint.LAST).is_symlink() and checkpoint.find(tmp_path).name == "checkpoint-000000002.pth"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    keep(tmp_path, 1)
    before = names(tmp_path)

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models.weights.torch, "save", full)
    keeper = checkpoint.CheckpointWriter(tmp_path, 2, step=1)
    keeper.save(content(2), 2)
    with pytest.raises(FlowARError, match="checkpoint-000000002.pth: cannot be written .*No space left"):
        keeper.wait()
    with pytest.raises(FlowARError, match="No space left"):
        keeper.check()
    assert names(tmp_path) == before and torch.load(tmp_path / checkpoint.LAST, weights_only=True)["epoch"] == 1


def test_what_a_killed_write_left_is_removed(tmp_path):
    (tmp_path / "checkpoint-000000007.pth.tmp").write_bytes(b"half")
    keep(tmp_path, 8)
    assert names(tmp_path) == ["checkpoint-000000008.pth", checkpoint.LAST]


def test_an_optimizer_of_other_parameters_is_refused(tiny):
    optimizer, scaler = build_optimizer(tiny, 1e-3, 0.1), torch.amp.GradScaler("cpu", enabled=False)
    for p in tiny.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    saved = parallel.snapshot(optimizer.state_dict())
    checkpoint.load_optimizer(optimizer, scaler, {"optimizer": saved}, "x.pth")
    saved["state"][0]["exp_avg"] = torch.zeros(10**6).expand(10**6, 10**6)
    with pytest.raises(FlowARError, match=r"x.pth: optimizer state cannot be used \(exp_avg 0 is \(1000000, 1000000\), its parameter"):
        checkpoint.load_optimizer(optimizer, scaler, {"optimizer": saved}, "x.pth")


@pytest.mark.parametrize("progress", [None, 3, {"epoch": 1}, {**Progress().state_dict(), "step": "7"}])
def test_a_wrong_progress_is_refused(progress):
    with pytest.raises(FlowARError, match="x.pth: its progress is .*expected epoch, done, step"):
        checkpoint.load_progress({"progress": progress}, "x.pth", 10)
    assert checkpoint.load_progress({"epoch": 3}, "x.pth", 10) == Progress(epoch=4, step=40)
    with pytest.raises(FlowARError, match="x.pth: its epoch is None"):
        checkpoint.load_progress({}, "x.pth", 10)


# ---- power averages ----------------------------------------------------------------------------------------------


def with_powers(step, bad=0, every=2):
    """The content of a checkpoint with averages of 1/3, and of what float16 cannot hold."""
    powers = {width: {"weight": torch.full((3,), 1 / 3), "large": torch.full((2,), 1e5)} for width in ("0.05", "0.1")}
    return {"model": {}, "args": {"posthoc_ema": every}, "progress": {**Progress().state_dict(), "step": step, "bad_in_a_row": bad}, "posthoc": powers}


def test_snapshots_of_power_averages(tmp_path):
    """Every --posthoc_ema steps, however few checkpoints are kept, unless the step was a bad one; of later steps they are set aside."""
    keeper = checkpoint.CheckpointWriter(tmp_path, 1)
    for step, bad in ((1, 0), (2, 0), (4, 0), (6, 1), (8, 0)):
        keeper.save(with_powers(step, bad), step)
    keeper.wait()
    assert names(tmp_path) == ["checkpoint-000000008.pth", checkpoint.LAST, *(f"posthoc-00000000{step}.pth" for step in (2, 4, 8))]
    found = read_file(tmp_path / "posthoc-000000004.pth")
    assert found["step"] == 4 and found["posthoc"]["0.1"]["weight"].dtype == torch.float16
    assert found["posthoc"]["0.1"]["large"].tolist() == 2 * [1e5] and found["posthoc"]["0.1"]["large"].dtype == torch.float32
    torn = tmp_path / "posthoc-000000010.pth.tmp"
    torn.write_bytes(b"cut")
    checkpoint.CheckpointWriter(tmp_path, 1, step=5)
    assert [path.name for path in checkpoint.numbered(tmp_path, "posthoc")] == ["posthoc-000000004.pth", "posthoc-000000002.pth"]
    assert (tmp_path / "posthoc-000000008.pth.aside").is_file() and not torn.exists()


def test_power_averages_begin_with_a_training(tiny, tmp_path, capsys):
    """A run without them cannot go on with them, nor from another step; without the option they end, which is said."""
    network, scaler = copy.deepcopy(tiny), torch.amp.GradScaler(enabled=False)
    optimizer = build_optimizer(network, 1e-3, 0.02)
    args = {**dict.fromkeys(checkpoint.LEARNING), "global_batch": 16, "start_epoch": None, "epochs": 3}
    record = {"images": 80, "args": args, "data": {}, "vae": {}}
    held = {posthoc: EMA(network, 0.9, posthoc=posthoc) for posthoc in (True, False)}
    content = {posthoc: checkpoint.content_of(network, ema, optimizer, scaler, Progress(step=5, epoch=1), record) for posthoc, ema in held.items()}

    def resume(saved, posthoc, **changed):
        return checkpoint.resume("x.pth", content[saved], (network, held[posthoc], optimizer, scaler), {**record, "args": {**record["args"], **changed}})

    assert "posthoc" not in content[False]
    content[True] = parallel.snapshot(content[True])
    content[True]["posthoc"]["0.1"]["z_proj.bias"] += 1
    assert resume(True, True).step == 5 and "not used" not in capsys.readouterr().out
    assert torch.equal(held[True].powers["0.1"].tensors["z_proj.bias"], content[True]["posthoc"]["0.1"]["z_proj.bias"])
    assert resume(True, False).step == 5
    with pytest.raises(FlowARError, match="x.pth: it has no averages of --posthoc_ema of this model: they begin with a training"):
        resume(False, True)
    with pytest.raises(FlowARError, match="--start_epoch 2 and --posthoc_ema: its averages begin with a training"):
        resume(True, True, start_epoch=2)
    assert resume(True, True, start_epoch=0).step == 0
    assert set(checkpoint.SAMPLED) == {setting.option for setting in SAMPLING.values()}
    content[True]["args"] = {**args, "cfg": 3.0, "num_step": None}
    resume(True, True, cfg=2.0, num_step=9)
    assert "with other options than before: num_step not given -> 9, cfg 3.0 -> 2.0" in capsys.readouterr().out
    content[True]["posthoc"]["0.1"]["z_proj.bias"] = torch.zeros(3)
    with pytest.raises(FlowARError, match="x.pth: it has no averages of --posthoc_ema of this model"):
        resume(True, True)
