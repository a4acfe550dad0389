"""Caches of latents: what they hold, what they say of themselves, how they go on, and what is refused."""
import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import ROOT, call, make_project, run, train, write_digits
from PIL import Image
from safetensors.torch import load_file, save_file

from models import FlowARError
from scripts import benchmark  # as call() imports it
from models.vae import KL16_LATENT_SCALE, LatentScale
from models.vaes import load_vae, save_vae
from util.data import latents
from util.data import DataSettings, EpochSampler, Images, build_loader, open_data
from util.data.latents import NpzMoments, ShardedMoments, kind_of_cache, npz_latent_scale, read_index, verify_checksums


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("latents"))


def cache_command(project, folder, extra=""):
    return (f"scripts/cache_latents.py --data_path {project}/images --cached_path {folder} --vae_path {project}/vae.pth "
            f"--img_size 16 --shard_size 30 --num_workers 0 --device cpu {extra}")


def make(command):
    """call() for fixtures too."""
    with pytest.MonkeyPatch.context() as patch:
        call(patch, command)


@pytest.fixture(scope="module")
def shards(project):
    """80 images in shards of 30, 30 and 20."""
    make(cache_command(project, project / "shards", "--dtype float32"))
    return project / "shards"


@pytest.fixture(scope="module")
def npz(project):
    make(cache_command(project, project / "npz", "--format npz"))
    return project / "npz"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what is in it ---------------------------------------------------------------------------------------------


def test_shards_hold_the_moments_of_image_and_flipped_image(project, shards):
    vae = load_vae(project / "vae.pth")
    images = Images(project / "images" / "train", 16)
    number = {str(path).split("train/")[1]: i for i, (path, _) in enumerate(images.folder.samples)}
    seen = []
    for file in sorted(shards.glob("*.safetensors")):
        content = load_file(file)
        names = latents.read_texts(file, "names")
        seen += names
        for row in (0, len(names) - 1):
            image, label = images[(0, number[names[row]])]
            assert content["labels"][row] == label
            for variant, pixels in enumerate((image, image.flip(-1))):
                torch.testing.assert_close(content["moments"][row, variant], vae.encode(pixels[None]).parameters[0], atol=1e-5, rtol=1e-4)
    assert sorted(seen) == sorted(number) and len(set(load_file(shards / "shard-00000.safetensors")["labels"].tolist())) > 5


def test_index_says_what_the_cache_is(project, shards):
    index, vae = read_index(shards), load_vae(project / "vae.pth")
    assert index["images"] == 80 and index["classes"] == [str(i) for i in range(10)] and index["crops"] == "center"
    assert [shard["images"] for shard in index["shards"]] == [30, 30, 20]
    assert index["channels"] == 4 and index["stride"] == 4 and index["latent_scale"] == vae.latent_scale
    data = ShardedMoments(shards)
    mean, logvar = torch.stack([data[(0, i)][0] for i in range(80)]).chunk(2, dim=1)
    std = (mean.var(correction=0) + logvar.exp().mean()).sqrt()
    assert index["measured"]["scale"] == pytest.approx(1 / std.item(), rel=1e-4)
    assert index["measured"]["channel_mean"] == pytest.approx(mean.mean(dim=(0, 2, 3)).tolist(), abs=1e-5)
    verify_checksums(shards, index)


def test_float16_is_the_default_and_close(project, shards, tmp_path):
    make(cache_command(project, tmp_path / "half"))
    half, single = (load_file(folder / "shard-00001.safetensors")["moments"] for folder in (tmp_path / "half", shards))
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), single, atol=2e-3, rtol=2e-3)


def test_random_crops_of_the_recipe(project, tmp_path):
    make(cache_command(project, tmp_path / "crops", "--crops 3 --dtype float32"))
    vae = load_vae(project / "vae.pth")
    data, images = ShardedMoments(tmp_path / "crops", train=True), Images(project / "images" / "train", 16, train=True, flip=False)
    assert data.index["variants"] == 6
    content, names = load_file(tmp_path / "crops" / "shard-00000.safetensors"), latents.read_texts(tmp_path / "crops" / "shard-00000.safetensors", "names")
    index = [str(path).split("train/")[1] for path, _ in images.folder.samples].index(names[4])
    for crop in range(3):
        pixels = images[(crop, index)][0]
        torch.testing.assert_close(content["moments"][4, 2 * crop + 1], vae.encode(pixels.flip(-1)[None]).parameters[0], atol=1e-5, rtol=1e-4)
    seen = {data.variant(epoch, 4) for epoch in range(100)}
    assert seen == set(range(6))
    assert {ShardedMoments(tmp_path / "crops", train=True, flip=False).variant(epoch, 4) for epoch in range(50)} == {0, 2, 4}


