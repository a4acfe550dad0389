"""Measure this code on this machine.

    python scripts/benchmark.py train --model flowar_small --batch_size 64 --precision bf16 --compile --beside tests/plain.py
    python scripts/benchmark.py sample --model flowar_small --eval_bsz 256 --cfg 4.3 --precision bf16 --compile

`train`: whole optimizer steps of the recipe. `sample`: latents of a batch. Both report images and floating-point operations a second
(counted by scripts/flops.py), the share of what a large matrix product reaches between their turns, and peak memory.
--beside FILE times another way in turns, eager, on the same weights, and prints the ratio and the operations of both: a Python file with
loss, sample, velocity and mlp, such as tests/plain.py. --against WORKTREE times the same benchmark of another checkout in turns, such as the commit before.

    python scripts/benchmark.py parts --model flowar_large --batch_size 8 --beside tests/plain.py
    python scripts/benchmark.py memory --model flowar_large --batch_size 64 --precision bf16 --use_checkpoint

`parts`: each step that makes it fast, alone. `memory`: bytes that a training step holds, counted, on a CPU, for a batch of any size.

    python scripts/benchmark.py evaluate --model flowar_small --num_images 1000 --eval_bsz 100 --device cuda

`evaluate`: sampling, decoding and features of N images in memory, against writing PNGs one by one and reading them again
for the features, as the release does. Weights are random: time does not depend on them.

    python scripts/benchmark.py vae --batch_size 2 --img_size 256 --compile

`vae`: KL-16 (--vae_ch, --vae_ch_mult) encodes and decodes images in turns: weights contiguous or channels_last, float32 or autocast.

    python scripts/benchmark.py features --feature_extractor inception,efficientnet-lite0 --batch_size 8 --compile

`features`: feature networks of the metrics on images of --img_size in turns: eager and compiled, weights contiguous or channels_last.

    python scripts/benchmark.py roofline --model flowar_large --batch_size 64 --eval_bsz 256 --cfg 2.4 --precision bf16 --use_checkpoint

`roofline`: nothing is measured: operations, bytes and FLOP of a training step, a batch of samples and its decoding, counted on the meta
device as CUDA would run them eagerly, and the least seconds that the GPUs of scripts/flops.py need for them.

    python scripts/benchmark.py data --latents 200000 --scratch /path/to/disk

`data`: images a second through the training loader from shards, from MAR's .npz files, and from JPEGs (in folders, a zip, a
tar, a parquet file) with the VAE, for 1, 2 and 4 workers, cold (files dropped from the page cache) and warm. Latents and images
are synthetic, in --scratch, and kept there.
"""
import copy
import functools
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import project_root  # noqa: F401

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch_fidelity import feature_extractor_inceptionv3 as inception

from scripts import flops
from engine_flowar import evaluate
from scripts.measure import Peak, alternate, count_kernels, count_work
from models import AutoencoderKL, FlowARError, build_model, kernels
from models.errors import name_some
from models.layers import GatedMLP
from models.weights import file_hash
from util.cluster import AUTOCAST, autocast, memory_gib, run_main, select_device, set_precision
from util.data import Images, build_loader, latents
from util.data.latents import ShardedMoments
from util.data.other_latents import NpzMoments
from util.evaluation.extractors import Inception, build_extractors
from util.evaluation.labels import Classes, choose_labels
from util.evaluation.metrics import Measure
from util.evaluation.pipeline import build_sampler
from util.evaluation.references import folder_features
from util.evaluation.sampler import decoded_at_once
from util.evaluation.store import Plan
from util.files import check_output, make_directory, read_json, write_bytes, write_json
from util.manifest import describe_machine
from util.options import (SAMPLING, add_extractor_options, below_one, between, integer_list, model_options, positive, resolve_geometry,
                          sampling_options, sampling_parser, several, single_point, some_path, workers)
from util.speed import prepare
from util.speed.memory import FLOAT, STATES, image_bytes
from util.training.optimization import EMA, build_optimizer
from util.training.randomness import draw, image_noise

GRAD_CLIP, LR, WEIGHT_DECAY, EMA_RATE = 3.0, 1e-4, 0.02, 0.9999
LOADER_BATCH = 64
STEP_BYTES = 4 * 10 + 2 * 2  # of a parameter: weight, gradient, two moments, EMA read and written; its bf16 read forward and backward
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LOW = {"cpu": ("bf16",), "cuda": ("bf16", "fp16")}  # precisions of `vae` besides the full one
READ_BY = {**dict.fromkeys(["eval_bsz", *(setting.option for setting in SAMPLING.values())], ("sample", "evaluate", "roofline")),
           "num_step": ("sample", "parts", "evaluate", "roofline"), "compile": ("train", "sample", "vae", "features", "evaluate")}
