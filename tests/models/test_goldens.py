"""The released model's numbers: loss, condition, gradients, velocity, samples, VAE, optimizer steps."""
import os
import subprocess
import sys

import golden
import numpy as np
import pytest
import torch
from helpers import ROOT

from models import AutoencoderKL, FlowAR
from util.training.optimization import EMA, adjust_learning_rate, build_optimizer

TEACHER_FORCED = ["tiny_attn", "tiny_cross", "tiny_scales_1_4_8_16"]


def build(meta):
    return golden.fill(FlowAR(**meta["config"]), meta["weights_seed"])


def teacher_forcing_inputs(arrays, meta, model):
    labels = torch.from_numpy(arrays["labels"])
    latents = golden.normal(meta["latents_seed"], (len(labels), 16, 16, 16))
    t = golden.times(meta["t_seed"], len(model.scale), len(labels))
    return latents, labels, t, golden.noise(meta["noise_seed"], len(labels), model.scale)


@pytest.mark.parametrize("name", TEACHER_FORCED)
def test_loss_and_condition(name):
    arrays, meta = golden.load(name)
    model = build(meta)
    latents, labels, t, noise = teacher_forcing_inputs(arrays, meta, model)
    assert np.array_equal(t.numpy(), arrays["t"])
    golden.assert_close(model.condition(latents, labels)[..., :8], arrays["condition"])
    golden.assert_close(model.scale_losses(latents, labels, t=t, noise=noise), arrays["loss_per_scale"])
    golden.assert_close(model(latents, labels, t=t, noise=noise), arrays["loss"])


@pytest.mark.parametrize("name", ["tiny_attn", "tiny_cross"])
@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_gradients(name, use_checkpoint):
    arrays, meta = golden.load(name)
    meta["config"]["use_checkpoint"] = use_checkpoint
    model = build(meta).train()
    latents, labels, t, noise = teacher_forcing_inputs(arrays, meta, model)
    drop = torch.zeros(len(labels), dtype=torch.bool)
    model(latents, labels, t=t, noise=noise, drop=drop).backward()
    parameters = dict(model.named_parameters())
    checked = [key for key in arrays if key.startswith("grad_norm/")]
    assert len(checked) == 7
    for key in checked:
        golden.assert_close(parameters[key.split("/", 1)[1]].grad.norm(), arrays[key])


@pytest.mark.parametrize("name", ["tiny_attn", "tiny_cross"])
def test_velocity(name):
    arrays, meta = golden.load(name)
    model = build(meta)
    latents, labels, _, noise = teacher_forcing_inputs(arrays, meta, model)
    z = model.condition(latents, labels)[:, 21:85]
    golden.assert_close(model.flownet(noise[3], torch.from_numpy(arrays["velocity_t"]), z), arrays["velocity"])


@pytest.mark.parametrize("name,setting", [
    (name, setting) for name in TEACHER_FORCED for setting in golden.load(name)[1]["settings"]])
def test_samples(name, setting):
    arrays, meta = golden.load(name)
    model = build(meta)
    labels = torch.from_numpy(arrays["labels"])
    options = dict(meta["settings"][setting])
    options["num_steps_last"] = options.pop("num_steps_last_scale")
    latents = model.sample_tokens(labels, noise=golden.noise(meta["noise_seed"], len(labels), model.scale), **options)
    golden.assert_close(latents, arrays[f"sample_{setting}"])


def test_flowar_small_sample():
    """In a process of its own: a process of tests would grow beyond 1.5 GB."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    subprocess.run([sys.executable, "-c", "import golden; golden.check_flowar_small()"], env=environment, check=True)


def test_kl16():
    arrays, meta = golden.load("kl16")
    vae = golden.fill(AutoencoderKL(), meta["weights_seed"])
    images = np.random.RandomState(meta["image_seed"]).uniform(-1, 1, (2, 3, meta["size"], meta["size"]))
    side = meta["size"] // vae.stride
    with torch.no_grad():
        golden.assert_close(vae.encode(torch.from_numpy(images.astype(np.float32))).parameters, arrays["moments"])
        golden.assert_close(vae.decode(golden.normal(meta["latent_seed"], (2, 16, side, side))), arrays["decoded"])


def test_training_steps():
    """Six optimizer steps of the release's recipe: loss, learning rate, gradient norm, weights, EMA."""
    arrays, meta = golden.load("train_steps")
    model = build(meta).train()
    optimizer = build_optimizer(model, meta["lr"], meta["weight_decay"], betas=tuple(meta["betas"]))
    ema = EMA(model, meta["ema_rate"])
    rs = np.random.RandomState(meta["data_seed"])
    batch, scale = meta["batch"], model.scale
    for step in range(meta["steps"]):
        latents = torch.from_numpy(rs.standard_normal((batch, 16, 16, 16)).astype(np.float32))
        labels = torch.from_numpy(rs.randint(0, 1000, batch))
        t = torch.from_numpy(rs.random_sample((len(scale), batch)).astype(np.float32))
        noise = [torch.from_numpy(rs.standard_normal((batch, s * s, 16)).astype(np.float32)) for s in scale]
        lr = adjust_learning_rate(optimizer, step / meta["steps_per_epoch"], lr=meta["lr"], min_lr=meta["min_lr"],
                                  epochs=meta["epochs"], warmup_epochs=meta["warmup_epochs"])
        loss = model(latents, labels, t=t, noise=noise, drop=torch.zeros(batch, dtype=torch.bool))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), meta["grad_clip"])
        optimizer.step()
        ema.update(model)
        golden.assert_close(lr, arrays["lr"][step])
        golden.assert_close(loss, arrays["loss"][step])
        golden.assert_close(norm, arrays["grad_norm"][step])
    ema_parameters = dict(ema.module.named_parameters())
    for name, parameter in model.named_parameters():
        golden.assert_close(parameter.double().norm(), arrays[f"param_norm/{name}"])
        golden.assert_close(ema_parameters[name].double().norm(), arrays[f"ema_norm/{name}"])
