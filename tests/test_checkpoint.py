"""Weights of every kind go in; the wrong ones are refused by name; nothing runs from a file."""
import argparse
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, SCALES, small_model
from safetensors.torch import save_file

import models.weights
from models import FlowARError, build_model
from util import checkpoint
from util.optimization import build_optimizer
from util.progress import Progress

TINY = dict(img_size=16, vae_stride=4, vae_embed_dim=4, scale=SCALES, class_num=10)


def state_of(path):
    path, content = checkpoint.read_model_file(path)
    return checkpoint.model_state(content, path)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return build_model("flowar_tiny", **TINY)


@pytest.mark.parametrize("kind", ["bare", "training", "directory", "safetensors", "module.", "_orig_mod.", "module._orig_mod."])
def test_every_kind_of_file_loads(tmp_path, tiny, kind):
    state, path = tiny.state_dict(), tmp_path / "weights.pth"
    if kind == "bare":
        torch.save(state, path)
    elif kind in ("training", "directory"):
        other = {name: torch.zeros_like(value) for name, value in state.items()}
        path = tmp_path / checkpoint.LAST
        torch.save({"model": other, "model_ema": state, "epoch": 3, "args": argparse.Namespace(lr=1)}, path)
        path = tmp_path if kind == "directory" else path
    elif kind == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    else:
        torch.save({kind + name: value for name, value in state.items()}, path)
    found = state_of(path)
    model = build_model("flowar_tiny", **TINY)
    checkpoint.load_model(model, found, path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values()))


def test_size_is_recognised_from_the_tensors(tiny):
    state = tiny.state_dict()
    assert checkpoint.recognise_size(state, "x") == {"model": "flowar_tiny", "diffloss_d": 3, "diffloss_w": 128}
    assert checkpoint.recognise_geometry(state, "x", 4) == {"class_num": 10, "scales": SCALES, "patch_size": 1}
    assert checkpoint.recognise_geometry(state, "x", 1)["patch_size"] == 2
    with pytest.raises(FlowARError, match="x: tokens have 4 channels, which 3 latent channels of the VAE do not make"):
        checkpoint.recognise_geometry(state, "x", 3)
    del state["encoder_blocks.0.attn.rope.freqs"]
    with pytest.raises(FlowARError, match="x: the model's size cannot be recognised .*encoder_blocks.0.attn.rope.freqs"):
        checkpoint.recognise_size(state, "x")


@pytest.mark.parametrize("name", ["flowar_small", "flowar_base", "flowar_large", "flowar_huge"])
def test_released_sizes_are_recognised(name):
    with torch.device("meta"):
        state = build_model(name).state_dict()
    state["mask"] = build_model("flowar_tiny").mask  # values matter here, so not on the meta device
    assert checkpoint.recognise_size(state, "x")["model"] == name
    assert checkpoint.recognise_geometry(state, "x", 16) == {"class_num": 1000, "scales": (1, 2, 4, 8, 16), "patch_size": 1}


def test_wrong_size_is_refused_with_names(tmp_path, tiny):
    torch.save(small_model().state_dict(), tmp_path / "small.pth")
    with pytest.raises(FlowARError, match=r"small.pth: \d+ tensors do not fit the model: .*encoder_pos_embed_learned is "
                                          r"\(1, 21, 32\), the model's is \(1, 21, 128\)"):
        checkpoint.load_model(tiny, state_of(tmp_path / "small.pth"), tmp_path / "small.pth")
    state = dict(tiny.state_dict())
    state["surplus"] = state.pop("z_proj.bias")
    with pytest.raises(FlowARError, match="z_proj.bias is missing, surplus is not in the model"):
        checkpoint.load_model(tiny, state, "x.pth")


class Payload:
    def __reduce__(self):
        return os.system, ("touch exploited",)


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Payload()}, "evil.pth")
    with pytest.raises(FlowARError, match="evil.pth: not a file of tensors"):
        state_of("evil.pth")
    assert not (tmp_path / "exploited").exists()


