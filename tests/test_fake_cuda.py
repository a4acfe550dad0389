"""CUDA without a GPU: tensors of a fake "cuda" device, which have shapes and no numbers. An operation on two devices is an error, and so is
whatever looks at a number (.item(), nonzero, a branch): it would make the host wait for the device in every step.
"""
import functools

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from models import AutoencoderKL, build_model
from models import flow_matching as fm

BATCH = 2
fake_mode = functools.cache(FakeTensorMode)  # late: it imports the compiler


@pytest.fixture(autouse=True)
def with_autocast(monkeypatch):
    """PyTorch leaves autocast out, with a warning, where there is no CUDA."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)


def on_cuda(build):
    """A module whose tensors are fake ones on CUDA."""
    with torch.device("meta"):
        module = build()
    with fake_mode():
        for part in module.modules():
            for name, value in part.named_parameters(recurse=False):
                part.register_parameter(name, torch.nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device="cuda")))
            for name, value in part.named_buffers(recurse=False):
                part.register_buffer(name, torch.empty(value.shape, dtype=value.dtype, device="cuda"))
    return module


SIZES = ["flowar_small", "flowar_large"]  # without and with cross-attention


@functools.cache
def model_of(size):
    """Of one block of each kind, which are all alike, and three scales."""
    return on_cuda(lambda: build_model(size, attn_dropout=0.1, proj_dropout=0.1, encoder_depth=1, decoder_depth=1, diffloss_d=1, scale=(1, 4, 16)))


class Times(list):
    tolist = list.copy


def batch(model):
    return torch.empty(BATCH, 16, 16, 16, device="cuda"), torch.empty(BATCH, dtype=torch.long, device="cuda")


@torch.no_grad()
@pytest.mark.parametrize("size,training", [(size, True) for size in SIZES] + [("flowar_small", False)])
def test_no_step_waits_for_the_device(size, training):
    """The loss, and what draws for it; it is on the device, and nobody looked at it."""
    model = model_of(size)
    with fake_mode(), torch.autocast("cuda", torch.bfloat16):
        loss, scales = model.train(training)(*batch(model), return_scales=True)
        assert loss.device.type == scales.device.type == "cuda" and loss.dtype == torch.float32
        assert model.blocks[0].attn.qkv(torch.empty(1, model.z_proj.out_features, device="cuda")).dtype == torch.bfloat16, "autocast acts"
        with pytest.raises(DataDependentOutputException):
            loss.item()


@torch.no_grad()
@pytest.mark.parametrize("size,solver", [(size, "euler") for size in SIZES] + [
    pytest.param("flowar_small", solver, marks=pytest.mark.slow) for solver in fm.SOLVERS if solver != "euler"])
def test_no_step_of_sampling_waits(size, solver, monkeypatch):
    model = model_of(size)
    # a time grid is of the CPU: to read it waits for nothing, but a fake one has no numbers either
    monkeypatch.setattr(fm, "time_grid", lambda steps, kind: Times([1.0, 0.5, 0.0]))
    with fake_mode(), torch.autocast("cuda", torch.float16):
        pyramid = model.sample_pyramid(batch(model)[1], num_steps=4, cfg=3.0, solver=solver)
    assert [x.shape[-1] for x in pyramid] == [1, 4, 16] and pyramid[-1].device.type == "cuda"


@torch.no_grad()
def test_the_vae_and_its_latent_scale():
    vae = on_cuda(AutoencoderKL)
    with fake_mode(), torch.autocast("cuda", torch.float16):
        posterior = vae.encode(torch.empty(BATCH, 3, 64, 64, device="cuda"))
        latents = vae.latent_scale.normalize(posterior.sample())
        assert vae.decode(vae.latent_scale.restore(latents)).device.type == "cuda"
