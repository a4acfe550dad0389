"""What images are compared with: statistics files, and folders of images."""
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from models import FlowARError
from models.files import first_line, read_npz, tensors_hash
from util.cluster import all_reduce_sum, gather_to_main, is_main, log, rank, world_size
from util.data import center_crop, open_image
from util.evaluation.metrics import Inception, extract

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
DEFAULT_STATS = Path("fid_stats/adm_in256_stats.npz")
ADM_STATISTICS = {"feature_extractor": Inception.name, "img_size": 256}  # what files that say nothing are taken for
DESCRIPTION = {"feature_extractor": 1024, "weights_sha256": 1024, "img_size": 8}  # of a file, of so many bytes at most
LARGER = 4  # times what is expected: arrays of up to that are read, to say what the file holds instead


class Reference(NamedTuple):
    """What images are compared with. FID needs mu (dim,) and sigma (dim, dim), KID, precision and recall features."""
    name: str
    mu: np.ndarray
    sigma: np.ndarray
    features: torch.Tensor | None = None


def find_reference(fid_stats, ref_images, extractor, img_size, device):
    """Reference of --fid_stats, --ref_images or the default statistics file, or None."""
    if fid_stats and ref_images:
        raise FlowARError("--fid_stats and --ref_images are two references: give one")
    if ref_images:
        found = folder_features(ref_images, extractor, device, img_size)
        if found is None:  # rank 0 has the features and computes the metrics
            return Reference(ref_images, None, None)
        return Reference(ref_images, **found.statistics, features=found.features)
    default = extractor.name == Inception.name and img_size == ADM_STATISTICS["img_size"]
    if fid_stats or default and DEFAULT_STATS.is_file():
        return load_statistics(fid_stats or DEFAULT_STATS, extractor, img_size)
    hint = f", or put ADM's statistics at {DEFAULT_STATS}" if default else ""
    left_out = "left out" if extractor.name == Inception.name else "left out, and nothing else is measured"
    log(f"warning: no reference: the {extractor.distance} is {left_out}. Give --fid_stats or --ref_images{hint}")
    return None


def load_statistics(path, extractor, img_size):
    """Reference of an .npz of scripts/reference_stats.py, or of ADM's, which is taken as Inception at 256 pixels.
    Statistics of another extractor, other weights or another image size are refused.
    """
    said = read_statistics(path, DESCRIPTION)
    if any(value.size != 1 for value in said.values()):
        raise FlowARError(f"--fid_stats {path}: {', '.join(said)} are not single values")
    said = {**ADM_STATISTICS, **{key: value.item() for key, value in said.items()}}
    expected = {"feature_extractor": extractor.name, "img_size": img_size}
    if "weights_sha256" in said:
        expected["weights_sha256"] = tensors_hash(extractor.network.state_dict())
    for key, value in expected.items():
        if said[key] != value:
            raise FlowARError(f"--fid_stats {path}: its {key} is {said[key]}, here it is {value}; "
                              "make statistics with scripts/reference_stats.py")
    dim = extractor.dim
    room = {"mu": LARGER * 8 * dim, "sigma": LARGER * 8 * dim**2, "features": LARGER * Path(path).stat().st_size}
    found = read_statistics(path, room, ("mu", "sigma"))
    if any(value.dtype.kind not in "iuf" for value in found.values()):
        raise FlowARError(f"--fid_stats {path}: mu, sigma or features are not real numbers")
    mu, sigma = (found[key].astype(np.float64, copy=False) for key in ("mu", "sigma"))
    features = torch.from_numpy(found["features"].astype(np.float32, copy=False)) if "features" in found else None
    if mu.shape != (dim,) or sigma.shape != (dim, dim):
        raise FlowARError(f"--fid_stats {path}: mu is {mu.shape} and sigma {sigma.shape}, expected ({dim},) and "
                          f"({dim}, {dim})")
    if features is not None and (features.ndim != 2 or features.shape[1] != dim):
        raise FlowARError(f"--fid_stats {path}: features are {tuple(features.shape)}, expected (images, {dim})")
    if not all(np.isfinite(value).all() for value in found.values()):
        raise FlowARError(f"--fid_stats {path}: mu, sigma or features are not finite")
    return Reference(str(path), mu, sigma, features)


