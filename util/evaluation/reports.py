"""Reports: what results.json holds, on the terminal; the table and plot of a sweep."""
import contextlib
import csv
import io
import time
from pathlib import Path

import torch

from util.cluster import log
from util.files import read_json, write_bytes

RESULTS = "results.json"
STAGES = ("sampling", "decoding", "features", "writing")
# What reports have in common that belong into one table.
SAME = ("checkpoint_sha256", "weights", "vae_sha256", "num_images", "labels_sha256", "reference_sha256",
        "feature_extractor", "precision", "seed", "guide_tensors")


class Stopwatch:
    """Seconds of each stage of a batch, the pending work of the thread's stream included."""

    def __init__(self, device):
        self.device, self.seconds = device, torch.zeros(len(STAGES), dtype=torch.float64)

    @contextlib.contextmanager
    def __call__(self, stage):
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self.seconds[STAGES.index(stage)] += time.perf_counter() - start


def describe_speed(measured, count, passes):
    """Device seconds per image of each stage, calls of the flow head. measured: of each batch; passes: see
    util.evaluation.sampler.count_passes.
    """
    seconds = sum(batch["seconds"] for batch in measured) / count
    return {"seconds_per_image": dict(zip(STAGES, seconds.tolist())), "nfe": [len(scale) for scale in passes],
            "flow_head_passes_per_image": float(sum(map(sum, passes)))}


def reports_of(run):
    """The reports of eval.py on checkpoints of a training's folder that lie in it or in folders beside it, the newest
    last; those of other folders' checkpoints are left out.
    """
    run, reports = Path(run).resolve(), []
    paths = {*run.glob(RESULTS), *run.glob(f"*/{RESULTS}"), *run.glob(f"*/*/{RESULTS}"),
             *run.parent.glob(f"*/{RESULTS}")}
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        report = read_json(path)
        if Path(str(report.get("checkpoint", ""))).parent.name == run.name:
            reports.append({**report, "path": path})
    return reports


def print_report(report, output):
    stages = ", ".join(f"{stage} {seconds:.4f}" for stage, seconds in report["seconds_per_image"].items())
    print("\n".join(f"{name}: {report[name]:.4f}" for name in report["metrics"]))
    print(f"NFE {sum(report['nfe'])}; {report['images_per_second']:.2f} images/s; "
          f"seconds per image and device: {stages}\n{output}/{RESULTS}", flush=True)


def write_sweep(folder, like, swept):
    """results.csv and sweep.png of all that was evaluated so far into sub-folders of a sweep's folder, and differs from
    `like`, a report, in what is swept alone. swept: the options of sampling.
    """
    rows, others = [], 0
    for path in sorted(Path(folder).glob(f"*/{RESULTS}")):
        report = read_json(path)
        if any(report.get(key) != like.get(key) for key in SAME):
            others += 1
            continue
        row = {"nfe": sum(report["nfe"]), "seconds_per_image": sum(report["seconds_per_image"].values())}
        for name, value in report.items():
            if name in ("cfg", "num_step") and isinstance(value, list):
                row[name] = ":".join(map(str, value))
            elif value is None or isinstance(value, (int, float, str)):
                row[name] = value
        rows.append(row)
    if others:
        log(f"{folder}: {others} results with other settings are not in the table")
    columns, text = {}, io.StringIO()
    for row in rows:
        columns.update(row)
    writer = csv.DictWriter(text, list(columns))
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(text.getvalue().encode(errors="backslashreplace"), Path(folder) / "results.csv")
    if like["metrics"] and all(like["metrics"][0] in row for row in rows):
        plot_sweep(rows, like["metrics"][0], swept, Path(folder) / "sweep.png")


def plot_sweep(rows, metric, swept, path):
    """`metric` against cfg (NFE where cfg is the same, or a list) and seconds per image; a line for every combination
    of the other options that differ. matplotlib is an extra: without it there is no plot.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log(f"no {path.name}: it needs matplotlib (pip install matplotlib)")
        return
    varied = [name for name in swept if len({row.get(name) for row in rows}) > 1]
    across, along = "nfe", ("num_step", "num_step_last")
    if "cfg" in varied and not any(isinstance(row["cfg"], str) for row in rows):
        across, along = "cfg", ("cfg",)
    lines = {}
    for row in rows:
        label = ", ".join(f"{name} {row.get(name)}" for name in varied if name not in along)
        lines.setdefault(label, []).append(row)
    figure, encoded = Figure(figsize=(12, 4), dpi=100), io.BytesIO()
    for axis, column in zip(figure.subplots(1, 2), (across, "seconds_per_image")):
        axis.set(xlabel=column.replace("_", " "), ylabel=metric)
        axis.grid(alpha=0.3)
        for label, line in lines.items():
            axis.plot(*zip(*sorted((row[column], row[metric]) for row in line)), "o-", label=label)
    if len(lines) > 1:
        axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(encoded, format="png")
    write_bytes(encoded.getvalue(), path)