PLAIN = {"solver": "euler", "time_grid": "release", "num_steps_last": None, "temperature": 1.0, "guidance_low": 0.0}  # of tests/plain.py's sampler


def parse_args():
    parser = sampling_parser(__doc__.splitlines()[0])
    add_extractor_options(parser.add_argument)
    parser.add_argument("--num_images", type=positive, default=50000, help="evaluate: images")
    parser.add_argument("what", choices=sorted(BENCHMARKS), help="what to measure")
    parser.add_argument("--batch_size", type=positive, default=16, help="train, parts, memory, vae, features, roofline: images")
    parser.add_argument("--use_checkpoint", action="store_true", help="train, memory, roofline: recompute activations")
    parser.add_argument("--attn_dropout", type=below_one, default=0.1, help="train, memory, roofline: as in training")
    parser.add_argument("--proj_dropout", type=below_one, default=0.1, help="train, memory, roofline: as in training")
    parser.add_argument("--repeats", type=positive, default=5, help="train, sample, parts, vae, features: timings, whose median counts")
    parser.add_argument("--latents", type=between(int, 2 * LOADER_BATCH, 10**8), default=200000, help="data: synthetic latents of each layout")
    parser.add_argument("--scratch", type=some_path, default="output/benchmark", help="data: folder for them (3 MiB a hundred in shards, 6 in npz)")
    parser.add_argument("--workers", type=several(workers), default=(1, 2, 4), help="data: numbers of loader workers")
    parser.add_argument("--seconds", type=positive, default=10, help="data: length of each measurement")
    parser.add_argument("--vae_ch", type=positive, default=128, help="base width of the VAE (KL-16 has 128)")
    parser.add_argument("--vae_ch_mult", type=integer_list, default=(1, 1, 2, 2, 4), help="its levels")
    parser.add_argument("--beside", help="train, sample, parts: Python file with another way to compute the same")
    parser.add_argument("--student_steps", type=positive, help="sample: times a student of scripts/distill.py too, of so many steps a scale")
    parser.add_argument("--against", help="train, sample: folder of another checkout of this project, timed in turns with this one")
    parser.add_argument("--turns", type=positive, default=3, help="--against: how often each is started")
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()
    for action in parser._actions:  # a help that begins with names of benchmarks is of an option that others would ignore
        names = (action.help or "").partition(":")[0].split(", ")
        if BENCHMARKS.keys() >= set(names) and getattr(args, action.dest) != action.default and args.what not in names:
            raise FlowARError(f"{action.option_strings[0]} is for {', '.join(names)}: {args.what} does nothing with it")
    for name, what in READ_BY.items():
        if getattr(args, name) != parser.get_default(name) and args.what not in what:
            raise FlowARError(f"--{name} is for {', '.join(what)}: {args.what} does nothing with it")
    if args.turns != parser.get_default("turns") and not args.against:
        raise FlowARError("--turns is for --against")
    if isinstance(args.num_step and args.num_step[0], tuple) and args.beside:
        raise FlowARError("--beside compares with a plain Euler sampler: give one --num_step for all scales")
    for name in ("resume", "weights", "guide", "guide_strength", "vae", "vae_path"):
        if getattr(args, name) != parser.get_default(name):
            raise FlowARError(f"--{name} is for an evaluation: the weights of a benchmark are random, of --model and --vae_ch")
    return args