def read_statistics(path, room, needed=()):
    """The arrays of a statistics file, see models.files.read_npz; FlowARError without those that are needed."""
    if not Path(path).is_file():
        raise FlowARError(f"--fid_stats {path}: no such file")
    try:
        found = read_npz(path, room)
    except Exception as error:  # a damaged file makes zipfile and numpy raise almost anything
        raise FlowARError(f"--fid_stats {path}: not an .npz with mu and sigma ({first_line(error)})") from error
    for name in needed:
        if name not in found:
            raise FlowARError(f"--fid_stats {path}: not an .npz with mu and sigma ({name} is missing)")
    return found


def image_files(folder):
    """Sorted paths of all images below a folder."""
    if not Path(folder).is_dir():
        raise FlowARError(f"{folder}: no such folder of images")
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if len(files) < 2:
        raise FlowARError(f"{folder}: {len(files)} images found, expected at least 2")
    return files


def load_uint8(files, img_size=None):
    """(n, 3, H, W) uint8 of image files, centre-cropped to img_size if given; else all must have one size."""
    images = []
    for path in files:
        image = center_crop(open_image(path), img_size) if img_size else open_image(path)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        if images[-1].shape != images[0].shape:
            raise FlowARError(f"{path}: {image.width}x{image.height} pixels, but {files[0]} is "
                              f"{images[0].shape[2]}x{images[0].shape[1]}")
    return torch.stack(images)


class FolderFeatures(NamedTuple):
    """What folder_features found: statistics {mu, sigma}, features (n, dim) or None, images, pixels a side."""
    statistics: dict
    features: torch.Tensor | None
    count: int
    img_size: int


def folder_features(folder, extractor, device, img_size=None, crop=False, keep=True):
    """FolderFeatures of the images below a folder on rank 0, None elsewhere; the ranks share the work. Images must have
    img_size pixels a side (any one size if None), or are centre-cropped to it with crop=True. Sums are float64; with
    keep=False features are not held, for folders of a million images.
    """
    files, dim = image_files(folder), extractor.dim
    mine, parts, sizes = files[rank()::world_size()], [torch.zeros(0, dim)], set()
    total, outer = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in (dim, (dim, dim)))
    for first in tqdm(range(0, len(mine), extractor.batch), desc=f"features of {folder}", unit="batch",
                      disable=not is_main(), mininterval=2, leave=False):
        some = mine[first:first + extractor.batch]
        images = load_uint8(some, img_size if crop else None)
        if img_size and images.shape[2:] != (img_size, img_size):
            raise FlowARError(f"{some[0]}: {images.shape[3]}x{images.shape[2]} pixels, expected {img_size}x{img_size}; "
                              "scripts/reference_stats.py --img_size makes statistics of centre crops")
        sizes.add(tuple(images.shape[2:]))
        features = extract(extractor, images.to(device))[0]
        wide = features.to(device, torch.float64)
        total += wide.sum(dim=0)
        outer += wide.T @ wide
        if keep:
            parts.append(features)
    all_reduce_sum(total), all_reduce_sum(outer)
    gathered = gather_to_main((torch.cat(parts), sizes))
    if gathered is None:
        return None
    sizes = set.union(*(sizes for _, sizes in gathered))
    if len(sizes) > 1:
        some = " and ".join(f"{w}x{h}" for h, w in sorted(sizes)[:2])
        raise FlowARError(f"{folder}: images of several sizes, {some}; give --img_size to centre-crop them")
    n, mean = len(files), total / len(files)
    found = {"mu": mean.cpu().numpy(), "sigma": ((outer - n * torch.outer(mean, mean)) / (n - 1)).cpu().numpy()}
    features = torch.zeros(n, dim) if keep else None
    for place, (part, _) in enumerate(gathered if keep else []):  # the ranks took the images in turn
        features[place::len(gathered)] = part
    return FolderFeatures(found, features, n, sizes.pop()[0])
