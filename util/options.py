"""The options of the programs, each once: a field has its name, default, check and help.

A program's options are a dataclass of the groups that it reads; util/command_line.py makes the flags from the fields,
and a value from Python is checked by the same code. Defaults are the release's. None means "not given": what follows
from a checkpoint, the data or other options is filled in later, in a copy (dataclasses.replace). The settings of
sampling are those of models/settings.py.
"""
import dataclasses
import itertools
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from models import MODELS, FlowARError
from models.flow_matching import read_time_distribution
from models.settings import FRACTION, REMOVED, Sampling, as_text, number, one_of, option_name, setting
from models.variants import ablated
from util.cluster import PRECISIONS, TIMEOUT, log
from util.command_line import (BELOW_ONE, COUNT, DEVICE, PIXELS, POSITIVE, REAL, SEED, WORKERS, Checked, choices_of,
                               color, flag, list_of, optional_path, path, several, take_options, turned_off_by)
from util.data.tables import Columns
from util.training.optimization import BETAS, LR_SCHEDULES, OPTIMIZERS, peak_learning_rate

BASE_RATE = 5e-5
SETTINGS = tuple(map(option_name, fields(Sampling)))  # the options of sampling


# ---- what a value may be ------------------------------------------------------------------------------------------


def time_distribution(value):
    """One distribution of times, or one for each scale: 'uniform;shift:2;shift:3'."""
    parts = value.split(";") if isinstance(value, str) else value
    for part in parts:
        read_time_distribution(part)
    return tuple(parts) if len(parts) > 1 else parts[0]


def betas(value):
    """'0.9,0.95' -> (0.9, 0.95)."""
    values = list_of(BELOW_ONE)(value)
    if len(values) != 2:
        raise ValueError("expected two numbers, separated by a comma")
    return values


class SaveEvery(NamedTuple):
    """How often a checkpoint is saved within an epoch: after so many steps or minutes, or not at all."""
    steps: int | None = None
    minutes: float | None = None

    def __str__(self):
        return f"{self.minutes:g}m" if self.minutes else str(self.steps or 0)


def save_every(value):
    """'500' steps, '30m' minutes, '0' never."""
    if isinstance(value, (tuple, list)):
        return SaveEvery(*value)
    if value.endswith("m"):
        return SaveEvery(minutes=REAL(value[:-1]) or None)
    return SaveEvery(steps=COUNT(value) or None)


# ---- the groups ---------------------------------------------------------------------------------------------------


@dataclass
class Model(Checked):
    """model and VAE"""
    model: str = setting(None, "model size; default: the checkpoint's, else flowar_small", one_of(*MODELS))
    img_size: int = setting(None, "image size in pixels; default: from the checkpoint or cache, else 256", PIXELS)
    vae_path: str = setting(None, "the VAE: a file, hf:OWNER/REPO/FILE, released:kl16, demo:fashion or "
                            "diffusers:PATH_OR_REPOSITORY[:SUBFOLDER]; default: the run's, else "
                            "pretrained_models/vae/kl16.ckpt", path)
    vae_embed_dim: int = setting(None, "latent channels; default: the VAE's, else 16", POSITIVE)
    vae_stride: int = setting(None, "downsampling factor of the VAE; default: the VAE's, else 16", POSITIVE)
    patch_size: int = setting(None, "patch size in latent pixels; default: the checkpoint's, else 1", POSITIVE)
    class_num: int = setting(None, "number of classes; default: the checkpoint's, else the number of class "
                           "folders", POSITIVE)
    diffloss_d: int = setting(None, "blocks in the flow head; default: set by --model", POSITIVE)
    diffloss_w: int = setting(None, "width of the flow head; default: set by --model", POSITIVE)
    buffer_size: int = setting(0, "only 0 is supported", COUNT)
    scales: tuple = setting(None, "tokens per side at each scale, such as 1,2,4,8,16; default: doubling up to the "
                            "latent size", list_of(POSITIVE), beyond=True)


