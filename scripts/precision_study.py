"""What low precision does to FlowAR, on cached latents: each sensitive place alone, and whole training runs.

    python scripts/precision_study.py --cached_path output/quickstart/latents --cached_val_path output/quickstart/latents_val \\
        --output output/precision

`ours` is --precision bf16: matrix products and attention in bf16; norms, modulation, rotation, residual stream, embedding of the time
and loss in float32. `naive` puts all of them into the low precision, without loss scaling. Writes <output>.json and <output>.png.
"""
import argparse
import contextlib
import sys
from pathlib import Path
from unittest.mock import patch

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine_flowar import machine  # noqa: E402
from models import MODELS, FlowARError, build_model, flow_head, flowar, layers  # noqa: E402
from models.vae import DiagonalGaussian, LatentScale  # noqa: E402
from util.data import build_loader  # noqa: E402
from util.distributed import autocast, run_main, select_device  # noqa: E402
from util.files import make_directory, write_json  # noqa: E402
from util.latents import ShardedMoments  # noqa: E402
from util.optimization import build_optimizer  # noqa: E402
from util.options import default_scales, positive, real  # noqa: E402
from util.randomness import TRAINING, derive_seed, draw  # noqa: E402

RUNS = {"fp32": ("fp32", None), "bf16, ours": ("bf16", None), "bf16, naive": ("bf16", torch.bfloat16), "fp16, naive": ("fp16", torch.float16)}
GRAD_CLIP, WARMUP = 3.0, 0.05


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--cached_path", required=True, help="latents of scripts/cache_latents.py to train on")
    parser.add_argument("--cached_val_path", required=True, help="latents for the validation loss")
    parser.add_argument("--model", choices=MODELS, default="flowar_tiny")
    parser.add_argument("--patch_size", type=positive, default=2)
    parser.add_argument("--steps", type=positive, default=600)
    parser.add_argument("--batch_size", type=positive, default=32)
    parser.add_argument("--lr", type=real, default=2e-3)
    parser.add_argument("--seeds", type=positive, default=3, help="runs of each kind: initial weights, order and draws")
    parser.add_argument("--every", type=positive, default=50, help="steps between validation losses")
    parser.add_argument("--val_images", type=positive, default=2000)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--output", required=True, help="where .json and .png go, without the ending")
    return parser.parse_args()


def product(a, b):
    """a @ b; float16 on a CPU, where it takes seconds, by what a GPU does: float32 sums, rounded."""
    if a.device.type == "cpu" and a.dtype == torch.float16:
        return (a.float() @ b.float()).half()
    return a @ b


def low_products(device, precision):
    """Autocast to the precision; float16 on a CPU again by rounding."""
    if device.type != "cpu" or precision != "fp16":
        return autocast(device, precision)
    linear = F.linear
    return patch.object(F, "linear", lambda x, weight, bias=None: linear(
        x.half().float(), weight.half().float(), None if bias is None else bias.half().float()).half())


# ---- places that can be put into low precision ---------------------------------------------------------------


def low_norm(dtype):
    def rms_norm(x, weight=None):
        low = x.to(dtype)
        y = low * torch.rsqrt((low * low).mean(-1, keepdim=True) + layers.NORM_EPS)
        return (y if weight is None else y * weight.to(dtype)).to(x.dtype)
    return [patch.object(layers, "rms_norm", rms_norm)]


def low_modulation(dtype):
    def modulate(x, scale, shift):
        return (layers.rms_norm(x).to(dtype) * (1 + scale.to(dtype)) + shift.to(dtype)).to(x.dtype)
    return [patch.object(module, "modulate", modulate) for module in (flowar, flow_head)]


def low_softmax(dtype):
    def attend(q, k, v, scales=None, causal=False, dropout=0.0):
        parts = []
        for rows in layers.spans(scales or (round(q.shape[2] ** 0.5),)):
            keys = slice(0, rows.stop) if causal else rows
            scores = product(q[:, :, rows].to(dtype), k[:, :, keys].to(dtype).transpose(2, 3)) * q.shape[-1] ** -0.5
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            weights = weights / weights.sum(-1, keepdim=True, dtype=dtype)
            parts.append(product(weights, v[:, :, keys].to(dtype)).transpose(1, 2).flatten(2))
        return torch.cat(parts, dim=1).to(q.dtype)
    return [patch.object(layers, "attend", attend)]


