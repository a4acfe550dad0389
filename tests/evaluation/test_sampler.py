"""A batch is decoded and measured on another thread, as on CUDA, with the same results, and what goes wrong there is said."""
from types import SimpleNamespace

import pytest
import torch
from helpers import evaluate, make_project, train

import engine_flowar
from models import FlowARError, build_model
from models.vae import LatentScale
from util.evaluation.sampler import Sampler, SideStream


@pytest.fixture
def on_another_thread(monkeypatch):
    monkeypatch.setattr(engine_flowar, "SideStream", lambda device: SideStream(device, threaded=True))


def test_an_evaluation_is_the_same(tmp_path, on_another_thread):
    project = make_project(tmp_path, 2)
    train(project, tmp_path / "run", "--epochs 1")
    found = evaluate(project, tmp_path / "run", tmp_path / "beside", "--eval_bsz 4 --save_images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_flowar, "SideStream", SideStream)
        expected = evaluate(project, tmp_path / "run", tmp_path / "plain", "--eval_bsz 4 --save_images")
    timed = {"images_per_second", "seconds_per_image"}
    assert {key: value for key, value in found.items() if key not in timed} == {key: value for key, value in expected.items() if key not in timed}
    assert all(seconds > 0 for seconds in found["seconds_per_image"].values())
    for path in (tmp_path / "plain" / "images").iterdir():
        assert path.read_bytes() == (tmp_path / "beside" / "images" / path.name).read_bytes()


@pytest.mark.parametrize("threaded", [False, True])
def test_results_come_in_order_and_errors_too(threaded):
    def work(number):
        assert not torch.is_grad_enabled() or not threaded
        if number == 2:
            raise FlowARError("two")
        return number

    with SideStream(torch.device("cpu"), threaded) as beside:
        assert [beside(work, number)() for number in (0, 1)] == [0, 1]
        with pytest.raises(FlowARError, match="two"):
            beside(work, 2)()


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
