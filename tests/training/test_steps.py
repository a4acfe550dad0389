"""A step that is not finite changes nothing, with any optimizer, on all ranks alike; groups keep their rates; what an optimizer keeps is resumed."""
import inspect
import math

import pytest
import seams
import torch
from helpers import ROOT, make_project, needs_muon, read_checkpoint, read_log, run, steps_of, train, training_command
from torch.utils.data import Dataset

import engine_flowar
from models import FlowARError
from models.weights import content_hash
from util import recipe
from util.data import build_loader
from util.training import checkpoint, parallel
from util.training.optimization import build_optimizer

DROPOUT = "--attn_dropout 0.2 --proj_dropout 0.2"


def sgd(model, lr, weight_decay, *_):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def muon(model, lr, weight_decay, *_):
    return build_optimizer(model, lr, weight_decay, "muon")


OPTIMIZERS = [build_optimizer, sgd, pytest.param(muon, marks=needs_muon)]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


def poison(monkeypatch, bad, change):
    """Change the latents of some steps before they are used."""
    def poisoned(original, run, *args):
        latents, labels, draws = original(run, *args)
        return change(latents.clone()) if run.progress.step in bad else latents, labels, draws

    seams.wrap(monkeypatch, seams.PREPARED, poisoned)


def order_of_epoch(epoch):
    """Of the 80 images in batches of 16."""
    order = build_loader(type("Eighty", (Dataset,), {"__len__": lambda self: 80})(), 16, seed=0, train=True).sampler
    order.set_epoch(epoch)
    return order


def with_nan(latents):
    latents[5, 0, 0, 0] = math.nan
    return latents


def spoil_gradient(monkeypatch, step):
    """NaN in one number of one gradient, as if a kernel had gone wrong: the loss is finite."""
    def spoiled(original, run, parts):
        losses = original(run, parts)
        if run.progress.step == step:
            run.network.z_proj.weight.grad[0, 0] = math.nan
        return losses

    seams.wrap(monkeypatch, seams.STEP, spoiled)


@pytest.fixture
def bad_states(monkeypatch):
    """The state after every bad step, as hashes: of weights, EMA and optimizer."""
    states, runs = [], []

    def note_the_run(original, run, *args):
        runs.append(run)
        return original(run, *args)

    def report(original, *args):
        original(*args)
        run = runs[-1]
        states.append(state_of(*(parallel.snapshot(part.state_dict()) for part in (run.network, run.ema.module, run.optimizer))))

    seams.wrap(monkeypatch, seams.STEP, note_the_run)
    seams.wrap(monkeypatch, seams.BAD_STEP, report)
    return states


def state_of(network, ema, optimizer):
    return [content_hash(part) for part in (network, ema, optimizer["state"])]


def saved_state(output, step):
    content = torch.load(output / f"checkpoint-{step:09d}.pth", weights_only=True)
    return state_of(content["model"], content["model_ema"], content["optimizer"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_bad_step_changes_nothing_with_any_optimizer(project, tmp_path, monkeypatch, bad_states, optimizer):
    """Step 4: it leaves everything as step 3 did, it is not saved, and step 5 is made. The whole run's twin, resumed at step 6, ends alike."""
    options = f"--epochs 1 --batch_size 8 --blr 1e-3 {DROPOUT}"  # 10 steps
    monkeypatch.setattr(recipe, "build_optimizer", optimizer)
    spoil_gradient(monkeypatch, 3)
    content = train(project, tmp_path / "run", f"--save_every 1 --keep 20 {options}")
    after, = bad_states
    assert after == saved_state(tmp_path / "run", 3) != saved_state(tmp_path / "run", 5)
    assert steps_of(tmp_path / "run") == [10, 9, 8, 7, 6, 5, 3, 2, 1]
    assert content["progress"]["bad_steps"] == 1 and content["progress"]["bad_in_a_row"] == 0
    line, = [line for line in read_log(tmp_path / "run") if line["group"] == "bad_step"]
    assert line["step"] == 4 and "gradient norm nan; the gradient is not finite, the loss of every rank is" in line["message"]
    assert [line["bad_steps"] for line in read_log(tmp_path / "run") if line["group"] == "train"] == [0, 1, 1, 1, 1]
    (tmp_path / "run" / checkpoint.LAST).unlink()
    for step in range(7, 11):
        (tmp_path / "run" / f"checkpoint-{step:09d}.pth").unlink()
    again = train(project, tmp_path / "run", f"{options} --resume {tmp_path}/run")
    assert state_of(again["model"], again["model_ema"], again["optimizer"]) == state_of(content["model"], content["model_ema"], content["optimizer"])


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])  # with the gradient scaler too
def test_latents_that_are_not_finite_are_named(project, tmp_path, monkeypatch, precision):
    poison(monkeypatch, [3], with_nan)
    train(project, tmp_path, f"--log_freq 1 --precision {precision}")
    image = order_of_epoch(0).indices(48, 64)[5]
    line, = [line for line in read_log(tmp_path) if line["group"] == "bad_step" and line["step"] == 4]  # the scaler's first steps may be too large
    assert line["images"] == [image] and f"skipped: loss nan, gradient norm nan; rank 0 has non-finite latents, images {image}" in line["message"]
    losses = [line["loss"] for line in read_log(tmp_path) if line["group"] == "train"]
    assert len(losses) in (7, 8, 9) and all(map(math.isfinite, losses))