def low_rotation(dtype):
    def rotate(x, table):
        cos, sin = (part.to(dtype) for part in table)
        u, v = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((u * cos - v * sin, v * cos + u * sin), dim=-1).flatten(-2).to(x.dtype)
    return [patch.object(layers, "rotate", rotate)]


def low_time(dtype):
    def forward(self, t):
        step = (t.to(dtype) * flow_head.TIME_STEPS).floor()
        j = torch.arange(flow_head.FREQUENCIES, device=t.device, dtype=dtype)
        angle = step[:, None] * torch.exp(-np.log(10000) * j / flow_head.FREQUENCIES)
        return self.mlp(torch.cat((angle.cos(), angle.sin()), dim=-1).to(self.mlp[0].weight.dtype))
    return [patch.object(flow_head.TimeEmbedder, "forward", forward)]


def low_residual(dtype):
    """Every sum with the residual stream is rounded: of blocks, halfway through one too."""
    class Rounded(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            is_sum = function is torch.Tensor.add and all(isinstance(a, torch.Tensor) and a.ndim == 3 for a in args)
            return result.to(dtype).to(result.dtype) if is_sum else result
    return [Rounded()]


PLACES = {"norm statistics": low_norm, "modulation": low_modulation, "softmax": low_softmax, "rotation of queries and keys": low_rotation,
          "embedding of 1000 t": low_time, "residual stream": low_residual}


@contextlib.contextmanager
def low_precision(places, dtype):
    with contextlib.ExitStack() as stack:
        for place in places if dtype else ():
            for change in PLACES[place](dtype):
                stack.enter_context(change)
        yield


# ---- training ------------------------------------------------------------------------------------------------


def open_data(args):
    train, val = (ShardedMoments(path, 0, training) for path, training in ((args.cached_path, True), (args.cached_val_path, False)))
    return train, val


def build(args, index, seed, device):
    torch.manual_seed(seed)
    side = index["img_size"] // (index["stride"] * args.patch_size)
    return build_model(args.model, img_size=index["img_size"], vae_stride=index["stride"], vae_embed_dim=index["channels"],
                       patch_size=args.patch_size, scale=default_scales(side), class_num=len(index["classes"])).to(device)


def to_latents(moments, noise, index):
    return LatentScale(*index["latent_scale"]).normalize(DiagonalGaussian(moments.float()).sample(noise=noise))


def batches(data, args, seed, device):
    """Endless (latents, labels, draws) of one run: the same for every precision."""
    loader, step = build_loader(data, args.batch_size, seed=seed, train=True), 0
    for epoch in range(args.steps):
        loader.sampler.set_epoch(epoch)
        for moments, labels in loader:
            yield step, moments.to(device), labels.to(device)
            step += 1


@torch.no_grad()
def validation_loss(model, val, args, precision, dtype, device):
    draws = draw(model, len(val[1]), 0, device)
    model.eval()
    with low_precision(PLACES, dtype), low_products(device, precision):
        loss = model(to_latents(val[0], draws.posterior, val[2]), val[1], t=draws.t, noise=draws.noise).item()
    model.train()
    return loss


def train(run, data, val, args, seed, device):
    """(validation losses, model, step at which the loss was no longer finite or None)."""
    precision, dtype = RUNS[run]
    model = build(args, data.index, seed, device).train()
    optimizer = build_optimizer(model, args.lr, 0.02)
    curve = []
    for step, moments, labels in batches(data, args, seed, device):
        if step % args.every == 0:
            curve.append(validation_loss(model, val, args, precision, dtype, device))
        if step == args.steps:
            return curve, model, None
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, step / (WARMUP * args.steps))
        draws = draw(model, args.batch_size, derive_seed(seed, TRAINING, step), device)
        with low_precision(PLACES, dtype), low_products(device, precision):
            loss = model(to_latents(moments, draws.posterior, data.index), labels, t=draws.t, noise=draws.noise, drop=draws.drop)
        if not loss.isfinite():
            return curve, model, step
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        if not norm.isfinite():
            return curve, model, step
        optimizer.step()
        optimizer.zero_grad()


# ---- one place at a time -------------------------------------------------------------------------------------


