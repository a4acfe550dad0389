"""What only a GPU can show; skipped without one."""
import copy
import os
import signal

import golden
import numpy as np
import plain
import pytest
import torch
from helpers import (assert_same_run, evaluation_command, finish, inputs, make_project, ranks_of, read_log, run, small_model, start, train,
                     training_command, wait_for)
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from test_goldens import TEACHER_FORCED, build, teacher_forcing_inputs
from test_reliability import stopping_before
from test_steps import bad_states, poison, saved_state, with_nan  # noqa: F401

from models import build_model
from util.speed import prepare
from util.cluster import set_deterministic
from util.training.optimization import EMA, build_optimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
CUDA = torch.device("cuda", 0)
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("name", TEACHER_FORCED)
def test_goldens_in_float32(name):
    torch.set_float32_matmul_precision("highest")
    arrays, meta = golden.load(name)
    model = build(meta)
    latents, labels, t, noise = teacher_forcing_inputs(arrays, meta, model)
    model, noise = model.to(CUDA), [e.to(CUDA) for e in noise]
    losses = model.scale_losses(latents.to(CUDA), labels.to(CUDA), t=t.to(CUDA), noise=noise)
    golden.assert_close(losses.cpu(), arrays["loss_per_scale"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_attention_runs_in_a_fused_kernel(precision):
    """A step runs where no other kernel may."""
    model = build_model("flowar_tiny", attn_dropout=0.1, class_num=10).to(CUDA).train()
    latents, labels = torch.randn(2, 16, 16, 16, device=CUDA), torch.tensor([1, 2], device=CUDA)
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    with sdpa_kernel(kernels), torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        loss = model(latents, labels)
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_does_not_wait_for_the_device(precision):
    model = small_model(attn_dropout=0.1, proj_dropout=0.1).to(CUDA).train()
    optimizer, ema = build_optimizer(model, 1e-3, 0.02), EMA(model, 0.99)
    latents, labels, t, noise = inputs(model.cpu())
    model.to(CUDA)
    latents, labels, t, noise = latents.to(CUDA), labels.to(CUDA), t.to(CUDA), [e.to(CUDA) for e in noise]

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(latents, labels, t=t, noise=noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cross", [False, True])
@torch.no_grad()
def test_sampling_in_float16_is_that_of_the_release(cross):
    """Under autocast as the release samples: the fast way on prepared weights, and the plain way."""
    model = small_model(cross=cross, diffloss_d=2)
    _, labels, _, noise = inputs(model)
    model, labels, noise = model.to(CUDA), labels.to(CUDA), [e.to(CUDA) for e in noise]
    options = dict(cfg=3.0, guidance=0.9, num_steps=10)
    with torch.autocast("cuda", torch.float16):
        expected = plain.sample(model, labels, noise, **options)
        found = prepare.for_sampling(copy.deepcopy(model), torch.float16).sample_tokens(labels, noise=noise, **options)
    golden.assert_close(found.float().cpu(), expected.float().cpu(), tolerance=2e-2)


@pytest.mark.parametrize("what", ["blocks", "graphs"])
@pytest.mark.parametrize("cross", [False, True])
def test_compiled_sampling_equals_eager(what, cross):
    model = small_model(cross=cross, diffloss_d=2).to(CUDA)
    _, labels, _, noise = inputs(model.cpu())
    model, labels = model.to(CUDA), labels.to(CUDA)
    options = dict(noise=noise, cfg=3.0, guidance=0.5, num_steps=10)
    expected = model.sample_tokens(labels, **options)
    compiled = copy.deepcopy(model)
    prepare.compile_sampling(compiled, what)
    for _ in range(3):  # eager warm-up, capture, replay
        golden.assert_close(compiled.sample_tokens(labels, **options).cpu(), expected.cpu(), tolerance=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_stopped_at_any_step_it_ends_with_the_same_bits(tmp_path, precision):
    project = make_project(tmp_path)
    common = f"--save_every 1 --precision {precision} --attn_dropout 0.2 --proj_dropout 0.2"
    set_deterministic()
    try:
        train(project, tmp_path / "whole", common, CUDA)
        with stopping_before(7):
            train(project, tmp_path / "parts", common, CUDA)
        train(project, tmp_path / "parts", f"{common} --resume {tmp_path}/parts", CUDA)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_bad_step_changes_nothing(tmp_path, monkeypatch, bad_states):  # noqa: F811
    poison(monkeypatch, [3], with_nan)
    train(make_project(tmp_path), tmp_path / "out", "--save_every 1 --keep 20", CUDA)
    assert bad_states == [saved_state(tmp_path / "out", 3)]


def test_a_compiled_training_runs_under_torchrun(tmp_path):
    run(training_command(make_project(tmp_path), tmp_path / "run", "--device cuda --precision bf16 --compile --use_checkpoint --epochs 1"), processes=1)


def test_a_compiled_evaluation_runs_under_torchrun(tmp_path):
    project = make_project(tmp_path)
    train(project, tmp_path / "run", "--epochs 1", CUDA)
    run(evaluation_command(project, tmp_path / "run", tmp_path / "found", "--device cuda --precision bf16 --compile --save_images"), processes=1)
    assert len(list((tmp_path / "found" / "images").iterdir())) == 10


def test_images_of_a_gpu_are_those_of_a_cpu(tmp_path):
    project = make_project(tmp_path, 2)
    train(project, tmp_path / "run", "--epochs 1")
    for device in ("cpu", "cuda"):
        run(evaluation_command(project, tmp_path / "run", tmp_path / device, f"--precision fp32 --save_images --eval_bsz 4 --device {device}"))
    for path in (tmp_path / "cpu" / "images").iterdir():
        expected, found = (np.asarray(Image.open(tmp_path / device / "images" / path.name)).astype(int) for device in ("cpu", "cuda"))
        assert abs(found - expected).max() <= 1


@TWO
@pytest.mark.parametrize("way", ["", "--fsdp"])
def test_two_gpus_train_as_one_process_does(tmp_path, way):
    project = make_project(tmp_path)
    common = "--precision fp32 --attn_dropout 0 --proj_dropout 0 --log_freq 1 --device cuda"
    run(training_command(project, tmp_path / "one", f"{common} --batch_size 16"))
    run(training_command(project, tmp_path / "two", f"{common} --batch_size 8 {way}"), processes=2)
    one, two = ([line["loss"] for line in read_log(tmp_path / name) if line["group"] == "train"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=2e-3)


@TWO
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_rank_of_two_gpus_ends_the_job_by_name(tmp_path, number):
    command = training_command(make_project(tmp_path), tmp_path / "run", "--epochs 500 --save_every 3 --timeout 10 --batch_size 8 --device cuda")
    process = start(command, processes=2)
    wait_for(tmp_path / "run" / "checkpoint-000000006.pth", process)
    os.kill(ranks_of(process)[1], number)
    status, output = finish(process)
    assert status != 0 and ("rank 0 waited 10 seconds in one call" in output or "[rank0]: Traceback" in output), output
