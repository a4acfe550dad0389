"""Plot training runs: loss, also per scale, validation of raw and EMA weights, learning rate, images/s, distance.

    python scripts/plot_run.py output/run                                   # plot_run.png in the first run's folder
    python scripts/plot_run.py output/small output/base --output runs.pdf   # compared, in the same panels

A run is a folder with log.jsonl, or such a file itself (log.1.jsonl: of a run before in the same folder).
"""
import math
import re
from pathlib import Path
from statistics import fmean as mean
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from models import FlowARError
from util.cluster import log, run_main
from util.evaluation.reports import reports_of
from util.files import check_output
from util.command_line import Parser, as_type, path
from util.training.logging import read_lines

COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"  # told apart by the colour-blind
STYLES = "-", "--", ":", "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (5, 1)), (0, (1, 3))  # of scales, where colours are runs'
POINTS = 400  # of a line: more are averaged, no printer shows them
SCALE, STEP = "loss_scale_", re.compile(r"checkpoint-(\d{9})\.pth")
MEASURED = {  # by whom; of other numbers of images, so no line joins them
    "in training, EMA": dict(marker="s", ls="-"), "eval.py, EMA": dict(marker="D", ls="none"),
    "eval.py, raw": dict(marker="o", mfc="white", ls="none")}
LOOK = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7, "xtick.labelsize": 7,
        "ytick.labelsize": 7, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
        "lines.linewidth": 1.2, "pdf.fonttype": 42, "axes.grid": True, "grid.alpha": 0.3, "grid.linewidth": 0.4,
        "legend.frameon": False}


class LoggedRun(NamedTuple):
    """What is drawn of a run; metric: name of the distances (step, value, one of MEASURED), None without any."""
    name: str
    groups: dict  # {group of the log: [line]}, by step
    metric: str | None
    distances: list

    def points(self, group, key):
        """(steps, values) of what a group of lines holds."""
        lines = [line for line in self.groups.get(group, ()) if math.isfinite(line.get(key, math.nan))]
        return [line["step"] for line in lines], [line[key] for line in lines]

    def scales(self):
        """Tokens a side of the scales whose loss was logged."""
        keys = {key for line in self.groups.get("train", ())[:1] for key in line if key.startswith(SCALE)}
        return sorted(int(key.removeprefix(SCALE)) for key in keys)


def read_run(name):
    """The LoggedRun of a folder or a log; FlowARError without a line of training."""
    file = Path(name)
    if file.is_dir():
        file /= "log.jsonl"
    groups = {}
    for line in read_lines(file) if file.is_file() else ():  # of two lines of a step the later one counts
        groups.setdefault(line["group"], {})[line["step"]] = line
    if not groups.get("train"):
        raise FlowARError(f"{file}: no training entries found: expected a log of main_flowar.py")
    groups = {group: [lines[step] for step in sorted(lines)] for group, lines in groups.items()}
    if file.name != "log.jsonl":  # of a run before, of which no evaluation tells
        return LoggedRun(f"{file.parent.name}/{file.name}", groups, None, [])
    return LoggedRun(file.parent.name, groups, *read_distances(file.parent, groups.get("eval", ())))


def read_distances(folder, logged):
    """(name, [(step, value, one of MEASURED)]) of --online_eval and eval.py: the distance that is there most often."""
    distances = {}
    for line in logged:
        for name in filter(is_distance, line):
            distances.setdefault(name, []).append((line["step"], line[name], "in training, EMA"))
    for report in reports_of(folder):
        step = STEP.fullmatch(Path(report["checkpoint"]).name)
        how = "eval.py, raw" if report.get("weights") == "raw" else "eval.py, EMA"
        for name in filter(is_distance, report["metrics"] if step else ()):
            distances.setdefault(name, []).append((int(step[1]), report[name], how))
    metric = max(distances, key=lambda name: len(distances[name]), default=None)
    return metric, sorted(distances.get(metric, []))


def is_distance(name):
    return name == "fid" or "distance" in name


