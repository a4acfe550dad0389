"""What an evaluation keeps in its folder: settings, finished batches, pictures, ADM's sample file."""
import io
import json
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from safetensors.torch import save

from models import FlowARError
from models.settings import drop_removed
from models.weights import read_file, writing
from util.cluster import log
from util.evaluation.labels import Labels
from util.evaluation.reports import RESULTS
from util.files import holds_bytes, lock_folder, make_directory, read_json, write_bytes, write_json

SETTINGS, PARTIAL, IMAGES, NPZ = "settings.json", "partial", "images", "samples.npz"
# Of the settings, what may differ: places, whose contents are compared, and the code.
NOT_COMPARED = ("checkpoint", "vae", "reference", "reference_times", "labels_file", "code_sha256", "commit")
WRITERS = 8  # threads; PNG compression releases the interpreter lock


class Plan(NamedTuple):
    """What an evaluation makes and writes."""
    labels: Labels
    save_images: bool = False  # as PNGs
    save_npz: bool = False  # as ADM's sample file
    persistent: bool = True  # False keeps nothing and starts anew: the evaluations during training
    start: dict | None = None  # for run.json, see util.manifest

    @property
    def num_images(self):
        return len(self.labels.values)

    def settings(self):
        """What must agree when an evaluation goes on."""
        return {"num_images": self.num_images, "save_images": self.save_images, "save_npz": self.save_npz,
                **self.labels.settings()}


class Store:
    """An evaluation's folder, its own until close(). Finished batches, which need not be sampled again, are
    safetensors files, renamed when whole."""

    def __init__(self, folder):
        self.folder, self.lock = Path(folder), None
        self.finished = {}  # on rank 0: {batch number: what was measured of it}

    def resume(self, settings, batches):
        """(the results if there are any, else None, numbers of the batches that are not finished); on rank 0.
        FlowARError for a folder with an evaluation of other settings, or that another process has.
        """
        make_directory(self.folder)
        self.lock = lock_folder(self.folder)
        settings = json.loads(json.dumps(settings))
        self.check_settings(settings)
        if (self.folder / RESULTS).is_file():
            return read_json(self.folder / RESULTS), []
        write_json(settings, self.folder / SETTINGS)
        for number, indices in batches.items():
            try:
                measured = self.load(number)
            except FlowARError:  # there is none, or a crash cut it off
                continue
            if not settings["save_images"] or all(map(holds_bytes, picture_paths(self.folder, indices))):
                self.finished[number] = measured
        missing = [number for number in batches if number not in self.finished]
        if self.finished:
            log(f"{self.folder}: resumes with {len(missing)} of {len(batches)} batches to do")
        return None, missing

    def check_settings(self, settings):
        """FlowARError unless what an evaluation has written there is of these settings."""
        patterns, file = (RESULTS, NPZ, f"{PARTIAL}/*", f"{IMAGES}/*"), self.folder / SETTINGS
        if not any(any(self.folder.glob(pattern)) for pattern in patterns):
            return
        before = drop_removed(read_json(file)) if file.is_file() else {}
        for key in {**before, **settings}:
            if key not in NOT_COMPARED and before.get(key) != settings.get(key):
                raise FlowARError(f"{self.folder}: contains an evaluation with {key} {before.get(key)}, now it is "
                                  f"{settings.get(key)}: choose another --output_dir, or remove it")
        if before.get("commit") != settings["commit"]:
            log(f"{self.folder}: contains results of commit {before.get('commit')}, the current commit is "
                f"{settings['commit']}")

    def path(self, number):
        return self.folder / PARTIAL / f"batch-{number:06d}.safetensors"

    def save(self, number, tensors):
        make_directory(self.folder / PARTIAL)
        write_bytes(save(tensors), self.path(number))

    def load(self, number):
        """What was measured of a batch: all tensors but the images."""
        return {name: value for name, value in read_file(self.path(number)).items() if name != "images"}

    def images(self, number):
        """(n, H, W, 3) uint8 of a batch."""
        return read_file(self.path(number))["images"]

    def write_npz(self, count, labels):
        """ADM's sample file of `count` batches, one after the other: arr_0 (N, H, W, 3) uint8 and arr_1, the labels."""
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *self.images(0).shape[1:])}
        with writing(self.folder / NPZ) as target, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for number in range(count):
                    file.write(self.images(number).numpy().tobytes())
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
                np.lib.format.write_array(file, np.asarray(labels, dtype=np.int64))

    def finish(self, report):
        """Write the results, and let batches and folder go."""
        make_directory(self.folder)
        write_json(report, self.folder / RESULTS)
        self.close()

    def close(self):
        if self.lock:
            shutil.rmtree(self.folder / PARTIAL, ignore_errors=True)
            self.lock.close()


def picture_paths(folder, indices):
    return [folder / IMAGES / f"{index:06d}.png" for index in indices]


def write_pngs(images, folder, indices):
    """Write images (n, H, W, 3) uint8 as <folder>/images/<index>.png, with threads."""
    make_directory(folder / IMAGES)
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write_png, images, picture_paths(folder, indices)))  # raises what a thread raised


def write_png(image, path):
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "png")
    write_bytes(encoded.getvalue(), path, sync=False)
