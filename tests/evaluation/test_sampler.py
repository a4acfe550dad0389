"""A batch is decoded and measured in another thread, as on CUDA, with the same results; its errors are raised."""
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from helpers import evaluate, make_project, train

import seams
from models import FlowARError, build_model
from models.vae import LatentScale
from util.evaluation import sampler
from util.evaluation.sampler import Sampler


def test_a_thread_measures_the_same_and_raises_its_errors(tmp_path, monkeypatch):
    project = make_project(tmp_path, 2)
    train(project, tmp_path / "run", "--epochs 1")
    expected = evaluate(project, tmp_path / "run", tmp_path / "plain", "--eval_bsz 4 --save_images")
    monkeypatch.setattr(sampler, "open_executor", lambda device: ThreadPoolExecutor(1))
    found = evaluate(project, tmp_path / "run", tmp_path / "beside", "--eval_bsz 4 --save_images")
    timed = {"images_per_second", "seconds_per_image"}
    assert {key: value for key, value in found.items() if key not in timed} == {key: value for key, value in expected.items() if key not in timed}
    assert all(seconds > 0 for seconds in found["seconds_per_image"].values())
    for path in (tmp_path / "plain" / "images").iterdir():
        assert path.read_bytes() == (tmp_path / "beside" / "images" / path.name).read_bytes()
    sampled = seams.count(monkeypatch, seams.LATENTS)
    seams.wrap(monkeypatch, seams.DECODED, lambda original, *args: (original(*args)[0], torch.zeros(len(args[1]), dtype=torch.bool)))
    with pytest.raises(FlowARError, match="4 of 10 images are not finite: 0, 1, 2, 3; the weights of .*run are damaged"):
        evaluate(project, tmp_path / "run", tmp_path / "bad", "--eval_bsz 4")
    assert len(sampled) == 2  # a batch is sampled while the one before is measured


@pytest.mark.parametrize("side, at_once", [(64, 32), (256, 32), (512, 8), (1024, 2), (4096, 1)])
def test_large_images_are_decoded_few_at_once(side, at_once):
    """And, on a CPU, in float32 whatever the model's precision."""
    model = build_model("flowar_tiny", img_size=side, scale=(1,), vae_stride=side)
    taken = []

    def decode(part):
        assert not torch.is_autocast_enabled("cpu")
        taken.append(len(part))
        return part[:, :3]

    vae = SimpleNamespace(latent_scale=LatentScale(1.0), decode=decode)
    images, finite = Sampler(model, vae, {}, "bf16", 0, 64).decode(torch.zeros(40, 16, 1, 1))
    assert images.shape == (40, 3, 1, 1) and finite.all() and max(taken) == at_once
