"""Teacher and student at few steps a scale: distances, a classifier's accuracy, milliseconds, and a picture.

    python scripts/studies/few_step.py --root output/quickstart --student output/quickstart/student

The table of docs/few-step.md, on the quickstart's folder (scripts/quickstart.sh) and a student of its run
(scripts/distill.py). All rows draw the same labels from the same noise, with the settings that the two runs store, but
for steps, grid and solver. --images 0 measures the times alone. Writes few_step.md, few_step.json (few_step_times.*
without images), few_step.png and, with distances, few_step_curves.png into the student's folder.
"""
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from scripts.benchmark import alternate
from scripts.pictures import draw_table, save
from scripts.quickstart_report import accuracy, load_classifier, gray
from util.cluster import run_main, select_device, set_precision
from util.command_line import DEVICE, Parser, as_type, path
from util.evaluation.extractors import EfficientNetLite0, extract
from util.evaluation.labels import image_label
from util.evaluation.metrics import compute_metrics
from util.evaluation.pipeline import change_settings, load_pipeline
from util.evaluation.references import load_statistics
from util.files import write_bytes, write_json
from util.manifest import describe_machine

COLUMNS = {"distance": ".1f", "KID": ".3f", "precision": ".3f", "recall": ".3f", "classifier accuracy": ".1%",
           "ms an image": ".2f"}
PUBLISHED = "teacher, euler, 24 (published grid)"
SHOWN = (PUBLISHED, "teacher, euler, 2", "teacher, euler, 1", "student, euler, 2", "student, euler, 1")


def make_rows():
    """{name: (whose, settings)}."""
    rows = {PUBLISHED: ("teacher", {"num_steps": 25, "time_grid": "release", "solver": "euler"})}
    for solver, steps in (("euler", (8, 4, 2, 1)), ("ab2", (8, 4, 2)), ("heun", (4, 2, 1))):  # heun: two evaluations
        for n in steps:
            rows[f"teacher, {solver}, {n}"] = "teacher", {"num_steps": n, "time_grid": "uniform", "solver": solver}
    for n in (8, 4, 2, 1):
        rows[f"student, euler, {n}"] = "student", {"num_steps": n}
    return rows


def parse_args():
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--root", type=as_type(path), default="output/quickstart", help="the quickstart's folder, with the teacher")
    add("--student", type=as_type(path), required=True, help="folder of the student's run")
    add("--images", type=int, default=2000, help="of each row; 0: only times and picture")
    add("--batch", type=int, default=250, help="images at once")
    add("--repeats", type=int, default=3, help="timings, in turns, whose median counts")
    add("--seed", type=int, default=0, help="of the noise")
    add("--device", type=as_type(DEVICE), default="auto", help="where to compute")
    return parser.parse_args()


def measure(samplers, count, root, device):
    """{name: the columns but the last} of `count` images of each sampler, as the quickstart measures them."""
    extractor, classifier = EfficientNetLite0(device), load_classifier(device)
    reference, suffix = load_statistics(root / "val_stats.npz", extractor, 32), extractor.suffix
    names, figures = (extractor.distance, f"kid_mean{suffix}", f"precision_k3{suffix}", f"recall_k3{suffix}"), {}
    for name, sampler in samplers.items():
        labels = [image_label(i, count, sampler.model.class_num) for i in range(count)]
        images = sampler.images(labels)
        features = extract(extractor, images.to(device))["features"]
        metrics = compute_metrics(features, None, reference, extractor, device)
        figures[name] = [*map(metrics.get, names), accuracy(classifier, gray(images), torch.tensor(labels), device)]
        print(name, *(f"{value:.4g}" for value in figures[name]), flush=True)
    return figures


def draw_curves(figures, times, file):
    """Distance over steps a scale, and over milliseconds an image: a line for each model and solver."""
    lines = {}
    for name, (distance, *_) in figures.items():
        line, steps = name.rsplit(", ", 1)
        line = f"{line}, published grid" if name == PUBLISHED else line
        lines.setdefault(line, []).append((int(steps.split()[0]), times[name], distance))
    figure = Figure(figsize=(10, 4), dpi=100, layout="constrained")
    by_steps, by_time = figure.subplots(1, 2, sharey=True)
    for line, points in lines.items():
        steps, milliseconds, distances = zip(*points)
        by_steps.plot(steps, distances, "o-", label=line)
        by_time.plot(milliseconds, distances, "o-")
    by_steps.set(xscale="log", xlabel="steps a scale", ylabel="distance to the test images", xticks=(1, 2, 4, 8, 24))
    by_steps.set_xticklabels((1, 2, 4, 8, 24))
    by_steps.minorticks_off()
    by_time.set(xscale="log", xlabel="milliseconds an image")
    figure.legend(loc="outside lower center", ncols=len(lines))
    figure.savefig(file)


def main():
    args = parse_args()
    root, device = Path(args.root), select_device(args.device)
    set_precision(None, device)  # as an evaluation does
    pipes = {"teacher": load_pipeline(root / "run", device=device.type),
             "student": load_pipeline(args.student, device=device.type)}
    samplers = {}
    for name, (whose, settings) in make_rows().items():
        sampler = change_settings(pipes[whose].sampler, settings)
        samplers[name] = sampler._replace(batch=args.batch, seed=args.seed)
    figures = measure(samplers, args.images, root, device) if args.images else {}

    classes = pipes["teacher"].sampler.model.class_num
    labels = [image_label(i, args.batch, classes) for i in range(args.batch)]
    noise = samplers[PUBLISHED].noise(range(args.batch))
    draws = {name: partial(sampler.pyramid, labels, noise) for name, sampler in samplers.items()}
    times = {name: 1000 * seconds / args.batch for name, seconds in alternate(draws, device, args.repeats).items()}

    lines = [f"| who, solver, steps a scale | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name in samplers:
        values = [*figures.get(name, [None] * 5), times[name]]
        cells = ["" if value is None else format(value, form) for value, form in zip(values, COLUMNS.values())]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    print("\n".join(lines))
    name = Path(args.student) / ("few_step" if args.images else "few_step_times")  # what was measured stays
    write_bytes(("\n".join(lines) + "\n").encode(), name.with_suffix(".md"))
    write_json({"images": args.images, "rows": figures, "milliseconds": times, "batch": args.batch,
                **describe_machine(device)}, name.with_suffix(".json"))

    if figures:
        draw_curves(figures, times, Path(args.student) / "few_step_curves.png")
    pictures = []
    for name in SHOWN:
        latents = samplers[name].pyramid(range(classes), samplers[name].noise(range(classes)))[-1]
        pictures.append(pipes["teacher"].pictures(latents))
    save(draw_table(pictures, SHOWN), Path(args.student) / "few_step.png")


if __name__ == "__main__":
    run_main(main)