def load_plain(path):
    """The module of --beside, None without."""
    if not path:
        return None
    if not Path(path).is_file():
        raise FlowARError(f"--beside {path}: no such file")
    try:
        spec = importlib.util.spec_from_file_location("beside", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # whatever is in it
        raise FlowARError(f"--beside {path}: {type(error).__name__}: {error}") from error
    if missing := [name for name in ("loss", "sample", "velocity", "mlp") if not hasattr(module, name)]:
        raise FlowARError(f"--beside {path}: has no {name_some(missing)}: see tests/plain.py")
    return module


def build(args, device):
    torch.manual_seed(args.seed)
    return build_model(args.model, **model_options(args)).to(device).eval(), build_vae(args, device)


def build_vae(args, device):
    vae = AutoencoderKL(embed_dim=args.vae_embed_dim, ch=args.vae_ch, ch_mult=args.vae_ch_mult)
    if vae.stride != args.vae_stride:
        raise FlowARError(f"--vae_stride is {args.vae_stride}, but the {len(args.vae_ch_mult)} levels of --vae_ch_mult make {vae.stride}")
    return vae.to(device).eval().requires_grad_(False)


# ---- training and sampling -----------------------------------------------------------------------------------


def training_inputs(model, batch, device):
    """(latents, labels, t, noise) at random."""
    draws = draw(model, batch, 0, device)
    return draws.posterior, torch.arange(batch, device=device) % model.class_num, draws.draws.t, draws.draws.noise


def benchmark_train(args, device):
    """Optimizer steps: forward, backward, clipping, fused AdamW, EMA."""
    if args.compile == "graphs":
        raise FlowARError("--compile graphs is for sampling: for train use --compile")
    model = build_network(args, device).train()
    optimizer, ema = build_optimizer(model, LR, WEIGHT_DECAY), EMA(model, EMA_RATE)
    latents_, labels, t, noise = training_inputs(model, args.batch_size, device)

    def step(loss):
        with autocast(device, args.precision):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model)

    ways = {"fast": lambda: step(lambda: model(latents_, labels, t=t, noise=noise))}
    if plain := load_plain(args.beside):
        ways["plain"] = lambda: step(lambda: plain.loss(model, latents_, labels, t, noise)[0])
    work = count(ways, device)  # before anything is compiled
    if args.compile:
        prepare.compile_training(model)
    return {"batch_size": args.batch_size, "use_checkpoint": args.use_checkpoint, "attn_dropout": args.attn_dropout,
            "attention_kernel": prepare.attention_kernel(model, AUTOCAST.get(args.precision)), **work,
            **compare(ways, args.batch_size, flops.training_flops(model), args, device)}


@torch.no_grad()
def benchmark_sample(args, device):
    """Latents of a batch of args.eval_bsz images; decoding is not among it."""
    slow = build_network(args, device).eval()
    model = prepare.for_sampling(copy.deepcopy(slow), AUTOCAST.get(args.precision))
    labels = torch.arange(args.eval_bsz, device=device) % model.class_num
    noise = [e.to(device) for e in image_noise(model, args.seed, range(args.eval_bsz))]
    options, latents_ = sampling_options(args), {}
    plain = load_plain(args.beside)
    if plain and any(options[name] != value for name, value in PLAIN.items()):
        raise FlowARError("--beside compares with a plain Euler sampler: leave out --solver, --time_grid, --num_step_last, --temperature, --guidance_low")
    counted = {name: options[name] for name in ("cfg", "guidance", "num_steps", "cfg_schedule")}

    def fast():
        with autocast(device, args.precision):
            latents_["fast"] = model.sample_tokens(labels, noise=noise, **options)

    def plainly():
        with autocast(device, args.precision):
            latents_["plain"] = plain.sample(slow, labels, noise, **counted)

    def student():
        with autocast(device, args.precision):
            model.sample_tokens(labels, noise=noise, num_steps=args.student_steps, time_grid="uniform")

    ways = {"fast": fast, **({"plain": plainly} if plain else {}), **({"student": student} if args.student_steps else {})}
    work = count(ways, device)
    if args.compile:
        prepare.compile_sampling(model, args.compile)
    result = compare(ways, args.eval_bsz, flops.sampling_flops(slow, args.eval_bsz, **options), args, device)
    if plain:
        result["difference"] = ((latents_["fast"] - latents_["plain"]).norm() / latents_["plain"].norm()).item()
    return {"eval_bsz": args.eval_bsz, **counted, "attention_kernel": prepare.attention_kernel(model, AUTOCAST.get(args.precision)), **work,
            **result}


def build_network(args, device):
    torch.manual_seed(args.seed)
    return build_model(args.model, **model_options(args)).to(device)


def count(ways, device):
    """What each way of --beside asks of the machine, eager: operations, gigabytes they read and write, CUDA kernels where there are any."""
    found = {}
    for name, way in ways.items() if "plain" in ways else ():
        operations, size = count_work(way)
        found[name] = {"operations": operations, "gigabytes": size / 1e9, **({"kernels": count_kernels(way)} if device.type == "cuda" else {})}
    return {"work": found}


