"""What images are compared with: statistics files, and folders of images."""
import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from models import FlowARError
from models.errors import first_line
from models.weights import tensors_hash
from util.cluster import all_reduce_sum, from_main, gather_to_main, is_main, log, rank, world_size
from util.data import center_crop
from util.data.folders import Listing, list_files
from util.data.pixels import WHITE, describe_conversions, read_image
from util.evaluation.extractors import Inception, extract

DEFAULT_STATS = Path("fid_stats/adm_in256_stats.npz")
ADM_SIZE = 256  # pixels of that file
DESCRIPTION = {  # what a file may say of itself: {name: (bytes at most, what cannot be checked without it)}
    "feature_extractor": (1024, "feature network"), "img_size": (8, "image size"), "resize": (1024, "preprocessing"),
    "weights_sha256": (1024, "extractor weights"), "num_images": (8, "number of images")}
OWN = ("mu", "sigma", "features", "feature_extractor", "weights_sha256", "resize", "held_out")
# Arrays of an extractor: in a file of several with its suffix, so that Inception's are where everybody expects them.
SYMMETRIC = 1e-5  # of the largest covariance: by so much float32 may differ from its mirror image
MOST_FEATURES = 50_000  # real images that are compared in pairs: 10 GB of distances
LARGER = 4  # times what is expected: arrays of up to that are read, to say what the file holds instead


@dataclass
class Reference:
    """What images are compared with. FID needs mu (dim,) and sigma (dim, dim), KID, precision and recall features."""
    name: str
    mu: np.ndarray | None = None
    sigma: np.ndarray | None = None
    features: torch.Tensor | None = None
    classes: dict | None = None  # {class folder: images}, if known
    sha256: str | None = None  # of its content, or of a folder's names and sizes; on rank 0
    times: str | None = None  # hash of when a folder's images were written
    background: list | None = None  # of a folder's images
    images: int | None = None  # in a folder
    left_out: dict | None = None  # {reason: files} of a folder
    held_out: tuple | None = None  # distance of other real images to these, and how many, for FDr
    extract: Callable | None = None  # -> FolderFeatures: how a folder's features are still to be had

    def open(self):
        """Extract a folder's features, all ranks together; rank 0, which computes the metrics, then has them."""
        if self.extract is not None:
            found, self.extract = self.extract(), None
            if found is not None:
                self.mu, self.sigma, self.features = found.statistics["mu"], found.statistics["sigma"], found.features


def find_references(fid_stats, ref_images, joint, img_size, device, background=WHITE):
    """A Reference for each extractor of a Joint, None where there is none: of --fid_stats, --ref_images (one pass over
    the images for all, see Reference.open) or the default statistics file.
    """
    if fid_stats and ref_images:
        raise FlowARError("--fid_stats and --ref_images are two references: give one")
    if not ref_images:
        return [find_statistics(fid_stats, extractor, img_size) for extractor in joint.parts]
    listing = list_images(ref_images)

    keep = len(listing) <= MOST_FEATURES
    if not keep:
        log(f"warning: {ref_images}: KID, precision and recall are left out: they compare every pair of images, and "
            f"these are more than {MOST_FEATURES:,}: for them give a folder of fewer")

    @functools.cache
    def measured():
        found = folder_features(listing, joint, device, img_size, keep=keep, background=background)
        return found and found.split(joint)

    return [Reference(ref_images, classes=class_counts(listing), background=list(background), images=len(listing),
                      left_out=dict(listing.left_out), sha256=listing.identity()["sha256"],
                      times=listing.times_sha256(), extract=lambda number=number: measured() and measured()[number])
            for number in range(len(joint.parts))]


def find_statistics(fid_stats, extractor, img_size):
    """Reference of --fid_stats or the default statistics file, or None."""
    default = extractor.name == Inception.name and img_size == ADM_SIZE
    if fid_stats or default and DEFAULT_STATS.is_file():
        return load_statistics(fid_stats or DEFAULT_STATS, extractor, img_size)
    hint = f", or put ADM's statistics at {DEFAULT_STATS}" if default else ""
    left_out = "left out" if extractor.name == Inception.name else "left out, and nothing else is measured"
    log(f"warning: no reference: the {extractor.distance} is {left_out}. Give --fid_stats or --ref_images{hint}")
    return None


