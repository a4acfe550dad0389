"""Measure this code on this machine.

    python scripts/benchmark.py train --model flowar_small --batch_size 64 --precision bf16 --beside tests/plain.py
    python scripts/benchmark.py sample --model flowar_small --eval_bsz 256 --cfg 4.3 --precision bf16 --compile
    python scripts/benchmark.py evaluate --model flowar_small --num_images 1000 --eval_bsz 100 --device cuda
    python scripts/benchmark.py memory --model flowar_large --batch_size 64 --precision bf16 --use_checkpoint

`train` times whole optimizer steps of the recipe, `sample` the latents of a batch: images and floating-point operations
a second (counted by scripts/flops.py), the share of what a large matrix product reaches between them, peak memory.
--beside FILE times another implementation in turns, eager, on the same weights: a Python file with loss and sample,
such as tests/plain.py. --against WORKTREE times the same benchmark of another checkout, such as the commit before, in
turns. `evaluate` times sampling, decoding and features of N images in memory, against writing PNGs and reading them
again for the features, as the release does. `memory` counts the bytes that a training step holds, on any machine.
Weights are random: time does not depend on them.
"""
import argparse
import copy
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from PIL import Image

from engine_flowar import evaluate
from models import AutoencoderKL, FlowARError, build_model
from models.settings import Sampling, one_of, setting
from scripts import flops
from util.cluster import AUTOCAST, autocast, memory_gib, run_main, select_device, set_precision
from util.command_line import BELOW_ONE, POSITIVE, Parser, flag, list_of, parse_options, path
from util.evaluation.extractors import Inception, build_extractors
from util.evaluation.labels import Classes, choose_labels
from util.evaluation.metrics import Measure
from util.evaluation.references import Reference, extract_folder, list_reference
from util.evaluation.sampler import Sampler
from util.evaluation.store import Plan
from util.files import check_output, read_json, write_json
from util.geometry import resolve_geometry
from util.manifest import describe_machine
from util.options import Extractors, Model, Runtime, SamplingSettings, check_single, given_settings, model_options
from util.speed import prepare
from util.speed.memory import FLOAT, STATES, image_bytes
from util.training.optimization import EMA, OPTIMIZERS, build_optimizer
from util.training.randomness import draw, image_noise

GRAD_CLIP, LR, WEIGHT_DECAY, EMA_RATE = 3.0, 1e-4, 0.02, 0.9999
MATRIX_SIZE = {"cpu": 4096, "cuda": 8192}
# settings of the sampler of tests/plain.py
PLAIN = {"solver": "euler", "time_grid": "release", "num_steps_last": None, "temperature": 1.0, "guidance_low": 0.0}


# ---- options ---------------------------------------------------------------------------------------------------


@dataclass
class Benchmark(Model, Extractors, Runtime):
    """benchmark"""
    vae_ch: int = setting(128, "base width of the VAE (KL-16 has 128)", POSITIVE)
    vae_ch_mult: tuple = setting((1, 1, 2, 2, 4), "width multiplier of each VAE level", list_of(POSITIVE))
    repeats: int = setting(5, "number of timings, of which the median is reported", POSITIVE)
    json: str = setting(None, "JSON file for the results", path)


@dataclass
class Memory(Benchmark):
    """training steps"""
    batch_size: int = setting(16, "images per step", POSITIVE)
    use_checkpoint: bool = flag("recompute activations")
    attn_dropout: float = setting(0.1, "as in training", BELOW_ONE)
    proj_dropout: float = setting(0.1, "as in training", BELOW_ONE)


@dataclass
class Comparison:
    """comparison"""
    beside: str = setting(None, "Python file with another implementation to compare with", path)
    against: str = setting(None, "another checkout of this project, timed alternately with this one", path)
    turns: int = setting(3, "with --against: number of runs of each checkout", POSITIVE)


@dataclass
class Train(Memory, Comparison):
    """training, timed"""
    optimizer: str = setting("adamw", "as in training", one_of(*OPTIMIZERS))


