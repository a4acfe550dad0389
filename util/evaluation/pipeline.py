"""From options, or a name in Python, to what samples: an evaluation's parts, and pictures.

    pipe = load_pipeline("released:flowar_small", vae="released:kl16")
    images = pipe(["golden retriever", 207], cfg=4.3, seed=0)

Of this room, this module alone knows the options.
"""
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

from models import FlowARError
from models.hub import is_name, name_of_sibling, release_of
from models.registry import open_model, read_variant, recognise_size
from models.settings import Sampling, as_text, check_value, one_of
from models.vae import LatentScale
from models.variants.ablated import describe
from models.vaes import DEFAULT_PATH, VAES, find_vae, read_latent_scale, saved_vae_path
from models.weights import file_hash, find_model, recognise_geometry, saved_options, tensors_hash
from util import manifest
from util.cluster import (AUTOCAST, PRECISIONS, autocast, fetch, from_main, is_main, log, select_device,
                          set_precision)
from util.data import center_crop, open_image, to_tensor
from util.data.pixels import WHITE, over
from util.evaluation.labels import Classes, choose_labels, class_names, classes_of, find_label
from util.evaluation.metrics import build_measure
from util.evaluation.sampler import Sampler
from util.evaluation.store import Plan
from util.geometry import GEOMETRY, compare_geometry, check_vae, resolve_geometry
from util.options import SamplingOptions, check_single, given_settings, model_options, stored_settings, sweep
from util.speed import prepare
from util.training.checkpoint import open_on_all
from util.training.record import LatentOrigin, check_origin, origin_of, saved_data, saved_origin


class OpenedModel(NamedTuple):
    """What --resume and its VAE are opened as."""
    sampler: Sampler  # with the settings of the checkpoint
    description: dict  # for a report
    classes: Classes
    data: dict  # that the model was trained on, {} if the checkpoint does not say it
    origin: LatentOrigin  # the VAE


def open_for_sampling(args, device, identify=False):
    """The OpenedModel of --resume and its VAE, as the other options want them. All ranks call it: rank 0 finds the
    files. identify: with the file's hash, for which rank 0 reads it once more.
    """
    if not args.resume:
        raise FlowARError("--resume is missing: pass a checkpoint, a directory with checkpoint-last.pth, a "
                          ".safetensors, or a name such as demo:fashion")
    default = "fp16" if device.type == "cuda" else None  # as the release samples and decodes
    precision = set_precision(args.precision or default, device)
    checkpoint = open_on_all(args.resume)
    path, content = checkpoint.path, checkpoint.content
    weights = find_model(content, path, args.weights)
    sampling = Sampling.of({}, saved_sampling(content, args.resume))
    vae_name, vae, origin = open_vae(args, checkpoint)
    args = recognise_model(args, weights.tensors, path, vae)
    check_vae(vae, args, vae_name)
    choices = {**model_options(args), **read_variant(weights.tensors, path)}  # the file tells which ablation it is
    model, left_out = open_model(weights.tensors, path, args.model, **choices)
    log(f"{path}: {weights.describe(left_out)}")
    description = {"model": args.model, "parameters": sum(p.numel() for p in model.parameters()),
                   "checkpoint": str(args.resume if is_name(args.resume) else path), "weights": weights.kind,
                   "weights_key": weights.key, "vae": vae_name, "vae_sha256": origin.sha256}
    if identify and is_main():
        description["checkpoint_sha256"] = file_hash(path)
    networks, guide = [model], None
    if args.guide:
        description["guide"] = args.guide
        guide, description["guide_tensors"] = open_guide(args.guide, model, origin)
        networks.append(guide.to(device))
    model, vae = model.to(device), vae.to(device)
    prepare.for_evaluation(networks, vae, AUTOCAST.get(precision), args.compile)
    log(f"{args.model}{describe(model)}: {description['parameters']:,} parameters from {path}")
    sampler = Sampler(model, vae, sampling, precision, args.seed, args.eval_bsz, args.resume, guide)
    data = saved_data(content)
    return OpenedModel(sampler, description, classes_of(data, args.class_num, path), data, origin)


def open_vae(args, checkpoint):
    """(name, VAE, its LatentOrigin) for the weights of a Checkpoint; FlowARError for another than they were trained
    with. Rank 0 chooses.
    """
    named = find_vae(from_main(lambda: choose_vae(args, checkpoint)))
    fetch(named.name)
    vae, notes = named.open()
    for note in notes:  # which may explain what is refused
        log(note)
    trained_with = saved_origin(checkpoint.content)
    if checkpoint.options.get("latent_norm") == "channel":
        vae.latent_scale = LatentScale(*read_latent_scale(trained_with.latent_scale, checkpoint.path))
    origin = from_main(lambda: origin_of(named, vae))
    check_origin(checkpoint.path, trained_with, origin)
    return named.name, vae, origin


