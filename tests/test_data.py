"""Transforms, datasets, order and the latent cache."""
import json

import numpy as np
import pytest
import torch
from helpers import make_project, run, write_digits
from PIL import Image
from torchvision.transforms import functional as TF

from models import FlowARError
from models.vae import KL16_LATENT_SCALE, load_vae
from util.data import (CachedMoments, EpochSampler, Images, build_loader, cache_latent_scale, center_crop, has_cache,
                       random_crop, to_uint8)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = make_project(tmp_path_factory.mktemp("project"), per_class=4)
    command = (f"scripts/cache_latents.py --data_path {root}/images --cached_path {root}/latents --vae_path "
               f"{root}/vae.pth --img_size 16 --num_workers 0 --device cpu --batch_size 7")
    run(command, processes=2)
    return root, command


def gradient(width, height):
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("size", [(400, 300), (300, 500), (256, 256), (100, 90), (1300, 700)])
def test_crops(size):
    image = gradient(*size)
    assert center_crop(image, 256).size == (256, 256)
    crop = random_crop(image, 256, np.random.default_rng(1))
    assert crop.size == (256, 256)
    resized = np.asarray(TF.resize(image, 288))  # the recipe: shorter side to 288, then a window of it
    windows = np.lib.stride_tricks.sliding_window_view(resized, (256, 256), axis=(0, 1))
    assert (windows == np.asarray(crop).transpose(2, 0, 1)).all(axis=(2, 3, 4)).any()


def test_crop_positions_reach_both_ends():
    image = gradient(288, 288)
    offsets = {np.asarray(random_crop(image, 256, np.random.default_rng(i)))[0, 0, 0] for i in range(300)}
    assert min(offsets) == 0 and max(offsets) == 32


def test_to_uint8_rounds_as_the_release():
    assert to_uint8(torch.tensor([-1.0, 1.0, -2.0, 3.0, 0.0, 2 / 255 * 3.6 - 1])).tolist() == [0, 255, 0, 255, 128, 4]


def test_images_depend_on_seed_epoch_index_alone(tmp_path):
    write_digits(tmp_path, 6, size=24)
    make = lambda seed: Images(tmp_path / "train", 16, seed, train=True)  # noqa: E731
    assert torch.equal(make(0)[(1, 5)][0], make(0)[(1, 5)][0])
    assert not torch.equal(make(0)[(1, 5)][0], make(0)[(2, 5)][0])
    assert not torch.equal(make(0)[(1, 5)][0], make(1)[(1, 5)][0])
    image, label = Images(tmp_path / "val", 16)[(0, 8)]
    assert image.shape == (3, 16, 16) and image.min() >= -1 and image.max() <= 1 and label == 1


