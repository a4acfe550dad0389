"""Measure this code on this machine.

    python scripts/benchmark.py train --model flowar_small --batch_size 64 --precision bf16 --compile --beside tests/plain.py
    python scripts/benchmark.py sample --model flowar_small --eval_bsz 256 --cfg 4.3 --precision bf16 --compile
    python scripts/benchmark.py evaluate --model flowar_small --num_images 1000 --eval_bsz 100 --device cuda
    python scripts/benchmark.py vae --batch_size 2 --img_size 256 --compile
    python scripts/benchmark.py features --feature_extractor inception,efficientnet-lite0 --batch_size 8 --compile
    python scripts/benchmark.py memory --model flowar_large --batch_size 64 --precision bf16 --use_checkpoint

`train` times whole optimizer steps of the recipe, `sample` the latents of a batch: images and floating-point operations a second (counted by
scripts/flops.py), the share of what a large matrix product reaches between them, peak memory. --beside FILE times another way in turns, eager,
on the same weights: a Python file with loss and sample, such as tests/plain.py. --against WORKTREE times the same benchmark of another
checkout, such as the commit before, in turns. `evaluate` times sampling, decoding and features of N images in memory, against writing PNGs
and reading them again for the features, as the release does. `vae` and `features` time encoding, decoding and feature networks with weights
contiguous or channels_last, in float32 or autocast, eager or compiled. `memory` counts the bytes that a training step holds, on any machine.
Weights are random: time does not depend on them.
"""
import argparse
import copy
import functools
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from torch.nn.attention import SDPBackend
from torch_fidelity import feature_extractor_inceptionv3 as inception

from engine_flowar import evaluate
from models import AutoencoderKL, FlowARError, build_model
from models.settings import Sampling, setting
from scripts import flops
from util.cluster import AUTOCAST, autocast, memory_gib, run_main, select_device, set_precision
from util.command_line import BELOW_ONE, POSITIVE, flag, list_of, make_parser, path, take_options
from util.evaluation.extractors import Inception, build_extractors
from util.evaluation.labels import Classes, choose_labels
from util.evaluation.metrics import Measure
from util.evaluation.pipeline import build_sampler
from util.evaluation.references import extract_folder, list_images
from util.evaluation.store import Plan
from util.files import check_output, read_json, write_json
from util.geometry import resolve_geometry
from util.manifest import describe_machine
from util.options import SETTINGS, Extractors, Model, Run, SamplingSettings, check_single, given_settings, model_options
from util.speed import prepare
from util.speed.memory import FLOAT, STATES, image_bytes
from util.training.optimization import EMA, build_optimizer
from util.training.randomness import draw, image_noise

GRAD_CLIP, LR, WEIGHT_DECAY, EMA_RATE = 3.0, 1e-4, 0.02, 0.9999
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LOW_PRECISIONS = {"cpu": ("bf16",), "cuda": ("bf16", "fp16")}  # of `vae`, besides the full one
MATRIX_SIZE = {"cpu": 4096, "cuda": 8192}
PLAIN = {"solver": "euler", "time_grid": "release", "num_steps_last": None, "temperature": 1.0, "guidance_low": 0.0}  # of tests/plain.py's sampler


def attention_kernel(model, dtype=None):
    """Name of the kernel that attention over a FlowAR's finest scale runs with: torch.nn.attention.SDPBackend. No public call says what torch chooses."""
    attn = model.blocks[0].attn
    q = torch.empty((1, attn.num_heads, model.scale[-1] ** 2, attn.head_dim), dtype=dtype, device=model.z_proj.weight.device)
    return SDPBackend(torch._fused_sdp_choice(q, q, q, dropout_p=attn.attn_dropout if model.training else 0.0)).name


