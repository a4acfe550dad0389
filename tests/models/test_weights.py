"""Weights files: which weights are read and that it is told, nothing runs from a file, damage ends in one line."""
import argparse
import errno
import os
import pickle
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import SCALES, small_vae
from safetensors.torch import save_file

from models import AutoencoderKL, FlowARError, build_model, load_flowar, load_vae
from models.vaes import read_vae, save_vae
from models.weights import content_hash, file_hash, find_model, read_file, tensors_hash, write_file, write_safetensors, writing

VAE = {"vae_embed_dim": 4, "vae_stride": 4}
torch.manual_seed(0)
EMA = build_model("flowar_tiny", img_size=16, scale=SCALES, class_num=10, **VAE).state_dict()
RAW = {name: value if name == "mask" or name.endswith("freqs") else value + 1 for name, value in EMA.items()}


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], value) for name, value in other.items())


# ---- which weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content,choice,expected,line", [
    (EMA, None, EMA, "weights, unknown if EMA or raw"),
    ({"model": RAW, "model_ema": EMA, "epoch": 3}, None, EMA, "EMA weights under 'model_ema'"),
    ({"model": RAW, "model_ema": EMA}, "ema", EMA, "EMA weights under 'model_ema'"),
    ({"model": RAW, "model_ema": EMA}, "raw", RAW, "raw weights under 'model'"),
    ({"model": RAW, "model_ema": EMA}, "raw first", RAW, "raw weights under 'model'"),
    ({"state_dict": RAW, "ema": EMA}, None, EMA, "EMA weights under 'ema'"),
    ({"state_dict": RAW, "ema": 0.9999}, None, RAW, "raw weights under 'state_dict'"),
    ({"ema": EMA}, "raw first", EMA, "EMA weights under 'ema'"),
    ({"model": RAW, "best": EMA}, "best", EMA, "weights, unknown if EMA or raw under 'best'"),
    (under("module.", EMA), None, EMA, "weights, unknown if EMA or raw"),
    ({"model": under("module._orig_mod.", RAW)}, None, RAW, "raw weights under 'model'"),
    ({"model": {name.replace("attn.", "attn._orig_mod."): value for name, value in RAW.items()}}, None, RAW, "raw weights under 'model'")])
def test_which_weights_are_read_is_told(content, choice, expected, line):
    weights = find_model(content, "x.pth", choice)
    assert same(weights.tensors, expected) and weights.describe() == line


@pytest.mark.parametrize("content,choice,message", [
    ({"ema": EMA}, "raw", "no raw weights of a FlowAR found; the file contains ema: expected a bare state dict, or one under model_ema, "),
    ({"model": RAW, "ema": {"shadow": EMA}}, None, "no FlowAR weights under 'ema': class_emb.weight is missing (choose another key"),
    (torch.zeros(2), None, "weights of a FlowAR found; the file contains nothing")])
def test_a_file_without_the_weights_that_are_asked_for_is_refused(content, choice, message):
    with pytest.raises(FlowARError, match=re.escape(message)):
        find_model(content, "x.pth", choice)


def test_a_file_is_loaded_as_the_average_or_raw(tmp_path, capsys):
    """The release's own checkpoints hold their options as argparse.Namespace."""
    content = {"model": {**RAW, "loss.w": torch.zeros(2)}, "model_ema": EMA, "args": argparse.Namespace(**VAE)}
    torch.save(content, tmp_path / "x.pth")
    assert same(load_flowar(tmp_path / "x.pth").state_dict(), EMA)
    assert same(load_flowar(tmp_path / "x.pth", "raw").state_dict(), RAW)
    assert capsys.readouterr().err.splitlines() == [f"{tmp_path}/x.pth: EMA weights under 'model_ema'",
                                                    f"{tmp_path}/x.pth: raw weights under 'model'; not used: loss.w"]


@pytest.mark.parametrize("changes,message", [
    ({"z_proj.bias": None}, "1 tensors do not fit the model: z_proj.bias is missing"),
    ({"z_proj.bias": torch.zeros(3)}, "1 tensors do not fit the model: z_proj.bias is (3,), the model's is (128,)"),
    ({"z_proj.bias": torch.zeros(128, dtype=torch.int8)}, "z_proj.bias is torch.int8, the model's is torch.float32"),
    ({"flownet.res_blocks.0.extra.weight": torch.zeros(2)}, "flownet.res_blocks.0.extra.weight is not in the model"),
    ({"mask_token": torch.zeros(2)}, "mask_token is not in the model")])
def test_tensors_of_another_network_are_refused_by_name(tmp_path, changes, message):
    state = {name: value for name, value in {**EMA, **changes}.items() if value is not None}
    torch.save({"model": state, "args": VAE}, tmp_path / "x.pth")
    with pytest.raises(FlowARError, match=re.escape(f"{tmp_path}/x.pth: ") + ".*" + re.escape(message)):
        load_flowar(tmp_path / "x.pth")


# ---- files -----------------------------------------------------------------------------------------------------------


