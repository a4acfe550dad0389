"""From a name to pictures in Python; scripts/sample.py and scripts/app.py are built on it.

    pipe = load_pipeline("released:flowar_small", vae="released:kl16")
    images = pipe(["golden retriever", 207], cfg=4.3, seed=0)
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from models import FlowARError
from util.cluster import PRECISIONS, autocast, select_device, set_precision
from util.data import center_crop, open_image
from util.data.images import to_tensor
from util.data.pixels import WHITE, over
from util.evaluation.names import class_names, find_label
from util.evaluation.setup import build_sampler, open_for_sampling
from util.options import checked, sampling_parser, seed as seed_of, single_point, with_options


def load_pipeline(resume, vae=None, device=None, precision=None, **options):
    """The Pipeline of weights and a VAE, by path or name as --resume and --vae_path (or --vae diffusers:...) take them.

    vae: by default that of the run, else KL-16. device: "cpu" or "cuda", by default CUDA where there is one. precision,
    options (weights="raw", cfg=3.0, ...): see docs/options.md. Raises FlowARError.
    """
    kind = {"vae": vae} if str(vae or "").startswith("diffusers:") else {"vae_path": vae}
    parser = sampling_parser("")
    known, given = {action.dest: action for action in parser._actions}, {**options, "precision": precision,
                                                                         "device": str(device or "auto")}
    for name, value in given.items():
        if name not in known:
            raise FlowARError(f"{name}: no option of this name (see docs/options.md)")
        if known[name].choices and value not in (None, *known[name].choices):
            raise FlowARError(f"{name} is {value!r}: expected one of {', '.join(known[name].choices)}")
        if known[name].type and value is not None:
            given[name] = checked(name, known[name].type, value)
    args = single_point(with_options(parser.parse_args([]), resume=str(resume), **kind, **given))
    return open_pipeline(args, select_device(args.device))


def open_pipeline(args, device, identify=False):
    """The Pipeline of a sampling_parser's options, one value each. identify: see open_for_sampling."""
    opened = open_for_sampling(args, device, identify)
    shared = opened.model, opened.vae, opened.precision, None, opened.sampling, opened.guide
    return Pipeline(build_sampler(args, *shared),
                    class_names(opened.classes), opened.classes, opened.description)


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
        labels = labels.tolist() if hasattr(labels, "tolist") else labels
        labels = [self.label(asked) for asked in (labels if isinstance(labels, (list, tuple, range)) else [labels])]
        if not labels:
            raise FlowARError("no labels: expected one or more")
        return self.draw(labels, self.noise(seed, range(len(labels))), **settings)

    def settings(self):
        """What pictures are made with, for those who want to make them again."""
        return {**self.description, **self.sampler.settings()}

    def using(self, precision=None, **settings):
        """The same with other settings, and in another precision; fp32 and tf32 are modes of the whole process."""
        sampler, rounded = self.sampler.with_settings(settings), self.sampler.model.z_proj.weight.dtype
        if precision not in (None, sampler.precision) and rounded != torch.float32:
            raise FlowARError(f"precision {precision}: this pipeline was opened with weights rounded to {rounded}, "
                              "open it in fp32 to choose later")
        if precision not in (None, *PRECISIONS):
            raise FlowARError(f"precision is {precision!r}: expected one of {', '.join(PRECISIONS)}")
        precision = set_precision(precision or sampler.precision, sampler.device)
        return Pipeline(sampler._replace(precision=precision), self.names, self.classes, self.description)

    def label(self, asked):
        """Number of a class by number or name."""
        return find_label(asked, self.names)

    def noise(self, seed, indices):
        """Starting noise of the images with these indices, see Sampler.noise."""
        if not len(indices):
            raise FlowARError("count is 0 or less: expected 1 image or more")
        return self.sampler._replace(seed=checked("seed", seed_of, seed)).noise(indices)

    def draw(self, labels, noise, **settings):
        """One image for each label and noise; settings may hold `given` and `known` of FlowAR.sample_pyramid."""
        return self.pictures(self.latents(labels, noise, **settings)[-1])

    def latents(self, labels, noise, *, given=(), known=None, **settings):
        """The pyramid of all images, see FlowAR.sample_pyramid."""
        sampler = self.sampler.with_settings(settings)
        parts = []
        for first in range(0, len(labels), sampler.batch):
            part = slice(first, first + sampler.batch)
            parts.append(sampler.pyramid(labels[part], noise=[e[part] for e in noise], given=[x[part] for x in given],
                                         known=known and ([x[part] for x in known[0]], known[1])))
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
        given = self.kept(label, keep_scales, seed, settings)
        given = [x.expand(count, -1, -1, -1) for x in given]
        return self.draw([self.label(label)] * count, self.noise(seed, range(count)), given=given, **settings)

    def edit(self, label_from, label_to, keep_scales=None, *, seed=0, **settings):
        """One image: that of pipe([label_from], seed=seed) whose later scales are drawn for label_to, of one noise."""
        given = self.kept(label_from, keep_scales, seed, settings)
        return self.draw([self.label(label_to)], self.noise(seed, [0]), given=given, **settings)

    def kept(self, label, keep_scales, seed, settings):
        scales = len(self.sampler.model.scale)
        keep_scales = min(3, scales - 1) if keep_scales is None else keep_scales
        if not isinstance(keep_scales, int) or not 0 <= keep_scales <= scales:
            raise FlowARError(f"keep_scales is {keep_scales}: expected 0 to {scales}, the model's scales")
        return self.latents([self.label(label)], self.noise(seed, [0]), **settings)[:keep_scales]

    def interpolate(self, label, seed_a, seed_b, count=8, **settings):
        """`count` images between those of two seeds, both included: their noise on the arc between theirs."""
        if count < 2:
            raise FlowARError(f"count is {count}: expected at least 2, the ends")
        ends = self.noise(seed_a, [0]), self.noise(seed_b, [0])
        noise = [torch.cat([slerp(a, b, i / (count - 1)) for i in range(count)]) for a, b in zip(*ends)]
        return self.draw([self.label(label)] * count, noise, **settings)

    def inpaint(self, image, mask, label, *, count=1, seed=0, **settings):
        """`count` images with the white parts of `mask` drawn anew. image, mask: PIL, or paths, of one size; both are
        cropped to the model's. A cell of a scale is kept if no pixel of it is white.
        """
        image, mask = map(as_rgb, (image, mask))
        if image.size != mask.size:
            raise FlowARError(f"the mask is {mask.width}x{mask.height} pixels, the image {image.width}x{image.height}: "
                              "expected one size")
        sampler, size = self.sampler, self.sampler.model.img_size
        keep = to_tensor(center_crop(mask, size)).amax(dim=0)[None, None] <= -1 + 2 * DARK
        if keep.all():
            raise FlowARError("the mask has no white part: nothing would be drawn anew")
        with torch.no_grad(), autocast(sampler.device, sampler.vae_precision):
            latents = sampler.vae.encode(to_tensor(center_crop(image, size))[None].to(sampler.device)).mode()
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
    if not isinstance(image, (Image.Image, str, Path)):
        raise FlowARError(f"image or mask is a {type(image).__name__}: expected a PIL image or a path")
    return over(image, WHITE)[0] if isinstance(image, Image.Image) else open_image(image)


def slerp(a, b, part):
    """Between two tensors of normal noise on the arc from a to b: the norm stays that of noise."""
    if part in (0, 1):
        return b if part else a
    angle = torch.arccos(F.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1))
    if angle < 1e-6:
        return a
    return (torch.sin((1 - part) * angle) * a + torch.sin(part * angle) * b) / torch.sin(angle)