def compare(ways, images, operations, args, device):
    """Timings of the ways and of a large matrix product in turns. operations: floating-point, of an image."""
    matmul = Peak(device, AUTOCAST.get(args.precision, torch.float32))
    taken = alternate({**ways, "matmul": matmul}, device, args.repeats)
    del taken["matmul"]
    peak, reached = matmul.reached, images * operations / taken["fast"]
    result = {"seconds": taken, "images_per_second": images / taken["fast"], "gigaflop_per_image": operations / 1e9,
              "gigaflops": reached / 1e9, "matmul_gigaflops": peak / 1e9, "share_of_peak": reached / peak, "memory_gib": memory_gib(device)}
    beside = ""
    if "plain" in taken:
        result["ratio"] = taken["plain"] / taken["fast"]
        beside = f"; plain {1000 * taken['plain']:.0f} ms, ratio {result['ratio']:.2f}"
    if "student" in taken:
        result["student_times_as_fast"] = taken["fast"] / taken["student"]
        beside += f"; student {1000 * taken['student']:.0f} ms, {result['student_times_as_fast']:.1f} times as fast"
    print(f"{args.what} {args.model}, {images} images of {args.img_size}, {args.precision}, compile {args.compile}: "
          f"{1000 * taken['fast']:.0f} ms, {result['images_per_second']:.3f} images/s, {reached / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s = "
          f"{100 * result['share_of_peak']:.0f} %{beside}", flush=True)
    return result


# ---- each step alone -----------------------------------------------------------------------------------------


def benchmark_parts(args, device):
    """Seconds of what each step changes, with and without it, forward and backward where it is of training."""
    plain = load_plain(args.beside)
    if plain is None:
        raise FlowARError("parts needs --beside, such as --beside tests/plain.py: the way without each step")
    model = build_network(args, device).train()
    latents_, labels, t, noise = training_inputs(model, args.batch_size, device)
    sizes, head = [s * s for s in model.scale], model.flownet
    x, z = torch.cat(noise, dim=1), torch.randn(args.batch_size, model.tokens, head.cond_embed.in_features, device=device)
    block, dtype = model.blocks[0], AUTOCAST.get(args.precision, torch.float32)
    width = head.cond_embed.out_features
    mlp = GatedMLP(width).to(device)
    q, k, v = torch.randn(3, args.batch_size, block.attn.num_heads, model.tokens, block.attn.head_dim, device=device,
                          dtype=dtype, requires_grad=True).unbind(0)
    rows = torch.randn(args.batch_size * model.tokens, width, device=device)
    steps_ = sampling_options(args)["num_steps"]
    times = torch.linspace(1, 0, steps_ + 1, device=device)
    last = z[:, -sizes[-1]:]
    prepared, now = head.prepare(last), times[:1].expand(args.batch_size)
    parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizers = {fused: torch.optim.AdamW(parameters, lr=0.0, fused=fused) for fused in (True, None)}
    average = [p.detach().clone() for p in parameters]

    def backward(function):
        def run():
            with autocast(device, args.precision):
                result = function()
            result.float().sum().backward()
        return run

    def forward(function):
        def run():
            with torch.no_grad(), autocast(device, args.precision):
                function()
        return run

    @torch.no_grad()
    def one_by_one():
        for a, p in zip(average, parameters):
            a.mul_(EMA_RATE).add_(p, alpha=1 - EMA_RATE)

    parts = {
        "one pass of the flow head (training)": (
            backward(lambda: head(x, t, z, model.scale)),
            backward(lambda: torch.cat([plain.velocity(head, noise[i], t[i], z[:, model.spans[i]]) for i in range(len(sizes))], dim=1))),
        "attention by prefixes, no mask (training)": (
            backward(lambda: kernels.attention(q, k, v, model.pattern)),
            backward(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, model.mask.to(dtype)))),
        "hoisting out of the Euler loop (sampling)": (
            forward(lambda: head(noise[-1], times[:1], prepared)), forward(lambda: plain.velocity(head, noise[-1], now, last))),
        f"MLP of {mlp.fc1_g.out_features} padded to a multiple of 64 (training)": (
            backward(lambda: mlp(rows)), backward(lambda: plain.mlp(mlp, rows))),
        "fused AdamW (training)": (optimizers[True].step, optimizers[None].step),
        "EMA in one update (training)": (lambda: torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - EMA_RATE), one_by_one),
    }
    rows_ = []
    for name, (fast, slow) in parts.items():
        taken = alternate({"fast": fast, "plain": slow}, device, args.repeats)
        work = {way: count_work(function) for way, function in (("fast", fast), ("plain", slow))}
        rows_.append({"part": name, "seconds": taken, "ratio": taken["plain"] / taken["fast"],
                      "operations": {way: found[0] for way, found in work.items()},
                      "gigabytes": {way: found[1] / 1e9 for way, found in work.items()}})
        print(f"{name:50s} {1000 * taken['plain']:9.1f} -> {1000 * taken['fast']:9.1f} ms, ratio {rows_[-1]['ratio']:.2f}; operations "
              f"{work['plain'][0]} -> {work['fast'][0]}, {work['plain'][1] / 1e9:.2f} -> {work['fast'][1] / 1e9:.2f} GB", flush=True)
    return {"batch_size": args.batch_size, "num_step": steps_, "parts": rows_}