def test_safetensors_whatever_the_suffix_and_files_of_before_pytorch_1_6(tmp_path):
    save_file(EMA, tmp_path / "x.pth")
    assert same(read_file(tmp_path / "x.pth"), EMA)
    write_safetensors(EMA, {"args": VAE, "weights_key": "model_ema"}, tmp_path / "x.safetensors")
    content = read_file(tmp_path / "x.safetensors")
    assert content["args"] == VAE and same(content["model_ema"], EMA)
    torch.save(EMA, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(read_file(tmp_path / "old.pth"), EMA)


def test_a_file_system_that_maps_and_syncs_nothing_has_no_modes_and_renames_over_no_file(tmp_path, monkeypatch):
    def fail(error):
        return mock.Mock(side_effect=error)

    def replace(path, name):
        if name.exists():
            raise FileExistsError(errno.EEXIST, "File exists")
        path.rename(name)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", fail(RuntimeError("unable to mmap 5 bytes: No such device (19)")))
    monkeypatch.setattr(os, "chmod", fail(PermissionError(errno.EPERM, "Operation not permitted")))
    for error in (errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
        monkeypatch.setattr(os, "fsync", fail(OSError(error, "no fsync")))
        write_file({"model": EMA}, tmp_path / "x.pth")
        write_safetensors(EMA, {"args": VAE, "weights_key": "model"}, tmp_path / "x.safetensors")
        for name in ("x.pth", "x.safetensors"):
            assert same(read_file(tmp_path / name)["model"], EMA)
    monkeypatch.setattr(os, "fsync", fail(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(FlowARError, match="x.pth: cannot be written .*Input/output error"):
        write_file({}, tmp_path / "x.pth")


class Payload:
    def __reduce__(self):
        return os.system, ("touch exploited",)


@pytest.mark.parametrize("write", [lambda file: torch.save({"model": Payload()}, file), lambda file: file.write(pickle.dumps(Payload())),
                                   lambda file: torch.save(Payload(), file, _use_new_zipfile_serialization=False)])
def test_a_hostile_pickle_runs_nothing(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    with open("x.pth", "wb") as file:
        write(file)
    with pytest.raises(FlowARError, match="^x.pth: cannot be read: ") as error:
        read_file("x.pth")
    assert "\n" not in str(error.value) and not (tmp_path / "exploited").exists()


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("length", [60, 100000])
def test_a_truncated_download_ends_in_one_line(tmp_path, name, length):
    torch.save(EMA, tmp_path / name) if name == "x.pth" else save_file(EMA, tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:length])
    with pytest.raises(FlowARError, match=f"{name}: cannot be read: truncated .download it again., or not a file of tensors") as error:
        read_file(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content,message", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 687430000\n", "a Git LFS pointer, not the file itself: run git lfs install"),
    (b"<!DOCTYPE html>\n<html>", "not a file of tensors")])
def test_what_a_server_answers_in_place_of_a_file_ends_in_one_line(tmp_path, content, message):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(FlowARError, match=f"x.pth: .*{message}"):
        read_file(tmp_path / "x.pth")


def test_hashes_are_those_of_before(tmp_path):
    """Caches, statistics and reports hold them."""
    state = {"b": torch.arange(4.0), "a": torch.tensor([[1, 2]], dtype=torch.int16)}
    (tmp_path / "x").write_bytes(b"abc")
    assert file_hash(tmp_path / "x").startswith("ba7816bf8f01cfea")
    assert tensors_hash(state).startswith("9d5de7febb78fca5")
    assert content_hash({"s": state, "n": (1, 0.5, None, "x")}).startswith("048a337e1ecbf0b0")


@pytest.mark.parametrize("error", [KeyboardInterrupt, FlowARError, OSError])
def test_a_file_that_is_not_written_to_its_end_is_not_there(tmp_path, error):
    (tmp_path / "kept").write_bytes(b"before")
    with pytest.raises(FlowARError if error is OSError else error), writing(tmp_path / "kept") as file:
        file.write(b"half")
        raise error("x")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept").read_bytes() == b"before"


# ---- VAEs --------------------------------------------------------------------------------------------------------


def test_a_vaes_file_with_more_than_the_vae(tmp_path, monkeypatch):
    """KL-16's keys of its training loss; without a configuration, its own or a stranger's, the tensors tell it."""
    vae, path = small_vae(), tmp_path / "x.ckpt"
    save_vae(vae, path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert same(load_vae("~/x.ckpt").state_dict(), vae.state_dict())
    state, config = (torch.load(path, weights_only=True)[name] for name in ("model", "config"))
    more = {"loss.logvar": torch.zeros(1), "loss.d.w": torch.zeros(2)}
    for content, line in (({"model": state}, None), (under("module.", state), None),
                          ({"model": {**state, **more}}, "raw weights under 'model'; not used: loss.logvar, loss.d.w"),
                          ({"model": {name: value + 1 for name, value in state.items()}, "ema": state}, "EMA weights under 'ema'")):
        torch.save({**content, "config": config} if "model" in content else content, path)
        opened, notes = read_vae(path)
        assert same(opened.state_dict(), vae.state_dict()) and opened.config == vae.config
        assert [note for note in notes if not note.startswith("warning")] == ([f"{path}: {line}"] if line else [])
    torch.save({"state_dict": state, "config": {"optimizer": "adam"}}, path)
    opened, notes = read_vae(path)
    assert opened.config == vae.config and len(notes) == 1
    assert notes[0].startswith(f"warning: {path} does not tell its latent scale: KL-16's is taken, 0.2325; ")


def test_a_vae_of_other_tensors_is_refused(tmp_path):
    state = AutoencoderKL(ch=16).state_dict()
    del state["quant_conv.bias"]
    torch.save({"model": state}, tmp_path / "x.ckpt")
    with pytest.raises(FlowARError, match="x.ckpt: 1 tensors do not fit the VAE: quant_conv.bias is missing"):
        AutoencoderKL(ch=16, ckpt_path=tmp_path / "x.ckpt")
    torch.save({"model": {**small_vae().state_dict(), "quant_conv.lora": torch.zeros(1)}}, tmp_path / "x.ckpt")
    with pytest.raises(FlowARError, match="tensors do not fit the VAE: quant_conv.lora is not in the VAE"):
        load_vae(tmp_path / "x.ckpt")
