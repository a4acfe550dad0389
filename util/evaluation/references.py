"""What images are compared with: statistics files, and folders of images."""
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from models import FlowARError
from models.weights import tensors_hash
from util.cluster import all_reduce_sum, gather_to_main, is_main, log, rank, world_size
from util import data
from util.data import center_crop
from util.data.folders import LABELS_FILE, Listing
from util.data.pixels import WHITE, describe_conversions, read_image
from util.evaluation.extractors import Inception, extract

DEFAULT_STATS = Path("fid_stats/adm_in256_stats.npz")
ADM_SIZE = 256  # pixels of that file
# Arrays of an extractor: in a file of several with its suffix, so that Inception's are where everybody expects them.
OWN = ("mu", "sigma", "features", "feature_extractor", "weights_sha256", "resize", "held_out")
SHARED = ("img_size", "classes", "class_counts")


@dataclass
class Reference:
    """What images are compared with. FID needs mu (dim,) and sigma (dim, dim), KID, precision and recall features."""
    name: str
    mu: np.ndarray | None = None
    sigma: np.ndarray | None = None
    features: torch.Tensor | None = None
    classes: dict | None = None  # {class folder: images}, if known
    sha256: str | None = None  # of its content, or of a folder's names and sizes; on rank 0
    background: list | None = None  # of a folder's images
    images: int | None = None  # in a folder
    left_out: dict | None = None  # {reason: files} of a folder
    held_out: tuple | None = None  # distance of other real images to these, and how many, for FDr


def find_statistics(fid_stats, extractor, img_size):
    """Reference of --fid_stats or the default statistics file, or None."""
    default = extractor.name == Inception.name and img_size == ADM_SIZE
    if fid_stats or default and DEFAULT_STATS.is_file():
        return load_statistics(fid_stats or DEFAULT_STATS, extractor, img_size)
    hint = f", or put ADM's statistics at {DEFAULT_STATS}" if default else ""
    left_out = "left out" if extractor.name == Inception.name else "left out, and nothing else is measured"
    log(f"warning: no reference: the {extractor.distance} is {left_out}. Give --fid_stats{hint}")
    return None


def load_statistics(path, extractor, img_size):
    """Reference of an .npz with mu and sigma, of one extractor or several, see OWN. What it says of itself and is not
    so here (another extractor, other weights, preprocessing or image size) is refused; a file that does not say of
    which network it is (ADM's, CIFAR-10's, pytorch-fid's) is taken as Inception's.
    """
    if not Path(path).is_file():
        raise FlowARError(f"--fid_stats {path}: no such file")
    arrays = {}
    with np.load(path) as file:
        suffix = extractor.suffix if f"feature_extractor{extractor.suffix}" in file else ""
        for name in (*OWN, *SHARED):
            in_file = name + suffix if name in OWN else name
            if in_file in file and (name != "features" or is_main()):  # rank 0 computes the metrics
                arrays[name] = file[in_file]
    here = {"feature_extractor": extractor.name, "img_size": img_size, "resize": extractor.resize}
    if "weights_sha256" in arrays:
        here["weights_sha256"] = tensors_hash(extractor.network.state_dict())
    for name, value in here.items():
        unsaid = Inception.name if name == "feature_extractor" else value
        there = arrays[name].item() if name in arrays else unsaid
        if there != value:
            raise FlowARError(f"--fid_stats {path}: its {name} is {there}, here it is {value} (a file that does not "
                              "say it is taken as Inception's); make statistics with scripts/reference_stats.py")
    return make_reference(path, arrays, extractor.dim)


def make_reference(path, arrays, dim):
    """Reference of a statistics file's arrays; FlowARError unless they are finite and of `dim` features."""
    mu, sigma = np.shape(arrays.get("mu")), np.shape(arrays.get("sigma"))
    if mu != (dim,) or sigma != (dim, dim):
        raise FlowARError(f"--fid_stats {path}: mu is {mu} and sigma {sigma}, expected ({dim},) and ({dim}, {dim})")
    tensors = {}
    for name, kind in {"mu": np.float64, "sigma": np.float64, "features": np.float32, "held_out": np.float64}.items():
        if name in arrays:
            tensors[name] = torch.from_numpy(arrays[name].astype(kind))
            if not tensors[name].isfinite().all():
                raise FlowARError(f"--fid_stats {path}: {name} is not finite")
    reference = Reference(str(path), tensors["mu"].numpy(), tensors["sigma"].numpy(), tensors.get("features"))
    if reference.features is not None and reference.features.shape[1:] != (dim,):
        raise FlowARError(f"--fid_stats {path}: features are {tuple(reference.features.shape)}, "
                          f"expected (images, {dim})")
    if "class_counts" in arrays:
        reference.classes = dict(zip(arrays["classes"].tolist(), arrays["class_counts"].tolist()))
    if "held_out" in tensors:
        reference.held_out = tuple(tensors["held_out"].tolist())
    if is_main():
        reference.sha256 = tensors_hash(tensors)
    return reference