# ---- memory --------------------------------------------------------------------------------------------------


def benchmark_memory(args, device):
    """Counted on one and on two images that have shapes and no numbers."""
    with torch.device("meta"):
        model = build_model(args.model, **model_options(args))
    an_image, parameters = image_bytes(model, AUTOCAST.get(args.precision)), sum(p.numel() for p in model.parameters())
    fixed, activations = parameters * FLOAT * STATES, an_image * args.batch_size
    low = parameters * 2 if args.precision in AUTOCAST else 0
    print(f"memory {args.model}, batch {args.batch_size}, {args.precision}, recomputing {args.use_checkpoint}: weights, gradients, AdamW, EMA "
          f"{fixed / 2**30:.1f} GiB; activations {activations / 2**30:.1f} GiB ({an_image / 2**20:.0f} MiB an image)", flush=True)
    return {"batch_size": args.batch_size, "use_checkpoint": args.use_checkpoint, "attn_dropout": args.attn_dropout, "fixed_gib": fixed / 2**30,
            "low_precision_weights_gib": low / 2**30, "activations_gib": activations / 2**30, "mib_per_image": an_image / 2**20}


# ---- what a GPU would need -----------------------------------------------------------------------------------


def benchmark_roofline(args, device):
    """Counted work of a training step, of a batch's latents and of decoding them, and the least seconds of each GPU for them."""
    if args.precision not in AUTOCAST:
        raise FlowARError(f"--precision {args.precision}: roofline counts for tensor cores: bf16 or fp16")
    dtype, options = AUTOCAST[args.precision], sampling_options(args)
    with torch.device("meta"):
        model, vae = build_model(args.model, **model_options(args)), build_vae(args, "meta")
    parameters = sum(p.numel() for p in model.parameters())
    trained = flops.training_work(model, args.batch_size, dtype)
    sampled, weights = flops.sampling_work(model, args.eval_bsz, dtype, **options)
    at_once = decoded_at_once(model.img_size**2)
    decoded = flops.decoding_work(vae, at_once, model.scale[-1] * model.patch_size, dtype)
    cases = {  # work, images, FLOP that no way to compute it saves, bytes
        "training step": (trained, args.batch_size, args.batch_size * flops.training_flops(model), parameters * STEP_BYTES),
        "sampling": (sampled, args.eval_bsz, sampled.flop, weights),
        "decoding": (decoded, at_once, decoded.flop, 0)}
    print("| | images | operations | GB | TFLOP | " + " | ".join(f"{name}: eager, floor, ms an image | floor of eager" for name in flops.GPUS) + " |\n" +
          "|---" * (5 + 2 * len(flops.GPUS)) + "|")
    rows = []
    for what, (work, images, flop, size) in cases.items():
        row = {"what": what, "images": images, "operations": work.operations, "gigabytes": work.bytes / 1e9, "teraflop": work.flop / 1e12,
               "least_teraflop": flop / 1e12, "least_gigabytes": size / 1e9, "ms_per_image": {}}
        for name, gpu in flops.GPUS.items():
            seconds = {"eager": flops.least_seconds(gpu, work), "floor": flops.floor_seconds(gpu, flop, size)}
            row["ms_per_image"][name] = {way: 1000 * value / images for way, value in seconds.items()}
        rows.append(row)
        limits = " | ".join(f"{ms['eager']:.2f}, {ms['floor']:.2f} | {ms['floor'] / ms['eager']:.0%}" for ms in row["ms_per_image"].values())
        print(f"| {args.model}, {what} | {images} | {work.operations:,} | {work.bytes / 1e9:.1f} | {work.flop / 1e12:.2f} | {limits} |", flush=True)
    return {"batch_size": args.batch_size, "eval_bsz": args.eval_bsz, "use_checkpoint": args.use_checkpoint, "rows": rows,
            **{name: options[name] for name in ("cfg", "guidance", "num_steps")},
            "gpus": {name: gpu._asdict() for name, gpu in flops.GPUS.items()}}


# ---- the VAE -------------------------------------------------------------------------------------------------


