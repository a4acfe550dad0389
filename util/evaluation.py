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
from safetensors import safe_open
from safetensors.torch import save

from models import FlowARError
from models.flow_matching import SOLVERS
from models.weights import reading, writing
from util.files import check_fields, is_count, is_number, make_directory, read_json, write_bytes, write_json

STAGES = ("sampling", "decoding", "features", "writing")
SETTINGS, RESULTS = "settings.json", "results.json"
SWEPT = ("cfg", "guidance", "num_step", "num_step_last", "solver")
FIGURES = ("fid", "frechet", "inception_score", "kid", "precision_k3", "recall_k3")  # how the names of metrics begin
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

    def has(self, number, shape=None):
        """Whether the batch is there and whole; what a crash of the machine tore, or is something else, is sampled again.

        shape: of its features, (images, dim); None for any.
        """
        try:
            found = self.load(number)["features"].shape
        except FlowARError:
            return False
        return shape is None or tuple(found) == tuple(shape)

    def save(self, number, tensors):
        write_bytes(save(tensors), self.path(number))

    def load(self, number):
        """What was measured of a batch: all tensors but the images. FlowARError if they are not what is measured."""
        path = self.path(number)
        with reading(path), safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if name != "images"}
        check_batch(tensors, path)
        return tensors

    def images(self, number):
        """(n, H, W, 3) uint8 of a batch; FlowARError if there are none."""
        path = self.path(number)
        with reading(path), safe_open(path, framework="pt") as file:
            images = file.get_tensor("images")
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise FlowARError(f"{path}: images are {tuple(images.shape)} {images.dtype}, expected (n, height, width, 3) torch.uint8")
        return images

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)


def check_batch(tensors, path):
    """FlowARError unless these are the tensors of sample_and_measure, n images each of any size."""
    n = len(tensors["features"]) if "features" in tensors and tensors["features"].ndim else 0
    expected = {"features": ((n, None), torch.float32), "logits": ((n, None), torch.float32), "bad": ((None,), torch.int64),
                "seconds": ((len(STAGES),), torch.float64), "calls": ((None, 2), torch.int64)}
    for name, (shape, dtype) in expected.items():
        value = tensors.get(name)
        if value is None and name == "logits":
            continue
        fits = value is not None and value.ndim == len(shape) and all(b in (None, a) for a, b in zip(value.shape, shape))
        if not fits or value.dtype != dtype:
            found = "missing" if value is None else f"{tuple(value.shape)} {value.dtype}"
            raise FlowARError(f"{path}: {name} is {found}, expected {shape} {dtype}: not a batch of an evaluation")


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
                images = finished.images(number)
                if images.shape[1:] != shape:
                    raise FlowARError(f"{finished.path(number)}: images are {tuple(images.shape[1:])}, those of the first batch {tuple(shape)}")
                file.write(images.numpy().tobytes())
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
            return read_report(Path(output) / RESULTS)
    else:
        (Path(output) / RESULTS).unlink(missing_ok=True)
        shutil.rmtree(Path(output) / "partial", ignore_errors=True)
    write_json(settings, path)
    return None


REPORT = {  # of results.json, what is printed, put into tables and drawn
    "nfe": (lambda value: isinstance(value, list) and all(map(is_count, value)), "a list of numbers"),
    "seconds_per_image": (lambda value: isinstance(value, dict) and all(map(is_number, value.values())), "a number for every stage"),
    "images_per_second": (is_number, "a number"), "cfg": (is_number, "a number"), "guidance": (is_number, "a number"),
    "num_step": (is_count, "a number of steps"), "num_step_last": (lambda value: value is None or is_count(value), "a number of steps or null"),
    "solver": (lambda value: isinstance(value, str) and value in SOLVERS, f"one of {', '.join(SOLVERS)}"),
}


def read_report(path):
    """The content of a results.json, or FlowARError if a value that is used is missing or of another type."""
    report = read_json(path)
    figures = [name for name in report if name.startswith(FIGURES)]
    check_fields(report, {**REPORT, **{name: (is_number, "a number") for name in figures}}, path)
    return report


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
    write_bytes(text.getvalue().encode(errors="backslashreplace"), Path(path))


def sweep_rows(folder):
    """A row for every combination of options evaluated so far into sub-folders of a sweep's folder."""
    return [table_row(read_report(path)) for path in sorted(Path(folder).glob(f"*/{RESULTS}"))]


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
