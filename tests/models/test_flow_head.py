"""The velocity network: one forward pass for training and sampling, at any time."""
import golden
import plain
import pytest
import torch
from helpers import inputs, small_model

from models.flow_head import TIME_STEPS, TimeEmbedder


def head_and_inputs(cross, **options):
    model = small_model(cross=cross, diffloss_d=2, **options)
    latents, labels, t, noise = inputs(model)
    return model, noise, t, model.condition(latents, labels).detach()


@pytest.mark.parametrize("cross", [False, True])
def test_one_pass_of_all_scales_equals_each_scale_alone(cross):
    model, noise, t, z = head_and_inputs(cross)
    together = model.flownet(torch.cat(noise, dim=1), t, z, model.scale)
    for k, span in enumerate(model.spans):
        alone = model.flownet(noise[k], t[k], z[:, span])
        golden.assert_close(together[:, span], alone.detach(), 3e-5)  # other sizes of products, other order of sums
        golden.assert_close(alone, plain.velocity(model.flownet, noise[k], t[k], z[:, span]).detach(), 3e-5)


@torch.no_grad()
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("t", [1.0, 0.98, 0.28125, 0.2809, 1e-4, 0.0])
def test_a_prepared_condition_gives_the_same_velocity_at_any_time(cross, t):
    """Between the points of a grid too; one time for all images, and the images' own."""
    model, noise, _, z = head_and_inputs(cross)
    z = z[:, model.spans[-1]]
    prepared, times = model.flownet.prepare(z), torch.full((2,), t)
    expected = model.flownet(noise[-1], times, z)
    assert torch.equal(model.flownet(noise[-1], times, prepared), expected)
    golden.assert_close(model.flownet(noise[-1], times[:1], prepared), expected, tolerance=1e-6)
    golden.assert_close(model.flownet(noise[-1][:1], times[:1], prepared.first(1)), expected[:1], tolerance=1e-6)


@torch.no_grad()
def test_what_the_condition_says_enters_by_the_tokens_of_its_own_scale_alone():
    model, noise, t, z = head_and_inputs(True)
    before = model.flownet(torch.cat(noise, dim=1), t, z, model.scale)
    z = z.clone()
    z[:, model.spans[1]] += 1
    after = model.flownet(torch.cat(noise, dim=1), t, z, model.scale)
    same = [torch.equal(before[:, span], after[:, span]) for span in model.spans]
    assert same == [True, False, True]


def test_time_is_cut_to_a_thousandth():
    embed = TimeEmbedder(8)
    at = lambda *t: embed(torch.tensor(t))  # noqa: E731
    assert torch.equal(at(0.1234)[0], at(0.1239)[0]) and not torch.allclose(at(0.1234)[0], at(0.1241)[0])
    step = torch.tensor([123.0])
    angle = step[:, None] * 10000 ** (-torch.arange(128) / 128)
    golden.assert_close(at(0.1235), embed.mlp(torch.cat((angle.cos(), angle.sin()), dim=-1)).detach())
    assert TIME_STEPS == 1000 and embed(torch.rand(3, 2)).shape == (3, 2, 8)


def test_gradients_reach_every_parameter():
    for cross in (False, True):
        model, noise, t, z = head_and_inputs(cross)
        model.flownet(torch.cat(noise, dim=1), t, z.requires_grad_(), model.scale).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.flownet.parameters()) and z.grad.any()
