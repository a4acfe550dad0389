"""Compare recipes of training on the quickstart's data: losses of weights and EMA, and samples over guidance.

    python scripts/studies/recipes.py --root output/recipes --groups "adamw rate,muon rate" --images 40000 --seeds 9
    python scripts/studies/recipes.py --root output/recipes --groups tuned --images 40000,80000 --cfg 1,1.5,2,2.5,3

ROOT has images, latents, latents_val and val_stats.npz, as scripts/quickstart.sh makes them; another data set's VAE
and size are --options. Trains every recipe of --groups for each of --images and --seeds, and evaluates it at each
--cfg; a row of the table has the cfg with the lowest mean distance. What is done is kept in ROOT/recipes: the same
command resumes. Writes a table, all figures as .json and the curves as .png there, with the groups in their names.
"""
import itertools
import math
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from models import FlowARError
from models.settings import number, one_of
from scripts.quickstart_data import GARMENTS
from scripts.quickstart_report import generated_accuracy, load_classifier
from scripts.studies.ablations import TRAINING, folder_of, run_program, spread
from util.cluster import run_main, select_device
from util.command_line import COUNT, DEVICE, POSITIVE, Parser, as_type, list_of, path
from util.evaluation.reports import RESULTS
from util.files import read_json, write_bytes, write_json
from util.manifest import RUN, describe_machine
from util.training.logging import read_lines

SAMPLING = ("eval.py --solver ab2 --num_step 12 --time_grid uniform --guidance 1 --fid_stats {root}/val_stats.npz "
            "--feature_extractor efficientnet-lite0 --labels train --save_images")
# On a CPU Muon's products are in float32: many emulate bf16, which takes three times as long.
FLOAT_MUON = ("import runpy, sys, torch; torch.Tensor.bfloat16 = torch.Tensor.float; sys.argv.pop(0); "
              "runpy.run_path(sys.argv[0], run_name='__main__')")
MUON, BATCH = "--optimizer muon", 64
RATES = ("1e-3", "2e-3", "4e-3", "8e-3", "1.6e-2")
BEST = "8e-3"
OTHER = {  # warm-ups are those of 40,000 images
    "betas 0.9, 0.99": "--betas 0.9,0.99", "betas 0.95, 0.95": "--betas 0.95,0.95",
    "weight decay 0": "--weight_decay 0", "weight decay 0.1": "--weight_decay 0.1",
    "warm-up 1 %": "--warmup_epochs 0.02", "warm-up 20 %": "--warmup_epochs 0.4",
    "EMA 0.98": "--ema_rate 0.98", "EMA 0.99": "--ema_rate 0.99", "linear end": "--lr_schedule linear_end"}
DECAY = "--weight_decay 0.1"
TUNED = f"--lr {BEST} {DECAY} --ema_rate 0.98"
COMBINED = {"linear end": "--lr_schedule linear_end", "shift 0.5": "--t_dist shift:0.5",
            "logit-normal 0, 1": "--t_dist logit_normal:0,1"}
LARGER = {256: "0.92", 1024: "0.72"}  # images a step: EMA rate of about as many images as 0.98 at 64
OPTIMIZERS = {"AdamW": "", "Muon": f"{MUON} "}


def batch_recipes():
    """Both optimizers at every number of images a step of LARGER and three rates."""
    recipes = {}
    for batch, ema in LARGER.items():
        for (name, muon), rate in itertools.product(OPTIMIZERS.items(), ("8e-3", "1.6e-2", "3.2e-2")):
            options = f"{muon}--lr {rate} {DECAY} --ema_rate {ema} --global_batch {batch}"
            recipes[f"{name}, {batch} images a step, {rate}"] = options
    return recipes


def noise_recipes(*levels):
    """Both optimizers with condition noise of every level."""
    return {f"{name}, condition noise {std}": f"{muon}{TUNED} --condition_noise {std}"
            for std, (name, muon) in itertools.product(levels, OPTIMIZERS.items())}


