"""Caches of latents in the layouts of others: MAR's .npz files, LightningDiT's samples."""
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import make_project, train
from latent_caches import cache_command, make
from safetensors.torch import load_file, save_file

from models import FlowARError
from models.vae import KL16_LATENT_SCALE
from models.vaes import load_vae
from util.data import latents
from util.data.other_latents import LightningLatents, NpzMoments
from util.data.source import open_latents


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def npz(project):
    make(cache_command(project, project / "npz", "--format npz"))
    return project / "npz"


def test_npz_and_shards_hold_the_same(project, npz, tmp_path):
    shards = tmp_path / "shards"
    make(cache_command(project, shards, "--dtype float32"))
    files = open_latents(npz)
    assert isinstance(files, NpzMoments) and files.origin.latent_scale == load_vae(project / "vae.pth").latent_scale and files.shape == (4, 4, 4)
    names = [files.listing.name(i).removesuffix(".npz") for i in range(len(files))]
    content = load_file(shards / "shard-00002.safetensors")
    for row, name in enumerate(latents.read_texts(shards / "shard-00002.safetensors", "names")):
        moments, label = files[(0, names.index(name))]
        torch.testing.assert_close(content["moments"][row, 0], moments, atol=1e-5, rtol=1e-4)
        assert content["labels"][row] == label
    assert files.listing.name(0) == "0/000.png.npz"  # MAR's naming
    train = NpzMoments(npz, train=True)
    assert len({tuple(train[(epoch, 0)][0].flatten().tolist()) for epoch in range(20)}) == 2


def test_an_unfinished_npz_cache_is_not_taken_for_a_whole_one(project, npz, tmp_path):
    folder = tmp_path / "npz"
    shutil.copytree(npz, folder)
    info, lost, empty = folder / "latents.json", folder / "3" / "001.png.npz", folder / "4" / "001.png.npz"
    lost.unlink()
    empty.write_bytes(b"")  # as a power cut may leave it
    info.write_text(json.dumps({**json.loads(info.read_text()), "complete": False}))
    with pytest.raises(FlowARError, match="this cache is incomplete"):
        NpzMoments(folder)
    make(cache_command(project, folder, "--format npz"))
    with np.load(lost) as file, np.load(npz / "3" / "001.png.npz") as expected:
        np.testing.assert_allclose(file["moments_flip"], expected["moments_flip"], atol=1e-5)
    assert NpzMoments(folder).origin.latent_scale and empty.stat().st_size == (npz / "4" / "001.png.npz").stat().st_size


def test_caches_of_mar_are_kl16(tmp_path):
    (tmp_path / "n01440764").mkdir()
    np.savez(tmp_path / "n01440764" / "x.JPEG.npz", moments=np.zeros((32, 16, 16), np.float32))
    assert open_latents(tmp_path).origin.latent_scale == KL16_LATENT_SCALE
    np.savez(tmp_path / "n01440764" / "x.JPEG.npz", moments=np.zeros((8, 16, 16), np.float32))
    with pytest.raises(FlowARError, match="expected a KL-16 cache with 16 channels, got 4"):
        NpzMoments(tmp_path)


@pytest.mark.parametrize("name,message", [("moments", r"moments is \(32, 4, 5\)"), ("other", "moments cannot be read")])
def test_damaged_npz_latents_are_named(tmp_path, name, message):
    (tmp_path / "a").mkdir()
    np.savez(tmp_path / "a" / "first.npz", moments=np.zeros((32, 4, 4), np.float32))
    np.savez(tmp_path / "a" / "x.npz", **{name: np.zeros((32, 4, 5), np.float32)})
    with pytest.raises(FlowARError, match=f"x.npz: {message}"):
        NpzMoments(tmp_path)[(0, 1)]


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
    data = LightningLatents(lightning, train=True)
    files = [load_file(file) for file in sorted(lightning.glob("*.safetensors"))]
    assert len(data) == 15 and data.classes == list("012345") and data.identity()["counts"] == [4, 3, 3, 2, 2, 1]
    stored = [torch.cat([file[name] for file in files]) for name in ("latents", "latents_flip")]
    seen = set()
    for epoch in range(20):
        moments, label = data[(epoch, 8)]
        assert label == 1 and torch.equal(moments[:4], stored[data.variant(epoch, 8)][8]) and (moments[4:] == -30).all()
        seen.add(data.variant(epoch, 8))
    assert seen == {0, 1} and LightningLatents(lightning).variant(3, 8) == 0
    assert sorted(data.order(0, 1)) == list(range(15)) and (np.diff(np.searchsorted(data.ends, data.order(0, 1), side="right")) != 0).sum() == 2
    scale = data.channel_scale()
    normal = scale.normalize(stored[0])
    torch.testing.assert_close(normal.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.std(dim=(0, 2, 3)), torch.ones(4))
    whole = data.identity()["sha256"]
    (lightning / "latents_rank01_shard000.safetensors").unlink()
    assert LightningLatents(lightning).identity()["sha256"] != whole


def test_training_on_lightning_latents_needs_their_scale(lightning, tmp_path):
    shared = f"--cached_path {lightning} --batch_size 5 --epochs 1 --warmup_epochs 0 --class_num 10 --data_path nowhere --vae_path nowhere.pth"
    with pytest.raises(FlowARError, match="contains no latent scale: pass its VAE .*, or use --latent_norm channel"):
        train(lightning, tmp_path / "run", shared)
    content = train(lightning, tmp_path / "run", f"{shared} --latent_norm channel --resume {tmp_path}/run")
    assert content["vae"]["latent_scale"] == tuple(LightningLatents(lightning).channel_scale()) and content["data"]["images"] == 15
    (lightning / "latents_stats.pt").unlink()
    with pytest.raises(FlowARError, match="latents_stats.pt: not found, but --latent_norm channel reads"):
        train(lightning, tmp_path / "other", f"{shared} --latent_norm channel")
    with pytest.raises(FlowARError, match="latents are .4, 4, 4., but --img_size / --vae_stride is 8"):
        train(lightning, tmp_path / "other", f"{shared} --latent_norm channel --img_size 32")


@pytest.mark.parametrize("change,message", [
    (dict(labels=torch.zeros(4, dtype=torch.int64)), "expected 5 labels, integers from 0"),
    (dict(latents_flip=torch.zeros(4, 4, 4, 4)), "latents and latents_flip are .5, 4"),
    (dict(latents=torch.zeros(5, 4, 4, 8), latents_flip=torch.zeros(5, 4, 4, 8)), "latents are .4, 4, 8., expected .4, 4, 4. as in .*rank00_shard000.safetensors")])
def test_damaged_lightning_latents_are_refused_by_name(lightning, change, message):
    file = lightning / "latents_rank00_shard001.safetensors"
    save_file({**load_file(file), **change}, file)
    with pytest.raises(FlowARError, match=f"latents_rank00_shard001.safetensors: {message}"):
        LightningLatents(lightning)
