"""From options to what samples and measures: the door that eval.py, main_flowar.py --evaluate and scripts share."""
import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from models import FlowARError
from models.hub import RELEASE, beside, is_remote, release_of
from models.registry import open_model, recognise_size
from models.vae import LatentScale
from models.variants.ablated import describe, read_variant
from models.vaes import DEFAULT_PATH, find_vae, read_latent_scale
from models.weights import file_hash, find_model, recognise_geometry, saved_options, tensors_hash
from util import manifest
from util.cluster import AUTOCAST, agree, check_compiler, fetch, from_main, is_main, log, set_precision, set_way_on
from util.data.pixels import WHITE
from util.evaluation.extractors import Joint, build_extractors
from util.evaluation.labels import Classes, Labels, choose_labels, classes_of, warn_of_mix
from util.evaluation.metrics import compute_metrics, warn_of_few
from util.evaluation.references import Reference, find_references
from util.evaluation.reports import CODE
from util.evaluation.sampler import Sampler
from util.options import (GEOMETRY, SAMPLING, as_text, check_geometry, check_vae, model_options, resolve_geometry,
                          sampling_options, sweep_points, with_options)
from util.speed import prepare
from util.training.checkpoint import read_model_file
from util.training.record import LatentOrigin, check_origin, origin_of, saved_data, saved_origin

KL16_VAE = "kl16"  # --vae's default


class Measure(NamedTuple):
    """What images are measured with."""
    extractor: Joint
    references: list  # a Reference, or None, for each of its parts

    def open(self, look=False):
        """Extract what of the references is still to be had, all ranks together; returns self. look: do not."""
        for reference in filter(None, [] if look else self.references):
            reference.open()
        return self

    @property
    def reference(self):
        """The first, which knows what they have in common: the images."""
        return next(filter(None, self.references), Reference(None))

    def settings(self):
        """What must agree when an evaluation goes on."""
        reference, parts = self.reference, self.extractor.parts
        alike = len({one.sha256 for one in self.references if one}) < 2  # those of one folder are
        return {"reference": reference.name, "reference_times": reference.times,
                "reference_sha256": reference.sha256 if alike else [one and one.sha256 for one in self.references],
                "reference_background": reference.background, "feature_extractor": self.extractor.name,
                "extractor_sha256": one_or_all(tensors_hash(part.network.state_dict()) for part in parts),
                "extractor_resize": one_or_all(part.resize for part in parts),
                "extractor_batch": one_or_all(part.batch for part in parts)}

    def compute(self, found, device):
        """The metrics, and their names, of all batches' {features, logits if any} in the images' order."""
        features = self.extractor.split(torch.cat([part["features"] for part in found]))
        logits = torch.cat([part["logits"] for part in found]) if "logits" in found[0] else None
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


class Plan(NamedTuple):
    """What an evaluation makes and writes."""
    labels: Labels
    save_images: bool = False  # as PNGs
    save_npz: bool = False  # as ADM's sample file
    persistent: bool = True  # False keeps nothing and starts anew: the evaluations during training
    begun: dict | None = None  # for run.json, see util.manifest

    @property
    def num_images(self):
        return len(self.labels.values)

    def settings(self):
        """What must agree when an evaluation goes on."""
        return {"num_images": self.num_images, "save_images": self.save_images, "save_npz": self.save_npz,
                **self.labels.settings()}


class Opened(NamedTuple):
    """What samples are made with."""
    model: torch.nn.Module
    vae: torch.nn.Module
    precision: str
    description: dict  # for a report
    classes: Classes
    sampling: dict  # settings that the checkpoint asks for, see options.sampling_options
    guide: torch.nn.Module | None  # of autoguidance
    data: dict  # that it was trained on, {} if it does not say it
    origin: LatentOrigin  # the VAE


