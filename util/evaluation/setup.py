"""From options to what samples and measures: the door that eval.py, main_flowar.py --evaluate and scripts share."""
from pathlib import Path
from typing import NamedTuple

import torch

from models import FlowARError
from models.files import file_hash, tensors_hash
from models.registry import model_state, open_model, recognise_geometry, recognise_size
from models.vaes import find_vae
from util.cluster import AUTOCAST, check_compiler, is_main, log, set_precision, set_way_on
from util.evaluation.metrics import build_extractor, compute_metrics
from util.evaluation.references import Reference, find_reference
from util.evaluation.sampler import Sampler
from util.options import check_geometry, check_vae, model_options, resolve_geometry, sampling_options, sweep_points
from util.speed import prepare
from util.training.checkpoint import read_model_file


class Measure(NamedTuple):
    """What images are measured with."""
    extractor: object  # of metrics.EXTRACTORS
    reference: Reference | None

    def settings(self):
        """What must agree when an evaluation goes on."""
        extractor, name = self.extractor, self.reference.name if self.reference else None
        return {"reference": name, "feature_extractor": extractor.name,
                "extractor_sha256": tensors_hash(extractor.network.state_dict()),
                "extractor_resize": extractor.resize, "extractor_batch": extractor.batch}

    def compute(self, found, device):
        """The metrics, and their names, of all batches' {features, logits if any} in the images' order."""
        features = torch.cat([part["features"] for part in found])
        logits = torch.cat([part["logits"] for part in found]) if "logits" in found[0] else None
        if len(features) <= self.extractor.dim and self.reference is not None:
            log(f"warning: {len(features)} images for {self.extractor.dim} features: the covariance is rank-deficient "
                "and the distance is biased upwards")
        values = compute_metrics(features, logits, self.reference, self.extractor, device)
        return {**values, "metrics": list(values)}


class Plan(NamedTuple):
    """What an evaluation makes and writes."""
    num_images: int
    save_images: bool = False  # as PNGs
    save_npz: bool = False  # as ADM's sample file
    persistent: bool = True  # False keeps nothing and starts anew: the evaluations during training

    def settings(self):
        """What must agree when an evaluation goes on."""
        return {"num_images": self.num_images, "save_images": self.save_images, "save_npz": self.save_npz}


def open_for_sampling(args, device):
    """(model, VAE, description for a report, precision) of --resume and --vae_path, as the other options want them."""
    if not args.resume:
        raise FlowARError("--resume is missing: "
                          "give a checkpoint, a directory with checkpoint-last.pth or a .safetensors")
    release = "fp16" if device.type == "cuda" else None  # as the release samples and decodes
    precision = set_precision(args.precision or release, device)
    path, content = read_model_file(args.resume)
    state = model_state(content, path)
    del content
    named = find_vae(args.vae, args.vae_path)
    vae, unused = named.open()
    if unused:
        log(f"{named.name}: {len(unused)} tensors are not the VAE's and were left out")
    args = recognise(args, state, path, vae)
    check_vae(vae, args)
    model = open_model(state, path, args.model, **model_options(args))
    description = {"model": args.model, "parameters": sum(p.numel() for p in model.parameters()),
                   "checkpoint": str(path), "vae": named.name}
    if is_main():
        description.update(checkpoint_sha256=file_hash(path), vae_sha256=named.identity(vae))
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


def build_sampler(args, model, vae, precision):
    """The Sampler of options with one value each."""
    return Sampler(model, vae, sampling_options(args), precision, args.seed, args.eval_bsz, args.resume or "the EMA")


def build_measure(args, img_size, num_images, device):
    """The Measure of the options: what is missing is said before anything is sampled or trained."""
    extractor = build_extractor(args.feature_extractor, args.fid_weights, device)
    reference = find_reference(args.fid_stats, args.ref_images, extractor, img_size, device)
    if reference is not None and num_images < 2:
        raise FlowARError("--num_images 1: a distance needs the covariance of at least 2 images")
    return Measure(extractor, reference)


def open_evaluation(args, device):
    """What engine_flowar.evaluate_sweep takes: ({name: Sampler}, Plan, Measure, description, output folder)."""
    set_way_on("the same command goes on", "with the batches that are missing")
    model, vae, description, precision = open_for_sampling(args, device)
    measure = build_measure(args, model.img_size, args.num_images, device)
    samplers = {name: build_sampler(point, model, vae, precision) for name, point in sweep_points(args).items()}
    return samplers, Plan(args.num_images, args.save_images, args.save_npz), measure, description, Path(args.output_dir)