@torch.no_grad()
def benchmark_vae(args, device):
    """Milliseconds an image of encoding and decoding, each way in turns on the same weights."""
    vae, full = build_vae(args, device), args.precision if args.precision not in AUTOCAST else "fp32"
    set_precision(full, device)
    side = args.img_size // args.vae_stride
    inputs = {"encode": torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device),
              "decode": torch.randn(args.batch_size, args.vae_embed_dim, side, side, device=device)}
    networks = {(layout, compiled): copy.deepcopy(vae).to(memory_format=memory_format)
                for compiled in ((False, True) if args.compile else (False,)) for layout, memory_format in LAYOUTS.items()}
    for (_, compiled), network in networks.items():
        if compiled:
            network.encoder.compile()
            network.decoder.compile()

    def way(network, what, precision):
        def run():
            with autocast(device, precision):
                found = getattr(network, what)(inputs[what])
            return found.parameters if what == "encode" else found
        return run

    rows = []
    for what in inputs:
        ways = {f"{layout}, {precision}{', compiled' if compiled else ''}": way(network, what, precision)
                for precision in (full, *LOW[device.type]) for (layout, compiled), network in networks.items()}
        rows += in_turns(what, ways, device, args)
    return {"batch_size": args.batch_size, "img_size": args.img_size, "vae_ch": args.vae_ch, "rows": rows}


@torch.no_grad()
def benchmark_features(args, device):
    """Milliseconds an image of every network of --feature_extractor, each way in turns."""
    set_precision(args.precision, device)
    images, rows = torch.randint(256, (args.batch_size, 3, args.img_size, args.img_size), dtype=torch.uint8, device=device), []
    for name in args.feature_extractor:
        networks = {(layout, compiled): open_extractors((name,), args.fid_weights, device)
                    for compiled in ((False, True) if args.compile else (False,)) for layout in LAYOUTS}
        for (layout, compiled), extractor in networks.items():
            extractor.parts[0].network.to(memory_format=LAYOUTS[layout])
            if compiled:
                prepare.compile_features(extractor)
        ways = {f"{layout}{', compiled' if compiled else ''}": functools.partial(features_of, extractor.parts[0], images)
                for (layout, compiled), extractor in networks.items()}
        rows += in_turns(name, ways, device, args)
    return {"batch_size": args.batch_size, "img_size": args.img_size, "rows": rows}


def features_of(extractor, images):
    return extractor.forward(images)[0]


def in_turns(what, ways, device, args):
    """A row of each way: its time, ratio to the first one's and relative difference from what that computes."""
    rows, (expected, *others) = [], [run() for run in ways.values()]
    errors = [((found - expected).norm() / expected.norm()).item() for found in (expected, *others)]
    taken = alternate(ways, device, args.repeats)
    for (name, seconds), error in zip(taken.items(), errors):
        rows.append({"what": what, "way": name, "ms_per_image": 1000 * seconds / args.batch_size,
                     "ratio": taken[next(iter(ways))] / seconds, "difference": error})
        print("| {what} | {way} | {ms_per_image:.1f} | {ratio:.2f} | {difference:.0e} |".format(**rows[-1]), flush=True)
    return rows


# ---- evaluation ----------------------------------------------------------------------------------------------


def in_memory(sampler, plan, extractor, folder):
    return evaluate(sampler, plan, Measure(extractor, [None] * len(extractor.parts)), {}, folder)


def through_files(sampler, plan, extractor, folder):
    """The release's way: PNGs one after the other, then a second pass over the files."""
    for first in range(0, plan.num_images, sampler.batch):
        indices = range(first, min(first + sampler.batch, plan.num_images))
        for index, image in zip(indices, sampler.images(plan.labels.of(indices), first)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:06d}.png")
    return folder_features(folder, extractor, sampler.device)


def random_inception(path):
    """Writes a weights file of Inception's shape, always the same; the published one is a download."""
    torch.manual_seed(0)
    with mock.patch.object(inception, "load_state_dict_from_url"), mock.patch.object(torch.nn.Module, "load_state_dict"):
        network = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), path)