def test_npz_and_shards_hold_the_same(project, shards, npz):
    files = NpzMoments(npz, (8, 4, 4))
    assert kind_of_cache(npz) == "npz" and npz_latent_scale(npz, 4) == load_vae(project / "vae.pth").latent_scale
    names = [str(path).split("npz/", 1)[1].removesuffix(".npz") for path, _ in files.folder.samples]
    content = load_file(shards / "shard-00002.safetensors")
    for row, name in enumerate(latents.read_texts(shards / "shard-00002.safetensors", "names")):
        moments, label = files[(0, names.index(name))]
        torch.testing.assert_close(content["moments"][row, 0], moments, atol=1e-5, rtol=1e-4)
        assert content["labels"][row] == label
    assert files.folder.samples[0][0].endswith("0/000.png.npz")  # MAR's naming
    train = NpzMoments(npz, (8, 4, 4), train=True)
    assert len({tuple(train[(epoch, 0)][0].flatten().tolist()) for epoch in range(20)}) == 2


def test_a_latent_scale_of_channels_and_positions_goes_with_the_cache(project, tmp_path, monkeypatch, capsys):
    """Into the index and back; it agrees with the latents, so no warning; a second run finds the cache finished."""
    vae = load_vae(project / "vae.pth")
    vae.latent_scale = LatentScale((((1.0,) * 4,) * 4, ((2.0,) * 4,) * 4, ((0.5,) * 4,) * 4, ((1.5,) * 4,) * 4), (0.0, 0.1, 0.2, 0.3))
    save_vae(vae, tmp_path / "vae.pth")
    command = cache_command(project, tmp_path / "cache").replace(f"{project}/vae.pth", f"{tmp_path}/vae.pth")
    for _ in range(2):
        call(monkeypatch, command)
        assert read_index(tmp_path / "cache")["latent_scale"] == vae.latent_scale
    printed = capsys.readouterr().out
    assert "the VAE's 4 x 4 x 4 numbers " in printed
    index = read_index(tmp_path / "cache")
    data = ShardedMoments(tmp_path / "cache")
    mean, logvar = torch.stack([data[(0, i)][0] for i in range(80)]).float().chunk(2, dim=1)
    spread = vae.latent_scale.normalize(mean + (logvar / 2).exp()) - vae.latent_scale.normalize(mean)
    std = (vae.latent_scale.normalize(mean).var(correction=0) + spread.square().mean()).sqrt().item()
    said = f"with it their std is {std:.4f}" if abs(1 / std - 1) > 0.1 else "latent scale"
    assert said in printed and index["images"] == 80
    call(monkeypatch, f"scripts/inspect_latents.py --cached_path {tmp_path}/cache --vae_path {tmp_path}/vae.pth --output {tmp_path}/a.png --device cpu")
    printed = capsys.readouterr().out
    row = next(line.split() for line in printed.splitlines() if line.startswith("      1 "))
    measured = index["measured"]
    assert "as if all positions of a channel were alike" in printed
    assert [float(part) for part in row[1:]] == pytest.approx(
        [2 * (measured["channel_mean"][1] - 0.1), 2 * measured["channel_std"][1]], abs=1e-3)


# ---- LightningDiT's ----------------------------------------------------------------------------------------------