GROUPS = {  # {group: {name: options of training}}
    "adamw rate": {f"adamw {rate}": f"--lr {rate}" for rate in RATES},
    "muon rate": {f"muon {rate}": f"{MUON} --lr {rate}" for rate in RATES},
    "adamw": {f"adamw, {name}": f"--lr {BEST} {options}" for name, options in OTHER.items()},
    "muon": {f"muon, {name}": f"{MUON} --lr {BEST} {options}" for name, options in OTHER.items()},
    "tuned": {name: f"{muon}{TUNED}" for name, muon in OPTIMIZERS.items()},
    "batch": batch_recipes(),
    "noise": noise_recipes(0.3),
    "noise level": noise_recipes(0.1, 0.6, 1.0),
    "combined": {f"Muon, {name}": f"{MUON} {TUNED} {options}" for name, options in COMBINED.items()},
}
COLUMNS = {"loss": ".4f", "EMA's loss": ".4f", "distance": ".1f", "precision": ".3f", "recall": ".3f",
           "classifier accuracy": ".1%"}


def parse_args():
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--root", type=as_type(path), default="output/recipes", help="folder with images, latents, latents_val and "
        "val_stats.npz")
    add("--groups", type=as_type(list_of(one_of(*GROUPS))), default=("tuned",), help=", ".join(GROUPS))
    add("--images", type=as_type(list_of(POSITIVE)), default=(80000,), help="training images, in whole epochs")
    add("--seeds", type=as_type(list_of(COUNT)), default=(0, 1, 2), help="of training and sampling")
    add("--cfg", type=as_type(list_of(number(float, 1.0))), default=(), help="guidance of the evaluations; default: "
        "losses alone")
    add("--samples", type=as_type(POSITIVE), default=2000, help="images of an evaluation")
    add("--options", default="", help="more options of every training, such as another geometry")
    add("--step_seconds", type=as_type(list_of(number(float, 0.0))), default=(), help="seconds of a step with AdamW "
        "and with Muon, by scripts/benchmark.py train --optimizer: draws the loss by time too")
    add("--at_once", type=as_type(POSITIVE), default=2, help="programs to run in parallel")
    add("--device", type=as_type(DEVICE), default="auto", help="where to compute")
    return parser.parse_args()


class RecipeRun:
    """One recipe with one seed for so many images; run: its folder."""

    def __init__(self, args, options, images, seed):
        self.options, self.images, self.seed = f"{options} {args.options}".strip(), images, seed
        self.run = Path(args.root) / "recipes" / f"{images}" / f"{folder_of(self.options)}_seed{seed}"

    def train(self, args, epoch_images):
        epochs = max(1, round(self.images / epoch_images))
        command = (f"{TRAINING} --eval_freq 1 --keep_every 0 --warmup_epochs {epochs * 0.05:g} {self.options} "
                   f"--seed {self.seed} --epochs {epochs} --output_dir {self.run} --resume {self.run} "
                   f"--device {args.device}")
        if MUON in command and select_device(args.device).type == "cpu":
            command = f"-c {shlex.quote(FLOAT_MUON)} {command}"
        run_program(args, command, self.run)

    def output(self, args, cfg):
        return self.run / f"eval{args.samples}_cfg{cfg:g}"

    def evaluate(self, args):
        for cfg in args.cfg:
            command = (f"{SAMPLING} --cfg {cfg} --resume {self.run} --seed {self.seed} --num_images {args.samples} "
                       f"--eval_bsz {min(args.samples, 250)} --output_dir {self.output(args, cfg)} "
                       f"--device {args.device}")
            run_program(args, command, self.output(args, cfg))

    def losses(self):
        """{"val", "val_ema": the last log entry, with the loss of every scale}."""
        lines = read_lines(self.run / "log.jsonl")
        return {line["group"]: line for line in lines if line["group"] in ("val", "val_ema")}

    def samples(self, args, network, device):
        """{cfg: (distance, precision, recall, the classifier's accuracy)}."""
        samples = {}
        for cfg in args.cfg:
            report = read_json(self.output(args, cfg) / RESULTS)
            metrics = [next(report[name] for name in report["metrics"] if name.startswith(prefix))
                       for prefix in ("frechet_distance", "precision", "recall")]
            samples[cfg] = *metrics, self.accuracy(self.output(args, cfg), report, network, device)
        return samples

    def accuracy(self, output, report, network, device):
        """The classifier's accuracy; nan where the data are not Fashion-MNIST, the only one that it knows."""
        classes = read_json(self.run / RUN)["data"]["classes"]
        if classes != [f"{label}_{name}" for label, name in enumerate(GARMENTS)]:
            return math.nan
        return generated_accuracy(output, report, network, device)


# ---- the table and the curves --------------------------------------------------------------------------------