def open_extractors(names, files, device):
    """build_extractors; without a file Inception gets random weights."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inception.pth"
        if files is None and Inception.name in names:
            random_inception(file)
            files = {Inception.name: file}
        return build_extractors(names, files, device)


def benchmark_evaluate(args, device):
    model, vae = build(args, device)
    prepare.for_evaluation([model], vae, AUTOCAST.get(args.precision), args.compile)
    sampler = build_sampler(args, model, vae, args.precision)
    extractor = open_extractors(args.feature_extractor, args.fid_weights, device)
    if args.compile:
        prepare.compile_features(extractor)
    seconds, report = {"in_memory": 0.0, "through_files": 0.0}, None
    for warm_up in (True, False):
        plan = Plan(choose_labels("balanced", args.eval_bsz if warm_up else args.num_images, Classes(args.class_num)))
        for way in (in_memory, through_files):
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                result = way(sampler, plan, extractor, Path(folder))
                seconds[way.__name__] = time.perf_counter() - start
                report = result if way is in_memory else report
    return {"num_images": args.num_images, "eval_bsz": args.eval_bsz, "num_step": report["num_step"],
            "cfg": report["cfg"], "feature_extractor": extractor.name,
            **{f"seconds_{way}": value for way, value in seconds.items()},
            "images_per_second": args.num_images / seconds["in_memory"],
            "ratio": seconds["through_files"] / seconds["in_memory"], "seconds_per_image": report["seconds_per_image"]}


# ---- data ----------------------------------------------------------------------------------------------------


def make_shards(folder, count, shape, stride, shard_size=10000):
    """Synthetic float16 moments in shards with an index, as cache_latents.py writes them."""
    make_directory(folder)
    shards = []
    for number, first in enumerate(range(0, count, shard_size)):
        size = min(shard_size, count - first)
        file = folder / f"shard-{number:05d}.safetensors"
        write_bytes(save({"moments": torch.randn(size, 2, *shape).half(), "labels": torch.randint(1000, (size,)),
                          "names": torch.zeros(1, dtype=torch.uint8)}), file, sync=False)
        shards.append({"file": file.name, "images": size, "bytes": file.stat().st_size, "sha256": file_hash(file)})
    unknown = {"seed": 0, "skipped": [], "vae_sha256": None, "measured": {"scale": 1, "shift": 0, "channel_mean": [], "channel_std": []}}
    write_json({"format": latents.FORMAT, "images": count, "classes": [str(i) for i in range(1000)], "variants": 2, "crops": "center",
                "img_size": shape[2] * stride, "stride": stride, "channels": shape[0] // 2, "dtype": "float16",
                "latent_scale": [0.2325, 0.0], "shards": shards, **unknown}, folder / latents.INDEX)


def make_npz(folder, count, shape, classes=1000):
    """Synthetic moments in MAR's layout: float32, with those of the flipped image."""
    for label in range(min(classes, count)):
        make_directory(folder / f"n{label:08d}")
    moments = np.random.default_rng(0).standard_normal((64, 2, *shape)).astype(np.float32)
    for i in range(count):
        np.savez(folder / f"n{i % classes:08d}" / f"{i:07d}.JPEG.npz", moments=moments[i % 64, 0], moments_flip=moments[i % 64, 1])


def make_jpegs(folder, count=500, size=(500, 375)):
    """Smooth noise of ImageNet's usual size, about 100 KB each."""
    make_directory(folder / "0")
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        grain = rng.integers(-20, 20, (size[1], size[0], 3))
        Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(folder / "0" / f"{i:05d}.jpg", quality=90)


def pack_jpegs(folder, scratch):
    """The same images in a zip, a tar and, where the package is there, a parquet file; {kind: path}."""
    places = {"zip": scratch / "zip" / "jpeg.zip", "tar": scratch / "tar" / "jpeg.tar"}
    for kind, path in places.items():
        if not path.is_file():
            make_directory(path.parent)
            shutil.make_archive(str(path.with_suffix("")), kind, folder)
    try:
        import datasets
    except ImportError:
        print("no row for parquet: it needs the package datasets")
        return places
    datasets.config.HF_DATASETS_CACHE = scratch / "parquet" / "cache"  # whose Arrow file is read
    files = sorted(folder.rglob("*.jpg"))
    if not (scratch / "parquet" / "jpeg.parquet").is_file():
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["0"])})
        rows = {"image": [{"bytes": file.read_bytes(), "path": file.name} for file in files], "label": [0] * len(files)}
        make_directory(scratch / "parquet")
        datasets.Dataset.from_dict(rows, features=features).to_parquet(scratch / "parquet" / "jpeg.parquet")
    return {**places, "parquet": scratch / "parquet" / "jpeg"}


def forget(folder):
    """Drop a folder's files from the page cache; returns their bytes."""
    total = 0
    for path in folder.rglob("*"):
        if path.is_file():
            total += path.stat().st_size
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return total


def loader_rate(dataset, workers, seconds):
    """Images a second after the first batch."""
    loader = build_loader(dataset, LOADER_BATCH, train=True, num_workers=workers)
    batches = iter(loader)
    next(batches)
    start, count = time.perf_counter(), 0
    for images, _ in batches:
        count += len(images)
        if time.perf_counter() - start > seconds:
            break
    return count / (time.perf_counter() - start)


@torch.no_grad()
def encoding_rate(args, device):
    """Images a second through the VAE's encoder."""
    vae = build_vae(args, device)
    images, count, start = torch.randn(4, 3, args.img_size, args.img_size, device=device), 0, time.perf_counter()
    while time.perf_counter() - start < args.seconds:
        vae.encode(images).parameters.sum().item()
        count += len(images)
    return count / (time.perf_counter() - start)