@dataclass
class Weights(Checked):
    """weights"""
    resume: str = setting("", "checkpoint: a run's folder, a file, or an hf:, released: or demo: name; a training "
                          "with a new --output_dir starts from scratch; distill.py: the teacher", optional_path)
    weights: str = setting(None, "which weights of --resume to sample: ema, raw or another key; default: ema if "
                           "present", str, beyond=True)


@dataclass
class Runtime(Checked):
    """run"""
    device: str = setting("auto", "auto uses CUDA if available", DEVICE)
    seed: int = setting(0, "random seed", SEED)
    precision: str = setting(None, "default on CUDA: tf32 for training, fp16 for evaluation (as the release); on a "
                             "CPU: fp32", one_of(*PRECISIONS), beyond=True)
    compile: str = setting(None, "apply torch.compile to the blocks, in evaluation also to VAE decoder and feature "
                           "networks; graphs: with CUDA graphs, for sampling in small batches",
                           one_of("blocks", "graphs"), beyond=True, nargs="?", const="blocks")


@dataclass
class Output(Checked):
    """files"""
    output_dir: str = setting("./output_dir", "folder for all output files", path)
    timeout: float = setting(TIMEOUT, "seconds that a process waits for the others, or for data, before the run aborts",
                             number(float, 1.0, 1e6), beyond=True)


@dataclass
class Data(Checked):
    """data"""
    data_path: str = setting("./data/imagenet", "folder, .zip or .tar with train/ and val/ that contain class folders; "
                             "or hf:OWNER/NAME", path)
    cached_path: str = setting("", "cached latents (scripts/cache_latents.py, MAR's or LightningDiT's), used if "
                               "present", optional_path)
    use_cached: bool = flag("fail if --cached_path contains no latents")
    num_workers: int = setting(None, "data loading workers per process; default: CPUs per process, at most 10", WORKERS)
    pin_mem: bool = turned_off_by("no_pin_mem", "do not pin memory for transfers to the GPU", on="pin_mem")
    cached_val_path: str = setting("", "cached latents of val/; default: encode its images", optional_path, beyond=True)
    flip: bool = turned_off_by("no_flip", "disable random horizontal flips in training", beyond=True)
    background: tuple = setting(None, "colour behind transparent pixels: white (default), '#ff8000' or "
                                "255,128,0", color, beyond=True)
    on_bad_image: str = setting("error", "unreadable images: stop training, or use the next image instead",
                                one_of("error", "skip"), beyond=True)
    latent_norm: str = setting("vae", "normalise latents by the VAE's scale and shift, or by each channel's mean and "
                               "std over the cache", one_of("vae", "channel"), beyond=True)