TWO_RANKS = """
import shlex, sys
import torch
import engine_flowar
from models.weights import content_hash
from util import cluster, recipe
from util.command_line import parse_options
from util.options import TrainingOptions
from util.training.optimization import build_optimizer
from util.training.parallel import local, whole

{optimizers}
runs, original, prepare = [], engine_flowar.forward_and_backward, engine_flowar.prepare_batch

def with_a_bad_image(run, *args):
    latents, labels, draws = prepare(run, *args)
    if cluster.rank() == 1 and run.progress.step == 6:
        latents[5] = float("inf")
    return latents, labels, draws

def spoiled(run, parts):
    runs.append(run)
    losses = original(run, parts)
    if cluster.rank() == 1 and run.progress.step == 3:
        local([run.network.z_proj.weight.grad])[0].fill_(float("nan"))
    return losses

def main():
    device = cluster.init("cpu")
    engine_flowar.forward_and_backward, engine_flowar.prepare_batch = spoiled, with_a_bad_image
    for name in {names!r}:
        recipe.build_optimizer = globals()[name]
        engine_flowar.train(recipe.build_run(parse_options(TrainingOptions, shlex.split({options!r}) + ["--output_dir", {folder!r} + "/" + name]), device))
        cluster.agree("the weights", content_hash(list(map(whole, runs[-1].network.state_dict().values()))))

cluster.run_main(main)
"""


@pytest.mark.parametrize("extra", ["", pytest.param("--fsdp", marks=pytest.mark.slow)])
def test_what_is_bad_on_one_rank_of_two_is_skipped_on_both(project, tmp_path, extra):
    """A gradient in step 4, an image in step 7, which is named; the other steps are logged."""
    names = ["build_optimizer", "sgd"] + ["muon"] * (hasattr(torch.optim, "Muon") and not extra)
    options = training_command(project, "x", f"--batch_size 8 --blr 1e-3 --log_freq 1 --eval_freq 100 {extra}").split(maxsplit=1)[1]
    optimizers = "\n".join(map(inspect.getsource, (sgd, muon)))
    (tmp_path / "two.py").write_text(TWO_RANKS.format(root=str(ROOT), optimizers=optimizers, names=names, options=options, folder=str(tmp_path)))
    run(f"{tmp_path}/two.py", processes=2)
    order = order_of_epoch(1)
    for name in names:
        content, log = read_checkpoint(tmp_path / name), read_log(tmp_path / name)
        assert content["progress"]["bad_steps"] == 2 and content["progress"]["step"] == 10, name
        assert all(value.isfinite().all() for key, value in content["model"].items() if key != "mask"), name
        bad = [line for line in log if line["group"] == "bad_step"]
        assert [line["step"] for line in bad] == [4, 7] and bad[1]["images"] == [order.indices(16, 32)[2 * 5 + 1]], name
        assert [line["step"] for line in log if line["group"] == "train"] == [1, 2, 3, 5, 6, 8, 9, 10], name


