"""Change one thing at a time on the quickstart's model: train, evaluate, and put all into one table and one figure.

    python scripts/studies/ablations.py --root output/quickstart --variants times,reading,guidance

Each variant of VARIANTS is a training on the quickstart's data (scripts/quickstart.sh makes it) with a few options
more, for as many images and with each of the seeds; variants that differ in sampling alone share a training.
Each is evaluated with 24 Euler steps, cfg 3. What is done is kept in ROOT/ablations: the same command resumes. Writes
ablations.md, .json and .png there; with --variants their names have the groups.
"""
import functools
import math
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib.figure import Figure

from models import FlowARError
from models import flow_matching as fm
from models.flowar import to_grid, to_tokens
from models.settings import one_of
from models.vae import DiagonalGaussian
from models.variants.ablated import CHOICES
from scripts.quickstart_report import generated_accuracy, load_classifier
from util.cluster import run_main, select_device
from util.command_line import COUNT, DEVICE, POSITIVE, Parser, as_type, list_of, path
from util.data.latents import ShardedMoments
from util.evaluation import load_pipeline
from util.evaluation.reports import RESULTS
from util.files import read_json, write_bytes, write_json
from util.manifest import describe_machine
from util.training.logging import read_lines

ROOT = Path(__file__).resolve().parents[2]

TRAINING = ("main_flowar.py --img_size 32 --vae_path demo:fashion --vae_embed_dim 4 --vae_stride 4 --patch_size 2 "
            "--model flowar_tiny --batch_size 64 --lr 4e-3 --ema_rate 0.995 --attn_dropout 0 --proj_dropout 0 "
            "--no_flip --data_path {root}/images --cached_path {root}/latents --cached_val_path {root}/latents_val "
            "--num_workers 0 --save_last_freq 1 --keep_every 1 --eval_freq 1000")
SAMPLING = ("eval.py --num_step 25 --cfg 3 --guidance 1 --fid_stats {root}/val_stats.npz "
            "--feature_extractor efficientnet-lite0 --save_images")
BASE, OWN_IMAGES, OWN_STEPS = "released", 2000, 10
RELEASED = {BASE: ("", "")}
VARIANTS = {  # group: {name: (options of training, options of sampling)}
    "times": {**RELEASED, "shift 0.5": ("--t_dist shift:0.5", ""), "shift 2": ("--t_dist shift:2", ""),
              "logit-normal 0, 1": ("--t_dist logit_normal:0,1", "")},
    "reading": {**RELEASED, "condition noise 0.1": ("--condition_noise 0.1", ""),
                "condition noise 0.3": ("--condition_noise 0.3", "")},
    "latents": {**RELEASED, "scaled by channel": ("--latent_norm channel", "")},
    "scales": {**RELEASED, "1, 4": ("--scales 1,4", ""), "1, 2, 3, 4": ("--scales 1,2,3,4", "")},
    "head": {**RELEASED, "every token by itself": ("--head token", "")},
    "objective": {**RELEASED, "diffusion, DDIM": ("--objective diffusion", ""),
                  "diffusion, ancestral": ("--objective diffusion", "--solver ancestral")},
    "condition": {**RELEASED, **{name: (f"--condition {name}", "") for name in CHOICES["condition"][1:]}},
    "pyramid": {**RELEASED, "of the image": ("--pyramid image --cached_path '' --cached_val_path ''", "")},
    "guidance": {"no guidance": ("", "--cfg 1"), **RELEASED, "t > 0.1": ("", "--guidance_low 0.1"),
                 "t > 0.3": ("", "--guidance_low 0.3"), "t <= 0.7": ("", "--guidance 0.7"),
                 "2 on every scale": ("", "--cfg 2:2:2"), "falling, 3:2:1": ("", "--cfg 3:2:1"),
                 "by the first epoch, 2": ("", "--guide {first} --cfg 2"),
                 "by the first epoch, 3": ("", "--guide {first} --cfg 3")},
}
PAPER = {("scales", BASE): 3.61, ("scales", "1, 4"): 4.88}  # FIDs at 256 pixels with and without the second scale
OWN = {"loss, half own": 0.5, "loss, own scales": 1.0}  # the time from which coarse scales are the model's own
COLUMNS = {"distance": ".1f", "KID": ".3f", "precision": ".3f", "recall": ".3f", "classifier accuracy": ".1%",
           "validation loss": ".4f", **dict.fromkeys(OWN, ".4f")}


