"""Metrics and distances, by torch-fidelity's formulas, of features of the networks in extractors.py."""
import numpy as np
import torch
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from util.cluster import exact_products, log

IS_SPLITS, NEIGHBOURS = 10, 3
KID_SUBSET = 1000  # images; all of them where there are fewer


def statistics(features):
    """{mu, sigma} in float64 of features (n, dim)."""
    features = np.asarray(features, dtype=np.float64)
    return {"mu": features.mean(axis=0), "sigma": np.cov(features, rowvar=False)}


def frechet_distance(a, b):
    """Frechet distance of two {mu, sigma}."""
    return fid_statistics_to_metric(a, b, verbose=False)["frechet_inception_distance"]


def warn_of_few(count, extractor, held_out=None):
    """Say it if a distance of so many images' features means little, or in relation to that of held-out images."""
    if held_out is not None and held_out[1] != count:
        log(f"warning: {count} images against {held_out[1]:.0f} held-out ones in the fdr of {extractor.name}: the "
            "fewer images, the larger their distance")
    if count <= extractor.dim:
        log(f"warning: {count} images for {extractor.dim} features: the covariance is rank-deficient and the distance "
            "is biased upwards")


# The metrics of a report: function(features, logits, reference, device) -> {name: number}, without what cannot be had.
# features (n, dim), logits (n, classes) or None, reference: references.Reference or None. Formulas: torch-fidelity's.


def distance(features, logits, reference, device):
    """Frechet distance, and FDr (arXiv 2604.28190): in units of that of other real images to the same reference."""
    if reference is None:
        return {}
    found = frechet_distance(statistics(features), {"mu": reference.mu, "sigma": reference.sigma})
    return {"distance": found, **({"fdr": found / reference.held_out[0]} if reference.held_out else {})}


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
    """{name: number} of all METRICS that can be had. Names end with the extractor's suffix."""
    with exact_products():
        return {extractor.distance if name == "distance" else name + extractor.suffix: value
                for metric in METRICS.values() for name, value in metric(features, logits, reference, device).items()}