def velocity_and_gradient(model, val, count=256):
    draws = draw(model, count, 1, val[0].device)
    latents = to_latents(val[0][:count], draws.posterior, val[2])
    model.zero_grad()
    seen = []
    hook = model.flownet.final_layer.register_forward_hook(lambda module, args, output: seen.append(output.detach().float()))
    model(latents, val[1][:count], t=draws.t, noise=draws.noise).backward()
    hook.remove()
    return seen[0], torch.cat([p.grad.float().flatten() for p in model.parameters()])


def errors_of_places(model, val, device):
    """{place: {dtype: (relative error of the velocity, of the gradient)}}, everything else in float32."""
    model.eval()
    exact = velocity_and_gradient(model, val)
    table = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        changes = {place: ([place], "fp32") for place in PLACES}
        changes |= {"matrix products and attention (ours)": ([], name), "all of them (naive)": (list(PLACES), name)}
        for place, (places, precision) in changes.items():
            with low_precision(places, dtype), autocast(device, precision):
                found = velocity_and_gradient(model, val)
            table.setdefault(place, {})[name] = [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact)]
    return table


@torch.no_grad()
def largest_values(model, val):
    """Largest absolute value of the residual stream and of what a norm sums, to hold against fp16's 65,504."""
    largest = 0.0

    def note(module, args, output):
        nonlocal largest
        largest = max(largest, output.abs().max().item())

    hooks = [block.register_forward_hook(note) for block in (*model.blocks, *model.flownet.res_blocks)]
    draws = draw(model, 256, 1, val[0].device)
    model(to_latents(val[0][:256], draws.posterior, val[2]), val[1][:256], t=draws.t, noise=draws.noise)
    for hook in hooks:
        hook.remove()
    return {"residual stream": largest, "its square": largest**2}


# ---- output --------------------------------------------------------------------------------------------------


def plot(curves, args, path):
    figure, (whole, zoom) = plt.subplots(1, 2, figsize=(11, 4.2), dpi=100)
    for (run, seeds), color in zip(curves.items(), ("black", "tab:blue", "tab:orange", "tab:red")):
        for seed, curve in enumerate(seeds):
            steps = args.every * np.arange(len(curve))
            whole.plot(steps, curve, color=color, lw=1, label=run if seed == 0 else None)
            reference = curves["fp32"][seed]
            n = min(len(curve), len(reference))
            zoom.plot(steps[:n], np.subtract(curve[:n], reference[:n]), color=color, lw=1)
    spread = np.std(curves["fp32"], axis=0, ddof=1) if len(curves["fp32"]) > 1 else 0
    steps = args.every * np.arange(len(curves["fp32"][0]))
    zoom.fill_between(steps, -2 * spread, 2 * spread, color="lightgray", label="two standard deviations of fp32 seeds")
    whole.set(xlabel="step", ylabel="validation loss", yscale="log")
    zoom.set(xlabel="step", ylabel="difference to fp32 with the same seed", yscale="symlog")
    zoom.set_yscale("symlog", linthresh=0.01)
    whole.legend()
    zoom.legend()
    figure.tight_layout()
    figure.savefig(path)


def main():
    args = parse_args()
    device = select_device(args.device)
    make_directory(Path(args.output).parent)
    data, val_data = open_data(args)
    if data.index["classes"] != val_data.index["classes"]:
        raise FlowARError(f"{args.cached_val_path}: its classes are not those of {args.cached_path}")
    moments, labels = next(iter(build_loader(val_data, min(args.val_images, len(val_data)))))
    val = (moments.to(device), labels.to(device), val_data.index)
    curves, stopped = {}, {}
    for run in RUNS:
        for seed in range(args.seeds):
            curve, model, step = train(run, data, val, args, seed, device)
            curves.setdefault(run, []).append(curve)
            stopped.setdefault(run, []).append(step)
            print(f"{run}, seed {seed}: validation loss {curve[-1]:.4f}" + ("" if step is None else f", not finite at step {step}"), flush=True)
            if run == "fp32" and seed == 0:
                reference = model
    places = errors_of_places(reference, val, device)
    for place, found in places.items():
        print(f"{place:40s} " + "  ".join(f"{name}: velocity {v:.1e}, gradient {g:.1e}" for name, (v, g) in found.items()))
    largest = largest_values(reference, val)
    print(f"largest values: {largest}")
    write_json({"args": vars(args), "curves": curves, "stopped": stopped, "places": places, "largest": largest, **machine(device)},
               Path(f"{args.output}.json"))
    plot(curves, args, f"{args.output}.png")


if __name__ == "__main__":
    run_main(main)
