"""The options of training, evaluation and sampling, each once.

An option's default is what the release uses. None means "not given": geometry and size are then taken from the
checkpoint (evaluation) or from the release's ImageNet-256 setting (training), see resolve_geometry.
"""
import argparse
import importlib.util
import itertools
import math
import re
from pathlib import Path
from typing import Callable, NamedTuple

from models import MODELS, FlowARError
from models.flow_matching import CFG_SCHEDULES, SOLVERS, STEP_SCHEDULES, TIME_GRIDS, read_time_distribution
from models.variants import ablated, diffusion
from models.vaes import find_vae
from util.cluster import PRECISIONS, TIMEOUT, log
from util.data.pixels import parse_color
from util.evaluation.extractors import EXTRACTORS, Inception
from util.training.optimization import LR_SCHEDULES, peak_learning_rate

GEOMETRY = dict(model="flowar_small", img_size=256, vae_stride=16, vae_embed_dim=16, patch_size=1, class_num=1000)
BASE_RATE, MIN_RATE = 5e-5, 1e-5
OF_ONLINE_EVAL = {"eval_num_images": (10000,), "feature_extractor": ((Inception.name,),)}  # defaults
LARGEST = 2**31 - 1  # what every library below can count to


# ---- types: what a value must be, said in one line -----------------------------------------------------------