@dataclass
class Training(Checked):
    """training"""
    epochs: int = setting(400, "total number of epochs", POSITIVE)
    warmup_epochs: float = setting(100, "epochs of linear warm-up", REAL)
    batch_size: int = setting(64, "images per process and forward pass", POSITIVE)
    lr: float = setting(None, "peak learning rate; default: blr x global batch / 256", REAL)
    blr: float = setting(None, f"base learning rate, used without --lr; default {BASE_RATE:g}", REAL)
    min_lr: float = setting(1e-5, "final learning rate of cosine and linear_end", REAL)
    lr_schedule: str = setting("cosine", "schedule after warm-up; linear_end: constant, then linearly to min_lr over "
                               "the last fifth", one_of(*LR_SCHEDULES))
    optimizer: str = setting("adamw", "muon: Muon for the matrices of all blocks, AdamW for the rest, same rate",
                             one_of(*OPTIMIZERS), beyond=True)
    betas: tuple = setting(BETAS, "AdamW's beta1,beta2", betas, beyond=True)
    weight_decay: float = setting(0.02, "weight decay of parameters with two or more dimensions", REAL)
    grad_clip: float = setting(3.0, "maximum gradient norm; 0: no clipping", REAL)
    ema_rate: float = setting(0.9999, "decay rate of the parameters' EMA, per step", BELOW_ONE)
    attn_dropout: float = setting(0.1, "dropout of the transformer's attention weights", BELOW_ONE)
    proj_dropout: float = setting(0.1, "dropout after the transformer's projections and in its MLPs", BELOW_ONE)
    label_drop_prob: float = setting(0.1, "probability of replacing a label by the null class, for guidance", FRACTION)
    use_checkpoint: bool = flag("recompute activations in the backward pass", aliases=("grad_checkpointing",))
    start_epoch: int = setting(None, "first epoch, counted from 0; default: the one after the checkpoint's", COUNT)
    save_last_freq: int = setting(5, "epochs between checkpoints", POSITIVE)
    eval_freq: int = setting(40, "epochs between reports: validation loss, samples, --online_eval", POSITIVE)
    online_eval: bool = flag("evaluate the EMA model every --eval_freq epochs")
    log_dir: str = setting(None, "folder for TensorBoard logs; default: --output_dir", path)
    global_batch: int = setting(None, "images per optimizer step, with gradient accumulation if needed; default: the "
                                "checkpoint's, else batch_size x processes", POSITIVE, beyond=True)
    accum_iter: int = 1  # forward passes of an optimizer step: they follow, see resolve_training
    save_every: SaveEvery = setting(SaveEvery(minutes=30.0), "interval of checkpoints within an epoch, in steps (500) "
                                    "or minutes (30m); 0: none", save_every, beyond=True)
    keep: int = setting(2, "number of latest checkpoints to keep", POSITIVE, beyond=True)
    keep_every: int = setting(0, "epochs between checkpoints that are kept forever; 0: none", COUNT, beyond=True)
    log_freq: int = setting(20, "steps between log entries", POSITIVE, beyond=True)
    wandb: str = setting(None, "also log to this Weights & Biases project (default flowar)", str, beyond=True,
                         nargs="?", const="flowar", metavar="PROJECT")
    init_from: str = setting("", "initial weights of a new run; classes, image size and scales may differ",
                             optional_path, beyond=True)
    posthoc_ema: int = setting(0, "steps between snapshots for scripts/posthoc_ema.py; 0: none", COUNT, beyond=True)
    fsdp: bool = flag("shard weights, gradients, optimizer and EMA across processes (FSDP2)", beyond=True)
    deterministic: bool = flag("use deterministic, slower CUDA algorithms: a resumed run is bit-identical", beyond=True)
    t_dist: str | tuple = setting("uniform", "distribution of training times: uniform, logit_normal:MEAN,STD or "
                                  "shift:K; or one per scale, separated by ;", time_distribution, beyond=True)
    condition_noise: float = setting(0.0, "maximum std of the noise on the coarser scales in training", REAL,
                                     beyond=True)
    head: str = setting("scale", "ablation: flow head with attention within a scale, or none",
                        one_of(*ablated.CHOICES["head"]), beyond=True)
    objective: str = setting("flow", "ablation: flow matching, or DDPM's epsilon prediction",
                             one_of(*ablated.CHOICES["objective"]), beyond=True)
    condition: str = setting("spatial_adaln", "ablation: how the flow head is conditioned on the transformer's output",
                             one_of(*ablated.CHOICES["condition"]), beyond=True)
    pyramid: str = setting("latent", "ablation: coarse scales from the downsampled latent or image",
                           one_of(*ablated.CHOICES["pyramid"]), beyond=True)
    dry_run: int = setting(None, "check and describe this training on N processes; needs no GPU, writes nothing",
                           POSITIVE, beyond=True, metavar="N")


