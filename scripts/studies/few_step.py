"""Teacher and student at few steps a scale: distances, agreement of a classifier with the label, milliseconds, and a picture.

    python scripts/studies/few_step.py --root output/quickstart --student output/quickstart/student

The table of docs/few-step.md, on the quickstart's folder (scripts/quickstart.sh) and a student of its run (scripts/distill.py). All rows draw
the same labels from the same noise, with the settings that the two runs store, but for steps, grid and solver.
--images 0 measures the times alone. Writes few_step.md, few_step.json (few_step_times.* without images) and few_step.png into
the student's folder.
"""
from pathlib import Path


import torch

from scripts.benchmark import alternate
from scripts.pictures import draw_table, save
from scripts.quickstart_report import accuracy, get_classifier, gray
from util.cluster import run_main, select_device, set_precision
from util.evaluation.extractors import EfficientNetLite0, extract
from util.evaluation.labels import image_label
from util.evaluation.metrics import compute_metrics
from util.evaluation.pipeline import change_settings, load_pipeline
from util.evaluation.references import load_statistics
from util.files import write_bytes, write_json
from util.manifest import describe_machine
from util.command_line import Parser, as_type, path

STEPS = (8, 4, 2, 1)
PUBLISHED = {"num_steps": 25, "time_grid": "release", "solver": "euler"}
COLUMNS = ("distance", "KID", "precision", "recall", "label found", "ms an image")


def parse_args():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--root", type=as_type(path), default="output/quickstart", help="the quickstart's folder, with run/, the teacher")
    parser.add_argument("--student", type=as_type(path), required=True, help="folder of the student's run")
    parser.add_argument("--images", type=int, default=2000, help="of each row; 0: only times and picture")
    parser.add_argument("--batch", type=int, default=250, help="images at once")
    parser.add_argument("--repeats", type=int, default=3, help="timings, in turns, whose median counts")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    return parser.parse_args()


def rows_of():
    """{name: (whose, settings)}; heun evaluates the head twice a step."""
    uniform = {f"teacher, {solver}, {n}": ("teacher", {"num_steps": n, "time_grid": "uniform", "solver": solver})
               for solver, steps in (("euler", STEPS), ("ab2", STEPS[:-1]), ("heun", STEPS[1:])) for n in steps}
    student = {f"student, euler, {n}": ("student", {"num_steps": n}) for n in STEPS}
    return {"teacher, euler, 24 (published grid)": ("teacher", PUBLISHED), **uniform, **student}


class Quality:
    """Metrics of images as the quickstart measures them."""

    def __init__(self, root, device):
        self.device, self.classifier = device, get_classifier(root, device)
        self.extractor = EfficientNetLite0(device)
        self.reference = load_statistics(root / "val_stats.npz", self.extractor, 32)

    def __call__(self, images, labels):
        features, logits = extract(self.extractor, images.to(self.device))
        figures = compute_metrics(features, logits, self.reference, self.extractor, self.device)
        suffix = self.extractor.suffix
        names = self.extractor.distance, f"kid_mean{suffix}", f"precision_k3{suffix}", f"recall_k3{suffix}"
        return [*map(figures.get, names), accuracy(self.classifier, gray(images), torch.tensor(labels), self.device)]


def time_rows(samplers, batch, device, repeats):
    """{name: milliseconds an image} of the latents of a batch, in turns."""
    def draw(sampler):
        labels = [image_label(i, batch, sampler.model.class_num) for i in range(batch)]
        return lambda: sampler.pyramid(labels, noise)
    noise = next(iter(samplers.values())).noise(range(batch))
    timings = alternate({name: draw(sampler) for name, sampler in samplers.items()}, device, repeats)
    return {name: 1000 * seconds / batch for name, seconds in timings.items()}


def main():
    args = parse_args()
    root, device = Path(args.root), select_device(args.device)
    set_precision(None, device)  # as an evaluation does
    pipes = {name: load_pipeline(path, vae=root / "vae.pth", device=device.type) for name, path in
             (("teacher", root / "run"), ("student", args.student))}
    samplers = {name: change_settings(pipes[whose].sampler, settings)._replace(batch=args.batch, seed=args.seed)
                for name, (whose, settings) in rows_of().items()}
    classes, quality, figures = pipes["teacher"].sampler.model.class_num, {}, {}
    if args.images:
        quality, labels = Quality(root, device), [image_label(i, args.images, classes) for i in range(args.images)]
        for name, sampler in samplers.items():
            figures[name] = quality(sampler.images(labels), labels)
            print(name, *(f"{value:.4g}" for value in figures[name]), flush=True)
    times = time_rows(samplers, args.batch, device, args.repeats)
    lines = [f"| who, solver, steps a scale | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name in samplers:
        cells = [format(value, form) for value, form in zip(figures.get(name, []), (".1f", ".3f", ".3f", ".3f", ".1%"))]
        lines.append("| " + " | ".join([name, *(cells or [""] * 5), f"{times[name]:.2f}"]) + " |")
    print("\n".join(lines))
    output = Path(args.student)
    name = "few_step" if args.images else "few_step_times"  # what was measured stays
    write_bytes(("\n".join(lines) + "\n").encode(), output / f"{name}.md")
    write_json({"images": args.images, "rows": figures, "milliseconds": times, "batch": args.batch, **describe_machine(device)}, output / f"{name}.json")
    shown = [name for name in samplers if "euler" in name and name.split(", ")[2][:2].strip("( ") in ("24", "2", "1")]
    pictures = [pipes["teacher"].pictures(samplers[name].pyramid(range(classes), samplers[name].noise(range(classes)))[-1]) for name in shown]
    save(draw_table(pictures, shown), output / "few_step.png")


if __name__ == "__main__":
    run_main(main)