def load_statistics(path, extractor, img_size):
    """Reference of an .npz with mu and sigma, of one extractor or several, see OWN. One that does not say of which
    network they are is taken as Inception's.
    What contradicts itself, or says another extractor, other weights, preprocessing or another image size, is refused;
    what a file of others does not say (ADM's, CIFAR-10's, pytorch-fid's) is named in one warning.
    """
    own = {"suffix": extractor.suffix}
    if not read_statistics(path, {"feature_extractor": DESCRIPTION["feature_extractor"][0]}, **own):
        own = {}  # of one extractor
    said = read_statistics(path, {name: limit for name, (limit, _) in DESCRIPTION.items()}, **own)
    if any(value.size != 1 for value in said.values()):
        raise FlowARError(f"--fid_stats {path}: {', '.join(said)} are not single values")
    said = {name: value.item() for name, value in said.items()}
    expected = {"feature_extractor": extractor.name, "img_size": img_size}
    if "weights_sha256" in said:
        expected["weights_sha256"] = tensors_hash(extractor.network.state_dict())
    if "resize" in said:
        expected["resize"] = extractor.resize
    for name, value in expected.items():
        found = said.get(name, Inception.name if name == "feature_extractor" else value)
        if found != value:
            why = "" if name in said else " (one that says nothing of itself is taken as Inception's)"
            raise FlowARError(f"--fid_stats {path}: its {name} is {found}, here it is {value}{why}; "
                              "make statistics with scripts/reference_stats.py")
    reference, count = read_reference(path, extractor, **own), said.get("num_images")
    if count is not None and reference.features is not None and len(reference.features) != count:
        raise FlowARError(f"--fid_stats {path}: it holds features of {len(reference.features)} images and says "
                          f"num_images {count}")
    unknown = [what for name, (_, what) in DESCRIPTION.items() if name not in said]
    if unknown:
        log(f"warning: --fid_stats {path} does not say its {', '.join(unknown)}: whether they are those of this "
            f"evaluation ({extractor.name}, {img_size} pixels) cannot be checked")
    return reference


def read_reference(path, extractor, suffix=""):
    """Reference of a statistics file's arrays, see read_statistics; FlowARError unless they are finite and fit each
    other and the extractor.
    """
    size, dim = Path(path).stat().st_size, extractor.dim
    room = {"mu": LARGER * 8 * dim, "sigma": LARGER * 8 * dim**2, "held_out": 16,
            **dict.fromkeys(("features", "classes", "class_counts"), LARGER * size)}
    if not is_main():  # which computes the metrics
        del room["features"]
    found = read_statistics(path, room, ("mu", "sigma"), suffix)
    classes = class_table(found.pop("classes", None), found.pop("class_counts", None), path)
    if any(value.dtype.kind not in "iuf" for value in found.values()):
        raise FlowARError(f"--fid_stats {path}: mu, sigma, features or held_out are not real numbers")
    mu, sigma = (found[key].astype(np.float64, copy=False) for key in ("mu", "sigma"))
    features = torch.from_numpy(found["features"].astype(np.float32, copy=False)) if "features" in found else None
    if mu.shape != (dim,) or sigma.shape != (dim, dim):
        raise FlowARError(f"--fid_stats {path}: mu is {mu.shape} and sigma {sigma.shape}, expected ({dim},) and "
                          f"({dim}, {dim})")
    if features is not None and (features.ndim != 2 or features.shape[1] != dim):
        raise FlowARError(f"--fid_stats {path}: features are {tuple(features.shape)}, expected (images, {dim})")
    if not all(np.isfinite(value).all() for value in found.values()):
        raise FlowARError(f"--fid_stats {path}: mu, sigma, features or held_out are not finite")
    if abs(sigma - sigma.T).max() > SYMMETRIC * abs(sigma).max() or sigma.diagonal().min() < 0:
        raise FlowARError(f"--fid_stats {path}: sigma is no covariance: it is not symmetric, or a variance is negative")
    held_out = found.get("held_out")
    if held_out is not None and (held_out.shape != (2,) or held_out.min() <= 0):
        raise FlowARError(f"--fid_stats {path}: held_out is {held_out.tolist()}, expected a distance and a number of "
                          "images, both above 0")
    content = {"mu": torch.from_numpy(mu), "sigma": torch.from_numpy(sigma), "features": features,
               "held_out": None if held_out is None else torch.from_numpy(held_out)}
    sha256 = tensors_hash({name: value for name, value in content.items() if value is not None}) if is_main() else None
    return Reference(str(path), mu, sigma, features, classes, sha256,
                     held_out=None if held_out is None else tuple(held_out.tolist()))


def class_table(names, counts, path):
    """{class folder: images} of the arrays of a statistics file, None if it has none."""
    if names is None and counts is None:
        return None
    if (names is None or counts is None or names.dtype.kind != "U" or counts.dtype.kind not in "iu" or names.ndim != 1
            or names.shape != counts.shape or not (counts >= 0).all() or not counts.any()):
        raise FlowARError(f"--fid_stats {path}: classes and class_counts are not names and as many numbers of images")
    return dict(zip(names.tolist(), counts.tolist()))


