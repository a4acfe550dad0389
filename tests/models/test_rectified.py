"""The rectified head: the loss is the definition's, the teacher stays, and the teacher's solution is sampling's own."""
import copy

import pytest
import torch
from helpers import inputs, small_model

from models import flow_matching as fm
from models.flowar import to_tokens
from models.variants.rectified import RectifiedFlowAR

SOLUTION = dict(num_steps=6, cfg=3.0, guidance=0.8, solver="heun")


@pytest.fixture(scope="module", params=[False, True], ids=["attn", "cross"])
def pair(request):
    teacher = small_model(cross=request.param, attn_dropout=0.1, proj_dropout=0.1)
    student = RectifiedFlowAR(teacher, SOLUTION, reuse=3, at_noise=0.25, on_latents=True).train()
    latents, labels, _, noise = inputs(teacher, batch=4)
    return teacher, student, latents, labels, noise


def plain_solution(teacher, latents, labels, noise):
    """x' of every scale: Heun's steps with guidance, evaluation by evaluation, given the teacher-forced condition."""
    null = torch.full_like(labels, teacher.class_num)
    with torch.no_grad():
        z, z_null, found = teacher.condition(latents, labels), teacher.condition(latents, null), []
        for k, span in enumerate(teacher.spans):
            def velocity(x, t, weight=1 + 2.0 * k / (len(teacher.scale) - 1), span=span):
                t_, x_ = torch.full((len(x),), t), x.float()
                v = teacher.flownet(x_, t_, z[:, span])
                if not 0 < t <= 0.8:
                    return v
                v_null = teacher.flownet(x_, t_, z_null[:, span])
                return v_null + weight * (v - v_null)
            found.append(fm.SOLVERS["heun"](velocity, noise[k], fm.time_grid(6)).float())
    return found


def test_the_loss_is_that_of_a_plain_computation(pair):
    teacher, student, latents, labels, noise = pair
    t = student.draw(4, torch.Generator().manual_seed(1)).t
    found = student.scale_losses(latents, labels, t=t, noise=noise)
    z, expected = teacher.condition(latents, labels), []
    for k, (x, e) in enumerate(zip(plain_solution(teacher, latents, labels, noise), noise)):
        errors = []
        for r in range(3):
            time = t[k, :, r]
            x_t = (1 - time[:, None, None]) * x + time[:, None, None] * e
            velocity = student.flownet(x_t, time, z[:, teacher.spans[k]])
            errors.append((velocity - (e - x)).square().mean(dim=(1, 2)))
        expected.append(torch.stack(errors).mean(dim=0))
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=1e-4)
    loss, scales = student(latents, labels, t=t, noise=noise, return_scales=True)
    assert loss.item() == pytest.approx(sum(s * s / 16 * value for s, value in zip((1, 2, 4), scales.tolist())), rel=1e-5)


def test_by_default_the_condition_is_of_what_the_teacher_draws(pair):
    """As in sampling: the loss is that of the forced one on the drawn scales, whatever the latents are."""
    teacher, _, latents, labels, noise = pair
    student = RectifiedFlowAR(teacher, SOLUTION, reuse=3)
    t = student.draw(4, torch.Generator().manual_seed(1)).t
    found = student.scale_losses(latents, labels, t=t, noise=noise)
    drawn = teacher.sample_pyramid(labels, noise=noise, **SOLUTION)
    repeated = [[part.repeat_interleave(3, dim=0) for part in parts] for parts in (drawn, noise)]
    z = teacher.condition_on(drawn, labels).repeat_interleave(3, dim=0)
    expected = student.velocity_errors(repeated[0], z, t.flatten(1), repeated[1]).unflatten(1, (4, 3)).mean(dim=2)
    assert torch.equal(found, expected) and torch.equal(found, student.scale_losses(0 * latents, labels, t=t, noise=noise))


def test_the_solution_is_that_of_sampling(pair):
    """Forced with what the teacher itself draws, its solution is what it draws, bit by bit."""
    teacher, _, _, labels, noise = pair
    drawn = teacher.sample_pyramid(labels, noise=noise, **SOLUTION)
    forced = teacher.sample_pyramid(labels, noise=noise, forced=drawn, **SOLUTION)
    assert all(map(torch.equal, drawn, forced))


def test_real_coarse_scales_are_the_condition(pair):
    teacher, _, latents, labels, noise = pair
    forced = teacher.sample_pyramid(labels, noise=noise, forced=teacher.pyramid(latents), **SOLUTION)
    for grid, expected in zip(forced, plain_solution(teacher, latents, labels, noise)):
        torch.testing.assert_close(to_tokens(grid), expected, atol=1e-4, rtol=1e-4)


def test_it_begins_as_its_teacher_which_stays(pair):
    teacher, student, latents, labels, noise = pair
    student, before = copy.deepcopy(student), copy.deepcopy(teacher.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items()), "it begins as its teacher"
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    student(latents, labels, drop=torch.ones(4, dtype=torch.bool)).backward()
    optimizer.step()
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, _ in student.named_parameters()}
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert set(student.state_dict()) == set(before), "the released layout"
    assert not any("teacher" in name for name, _ in student.named_modules())


def test_a_copy_has_the_same_teacher(pair):
    """An average of the student does not hold the teacher once more."""
    _, student, *_ = pair
    assert copy.deepcopy(student).solve is student.solve


def test_part_of_the_times_is_one(pair):
    t = pair[1].draw(2000, torch.Generator().manual_seed(0)).t
    assert t.shape == (3, 2000, 3)
    at_one = t == 1
    assert at_one.float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert t[~at_one].mean().item() == pytest.approx(0.5, abs=0.01)


def test_a_change_of_the_path_changes_the_students_loss(pair, monkeypatch):
    """One place an idea: path, target and solver of the student are those of flow_matching.py."""
    _, student, latents, labels, noise = pair
    t = student.draw(4, torch.Generator().manual_seed(1)).t
    before = student.scale_losses(latents, labels, t=t, noise=noise)
    for name in ("interpolate", "velocity_target"):
        with monkeypatch.context() as patch:
            original = getattr(fm, name)
            patch.setattr(fm, name, lambda *args, original=original: 2 * original(*args))
            assert (student.scale_losses(latents, labels, t=t, noise=noise) != before).all()
    with monkeypatch.context() as patch:
        patch.setitem(fm.SOLVERS, "heun", fm.euler)
        assert (student.scale_losses(latents, labels, t=t, noise=noise) != before).all()