def benchmark_data(args, device):
    scratch = Path(args.scratch)
    side = args.img_size // args.vae_stride
    shape = (2 * args.vae_embed_dim, side, side)
    kept, asked = scratch / "made.json", {"latents": args.latents, "shape": list(shape), "vae_stride": args.vae_stride}
    found = read_json(kept) if kept.is_file() else None
    if found != asked and scratch.is_dir() and any(scratch.iterdir()):
        raise FlowARError(f"--scratch {scratch}: holds {found or 'other files'}, asked for is {asked}: give an empty folder, or a new one")
    if found is None:
        make_shards(scratch / "shards", args.latents, shape, args.vae_stride)
        make_npz(scratch / "npz", args.latents, shape)
        make_jpegs(scratch / "jpeg")
    packed = pack_jpegs(scratch / "jpeg", scratch)
    write_json(asked, kept)  # all of it is there
    os.sync()  # pages that are not written yet cannot be dropped
    kinds = {"shards": lambda: ShardedMoments(scratch / "shards", train=True),
             "npz": lambda: NpzMoments(scratch / "npz", shape, train=True),
             "jpeg": lambda: Images(scratch / "jpeg", args.img_size, train=True),
             **{kind: functools.partial(Images, path, args.img_size, train=True) for kind, path in packed.items()}}
    rows = []
    for kind, open_dataset in kinds.items():
        size = forget(scratch / kind) / len(open_dataset())
        for workers in args.workers:
            forget(scratch / kind)
            cold = loader_rate(open_dataset(), workers, args.seconds)
            warm = loader_rate(open_dataset(), workers, args.seconds)
            rows.append({"kind": kind, "workers": workers, "bytes_per_image": round(size), "cold": cold, "warm": warm})
            print("{kind:7s} {workers} workers  {bytes_per_image:7d} B/image  cold {cold:9.1f}  warm {warm:9.1f} images/s".format(**rows[-1]),
                  flush=True)
    rate = {(row["kind"], row["workers"]): row["warm"] for row in rows}
    return {"latents": args.latents, "rows": rows, "vae_images_per_second": encoding_rate(args, device),
            "ratio_shards_npz": {str(workers): rate["shards", workers] / rate["npz", workers] for workers in args.workers}}


BENCHMARKS = {"train": benchmark_train, "sample": benchmark_sample, "parts": benchmark_parts, "memory": benchmark_memory,
              "evaluate": benchmark_evaluate, "data": benchmark_data, "vae": benchmark_vae, "features": benchmark_features,
              "roofline": benchmark_roofline}


# ---- against another checkout --------------------------------------------------------------------------------


def benchmark_against(args, device):
    """Medians over turns of this checkout's seconds and another's, each in a process of its own."""
    other = Path(args.against).resolve() / "scripts" / "benchmark.py"
    if not other.is_file() or args.beside:
        raise FlowARError(f"--against {args.against}: expected a checkout of this project, without --beside")
    seconds = {"other": [], "this": []}  # first the other: it may not know an option
    for _ in range(args.turns):
        for name, script in (("other", other), ("this", Path(__file__).resolve())):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, str(script), *without(sys.argv[1:], "--against", "--turns", "--json"), "--json", f"{folder}/figures.json"]
                done = subprocess.run(command, cwd=script.parents[1], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                if done.returncode:
                    raise FlowARError(f"{script}: status {done.returncode} with the same options: {(done.stderr.splitlines() or [''])[-1]}")
                seconds[name].append(read_json(Path(folder) / "figures.json")["seconds"]["fast"])
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    print(f"this {1000 * medians['this']:.0f} ms, {args.against} {1000 * medians['other']:.0f} ms: {medians['other'] / medians['this']:.3f} times as fast")
    return {"turns": seconds, "times_as_fast": medians["other"] / medians["this"]}


def without(arguments, *names):
    """Command-line arguments without some options and their values."""
    kept, values = [], iter(arguments)
    for value in values:
        if value in names:
            next(values)
        elif not value.startswith(tuple(f"{name}=" for name in names)):
            kept.append(value)
    return kept


def main():
    args = single_point(parse_args())
    device = select_device(args.device)
    args.precision = set_precision(args.precision, device)
    if args.json:
        check_output(args.json)
    args = resolve_geometry(args)
    measured = (benchmark_against if args.against else BENCHMARKS[args.what])(args, device)
    result = {"what": args.what, "model": args.model, "precision": args.precision, "compile": args.compile, **measured, **describe_machine(device)}
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        write_bytes(f"{text}\n".encode(), args.json)


if __name__ == "__main__":
    run_main(main)