@dataclass
class Sample(Benchmark, SamplingSettings, Comparison):
    """samples"""
    eval_bsz: int = setting(64, "images per batch", POSITIVE)


@dataclass
class Evaluate(Benchmark, SamplingSettings):
    """evaluations"""
    eval_bsz: int = setting(64, "images per batch", POSITIVE)
    num_images: int = setting(50000, "number of images", POSITIVE)


def parse_args():
    """(which benchmark, its options): the first word, and the rest."""
    parser = Parser(__doc__.splitlines()[0], usage="%(prog)s WHAT [options]; %(prog)s WHAT --help shows them")
    parser.add_argument("what", choices=BENCHMARKS, help="what to measure")
    what = parser.parse_args(sys.argv[1:2]).what
    options, _ = BENCHMARKS[what]
    return what, parse_options(options, sys.argv[2:], f"{what}: {__doc__.splitlines()[0]}")


# ---- what is measured ------------------------------------------------------------------------------------------


def build_network(args, device):
    torch.manual_seed(args.seed)
    return build_model(args.model, **model_options(args)).to(device)


def build_vae(args, device):
    vae = AutoencoderKL(embed_dim=args.vae_embed_dim, ch=args.vae_ch, ch_mult=args.vae_ch_mult)
    if vae.stride != args.vae_stride:
        raise FlowARError(f"--vae_stride is {args.vae_stride}, but --vae_ch_mult gives stride {vae.stride}")
    return vae.to(device).eval().requires_grad_(False)


# ---- timing ----------------------------------------------------------------------------------------------------