def open_for_sampling(args, device, identify=False):
    """The Opened of --resume and --vae_path, as the other options want them.
    identify: with the weights' hash, for which those without a checksum are read once more, by rank 0."""
    if not args.resume:
        raise FlowARError("--resume is missing: give a checkpoint, a directory with checkpoint-last.pth, a "
                          ".safetensors, or a name such as released:flowar_small")
    release = "fp16" if device.type == "cuda" else None  # as the release samples and decodes
    precision = set_precision(args.precision or release, device)
    path, content = read_model_file(args.resume)
    weights = find_model(content, path, args.weights)
    checksum = content.get("checksum")  # of its content, and verified when it was found
    checksum = checksum if isinstance(checksum, str) else None
    trained_with = saved_origin(content)
    is_run = "optimizer" in content  # not weights alone
    if trained_with.sha256 is None and is_run:
        log(f"{path}: does not say with which VAE it was trained: whether it is this one cannot be checked")
    sampling, data = saved_sampling(content, args.resume), content.get("data")
    if "teacher_sampling" in saved_options(content) and args.cfg not in (None, (1.0,)):
        log(f"warning: {path}: a student, which learned without the null class: --cfg above 1 is nothing it knows")
    vae, vae_path = choose_vae(args, content, path)
    named, args = find_vae(vae, vae_path), with_options(args, vae=vae, vae_path=vae_path)
    fetch(named.path)
    vae, notes = named.open()
    for note in notes:  # which may explain what is refused
        log(note)
    if saved_options(content).get("latent_norm") == "channel":
        vae.latent_scale = trained_scale(trained_with, path, vae.embed_dim)
    origin = origin_of(named, vae)
    check_origin(path, trained_with, origin)
    named_size, args = args.model, recognise(args, weights.tensors, path, vae)
    classes, data = from_main(lambda: classes_of(data, args.class_num, path, is_run)), saved_data(content)
    del content
    check_vae(vae, args)
    try:
        model, left_out = open_model(weights.tensors, path, args.model, **model_options(args))
    except FlowARError as error:
        way_on = "; leave out --model, --diffloss_d and --diffloss_w: the file tells them" if named_size else ""
        raise FlowARError(f"{error}{way_on}") from error
    log(f"{path}: {weights.describe(left_out)}")
    description = {"model": args.model, "parameters": sum(p.numel() for p in model.parameters()),
                   "checkpoint": str(args.resume if is_remote(args.resume) else path), "weights": weights.kind,
                   "weights_key": weights.key, "vae": named.name, "vae_sha256": origin.sha256}
    if identify and is_main():
        description.update(checkpoint_sha256=checksum or file_hash(path))
    guide = open_guide(args, model, description, origin)
    model, vae = model.to(device), vae.to(device)
    networks = [model] if guide is None else [model, guide.to(device)]
    if args.compile:
        check_compiler(device)
    prepare.for_evaluation(networks, vae, AUTOCAST.get(precision), args.compile)
    log(f"{args.model}{describe(model)}: {description['parameters']:,} parameters from {path}")
    return Opened(model, vae, precision, description, classes, sampling, guide, data, origin)


def trained_scale(trained_with, path, channels):
    """The LatentScale that a run with --latent_norm channel had in the VAE's place, out of its LatentOrigin."""
    if trained_with.latent_scale is None:
        raise FlowARError(f"{path}: was trained with --latent_norm channel, but does not hold the mean and std of its "
                          "latents' channels ('vae': {'latent_scale': ...}): nothing can be decoded; take the run's "
                          "own checkpoint")
    return LatentScale(*read_latent_scale(trained_with.latent_scale, path, channels))


def open_guide(args, model, description, origin):
    """The model of --guide, of the model's geometry and latents, None without one; the description gets what it is."""
    if not args.guide:
        return None
    path, content = read_model_file(args.guide)
    check_origin(f"--guide {path}", saved_origin(content), origin)
    weights = find_model(content, path)
    size = recognise_size(weights.tensors, path)
    geometry = {name: model.config[name] for name in GEOMETRY.keys() - {"model"} | {"scale"}}
    guide, left_out = open_model(weights.tensors, path, size.pop("model"), **geometry, **size)
    log(f"--guide {path}: {weights.describe(left_out)}")
    description.update(guide=args.guide, guide_tensors=tensors_hash(guide.state_dict()))
    if description["guide_tensors"] == tensors_hash(model.state_dict()):
        raise FlowARError(f"--guide {path}: it is the model itself, which guides nowhere: give weaker weights")
    return guide


def choose_vae(args, content, path):
    """(--vae, --vae_path): those given, else the run's own, else KL-16's default file if it is there, else released.
    content: of the checkpoint found at `path`; an export's VAE may lie beside it.
    """
    if args.vae != KL16_VAE or args.vae_path:
        return args.vae, args.vae_path
    vae, file = (saved_options(content).get(name) for name in ("vae", "vae_path"))
    if isinstance(vae, str) and vae.startswith("diffusers:"):
        return vae, None
    if isinstance(file, str) and file and vae == KL16_VAE:
        return KL16_VAE, beside(file, args.resume, path) if "weights_key" in content else file
    return KL16_VAE, DEFAULT_PATH if from_main(Path(DEFAULT_PATH).is_file) else RELEASE + "kl16"