def list_images(folder):
    """Listing of the images of a folder, archive or dataset: in class folders as in training, or a flat set; of one
    image, or none, there is no distance.
    """
    listing = data.list_images(folder, flat=True)
    listing.classes = []  # which are no part of a reference's hash
    if len(listing) < 2:
        raise FlowARError(f"{folder}: {len(listing)} images, expected at least 2 ({listing.summary()})")
    log(f"{folder}: {listing.summary()}")
    return listing


def class_counts(listing):
    """{class folder: images} in the order of the names, None where the folders are not two or more classes."""
    if listing.labels_from == LABELS_FILE:
        return None
    counts = Counter(listing.name(i).rpartition("/")[0].partition("/")[0] for i in range(len(listing)))
    return dict(sorted(counts.items())) if len(counts) > 1 and "" not in counts else None


def load_uint8(files, img_size=None, background=WHITE, conversions=None, names=None):
    """(n, 3, H, W) uint8 of image files, their paths or their contents with names, centre-cropped to img_size if given;
    else all must have one size. conversions: a Counter of what was converted.
    """
    images, names = [], names or files
    for path, file in zip(names, files):
        image, converted = read_image(file, background, path)
        if conversions is not None:
            conversions.update(converted)
        if img_size:
            image = center_crop(image, img_size)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        if images[-1].shape != images[0].shape:
            raise FlowARError(f"{path}: {image.width}x{image.height} pixels, but {names[0]} is "
                              f"{images[0].shape[2]}x{images[0].shape[1]}; scripts/reference_stats.py --img_size makes "
                              "statistics of centre crops")
    return torch.stack(images)


class FolderFeatures(NamedTuple):
    """Of extract_folder: statistics {mu, sigma}, features (n, dim) or None, pixels a side, Listing of the
    images, and the images of each class folder (None: there are none)."""
    statistics: dict
    features: torch.Tensor | None
    img_size: int
    listing: Listing
    classes: dict | None = None

    @property
    def count(self):
        return len(self.listing)

    def split(self, joint):
        """Those of each extractor of a Joint, in the order of its parts."""
        mu, sigma = self.statistics["mu"], self.statistics["sigma"]
        parts, first = [], 0
        for extractor in joint.parts:
            place = slice(first, first + extractor.dim)
            features = None if self.features is None else self.features[:, place]
            parts.append(self._replace(statistics={"mu": mu[place], "sigma": sigma[place, place]}, features=features))
            first = place.stop
        return parts


def extract_folder(listing, extractor, device, img_size=None, crop=False, keep=True, through=None, background=WHITE):
    """FolderFeatures of a Listing's images on rank 0, None elsewhere; the ranks share the work.

    Images must have img_size pixels a side (any one size if None), or are centre-cropped to it with crop=True. Sums are
    float64; with keep=False features are not held, for folders of a million images. through: what is done to images
    (B, 3, H, W) uint8 on the device before they are measured.
    """
    folder, dim = listing.root, extractor.dim
    mine = range(rank(), len(listing), world_size())
    parts, sizes, conversions = [torch.zeros(0, dim)], set(), Counter()
    total = torch.zeros(dim, dtype=torch.float64, device=device)
    outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    for first in tqdm(range(0, len(mine), extractor.batch), desc=f"features of {folder}", unit="batch",
                      disable=not is_main(), mininterval=2, leave=False):
        batch = mine[first:first + extractor.batch]
        names = [listing.path(index) for index in batch]
        images = load_uint8([listing.read(index) for index in batch], img_size if crop else None, background,
                            conversions, names)
        if img_size and images.shape[2:] != (img_size, img_size):
            raise FlowARError(f"{names[0]}: {images.shape[3]}x{images.shape[2]} pixels, expected {img_size}x{img_size};"
                              " scripts/reference_stats.py --img_size makes statistics of centre crops")
        sizes.add(tuple(images.shape[2:]))
        images = images.to(device)
        if through is not None:
            images = through(images)
        features = extract(extractor, images)[0]
        wide = features.to(device, torch.float64)
        total += wide.sum(dim=0)
        outer += wide.T @ wide
        if keep:
            parts.append(features)
    all_reduce_sum(total), all_reduce_sum(outer)
    gathered = gather_to_main((torch.cat(parts), sizes, conversions))
    if gathered is None:
        return None

    # On rank 0: what all ranks saw.
    n, features = len(listing), None
    if keep:
        features = torch.zeros(n, dim)
    sizes, conversions = set(), Counter()
    for number, (part, seen, converted) in enumerate(gathered):
        sizes |= seen
        conversions += converted
        if keep:
            features[number::len(gathered)] = part  # the ranks took the images in turn
    if line := describe_conversions(n, conversions):
        log(f"{folder}: {line}")
    if len(sizes) > 1:
        some = " and ".join(f"{w}x{h}" for h, w in sorted(sizes)[:2])
        raise FlowARError(f"{folder}: images of several sizes, {some}; give --img_size to centre-crop them")
    mean = total / n
    statistics = {"mu": mean.cpu().numpy(), "sigma": ((outer - n * torch.outer(mean, mean)) / (n - 1)).cpu().numpy()}
    return FolderFeatures(statistics, features, sizes.pop()[0], listing, class_counts(listing))