def test_other_modes_become_rgb(tmp_path):
    (tmp_path / "a").mkdir()
    gradient(20, 20).convert("L").save(tmp_path / "a" / "gray.png")
    gradient(20, 20).convert("RGBA").save(tmp_path / "a" / "alpha.png")
    gradient(20, 20).convert("CMYK").save(tmp_path / "a" / "cmyk.jpg")
    data = Images(tmp_path, 16)
    assert all(data[(0, i)][0].shape == (3, 16, 16) for i in range(3))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_named(tmp_path, workers):
    (tmp_path / "a").mkdir()
    gradient(20, 20).save(tmp_path / "a" / "good.png")
    content = (tmp_path / "a" / "good.png").read_bytes()
    (tmp_path / "a" / "torn.png").write_bytes(content[:len(content) // 2])
    with pytest.raises(FlowARError, match=r"torn.png: cannot be read as an image"):
        list(build_loader(Images(tmp_path, 16), 2, num_workers=workers))


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(FlowARError, match="nowhere: no such folder"):
        Images(tmp_path / "nowhere", 16)
    with pytest.raises(FlowARError, match="expected images in class folders"):
        Images(tmp_path, 16)
    (tmp_path / "empty_class").mkdir()
    with pytest.raises(FlowARError, match="empty_class"):
        Images(tmp_path, 16)


@pytest.mark.parametrize("world_size", [2, 3])
def test_order_does_not_depend_on_the_number_of_ranks(world_size):
    def batches(world, size):
        loaders = []
        for rank in range(world):
            sampler = EpochSampler(50, rank=rank, world_size=world, seed=7, shuffle=True, drop_last=True)
            sampler.set_epoch(3)
            keys = list(sampler)
            loaders.append([keys[i:i + size] for i in range(0, len(keys) - size + 1, size)])
        return [sorted(key for part in parts for key in part) for parts in zip(*loaders)]

    assert batches(world_size, 6 // world_size) == batches(1, 6)
    whole = [key for batch in batches(1, 6) for key in batch]
    assert len(set(whole)) == 48 and all(epoch == 3 for epoch, _ in whole)


def test_order_changes_with_the_epoch_and_validation_loses_nothing():
    sampler = EpochSampler(20, seed=1, shuffle=True)
    first = [i for _, i in sampler]
    sampler.set_epoch(1)
    assert sorted(first) == list(range(20)) and [i for _, i in sampler] != first
    parts = [list(EpochSampler(7, rank=r, world_size=2)) for r in range(2)]
    assert sorted(i for part in parts for _, i in part) == list(range(7))
    assert [len(EpochSampler(7, rank=r, world_size=2)) for r in range(2)] == [len(part) for part in parts] == [4, 3]


def test_cache_holds_the_moments_of_image_and_flipped_image(project):
    root, _ = project
    vae, _ = load_vae(root / "vae.pth")
    images = Images(root / "images" / "train", 16)
    files = sorted((root / "latents").glob("*/*.npz"))
    assert len(files) == len(images) == 40
    assert files[0].relative_to(root / "latents").as_posix() == "0/000.png.npz"  # MAR's naming
    for i in (0, 17):
        image = images[(0, i)][0][None]
        with np.load(files[i]) as file:
            assert file["moments"].dtype == np.float32
            for name, pixels in (("moments", image), ("moments_flip", image.flip(-1))):
                torch.testing.assert_close(torch.from_numpy(file[name]), vae.encode(pixels).parameters[0],
                                           atol=1e-5, rtol=1e-4)


def test_cache_is_described_and_read(project):
    root, _ = project
    assert has_cache(root / "latents") and not has_cache(root / "images")
    assert cache_latent_scale(root / "latents", 4) == load_vae(root / "vae.pth")[0].latent_scale
    assert json.loads((root / "latents" / "latents.json").read_text())["images"] == 40
    data = CachedMoments(root / "latents", (8, 4, 4), train=True)
    stored = dict(np.load(root / "latents" / "0" / "000.png.npz"))
    seen = {next(name for name in stored if np.array_equal(stored[name], data[(epoch, 0)][0])) for epoch in range(20)}
    assert seen == {"moments", "moments_flip"}
    assert np.array_equal(CachedMoments(root / "latents", (8, 4, 4))[(5, 0)][0], stored["moments"])


def test_interrupted_cache_is_not_taken_for_a_whole_one_and_is_finished(project):
    root, command = project
    info_file, lost = root / "latents" / "latents.json", root / "latents" / "3" / "001.png.npz"
    kept = (root / "latents" / "3" / "002.png.npz").stat().st_mtime_ns
    with np.load(lost) as file:
        expected = file["moments_flip"]
    lost.unlink()
    info = json.loads(info_file.read_text())
    info_file.write_text(json.dumps({**info, "complete": False}))
    with pytest.raises(FlowARError, match="not complete"):
        cache_latent_scale(root / "latents", 4)
    run(command)
    with np.load(lost) as file:
        np.testing.assert_allclose(file["moments_flip"], expected, atol=1e-5)
    assert (root / "latents" / "3" / "002.png.npz").stat().st_mtime_ns == kept
    assert cache_latent_scale(root / "latents", 4)


def test_cache_of_other_settings_is_refused(project):
    root, command = project
    done = run(command.replace("--img_size 16", "--img_size 8"), check=False)
    assert done.returncode == 2 and "made with img_size 16, now it is 8" in done.stderr
    with pytest.raises(FlowARError, match=r"000.png.npz: moments is \(8, 4, 4\): expected \(8, 8, 8\)"):
        CachedMoments(root / "latents", (8, 8, 8))[(0, 0)]


def test_caches_of_mar_are_kl16(tmp_path):
    (tmp_path / "n01440764").mkdir()
    np.savez(tmp_path / "n01440764" / "x.JPEG.npz", moments=np.zeros((32, 16, 16), np.float32))
    assert has_cache(tmp_path) and cache_latent_scale(tmp_path, 16) == KL16_LATENT_SCALE
    with pytest.raises(FlowARError, match="--vae_embed_dim is 4"):
        cache_latent_scale(tmp_path, 4)


@pytest.mark.parametrize("damage", ["truncate", "pickle", "key"])
def test_damaged_latents_are_named(tmp_path, damage):
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "x.npz"
    if damage == "pickle":
        np.savez(path, moments=np.array([{"a": 1}], dtype=object))
    else:
        np.savez(path, **{"other" if damage == "key" else "moments": np.zeros((8, 4, 4), np.float32)})
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FlowARError, match="x.npz: cannot read moments"):
        CachedMoments(tmp_path, (8, 4, 4))[(0, 0)]
