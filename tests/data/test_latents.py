"""Caches of latents: what they hold, what they say of themselves, how they go on, and what is refused."""
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import call, make_project, run, train, write_digits
from latent_caches import cache_command, make
from PIL import Image
from safetensors.torch import load_file
from scripts import cache_latents

import seams
from models import FlowARError
from models.vae import LatentScale
from models.vaes import load_vae, save_vae
from models.weights import file_hash
from util.data import EpochSampler, Images, build_loader, latents
from util.data.latents import ShardedMoments
from util.data.other_latents import NpzMoments
from util.data.source import check_cache, open_latents
from util.options import TrainingOptions


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def shards(project):
    """80 images in shards of 30, 30 and 20."""
    make(cache_command(project, project / "shards", "--dtype float32"))
    return project / "shards"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what is in it ---------------------------------------------------------------------------------------------


def test_shards_hold_the_moments_of_image_and_flipped_image(project, shards):
    vae = load_vae(project / "vae.pth")
    images = Images(project / "images" / "train", 16)
    number = {images.listing.name(i): i for i in range(len(images))}
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
    index, vae = ShardedMoments(shards).index, load_vae(project / "vae.pth")
    assert index["images"] == 80 and index["classes"] == [str(i) for i in range(10)] and index["crops"] == "center"
    assert [shard["images"] for shard in index["shards"]] == [30, 30, 20]
    assert index["channels"] == 4 and index["stride"] == 4 and index["latent_scale"] == vae.latent_scale
    data = ShardedMoments(shards)
    mean, logvar = torch.stack([data[(0, i)][0] for i in range(80)]).chunk(2, dim=1)
    std = (mean.var(correction=0) + logvar.exp().mean()).sqrt()
    assert index["measured"]["scale"] == pytest.approx(1 / std.item(), rel=1e-4)
    assert index["measured"]["channel_mean"] == pytest.approx(mean.mean(dim=(0, 2, 3)).tolist(), abs=1e-5)
    assert [shard["sha256"] for shard in index["shards"]] == [file_hash(shards / shard["file"]) for shard in index["shards"]]


def test_random_crops_of_the_recipe(project, tmp_path):
    make(cache_command(project, tmp_path / "crops", "--crops 3 --dtype float32"))
    vae = load_vae(project / "vae.pth")
    data, images = ShardedMoments(tmp_path / "crops", train=True), Images(project / "images" / "train", 16, train=True, flip=False)
    assert data.index["variants"] == 6
    content, names = load_file(tmp_path / "crops" / "shard-00000.safetensors"), latents.read_texts(tmp_path / "crops" / "shard-00000.safetensors", "names")
    index = [images.listing.name(i) for i in range(len(images))].index(names[4])
    for crop in range(3):
        pixels = images[(crop, index)][0]
        torch.testing.assert_close(content["moments"][4, 2 * crop + 1], vae.encode(pixels.flip(-1)[None]).parameters[0], atol=1e-5, rtol=1e-4)
    seen = {data.variant(epoch, 4) for epoch in range(100)}
    assert seen == set(range(6))
    assert {ShardedMoments(tmp_path / "crops", train=True, flip=False).variant(epoch, 4) for epoch in range(50)} == {0, 2, 4}


def test_without_flipped_copies(project, tmp_path, monkeypatch):
    """--no_flip stores half of the numbers, the same ones; a training that flips is refused."""
    make(cache_command(project, tmp_path / "crops", "--crops 3"))
    make(cache_command(project, tmp_path / "half", "--crops 3 --no_flip"))
    whole, half = (load_file(tmp_path / name / "shard-00000.safetensors")["moments"] for name in ("crops", "half"))
    torch.testing.assert_close(half, whole[:, ::2], atol=2e-3, rtol=2e-3)  # batches of another size, float16
    data = [ShardedMoments(tmp_path / name, train=True, flip=False) for name in ("crops", "half")]
    assert all(data[0].variant(epoch, 4) == 2 * data[1].variant(epoch, 4) for epoch in range(20))
    with pytest.raises(FlowARError, match="this cache was made with --no_flip: train with --no_flip"):
        ShardedMoments(tmp_path / "half", train=True)
    with pytest.raises(FlowARError, match="half: this cache was made with --no_flip; use the same"):
        call(monkeypatch, cache_command(project, tmp_path / "half", "--crops 3"))


def test_a_latent_scale_of_channels_and_positions_goes_with_the_cache(project, tmp_path, monkeypatch):
    """Into the index and back; a second run finds the cache finished."""
    vae = load_vae(project / "vae.pth")
    vae.latent_scale = LatentScale((((1.0,) * 4,) * 4, ((2.0,) * 4,) * 4, ((0.5,) * 4,) * 4, ((1.5,) * 4,) * 4), (0.0, 0.1, 0.2, 0.3))
    save_vae(vae, tmp_path / "vae.pth")
    command = cache_command(project, tmp_path / "cache").replace(f"{project}/vae.pth", f"{tmp_path}/vae.pth")
    for _ in range(2):
        call(monkeypatch, command)
        data = ShardedMoments(tmp_path / "cache")
        assert data.index["latent_scale"] == data.origin.latent_scale == vae.latent_scale
    assert data[(0, 0)][0].dtype == torch.float16  # the default


# ---- how it is read ----------------------------------------------------------------------------------------------


def test_an_epoch_reads_everything_once_shard_by_shard(shards):
    data = ShardedMoments(shards, train=True)
    labels = torch.cat([labels for _, labels in build_loader(data, 10, train=True, num_workers=2)])
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
        samplers = [EpochSampler(80, rank=r, world_size=world, seed=5, train=True, order=data.order) for r in range(world)]
        for sampler in samplers:
            sampler.set_epoch(2, start=start)
        assert sum(map(len, samplers)) == 80 - start
        return [key for group in zip(*samplers) for key in group]

    assert keys(1) == keys(2) == keys(4)
    assert keys(2, start=24) == keys(1)[24:]


