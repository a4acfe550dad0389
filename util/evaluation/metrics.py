"""Metrics and distances, by torch-fidelity's formulas, of features of the networks in extractors.py."""
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from models.hub import release_of
from models.weights import tensors_hash
from util.cluster import exact_products, fetch, first_on_host, from_main, log
from util.data.pixels import WHITE
from util.evaluation.extractors import Joint, build_extractors
from util.evaluation.labels import warn_of_mix
from util.evaluation.references import (Reference, describe_folder, extract_folder, find_statistics, list_reference,
                                        measure_archives)
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


def warn_of_few(count, extractor):
    """Say it if a distance of so many images is biased."""
    if count <= extractor.dim:
        log(f"warning: only {count} images for {extractor.dim} features: the covariance is rank-deficient, so the "
            "distance is biased upwards")


# The metrics of a report: function(features, logits, reference, device) -> {name: number}, {} where it cannot be.
# features (n, dim), logits (n, classes) or None, reference: references.Reference. Formulas: torch-fidelity's.


def distance(features, logits, reference, device):
    """Frechet distance, and FDr (arXiv 2604.28190): in units of that of other real images to the same reference."""
    if reference.statistics is None:
        return {}
    values = {"distance": frechet_distance(statistics(features), reference.statistics)}
    if reference.held_out:
        values["fdr"] = values["distance"] / reference.held_out[0]
    return values


def score(features, logits, reference, device):
    """Inception score over splits of the shuffled logits."""
    if logits is None or len(logits) < IS_SPLITS:
        return {}
    from torch_fidelity.metric_isc import isc_features_to_metric
    return isc_features_to_metric(torch.as_tensor(logits), splits=IS_SPLITS)


def kid(features, logits, reference, device):
    """Kernel distance over 100 subsets."""
    if reference.features is None:
        return {}
    from torch_fidelity.metric_kid import kid_features_to_metric
    size = min(KID_SUBSET, len(features), len(reference.features))
    values = kid_features_to_metric(features, reference.features, kid_subset_size=size, verbose=False)
    return {f"kid_{name}": values[f"kernel_inception_distance_{name}"] for name in ("mean", "std")}


def manifolds(features, logits, reference, device):
    """Shares of generated images inside the real manifold and of real ones inside the generated."""
    if reference.features is None or min(len(features), len(reference.features)) <= NEIGHBOURS:
        return {}
    from torch_fidelity.metric_prc import prc_features_to_metric
    values = prc_features_to_metric(features.to(device), reference.features.to(device), prc_neighborhood=NEIGHBOURS,
                                   save_cpu_ram=True, verbose=False)
    return {f"{name}_k{NEIGHBOURS}": values[name] for name in ("precision", "recall")}


METRICS = {"distance": distance, "inception_score": score, "kid": kid, "precision_recall": manifolds}


def compute_metrics(features, logits, reference, extractor, device):
    """{name: number} of all METRICS. Names end with the extractor's suffix."""
    values = {}
    with exact_products():
        for metric in METRICS.values():
            for name, value in metric(features, logits, reference, device).items():
                values[extractor.distance if name == "distance" else name + extractor.suffix] = value
    return values


@dataclass
class Measure:
    """What images are measured with."""
    extractor: Joint
    references: list  # a Reference for each of its parts
    read_images: Callable | None = None  # where they have images to measure: returns them measured, on rank 0

    def read_references(self):
        """Measure the references' images, all ranks together; rank 0, which computes the metrics, gets what is new."""
        if self.read_images is None:
            return
        references, self.read_images = self.read_images(), None
        if references is not None:
            self.references = references

    @property
    def reference(self):
        """The first that there is, which knows what they have in common: the images."""
        for reference in self.references:
            if reference.name:
                return reference
        return Reference()

    def settings(self):
        """What must agree when an evaluation goes on. Lists have a value for each extractor; of one extractor it is the
        value itself, and of a folder its one hash.
        """
        reference, parts = self.reference, self.extractor.parts
        hashes = [part.sha256 for part in self.references]
        if len({sha256 for sha256 in hashes if sha256 is not None}) < 2:
            hashes = reference.sha256
        each = {"extractor_sha256": [tensors_hash(part.network.state_dict()) for part in parts],
                "extractor_resize": [part.resize for part in parts],
                "extractor_batch": [part.batch for part in parts]}
        if len(parts) == 1:
            each = {name: values[0] for name, values in each.items()}
        return {"reference": reference.name, "reference_sha256": hashes, "reference_background": reference.background,
                "feature_extractor": self.extractor.name, **each}

    def compute(self, batches, device):
        """The metrics, and their names, of all batches' {features, logits, spatial if any} in the images' order."""
        measured = {}
        for name in ("features", "logits", "spatial"):
            if all(name in batch for batch in batches):  # an earlier version's batches have no spatial
                measured[name] = torch.cat([batch[name] for batch in batches])
        features, logits = self.extractor.split(measured["features"]), measured.get("logits")
        values, ratios = {}, []
        for extractor, reference, own in zip(self.extractor.parts, self.references, features):
            count = len(own)
            if reference.statistics is not None:
                warn_of_few(count, extractor)
            if reference.held_out and reference.held_out[1] != count:
                log(f"warning: fdr of {extractor.name} compares {count} images with {reference.held_out[1]:.0f} "
                    "held-out ones: distances grow with fewer images")
            values |= compute_metrics(own, logits if extractor.classes else None, reference, extractor, device)
            if extractor.spatial and reference.spatial and "spatial" in measured:
                values["sfid"] = frechet_distance(statistics(measured["spatial"]), reference.spatial)
            ratios.append(values.get(f"fdr{extractor.suffix}"))
        if len(ratios) > 1 and None not in ratios:
            values[f"fdr_mean_of_{len(ratios)}"] = sum(ratios) / len(ratios)
        return {**values, "metrics": list(values), "reference_images": self.reference.images,
                "reference_left_out": self.reference.left_out}


def build_measure(args, img_size, labels, device):
    """The Measure of the options: what is missing is refused before anything is sampled or trained. All ranks call it:
    each host downloads once, rank 0 lists the reference's images.
    """
    name, listing = args.fid_stats or "", None
    if name and not name.endswith(".npz") and not release_of(name):
        listing = from_main(lambda: list_reference(name, args))
    else:
        fetch(name)
    with first_on_host():
        joint = build_extractors(args.feature_extractor, device)
    if args.compile:
        prepare.compile_features(joint)
    if listing is not None:
        measure = measure_against(listing, joint, img_size, device, args.background or WHITE)
    else:
        references = [find_statistics(name, part, img_size) for part in joint.parts]
        for part, reference in zip(joint.parts, references):
            if not reference.spatial:
                part.spatial = 0
        measure = Measure(joint, references, functools.partial(measure_archives, references, joint, device))
    warn_of_mix(labels, measure.reference)
    return measure


def measure_against(listing, joint, img_size, device, background=WHITE):
    """The Measure against the images of a Listing, which read_references() reads in one pass for all extractors."""
    keep = len(listing) <= MOST_FEATURES
    if not keep:
        log(f"{listing.root}: no KID, precision and recall: they compare all pairs of images, and these are "
            f"more than {MOST_FEATURES:,}")
    read_images = functools.partial(extract_folder, listing, joint, device, img_size, keep=keep, background=background)
    return Measure(joint, [describe_folder(listing, background)] * len(joint.parts), read_images)