def sampling_options():
    """(name, type, field) of an option for each setting of models.settings.Sampling; None is not chosen."""
    options = []
    for field in fields(Sampling):
        kind, beyond = field.metadata["kind"], field.metadata.get("beyond", False)
        help = f"{field.metadata['help']}; default: the checkpoint's"
        if field.default is not None:
            help += f", else {field.default}"
        option = setting(None, help, several(kind), metavar=choices_of(kind), beyond=beyond)
        options.append((option_name(field), object, option))
    return options


SamplingSettings = dataclasses.make_dataclass("SamplingSettings", sampling_options())
SamplingSettings.__doc__ = "sampling (an evaluation takes comma-separated lists)"


@dataclass
class Drawing(SamplingSettings, Checked):
    """image generation"""
    eval_bsz: int = setting(64, "images per process and batch when sampling", POSITIVE)
    guide: str = setting("", "autoguidance: a weaker checkpoint of the same geometry in place of the null class",
                         optional_path, beyond=True)


@dataclass
class Extractors(Checked):
    """feature networks"""
    feature_extractor: tuple = setting(("inception",), "feature networks of the metrics: NAME,NAME, or NAME=FILE with "
                                       "weights from a file, not downloaded; default inception", list_of(str),
                                       beyond=True)


@dataclass
class Evaluation(Extractors):
    """evaluation"""
    num_images: int = setting(50000, "number of images to generate", POSITIVE)
    evaluate: bool = flag("evaluate --resume instead of training; implied by eval.py")
    fid_stats: str = setting(None, "reference: released:adm_in256, released:adm_in512, a folder of images, or an .npz "
                             "of statistics (with features for KID, precision, recall); default: "
                             "fid_stats/adm_in256_stats.npz", path, beyond=True)
    labels: str = setting("balanced", "labels to sample: balanced, train (as frequent as in training), or a file with "
                          "one label or class name per line", path, beyond=True)
    save_images: tuple = setting((), "save the images: png to images/ (default), npz to samples.npz for ADM's "
                                 "evaluator, or png,npz", list_of(one_of("png", "npz")), beyond=True,
                                 nargs="?", const="png", metavar="KIND")


@dataclass
class SamplingOptions(Model, Drawing, Weights, Runtime):
    """scripts that draw images of a checkpoint"""


@dataclass
class EvaluationOptions(Model, Drawing, Evaluation, Columns, Weights, Runtime, Output):
    """eval.py"""
    data_path: str = setting("./data/imagenet", "ignored; accepted for the published commands", path)
    background: tuple = setting(None, "colour behind transparent pixels of reference images: white (default), "
                                "'#ff8000' or 255,128,0", color, beyond=True)


@dataclass
class TrainingOptions(Model, Training, Data, Columns, Drawing, Evaluation, Weights, Runtime, Output):
    """main_flowar.py, which evaluates too"""


# ---- sampling: from options to settings -------------------------------------------------------------------------


def given_settings(args):
    """{setting: value} of the settings of sampling that the options choose."""
    return stored_settings(vars(args))


def stored_settings(options):
    """{setting: value} of the settings of sampling among {option: value}, as a checkpoint holds them."""
    for name, neutral in REMOVED.items():
        if options.get(name) not in (None, neutral):
            log(f"warning: the checkpoint sets --{name} {options[name]}, which no longer exists: its images will "
                "differ")
    stored = {}
    for field in fields(Sampling):
        value = options.get(option_name(field))
        if value is not None:
            stored[field.name] = value
    return stored


def sweep(args):
    """{name: options with one value each} for every combination of the settings that have several values."""
    varied = {name: getattr(args, name) for name in SETTINGS if isinstance(getattr(args, name), list)}
    combinations = {}
    for values in itertools.product(*varied.values()):
        name = "_".join(option + as_text(value) for option, value in zip(varied, values))
        combinations[name] = replace(args, **dict(zip(varied, values)))
    return combinations


def check_single(args):
    """FlowARError if a setting of sampling has several values, which only an evaluation takes."""
    for name in SETTINGS:
        if isinstance(values := getattr(args, name), list):
            raise FlowARError(f"--{name} has {len(values)} values: only an evaluation takes more than one")