@pytest.fixture
def lightning(tmp_path):
    """7, 5 and 3 latents of 6 classes in LightningDiT's files, and their statistics."""
    g = torch.Generator().manual_seed(0)
    for name, count in (("rank00_shard000", 7), ("rank00_shard001", 5), ("rank01_shard000", 3)):
        parts = {key: 3 * torch.randn(count, 4, 4, 4, generator=g) + 1 for key in ("latents", "latents_flip")}
        save_file({**parts, "labels": torch.arange(count) % 6}, tmp_path / f"latents_{name}.safetensors", {"total_size": str(count)})
    everything = torch.cat([load_file(file)["latents"] for file in sorted(tmp_path.glob("*.safetensors"))])
    torch.save({"mean": everything.mean(dim=(0, 2, 3), keepdim=True), "std": everything.std(dim=(0, 2, 3), keepdim=True)},
               tmp_path / "latents_stats.pt")
    return tmp_path


def test_lightning_latents_are_read_in_order_and_deterministic(lightning):
    data = latents.LightningLatents(lightning, train=True)
    files = [load_file(file) for file in sorted(lightning.glob("*.safetensors"))]
    assert len(data) == 15 and data.classes == list("012345") and data.identity()["counts"] == [4, 3, 3, 2, 2, 1]
    stored = [torch.cat([file[name] for file in files]) for name in ("latents", "latents_flip")]
    seen = set()
    for epoch in range(20):
        moments, label = data[(epoch, 8)]
        assert label == 1 and torch.equal(moments[:4], stored[data.variant(epoch, 8)][8]) and (moments[4:] == -30).all()
        seen.add(data.variant(epoch, 8))
    assert seen == {0, 1} and latents.LightningLatents(lightning).variant(3, 8) == 0
    assert sorted(data.order(0, 1)) == list(range(15)) and (np.diff(np.searchsorted(data.ends, data.order(0, 1), side="right")) != 0).sum() == 2
    scale = data.channel_scale()
    normal = scale.normalize(stored[0])
    torch.testing.assert_close(normal.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.std(dim=(0, 2, 3)), torch.ones(4))
    whole = data.identity()["sha256"]
    (lightning / "latents_rank01_shard000.safetensors").unlink()
    assert latents.LightningLatents(lightning).identity()["sha256"] != whole