@dataclass
class BenchmarkOptions(Model, SamplingSettings, Extractors, Run):
    """benchmark"""
    batch_size: int = setting(16, "train, vae, features, memory: images", POSITIVE, of=("train", "vae", "features", "memory"))
    eval_bsz: int = setting(64, "sample, evaluate: images of a batch", POSITIVE, of=("sample", "evaluate"))
    num_images: int = setting(50000, "evaluate: images", POSITIVE, of=("evaluate",))
    use_checkpoint: bool = flag("train, memory: recompute activations", of=("train", "memory"))
    attn_dropout: float = setting(0.1, "train, memory: as in training", BELOW_ONE, of=("train", "memory"))
    proj_dropout: float = setting(0.1, "train, memory: as in training", BELOW_ONE, of=("train", "memory"))
    vae_ch: int = setting(128, "base width of the VAE (KL-16 has 128)", POSITIVE)
    vae_ch_mult: tuple = setting((1, 1, 2, 2, 4), "its levels", list_of(POSITIVE))
    repeats: int = setting(5, "timings, whose median counts", POSITIVE)
    beside: str = setting(None, "train, sample: Python file with another way to compute the same", path, of=("train", "sample"))
    against: str = setting(None, "train, sample: folder of another checkout of this project, timed in turns with this one", path,
                           of=("train", "sample"))
    turns: int = setting(3, "--against: how often each is started", POSITIVE, of=("train", "sample"))
    json: str = setting(None, "file to write the figures to", path)
    resume = guide = ""  # build_sampler asks for them


READ_BY = {"vae": (), "vae_path": (), **dict.fromkeys(SETTINGS, ("sample", "evaluate"))}  # options of all programs


def parse_args():
    """(what, BenchmarkOptions); FlowARError for an option that this benchmark does not read. Those of the networks' sizes are for all."""
    parser = make_parser(BenchmarkOptions, __doc__.splitlines()[0])
    parser.usage = "%(prog)s WHAT [options]"
    parser.add_argument("what", choices=BENCHMARKS, help="what to measure")
    parsed = parser.parse_args()
    args = take_options(BenchmarkOptions, parsed)
    for field in fields(args):
        readers = field.metadata.get("of", READ_BY.get(field.name))
        if readers is not None and parsed.what not in readers and getattr(args, field.name) != field.default:
            raise FlowARError(f"--{field.name} is not for {parsed.what}: leave it out")
    check_single(args)
    return parsed.what, args


