"""What an evaluation keeps: finished batches, pictures, and the settings that must agree."""
import io
import itertools
import json
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save

from models import FlowARError
from models.errors import reading
from models.weights import writing
from util.cluster import log
from util.evaluation.reports import RESULTS, STAGES, read_report
from util.files import holds_bytes, make_directory, read_json, write_bytes, write_json
from util.training.checkpoint import lock

SETTINGS, PARTIAL = "settings.json", "partial"
PICTURES = ("images", "samples.npz")
MADE = (PARTIAL, *PICTURES, SETTINGS, RESULTS)  # of an evaluation, in its folder; the last stands for all
CODE_KEY = "code_sha256"
PLACES = ("checkpoint", "vae", "reference", "reference_times", "labels_file")  # told in a report; contents are bound
FOLLOWS = {  # settings that are no options, and those that they follow from
    "checkpoint_sha256": "--resume", "weights_key": "--resume and --weights", "vae_sha256": "--vae and --vae_path",
    **dict.fromkeys(("labels_sha256", "classes_sampled"), "--labels, --all_classes and the model's classes"),
    **dict.fromkeys(("reference_sha256", "reference_background"), "--ref_images or --fid_stats, and --background"),
    **dict.fromkeys(("extractor_sha256", "extractor_resize", "extractor_batch"), "--feature_extractor, --fid_weights")}
HELD = {}  # {folder: its lock} of this process
WRITERS = 8  # threads; PNG compression releases the interpreter lock


class FinishedBatches:
    """Batches that an interrupted evaluation need not sample again: one safetensors file each, renamed when whole."""
    def __init__(self, folder):
        self.folder = Path(folder)
        make_directory(self.folder)

    def path(self, number):
        return self.folder / f"batch-{number:06d}.safetensors"

    def has(self, number, shape=None):
        """Whether the batch is there and whole: a crash may have torn it. shape: of its features (images, dim)."""
        try:
            return shape in (None, tuple(self.load(number)["features"].shape))
        except FlowARError:
            return False

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
            raise FlowARError(f"{path}: images are {tuple(images.shape)} {images.dtype}, "
                              "expected (n, height, width, 3) torch.uint8")
        return images

    def remove(self):
        shutil.rmtree(self.folder, ignore_errors=True)


def check_batch(tensors, path):
    """FlowARError unless these are the tensors of sample_and_measure, n images each of any size."""
    n = len(tensors["features"]) if "features" in tensors and tensors["features"].ndim else 0
    expected = {"features": ((n, None), torch.float32), "bad": ((None,), torch.int64),
                "seconds": ((len(STAGES),), torch.float64), "calls": ((None, 2), torch.int64)}
    if "logits" in tensors:
        expected["logits"] = expected["features"]
    for name, (shape, dtype) in expected.items():
        value = tensors.get(name)
        found = "missing" if value is None else f"{tuple(value.shape)} {value.dtype}"
        if (value is None or value.dtype != dtype or value.ndim != len(shape)
                or any(want not in (None, have) for want, have in zip(shape, value.shape))):
            raise FlowARError(f"{path}: {name} is {found}, expected {shape} {dtype}: not a batch of an evaluation")


def picture_name(index):
    return f"{index:06d}.png"


def pictures_missing(folder, indices):
    """How many of these pictures are not there, or empty."""
    return sum(not holds_bytes(folder / picture_name(index)) for index in indices)


class PngWriter:
    """Writes images as <folder>/<index>.png with threads."""
    def __init__(self, folder):
        self.folder = Path(folder)
        make_directory(self.folder)
        self.pool = ThreadPoolExecutor(WRITERS)

    def start(self, images, indices):
        """images: (n, 3, H, W) uint8. Returns a function that waits for the files."""
        images = images.permute(0, 2, 3, 1).numpy()
        paths = [self.folder / picture_name(index) for index in indices]
        futures = [self.pool.submit(write_png, image, path) for image, path in zip(images, paths)]
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
                    raise FlowARError(f"{finished.path(number)}: images are {tuple(images.shape[1:])}, "
                                      f"those of the first batch {tuple(shape)}")
                file.write(images.numpy().tobytes())
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
            np.lib.format.write_array(file, np.asarray(labels, dtype=np.int64))