@pytest.mark.parametrize("name,content", [
    ("empty.pth", b""), ("text.pth", b"hello"), ("short.pth", b"PK\x03\x04" + b"x" * 50), ("bad.safetensors", b"\x08" * 30)])
def test_unreadable_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FlowARError, match=name):
        state_of(tmp_path / name)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FlowARError, match="nowhere.pth: no such checkpoint"):
        state_of(tmp_path / "nowhere.pth")
    with pytest.raises(FlowARError, match="no checkpoint-last.pth in this directory"):
        state_of(tmp_path)
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(FlowARError, match="x.pth: no FlowAR weights in this file"):
        state_of(tmp_path / "x.pth")


# ---- a run's checkpoints ---------------------------------------------------------------------------------------


def content(number=0):
    return {"model": {"class_emb.weight": torch.full((3, 2), float(number))}, "args": {"lr": 0.1, "scales": (1, 2)}, "epoch": number}


def keep(folder, *steps, keep=2):
    """Write checkpoints of these steps."""
    keeper = checkpoint.Keeper(folder, keep)
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
    assert found.pop("checksum") == checkpoint.content_hash(content(300)) and found["epoch"] == 300
    assert checkpoint.find(tmp_path).name == "checkpoint-000000300.pth"


def test_a_checkpoint_is_that_of_the_moment(tmp_path):
    value = content()
    keeper = checkpoint.Keeper(tmp_path, 1)
    keeper.save(value, 1)
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
    checkpoint.Keeper(tmp_path, 1, step=1)  # a run that goes on from step 1
    assert names(tmp_path)[:2] == ["checkpoint-000000001.pth", "checkpoint-000000002.pth.damaged"]
    with pytest.raises(FlowARError, match="checkpoint-000000002.pth.damaged: "):
        checkpoint.find(tmp_path / "checkpoint-000000002.pth.damaged")  # asked for by name there is nothing else


def test_later_checkpoints_are_set_aside_and_one_of_the_damaged(tmp_path):
    """A run that goes on from an older checkpoint loses none that is whole."""
    keep(tmp_path, 1, 2, 3, 4, 5, keep=5)
    for step in (3, 4):
        (tmp_path / f"checkpoint-{step:09d}.pth").write_bytes(b"torn")
    checkpoint.Keeper(tmp_path, 1, step=1)
    assert names(tmp_path) == ["checkpoint-000000001.pth", "checkpoint-000000002.pth.aside", "checkpoint-000000003.pth.damaged",
                               "checkpoint-000000005.pth.aside", checkpoint.LAST]


def test_where_all_are_damaged_nothing_starts_from_scratch(tmp_path):
    keep(tmp_path, 1, 2)
    for path in tmp_path.iterdir():
        path.write_bytes(b"x")
    with pytest.raises(FlowARError, match="checkpoint-000000001.pth: "):
        checkpoint.find(tmp_path)


def test_going_back_holds_before_the_first_save(tmp_path):
    """checkpoint-last.pth follows: it is no other name of one that was set aside."""
    keep(tmp_path, 1, 2)
    checkpoint.Keeper(tmp_path, 2, step=1)
    assert (tmp_path / checkpoint.LAST).samefile(tmp_path / "checkpoint-000000001.pth")
    assert checkpoint.find(tmp_path).name == "checkpoint-000000001.pth"


def test_fewer_are_kept_from_the_start(tmp_path):
    keep(tmp_path, 1, 2, 3, keep=3)
    checkpoint.Keeper(tmp_path, 1, step=3)
    assert names(tmp_path) == ["checkpoint-000000003.pth", checkpoint.LAST]


def test_one_run_writes_to_a_folder(tmp_path):
    held = checkpoint.lock(tmp_path, patience=0)
    other = subprocess.run([sys.executable, "-c", f"from util import checkpoint; checkpoint.lock({str(tmp_path)!r}, patience=0)"], cwd=ROOT,
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
    keeper = checkpoint.Keeper(tmp_path, 2, step=1)
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
    saved = checkpoint.snapshot(optimizer.state_dict())
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