def integer_list(text):
    """'1,2,4' -> (1, 2, 4)."""
    try:
        return tuple(int(part) for part in text.strip("{}[]() ").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of integers") from None


def between(kind, low, high):
    """A type for a number from low to high."""
    def number(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'an integer' if kind is int else 'a number'}") from None
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not finite")
        if not low <= value <= high:
            limit = f"{low} or more" if value < low and high in (LARGEST, math.inf) else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: expected {limit}")
        return value
    return number


positive = between(int, 1, LARGEST)
count = between(int, 0, LARGEST)
at_least_two = between(int, 2, LARGEST)
real = between(float, 0.0, math.inf)
fraction = between(float, 0.0, 1.0)
above_zero = between(float, 1e-6, math.inf)
at_least_one = between(float, 1.0, math.inf)
# Beyond these, memory, processes or hours would go before anything could be said.
pixels = between(int, 1, 8192)  # PIL refuses to crop much more
width = between(int, 1, 16384)
depth = between(int, 1, 256)
classes = between(int, 1, 10**6)
steps = between(int, 1, 10**4)
workers = between(int, 0, 1024)
seconds = between(float, 1.0, 1e6)
seed = between(int, 0, 2**32 - 1)


def below_one(text):
    if fraction(text) == 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range: expected 0.0 or more and less than 1")
    return fraction(text)


def color(text):
    try:
        return parse_color(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no colour: expected white, '#ff8000' or 255,128,0") from None


def utf8(text):
    """A folder for files of TensorBoard or safetensors."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8, which TensorBoard and safetensors need") from None
    return text


def some_path(text):
    if not text:
        raise argparse.ArgumentTypeError("it is empty: expected a path")
    return text


def project(text):
    if not re.fullmatch(r"[\w.-]{1,128}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a project: expected letters, digits, - _ .")
    return text


class SaveEvery(NamedTuple):
    """How often to save a checkpoint: after so many steps, or after so many minutes, or neither."""

    steps: int | None = None
    minutes: float | None = None


def save_every(text):
    """'500' steps, '30m' minutes, '0' never."""
    try:
        if text.endswith("m"):
            return SaveEvery(minutes=real(text[:-1]) or None)
        return SaveEvery(steps=count(text) or None)
    except argparse.ArgumentTypeError:
        message = f"{text!r} is neither a number of steps ('500') nor of minutes ('30m')"
        raise argparse.ArgumentTypeError(message) from None


def several(kind):
    """A type for one value of `kind` or a comma-separated list of them: a tuple."""
    return lambda text: tuple(dict.fromkeys(kind(part) for part in text.split(",")))


def per_scale(kind):
    """A type for one value of `kind`, or one for each scale, '1:2:3': a tuple."""
    def values(text):
        found = tuple(kind(part) for part in text.strip("()[]").replace(", ", ":").split(":"))
        return found if len(found) > 1 else found[0]
    return values


def as_text(value):
    """What per_scale's types read."""
    return ":".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def time_distribution(text):
    """One distribution of times, or one for each scale, 'uniform;shift:2;shift:3': a tuple."""
    try:
        for part in text.split(";"):
            read_time_distribution(part)
    except FlowARError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return tuple(text.split(";")) if ";" in text else text


def one_of(known):
    """A type for one of the names in a table."""
    def name(text):
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is unknown: expected one of {', '.join(known)}")
        return text
    return name


solver, time_grid, extractor = map(one_of, ({**SOLVERS, **diffusion.SOLVERS}, TIME_GRIDS, EXTRACTORS))


def extractor_files(text):
    """{extractor: file} of 'NAME=FILE,NAME=FILE', or of Inception's FILE alone."""
    if "=" not in text or Path(text).exists():
        return {Inception.name: some_path(text)}
    pairs = [part.partition("=") for part in text.split(",")]
    files = {extractor(name): some_path(file) for name, _, file in pairs}
    if len(files) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} names an extractor twice")
    return files


def add_model_options(parser):
    add = parser.add_argument_group("model and VAE").add_argument
    add("--model", choices=MODELS,
        help="size; default: recognised from the checkpoint in eval.py, flowar_small in training")
    add("--img_size", type=pixels, help="pixels a side; default 256, the cache's in training, or the checkpoint's "
        "latent size x VAE stride in eval.py")
    add("--vae", default="kl16", help="kl16 (the file of --vae_path), or diffusers:PATH_OR_REPOSITORY[:SUBFOLDER]")
    add("--vae_path", type=some_path,
        help="VAE: kl16.ckpt or a file of scripts/train_vae.py, by path, hf:OWNER/REPO/FILE or released:kl16; default: "
             "pretrained_models/vae/kl16.ckpt; when sampling the run's own, else that, else released:kl16")
    add("--vae_embed_dim", type=width, help="latent channels; default 16, or the VAE's in eval.py")
    add("--vae_stride", type=positive, help="pixels a latent cell; default 16, or the VAE's in eval.py")
    add("--patch_size", type=positive, help="latent cells a token, a side; default 1, or the checkpoint's in eval.py")
    add("--scales", type=integer_list,
        help="tokens a side of every scale, '1,2,4,8,16'; default: doubling up to the latent's size")
    add("--class_num", type=classes,
        help="number of classes; default: the checkpoint's, else as many as there are class folders")
    add("--diffloss_d", type=depth, help="blocks of the flow head; default: the size's own")
    add("--diffloss_w", type=width, help="width of the flow head; default: the size's own")
    add("--buffer_size", type=count, default=0, help="only 0, as in the release's commands")


def add_sampling_options(parser):
    add = parser.add_argument_group("sampling").add_argument
    add("--eval_bsz", type=positive, default=64, help="images a batch and process when sampling")
    add("--num_step", type=several(per_scale(steps)), help="length of the time grid (25 makes 24 Euler steps, 50 makes "
        "50), or one for each scale, 25:25:12; default: the checkpoint's, else 25; *")
    add("--time_grid", choices=TIME_GRIDS, help="times of the steps: release, or uniform, where --num_step are as many "
        "Euler steps, from 1 on; default: the checkpoint's, else release")
    add("--num_step_last", type=several(steps), help="anneal the steps to this number at the last scale (DiSA); *")
    add("--num_step_schedule", choices=STEP_SCHEDULES,
        help="the way to it: linear, cosine, or two_stage; default: the checkpoint's, else linear")
    add("--solver", type=several(solver), help="euler (the release's) or ab2: one evaluation a step; heun, midpoint: "
        "two; rk4: four; of --objective diffusion: euler (DDIM) or ancestral; default: the checkpoint's, else euler; *")
    add("--cfg", type=several(per_scale(at_least_one)), help="classifier-free guidance scale of the last scale, or one "
        "for each, 1:1.5:3; default: the checkpoint's, else 1.0 (none); *")
    add("--cfg_schedule", choices=CFG_SCHEDULES,
        help="guidance over scales: a ramp from 1, or constant; default: the checkpoint's, else linear")
    add("--guidance", type=several(fraction),
        help="guidance acts only at times t <= this (t = 1 is noise); default: the checkpoint's, else 0.9; *")
    add("--guidance_low", type=several(fraction),
        help="and only at times t > this; default: the checkpoint's, else 0.0; *")
    add("--guide", default="", help="a weaker checkpoint of the same geometry in the null class's place (autoguidance)")
    add("--guide_strength", type=at_least_one, help="in place of --cfg with --guide")
    add("--temperature", type=real, help="factor of the starting noise; default: the checkpoint's, else 1.0")


def add_extractor_options(add, *aliases):
    add("--feature_extractor", *aliases, default="inception", type=several(extractor),
        help=f"network of the metrics, or several, NAME,NAME: {', '.join(EXTRACTORS)}")
    add("--fid_weights", type=extractor_files,
        help="files of their weights, NAME=FILE,NAME=FILE, or a FILE of Inception's alone; default: downloaded once")


def add_evaluation_options(parser):
    add = parser.add_argument_group("evaluation").add_argument
    add("--num_images", type=positive, default=50000, help="images to generate")
    add("--save_images", action="store_true", help="write the images to images/ in the output directory, as PNGs")
    add("--save_npz", action="store_true",
        help="write the images to samples.npz in the output directory, as ADM's evaluator reads them")
    add("--labels", type=some_path, default="balanced",
        help="balanced: as many images of each class; train: in the proportions of the training images; or a file with "
             "one label (or class name) a line")
    add("--all_classes", action="store_true", help="sample classes that had no training images too")
    add("--fid_stats", help="npz with mu and sigma of the reference (and features, for KID, precision and recall, and "
        "the distance of held-out images, for FDr), in one extractor or several; default "
        "fid_stats/adm_in256_stats.npz if it is there")
    add("--ref_images", help="folder of reference images, instead of --fid_stats")
    add_extractor_options(add)
    add("--evaluate", action="store_true",
        help="main_flowar.py: evaluate --resume instead of training; eval.py always does")


def add_file_options(parser):
    add = parser.add_argument_group("files").add_argument
    add("--output_dir", type=lambda text: utf8(some_path(text)), default="./output_dir",
        help="where everything is written")
    add("--data_path", type=some_path, default="./data/imagenet",
        help="folder, .zip or .tar with train/ and val/, class folders of images; or hf:OWNER/NAME (not for eval.py)")
    add("--timeout", type=seconds, default=TIMEOUT,
        help="seconds that a process waits for the others, or for a batch of data, before the run ends")


def add_image_options(parser):
    add = parser.add_argument_group("images").add_argument
    add("--background", type=color, help="under transparent pixels: white (the default, or what the cache was made "
        "with), '#ff8000' or 255,128,0")


def add_checkpoint_options(parser):
    add = parser.add_argument_group("run").add_argument
    add("--resume", default="", help="checkpoint: a directory with checkpoint-last.pth (in training --output_dir "
        "itself, which may still be empty), a .pth or a .safetensors")
    add("--weights", metavar="ema|raw|KEY",
        help="which weights of --resume are evaluated or sampled; default: the average (EMA) where the file has one")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto takes CUDA where there is one")
    add("--precision", choices=PRECISIONS,
        help="default: training tf32 on CUDA; evaluation fp16 on CUDA (as the release); fp32 on CPU")
    add("--compile", nargs="?", const="blocks", choices=("blocks", "graphs"),
        help="torch.compile: blocks in training; the flow head's, VAE decoder and feature networks in an evaluation; "
             "graphs: CUDA graphs too, for small batches of samples")
    add("--seed", type=seed, default=0, help="seed of everything that is drawn")


def add_training_options(parser):
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, default=400, help="epochs in all")
    add("--warmup_epochs", type=real, default=100, help="epochs of linear warm-up, counted per step")
    add("--batch_size", type=positive, default=64,
        help="images a process and forward pass; global batch = this x processes x accum_iter")
    add("--accum_iter", type=positive, default=1, help="forward passes that make one optimizer step")
    add("--lr", type=real, help="peak learning rate; default blr x global batch / 256")
    add("--blr", type=real, help="base learning rate; default 5e-5")
    add("--min_lr", type=real, default=MIN_RATE, help="rate at the end of the cosine")
    add("--lr_schedule", choices=LR_SCHEDULES, default="cosine", help="after the warm-up")
    add("--weight_decay", type=real, default=0.02, help="AdamW, on parameters with two or more dimensions")
    add("--grad_clip", type=real, default=3.0, help="largest gradient norm; 0 does not clip")
    add("--ema_rate", type=below_one, default=0.9999, help="EMA of the parameters, per step")
    add("--ema_warmup", action="store_true",
        help="at optimizer step n an EMA rate of min(ema_rate, (1 + n) / (10 + n)): it forgets the random start at "
             "once")
    add("--posthoc_ema", type=count, default=0,
        help="steps between snapshots of two averages, from which scripts/posthoc_ema.py rebuilds the EMA of any width "
             "after the training; 0: none")
    add("--attn_dropout", type=below_one, default=0.1, help="dropout on the transformer's attention weights")
    add("--proj_dropout", type=below_one, default=0.1, help="dropout after projections and in MLPs of the transformer")
    add("--label_drop_prob", type=fraction, default=0.1, help="probability of training a label as the null class")
    add("--t_dist", type=time_distribution, default="uniform", help="times of training (validation: uniform): uniform, "
        "logit_normal:MEAN,STD or shift:K; or one for each scale, separated by ;")
    add("--head", choices=ablated.CHOICES["head"], default="scale",
        help="tokens of a scale attend to each other in the flow head, or each is drawn by itself")
    add("--objective", choices=ablated.CHOICES["objective"], default="flow",
        help="flow matching, or DDPM's epsilon, sampled with DDIM or --solver ancestral")
    add("--condition", choices=ablated.CHOICES["condition"], default="spatial_adaln",
        help="the way in which the transformer's condition enters the flow head, see docs/levers.md")
    add("--pyramid", choices=ablated.CHOICES["pyramid"], default="latent",
        help="coarse scales are the latent downsampled, or latents of the image downsampled (images, no cache)")
    add("--condition_noise", type=real, default=0.0,
        help="noise on the coarser scales that training reads: its std is uniform up to this, an image")
    add("--use_checkpoint", "--grad_checkpointing", action="store_true",
        help="recompute activations in the backward pass")
    add("--fsdp", action="store_true", help="cut weights, gradients, moments and EMA among the processes (FSDP2), for "
        "models that do not fit; the same results, log and checkpoints")
    add("--on_bad_image", default="error", choices=("error", "skip"),
        help="an image that cannot be read stops training, or the next one takes its place")
    add("--cached_path", type=utf8, default="",
        help="cached latents (of scripts/cache_latents.py, MAR or LightningDiT); used if they are there")
    add("--latent_norm", choices=("vae", "channel"), default="vae",
        help="latents are scaled by the VAE's own numbers, or every channel by its mean and std in --cached_path")
    add("--no_flip", dest="flip", action="store_false", help="do not flip half of the training images (text, digits)")
    add("--use_cached", action="store_true", help="insist on cached latents: without them, stop")
    add("--no_val", action="store_true", help="no validation loss, even if there is a val/")
    add("--cached_val_path", type=utf8, default="",
        help="cached latents of val/ for the validation loss; default: encode data_path/val")
    add("--init_from", default="", help="weights to begin a new run with (path, hf: or released: name): classes, image "
        "size, scales may differ")
    add("--start_epoch", type=count, help="first epoch; default: the one after the checkpoint's")
    add("--global_batch", type=positive,
        help="images an optimizer step; default: the checkpoint's, or batch_size x processes x accum_iter")
    add("--save_last_freq", type=positive, default=5, help="epochs between checkpoints")
    add("--save_every", type=save_every, default="30m",
        help="checkpoints between them: after this many steps, or minutes (30m); 0: none")
    add("--keep", type=positive, default=2, help="checkpoints to keep")
    add("--keep_every", type=count, default=0, help="epochs between checkpoints that are kept for ever; 0: none")
    add("--max_bad_steps", type=positive, default=20,
        help="steps in a row that are not finite, and skipped, before training stops")
    add("--deterministic", action="store_true", help="deterministic algorithms on CUDA too, where they are slower")
    add("--eval_freq", type=positive, default=40, help="epochs between validation loss, sample grid and --online_eval")
    add("--online_eval", action="store_true",
        help="FID or the like of the EMA during training, every --eval_freq epochs")
    add("--eval_num_images", type=at_least_two, default=OF_ONLINE_EVAL["eval_num_images"][0],
        help="images of --online_eval")
    add("--log_dir", type=utf8, help="TensorBoard files; default: the output directory")
    add("--wandb", metavar="PROJECT", type=project, nargs="?", const="flowar",
        help="TensorBoard's scalars and grids to Weights & Biases too, into this project, or flowar (needs pip install "
             "wandb)")
    add("--num_workers", type=workers,
        help="data loading processes of every rank; default: the host's CPUs dealt to its ranks, at most 10")
    add("--pin_mem", action="store_true", default=True,
        help="page-locked host memory for batches (CUDA); on by default")
    add("--no_pin_mem", dest="pin_mem", action="store_false", help="ordinary host memory")
    add("--log_freq", type=positive, default=20, help="optimizer steps between log entries")
    add("--dry_run", action="store_true", help="check on one machine, without a GPU, what a training of --world "
        "processes would be, print its sizes and end; nothing is written")
    add("--world", type=positive, help="processes (GPUs) of the job that --dry_run checks")
    add("--images_per_second", type=above_zero,
        help="of the whole job: --dry_run then says hours, days and what the disk must give")