def check_settings(output, settings):
    """Remember the settings in a new place; in a used one refuse others. Returns the finished results, if any. What
    other code made there is set aside: never one set of images, or of figures, of two codes.
    """
    output = Path(output)
    path, results = output / SETTINGS, output / RESULTS
    settings = {key: value for key, value in json.loads(json.dumps(settings)).items() if key not in PLACES}
    before = read_json(path) if path.is_file() else {}
    if results.is_file() or any((output / PARTIAL).glob("batch-*")):
        same_code = bool(before) and before.get(CODE_KEY) == settings.get(CODE_KEY)
        # Other code may know other settings; before they were bound to code, some had other meanings.
        shared = [key for key in settings if key in before and CODE_KEY in before]
        for key in {**before, **settings} if same_code else shared:
            if key != CODE_KEY and before.get(key) != settings.get(key):
                of = f", of {FOLLOWS[key]}" if key in FOLLOWS else ""
                raise FlowARError(f"{output}: the evaluation there has {key} {before.get(key)}, now it is "
                                  f"{settings.get(key)}{of}; choose another --output_dir or remove it")
        if same_code:
            return read_report(results) if results.is_file() else None
        keep_apart(output, "other code made it (models/, util/ or engine_flowar.py have changed since)")
    elif any((output / name).exists() for name in PICTURES):
        keep_apart(output, "its results are gone")
    shutil.rmtree(output / PARTIAL, ignore_errors=True)
    write_json(settings, path)
    return None


def keep_apart(output, why):
    """Move an evaluation that cannot go on into a folder of its own, and say so."""
    aside = next(path for number in itertools.count(1) if not (path := output / f"earlier-{number}").exists())
    log(f"{output}: the evaluation there cannot go on, {why}: computing anew; the earlier one is kept in {aside}")
    make_directory(aside)
    for name in MADE:
        if (output / name).exists():
            (output / name).rename(aside / name)


def hold(output):
    """Lock a folder until this process ends: two evaluations in it would mix."""
    if output.resolve() not in HELD:
        HELD[output.resolve()] = lock(output)


def release(output):
    """Let others have the folder."""
    if held := HELD.pop(output.resolve(), None):
        held.close()


def stale(output, done, planned):
    """Lines on what a finished evaluation's folder does not have that is asked for, or has of images of before."""
    lines, before, now = [], done.get("reference_times"), planned.get("reference_times")
    if None not in (before, now) and before != now:
        lines.append(f"the images of the reference {planned['reference']} were written since, with the same names and "
                     "sizes: if they are others, these figures are not of them; to measure with them")
    expected = range(planned["num_images"] if planned.get("save_images") else 0)
    if missing := pictures_missing(output / "images", expected):
        lines.append(f"{missing} of {len(expected)} pictures in images/ are missing or empty; to make them again")
    if planned.get("save_npz") and not (output / "samples.npz").is_file():
        lines.append("samples.npz is missing; to make it again")
    return lines


def open_store(output, planned, batches, dim, persistent):
    """(results if there are any, numbers of the batches to sample) of an output folder. dim: of the features."""
    make_directory(output)
    if not persistent:
        return None, list(range(len(batches)))
    hold(output)
    done, kept = check_settings(output, planned), FinishedBatches(output / PARTIAL)
    if done is not None:
        kept.remove()  # if the program was killed before it could
        for line in stale(output, done, planned):
            log(f"warning: {output}: {line}, choose another --output_dir")
        return done, []
    images = output / "images" if planned.get("save_images") else None
    missing = [number for number, batch in enumerate(batches)
               if not kept.has(number, (len(batch), dim)) or images and pictures_missing(images, batch)]
    if len(missing) < len(batches):
        log(f"{output}: going on, {len(missing)} of {len(batches)} batches are missing")
    return None, missing