def test_training_on_shards_needs_no_vae_and_takes_its_geometry(project, shards, tmp_path, capsys):
    train(project, tmp_path, f"--epochs 1 --batch_size 40 --cached_path {shards} --cached_val_path {shards} --use_cached --vae_path nowhere.pth "
                             "--data_path nowhere")
    printed = capsys.readouterr().out
    assert "80 cached latents" in printed and "no VAE found at nowhere.pth" in printed


def test_going_on_from_a_cache_or_from_images_is_no_other_option(project, shards, tmp_path, capsys):
    for epochs, source in enumerate(("", f"--cached_path {shards}"), start=1):
        train(project, tmp_path, f"--epochs {epochs} --warmup_epochs 0 --batch_size 80 --resume {tmp_path} {source}")
    said = capsys.readouterr().out
    assert said.count("with other options than before") == 1 and "epochs 1 -> 2" in said and "background" not in said
    train(project, tmp_path, f"--epochs 3 --warmup_epochs 0 --batch_size 80 --resume {tmp_path} --background black")
    assert "background (255, 255, 255) -> (0, 0, 0)" in capsys.readouterr().out


def test_a_cache_that_knows_its_background_goes_with_one_that_does_not(shards):
    args = TrainingOptions(img_size=16, vae_stride=4, vae_embed_dim=4)
    check_cache(open_latents(shards), shards, args)
    with pytest.raises(FlowARError, match=r"this cache has background \(255, 255, 255\), but --background is \(0, 0, 0\)"):
        check_cache(open_latents(shards), shards, replace(args, background=(0, 0, 0)))


# ---- interrupted -------------------------------------------------------------------------------------------------


def test_interrupted_it_ends_with_the_same_files(project, shards, tmp_path, monkeypatch):
    folder = tmp_path / "interrupted"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        seams.interrupt(patch, (cache_latents, "write_bytes"), 1)
        call(patch, cache_command(project, folder, "--dtype float32"))
    with pytest.raises(FlowARError, match="this cache is incomplete: run scripts/cache_latents.py again"):
        open_latents(folder)
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


def test_a_damaged_shard_is_named_and_written_again(project, shards, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(shards, folder)
    file = folder / "shard-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    make(cache_command(project, folder, "--dtype float32"))
    assert contents(folder) == contents(shards)
    file.write_bytes(content[:-1])
    with pytest.raises(FlowARError, match="shard-00001.safetensors: expected .* bytes, got .*: truncated"):
        train(project, tmp_path / "out", f"--cached_path {folder}")
    file.unlink()
    with pytest.raises(FlowARError, match="shard-00001.safetensors: shard not found"):
        train(project, tmp_path / "out", f"--cached_path {folder}")
    make(cache_command(project, folder, "--dtype float32"))
    assert contents(folder) == contents(shards)


# ---- unreadable images -------------------------------------------------------------------------------------------


def test_bad_images_are_left_out_of_a_cache(project, tmp_path, monkeypatch):
    shutil.copytree(project / "images", tmp_path / "images")
    shutil.copy(project / "vae.pth", tmp_path / "vae.pth")
    (tmp_path / "images" / "train" / "4" / "003.png").write_bytes(b"no image")
    with pytest.raises(FlowARError, match="4/003.png: cannot be read as an image .*; fix or remove it, or use --on_bad_image skip"):
        call(monkeypatch, cache_command(tmp_path, tmp_path / "cache"))
    call(monkeypatch, cache_command(tmp_path, tmp_path / "cache", "--on_bad_image skip"))
    index = ShardedMoments(tmp_path / "cache").index
    assert index["images"] == 79 and len(index["skipped"]) == 1 and "4/003.png" in index["skipped"][0] and "mend" not in index["skipped"][0]


@pytest.mark.parametrize("form", ["shards", "npz"])
def test_a_finished_cache_notices_that_its_images_changed(project, tmp_path, monkeypatch, capsys, form):
    write_digits(tmp_path / "images", 2, splits=("train",))
    images, odd = tmp_path / "images" / "train", b"n\xe9w\nline .png"
    Image.new("RGBA", (20, 20), (255, 0, 0, 128)).save(images / "3" / os.fsdecode(odd))
    (images / "55").mkdir()
    shutil.copy(project / "vae.pth", tmp_path)
    command = cache_command(tmp_path, tmp_path / "cache", f"--format {form}")
    call(monkeypatch, command)
    assert "21 images in " in capsys.readouterr().out
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
    os.utime(images / "0" / "000.png", (0, 0))
    call(monkeypatch, command)
    with pytest.raises(FlowARError, match="this cache was made with background .255, 255, 255., now it is .0, 0, 0."):
        call(monkeypatch, f"{command} --background black")
    (images / "0" / "000.png").rename(images / "0" / "other.png")
    with pytest.raises(FlowARError, match="the images differ from those of this cache .names or sizes changed"):
        call(monkeypatch, command)


def test_inspection(project, shards, tmp_path, capsys):
    make(f"scripts/inspect_latents.py --cached_path {shards} --data_path {project}/images --vae_path {project}/vae.pth "
         f"--output {tmp_path}/latents.png --device cpu")
    index, printed = ShardedMoments(shards).index, capsys.readouterr().out
    assert f"{index['measured']['scale']:.4f}" in printed and "80 images, center crops" in printed
    picture = Image.open(tmp_path / "latents.png")
    assert picture.size[0] > 8 * 64 and picture.size[1] > 3 * 64