def parse_args():
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--root", type=as_type(path), default="output/quickstart", help="the quickstart's folder")
    add("--variants", type=as_type(list_of(one_of(*VARIANTS))), default=tuple(VARIANTS), help=", ".join(VARIANTS))
    add("--seeds", type=as_type(list_of(COUNT)), default=(0, 1, 2), help="of training and sampling")
    add("--images", type=as_type(POSITIVE), default=80000, help="training images that each sees, in whole epochs")
    add("--samples", type=as_type(POSITIVE), default=2000, help="images of each evaluation")
    add("--at_once", type=as_type(POSITIVE), default=2, help="programs to run in parallel")
    add("--device", type=as_type(DEVICE), default="auto", help="where to compute")
    return parser.parse_args()


# ---- one variant with one seed -------------------------------------------------------------------------------


def folder_of(options):
    """Name of the folder of these options."""
    return re.sub("[^a-z0-9._]+", "-", "_".join(shlex.split(options.replace("--", "")))) or BASE


class Point:
    """One variant with one seed."""

    def __init__(self, args, training, sampling, seed):
        base = Path(args.root) / "ablations" / f"{args.images}"
        self.run, self.training = base / f"{folder_of(training)}_seed{seed}", training
        self.output, self.sampling = self.run / f"eval{args.samples}_{folder_of(sampling)}", sampling
        self.seed = seed

    def train(self, args, epochs):
        command = (f"{TRAINING} {self.training} --seed {self.seed} --epochs {epochs} --warmup_epochs {epochs * 0.05} "
                   f"--output_dir {self.run} --resume {self.run} --device {args.device}")
        run_program(args, command, self.run)

    def evaluate(self, args):
        first = min(self.run.glob("checkpoint-0*.pth"), default="")  # of the first epoch
        command = (f"{SAMPLING} {self.sampling.format(first=first)} --resume {self.run} --seed {self.seed} "
                   f"--num_images {args.samples} --eval_bsz {min(args.samples, 250)} --output_dir {self.output} "
                   f"--device {args.device}")
        run_program(args, command, self.output)

    def figures(self, network, root, device):
        """(a number for each of COLUMNS, parameters)."""
        report = read_json(self.output / RESULTS)
        figures = []
        for prefix in ("frechet_distance", "kid_mean", "precision", "recall"):
            figures += [report[name] for name in report["metrics"] if name.startswith(prefix)]
        figures.append(generated_accuracy(self.output, report, network, device))
        losses = [line["loss"] for line in read_lines(self.run / "log.jsonl") if line.get("group") == "val_ema"]
        return [*figures, losses[-1], *own_scales_losses(self.run, root, device)], report["parameters"]