def load_plain(path):
    """The module of --beside, None without."""
    if not path:
        return None
    spec = importlib.util.spec_from_file_location("beside", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_network(args, device):
    torch.manual_seed(args.seed)
    return build_model(args.model, **model_options(args)).to(device)


def build_vae(args, device):
    vae = AutoencoderKL(embed_dim=args.vae_embed_dim, ch=args.vae_ch, ch_mult=args.vae_ch_mult)
    if vae.stride != args.vae_stride:
        raise FlowARError(f"--vae_stride is {args.vae_stride}, but the {len(args.vae_ch_mult)} levels of --vae_ch_mult make {vae.stride}")
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


class MatrixProduct:
    """A large matrix product in dtype: operations a second, the best of three in every turn, the median of the turns."""

    def __init__(self, device, dtype):
        n = MATRIX_SIZE[device.type]
        self.a, self.b = torch.randn(2, n, n, device=device).to(dtype).unbind(0)
        self.device, self.operations, self.turns = device, 2 * n**3, []

    def __call__(self):
        self.turns.append(self.operations / min(seconds(lambda: self.a @ self.b, self.device) for _ in range(3)))

    def peak(self):
        return statistics.median(self.turns)


# ---- training and sampling -----------------------------------------------------------------------------------


def benchmark_train(args, device):
    """Optimizer steps: forward, backward, clipping, fused AdamW, EMA."""
    model = build_network(args, device).train()
    optimizer, ema = build_optimizer(model, LR, WEIGHT_DECAY), EMA(model, EMA_RATE)
    draws, labels = draw(model, args.batch_size, 0, device), torch.arange(args.batch_size, device=device) % model.class_num
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
    if plain := load_plain(args.beside):
        ways["plain"] = lambda: step(lambda: plain.loss(model, latents, labels, t, noise)[0])
    if args.compile:
        prepare.compile_training(model)
    return {"batch_size": args.batch_size, "use_checkpoint": args.use_checkpoint, "attn_dropout": args.attn_dropout,
            "attention_kernel": attention_kernel(model, AUTOCAST.get(args.precision)),
            **compare("train", ways, args.batch_size, flops.training_flops(model), args, device)}


@torch.no_grad()
def benchmark_sample(args, device):
    """Latents of a batch of args.eval_bsz images; decoding is not among it."""
    slow = build_network(args, device).eval()
    model = prepare.for_sampling(copy.deepcopy(slow), AUTOCAST.get(args.precision))
    labels = torch.arange(args.eval_bsz, device=device) % model.class_num
    noise = [e.to(device) for e in image_noise(model, args.seed, range(args.eval_bsz))]
    options, latents = vars(Sampling.of({}, given_settings(args))), {}
    counted = {name: options[name] for name in ("cfg", "guidance", "num_steps", "cfg_schedule")}

    def sample(name, function):
        with autocast(device, args.precision):
            latents[name] = function()

    ways = {"fast": lambda: sample("fast", lambda: model.sample_tokens(labels, noise=noise, **options))}
    if plain := load_plain(args.beside):
        if any(options[name] != value for name, value in PLAIN.items()):
            raise FlowARError(f"--beside compares with a plain Euler sampler: leave out the options of {', '.join(PLAIN)}")
        ways["plain"] = lambda: sample("plain", lambda: plain.sample(slow, labels, noise, **counted))
    if args.compile:
        prepare.compile_sampling(model, args.compile)
    result = compare("sample", ways, args.eval_bsz, flops.sampling_flops(slow, args.eval_bsz, **options), args, device)
    if plain:
        result["difference"] = ((latents["fast"] - latents["plain"]).norm() / latents["plain"].norm()).item()
    return {"eval_bsz": args.eval_bsz, **counted, "attention_kernel": attention_kernel(model, AUTOCAST.get(args.precision)), **result}


def compare(what, ways, images, operations, args, device):
    """Timings of the ways and of a large matrix product in turns. operations: floating-point, of an image."""
    product = MatrixProduct(device, AUTOCAST.get(args.precision, torch.float32))
    timings = alternate({**ways, "product": product}, device, args.repeats)
    del timings["product"]
    peak, reached = product.peak(), images * operations / timings["fast"]
    result = {"seconds": timings, "images_per_second": images / timings["fast"], "gigaflop_per_image": operations / 1e9,
              "gigaflops": reached / 1e9, "matmul_gigaflops": peak / 1e9, "share_of_peak": reached / peak, "memory_gib": memory_gib(device)}
    beside = ""
    if "plain" in timings:
        result["ratio"] = timings["plain"] / timings["fast"]
        beside = f"; plain {1000 * timings['plain']:.0f} ms, ratio {result['ratio']:.2f}"
    print(f"{what} {args.model}, {images} images of {args.img_size}, {args.precision}, compile {args.compile}: "
          f"{1000 * timings['fast']:.0f} ms, {result['images_per_second']:.3f} images/s, {reached / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s = "
          f"{100 * result['share_of_peak']:.0f} %{beside}", flush=True)
    return result


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


# ---- the VAE and the feature networks --------------------------------------------------------------------------


def variants(args):
    """(layout, compiled) of every way in which a network is timed."""
    return [(layout, compiled) for compiled in ((False, True) if args.compile else (False,)) for layout in LAYOUTS]


@torch.no_grad()
def benchmark_vae(args, device):
    """Milliseconds an image of encoding and decoding, each way in turns on the same weights."""
    vae, full = build_vae(args, device), args.precision if args.precision not in AUTOCAST else "fp32"
    set_precision(full, device)
    side, networks = args.img_size // args.vae_stride, {}
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    latents = torch.randn(args.batch_size, args.vae_embed_dim, side, side, device=device)
    for layout, compiled in variants(args):
        network = networks[layout, compiled] = copy.deepcopy(vae).to(memory_format=LAYOUTS[layout])
        if compiled:
            network.encoder.compile()
            network.decoder.compile()

    def encode(network, precision):
        with autocast(device, precision):
            return network.encode(images).parameters

    def decode(network, precision):
        with autocast(device, precision):
            return network.decode(latents)

    rows = []
    for function in (encode, decode):
        ways = {f"{layout}, {precision}{', compiled' * compiled}": functools.partial(function, network, precision)
                for precision in (full, *LOW_PRECISIONS[device.type]) for (layout, compiled), network in networks.items()}
        rows += in_turns(function.__name__, ways, device, args)
    return {"batch_size": args.batch_size, "img_size": args.img_size, "vae_ch": args.vae_ch, "rows": rows}


@torch.no_grad()
def benchmark_features(args, device):
    """Milliseconds an image of every network of --feature_extractor, each way in turns."""
    set_precision(args.precision, device)
    images, rows = torch.randint(256, (args.batch_size, 3, args.img_size, args.img_size), dtype=torch.uint8, device=device), []
    for name in args.feature_extractor:
        ways = {}
        for layout, compiled in variants(args):
            extractor = open_extractors((name,), args.fid_weights, device)
            extractor.parts[0].network.to(memory_format=LAYOUTS[layout])
            if compiled:
                    prepare.compile_features(extractor)
            ways[f"{layout}{', compiled' * compiled}"] = lambda part=extractor.parts[0]: part.forward(images)[0]
        rows += in_turns(name, ways, device, args)
    return {"batch_size": args.batch_size, "img_size": args.img_size, "rows": rows}


def in_turns(what, ways, device, args):
    """A row of each way: its time, ratio to the first one's and relative difference from what that computes."""
    first, rows, results = next(iter(ways)), [], {name: run() for name, run in ways.items()}
    timings = alternate(ways, device, args.repeats)
    for name, result in results.items():
        difference = ((result - results[first]).norm() / results[first].norm()).item()
        rows.append({"what": what, "way": name, "ms_per_image": 1000 * timings[name] / args.batch_size,
                     "ratio": timings[first] / timings[name], "difference": difference})
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
    return extract_folder(list_images(folder), extractor, sampler.device)


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
    model, vae = build_network(args, device), build_vae(args, device)
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


BENCHMARKS = {"train": benchmark_train, "sample": benchmark_sample, "evaluate": benchmark_evaluate, "vae": benchmark_vae,
              "features": benchmark_features, "memory": benchmark_memory}


# ---- against another checkout --------------------------------------------------------------------------------


def benchmark_against(args, device):
    """Medians over turns of this checkout's seconds and another's, each in a process of its own."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--against"), own.add_argument("--turns"), own.add_argument("--json")
    _, words = own.parse_known_args()
    this = Path(__file__).resolve()
    files, timings = {"other": Path(args.against).resolve() / "scripts" / "benchmark.py", "this": this}, {"other": [], "this": []}
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        for name in args.turns * ("other", "this"):  # first the other: it may not know an option
            root = files[name].parents[1]  # on PYTHONPATH: an editable install is of one of the two
            subprocess.run([sys.executable, files[name], *words, "--json", figures], cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
                           stdout=subprocess.DEVNULL, check=True)
            timings[name].append(read_json(figures)["seconds"]["fast"])
    medians = {name: statistics.median(values) for name, values in timings.items()}
    print(f"this {1000 * medians['this']:.0f} ms, {args.against} {1000 * medians['other']:.0f} ms: {medians['other'] / medians['this']:.3f} times as fast")
    return {"turns": timings, "times_as_fast": medians["other"] / medians["this"]}


def main():
    what, args = parse_args()
    device = select_device(args.device)
    args = replace(resolve_geometry(args), precision=set_precision(args.precision, device))
    if args.json:
        check_output(args.json)
    measured = (benchmark_against if args.against else BENCHMARKS[what])(args, device)
    result = {"what": what, "model": args.model, "precision": args.precision, "compile": args.compile, **measured, **describe_machine(device)}
    print(json.dumps(result, indent=2))
    if args.json:
        write_json(result, args.json)


if __name__ == "__main__":
    run_main(main)