def test_training_on_lightning_latents_needs_their_scale(lightning, tmp_path):
    shared = f"--cached_path {lightning} --no_val --batch_size 5 --epochs 1 --warmup_epochs 0 --class_num 10 --data_path nowhere --vae_path nowhere.pth"
    with pytest.raises(FlowARError, match="does not tell the scale of its latents: give the VAE that they are of .*, or --latent_norm channel"):
        train(lightning, tmp_path / "run", shared)
    content = train(lightning, tmp_path / "run", f"{shared} --latent_norm channel --resume {tmp_path}/run")
    assert content["vae"]["latent_scale"] == tuple(latents.LightningLatents(lightning).channel_scale()) and content["data"]["images"] == 15
    (lightning / "latents_stats.pt").unlink()
    with pytest.raises(FlowARError, match="latents_stats.pt: no such file, from which --latent_norm channel takes"):
        train(lightning, tmp_path / "other", f"{shared} --latent_norm channel")
    torch.save({"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 4, 1, 1)}, lightning / "latents_stats.pt")
    with pytest.raises(FlowARError, match="latents_stats.pt: mean is 1 x 3 x 1 x 1, expected a tensor of 1 x 4 x 1 x 1"):
        latents.LightningLatents(lightning).channel_scale()
    with pytest.raises(FlowARError, match="its latents are 4 x 4 x 4, but --vae_embed_dim is 4 and --img_size / --vae_stride 8"):
        open_data(lightning, DataSettings(32, 4, 4), cached=True)


@pytest.mark.parametrize("change,message", [
    (dict(labels=torch.full((5,), -1)), "its labels are not 5 numbers of 0 to"), (dict(labels=torch.zeros(4, dtype=torch.int64)), "its labels are not 5"),
    (dict(labels=torch.full((5,), 2**40)), "its labels are not 5"), (dict(latents_flip=torch.zeros(4, 4, 4, 4)), "latents and latents_flip are 5 x 4"),
    (dict(latents=torch.zeros(5, 4, 4, 8), latents_flip=torch.zeros(5, 4, 4, 8)), "its latents are 4 x 4 x 8, those of .*rank00_shard000.safetensors 4 x 4 x 4"),
    (None, "cannot be read")])
def test_damaged_lightning_latents_are_refused_by_name(lightning, change, message):
    file = lightning / "latents_rank00_shard001.safetensors"
    if change is None:
        file.write_bytes(file.read_bytes()[:-9])
    else:
        save_file({**load_file(file), **change}, file)
    with pytest.raises(FlowARError, match=f"latents_rank00_shard001.safetensors: {message}"):
        latents.LightningLatents(lightning)


# ---- how it is read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_reads_everything_once_shard_by_shard(shards, workers):
    data = ShardedMoments(shards, train=True)
    labels = torch.cat([labels for _, labels in build_loader(data, 10, train=True, num_workers=workers)])
    assert labels.bincount().tolist() == [8] * 10
    order = data.order(0, 3)
    assert sorted(order) == list(range(80)) and not np.array_equal(order, data.order(0, 4))
    blocks = np.searchsorted(data.ends, order, side="right")
    assert (np.diff(blocks) != 0).sum() == 2  # three shards, one after the other
    for index in (0, 29, 30, 79):  # the row of an index is found across the shards' borders
        number = int(np.searchsorted(data.ends, index, side="right"))
        expected = load_file(shards / f"shard-0000{number}.safetensors")["moments"][index - 30 * number, 0]
        assert torch.equal(ShardedMoments(shards)[(0, index)][0], expected)


def test_order_depends_on_seed_and_epoch_and_begins_anywhere(shards):
    data = ShardedMoments(shards, train=True)

    def keys(world, start=0):
        samplers = [EpochSampler(80, rank=r, world_size=world, seed=5, shuffle=True, order=data.order) for r in range(world)]
        for sampler in samplers:
            sampler.set_epoch(2, start=start)
        assert sum(map(len, samplers)) == 80 - start
        return [key for group in zip(*samplers) for key in group]

    assert keys(1) == keys(2) == keys(4)
    assert keys(2, start=24) == keys(1)[24:]


def test_one_shard_is_open_at_a_time(shards):
    data = ShardedMoments(shards)
    for index in (0, 79, 31):
        data[(0, index)]
        assert data.opened[0] == min(index // 30, 2)


def test_training_on_shards_needs_no_vae_and_takes_its_geometry(project, shards, tmp_path, capsys):
    train(project, tmp_path, f"--cached_path {shards} --cached_val_path {shards} --use_cached --vae_path nowhere.pth --data_path nowhere")
    printed = capsys.readouterr().out
    assert "80 cached latents" in printed and "no VAE at nowhere.pth" in printed


def test_going_on_from_a_cache_or_from_images_is_no_other_option(project, shards, npz, tmp_path, capsys):
    for epochs, source in enumerate(("", f"--cached_path {shards}", f"--cached_path {npz}", ""), start=1):
        train(project, tmp_path, f"--epochs {epochs} --warmup_epochs 0 --resume {tmp_path} {source}")
    said = capsys.readouterr().out
    assert said.count("with other options than before: epochs") == 3 and "background" not in said
    train(project, tmp_path, f"--epochs 5 --warmup_epochs 0 --resume {tmp_path} --background black")
    assert "background (255, 255, 255) -> (0, 0, 0)" in capsys.readouterr().out


# ---- interrupted -------------------------------------------------------------------------------------------------


def test_killed_at_any_time_it_ends_with_the_same_files(project, shards, tmp_path):
    folder = tmp_path / "killed"
    command = [sys.executable, *cache_command(project, folder, "--dtype float32").split()]
    for name in ("shard-00000.safetensors", "shard-00001.safetensors"):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        while not (folder / name).is_file() and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (folder / name).is_file()
        if not (folder / "index.json").is_file():
            with pytest.raises(FlowARError, match="not complete; run scripts/cache_latents.py again"):
                kind_of_cache(folder)
    kept = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    make(cache_command(project, folder, "--dtype float32"))
    assert contents(folder) == contents(shards)
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == kept


def test_two_processes_write_the_same_moments(project, shards, tmp_path):
    run(cache_command(project, tmp_path / "two", "--dtype float32"), processes=2)
    for file in sorted(shards.glob("*.safetensors")):
        a, b = load_file(file), load_file(tmp_path / "two" / file.name)
        torch.testing.assert_close(a["moments"], b["moments"], atol=1e-5, rtol=1e-4)
        assert torch.equal(a["names"], b["names"]) and torch.equal(a["labels"], b["labels"])


@pytest.mark.parametrize("method", ["forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_may_be_started_in_any_way(project, shards, tmp_path, method):
    command = cache_command(project, tmp_path / "cache", "--dtype float32").replace("--num_workers 0", "--num_workers 1")
    run(f"{ROOT}/tests/start_method.py {method} {command}")
    assert contents(tmp_path / "cache") == contents(shards)


def test_a_damaged_shard_is_named_and_written_again(project, shards, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(shards, folder)
    file = folder / "shard-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(FlowARError, match="shard-00001.safetensors: its SHA-256 is .* damaged"):
        train(project, tmp_path / "out", f"--cached_path {folder}")
    file.write_bytes(content[:-1])
    with pytest.raises(FlowARError, match="shard-00001.safetensors: .* bytes, expected .*: truncated"):
        train(project, tmp_path / "out", f"--cached_path {folder}")
    file.unlink()
    with pytest.raises(FlowARError, match="shard-00001.safetensors: this shard is missing"):
        train(project, tmp_path / "out", f"--cached_path {folder}")
    make(cache_command(project, folder, "--dtype float32"))
    assert contents(folder) == contents(shards)


def test_an_unfinished_npz_cache_is_not_taken_for_a_whole_one(project, npz, tmp_path):
    folder = tmp_path / "npz"
    shutil.copytree(npz, folder)
    info, lost, empty = folder / "latents.json", folder / "3" / "001.png.npz", folder / "4" / "001.png.npz"
    lost.unlink()
    empty.write_bytes(b"")  # as a power cut may leave it
    info.write_text(json.dumps({**json.loads(info.read_text()), "complete": False}))
    with pytest.raises(FlowARError, match="not complete"):
        npz_latent_scale(folder, 4)
    make(cache_command(project, folder, "--format npz"))
    with np.load(lost) as file, np.load(npz / "3" / "001.png.npz") as expected:
        np.testing.assert_allclose(file["moments_flip"], expected["moments_flip"], atol=1e-5)
    assert npz_latent_scale(folder, 4) and empty.stat().st_size == (npz / "4" / "001.png.npz").stat().st_size


# ---- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra,message", [
    ("--img_size 32", "this cache has img_size 16, but --img_size is 32"),
    ("--vae_stride 2", "--vae_stride is 2, but the VAE .*/vae.pth has 4"),
    ("--vae_embed_dim 8", "--vae_embed_dim is 8, but the VAE .*/vae.pth has 4"),
    ("--class_num 7", "the training set has 10 classes .0, 1, 2 and 7 more., but the model has 7 .--class_num"),
])
def test_training_refuses_a_cache_of_other_settings(project, shards, tmp_path, extra, message):
    with pytest.raises(FlowARError, match=message):
        train(project, tmp_path / "out", f"--cached_path {shards} {extra}")


def test_training_refuses_a_cache_of_another_vae(project, shards, tmp_path):
    content = torch.load(project / "vae.pth", weights_only=True)
    content["model"]["encoder.conv_in.bias"] += 1
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(FlowARError, match="shards: its VAE is kl16 .tensors .*, but --vae_path .*other.pth has tensors"):
        train(project, tmp_path / "out", f"--cached_path {shards} --vae_path {tmp_path}/other.pth")


@pytest.mark.parametrize("extra,message", [
    ("--img_size 8", "made with img_size 16, now it is 8"), ("--dtype float16", "made with dtype float32, now it is float16"),
    ("--crops 2", "made with crops center, now it is 2")])
def test_caches_are_not_mixed(project, shards, extra, message):
    with pytest.raises(FlowARError, match=message):
        make(cache_command(project, shards, f"--dtype float32 {extra}"))


@pytest.mark.parametrize("damage,message", [
    (lambda index: index.pop("shards"), "not an index of latents"), (lambda index: index.update(format="x"), "format is 'x'"),
    (lambda index: index.update(images=81), "do not add up to 81"),
    (lambda index: index["shards"][0].update(file="../shard.safetensors"), "lies outside of the cache")])
def test_a_bad_index_is_refused(shards, tmp_path, damage, message):
    folder = tmp_path / "bad"
    shutil.copytree(shards, folder)
    index = json.loads((folder / "index.json").read_text())
    damage(index)
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(FlowARError, match=message):
        read_index(folder)


def test_caches_of_mar_are_kl16(tmp_path):
    (tmp_path / "n01440764").mkdir()
    np.savez(tmp_path / "n01440764" / "x.JPEG.npz", moments=np.zeros((32, 16, 16), np.float32))
    assert kind_of_cache(tmp_path) == "npz" and npz_latent_scale(tmp_path, 16) == KL16_LATENT_SCALE
    with pytest.raises(FlowARError, match="--vae_embed_dim is 4"):
        npz_latent_scale(tmp_path, 4)


@pytest.mark.parametrize("damage", ["truncate", "pickle", "key", "shape"])
def test_damaged_npz_latents_are_named(tmp_path, damage):
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "x.npz"
    if damage == "pickle":
        np.savez(path, moments=np.array([{"a": 1}], dtype=object))
    else:
        np.savez(path, **{"other" if damage == "key" else "moments": np.zeros((8, 4, 5), np.float32)})
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FlowARError, match=r"x.npz: moments is \(8, 4, 5\)" if damage == "shape" else "x.npz: cannot read moments"):
        NpzMoments(tmp_path, (8, 4, 4))[(0, 0)]


# ---- unreadable images -------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(project, tmp_path):
    shutil.copytree(project / "images", tmp_path / "images")
    shutil.copy(project / "vae.pth", tmp_path / "vae.pth")
    (tmp_path / "images" / "train" / "4" / "003.png").write_bytes(b"no image")
    return tmp_path


def test_bad_images_are_skipped_and_counted_in_training(spoiled, capsys):
    with pytest.raises(FlowARError, match="4/003.png: cannot be read as an image"):
        train(spoiled, spoiled / "out")
    train(spoiled, spoiled / "out", "--on_bad_image skip")
    captured = capsys.readouterr()
    assert "2 times an image could not be read" in captured.out and "4/003.png" in captured.err


def test_bad_images_are_left_out_of_a_cache(spoiled, monkeypatch, capsys):
    with pytest.raises(FlowARError, match="images/train: 1 of 80 images cannot be read; they are named above; mend or remove them"):
        call(monkeypatch, cache_command(spoiled, spoiled / "cache"))
    assert "4/003.png: cannot be read as an image" in capsys.readouterr().out
    torn = spoiled / "images" / "train" / "4" / "003.png"
    torn.write_bytes((torn.parent / "002.png").read_bytes()[:-30])  # its header is good
    with pytest.raises(FlowARError, match="4/003.png: cannot be read as an image .*; mend or remove it, or --on_bad_image skip"):
        make(cache_command(spoiled, spoiled / "cache"))
    call(monkeypatch, cache_command(spoiled, spoiled / "cache2", "--on_bad_image skip"))
    index = read_index(spoiled / "cache2")
    assert index["images"] == 79 and len(index["skipped"]) == 1 and "4/003.png" in index["skipped"][0] and "mend" not in index["skipped"][0]
    call(monkeypatch, cache_command(spoiled, spoiled / "cache2", "--on_bad_image skip --verify"))
    assert "all images are those that it was made of" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["shards", "npz"])
def test_a_finished_cache_notices_that_its_images_changed(project, tmp_path, monkeypatch, capsys, form):
    write_digits(tmp_path / "images", 2, splits=("train",))
    images, odd = tmp_path / "images" / "train", b"n\xe9w\nline .png"
    Image.new("RGBA", (20, 20), (255, 0, 0, 128)).save(images / "3" / os.fsdecode(odd))
    (images / "55").mkdir()
    shutil.copy(project / "vae.pth", tmp_path)
    command = cache_command(tmp_path, tmp_path / "cache", f"--format {form}")
    call(monkeypatch, command)
    said = capsys.readouterr().out
    assert "21 images in " in said and "1 of 11 class folders hold no image (55)" in said and "1 with transparency" in said
    if form == "shards":
        data = ShardedMoments(tmp_path / "cache")
        assert data.index["converted"] == {"with transparency over the background": 1} and data.index["left_out"] == {}
        names = [os.fsencode(name) for name in latents.read_texts(tmp_path / "cache" / "shard-00000.safetensors", "names")]
        assert b"3/" + odd in names and len(names) == 21
    else:
        data = NpzMoments(tmp_path / "cache", (8, 4, 4))
        assert (tmp_path / "cache" / "3" / os.fsdecode(odd + b".npz")).is_file()
    origin = Images(images, 16).identity()
    assert len(data.classes) == 11 and data.identity()["counts"] == origin["counts"] == [2, 2, 2, 3, 2, 2, 0, 2, 2, 2, 2]
    assert form == "npz" or data.identity() == origin  # going on from images to their cache is no other data

    first = images / "0" / "000.png"
    content, times = first.read_bytes(), (first.stat().st_atime_ns, first.stat().st_mtime_ns)
    os.utime(first, (0, 0))
    call(monkeypatch, f"{command} {'--verify' * (form == 'shards')}")
    said = capsys.readouterr().out
    assert ("images were written since this cache was made" in said) == (form == "npz")  # --verify knows better
    if form == "shards":
        assert "all images are those that it was made of" in said
        first.write_bytes(content[:-1] + b"x")
        os.utime(first, ns=times)
        with pytest.raises(FlowARError, match="1 images are not those that it was made of: 0/000.png"):
            call(monkeypatch, f"{command} --verify")
    for verify in ("", "--verify")[:1 + (form == "shards")]:
        with pytest.raises(FlowARError, match="this cache was made with background .255, 255, 255., now it is .0, 0, 0."):
            call(monkeypatch, f"{command} --background black {verify}")
    first.rename(images / "0" / "other.png")
    if form == "shards":
        capsys.readouterr()
        with pytest.raises(FlowARError, match="cache: the images are not those of this cache: 1 were added .0/other.png., 1 were removed .0/000.png.; choose another"):
            call(monkeypatch, f"{command} --verify")
        assert "all images are" not in capsys.readouterr().out
    with pytest.raises(FlowARError, match="the images are not those of this cache .names or sizes changed since"):
        call(monkeypatch, command)


def test_inspection(project, shards, tmp_path, capsys):
    make(f"scripts/inspect_latents.py --cached_path {shards} --data_path {project}/images --vae_path {project}/vae.pth "
         f"--output {tmp_path}/latents.png --device cpu")
    index, said = read_index(shards), capsys.readouterr().out
    assert f"{index['measured']['scale']:.4f}" in said and "80 images, center crops" in said
    picture = Image.open(tmp_path / "latents.png")
    assert picture.size[0] > 8 * 64 and picture.size[1] > 3 * 64


def test_benchmark_of_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "make_jpegs", functools.partial(benchmark.make_jpegs, count=80, size=(100, 75)))
    command = (f"scripts/benchmark.py data --latents 600 --scratch {tmp_path}/scratch --workers 1 --seconds 1 --vae_ch 16 --vae_ch_mult 1,1,2 "
               "--vae_embed_dim 4 --vae_stride 4 --img_size 16 --device cpu")
    call(monkeypatch, command)
    said = capsys.readouterr().out
    result = json.loads(said[said.index("{"):])
    assert [row["kind"] for row in result["rows"]] == ["shards", "npz", "jpeg", "zip", "tar", *["parquet"] * bool(importlib.util.find_spec("datasets"))] and result["ratio_shards_npz"]["1"] > 0
    with pytest.raises(FlowARError, match="--scratch .*: holds {'latents': 600, .*}, asked for is {'latents': 700, "):
        call(monkeypatch, command.replace("600", "700"))


def test_images_with_a_stray_npz_or_shard_stay_images(project, tmp_path):
    shutil.copytree(project / "images" / "train", tmp_path / "train")
    np.savez(tmp_path / "train" / "0" / "features.npz", moments=np.zeros((8, 4, 4), np.float32))
    (tmp_path / "train" / "shard-00000.safetensors").write_bytes(b"")
    settings = DataSettings(16, 4, 4)
    data = open_data(tmp_path / "train", settings)
    assert isinstance(data, Images) and len(data) == 80
