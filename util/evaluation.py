"""What an evaluation keeps and leaves: finished batches, pictures, timings, settings that must agree, tables."""
import argparse
import contextlib
import csv
import io
import itertools
import json
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from models import FlowARError
from models.weights import writing
from util.files import make_directory, read_json, write_bytes, write_json

STAGES = ("sampling", "decoding", "features", "writing")
SETTINGS, RESULTS = "settings.json", "results.json"
SWEPT = ("cfg", "guidance", "num_step", "num_step_last", "solver")
WRITERS = 8  # threads; PNG compression releases the interpreter lock


class Stopwatch:
    """Seconds of each stage of the evaluation, the device's pending work included."""

    def __init__(self, device):
        self.device = device
        self.take()

    @contextlib.contextmanager
    def __call__(self, stage):
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[STAGES.index(stage)] += time.perf_counter() - start

    def take(self):
        """Seconds of the stages since the last call, (4,) float64."""
        seconds, self.seconds = getattr(self, "seconds", None), torch.zeros(len(STAGES), dtype=torch.float64)
        return seconds


class FinishedBatches:
    """Batches that an interrupted evaluation need not sample again: one safetensors file each, renamed when whole."""

    def __init__(self, folder):
        self.folder = Path(folder)
        make_directory(self.folder)

    def path(self, number):
        return self.folder / f"batch-{number:06d}.safetensors"

    def has(self, number):
        """Whether the batch is there and whole; what a crash of the machine tore is sampled again."""
        try:
            with safe_open(self.path(number), framework="pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def save(self, number, tensors):
        write_bytes(save(tensors), self.path(number))

    def load(self, number):
        """What was measured of a batch: all tensors but the images."""
        with safe_open(self.path(number), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name != "images"}

    def images(self, number):
        with safe_open(self.path(number), framework="pt") as file:
            return file.get_tensor("images")

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)


class PngWriter:
    """Writes images as <folder>/<index>.png with threads."""

    def __init__(self, folder):
        self.folder = Path(folder)
        make_directory(self.folder)
        self.pool = ThreadPoolExecutor(WRITERS)

    def start(self, images, indices):
        """images: (n, 3, H, W) uint8. Returns a function that waits for the files."""
        images = images.permute(0, 2, 3, 1).numpy()
        futures = [self.pool.submit(write_png, image, self.folder / f"{index:06d}.png")
                   for image, index in zip(images, indices)]
        return lambda: [future.result() for future in futures]


def write_png(image, path):
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "png")
    write_bytes(encoded.getvalue(), path, sync=False)


def write_npz(path, finished, count, labels):
    """ADM's sample file of `count` batches, one after the other: arr_0 (N, H, W, 3) uint8 and arr_1, the labels."""
    shape = finished.images(0).shape[1:]
    with writing(path) as target, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for number in range(count):
                file.write(finished.images(number).numpy().tobytes())
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
            np.lib.format.write_array(file, np.asarray(labels, dtype=np.int64))


def check_settings(output, settings):
    """Remember the settings in a new place; in a used one refuse others. Returns the finished results, if any."""
    path = Path(output) / SETTINGS
    settings = json.loads(json.dumps(settings))  # tuples become lists
    if path.is_file():
        before = read_json(path)
        for key in {**before, **settings}:
            if before.get(key) != settings.get(key):
                raise FlowARError(f"{output}: the evaluation there has {key} {before.get(key)}, now it is "
                                  f"{settings.get(key)}; choose another --output_dir or remove it")
        if (Path(output) / RESULTS).is_file():
            return read_json(Path(output) / RESULTS)
    else:
        (Path(output) / RESULTS).unlink(missing_ok=True)
        shutil.rmtree(Path(output) / "partial", ignore_errors=True)
    write_json(settings, path)
    return None


# ---- sweeps --------------------------------------------------------------------------------------------------


def swept(args, name):
    """The values of an option that can be swept, (None,) if it was not given."""
    return getattr(args, name) or (None,)


def sweep_points(args):
    """One copy of the options for every combination of the swept ones, which are tuples."""
    for values in itertools.product(*(swept(args, name) for name in SWEPT)):
        yield argparse.Namespace(**{**vars(args), **dict(zip(SWEPT, values))})


def single_point(args):
    """The options with one value for each that can be swept, or FlowARError."""
    for name in SWEPT:
        if len(swept(args, name)) > 1:
            raise FlowARError(f"--{name} has {len(swept(args, name))} values: only an evaluation takes several")
    return next(sweep_points(args))


def point_name(args, point):
    """Folder of one combination: the options that have several values."""
    varied = [name for name in SWEPT if len(swept(args, name)) > 1]
    return "_".join(f"{name}{getattr(point, name)}" for name in varied)


def write_table(rows, path):
    """rows: dicts, one line each; columns are all their keys."""
    columns = list(dict.fromkeys(itertools.chain(*rows)))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(text.getvalue().encode(), Path(path))


def sweep_rows(folder):
    """A row for every combination of options evaluated so far into sub-folders of a sweep's folder."""
    return [table_row(read_json(path)) for path in sorted(Path(folder).glob(f"*/{RESULTS}"))]


def table_row(report):
    """The figures and settings of a report that fit a table."""
    return {"nfe": sum(report["nfe"]), "seconds_per_image": sum(report["seconds_per_image"].values()),
            **{key: value for key, value in report.items() if isinstance(value, (int, float, str)) or value is None}}


def plot_sweep(rows, metric, path):
    """`metric` against cfg (or against the NFE, if cfg was not swept) and against seconds per image.

    A line for each combination of the other swept options.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    varied = [name for name in SWEPT if len({row[name] for row in rows}) > 1]
    x, along = ("cfg", ("cfg",)) if "cfg" in varied else ("nfe", ("num_step", "num_step_last"))
    others = [name for name in varied if name not in along]
    lines = {}
    for row in rows:
        lines.setdefault(tuple(row[name] for name in others), []).append(row)
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), dpi=100)
    for key, line in lines.items():
        label = ", ".join(f"{name} {value}" for name, value in zip(others, key)) or None
        for axis, column in zip(axes, (x, "seconds_per_image")):
            points = sorted(line, key=lambda row: row[column])
            axis.plot([row[column] for row in points], [row[metric] for row in points], "o-", label=label)
    for axis, name in zip(axes, (x, "seconds per image and device")):
        axis.set(xlabel=name, ylabel=metric)
        axis.grid(alpha=0.3)
    if others:
        axes[1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png")
    plt.close(figure)
    write_bytes(encoded.getvalue(), Path(path))
