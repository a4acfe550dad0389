"""Floating-point operations of a FlowAR: 2 for every multiply and add of a matrix product, counted on the meta device. And what
a GPU is asked to do at least, counted there too.

Only matrix products count, at their published sizes (a padded layer's zeros do not), and a backward pass is two forward
passes: recomputation earns nothing. So "share of peak" is what nanoGPT and PaLM call model FLOPs utilisation.
"""
import project_root  # noqa: F401

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from scripts.measure import Work
from util.evaluation.sampler import count_passes


class GPU(NamedTuple):
    data_sheet: float  # FLOP/s of dense bf16 and fp16 products
    reached: float  # of a product of 8192 x 8192 matrices, 770 to 800 TFLOP/s
    bandwidth: float  # bytes/s of its memory


GPUS = {"H100": GPU(989e12, 785e12, 3.35e12), "H200": GPU(989e12, 785e12, 4.8e12)}


def count_flops(function):
    """Operations of function()."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def on_meta(model):
    """The same model without numbers."""
    with torch.device("meta"):
        return type(model)(**model.config).eval()


def training_flops(model):
    """Of one image, forward and backward."""
    model = on_meta(model)
    side = model.scale[-1] * model.patch_size
    latents = torch.empty(1, model.vae_embed_dim, side, side, device="meta")
    labels = torch.empty(1, dtype=torch.long, device="meta")
    return 3 * count_flops(lambda: model(latents, labels))


def sampling_flops(model, batch, **options):
    """Of one image of a batch; options: of FlowAR.sample_tokens."""
    model = on_meta(model)
    labels = torch.empty(batch, dtype=torch.long, device="meta")
    return count_flops(lambda: model.sample_tokens(labels, **options)) / batch


# ---- the work of a GPU, counted without numbers ----------------------------------------------------------------


class AsOnCuda(TorchFunctionMode):
    """Tensors of the meta device take the way of CUDA's under autocast to `dtype`: matrix products and convolutions in dtype, one
    kernel each for attention, RMS norm (in the place of which stands layer norm, which moves the same) and dropout.
    """

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (F.linear, F.conv2d, F.scaled_dot_product_attention):
            args = [x.to(self.dtype) if isinstance(x, torch.Tensor) else x for x in args]
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args, kwargs.get("dropout_p", 0.0))[0]
        if function is F.rms_norm:
            return torch.native_layer_norm(*args, None, None, kwargs["eps"])[0]
        if function in (F.group_norm, F.interpolate):  # on autocast's list of what runs in float32
            args = [args[0].float(), *args[1:]]
        if function is F.dropout and kwargs["p"] > 0 and kwargs["training"]:
            return torch.native_dropout(args[0], kwargs["p"], True)[0]
        return function(*args, **kwargs)


@torch.no_grad()
def step_on_meta(parameters):
    """What clip_grad_norm_, fused AdamW and EMA.update do on CUDA."""
    grads = [p.grad for p in parameters]
    norms = torch._foreach_norm(grads)
    torch._foreach_mul_(grads, torch.linalg.vector_norm(torch.stack(norms)))
    *moments, average = ([torch.empty_like(p) for p in parameters] for _ in range(3))
    steps = [torch.empty((), device="meta") for _ in parameters]
    torch._fused_adamw_(parameters, grads, *moments, [], steps, lr=1e-4, beta1=0.9, beta2=0.95, weight_decay=0.02, eps=1e-8,
                        amsgrad=False, maximize=False)
    torch._foreach_lerp_(average, parameters, 1e-4)


def training_work(model, batch, dtype):
    """The Work of an optimizer step of a batch: forward, backward, clipping, AdamW, EMA. Padding is left out."""
    model = on_meta(model).train()
    side = model.scale[-1] * model.patch_size
    latents = torch.empty(batch, model.vae_embed_dim, side, side, device="meta")
    labels = torch.empty(batch, dtype=torch.long, device="meta")
    with Work() as work, AsOnCuda(dtype):
        loss = model(latents, labels)
        # what backward() calls: backward() itself would leave the mode, and what is recomputed would not be as it was
        _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True)
        step_on_meta(list(model.parameters()))
    return work


@torch.no_grad()
def sampling_work(model, batch, dtype, **options):
    """(the Work of a batch's latents, bytes of weights that it reads at least), weights in dtype as prepare.for_sampling leaves them,
    but for the padding; options: of FlowAR.sample_tokens.
    """
    model = on_meta(model)
    for linear in (module for module in model.modules() if isinstance(module, torch.nn.Linear)):
        linear.to(dtype)
    labels = torch.empty(batch, dtype=torch.long, device="meta")
    with Work() as work, AsOnCuda(dtype):
        model.sample_tokens(labels, **options)
    head = sum(p.numel() for p in model.flownet.parameters())
    rest = sum(p.numel() for block in model.blocks for p in block.parameters())
    return work, dtype.itemsize * (head * sum(map(len, count_passes(model, options))) + rest * len(model.scale))


@torch.no_grad()
def decoding_work(vae, batch, side, dtype):
    """The Work of decoding latents of side x side."""
    with torch.device("meta"):
        vae = type(vae)(**vae.config).eval()
    with Work() as work, AsOnCuda(dtype):
        vae.decode(torch.empty(batch, vae.embed_dim, side, side, device="meta"))
    return work


def least_seconds(gpu, work):
    """On a GPU, when every operation reads and writes memory and computes as fast as the GPU can."""
    return sum(max(flop / gpu.reached, size / gpu.bandwidth) for flop, size in work.each)


def floor_seconds(gpu, flop, size):
    """On a GPU, whatever is fused: so much FLOP, and bytes that no fusion saves."""
    return max(flop / gpu.reached, size / gpu.bandwidth)