def choose_vae(args, checkpoint):
    """--vae_path, else the VAE of the checkpoint's run, else KL-16's default file if it is there, else the released."""
    if args.vae_path:
        return args.vae_path
    content, options = checkpoint.content, checkpoint.options
    name = saved_vae_path(options)
    if not name or "vae" not in content and "vae" not in options:  # the release's: a path on its authors' machine
        return DEFAULT_PATH if Path(DEFAULT_PATH).is_file() else "released:kl16"
    is_export, is_file = "weights_key" in content, name.partition(":")[0] not in VAES
    if is_export and is_file:  # which may lie beside the export
        return name_of_sibling(name, args.resume, checkpoint.path)
    return name


def open_guide(name, model, origin):
    """(model of --guide, SHA-256 over its tensors); its geometry and latents are those of another model."""
    checkpoint = open_on_all(name)
    path = checkpoint.path
    check_origin(f"--guide {path}", saved_origin(checkpoint.content), origin)
    weights = find_model(checkpoint.content, path)
    size = recognise_size(weights.tensors, path)
    geometry = {name: model.config[name] for name in GEOMETRY.keys() - {"model"} | {"scale"}}
    guide, left_out = open_model(weights.tensors, path, size.pop("model"), **geometry, **size)
    log(f"--guide {path}: {weights.describe(left_out)}")
    return guide, tensors_hash(guide.state_dict())


def saved_sampling(content, name):
    """Settings of sampling that a checkpoint was published with, or its run was given; {} if there are none."""
    release = release_of(name)
    stored = release.sampling if release else stored_settings(saved_options(content))
    sampling, default = Sampling.of({}, stored), Sampling().by_option()
    chosen = [f"--{option} {as_text(value)}" for option, value in sampling.by_option().items()
              if value != default[option]]
    if chosen:
        log(f"{name}: sampling options default to {', '.join(chosen)}")
    return {setting: getattr(sampling, setting) for setting in stored}


def recognise_model(args, state, path, vae):
    """The options with the size and geometry that checkpoint and VAE tell; FlowARError where they contradict them."""
    geometry = recognise_geometry(state, path, vae.embed_dim)
    geometry["img_size"] = geometry["scales"][-1] * geometry["patch_size"] * vae.stride
    compare_geometry(args, geometry, path)
    geometry.update(vae_embed_dim=vae.embed_dim, vae_stride=vae.stride)
    if args.model is None:
        size = recognise_size(state, path)
        geometry.update({name: size[name] for name in ("model", "diffloss_d", "diffloss_w")})
    return resolve_geometry(args, geometry)


def change_settings(sampler, settings):
    """A Sampler with other settings of models.settings.Sampling; FlowARError for what is none of them."""
    sampling = Sampling.of(vars(sampler.sampling), settings)
    sampler.model.schedule_sampling(sampling)  # refuses what does not fit
    return sampler._replace(sampling=sampling)


def choose_settings(sampler, args):
    """A Sampler with the settings that options, one value each, choose."""
    sampler = change_settings(sampler, given_settings(args))
    if args.guide and max(sampler.sampling.guidance_weights(len(sampler.model.scale))) <= 1:
        raise FlowARError(f"--guide {args.guide} needs --cfg above 1")
    return sampler


def plan_reports(args, data):
    """The Plan of the reports during training; data: what checkpoints remember of it, see util.training.record."""
    classes = classes_of(data, args.class_num, "the training set")
    return Plan(choose_labels(args.labels, args.num_images, classes), persistent=False)


def open_evaluation(args, device):
    """What engine_flowar.evaluate_sweep takes: ({name: Sampler}, Plan, Measure, description, output folder)."""
    opened = open_for_sampling(args, device, identify=True)
    samplers = {name: choose_settings(opened.sampler, point) for name, point in sweep(args).items()}
    labels = from_main(lambda: choose_labels(args.labels, args.num_images, opened.classes))
    measure = build_measure(args, opened.sampler.model.img_size, labels, device)
    record = {"args": vars(args), "data": opened.data, "vae": opened.origin._asdict()}
    start = manifest.describe_start(record, device, evaluated=opened.description)
    plan = Plan(labels, "png" in args.save_images, "npz" in args.save_images, start=start)
    return samplers, plan, measure, opened.description, Path(args.output_dir)


