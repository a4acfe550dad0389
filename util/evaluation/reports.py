"""Reports: what results.json holds, on the terminal, in tables and plots; sweeps over options."""
import contextlib
import csv
import io
import itertools
import time
from pathlib import Path

import torch

from util.cluster import log
from util.files import read_json, write_bytes

RESULTS = "results.json"
STAGES = ("sampling", "decoding", "features", "writing")


class Stopwatch:
    """Seconds of each stage of the evaluation, the pending work of the thread's stream included."""
    def __init__(self, device):
        self.device, self.seconds = device, None
        self.take()

    @contextlib.contextmanager
    def __call__(self, stage):
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self.seconds[STAGES.index(stage)] += time.perf_counter() - start

    def take(self):
        """Seconds of the stages since the last call, (4,) float64."""
        seconds, self.seconds = self.seconds, torch.zeros(len(STAGES), dtype=torch.float64)
        return seconds


def read_report(path):
    return {"metrics": [], **read_json(path)}  # earlier versions did not name them


def reports_of(run):
    """The reports of eval.py on checkpoints of a training's folder that lie in it or in folders beside it, the newest
    last; those of other folders' checkpoints are left out.
    """
    run = Path(run).resolve()
    places = {*run.glob(f"*/{RESULTS}"), *run.glob(f"*/*/{RESULTS}"), *run.parent.glob(f"*/{RESULTS}"), run / RESULTS}
    reports = [{**read_report(path), "path": path}
               for path in sorted(filter(Path.is_file, places), key=lambda path: path.stat().st_mtime)]
    return [report for report in reports if Path(str(report.get("checkpoint", ""))).parent.name == run.name]


def timing(measured, batches):
    """Device seconds per image of each stage, and calls of the flow head; measured: of each batch."""
    seconds = sum(part["seconds"] for part in measured) / sum(map(len, batches))
    calls = measured[0]["calls"]
    return {"seconds_per_image": dict(zip(STAGES, seconds.tolist())), "nfe": calls[:, 0].tolist(),
            "flow_head_passes_per_image": calls[:, 1].sum().item() / len(batches[0])}


def print_report(report, output):
    stages = ", ".join(f"{stage} {seconds:.4f}" for stage, seconds in report["seconds_per_image"].items())
    print("\n".join(f"{name}: {report[name]:.4f}" for name in report["metrics"]))
    print(f"NFE {sum(report['nfe'])}; {report['images_per_second']:.2f} images/s; "
          f"seconds per image and device: {stages}\n{output}/{RESULTS}", flush=True)


def write_table(rows, path):
    """rows: dicts, one line each; columns are all their keys."""
    columns = list(dict.fromkeys(itertools.chain(*rows)))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(text.getvalue().encode(errors="backslashreplace"), Path(path))


# What results have in common that belong into one table.
SAME = ("checkpoint_sha256", "weights", "vae_sha256", "num_images", "labels_sha256", "reference_sha256",
        "feature_extractor", "precision", "seed", "guide_tensors")


def sweep_rows(folder, like):
    """Rows of a table of every combination of options evaluated so far into sub-folders of a sweep's folder. They may
    differ from `like`, a report, in what is swept alone.
    """
    reports = [read_report(path) for path in sorted(Path(folder).glob(f"*/{RESULTS}"))]
    alike = [report for report in reports if all(report.get(key) == like.get(key) for key in SAME)]
    if len(alike) < len(reports):
        log(f"{folder}: {len(reports) - len(alike)} results there have other settings and stay out of the table")
    return [{"nfe": sum(report["nfe"]), "seconds_per_image": sum(report["seconds_per_image"].values()),
             **{key: value for key, value in report.items() if isinstance(value, (int, float, str)) or value is None},
             **{key: ":".join(map(str, report[key])) for key in ("cfg", "num_step") if isinstance(report[key], list)}}
            for report in alike]


def plot_sweep(rows, metric, swept, path):
    """`metric` against cfg (NFE if cfg was not swept) and seconds per image; a line for every other option of those
    that were swept. matplotlib is an extra: without it there is no plot."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log(f"no {Path(path).name}: it needs pip install matplotlib")
        return
    varied = [name for name in swept if len({row.get(name) for row in rows}) > 1]
    against_cfg = "cfg" in varied and not any(isinstance(row["cfg"], str) for row in rows)  # no list for the scales
    across, along = ("cfg", ("cfg",)) if against_cfg else ("nfe", ("num_step", "num_step_last"))
    others, lines = [name for name in varied if name not in along], {}
    for row in rows:
        lines.setdefault(tuple(row.get(name) for name in others), []).append(row)
    figure, encoded = Figure(figsize=(12, 4), dpi=100), io.BytesIO()
    for axis, column in zip(figure.subplots(1, 2), (across, "seconds_per_image")):
        axis.set(xlabel=across if column == across else "seconds per image and device", ylabel=metric)
        axis.grid(alpha=0.3)
        for key, line in lines.items():
            points = sorted(line, key=lambda row: row[column])
            axis.plot([row[column] for row in points], [row[metric] for row in points], "o-",
                      label=", ".join(f"{name} {value}" for name, value in zip(others, key)))
    if others:
        axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(encoded, format="png")
    write_bytes(encoded.getvalue(), Path(path))
