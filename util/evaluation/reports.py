"""Reports: what results.json holds, on the terminal, in tables and plots; sweeps over options."""
import contextlib
import csv
import hashlib
import io
import itertools
import platform
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torchvision

from models import FlowARError
from models.flow_matching import SOLVERS
from models.variants import diffusion
from util.cluster import log, world_size
from util.options import SWEPT, as_text
from util.files import check_fields, is_count, is_number, is_strings, read_json, write_bytes

RESULTS = "results.json"
STAGES = ("sampling", "decoding", "features", "writing")


def code_hash(root):
    """SHA-256 over the names and contents of the code that makes and measures images: models/, util/, the engine."""
    digest, root = hashlib.sha256(), Path(root)
    for path in sorted([*root.glob("models/**/*.py"), *root.glob("util/**/*.py"), root / "engine_flowar.py"]):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


CODE = code_hash(Path(__file__).parents[2])  # now, of what runs: the files may change before the first report


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


def of_scales(is_kind):
    """Whether a value is of a kind, or a list of such values."""
    return lambda value: is_kind(value) or isinstance(value, list) and value and all(map(is_kind, value))


NUMBER = is_number, "a number"
REPORT = {  # of results.json, what is printed, put into tables and drawn
    "metrics": (is_strings, "a list of names"), "images_per_second": NUMBER, "guidance": NUMBER,
    "cfg": (of_scales(is_number), "a number, or one of each scale"),
    "nfe": (lambda value: isinstance(value, list) and all(map(is_count, value)), "a list of numbers"),
    "seconds_per_image": (lambda value: isinstance(value, dict) and all(map(is_number, value.values())),
                          "a number for every stage"),
    "num_step": (of_scales(is_count), "a number of steps, or one of each scale"),
    "num_step_last": (lambda value: value is None or is_count(value), "a number of steps or null"),
    "solver": (lambda value: isinstance(value, str) and value in (*SOLVERS, *diffusion.SOLVERS),
               f"one of {', '.join([*SOLVERS, *diffusion.SOLVERS])}"),
}


def read_report(path):
    """The content of a results.json, or FlowARError if a value that is used is missing or of another type."""
    report = {"metrics": [], **read_json(path)}  # earlier versions did not name them
    check_fields(report, REPORT, path)
    check_fields(report, dict.fromkeys(report["metrics"], NUMBER), path)
    return report


def reports_of(run):
    """The reports of eval.py on checkpoints of a training's folder that lie in it or in folders beside it, the newest
    last; those that cannot be read, or of other folders' checkpoints, are left out.
    """
    run, found = Path(run).resolve(), []
    places = {*run.glob(f"*/{RESULTS}"), *run.glob(f"*/*/{RESULTS}"), *run.parent.glob(f"*/{RESULTS}"), run / RESULTS}
    for path in sorted(filter(Path.is_file, places), key=lambda path: path.stat().st_mtime):
        with contextlib.suppress(FlowARError):
            report = read_report(path)
            if Path(str(report.get("checkpoint", ""))).parent.name == run.name:
                found.append({**report, "path": path})
    return found


def processor_name(path="/proc/cpuinfo"):
    """As Linux says it, else what Python knows of it."""
    with contextlib.suppress(OSError), open(path) as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "cpu"


def machine(device):
    """Where the figures were made."""
    return {
        "world_size": world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "torchvision": torchvision.__version__, "numpy": np.__version__,
                     "torch_fidelity": version("torch-fidelity")},
    }


def timing(found, batches):
    """Device seconds per image of each stage, and calls of the flow head; found: what was measured of each batch."""
    seconds = sum(part["seconds"] for part in found) / sum(map(len, batches))
    calls = found[0]["calls"]
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
SAME = ("code_sha256", "checkpoint_sha256", "weights", "vae_sha256", "num_images", "labels_sha256", "reference_sha256",
        "feature_extractor", "precision", "seed", "temperature", "cfg_schedule", "num_step_schedule", "guide_tensors")


def sweep_rows(folder, like=None):
    """What fits a table of every combination of options evaluated so far into sub-folders of a sweep's folder. like: a
    report; others may differ from it in what is swept alone.
    """
    reports = {path: read_report(path) for path in sorted(Path(folder).glob(f"*/{RESULTS}"))}
    others = [path for path, report in reports.items()
              if like is not None and any(report.get(key) != like.get(key) for key in SAME)]
    if others:
        log(f"{folder}: {len(others)} results there are of other code or settings and stay out of the table, "
            f"{others[0]} the first")
    reports = [report for path, report in reports.items() if path not in others]
    return [{"nfe": sum(report["nfe"]), "seconds_per_image": sum(report["seconds_per_image"].values()),
             **{key: value for key, value in report.items() if isinstance(value, (int, float, str)) or value is None},
             **{key: as_text(report[key]) for key in ("cfg", "num_step") if isinstance(report[key], list)}}
            for report in reports]


def plot_sweep(rows, metric, path):
    """`metric` against cfg (NFE if cfg was not swept) and seconds per image; a line for every other option."""
    from matplotlib.figure import Figure

    varied = [name for name in SWEPT if len({row.get(name) for row in rows}) > 1]
    is_axis = "cfg" in varied and all(is_number(row["cfg"]) for row in rows)  # and no list for the scales
    swept, along = ("cfg", ("cfg",)) if is_axis else ("nfe", ("num_step", "num_step_last"))
    others, lines = [name for name in varied if name not in along], {}
    for row in rows:
        lines.setdefault(tuple(row.get(name) for name in others), []).append(row)
    figure, encoded = Figure(figsize=(12, 4), dpi=100), io.BytesIO()
    for axis, column in zip(figure.subplots(1, 2), (swept, "seconds_per_image")):
        axis.set(xlabel=swept if column == swept else "seconds per image and device", ylabel=metric)
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
