"""From options to what samples and measures: the door that eval.py, main_flowar.py --evaluate and scripts share."""
from pathlib import Path
from typing import NamedTuple

import torch

from models import FlowARError
from models.files import file_hash, tensors_hash
from models.files.checkpoints import find_model, recognise_geometry
from models.registry import open_model, recognise_size
from models.vaes import find_vae
from util.cluster import AUTOCAST, agree, check_compiler, from_main, is_main, log, set_precision, set_way_on
from util.data.pixels import WHITE
from util.evaluation.labels import Labels, choose_labels, classes_of, read_classes, warn_of_mix
from util.evaluation.metrics import build_extractor, compute_metrics, warn_of_few
from util.evaluation.references import Reference, find_reference
from util.evaluation.reports import CODE
from util.evaluation.sampler import Sampler
from util.options import check_geometry, check_vae, model_options, resolve_geometry, sampling_options, sweep_points
from util.speed import prepare
from util.training.checkpoint import read_model_file
from util.training.provenance import check_origin, origin_of, saved_origin


class Measure(NamedTuple):
    """What images are measured with."""
    extractor: object  # of metrics.EXTRACTORS
    reference: Reference | None

    def open(self):
        """Extract what of the reference is still to be had, all ranks together; returns self."""
        if self.reference is not None:
            self.reference.open()
        return self

    def settings(self):
        """What must agree when an evaluation goes on."""
        extractor, reference = self.extractor, self.reference or Reference(None)
        return {"reference": reference.name, "reference_sha256": reference.sha256, "reference_times": reference.times,
                "reference_background": reference.background, "feature_extractor": extractor.name,
                "extractor_sha256": tensors_hash(extractor.network.state_dict()),
                "extractor_resize": extractor.resize, "extractor_batch": extractor.batch}

    def compute(self, found, device):
        """The metrics, and their names, of all batches' {features, logits if any} in the images' order."""
        features = torch.cat([part["features"] for part in found])
        logits = torch.cat([part["logits"] for part in found]) if "logits" in found[0] else None
        if self.reference is not None:
            warn_of_few(len(features), self.extractor)
        values = compute_metrics(features, logits, self.reference, self.extractor, device)
        reference = self.reference or Reference(None)
        return {**values, "metrics": list(values), "reference_images": reference.images,
                "reference_left_out": reference.left_out}


class Plan(NamedTuple):
    """What an evaluation makes and writes."""
    labels: Labels
    save_images: bool = False  # as PNGs
    save_npz: bool = False  # as ADM's sample file
    persistent: bool = True  # False keeps nothing and starts anew: the evaluations during training

    @property
    def num_images(self):
        return len(self.labels.values)

    def settings(self):
        """What must agree when an evaluation goes on."""
        return {"num_images": self.num_images, "save_images": self.save_images, "save_npz": self.save_npz,
                **self.labels.settings()}


