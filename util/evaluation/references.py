"""What images are compared with: statistics files, and folders of images."""
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from models import FlowARError
from models.hub import local_file
from models.weights import tensors_hash
from util import data
from util.cluster import all_reduce_sum, gather_to_main, is_main, log, rank, world_size
from util.data import center_crop
from util.data.folders import LABELS_FILE
from util.data.pixels import WHITE, read_image
from util.data.tables import Columns
from util.evaluation.extractors import Inception, extract

DEFAULT_STATS = Path("fid_stats/adm_in256_stats.npz")
ADM_SIZE = 256  # pixels of that file
# Arrays of an extractor: in a file of several with its suffix, so that Inception's are where everybody expects them.
OWN = ("mu", "sigma", "mu_s", "sigma_s", "features", "feature_extractor", "weights_sha256", "resize", "held_out")
SHARED = ("img_size", "classes", "class_counts")


@dataclass
class Reference:
    """What images are compared with, in the features of one network; None: not known."""
    name: str | None = None
    statistics: dict | None = None  # {mu (dim,), sigma (dim, dim)} in float64
    features: torch.Tensor | None = None  # (images, dim), which KID, precision and recall need
    spatial: dict | None = None  # as statistics, of the numbers of sFID
    archive: Path | None = None  # an .npz with images, arr_0, that have no features yet
    held_out: tuple | None = None  # distance of other real images to these, and how many, for FDr
    sha256: str | None = None  # of its content, or of a folder's names and sizes; on rank 0
    classes: dict | None = None  # {class folder: images}
    # Of a folder:
    images: int | None = None
    left_out: dict | None = None  # {reason: files}
    background: list | None = None
    img_size: int | None = None  # pixels a side


# ---- statistics files ------------------------------------------------------------------------------------------


def find_statistics(fid_stats, extractor, img_size):
    """Reference of --fid_stats or the default statistics file; one without statistics where there is no file."""
    if not fid_stats and extractor.name == Inception.name and img_size == ADM_SIZE and DEFAULT_STATS.is_file():
        fid_stats = DEFAULT_STATS
    if fid_stats:
        return load_statistics(fid_stats, extractor, img_size)
    log(f"warning: no reference, {extractor.distance} is not computed: set --fid_stats")
    return Reference()


def load_statistics(path, extractor, img_size):
    """Reference of an .npz, by path or name, with mu and sigma, of one extractor or several, see OWN. What it says of
    itself and is not so here (another extractor, other weights, preprocessing or image size) is refused; a file that
    does not say of which network it is (ADM's, CIFAR-10's, pytorch-fid's) is taken as Inception's.
    """
    archive, arrays = local_file(path), {}
    if not archive.is_file():
        raise FlowARError(f"--fid_stats {path}: not found")
    with np.load(archive) as file:
        has_images = "arr_0" in file
        if has_images:  # ADM's, whose header alone is read here
            with file.zip.open("arr_0.npy") as images:
                np.lib.format.read_magic(images)
                arrays["img_size"] = np.array(np.lib.format.read_array_header_1_0(images)[0][1])
        suffix = extractor.suffix if f"feature_extractor{extractor.suffix}" in file else ""
        for name in (*OWN, *SHARED):
            in_file = name + suffix if name in OWN else name
            if in_file in file and (name != "features" or is_main()):  # rank 0 computes the metrics
                arrays[name] = file[in_file]
    here = {"feature_extractor": extractor.name, "img_size": img_size, "resize": extractor.resize}
    if "weights_sha256" in arrays:
        here["weights_sha256"] = tensors_hash(extractor.network.state_dict())
    arrays.setdefault("feature_extractor", np.array(Inception.name))
    for name, value in here.items():
        if name in arrays and arrays[name].item() != value:
            raise FlowARError(f"--fid_stats {path}: {name} is {arrays[name].item()}, expected {value} (a file without "
                              "feature_extractor counts as Inception's); make statistics with "
                              "scripts/reference_stats.py")
    shapes = {"mu": (extractor.dim,), "sigma": (extractor.dim,) * 2}
    has_spatial = extractor.spatial and "mu_s" in arrays
    if has_spatial:
        shapes |= {"mu_s": (extractor.spatial,), "sigma_s": (extractor.spatial,) * 2}
    for name, shape in shapes.items():
        if name not in arrays or arrays[name].shape != shape or not np.isfinite(arrays[name]).all():
            raise FlowARError(f"--fid_stats {path}: expected {name} of shape {shape}, finite; make statistics with "
                              "scripts/reference_stats.py")
    kinds = {"mu": np.float64, "sigma": np.float64, "features": np.float32, "held_out": np.float64}
    tensors = {name: torch.from_numpy(arrays[name].astype(kind)) for name, kind in kinds.items() if name in arrays}
    reference = Reference(str(path), {name: tensors[name].numpy() for name in ("mu", "sigma")}, tensors.get("features"))
    if has_spatial:
        reference.spatial = {name: arrays[f"{name}_s"].astype(np.float64) for name in ("mu", "sigma")}
    if has_images and extractor.name == Inception.name and "features" not in arrays:
        reference.archive = archive
    if "held_out" in tensors:
        reference.held_out = tuple(tensors["held_out"].tolist())
    if "class_counts" in arrays:
        reference.classes = dict(zip(arrays["classes"].tolist(), arrays["class_counts"].tolist()))
    if is_main():
        reference.sha256 = tensors_hash(tensors)
    return reference


