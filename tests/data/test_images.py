"""Transforms, datasets of images, order and loaders."""
import importlib
import itertools
import os
import time

import numpy as np
import pytest
import torch
from helpers import write_digits
from PIL import Image

from models import FlowARError
from util.data import EpochSampler, Images, build_loader, center_crop, loaders, random_crop, to_uint8


@pytest.fixture
def transforms():
    return importlib.import_module("torchvision.transforms.functional")  # late: it is heavy


def gradient(width, height):
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("size", [(300, 500), (256, 256), (100, 90), (1300, 700)])
def test_crops(transforms, size):
    image = gradient(*size)
    assert center_crop(image, 256).size == (256, 256)
    crop = random_crop(image, 256, np.random.default_rng(1))
    assert crop.size == (256, 256)
    resized, crop = np.asarray(transforms.resize(image, 288)), np.asarray(crop)  # the recipe: shorter side to 288, then a window of it
    places = itertools.product(*(range(side - 255) for side in resized.shape[:2]))
    assert any(np.array_equal(resized[y:y + 256, x:x + 256], crop) for y, x in places)


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


def test_tensors_and_flips_are_torchvisions(transforms, tmp_path):
    write_digits(tmp_path, 1, size=24)
    data = Images(tmp_path / "train", 16, train=True)
    image = gradient(30, 20)
    flipped = set()
    for index in range(20):
        rng = np.random.default_rng((0, 1, index))
        expected, flip = random_crop(image, 16, rng), rng.random() < 0.5
        flipped.add(flip)
        assert torch.equal(data.crop(image, (1, index)), transforms.to_tensor(transforms.hflip(expected) if flip else expected) * 2 - 1)
    assert flipped == {True, False}


@pytest.fixture
def torn(tmp_path):
    (tmp_path / "a").mkdir()
    gradient(20, 20).save(tmp_path / "a" / "good.png")
    content = (tmp_path / "a" / "good.png").read_bytes()
    (tmp_path / "a" / "torn.png").write_bytes(content[:len(content) // 2])
    return tmp_path


def test_a_bad_image_is_named(torn):
    with pytest.raises(FlowARError, match=r"torn.png: cannot be read as an image \([^)]*\); fix or remove it, or use --on_bad_image skip$"):
        list(build_loader(Images(torn, 16, on_bad="error"), 2, num_workers=1))


def test_a_bad_image_may_be_skipped_by_name(torn, capsys):
    data = Images(torn, 16, on_bad="skip")
    assert torch.equal(data[(0, 1)][0], data[(0, 0)][0]) and "skipped: " in (printed := capsys.readouterr().err) and "torn.png" in printed
    (torn / "a" / "good.png").write_bytes(b"")
    with pytest.raises(FlowARError, match="100 images in a row cannot be read"):
        data[(0, 1)]


def test_a_file_that_cannot_be_opened_is_not_skipped(torn):
    data = Images(torn, 16, on_bad="skip")
    (torn / "a" / "good.png").unlink()
    with pytest.raises(FileNotFoundError, match="good.png"):
        data[(0, 0)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_order_does_not_depend_on_the_number_of_ranks(world_size):
    def batches(world, size):
        loaders = []
        for rank in range(world):
            sampler = EpochSampler(50, rank=rank, world_size=world, seed=7, train=True)
            sampler.set_epoch(3)
            keys = list(sampler)
            loaders.append([keys[i:i + size] for i in range(0, len(keys) - size + 1, size)])
        return [sorted(key for part in parts for key in part) for parts in zip(*loaders)]

    assert batches(world_size, 6 // world_size) == batches(1, 6)
    whole = [key for batch in batches(1, 6) for key in batch]
    assert len(set(whole)) == 48 and all(epoch == 3 for epoch, _ in whole)


def test_order_changes_with_the_epoch_and_validation_loses_nothing():
    sampler = EpochSampler(20, seed=1, train=True)
    first = [i for _, i in sampler]
    sampler.set_epoch(1)
    assert sorted(first) == list(range(20)) and [i for _, i in sampler] != first
    parts = [list(EpochSampler(7, rank=r, world_size=2)) for r in range(2)]
    assert sorted(i for part in parts for _, i in part) == list(range(7))
    assert [len(EpochSampler(7, rank=r, world_size=2)) for r in range(2)] == [len(part) for part in parts] == [4, 3]


def test_workers_follow_the_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(32)))
    monkeypatch.setattr(loaders.Path, "read_text", lambda path: "max 100000\n")
    for ranks, expected in (("1", 10), ("8", 4), ("64", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert loaders.default_workers() == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(loaders.Path, "read_text", lambda path: "250000 100000\n")  # of a container
    assert loaders.default_workers() == 2


class Late(list):
    """Items of which one takes its time, or is none."""

    def __getitem__(self, key):
        seconds = super().__getitem__(key[1])
        time.sleep(seconds)
        if seconds == 0:
            raise RuntimeError("damaged")
        return key[1]


def test_a_batch_is_waited_for_twice_half_the_timeout():
    """What a worker raises is raised at once, and no batch is left out."""
    assert torch.cat(list(build_loader(Late([0.1, 2.2, 0.1]), 1, num_workers=1, timeout=3))).tolist() == [0, 1, 2]
    with pytest.raises(RuntimeError, match="damaged"):
        list(build_loader(Late([0.1, 0]), 1, num_workers=1, timeout=60))

    def end_with_a_dead_worker():  # as torch finds one of a fork server, when its timeout is over
        yield 0
        time.sleep(0.2)
        raise RuntimeError("exited unexpectedly") from TimeoutError()
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(loaders.WorkersLoader([0, 1], num_workers=1, timeout=0.1).wait_twice(end_with_a_dead_worker()))
