"""Training that is killed, preempted, starved or poisoned, and goes on to the same weights."""
import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import seams
import torch
from helpers import (GEOMETRY, ROOT, assert_same_run, finish, inputs, make_project, ranks_of, read_checkpoint, read_log, run, small_model,
                     start, train, training_command, wait_for)
from torch.utils.data import Dataset

from models import FlowARError
from models.layers import GatedMLP
from models.weights import content_hash
from util.training import checkpoint, parallel
from util.data import build_loader
from util.training.health import first_difference, first_not_finite
from util.cluster import RESTART, Preempted, init
from util.training.progress import Progress

DROPOUT = "--attn_dropout 0.2 --proj_dropout 0.2"
LONG = f"--epochs 5 --save_every 3 --keep 3 --posthoc_ema 6 {DROPOUT}"  # 25 steps


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def undisturbed(project, tmp_path_factory):
    """The runs that the killed ones must equal, by number of processes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(project, folder / "1", LONG)
    run(training_command(project, folder / "2", f"{LONG} --batch_size 8"), processes=2)
    return folder


# ---- resume at any step ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def stopping_before(step, error=KeyboardInterrupt):
    """Training dies in the given step, as if killed: nothing of it is done."""
    def die(original, run, parts, number):
        if number == step:
            if run.writer:
                run.writer.wait()
            raise error
        return original(run, parts, number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(error):
        seams.wrap(patch, seams.STEP, die)
        yield


@pytest.mark.parametrize("extra", [pytest.param("", marks=pytest.mark.slow), "--precision fp16 --accum_iter 2 --posthoc_ema 2 --ema_warmup",
                                   pytest.param("--save_every 2 --log_freq 3 --deterministic", marks=pytest.mark.slow)])
def test_stopped_at_any_step_it_ends_with_the_same_bits_and_log(project, tmp_path, extra):
    common = f"--epochs 3 --save_every 1 --keep 1 --eval_freq 2 {DROPOUT} {extra}"
    try:
        train(project, tmp_path / "whole", common)
        for step in (1, 4, 5, 6, 9):  # twice in the first epoch, on both sides of its end, in the second
            if step < 3 * (80 // (32 if "accum" in extra else 16)):
                with stopping_before(step):
                    train(project, tmp_path / "parts", f"{common} --resume {tmp_path}/parts")
        torch.rand(7)  # what was drawn before the restart must not matter
        train(project, tmp_path / "parts", f"{common} --resume {tmp_path}/parts")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert [path.name for path in checkpoint.of_steps(tmp_path / "parts")] == [path.name for path in checkpoint.of_steps(tmp_path / "whole")]


def interrupt(*args):
    for writer in threading.enumerate():  # here the checkpoint of the epoch's end is written before the run dies
        if writer.name == checkpoint.WRITER:
            writer.join()
    raise KeyboardInterrupt


def test_a_report_that_was_cut_short_is_repeated(project, tmp_path, monkeypatch):
    common = f"--epochs 2 --eval_freq 1 --save_last_freq 1 {DROPOUT}"
    train(project, tmp_path / "whole", common)
    for place in (seams.VALIDATION, seams.GRID):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            seams.wrap(patch, place, interrupt)
            train(project, tmp_path / "parts", f"{common} --resume {tmp_path}/parts")
    train(project, tmp_path / "parts", f"{common} --resume {tmp_path}/parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert [line["step"] for line in read_log(tmp_path / "parts") if line["group"] == "report"] == [5, 10]


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_it_ends_with_the_same_bits(project, undisturbed, tmp_path, processes):
    """SIGKILL to everything, at whatever it was doing; one process twice."""
    command = training_command(project, tmp_path, f"{LONG} --batch_size {16 // processes} --num_workers {2 - processes} --resume {tmp_path}")
    launched = processes if processes > 1 else 0
    for step in (6, 15)[processes - 1:]:
        process = start(command, launched)
        wait_for(tmp_path / f"checkpoint-{step:09d}.pth", process)
        process.send_signal(signal.SIGKILL)
        for rank in ranks_of(process) if launched else ():
            subprocess.run(["kill", "-9", str(rank)], stderr=subprocess.DEVNULL)
        finish(process)
    status, output = finish(start(command, launched))
    assert status == 0 and "going on after step" in output, output
    assert_same_run(tmp_path, undisturbed / str(processes))
    assert [checkpoint.step_of(path) for path in checkpoint.numbered(tmp_path, "posthoc")] == [24, 18, 12, 6]


def test_another_number_of_processes_goes_on_with_the_same_global_batch(project, tmp_path, capsys):
    common = "--epochs 3 --save_every 7 --attn_dropout 0 --proj_dropout 0 --warmup_epochs 0 --log_freq 1"
    run(training_command(project, tmp_path / "two", f"{common} --batch_size 8"), processes=2)
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    for later in checkpoint.of_steps(tmp_path / "one")[:-1]:
        later.unlink()
    (tmp_path / "one" / checkpoint.LAST).unlink()
    first, = checkpoint.of_steps(tmp_path / "one")
    start_step = checkpoint.step_of(first)
    train(project, tmp_path / "one", f"{common} --batch_size 8 --resume {tmp_path}/one")
    assert "global batch 16: 8 images x 1 processes x 2 forward passes" in capsys.readouterr().out
    a, b = ([line for line in read_log(tmp_path / name) if line["group"] == "train"] for name in ("one", "two"))
    assert [line["step"] for line in a] == [line["step"] for line in b] == list(range(1, 16)) and start_step in (7, 14)
    # AdamW turns rounding into steps of the learning rate's size, so the losses part slowly.
    assert [line["loss"] for line in a] == pytest.approx([line["loss"] for line in b], rel=2e-3)
    assert [line["loss"] for line in a[:start_step + 1]] == pytest.approx([line["loss"] for line in b[:start_step + 1]], rel=1e-5)


@pytest.mark.parametrize("extra,message", [
    ("--global_batch 20", "it is in the middle of an epoch with global batch 16, now global batch is 20"),
    ("--data_path {}/more", "it is in the middle of an epoch with images 80, now images is 90"),
])
def test_in_the_middle_of_an_epoch_data_and_batch_stay(project, tmp_path, extra, message):
    with stopping_before(4):
        train(project, tmp_path / "run", "--save_every 3")
    make_project(tmp_path / "more", per_class=9)
    (tmp_path / "more" / "images" / "train").rename(tmp_path / "more" / "train")
    shutil.rmtree(tmp_path / "more" / "images")
    with pytest.raises(FlowARError, match=f"checkpoint-000000003.pth: {message}"):
        train(project, tmp_path / "run", f"--resume {tmp_path}/run {extra.format(tmp_path)}")
    assert read_checkpoint(tmp_path / "run")["progress"]["step"] == 3


def test_a_damaged_newest_checkpoint_costs_only_its_steps(project, tmp_path, capsys):
    common = f"--save_every 2 {DROPOUT}"
    train(project, tmp_path / "whole", common)
    with stopping_before(7):
        train(project, tmp_path / "parts", common)
    newest = checkpoint.of_steps(tmp_path / "parts")[0]
    newest.write_bytes(newest.read_bytes()[:-5000])
    train(project, tmp_path / "parts", f"{common} --resume {tmp_path}/parts")
    said = capsys.readouterr().out
    assert "checkpoint-000000006.pth: damaged or cut short" in said and "going back to checkpoint-000000004.pth" in said
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow  # three trainings
def test_start_epoch_counts_once(project, tmp_path, capsys):
    """The same command again goes on and does not go back."""
    train(project, tmp_path / "run", "--epochs 3")
    command = f"--epochs 4 --start_epoch 1 --save_every 1 --resume {tmp_path}/run"
    with stopping_before(12):
        train(project, tmp_path / "run", command)
    assert "--start_epoch: going on with epoch 2" in capsys.readouterr().out
    assert train(project, tmp_path / "run", command)["progress"]["step"] == 20
    assert "going on after step 12, in epoch 3" in capsys.readouterr().out


def test_validation_does_not_depend_on_the_batch(project, tmp_path):
    train(project, tmp_path, "--epochs 1")
    losses = [[line["loss"] for line in read_log(tmp_path) if line["group"] == "val"]]
    for batch in (4, 3):
        lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if line["group"] == "train"))
        train(project, tmp_path, f"--epochs 1 --batch_size {batch} --global_batch 16 --resume {tmp_path}")  # makes the report again
        losses.append([line["loss"] for line in read_log(tmp_path) if line["group"] == "val"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_half_an_environment_is_named(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(FlowARError, match="the environment has RANK but not WORLD_SIZE"):
        init("cpu")


def test_saving_by_the_clock(project, tmp_path):
    train(project, tmp_path, "--save_every 0.0001m --keep 50 --epochs 1")
    assert len(checkpoint.of_steps(tmp_path)) > 2
    train(project, tmp_path / "never", "--save_every 0 --keep 50 --epochs 1")
    assert [checkpoint.step_of(path) for path in checkpoint.of_steps(tmp_path / "never")] == [5]


def test_the_checkpoint_that_was_gone_back_to_stays(project, tmp_path):
    train(project, tmp_path, "--epochs 1 --save_every 1 --keep 5")
    train(project, tmp_path, f"--epochs 1 --save_every 1 --keep 1 --resume {tmp_path}/checkpoint-000000002.pth")
    assert [checkpoint.step_of(path) for path in checkpoint.of_steps(tmp_path)] == [5, 2]


# ---- asked to leave --------------------------------------------------------------------------------------------


def test_a_signal_saves_and_leaves_with_a_status_of_its_own(project, undisturbed, tmp_path):
    command = training_command(project, tmp_path, f"{LONG} --num_workers 1 --resume {tmp_path}")
    process = start(command)
    wait_for(tmp_path / "checkpoint-000000009.pth", process)
    subprocess.run(["pkill", "-TERM", "-g", str(process.pid)], check=True)  # the whole group, as SLURM does
    status, output = finish(process)
    assert status == RESTART == 75, output
    step = read_checkpoint(tmp_path)["progress"]["step"]
    assert f"asked to leave: saved after step {step}; the same command goes on (exit status 75)" in output and 9 <= step < 25
    assert finish(start(command))[0] == 0
    assert_same_run(tmp_path, undisturbed / "1")


@pytest.mark.slow  # tests/cluster/test_limits.py ends such workers too
def test_workers_of_a_fork_server_end_with_the_run(project, undisturbed, tmp_path):
    """Python 3.14's way to start them: SIGTERM and Ctrl-C to the whole group, then to the end; no process stays."""
    def run_until(step, *numbers):
        process = start(f"{ROOT}/tests/start_method.py forkserver {training_command(project, tmp_path, f'{LONG} --num_workers 1 --resume {tmp_path}')}")
        if numbers:
            wait_for(tmp_path / f"checkpoint-{step:09d}.pth", process)
        for number in numbers:
            os.killpg(process.pid, number)
        output = process.communicate(timeout=240)[0]
        wait_for_the_end(process.pid)
        return process.returncode, output

    status, output = run_until(9, signal.SIGTERM, signal.SIGINT)
    step = read_checkpoint(tmp_path)["progress"]["step"]
    assert status == 130 and "interrupted: saving first; Ctrl-C again leaves at once" in output, output
    assert f"asked to leave: saved after step {step}; the same command goes on (exit status 130)" in output and 9 <= step < 25
    assert run_until(25)[0] == 0
    assert_same_run(tmp_path, undisturbed / "1")