def run_program(args, command, output):
    """Run a program of the project, with its share of the cores; what it prints goes to a file beside what it makes."""
    command = command.format(root=args.root)
    threads = str(max(1, (os.cpu_count() or 1) // args.at_once))
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{output}.txt", "ab") as log:
        status = subprocess.run([sys.executable, *shlex.split(command)], stdout=log, stderr=log,
                                env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}).returncode
    if status:
        raise FlowARError(f"{output}.txt: failed with status {status}: {command}")


# ---- validation where the transformer reads the model's own scales -------------------------------------------


@functools.cache
def own_scales_losses(run, root, device):
    """Validation loss of a run's average where the transformer reads scales that the model has drawn, as in sampling:
    for each time of OWN, every scale but the last is carried from its path at that time to 0 by the model, given those
    before; targets are the images'. From t = 1 on only the label binds them to the image, so that this is what a wrong
    coarse scale costs at most; from 0.5 on they resemble it.
    """
    sampler = load_pipeline(run, None, device.type, precision="fp32").sampler
    model, scale, data = sampler.model, sampler.vae.latent_scale, ShardedMoments(root / "latents_val")
    if model.config.get("objective", "flow") != "flow" or model.config.get("pyramid", "latent") != "latent":
        return [math.nan] * len(OWN)  # of another target: nothing to compare
    moments, labels = zip(*(data[0, i] for i in range(0, len(data), max(1, len(data) // OWN_IMAGES))))
    latents = scale.normalize(DiagonalGaussian(torch.stack(moments).float().to(device)).mode())
    labels, losses = torch.tensor(labels, device=device), []
    for time in OWN.values():
        with torch.no_grad():
            errors = own_scales_error(model, latents, labels, time)
        losses.append(model.weighted(errors.mean(dim=1)).item())
    return losses


def own_scales_error(model, latents, labels, time):
    """scale_losses of the images' pyramid, read with the model's own coarse scales from `time` on; with fixed draws."""
    generator, pyramid = torch.Generator(latents.device).manual_seed(0), model.pyramid(latents)
    t, noise, _, _ = model.draw(len(labels), generator)
    start_noise, times = model.draw_noise(len(labels), generator), time * fm.time_grid(OWN_STEPS, "uniform")
    read = list(pyramid)
    for k, span in enumerate(model.spans[:-1]):
        condition = model.condition_on(read, labels)[:, span]
        velocity = model.flownet.guided(condition, len(labels), 1.0, 0.0, 1.0)
        x = fm.euler(velocity, fm.interpolate(to_tokens(pyramid[k]), start_noise[k], time), times)
        read[k] = to_grid(x.to(latents), model.scale[k])
    return model.velocity_errors(pyramid, model.condition_on(read, labels), t, noise)


# ---- the table -----------------------------------------------------------------------------------------------


def main():
    args = parse_args()
    root, device = Path(args.root), select_device(args.device)
    epochs = max(1, round(args.images / sum(1 for _ in (root / "images" / "train").glob("*/*"))))
    rows = {}
    for group in args.variants:
        for name, options in VARIANTS[group].items():
            rows[group, name] = [Point(args, *options, seed) for seed in args.seeds]
    points = [point for column in zip(*rows.values()) for point in column]  # the first seed of all comes first
    with ThreadPoolExecutor(args.at_once) as pool:
        list(pool.map(lambda point: point.train(args, epochs), {point.run: point for point in points}.values()))
        list(pool.map(lambda point: point.evaluate(args), {point.output: point for point in points}.values()))
    network, results = load_classifier(device), {}
    for key, row in rows.items():
        results[key] = [point.figures(network, root, device) for point in row]
    groups = "" if args.variants == tuple(VARIANTS) else f"-{','.join(args.variants)}"
    report(args, results, device, root / "ablations" / f"ablations{groups}")


def report(args, results, device, path):
    """Write the table, its figures and their picture: path without its suffix."""
    lines = [f"| | {' | '.join(COLUMNS)} | parameters | paper's FID |", "|---" * (len(COLUMNS) + 3) + "|"]
    record = {}
    for (group, name), row in results.items():
        by_column = zip(*(figures for figures, _ in row))
        cells = [spread(values, form) for values, form in zip(by_column, COLUMNS.values())]
        lines.append(f"| {group}: {name} | {' | '.join(cells)} | {row[0][1]:,} | {PAPER.get((group, name), '')} |")
        record[f"{group}: {name}"] = [dict(zip(COLUMNS, figures)) for figures, _ in row]
    print("\n".join(lines))
    write_bytes(("\n".join(lines) + "\n").encode(), Path(f"{path}.md"))
    write_json({"images": args.images, "samples": args.samples, "seeds": args.seeds, **describe_machine(device),
                "rows": record}, Path(f"{path}.json"))
    draw(results, Path(f"{path}.png"))


def spread(values, form):
    """'287.4 ± 0.6': mean and standard deviation over seeds."""
    if any(map(math.isnan, values)):
        return ""
    return format(mean(values), form) + (f" ± {format(stdev(values), form).rstrip('%')}" if len(values) > 1 else "")


def draw(results, path):
    """The distance of every seed, a line for each variant; the shade spans the released way's seeds."""
    figure = Figure(figsize=(9, 1 + 0.3 * len(results)), dpi=100)
    axis = figure.subplots()
    for line, ((group, name), row) in enumerate(results.items()):
        values = [figures[0] for figures, _ in row]
        axis.plot(values, [line] * len(values), "o", color="tab:gray" if name == BASE else "tab:blue", alpha=0.6)
        axis.plot(mean(values), line, "|", color="black", markersize=14)
        if name == BASE:
            axis.axvspan(min(values), max(values), color="tab:gray", alpha=0.1)
    axis.set(xlabel="distance to the test split (dots: seeds; bar: their mean)", yticks=range(len(results)),
             yticklabels=[f"{group}: {name}" for group, name in results])
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    run_main(main)