def main():
    args = parse_args()
    root, device = Path(args.root), select_device(args.device)
    epoch_images = sum(1 for _ in (root / "images" / "train").glob("*/*"))
    if not epoch_images:
        raise FlowARError(f"{root}/images/train: no images found: scripts/quickstart_data.py writes them, "
                          "scripts/quickstart.sh shows the rest of --root")
    if partial := [images for images in args.images if images % epoch_images]:
        raise FlowARError(f"--images {partial[0]}: expected a multiple of the {epoch_images} in {root}/images/train")
    if len(args.step_seconds) not in (0, 2):
        raise FlowARError("--step_seconds: expected two numbers, of AdamW and of Muon")
    if args.step_seconds and "batch" in args.groups:
        raise FlowARError(f"--step_seconds are of steps of {BATCH} images: leave it out with the group batch")
    rows = {}
    for name, options in itertools.chain(*(GROUPS[group].items() for group in args.groups)):
        for images in args.images:
            rows[name, images] = [RecipeRun(args, options, images, seed) for seed in args.seeds]
    trainings = [training for column in zip(*rows.values()) for training in column]  # the first seed of all comes first
    with ThreadPoolExecutor(args.at_once) as pool:
        list(pool.map(lambda training: training.train(args, epoch_images), trainings))
        list(pool.map(lambda training: training.evaluate(args), trainings))
    network, table, record = load_classifier(device), [], {}
    for (name, images), row in rows.items():
        losses = [training.losses() for training in row]
        samples = [training.samples(args, network, device) for training in row]
        by_cfg = {cfg: [each[cfg] for each in samples] for cfg in args.cfg}
        best = min(args.cfg, key=lambda cfg: mean(each[0] for each in by_cfg[cfg]), default=None)
        figures = [[each[group]["loss"] for each in losses] for group in ("val", "val_ema")]
        figures += zip(*by_cfg[best]) if best else []
        cells = [spread(values, form) for values, form in zip(figures, COLUMNS.values())]
        table.append([name, f"{images:,}", *cells, *([f"{best:g}"] if best else [])])
        record[f"{name}, {images} images"] = {"losses": losses, "samples": by_cfg}
    names = ["", "images", *COLUMNS, "cfg"][:len(table[0])]
    text = "\n".join(f"| {' | '.join(line)} |" for line in (names, ["---"] * len(names), *table))
    print(text)
    file = root / "recipes" / re.sub("[^a-z0-9]+", "-", "_".join(args.groups))
    write_bytes(f"{text}\n".encode(), file.with_suffix(".md"))
    products = "float32" if device.type == "cpu" else "bfloat16"
    about = {**vars(args), **describe_machine(device), "muon_products": products}
    write_json({**about, "rows": record}, file.with_suffix(".json"))
    plot(args, rows, record, epoch_images, file.with_suffix(".png"))


def plot(args, rows, record, epoch_images, file):
    """For the first seed the loss by images, and by time if steps were timed; the distance over cfg, a dot for each
    seed.
    """
    panels = 1 + bool(args.step_seconds) + bool(args.cfg)
    figure = Figure(figsize=(5 * panels, 4.5), dpi=100)
    axes, lowest = figure.subplots(1, panels, squeeze=False)[0], math.inf
    for (name, images), row in rows.items():
        lines = [line for line in read_lines(row[0].run / "log.jsonl") if line["group"] == "train"]
        seen, losses = [line["epoch"] * epoch_images for line in lines], [line["loss"] for line in lines]
        axes[0].plot(seen, losses, label=f"{name}, {images:,} images", linewidth=0.8)
        lowest = min(lowest, *losses)
        if args.step_seconds:
            adamw, muon = args.step_seconds
            seconds = (muon if MUON in row[0].options else adamw) / BATCH
            axes[1].plot([count * seconds for count in seen], losses, linewidth=0.8)
        if args.cfg:
            samples = record[f"{name}, {images} images"]["samples"]
            axes[-1].plot(samples.keys(), [mean(each[0] for each in seeds) for seeds in samples.values()])
            for cfg, seeds in samples.items():
                color = axes[-1].lines[-1].get_color()
                axes[-1].plot([cfg] * len(seeds), [each[0] for each in seeds], ".", color=color)
            axes[-1].set(xlabel="cfg", ylabel="distance")
    axes[0].set(xlabel="images", ylabel="training loss", ylim=(0.95 * lowest, 2 * lowest))
    axes[0].legend(fontsize=7)
    if args.step_seconds:
        axes[1].set(xlabel="seconds of steps timed in turns", ylim=(0.95 * lowest, 2 * lowest))
    figure.tight_layout()
    figure.savefig(file)


if __name__ == "__main__":
    run_main(main)