def measure_archives(references, joint, device):
    """The References with the features, which precision and recall need, of the images in their archives; rank 0."""
    if not is_main():
        return None
    measured = []
    for reference, extractor in zip(references, joint.parts):
        if reference.archive:
            log(f"{reference.name}: computing features of its images")
            with np.load(reference.archive) as file:
                batches = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2).split(extractor.batch)
            features = [extract(extractor, batch.to(device))["features"] for batch in batches]
            reference = replace(reference, features=torch.cat(features), archive=None)
        measured.append(reference)
    return measured


# ---- folders of images -----------------------------------------------------------------------------------------


def list_reference(folder, columns=Columns()):
    """Listing of the images of a folder, archive or dataset: in class folders as in training, or a flat set; of one
    image, or none, there is no distance. columns: see util.data.tables.
    """
    listing = data.list_images(folder, flat=True, columns=columns)
    listing.classes = []  # which are no part of a reference's hash
    if len(listing) < 2:
        raise FlowARError(f"{folder}: {len(listing)} images, expected at least 2 ({listing.summary()})")
    log(f"{folder}: {listing.summary()}")
    return listing


def describe_folder(listing, background=WHITE):
    """Reference without its statistics."""
    return Reference(listing.root, sha256=listing.identity()["sha256"], classes=count_classes(listing),
                     images=len(listing), left_out=dict(listing.left_out), background=list(background))


def count_classes(listing):
    """{class folder: images} in the order of the names, None where the folders are not two or more classes."""
    if listing.labels_from == LABELS_FILE:
        return None
    counts = Counter(listing.name(i).rpartition("/")[0].partition("/")[0] for i in range(len(listing)))
    return dict(sorted(counts.items())) if len(counts) > 1 and "" not in counts else None


def load_uint8(files, crop=None, background=WHITE, names=None):
    """(n, 3, H, W) uint8 of image files of one size, their paths or their contents with names. crop: pixels a side of a
    centre crop.
    """
    images, names = [], names or files
    for name, file in zip(names, files):
        image = read_image(file, background, name).image
        if crop:
            image = center_crop(image, crop)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        if images[-1].shape != images[0].shape:
            raise FlowARError(f"{name}: {image.width}x{image.height} pixels, but {names[0]} is "
                              f"{images[0].shape[2]}x{images[0].shape[1]}: make statistics of centre crops with "
                              "scripts/reference_stats.py --img_size")
    return torch.stack(images)


class Moments:
    """Mean and covariance of rows of numbers (n, dim) that the ranks share."""

    def __init__(self, dim, device):
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, rows):
        wide = rows.to(self.total.device, torch.float64)
        self.total += wide.sum(dim=0)
        self.outer += wide.T @ wide

    def statistics(self, n):
        """{mu, sigma} of the n rows of all ranks."""
        all_reduce_sum(self.total), all_reduce_sum(self.outer)
        mean = self.total / n
        sigma = (self.outer - n * torch.outer(mean, mean)) / (n - 1)
        return {"mu": mean.cpu().numpy(), "sigma": sigma.cpu().numpy()}


def extract_folder(listing, joint, device, img_size=None, crop=False, keep=True, through=None, background=WHITE):
    """A Reference of a Listing's images for each part of a Joint, on rank 0, None elsewhere; the ranks share the work.

    Images must have img_size pixels a side (those of the first one if None), or are centre-cropped to it with
    crop=True. Sums are float64; with keep=False features are not held, for folders of a million images. through: what
    is done to images (B, 3, H, W) uint8 on the device before they are measured.
    """
    n = len(listing)
    expected = (img_size, img_size)
    if img_size is None:
        expected = load_uint8([listing.read(0)], names=[listing.path(0)]).shape[2:]
    mine, parts = range(rank(), n, world_size()), [torch.zeros(0, joint.dim)]
    moments = {"features": Moments(joint.dim, device)}
    if joint.spatial:
        moments["spatial"] = Moments(joint.spatial, device)
    for first in tqdm(range(0, len(mine), joint.batch), desc=f"features of {listing.root}", unit="batch",
                      disable=not is_main(), mininterval=2, leave=False):
        batch = mine[first:first + joint.batch]
        names = [listing.path(index) for index in batch]
        images = load_uint8([listing.read(index) for index in batch], img_size if crop else None, background, names)
        height, width = images.shape[2:]
        if (height, width) != expected:
            raise FlowARError(f"{names[0]}: {width}x{height} pixels, expected {expected[1]}x{expected[0]}: make "
                              "statistics of centre crops with scripts/reference_stats.py --img_size")
        images = images.to(device)
        if through is not None:
            images = through(images)
        measured = extract(joint, images)
        for name, sums in moments.items():
            sums.add(measured[name])
        if keep:
            parts.append(measured["features"])
    statistics = {name: sums.statistics(n) for name, sums in moments.items()}
    gathered = gather_to_main(torch.cat(parts))
    if gathered is None:
        return None
    features = None
    if keep:
        features = torch.zeros(n, joint.dim)
        for number, part in enumerate(gathered):  # the ranks took the images in turn
            features[number::len(gathered)] = part
    folder, references, first = describe_folder(listing, background), [], 0
    for extractor in joint.parts:
        own = slice(first, first + extractor.dim)
        mu, sigma = statistics["features"]["mu"][own], statistics["features"]["sigma"][own, own]
        reference = replace(folder, img_size=expected[0], statistics={"mu": mu, "sigma": sigma})
        if extractor.spatial:
            reference.spatial = statistics["spatial"]
        if keep:
            reference.features = features[:, own]
        references.append(reference)
        first = own.stop
    return references