def wait_for_the_end(group, seconds=20):
    """AssertionError if a process of a group is still there after some seconds."""
    for _ in range(10 * seconds):
        if subprocess.run(["pgrep", "-g", str(group)], stdout=subprocess.DEVNULL).returncode:
            return
        time.sleep(0.1)
    raise AssertionError(subprocess.run(["pgrep", "-a", "-g", str(group)], capture_output=True, text=True).stdout)


def test_ctrl_c_saves_and_names_the_command_that_goes_on(project, tmp_path, monkeypatch):
    """It would be refused without --resume."""
    def interrupt_in_step_3(original, run, parts, number):
        if number == 2:
            signal.raise_signal(signal.SIGINT)
        return original(run, parts, number)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    try:
        seams.wrap(monkeypatch, seams.STEP, interrupt_in_step_3)
        with pytest.raises(Preempted, match=f"saved after step 4; the same command with --resume {tmp_path} goes on .exit status 130.") as ended:
            train(project, tmp_path)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.status == 130 and read_checkpoint(tmp_path)["progress"]["step"] == 4


def test_torchrun_starts_a_run_again_that_left(project, undisturbed, tmp_path):
    """SIGUSR1 to one rank: both save together and leave, and --max-restarts takes it from there."""
    process = start(training_command(project, tmp_path, f"{LONG} --batch_size 8 --resume {tmp_path}"), processes=2, restarts=1)
    wait_for(tmp_path / "checkpoint-000000009.pth", process)
    subprocess.run(["kill", "-USR1", str(ranks_of(process)[1])], check=True)
    status, output = finish(process)
    assert status == 0 and output.count("asked to leave: saved after step") == 1, output
    assert_same_run(tmp_path, undisturbed / "2")