def _parser(description, *groups):
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for add_group in groups:
        add_group(parser)
    return parser


def training_parser():
    return _parser("Train FlowAR.", add_model_options, add_training_options, add_sampling_options,
                   add_evaluation_options, add_image_options, add_checkpoint_options, add_file_options)


def evaluation_parser():
    return _parser("Evaluate FlowAR: sample class-balanced images, then FID and Inception Score.", add_model_options,
                   add_sampling_options, add_evaluation_options, add_image_options, add_checkpoint_options,
                   add_file_options)


def sampling_parser(description):
    """For scripts that draw images of a checkpoint."""
    return _parser(description, add_model_options, add_sampling_options, add_checkpoint_options)


def checked(name, kind, value):
    """What a type of an option makes of a value that is not from a command line, or FlowARError with its name."""
    try:
        return kind(as_text(value))
    except argparse.ArgumentTypeError as error:
        raise FlowARError(f"{name}: {error}") from error


# ---- what follows from the options ---------------------------------------------------------------------------
# Nothing here changes the options that it is given: what is filled in comes back as a copy.


def with_options(args, **changes):
    """A copy of the options with some changed."""
    return argparse.Namespace(**{**vars(args), **changes})


def resolve_geometry(args, known=None):
    """The options with the geometry that was not given: from `known` (of checkpoint and VAE), else the release's."""
    known = {**GEOMETRY, **(known or {})}
    args = with_options(args, **{name: value for name, value in known.items() if getattr(args, name, None) is None})
    if args.scales is None:
        return with_options(args, scales=default_scales(args.img_size // (args.vae_stride * args.patch_size)))
    return args


def default_scales(side):
    """1, 2, 4, ... up to `side`; 32 for 512-pixel images."""
    side = max(side, 1)
    return (*(2**k for k in range(side.bit_length()) if 2**k < side), side)


def check_geometry(args, known, path):
    """FlowARError that names the first option that contradicts what a checkpoint's tensors say."""
    for option, value in known.items():
        if getattr(args, option) not in (None, value):
            why = " (they follow from --img_size, --vae_stride and --patch_size)" if option == "scales" else ""
            raise FlowARError(f"--{option} is {getattr(args, option)}, but {path} was trained with {value}{why}")


def check_vae(vae, args):
    """FlowARError unless the VAE has the channels and the stride of the options, where they are given."""
    for option, found in (("vae_embed_dim", vae.embed_dim), ("vae_stride", vae.stride)):
        if getattr(args, option) not in (None, found):
            name = find_vae(args.vae, args.vae_path).name
            raise FlowARError(f"--{option} is {getattr(args, option)}, but the VAE {name} has {found}: give "
                              "that, or the VAE that is meant")


def model_options(args):
    """FlowAR's arguments out of the options."""
    names = ("img_size", "vae_stride", "patch_size", "vae_embed_dim", "class_num", "diffloss_d", "diffloss_w",
             "buffer_size", "attn_dropout", "proj_dropout", "label_drop_prob", "use_checkpoint", "t_dist",
             "condition_noise", "head", "objective", "condition", "pyramid")
    return {"scale": args.scales, **{name: getattr(args, name) for name in names if hasattr(args, name)}}


class Setting(NamedTuple):
    """Of an argument of FlowAR.sample_tokens: the option, the release's value, and what a value must be."""
    option: str
    default: object
    kind: Callable

    def of(self, name, value):
        """A value that is given in Python, or FlowARError. name: for it."""
        return None if value is None and self.default is None else checked(name, self.kind, value)


SAMPLING = {
    "num_steps": Setting("num_step", 25, per_scale(steps)), "num_steps_last": Setting("num_step_last", None, steps),
    "num_step_schedule": Setting("num_step_schedule", "linear", str),
    "cfg": Setting("cfg", 1.0, per_scale(at_least_one)), "guidance": Setting("guidance", 0.9, fraction),
    "guidance_low": Setting("guidance_low", 0.0, fraction),
    "cfg_schedule": Setting("cfg_schedule", "linear", str), "temperature": Setting("temperature", 1.0, real),
    "solver": Setting("solver", "euler", solver), "time_grid": Setting("time_grid", "release", time_grid)}


def sampling_options(args, stored=None):
    """The arguments of FlowAR.sample_tokens: options with one value each (sweep_points), then those that a checkpoint
    has `stored`, then the release's.
    """
    given = {argument: getattr(args, setting.option) for argument, setting in SAMPLING.items()}
    if given["num_steps"] is not None:
        stored = {name: value for name, value in (stored or {}).items() if name != "num_steps_last"}
    if args.guide_strength is not None:
        if not args.guide:
            raise FlowARError(f"--guide_strength {args.guide_strength} needs --guide, the weaker checkpoint")
        given["cfg"] = args.guide_strength
    values = {**{argument: setting.default for argument, setting in SAMPLING.items()}, **(stored or {}),
              **{argument: value for argument, value in given.items() if value is not None}}
    weights = values["cfg"] if isinstance(values["cfg"], (tuple, list)) else [values["cfg"]]
    if args.guide and max(weights) <= 1:
        raise FlowARError(f"--guide {args.guide}: give --guide_strength, or --cfg, above 1")
    check_sampling(values, given, args.scales)
    return values


def check_sampling(values, given, scales):
    """FlowARError for arguments of FlowAR.sample_tokens that contradict each other or would do nothing. given: those
    that were asked for, None or absent for others; scales: the model's, None if they are not known yet.
    """
    check_steps(values)
    weights = values["cfg"] if isinstance(values["cfg"], (tuple, list)) else [values["cfg"]]
    for wrong, message in (
            (given.get("num_step_schedule") not in (None, "linear") and values["num_steps_last"] is None,
             f"--num_step_schedule {given.get('num_step_schedule')} needs --num_step_last, to which it leads"),
            (given.get("cfg_schedule") not in (None, "linear") and len(weights) > 1,
             f"--cfg {as_text(weights)} has one for each scale: leave out --cfg_schedule {given.get('cfg_schedule')}")):
        if wrong:
            raise FlowARError(message)
    for name in ("cfg", "num_steps"):
        count = len(values[name]) if isinstance(values[name], (tuple, list)) else None
        if count and scales and count != len(scales):
            raise FlowARError(f"--{SAMPLING[name].option} {as_text(values[name])} has {count} values: expected one for "
                              f"each of {len(scales)} scales")
    if values["guidance_low"] >= values["guidance"] > 0:
        raise FlowARError(f"--guidance_low {values['guidance_low']} is not below --guidance {values['guidance']}: "
                          "guidance would act nowhere; give --cfg 1 for none")


def check_steps(values):
    """FlowARError for numbers of steps in sampling options that contradict each other or their time grid."""
    steps, last, grid = values["num_steps"], values["num_steps_last"], values["time_grid"]
    if last is not None and isinstance(steps, (tuple, list)):
        raise FlowARError(f"--num_step {as_text(steps)} has one for each scale: leave out --num_step_last {last}")
    if last is not None and last > steps:
        raise FlowARError(f"--num_step_last {last} is above --num_step {steps}: steps are annealed down to it")
    fewest = min(steps) if isinstance(steps, (tuple, list)) else steps
    for name, number in (("num_step", fewest), ("num_step_last", last)):
        if number is not None and number < TIME_GRIDS[grid]:
            raise FlowARError(f"--{name} {number} is too few for the {grid} time grid: give at least "
                              f"{TIME_GRIDS[grid]}, or --time_grid uniform")


SWEPT = "cfg", "guidance", "guidance_low", "num_step", "num_step_last", "solver"  # an evaluation takes several values


def swept(args, name):
    """The values of an option that can be swept, (None,) if it was not given."""
    return getattr(args, name) or (None,)


def sweep_points(args):
    """{name: copy of the options} for every combination of the swept ones; the name has those with several values."""
    varied = [name for name in SWEPT if len(swept(args, name)) > 1]
    points = [dict(zip(SWEPT, values)) for values in itertools.product(*(swept(args, name) for name in SWEPT))]
    return {"_".join(name + as_text(point[name]) for name in varied): with_options(args, **point) for point in points}


def single_point(args):
    """The options with one value for each that can be swept, or FlowARError."""
    for name in SWEPT:
        if len(swept(args, name)) > 1:
            raise FlowARError(f"--{name} has {len(swept(args, name))} values: only an evaluation takes several")
    return next(iter(sweep_points(args).values()))


def check_training(args):
    """FlowARError for options that contradict each other."""
    if args.compile == "graphs":
        raise FlowARError("--compile graphs is for sampling: in training use --compile")
    for name in ("world", "images_per_second"):
        if getattr(args, name) is not None and not args.dry_run:
            raise FlowARError(f"--{name} is for --dry_run: leave it out, torchrun says how many processes there are"
                              if name == "world" else f"--{name} is for --dry_run: leave it out, or give both")
    if args.use_cached and not args.cached_path:
        raise FlowARError("--use_cached needs --cached_path")
    if args.start_epoch is not None and args.start_epoch >= args.epochs:
        raise FlowARError(f"--start_epoch {args.start_epoch} leaves nothing to train of --epochs {args.epochs}, "
                          "numbered from 0")
    if args.no_val and args.cached_val_path:
        raise FlowARError("--no_val and --cached_val_path: give one of them")
    for name in ("cached_path", "cached_val_path"):
        if Path(getattr(args, name)).is_file():
            raise FlowARError(f"--{name} {getattr(args, name)}: is a file, expected a directory of cached latents")
    found = importlib.util.find_spec("wandb") if args.wandb else None
    if args.wandb and (found is None or found.origin is None):  # a folder of this name, as wandb makes, is no package
        raise FlowARError("--wandb needs the package wandb, which is not installed: pip install wandb, or leave it out")
    if args.fsdp and args.precision == "fp16":
        raise FlowARError("--fsdp with --precision fp16: every process would scale its own: give bf16 or fp32")
    if args.guide:
        raise FlowARError(f"--guide {args.guide} is for sampling: training draws its samples without")
    if args.weights:
        raise FlowARError(f"--weights {args.weights} is for an evaluation: training goes on with both")
    for name in ("save_images", "save_npz"):
        if getattr(args, name):
            raise FlowARError(f"--{name} is for an evaluation: training does not write images")
    if args.all_classes and not args.online_eval:
        raise FlowARError("--all_classes is for an evaluation: in training it needs --online_eval")
    if args.labels != "balanced" and not args.online_eval:
        raise FlowARError(f"--labels {args.labels} is for an evaluation: in training it needs --online_eval")
    for name in ("fid_stats", "ref_images", "fid_weights", "eval_num_images", "feature_extractor"):
        if not args.online_eval and getattr(args, name) not in (None, *OF_ONLINE_EVAL.get(name, ())):
            raise FlowARError(f"--{name} is for an evaluation: in training it needs --online_eval")
    if args.lr_schedule == "constant" and args.min_lr != MIN_RATE:
        raise FlowARError(f"--min_lr {args.min_lr:g} is where the cosine ends: leave it out with --lr_schedule "
                          "constant")


def resolve_training(args, world_size, saved_batch=None):
    """The options with global batch, forward passes, peak learning rate. saved_batch: global batch before a resume."""
    asked = args.batch_size * world_size * args.accum_iter
    if args.global_batch and args.accum_iter > 1 and args.global_batch != asked:
        raise FlowARError(f"--global_batch is {args.global_batch}, but --batch_size {args.batch_size} x {world_size} "
                          f"processes x --accum_iter {args.accum_iter} is {asked}: leave out --accum_iter, which "
                          "follows from the others")
    args = with_options(args, global_batch=args.global_batch or saved_batch or asked)
    if args.global_batch != asked:
        args = deal_global_batch(args, world_size)
    if args.lr is not None and args.blr is not None:
        log(f"warning: --blr {args.blr:g} is not used: --lr is given")
    if args.lr is None:
        base = BASE_RATE if args.blr is None else args.blr
        args = with_options(args, lr=peak_learning_rate(base, args.global_batch))
    if args.lr_schedule == "cosine" and args.min_lr > args.lr:
        log(f"warning: --min_lr {args.min_lr:g} is above the peak learning rate {args.lr:g} (--lr, or --blr x global "
            "batch / 256): the cosine will rise")
    if args.warmup_epochs > args.epochs:
        log(f"warning: --warmup_epochs {args.warmup_epochs:g} is more than --epochs {args.epochs}: the peak learning "
            "rate will not be reached")
    return args


def deal_global_batch(args, world_size):
    """The options with --batch_size, at most the one given, and --accum_iter that make the global batch."""
    each, rest = divmod(args.global_batch, world_size)
    if rest:
        raise FlowARError(f"a global batch of {args.global_batch} cannot be dealt to {world_size} processes: use a "
                          "divisor of it, or --global_batch")
    batch = max(size for size in range(1, min(args.batch_size, each) + 1) if each % size == 0)
    log(f"global batch {args.global_batch}: {batch} images x {world_size} processes x {each // batch} forward passes")
    return with_options(args, batch_size=batch, accum_iter=each // batch)
