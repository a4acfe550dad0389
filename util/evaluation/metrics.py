"""Metrics and distances, by torch-fidelity's formulas, of features of the networks in extractors.py."""
from dataclasses import dataclass

import numpy as np
import torch

from models import FlowARError
from models.weights import tensors_hash
from util.cluster import exact_products, first_on_host, from_main, log
from util.data.pixels import WHITE
from util.evaluation.extractors import Joint, build_extractors
from util.evaluation.labels import warn_of_mix
from util.evaluation.references import Reference, class_counts, extract_folder, find_statistics, list_images
from util.speed import prepare

IS_SPLITS, NEIGHBOURS = 10, 3
MOST_FEATURES = 50_000  # real images that are compared in pairs: 10 GB of distances
KID_SUBSET = 1000  # images; all of them where there are fewer


def statistics(features):
    """{mu, sigma} in float64 of features (n, dim)."""
    features = np.asarray(features, dtype=np.float64)
    return {"mu": features.mean(axis=0), "sigma": np.cov(features, rowvar=False)}


def frechet_distance(a, b):
    """Frechet distance of two {mu, sigma}."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric
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
    value = frechet_distance(statistics(features), {"mu": reference.mu, "sigma": reference.sigma})
    return {"distance": value, **({"fdr": value / reference.held_out[0]} if reference.held_out else {})}


def score(features, logits, reference, device):
    """Inception score over splits of the shuffled logits."""
    if logits is None or len(logits) < IS_SPLITS:
        return {}
    from torch_fidelity.metric_isc import isc_features_to_metric
    return isc_features_to_metric(torch.as_tensor(logits), splits=IS_SPLITS)


def kid(features, logits, reference, device):
    """Kernel distance over 100 subsets."""
    if reference is None or reference.features is None:
        return {}
    from torch_fidelity.metric_kid import kid_features_to_metric
    size = min(KID_SUBSET, len(features), len(reference.features))
    values = kid_features_to_metric(features, reference.features, kid_subset_size=size, verbose=False)
    return {f"kid_{name}": values[f"kernel_inception_distance_{name}"] for name in ("mean", "std")}


def manifolds(features, logits, reference, device):
    """Shares of generated images inside the real manifold and of real ones inside the generated."""
    if reference is None or reference.features is None or min(len(features), len(reference.features)) <= NEIGHBOURS:
        return {}
    from torch_fidelity.metric_prc import prc_features_to_metric
    values = prc_features_to_metric(features.to(device), reference.features.to(device), prc_neighborhood=NEIGHBOURS,
                                   save_cpu_ram=True, verbose=False)
    return {f"{name}_k{NEIGHBOURS}": values[name] for name in ("precision", "recall")}


METRICS = {"distance": distance, "inception_score": score, "kid": kid, "precision_recall": manifolds}


def compute_metrics(features, logits, reference, extractor, device):
    """{name: number} of all METRICS that can be had. Names end with the extractor's suffix."""
    with exact_products():
        return {extractor.distance if name == "distance" else name + extractor.suffix: value
                for metric in METRICS.values() for name, value in metric(features, logits, reference, device).items()}


@dataclass
class Measure:
    """What images are measured with."""
    extractor: Joint
    references: list  # a Reference, or None, for each of its parts
    folder: dict | None = None  # arguments of extract_folder, where the references are of a folder that is not read yet

    def open(self):
        """Extract the features of the references' folder, all ranks together; rank 0, which computes the metrics, then
        has them.
        """
        if self.folder is None:
            return
        features, self.folder = extract_folder(**self.folder), None
        if features is None:
            return
        for reference, part in zip(self.references, features.split(self.extractor)):
            reference.mu, reference.sigma = part.statistics["mu"], part.statistics["sigma"]
            reference.features = part.features

    @property
    def reference(self):
        """The first, which knows what they have in common: the images."""
        return next(filter(None, self.references), Reference(None))

    def settings(self):
        """What must agree when an evaluation goes on."""
        reference, parts = self.reference, self.extractor.parts
        hashes = [one.sha256 if one else None for one in self.references]
        if len(set(hashes) - {None}) < 2:  # those of one folder are alike
            hashes = reference.sha256
        return {"reference": reference.name, "reference_sha256": hashes,
                "reference_background": reference.background, "feature_extractor": self.extractor.name,
                "extractor_sha256": one_or_all(tensors_hash(part.network.state_dict()) for part in parts),
                "extractor_resize": one_or_all(part.resize for part in parts),
                "extractor_batch": one_or_all(part.batch for part in parts)}

    def compute(self, batches, device):
        """The metrics, and their names, of all batches' {features, logits if any} in the images' order."""
        features = self.extractor.split(torch.cat([part["features"] for part in batches]))
        logits = torch.cat([part["logits"] for part in batches]) if "logits" in batches[0] else None
        values, ratios = {}, []
        for extractor, reference, mine in zip(self.extractor.parts, self.references, features):
            if reference is not None:
                warn_of_few(len(mine), extractor, reference.held_out)
            values |= compute_metrics(mine, logits if extractor.classes else None, reference, extractor, device)
            ratios.append(values.get(f"fdr{extractor.suffix}"))
        if len(ratios) > 1 and None not in ratios:
            values[f"fdr_mean_of_{len(ratios)}"] = sum(ratios) / len(ratios)
        return {**values, "metrics": list(values), "reference_images": self.reference.images,
                "reference_left_out": self.reference.left_out}


def one_or_all(values):
    """The value alone, as of one extractor, or the list of several."""
    values = list(values)
    return values[0] if len(values) == 1 else values


def build_measure(args, img_size, labels, device):
    """The Measure of the options: what is missing is refused before anything is sampled or trained. All ranks call it:
    each host downloads once, rank 0 lists the reference's images.
    """
    with first_on_host():
        joint = build_extractors(args.feature_extractor, device)
    if args.compile and not getattr(args, "dry_run", False):
        prepare.compile_features(joint)
    if args.fid_stats and not args.fid_stats.endswith(".npz"):
        listing = from_main(lambda: list_images(args.fid_stats))
        measure = measure_against(listing, args.fid_stats, joint, img_size, device, args.background or WHITE)
    else:
        measure = Measure(joint, [find_statistics(args.fid_stats, part, img_size) for part in joint.parts])
    if any(measure.references) and len(labels.values) < 2:
        raise FlowARError("--num_images 1: a distance needs the covariance of at least 2 images")
    warn_of_mix(labels, measure.reference)
    return measure


def measure_against(listing, folder, joint, img_size, device, background=WHITE):
    """The Measure against the images of a folder, which open() reads in one pass for all extractors."""
    keep = len(listing) <= MOST_FEATURES
    if not keep:
        log(f"{folder}: KID, precision and recall are left out: they compare every pair of images, and these are more "
            f"than {MOST_FEATURES:,}")
    about = dict(name=folder, classes=class_counts(listing), background=list(background), images=len(listing),
                 left_out=dict(listing.left_out), sha256=listing.identity()["sha256"])
    references = [Reference(**about) for _ in joint.parts]
    return Measure(joint, references, dict(listing=listing, extractor=joint, device=device, img_size=img_size,
                                           keep=keep, background=background))