# ---- what follows from the options, as copies --------------------------------------------------------------------


def model_options(args):
    """FlowAR's arguments out of the options."""
    names = ("img_size", "vae_stride", "patch_size", "vae_embed_dim", "class_num", "diffloss_d", "diffloss_w",
             "buffer_size", "attn_dropout", "proj_dropout", "label_drop_prob", "use_checkpoint", "t_dist",
             "condition_noise", "head", "objective", "condition", "pyramid")
    return {"scale": args.scales, **{name: value for name, value in vars(args).items() if name in names}}


def chosen_beyond(args):
    """The fields beyond the release's options that are not at their defaults."""
    return [field for field in fields(args) if field.metadata.get("beyond")
            and getattr(args, field.name) != field.default]


def beyond_release(args):
    """'--option value ...' of what is chosen beyond the release's options."""
    words = []
    for field in chosen_beyond(args):
        value = getattr(args, field.name)
        words.append(f"--{option_name(field)}")
        if type(value) is tuple:
            words.append((";" if field.name == "t_dist" else ",").join(map(str, value)))
        elif not isinstance(value, bool):
            words.append(str(value))
    return " ".join(words)


def check_training(args):
    """FlowARError for options that contradict each other, or that a training would ignore."""
    check_single(args)
    if args.compile == "graphs":
        raise FlowARError("--compile graphs is for sampling only: use --compile in training")
    if args.start_epoch is not None and args.start_epoch >= args.epochs:
        raise FlowARError(f"--start_epoch {args.start_epoch} leaves nothing to train: --epochs is {args.epochs}")
    if args.fsdp and args.precision == "fp16":
        raise FlowARError("--fsdp does not support --precision fp16 (loss scaling would differ between processes): use "
                          "bf16 or fp32")
    if args.fsdp and args.optimizer == "muon":
        raise FlowARError("--fsdp does not support --optimizer muon (bf16 products of sharded matrices round "
                          "differently from DDP): use adamw, or leave out --fsdp")
    ignored = ["guide", "weights", "save_images"]
    if not args.online_eval:
        ignored += [field.name for field in fields(Evaluation) if field.metadata.get("beyond")]
    for field in chosen_beyond(args):
        if field.name in ignored:
            raise FlowARError(f"--{option_name(field)} is for evaluation only (--evaluate, or --online_eval in "
                              "training)")


def evaluation_options(args):
    """eval.py's options out of a training's with --evaluate; FlowARError for one that an evaluation would ignore."""
    read = {"deterministic", *(field.name for field in fields(EvaluationOptions))}
    for field in chosen_beyond(args):
        if field.name not in read:
            raise FlowARError(f"--{option_name(field)} is for training only: leave it out with --evaluate")
    return take_options(EvaluationOptions, args)


def resolve_training(args, world_size, saved_batch=None):
    """The options with the global batch, its batches (at most the one given) and forward passes, and the peak learning
    rate. saved_batch: the global batch before a resume.
    """
    at_once = args.batch_size * world_size
    args = replace(args, global_batch=args.global_batch or saved_batch or at_once)
    if args.global_batch != at_once:
        each, rest = divmod(args.global_batch, world_size)
        if rest:
            raise FlowARError(f"the global batch of {args.global_batch} is not a multiple of {world_size} processes: "
                              "change --global_batch or the number of processes")
        batch = max(size for size in range(1, min(args.batch_size, each) + 1) if each % size == 0)
        passes = each // batch
        log(f"global batch {args.global_batch}: {batch} images x {world_size} processes x {passes} forward passes")
        args = replace(args, batch_size=batch, accum_iter=passes)
    if args.lr is None:
        blr = BASE_RATE if args.blr is None else args.blr
        args = replace(args, lr=peak_learning_rate(blr, args.global_batch))
    return args