def open_for_sampling(args, device, identify=False):
    """(model, VAE, description for a report, precision) of --resume and --vae_path, as the other options want them.
    identify: with the weights' hash, for which those without a checksum are read once more, by rank 0."""
    if not args.resume:
        raise FlowARError("--resume is missing: "
                          "give a checkpoint, a directory with checkpoint-last.pth or a .safetensors")
    release = "fp16" if device.type == "cuda" else None  # as the release samples and decodes
    precision = set_precision(args.precision or release, device)
    path, content = read_model_file(args.resume)
    weights = find_model(content, path, args.weights)
    checksum = content.get("checksum")  # of its content, and verified when it was found
    checksum = checksum if isinstance(checksum, str) else None
    trained_with = saved_origin(content)
    if trained_with.sha256 is None and "optimizer" in content:
        log(f"{path}: does not say with which VAE it was trained: whether it is this one cannot be checked")
    del content
    named = find_vae(args.vae, args.vae_path)
    vae, notes = named.open()
    for note in notes:  # which may explain what is refused
        log(note)
    origin = origin_of(named, vae)
    check_origin(path, trained_with, origin)
    named_size, args = args.model, recognise(args, weights.tensors, path, vae)
    check_vae(vae, args)
    try:
        model, left_out = open_model(weights.tensors, path, args.model, **model_options(args))
    except FlowARError as error:
        way_on = "; leave out --model, --diffloss_d and --diffloss_w: the file tells them" if named_size else ""
        raise FlowARError(f"{error}{way_on}") from error
    log(f"{path}: {weights.describe(left_out)}")
    description = {"model": args.model, "parameters": sum(p.numel() for p in model.parameters()),
                   "checkpoint": str(path), "weights": weights.kind, "weights_key": weights.key, "vae": named.name,
                   "vae_sha256": origin.sha256}
    if identify and is_main():
        description.update(checkpoint_sha256=checksum or file_hash(path))
    prepare.for_sampling(model.to(device), AUTOCAST.get(precision))
    if args.compile:
        check_compiler(device)
        prepare.compile_sampling(model, args.compile)
    log(prepare.describe_attention(model, AUTOCAST.get(precision)))
    log(f"{args.model}: {description['parameters']:,} parameters from {path}")
    return model, vae.to(device), description, precision


def recognise(args, state, path, vae):
    """The options with the size and geometry that checkpoint and VAE tell; FlowARError where they contradict them."""
    geometry = recognise_geometry(state, path, vae.embed_dim)
    check_geometry(args, geometry, path)
    known = {"vae_embed_dim": vae.embed_dim, "vae_stride": vae.stride, **geometry}
    known["img_size"] = known["scales"][-1] * known["patch_size"] * vae.stride
    check_geometry(args, {"img_size": known["img_size"]}, path)
    return resolve_geometry(args, {**known, **(recognise_size(state, path) if args.model is None else {})})


def build_sampler(args, model, vae, precision, classes=None):
    """The Sampler of options with one value each; classes: see Sampler."""
    return Sampler(model, vae, sampling_options(args), precision, args.seed, args.eval_bsz, args.resume or "the EMA",
                   classes)


def build_labels(args, count, classes):
    """The Labels of the options for `count` images of a model's Classes."""
    return from_main(lambda: choose_labels(args.labels, count, classes, args.all_classes))


def plan_reports(args, data):
    """The Plan of the reports during training; data: what checkpoints remember of it, see util.training.provenance."""
    classes = classes_of(data, args.class_num, "the training set")
    return Plan(build_labels(args, args.eval_num_images, classes), persistent=False)


def build_measure(args, img_size, labels, device):
    """The Measure of the options: what is missing is said before anything is sampled or trained."""
    extractor = build_extractor(args.feature_extractor, args.fid_weights, device)
    reference = find_reference(args.fid_stats, args.ref_images, extractor, img_size, device,
                               args.background or WHITE)
    if reference is not None and len(labels.values) < 2:
        raise FlowARError("--num_images 1: a distance needs the covariance of at least 2 images")
    warn_of_mix(labels, reference)
    return Measure(extractor, reference)


def open_evaluation(args, device):
    """What engine_flowar.evaluate_sweep takes: ({name: Sampler}, Plan, Measure, description, output folder)."""
    agree("the code (models/, util/, engine_flowar.py)", CODE)
    set_way_on("the same command goes on", "with the batches that are missing")
    model, vae, description, precision = open_for_sampling(args, device, identify=True)
    classes = from_main(lambda: read_classes(Path(description["checkpoint"]), model.class_num))
    labels = build_labels(args, args.num_images, classes)
    measure = build_measure(args, model.img_size, labels, device)
    samplers = {name: build_sampler(point, model, vae, precision) for name, point in sweep_points(args).items()}
    return samplers, Plan(labels, args.save_images, args.save_npz), measure, description, Path(args.output_dir)