def read_statistics(path, room, needed=(), suffix=""):
    """The arrays of a statistics file, FlowARError without those that are needed. suffix: of
    the names in the file, see OWN, not of those that are returned.
    """
    names = {name + suffix * (name in OWN): name for name in room}
    if not Path(path).is_file():
        raise FlowARError(f"--fid_stats {path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {own: file[name] for name, own in names.items() if name in file}
    except Exception as error:  # a damaged file makes zipfile and numpy raise almost anything
        raise FlowARError(f"--fid_stats {path}: not an .npz with mu and sigma ({first_line(error)})") from error
    for name in needed:
        if name not in found:
            raise FlowARError(f"--fid_stats {path}: not an .npz with mu and sigma ({name} is missing)")
    return found


def list_images(folder):
    """Listing of all images below a folder, in folders or not; of one, or none, there is no distance."""
    listing = from_main(lambda: list_files(folder))
    if len(listing) < 2:
        raise FlowARError(f"{folder}: {len(listing)} images found, expected at least 2 ({listing.summary()})")
    log(f"{folder}: {listing.summary()}")
    return listing


def class_counts(listing):
    """{class folder: images} in the order of the names, None where images do not lie in two or more folders."""
    counts = Counter(listing.name(i).rpartition("/")[0].partition("/")[0] for i in range(len(listing)))
    return dict(sorted(counts.items())) if len(counts) > 1 and "" not in counts else None


def load_uint8(files, img_size=None, background=WHITE, made=None):
    """(n, 3, H, W) uint8 of image files, centre-cropped to img_size if given; else all must have one size. made: a
    Counter for what was converted.
    """
    images, made = [], Counter() if made is None else made
    for path in files:
        image, conversions = read_image(path, background)
        made.update(conversions)
        image = center_crop(image, img_size) if img_size else image
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        if images[-1].shape != images[0].shape:
            raise FlowARError(f"{path}: {image.width}x{image.height} pixels, but {files[0]} is "
                              f"{images[0].shape[2]}x{images[0].shape[1]}; scripts/reference_stats.py --img_size makes "
                              "statistics of centre crops")
    return torch.stack(images)


class FolderFeatures(NamedTuple):
    """What folder_features found: statistics {mu, sigma}, features (n, dim) or None, pixels a side, Listing of the
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
        """Those of each extractor, of what was found with a Joint of them, in the order of its parts."""
        ends = np.cumsum([part.dim for part in joint.parts])
        places = [slice(end - part.dim, end) for end, part in zip(ends, joint.parts)]
        mu, sigma = self.statistics["mu"], self.statistics["sigma"]
        return [self._replace(statistics={"mu": mu[place], "sigma": sigma[place, place]},
                              features=None if self.features is None else self.features[:, place]) for place in places]


def folder_features(listing, extractor, device, img_size=None, crop=False, keep=True, through=None, background=WHITE):
    """FolderFeatures of a folder's images on rank 0, None elsewhere; the ranks share the work.

    listing: the folder, or what list_images found in it. Images must have img_size pixels a side (any one size if
    None), or are centre-cropped to it with crop=True. Sums are float64; with keep=False features are not held, for
    folders of a million images. through: what is done to images (B, 3, H, W) uint8 on the device before they are
    measured.
    """
    listing = listing if isinstance(listing, Listing) else list_images(listing)
    folder, dim, made = listing.root, extractor.dim, Counter()
    mine, parts, sizes = range(rank(), len(listing), world_size()), [torch.zeros(0, dim)], set()
    total, outer = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in (dim, (dim, dim)))
    for first in tqdm(range(0, len(mine), extractor.batch), desc=f"features of {folder}", unit="batch",
                      disable=not is_main(), mininterval=2, leave=False):
        some = [listing[index][0] for index in mine[first:first + extractor.batch]]
        images = load_uint8(some, img_size if crop else None, background, made)
        if img_size and images.shape[2:] != (img_size, img_size):
            raise FlowARError(f"{some[0]}: {images.shape[3]}x{images.shape[2]} pixels, expected {img_size}x{img_size}; "
                              "scripts/reference_stats.py --img_size makes statistics of centre crops")
        sizes.add(tuple(images.shape[2:]))
        images = images.to(device)
        features = extract(extractor, images if through is None else through(images))[0]
        wide = features.to(device, torch.float64)
        total += wide.sum(dim=0)
        outer += wide.T @ wide
        if keep:
            parts.append(features)
    all_reduce_sum(total), all_reduce_sum(outer)
    gathered = gather_to_main((torch.cat(parts), sizes, made))
    if gathered is None:
        return None
    sizes = set.union(*(sizes for _, sizes, _ in gathered))
    if line := describe_conversions(len(listing), sum((made for *_, made in gathered), Counter())):
        log(f"{folder}: {line}")
    if len(sizes) > 1:
        some = " and ".join(f"{w}x{h}" for h, w in sorted(sizes)[:2])
        raise FlowARError(f"{folder}: images of several sizes, {some}; give --img_size to centre-crop them")
    n, mean = len(listing), total / len(listing)
    found = {"mu": mean.cpu().numpy(), "sigma": ((outer - n * torch.outer(mean, mean)) / (n - 1)).cpu().numpy()}
    features = torch.zeros(n, dim) if keep else None
    for place, (part, *_) in enumerate(gathered if keep else []):  # the ranks took the images in turn
        features[place::len(gathered)] = part
    return FolderFeatures(found, features, sizes.pop()[0], listing, class_counts(listing))