def test_too_many_bad_steps_stop_and_leave_the_last_checkpoint(project, tmp_path, monkeypatch):
    poison(monkeypatch, range(4, 99), with_nan)
    monkeypatch.setattr(engine_flowar, "MAX_BAD_STEPS", 4)
    with pytest.raises(FlowARError, match="4 steps in a row with non-finite loss or gradients, up to step 8: lower --lr"):
        train(project, tmp_path, "--save_every 2")
    assert steps_of(tmp_path) == [4, 2]  # none during the bad steps
    assert all(value.isfinite().all() for name, value in read_checkpoint(tmp_path)["model"].items() if name != "mask")


def test_an_epoch_of_bad_steps_alone_is_not_saved(project, tmp_path, monkeypatch):
    poison(monkeypatch, range(4, 10), with_nan)  # the last of the first epoch, all of the second
    train(project, tmp_path, "--epochs 3 --save_last_freq 1 --keep 9")
    assert steps_of(tmp_path) == [15, 5]


@pytest.mark.parametrize("saving", ["--save_every 2", "--save_last_freq 100"])  # saved in the same step; in none
def test_weights_that_are_not_finite_end_the_run(project, tmp_path, monkeypatch, saving):
    """The optimizer spoils them in step 6; the checkpoints before stay."""
    steps = []
    monkeypatch.setattr(engine_flowar, "MAX_BAD_STEPS", 3)

    class Overflowing(torch.optim.SGD):
        def step(self):
            super().step()
            if self.param_groups[0]["params"][0].grad is not None and len(steps) == 5:
                self.param_groups[0]["params"][0].data.fill_(math.inf)
            steps.append(1)

    monkeypatch.setattr(recipe, "build_optimizer", lambda model, lr, *_: Overflowing(model.parameters(), lr=lr))
    with pytest.raises(FloatingPointError, match=f"weights are not finite after step {6 if '2' in saving else 9}"):
        train(project, tmp_path, f"{saving} --blr 1e-3")
    assert steps_of(tmp_path) == ([4, 2] if "2" in saving else [])
    assert "2" not in saving or all(value.isfinite().all() for name, value in read_checkpoint(tmp_path)["model"].items() if name != "mask")


# ---- rates and state of optimizers -----------------------------------------------------------------------------


def two_rates(model, lr, weight_decay, *_):
    halves = list(model.parameters())[::2], list(model.parameters())[1::2]
    return torch.optim.SGD([{"params": halves[0]}, {"params": halves[1], "lr": lr / 10}], lr=lr, momentum=0.9, weight_decay=weight_decay)


def test_a_resume_keeps_rates_of_groups_and_takes_peak_and_weight_decay_of_now(project, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "build_optimizer", two_rates)
    train(project, tmp_path, "--epochs 1 --lr 1e-3 --lr_schedule constant --warmup_epochs 1")
    content = train(project, tmp_path, f"--epochs 2 --lr 2e-3 --weight_decay 0.5 --lr_schedule constant --warmup_epochs 1 --resume {tmp_path}")
    assert [(group["lr"], group["weight_decay"]) for group in content["optimizer"]["param_groups"]] == [(2e-3, 0.5), (pytest.approx(2e-4), 0.5)]


def test_a_resume_takes_the_betas_of_now(project, tmp_path):
    train(project, tmp_path, "--epochs 1")
    content = train(project, tmp_path, f"--epochs 2 --betas 0.8,0.9 --resume {tmp_path}")
    assert [tuple(group["betas"]) for group in content["optimizer"]["param_groups"]] == [(0.8, 0.9)] * 2


def test_another_optimizer_is_refused_by_name(project, tmp_path, monkeypatch):
    train(project, tmp_path, "--epochs 1")
    for optimizer, name in ((sgd, "SGD"), (muon, "MuonWithAdamW"))[:1 + hasattr(torch.optim, "Muon")]:
        monkeypatch.setattr(recipe, "build_optimizer", optimizer)
        with pytest.raises(FlowARError, match=f"checkpoint-000000005.pth: the optimizer is AdamW, this run uses {name}"):
            train(project, tmp_path, f"--epochs 2 --resume {tmp_path}")
    monkeypatch.setattr(recipe, "build_optimizer", lambda model, lr, *_: torch.optim.AdamW(model.parameters(), lr=lr))  # one group in place of two
    with pytest.raises(FlowARError, match="the optimizer has other parameters or parameter groups"):
        train(project, tmp_path, f"--epochs 2 --resume {tmp_path}")