def test_a_signal_during_a_report_leaves_at_once_and_the_report_is_made_again(project, tmp_path, monkeypatch):
    common = f"--eval_freq 1 --save_last_freq 100 {DROPOUT}"
    train(project, tmp_path / "whole", common)
    with monkeypatch.context() as patch, pytest.raises(Preempted, match="asked to leave: saved after step 5, the report after it will be made again"):
        seams.wrap(patch, seams.VALIDATION, lambda *args: signal.raise_signal(signal.SIGTERM))
        train(project, tmp_path / "parts", common)
    assert read_checkpoint(tmp_path / "parts")["progress"]["step"] == 5
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(project, tmp_path / "parts", f"{common} --resume {tmp_path}/parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


# ---- a dead rank -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_dead_rank_ends_the_job_by_name(project, undisturbed, tmp_path, victim):
    command = training_command(project, tmp_path, f"{LONG} --batch_size 8 --timeout 5 --resume {tmp_path}")
    process = start(command, processes=2)
    wait_for(tmp_path / "checkpoint-000000009.pth", process)
    subprocess.run(["kill", "-9", str(ranks_of(process)[victim])], check=True)
    status, output = finish(process)
    assert status != 0 and f"error (rank {1 - victim}): lost rank {victim} (host " in output, output
    assert "the same command goes on from the last checkpoint" in output and "Traceback (most recent call last)" not in output.split("error (rank")[1].split("\n")[0]
    if victim == 0:  # after the other it is as when both were killed
        assert finish(start(command, processes=2))[0] == 0
        assert_same_run(tmp_path, undisturbed / "2")


# ---- steps that are not finite ---------------------------------------------------------------------------------


def poison(monkeypatch, step, change):
    """Change the latents of a step before they are used."""
    calls = iter(range(10**6))

    def poisoned(original, *args):
        latents, labels, draws = original(*args)
        return change(latents) if next(calls) == step else latents, labels, draws

    seams.wrap(monkeypatch, seams.PREPARED, poisoned)


def with_nan(latents):
    latents = latents.clone()
    latents[5, 0, 0, 0] = math.nan
    return latents


def state_of(network, ema, optimizer):
    return [content_hash(part) for part in (network, ema, optimizer["state"])]


@pytest.fixture
def bad_steps(monkeypatch):
    """The state after every bad step, as hashes: of weights, EMA and moments."""
    found, runs = [], []

    def note_the_run(original, run, *args):
        runs.append(run)
        return original(run, *args)

    def log_and_look(original, *args):
        original(*args)
        run = runs[-1]
        found.append(state_of(*(parallel.snapshot(part.state_dict()) for part in (run.network, run.ema.module, run.optimizer))))

    seams.wrap(monkeypatch, seams.STEP, note_the_run)
    seams.wrap(monkeypatch, seams.BAD_STEP, log_and_look)
    return found


def saved_state(output, step):
    content = torch.load(output / f"checkpoint-{step:09d}.pth", weights_only=True)
    return state_of(content["model"], content["model_ema"], content["optimizer"])


def check_a_bad_step(output, bad_steps):
    """Step 4 was bad: it left everything as step 3 did, it was not saved, and step 5 was made."""
    after, = bad_steps
    assert after == saved_state(output, 3) != saved_state(output, 5)
    assert [checkpoint.step_of(path) for path in checkpoint.of_steps(output)] == [10, 9, 8, 7, 6, 5, 3, 2, 1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bad_step_changes_nothing_and_is_named(project, tmp_path, monkeypatch, bad_steps, precision):
    poison(monkeypatch, 3, with_nan)
    content = train(project, tmp_path, f"--save_every 1 --keep 20 --precision {precision} {DROPOUT}")
    check_a_bad_step(tmp_path, bad_steps)
    assert content["progress"]["bad_steps"] == 1 and content["progress"]["bad_in_a_row"] == 0
    line, = [line for line in read_log(tmp_path) if line["group"] == "bad_step"]
    assert line["step"] == 4 and line["first"] == "the latents of image 5 of this rank's batch 0 on rank 0" and len(line["images"]) == 16
    assert all(math.isfinite(line["loss"]) for line in read_log(tmp_path) if line["group"] == "train")
    assert [line["bad_steps"] for line in read_log(tmp_path) if line["group"] == "train"] == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("extra", ["", pytest.param("--fsdp", marks=pytest.mark.slow)])
def test_a_bad_step_is_skipped_on_every_rank_alike(tmp_path, extra):
    """An image of a cache is not finite: one rank has it, all skip the step, and the loss of the others is logged."""
    rng = np.random.default_rng(0)
    for label in range(10):
        folder = tmp_path / "cache" / str(label)
        folder.mkdir(parents=True)
        for i in range(8):
            moments = rng.standard_normal((8, 4, 4)).astype(np.float32)
            if (label, i) == (3, 3):
                moments[0, 0, 0] = np.inf
            np.savez(folder / f"{i}.npz", moments=moments, moments_flip=moments)
    (tmp_path / "cache" / "latents.json").write_text(json.dumps({"complete": True, "latent_scale": [1.0, 0.0]}))
    command = (f"main_flowar.py {GEOMETRY} --vae_path {tmp_path}/no_vae --data_path {tmp_path} --cached_path {tmp_path}/cache --output_dir {tmp_path}/out "
               f"--epochs 2 --warmup_epochs 0 --batch_size 8 --num_workers 0 --device cpu --log_freq 1 --save_every 0 {extra}")
    run(command, processes=2)
    bad = [line for line in read_log(tmp_path / "out") if line["group"] == "bad_step"]
    assert len(bad) == 2 and all(3 * 8 + 3 in line["images"] and len(line["images"]) == 8 for line in bad)  # once an epoch
    assert all(line["first"] == f"the latents of image {line['images'].index(27)} of this rank's batch 0 on rank {line['rank']}" for line in bad)
    progress = read_checkpoint(tmp_path / "out")["progress"]
    assert progress["bad_steps"] == 2 and progress["step"] == 10
    assert len([line for line in read_log(tmp_path / "out") if line["group"] == "train"]) == 8


def test_too_many_bad_steps_stop_and_leave_the_last_checkpoint(project, tmp_path, monkeypatch):
    def poisoned(original, run, *args):
        latents, labels, draws = original(run, *args)
        return (with_nan(latents) if run.progress.step >= 4 else latents), labels, draws

    seams.wrap(monkeypatch, seams.PREPARED, poisoned)
    with pytest.raises(FlowARError, match="4 steps in a row were not finite, up to step 8 .--max_bad_steps 4."):
        train(project, tmp_path, "--save_every 2 --max_bad_steps 4")
    assert [checkpoint.step_of(path) for path in checkpoint.of_steps(tmp_path)] == [4, 2]  # none during the bad steps
    assert all(value.isfinite().all() for name, value in read_checkpoint(tmp_path)["model"].items() if name != "mask")


class Spoiled(torch.autograd.Function):
    """Identity whose gradient is not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


@pytest.mark.parametrize("where", ["output", "gradient", "parameter", "latents", "nothing"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_first_that_is_not_finite_is_named(where, recompute):
    model = small_model(use_checkpoint=recompute, encoder_depth=2).train()
    latents, labels, t, noise = inputs(model)
    mlp = model.encoder_blocks[1].mlp
    assert isinstance(mlp, GatedMLP)
    if where == "output":
        mlp.register_forward_hook(lambda module, args, output: output * math.inf)
    elif where == "gradient":
        mlp.register_forward_pre_hook(lambda module, args: (Spoiled.apply(args[0]),))
    elif where == "parameter":
        mlp.fc2.weight.register_hook(lambda gradient: gradient * math.inf)
    elif where == "latents":
        latents[1] = math.nan
    held = model.class_emb.weight.grad = torch.ones_like(model.class_emb.weight)
    found = first_not_finite(model, [lambda: model(latents, labels, t=t, noise=noise)], [latents])
    expected = {"output": "the output of encoder_blocks.1.mlp", "parameter": "the gradient of encoder_blocks.1.mlp.fc2.weight",
                "latents": "the latents of image 1 of this rank's batch 0", "nothing": None}
    if where == "gradient":  # the first module behind the spoiled input, in the order of the backward pass
        assert found.startswith("the gradient of the output of encoder_blocks.")
    else:
        assert found == expected[where]
    assert torch.equal(model.class_emb.weight.grad, held) and model.z_proj.weight.grad is None


class BitFlip(torch.autograd.Function):
    """The identity, but one bit of the first number is another in call number `calls`, forward or backward."""
    @staticmethod
    def forward(ctx, x, flips):
        ctx.flips = flips
        return flip(x) if flips.forward() else x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return flip(gradient) if ctx.flips.backward() else gradient, None


def flip(x):
    bits = x.clone().view(torch.int32)
    bits.view(-1)[0] ^= 1 << 22
    return bits.view(torch.float32)


class Flips:
    """Of the passes through a module in a direction, the numbers `wrong` are wrong."""
    def __init__(self, direction, wrong):
        self.direction, self.wrong, self.seen = direction, wrong, {"forward": 0, "backward": 0}

    def forward(self, direction="forward"):
        self.seen[direction] += 1
        return direction == self.direction and self.seen[direction] - 1 in self.wrong

    def backward(self):
        return self.forward("backward")

    def into(self, module):
        module.register_forward_pre_hook(lambda module, args: (BitFlip.apply(args[0], self), *args[1:]))


@pytest.mark.parametrize("direction,wrong,first", [("forward", [1], "the loss"), ("backward", [1], "the gradient of "), ("forward", [], None),
                                                   ("forward", [0, 1], None)])
def test_a_device_that_computes_other_bits_is_noticed(direction, wrong, first):
    """Not one that is always wrong in the same way: that takes another device to compare with."""
    model = small_model(attn_dropout=0.1, use_checkpoint=False).train()
    latents, labels, t, noise = inputs(model)
    held = model.class_emb.weight.grad = torch.ones_like(model.class_emb.weight)

    def loss():
        torch.manual_seed(0)
        return model(latents, labels, t=t, noise=noise)

    Flips(direction, wrong).into(model.encoder_blocks[0].mlp)
    found = first_difference(model, [loss])
    assert found == first or first and found.startswith(first)
    assert torch.equal(model.class_emb.weight.grad, held) and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("faulty", [True, False])
def test_a_faulty_device_is_named_after_a_spike(project, tmp_path, monkeypatch, faulty):
    monkeypatch.setattr(*seams.SPIKE_MEMORY, 4)
    poison(monkeypatch, 7, lambda latents: 100 * latents)
    if faulty:  # after nine steps the step is made twice more
        seams.wrap(monkeypatch, seams.NETWORK, lambda original, *args, **sizes: with_flips(original(*args, **sizes), Flips("forward", [10])))
    train(project, tmp_path, "--blr 1e-6")
    lines = [line for line in read_log(tmp_path) if line["group"] == "device"]
    assert [line["rank"] for line in lines] == [0] * faulty
    if faulty:
        assert lines[0]["step"] == 8 and f"rank 0 on {socket.gethostname()}: this device computes different results for the same input, first the " \
            in lines[0]["message"]


def with_flips(network, flips):
    flips.into(network.encoder_blocks[0].mlp)
    return network


# ---- spikes ----------------------------------------------------------------------------------------------------


def test_a_spike_is_far_above_the_usual_loss():
    progress, rng = Progress(), np.random.default_rng(0)
    losses = 2 + 3 * np.exp(-np.arange(400) / 50) + 0.1 * rng.standard_normal(400)  # falls, with noise
    losses[:3] *= 10  # at the start nothing is usual
    losses[[250, 333]] = 3.5
    assert [i for i, loss in enumerate(losses) if progress.add([1.0, loss])] == [250, 333]
    assert progress.usual == pytest.approx(2, abs=0.1) and len(progress.recent) == 100
    assert Progress.of(json.loads(json.dumps(progress.state_dict())), "x") == progress


def test_a_spike_is_logged_with_the_images_of_the_step(project, tmp_path, monkeypatch):
    monkeypatch.setattr(*seams.SPIKE_MEMORY, 4)
    poison(monkeypatch, 7, lambda latents: 100 * latents)
    train(project, tmp_path, "--blr 1e-6")
    line, = [line for line in read_log(tmp_path) if line["group"] == "spike"]
    order = build_loader(type("Eighty", (Dataset,), {"__len__": lambda self: 80})(), 16, seed=0, train=True).sampler
    order.set_epoch(1)
    assert line["step"] == 8 and line["images"] == order.indices(32, 48)
    assert line["loss"] > 10 * line["usual"] and line["rank"] == 0 and line["loss_rank"] == line["loss"]


# ---- disks -----------------------------------------------------------------------------------------------------


def test_a_full_disk_ends_in_one_line_and_the_last_checkpoint_is_whole(project, tmp_path):
    """Files may not grow beyond 10 MB: no checkpoint fits. What was there goes on from where it was."""
    train(project, tmp_path, "--epochs 1")
    before = (tmp_path / checkpoint.LAST).read_bytes()
    limited = f"ulimit -f 10000; exec {sys.executable} {training_command(project, tmp_path, f'--save_every 2 --epochs 4 --resume {tmp_path}')}"
    done = subprocess.run(["bash", "-c", limited], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "checkpoint-000000006.pth: cannot be written ([Errno 27] File too large)" in done.stderr and "Traceback" not in done.stderr
    assert checkpoint.find(tmp_path).read_bytes() == before and not list(tmp_path.glob("*.tmp"))
    assert train(project, tmp_path, f"--epochs 2 --resume {tmp_path}")["progress"]["step"] == 10


FAILING = """
import sys, time
sys.path.insert(0, {root!r})
import main_flowar
from util import cluster
from util.training import checkpoint
write_file = checkpoint.write_file

def slowly(content, path):
    time.sleep(3)
    if {full}:
        raise checkpoint.FlowARError(f"{{path}}: cannot be written")
    write_file(content, path)

def fail(run, *args):
    if cluster.rank() == {failing}:
        raise checkpoint.FlowARError("no report")
    time.sleep(60)

checkpoint.write_file, main_flowar.report = slowly, fail
cluster.run_main(main_flowar.main)
"""


@pytest.mark.parametrize("failing,processes,full", [pytest.param(0, 0, False, marks=pytest.mark.slow), (0, 0, True),
                                                    pytest.param(0, 2, False, marks=pytest.mark.slow), (1, 2, False)])
def test_a_checkpoint_that_is_being_written_outlives_an_error(project, tmp_path, failing, processes, full):
    """Whoever has the error; what fails meanwhile is said after it."""
    (tmp_path / "failing.py").write_text(FAILING.format(root=str(ROOT), failing=failing, full=full))
    command = training_command(project, tmp_path / "out", f"--epochs 1 --batch_size {16 // max(processes, 1)}")
    done = run(command.replace("main_flowar.py", f"{tmp_path}/failing.py"), processes, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    written = tmp_path / "out" / "checkpoint-000000005.pth"
    assert errors[0] == ("error: no report" if not processes else f"error (rank {failing}): no report"), done.stderr
    assert errors[1:] == ([f"error: {written}: cannot be written"] if full else [])
    assert done.returncode == (1 if processes else 2) and written.is_file() == (not full)


def test_data_that_vanishes_ends_in_one_line_on_all_ranks(tmp_path):
    make_project(tmp_path / "project")
    command = training_command(tmp_path / "project", tmp_path / "out", "--batch_size 8 --epochs 100 --save_every 3")
    process = start(command, processes=2)
    wait_for(tmp_path / "out" / "checkpoint-000000009.pth", process)
    (tmp_path / "project" / "images").rename(tmp_path / "gone")
    status, output = finish(process)
    assert status != 0 and "cannot be read as an image ([Errno 2] No such file or directory" in output
    assert output.count("\nerror (rank") == 1, output
    checkpoint.find(tmp_path / "out")


def test_many_unreadable_images_in_a_row_are_gone_not_damaged(project, tmp_path, monkeypatch):
    monkeypatch.setattr(*seams.MOST_UNREADABLE, 5)
    shutil.copytree(project, tmp_path / "project")
    for path in (tmp_path / "project" / "images" / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(FlowARError, match="neither this image nor the 5 before it can be read: is the disk there"):
        train(tmp_path / "project", tmp_path / "out", "--on_bad_image skip")


def test_a_log_is_mended(tmp_path):
    from util.training.logging import TrainingLog
    (tmp_path / "log.jsonl").write_text('{"group": "train", "step": 2, "epoch": 0.1, "loss": 1.5}\n[1]\n{"group": "val", "step": 2}\n'
                                        '{"group": "train", "step": 4}\n{"group": "tra')
    log = TrainingLog(tmp_path, torch.device("cpu"), step=2)
    log.close()
    assert (tmp_path / "log.jsonl").read_text() == '{"group": "train", "step": 2, "epoch": 0.1, "loss": 1.5}\n'