# ---- pictures in Python: scripts/sample.py and scripts/app.py are built on them --------------------------------


def load_pipeline(resume, vae=None, device=None, precision=None, **options):
    """The Pipeline of weights and a VAE, by path or name as --resume and --vae_path take them.

    vae: by default the run's, else KL-16. device: "cpu" or "cuda", by default CUDA where there is one. options: of
    util.options.SamplingOptions, weights="raw", cfg=3.0, num_step=(25, 25, 12). Raises FlowARError.
    """
    for name, value in options.items():
        if isinstance(value, list):  # which for an option is a sweep
            options[name] = tuple(value)
    if vae is not None:
        options["vae_path"] = vae
    args = SamplingOptions(resume=str(resume), device=str(device or "auto"), precision=precision, **options)
    return open_pipeline(args, select_device(args.device))


def open_pipeline(args, device, identify=False):
    """The Pipeline of SamplingOptions, one value each. identify: see open_for_sampling."""
    check_single(args)
    sampler, description, classes, *_ = open_for_sampling(args, device, identify)
    return Pipeline(choose_settings(sampler, args), class_names(classes), classes, description)


class Pipeline:
    """Pictures (PIL, RGB) of a model. A label is a number or a class's name; settings are FlowAR.sample_tokens'
    arguments (cfg, num_steps, guidance, solver, ...), by default those that the weights were published or saved with.
    An image follows from its seed, its index in the list and its label, as in scripts/sample.py and eval.py.

    sampler: Sampler; names: of the classes, in the order of the labels; description: of weights and VAE.
    """

    def __init__(self, sampler, names, classes, description):
        self.sampler, self.names, self.classes, self.description = sampler, names, classes, description

    def __call__(self, labels, *, seed=0, **settings):
        """One image for each of a list of labels."""
        labels = getattr(labels, "tolist", lambda: labels)()  # of an array
        if isinstance(labels, (str, int)):
            labels = [labels]
        labels = [self.label(label) for label in labels]
        return self.draw(labels, self.noise(seed, range(len(labels))), **settings)

    def settings(self):
        """What pictures are made with, for those who want to make them again."""
        return {**self.description, **self.sampler.settings()}

    def using(self, precision=None, **settings):
        """The same with other settings, and in another precision; fp32 and tf32 are modes of the whole process."""
        sampler = change_settings(self.sampler, settings)
        precision = check_value("precision", one_of(*PRECISIONS), precision or sampler.precision)
        rounded = sampler.model.z_proj.weight.dtype
        if precision != sampler.precision and rounded != torch.float32:
            raise FlowARError(f"precision {precision}: this pipeline was opened with weights in {rounded}: open it in "
                              "fp32 to change the precision")
        sampler = sampler._replace(precision=set_precision(precision, sampler.device))
        return Pipeline(sampler, self.names, self.classes, self.description)

    def label(self, label):
        """Number of a class by number or name."""
        return find_label(label, self.names)

    def noise(self, seed, indices):
        """Starting noise of the images with these indices, see Sampler.noise."""
        return self.sampler._replace(seed=seed).noise(indices)

    def draw(self, labels, noise, **settings):
        """One image for each label and noise; settings may hold `given` and `known` of FlowAR.sample_pyramid."""
        return self.pictures(self.latents(labels, noise, **settings)[-1])

    def latents(self, labels, noise, *, given=(), known=None, **settings):
        """The pyramid of all images, see FlowAR.sample_pyramid."""
        sampler, parts = change_settings(self.sampler, settings), []
        for first in range(0, len(labels), sampler.batch):
            part = slice(first, first + sampler.batch)
            fixed = {"given": [x[part] for x in given]}
            if known is not None:
                fixed["known"] = [x[part] for x in known[0]], known[1]
            parts.append(sampler.pyramid(labels[part], [e[part] for e in noise], **fixed))
        return [torch.cat(scale) for scale in zip(*parts)]

    def pictures(self, grids):
        """PIL images of the last scale's latents, (n, token_channels, S, S)."""
        return self.decode(self.sampler.model.unpatchify(grids))

    def decode(self, latents):
        """PIL images of scaled latents (n, C, h, w)."""
        images, finite = self.sampler.decode(latents)
        self.sampler.refuse_not_finite((~finite).nonzero().flatten().tolist(), len(images))
        return [Image.fromarray(image.numpy()) for image in images.permute(0, 2, 3, 1).cpu()]

    # ---- what a scale-wise model can do ------------------------------------------------------------------------

    def grow(self, label, *, seed=0, **settings):
        """The image after every scale, coarse to fine: each scale's latent, enlarged to full size, decoded."""
        return self.grown(self.latents([self.label(label)], self.noise(seed, [0]), **settings))

    def grown(self, pyramid):
        """The pictures of grow() of one image's pyramid."""
        scales = [self.sampler.model.unpatchify(x) for x in pyramid]
        size = scales[-1].shape[-2:]
        return self.decode(torch.cat([F.interpolate(x, size=size, mode="bicubic") for x in scales]))

    def variations(self, label, *, keep_scales=None, count=8, seed=0, **settings):
        """`count` images that share the first keep_scales latents of pipe([label], seed=seed), which is the first.
        keep_scales: by default 3, or all but one of a model with fewer.
        """
        given = self._first_scales(label, keep_scales, seed, settings)
        given = [x.expand(count, -1, -1, -1) for x in given]
        return self.draw([self.label(label)] * count, self.noise(seed, range(count)), given=given, **settings)

    def edit(self, label_from, label_to, keep_scales=None, *, seed=0, **settings):
        """One image: that of pipe([label_from], seed=seed) whose later scales are drawn for label_to, of one noise."""
        given = self._first_scales(label_from, keep_scales, seed, settings)
        return self.draw([self.label(label_to)], self.noise(seed, [0]), given=given, **settings)

    def _first_scales(self, label, keep_scales, seed, settings):
        """The first keep_scales latents of pipe([label], seed=seed)."""
        scales = len(self.sampler.model.scale)
        keep_scales = min(3, scales - 1) if keep_scales is None else keep_scales
        if not 0 <= keep_scales <= scales:
            raise FlowARError(f"keep_scales is {keep_scales}: expected 0 to {scales}, the number of scales")
        return self.latents([self.label(label)], self.noise(seed, [0]), **settings)[:keep_scales]

    def interpolate(self, label, seed_a, seed_b, count=8, **settings):
        """`count` images, two or more, between those of two seeds: their noise on the arc between theirs."""
        noise = []
        for a, b in zip(self.noise(seed_a, [0]), self.noise(seed_b, [0])):
            noise.append(torch.cat([slerp(a, b, i / (count - 1)) for i in range(count)]))
        return self.draw([self.label(label)] * count, noise, **settings)

    def inpaint(self, image, mask, label, *, count=1, seed=0, **settings):
        """`count` images with the white parts of `mask` drawn anew. image, mask: PIL, or paths, of one size; both are
        cropped to the model's. A cell of a scale is kept if no pixel of it is white.
        """
        sampler, size = self.sampler, self.sampler.model.img_size
        image, mask = as_rgb(image), as_rgb(mask)
        if image.size != mask.size:
            raise FlowARError(f"the mask is {mask.width}x{mask.height} pixels, the image {image.width}x{image.height}: "
                              "expected the same size")
        image, mask = (to_tensor(center_crop(picture, size))[None] for picture in (image, mask))
        keep = mask.amax(dim=1, keepdim=True) <= -1 + 2 * DARK
        with torch.no_grad(), autocast(sampler.device, sampler.vae_precision):
            latents = sampler.vae.encode(image.to(sampler.device)).mode()
        pyramid = sampler.model.pyramid(sampler.vae.latent_scale.normalize(latents.float()))
        cells = [F.interpolate(keep.float(), size=(s, s), mode="area") == 1 for s in sampler.model.scale]
        known = [x.expand(count, -1, -1, -1) for x in pyramid], cells
        return self.draw([self.label(label)] * count, self.noise(seed, range(count)), known=known, **settings)

    def trajectory(self, label, *, seed=0, **settings):
        """The last scale on its way: what the flow head reads at each of its evaluations, decoded, and the image."""
        model, seen = self.sampler.model, []
        hook = model.flownet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:1].float()))
        try:
            last = self.latents([self.label(label)], self.noise(seed, [0]), **settings)[-1]
        finally:
            hook.remove()
        side = model.scale[-1]
        path = [x.transpose(1, 2).unflatten(2, (side, side)) for x in seen if x.shape[1] == side * side]
        return self.pictures(torch.cat([*path, last]))


DARK = 0.5  # of white; darker is kept


def as_rgb(image):
    """RGB image of one of any mode, or of a path."""
    return over(image, WHITE)[0] if isinstance(image, Image.Image) else open_image(image)


def slerp(a, b, part):
    """Between two tensors of normal noise on the arc from a to b: the norm stays that of noise."""
    if part == 1:
        return b
    angle = torch.arccos(F.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1))
    if part == 0 or angle < 1e-6:
        return a
    return (torch.sin((1 - part) * angle) * a + torch.sin(part * angle) * b) / torch.sin(angle)