def seconds(function, device):
    """Wall seconds of function(), the device's work included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def alternate(functions, device, repeats):
    """{name: median seconds} of functions that take turns, after one call each that is not timed."""
    timings = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            value = seconds(function, device)
            if turn:
                timings[name].append(value)
    return {name: statistics.median(values) for name, values in timings.items()}


# ---- training and sampling -----------------------------------------------------------------------------------


def benchmark_train(args, device):
    """Optimizer steps: forward, backward, clipping, optimizer, EMA."""
    model = build_network(args, device).train()
    optimizer, ema = build_optimizer(model, LR, WEIGHT_DECAY, args.optimizer), EMA(model, EMA_RATE)
    labels = torch.arange(args.batch_size, device=device) % model.class_num
    draws = draw(model, args.batch_size, 0, device)
    latents, t, noise = draws.posterior, draws.draws.t, draws.draws.noise

    def step(loss):
        with autocast(device, args.precision):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model)

    ways = {"fast": lambda: step(lambda: model(latents, labels, t=t, noise=noise))}
    if args.beside:
        plain_loss = runpy.run_path(args.beside)["loss"]
        ways["plain"] = lambda: step(lambda: plain_loss(model, latents, labels, t, noise)[0])
    if args.compile:
        prepare.compile_training(model)
    return {"batch_size": args.batch_size, "use_checkpoint": args.use_checkpoint, "attn_dropout": args.attn_dropout,
            **compare("train", ways, args.batch_size, flops.training_flops(model), args, device)}


@torch.no_grad()
def benchmark_sample(args, device):
    """Latents of a batch of args.eval_bsz images; decoding is not among it."""
    check_single(args)
    original = build_network(args, device).eval()
    model = prepare.for_sampling(copy.deepcopy(original), AUTOCAST.get(args.precision))
    labels = torch.arange(args.eval_bsz, device=device) % model.class_num
    noise = [e.to(device) for e in image_noise(model, args.seed, range(args.eval_bsz))]
    options, latents = vars(Sampling.of({}, given_settings(args))), {}
    counted = {name: options[name] for name in ("cfg", "guidance", "num_steps", "cfg_schedule")}

    def sample(name, function):
        with autocast(device, args.precision):
            latents[name] = function()

    ways = {"fast": lambda: sample("fast", lambda: model.sample_tokens(labels, noise=noise, **options))}
    if args.beside:
        plain_sample = runpy.run_path(args.beside)["sample"]
        if any(options[name] != value for name, value in PLAIN.items()):
            raise FlowARError("--beside compares with a plain Euler sampler: leave out the options for "
                              f"{', '.join(PLAIN)}")
        ways["plain"] = lambda: sample("plain", lambda: plain_sample(original, labels, noise, **counted))
    if args.compile:
        prepare.compile_sampling(model, args.compile)
    operations = flops.sampling_flops(original, args.eval_bsz, **options)
    result = compare("sample", ways, args.eval_bsz, operations, args, device)
    if args.beside:
        result["difference"] = ((latents["fast"] - latents["plain"]).norm() / latents["plain"].norm()).item()
    return {"eval_bsz": args.eval_bsz, **counted, **result}


def compare(what, ways, images, operations, args, device):
    """Timings of the ways and of a large matrix product (the best of three) in turns. operations: floating-point, of an
    image.
    """
    n, turns = MATRIX_SIZE[device.type], []
    a, b = torch.randn(2, n, n, device=device).to(AUTOCAST.get(args.precision, torch.float32)).unbind(0)

    def product():
        turns.append(min(seconds(lambda: a @ b, device) for _ in range(3)))

    timings = alternate({**ways, "product": product}, device, args.repeats)
    del timings["product"]
    peak, reached = 2 * n**3 / statistics.median(turns), images * operations / timings["fast"]
    result = {"seconds": timings, "images_per_second": images / timings["fast"], "gigaflop_per_image": operations / 1e9,
              "gigaflops": reached / 1e9, "matmul_gigaflops": peak / 1e9, "share_of_peak": reached / peak,
              "memory_gib": memory_gib(device)}
    beside = ""
    if "plain" in timings:
        result["ratio"] = timings["plain"] / timings["fast"]
        beside = f"; plain {1000 * timings['plain']:.0f} ms, ratio {result['ratio']:.2f}"
    print(f"{what} {args.model}, {images} images of {args.img_size}, {args.precision}, compile {args.compile}: "
          f"{1000 * timings['fast']:.0f} ms, {result['images_per_second']:.3f} images/s, {reached / 1e9:.0f} of "
          f"{peak / 1e9:.0f} GFLOP/s = {100 * result['share_of_peak']:.0f} %{beside}", flush=True)
    return result


# ---- memory --------------------------------------------------------------------------------------------------


def benchmark_memory(args, device):
    """Counted on one and on two images that have shapes and no numbers."""
    with torch.device("meta"):
        model = build_model(args.model, **model_options(args))
    an_image, parameters = image_bytes(model, AUTOCAST.get(args.precision)), sum(p.numel() for p in model.parameters())
    fixed, activations = parameters * FLOAT * STATES, an_image * args.batch_size
    low = parameters * 2 if args.precision in AUTOCAST else 0
    print(f"memory {args.model}, batch {args.batch_size}, {args.precision}, recomputing {args.use_checkpoint}: "
          f"weights, gradients, AdamW, EMA {fixed / 2**30:.1f} GiB; activations {activations / 2**30:.1f} GiB "
          f"({an_image / 2**20:.0f} MiB an image)", flush=True)
    return {"batch_size": args.batch_size, "use_checkpoint": args.use_checkpoint, "attn_dropout": args.attn_dropout,
            "fixed_gib": fixed / 2**30, "low_precision_weights_gib": low / 2**30,
            "activations_gib": activations / 2**30, "mib_per_image": an_image / 2**20}


# ---- evaluation ----------------------------------------------------------------------------------------------


def extract_through_files(sampler, plan, extractor, folder):
    """As the release does: PNGs one after the other, then a second pass over the files."""
    for first in range(0, plan.num_images, sampler.batch):
        indices = range(first, min(first + sampler.batch, plan.num_images))
        for index, image in zip(indices, sampler.images(plan.labels.of(indices), first)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:06d}.png")
    extract_folder(list_reference(folder), extractor, sampler.device)


def write_random_inception(path):
    """A file of weights for Inception, always the same; the published one is a download."""
    from torch_fidelity import feature_extractor_inceptionv3 as inception  # heavy, and of features alone

    torch.manual_seed(0)
    with (mock.patch.object(inception, "load_state_dict_from_url"),
          mock.patch.object(torch.nn.Module, "load_state_dict")):
        network = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), path)


def benchmark_evaluate(args, device):
    check_single(args)
    model, vae = build_network(args, device), build_vae(args, device)
    prepare.for_evaluation([model], vae, AUTOCAST.get(args.precision), args.compile)
    sampler = Sampler(model, vae, Sampling.of({}, given_settings(args)), args.precision, args.seed, args.eval_bsz)
    with tempfile.TemporaryDirectory() as folder:
        choices, file = list(args.feature_extractor), Path(folder) / "inception.pth"
        if Inception.name in choices:
            write_random_inception(file)
            choices[choices.index(Inception.name)] = f"{Inception.name}={file}"
        extractor = build_extractors(choices, device)
    if args.compile:
        prepare.compile_features(extractor)
    for count in (args.eval_bsz, args.num_images):  # the first warms up
        plan = Plan(choose_labels("balanced", count, Classes(args.class_num)))
        with tempfile.TemporaryDirectory() as folder:
            measure, start = Measure(extractor, [Reference()] * len(extractor.parts)), time.perf_counter()
            report = evaluate(sampler, plan, measure, {}, Path(folder))
            in_memory = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            extract_through_files(sampler, plan, extractor, Path(folder))
            through_files = time.perf_counter() - start
    return {"num_images": args.num_images, "eval_bsz": args.eval_bsz, "num_step": report["num_step"],
            "cfg": report["cfg"], "feature_extractor": extractor.name, "seconds_in_memory": in_memory,
            "seconds_through_files": through_files, "images_per_second": args.num_images / in_memory,
            "ratio": through_files / in_memory, "seconds_per_image": report["seconds_per_image"]}


BENCHMARKS = {"train": (Train, benchmark_train), "sample": (Sample, benchmark_sample),
              "evaluate": (Evaluate, benchmark_evaluate), "memory": (Memory, benchmark_memory)}


# ---- against another checkout --------------------------------------------------------------------------------


def benchmark_against(args):
    """Medians over turns of this checkout's seconds and another's, each in a process of its own."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--against"), own.add_argument("--turns"), own.add_argument("--json")
    _, words = own.parse_known_args()
    roots = {"other": Path(args.against).resolve(), "this": Path(__file__).resolve().parents[1]}
    timings = {name: [] for name in roots}
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        for name in args.turns * ("other", "this"):  # first the other: it may not know an option
            root = roots[name]  # on PYTHONPATH: an editable install is of one of the two
            subprocess.run([sys.executable, root / "scripts" / "benchmark.py", *words, "--json", figures], cwd=root,
                           env={**os.environ, "PYTHONPATH": str(root)}, stdout=subprocess.DEVNULL, check=True)
            timings[name].append(read_json(figures)["seconds"]["fast"])
    other, this = (statistics.median(timings[name]) for name in ("other", "this"))
    print(f"this {1000 * this:.0f} ms, {args.against} {1000 * other:.0f} ms: {other / this:.3f} times as fast")
    return {"turns": timings, "times_as_fast": other / this}


def main():
    what, args = parse_args()
    device = select_device(args.device)
    args = replace(resolve_geometry(args), precision=set_precision(args.precision, device))
    if args.json:
        check_output(args.json)
    if isinstance(args, Comparison) and args.against:
        measured = benchmark_against(args)
    else:
        _, measure = BENCHMARKS[what]
        measured = measure(args, device)
    result = {"what": what, "model": args.model, "precision": args.precision, "compile": args.compile, **measured,
              **describe_machine(device)}
    print(json.dumps(result, indent=2))
    if args.json:
        write_json(result, args.json)


if __name__ == "__main__":
    run_main(main)