def thin(steps, values):
    """At most POINTS points, each the mean of its neighbours."""
    size = -(-len(steps) // POINTS)
    parts = [slice(i, i + size) for i in range(0, len(steps), size or 1)]
    return [mean(steps[part]) for part in parts], [mean(values[part]) for part in parts]


# ---- the panels ------------------------------------------------------------------------------------------------


def draw_loss(axis, runs):
    for run, color in zip(runs, COLORS):
        axis.plot(*thin(*run.points("train", "loss")), color=color)
    axis.set(title="Training loss", ylabel="loss")
    logarithmic(axis)


def draw_scales(axis, runs):
    """One run: a colour for each scale; several: the runs' colours, a style for each scale."""
    scales = sorted({scale for run in runs for scale in run.scales()})
    shades, handles = matplotlib.colormaps["viridis"].resampled(256), []
    for number, scale in enumerate(scales):
        if len(runs) > 1:
            colors, style, shade = COLORS, STYLES[number % len(STYLES)], "0.3"
        else:
            shade, style = shades(0.9 * number / max(len(scales) - 1, 1)), "-"
            colors = [shade]
        for run, color in zip(runs, colors):
            axis.plot(*thin(*run.points("train", f"{SCALE}{scale}")), color=color, lw=1, ls=style)
        handles.append(Line2D([], [], color=shade, ls=style, label=f"{scale}×{scale}"))
    axis.set(title="Training loss of each scale", ylabel="loss, unweighted")
    logarithmic(axis)
    axis.legend(handles=handles, ncols=2 if len(scales) > 3 else 1, handlelength=2.4)


def draw_validation(axis, runs):
    styles = {"val": dict(ls="--", marker="o", mfc="white", ms=3.5), "val_ema": dict(ls="-", marker="s", ms=3.5)}
    for run, color in zip(runs, COLORS):
        for group, style in styles.items():
            axis.plot(*run.points(group, "loss"), color=color, **style)
    axis.set(title="Validation loss", ylabel="loss")
    axis.legend(handles=[Line2D([], [], color="0.3", label="raw", **styles["val"]),
                         Line2D([], [], color="0.3", label="EMA", **styles["val_ema"])])
    logarithmic(axis)


def draw_rate(axis, runs):
    for run, color, style in zip(runs, COLORS, STYLES):  # often they are the same
        axis.plot(*thin(*run.points("train", "lr")), color=color, ls=style)
    axis.set(title="Learning rate", ylabel="learning rate", ylim=(0, None))
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)


def draw_speed(axis, runs):
    for run, color in zip(runs, COLORS):
        axis.plot(*thin(*run.points("train", "images_per_second")), color=color)
    axis.set(title="Training speed", ylabel="images / s", ylim=(0, None))


def draw_distance(axis, runs):
    """Only what is measured alike: the distance of the first run that has one."""
    metric, handles = next(run.metric for run in runs if run.metric), {}
    for run, color in zip(runs, COLORS):
        if run.metric not in (None, metric):
            log(f"{run.name}: measures another distance than {metric}: not in that panel")
            continue
        for kind, style in MEASURED.items():
            points = [(step, value) for step, value, how in run.distances if how == kind]
            if points:
                axis.plot(*zip(*points), color=color, ms=4, **style)
                handles[kind] = Line2D([], [], color="0.3", ms=4, label=kind, **style)
    title = metric.replace("_distance_", " distance\n").replace("_", " ")
    axis.set(title=title, ylabel="distance", ylim=(0, None))
    if len(handles) > 1:
        axis.legend(handles=handles.values())


def logarithmic(axis):
    """A logarithmic axis with its numbers written out, if there is more on it than a factor of 3."""
    low, high = axis.dataLim.intervaly
    if low > 0 and high > 3 * low:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=20))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())


def draw(runs):
    """A Figure 7 inches wide, of the panels for which there is something; runs: of read_run."""
    if len(runs) > len(COLORS):
        raise FlowARError(f"{len(runs)} runs: expected at most {len(COLORS)}, the number of colours")
    panels = {draw_loss: True, draw_scales: any(run.scales() for run in runs),
              draw_validation: any(run.groups.get("val") or run.groups.get("val_ema") for run in runs),
              draw_rate: True, draw_speed: True, draw_distance: any(run.metric for run in runs)}
    panels = [panel for panel, is_needed in panels.items() if is_needed]
    with matplotlib.rc_context(LOOK):
        columns = 3 if len(panels) > 4 else 2
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(7, 2.1 * rows + 0.3 * (len(runs) > 1)), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis in axes[len(panels):]:
            axis.remove()
        for panel, axis in zip(panels, axes):
            panel(axis, runs)
            axis.set_xlabel("optimizer step")
            axis.xaxis.set_major_formatter(EngFormatter(sep="", places=None))
            axis.set_xlim(0, None)
        if len(runs) > 1:
            handles = [Line2D([], [], color=color, label=run.name.replace("$", r"\$"))
                       for run, color in zip(runs, COLORS)]
            figure.legend(handles=handles, loc="outside upper center", ncols=min(len(runs), 4))
    return figure


def save(figure, path):
    with matplotlib.rc_context(LOOK):
        figure.savefig(path, dpi=200)


def parse_args():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=as_type(path), help="run folders, or their log.jsonl")
    parser.add_argument("--output", type=as_type(path), help="PNG, PDF or SVG; default: plot_run.png beside the first "
                        "log")
    return parser.parse_args()


def main():
    args = parse_args()
    first = Path(args.runs[0])
    output = args.output or (first if first.is_dir() else first.parent) / "plot_run.png"
    runs = list(map(read_run, args.runs))
    names = [run.name for run in runs]
    for i, run in enumerate(args.runs):
        if names.count(names[i]) > 1:  # folders of one name by their paths
            runs[i] = runs[i]._replace(name=run)
    check_output(output)
    save(draw(runs), output)
    print(output)


if __name__ == "__main__":
    run_main(main)