def saved_sampling(content, name):
    """Settings of sampling that a checkpoint was published with, or its run was given; {} if there are none."""
    release, options = release_of(name), saved_options(content)
    said = release.sampling if release else {argument: options[setting.option] for argument, setting in SAMPLING.items()
                                             if options.get(setting.option) is not None}
    try:
        said = {argument: SAMPLING[argument].kind(as_text(value)) for argument, value in said.items()}
    except argparse.ArgumentTypeError as error:
        raise FlowARError(f"{name}: its settings of sampling: {error}") from error
    unlike = [f"--{SAMPLING[argument].option} {as_text(value)}"
              for argument, value in said.items() if value != SAMPLING[argument].default]
    if unlike:
        together = " (--num_step replaces both)" if said.get("num_steps_last") else ""
        log(f"{name}: sampled with {', '.join(unlike)} where no option says otherwise{together}")
    return said


def recognise(args, state, path, vae):
    """The options with the size and geometry that checkpoint and VAE tell; FlowARError where they contradict them."""
    geometry = recognise_geometry(state, path, vae.embed_dim)
    check_geometry(args, geometry, path)
    known = {"vae_embed_dim": vae.embed_dim, "vae_stride": vae.stride, **geometry}
    known["img_size"] = known["scales"][-1] * known["patch_size"] * vae.stride
    check_geometry(args, {"img_size": known["img_size"]}, path)
    size = recognise_size(state, path) if args.model is None else read_variant(state, path)
    return resolve_geometry(args, {**known, **size})


def build_sampler(args, model, vae, precision, classes=None, stored=None, guide=None):
    """The Sampler of options with one value each; classes, guide: see Sampler; stored: see sampling_options."""
    options = sampling_options(with_options(args, scales=model.scale), stored)
    return Sampler(model, vae, options, precision, args.seed, args.eval_bsz, args.resume or "the EMA", classes, guide)


def build_labels(args, count, classes):
    """The Labels of the options for `count` images of a model's Classes."""
    return from_main(lambda: choose_labels(args.labels, count, classes, args.all_classes))


def plan_reports(args, data):
    """The Plan of the reports during training; data: what checkpoints remember of it, see util.training.record."""
    sampling_options(args)  # what is wrong with them is said now
    classes = classes_of(data, args.class_num, "the training set")
    return Plan(build_labels(args, args.eval_num_images, classes), persistent=False)


def build_measure(args, img_size, labels, device):
    """The Measure of the options: what is missing is said before anything is sampled or trained."""
    extractor = build_extractors(args.feature_extractor, args.fid_weights, device)
    if args.compile and not getattr(args, "dry_run", False):
        check_compiler(device)
        prepare.compile_features(extractor)
    references = find_references(args.fid_stats, args.ref_images, extractor, img_size, device, args.background or WHITE)
    if any(references) and len(labels.values) < 2:
        raise FlowARError("--num_images 1: a distance needs the covariance of at least 2 images")
    measure = Measure(extractor, references)
    warn_of_mix(labels, measure.reference)
    return measure


def open_evaluation(args, device):
    """What engine_flowar.evaluate_sweep takes: ({name: Sampler}, Plan, Measure, description, output folder)."""
    agree("the code (models/, util/, engine_flowar.py)", CODE)
    set_way_on("the same command goes on", "with the batches that are missing")
    opened = open_for_sampling(args, device, identify=True)
    shared = opened.model, opened.vae, opened.precision, None, opened.sampling, opened.guide
    samplers = {name: build_sampler(point, *shared) for name, point in sweep_points(args).items()}
    labels = build_labels(args, args.num_images, opened.classes)
    if args.background and not args.ref_images:
        raise FlowARError("--background is of transparent images in --ref_images: leave it out")
    measure = build_measure(args, opened.model.img_size, labels, device)
    record = {"args": vars(args), "data": opened.data, "vae": opened.origin._asdict()}
    begun = manifest.begin(record, device, evaluated=opened.description)
    plan = Plan(labels, args.save_images, args.save_npz, begun=begun)
    return samplers, plan, measure, opened.description, Path(args.output_dir)
