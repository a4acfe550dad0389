"""Distil a FlowAR into a student that samples in one or two steps per scale, without guidance (docs/few-step.md).

    torchrun --standalone --nproc_per_node=8 scripts/distill.py --resume pretrained_models/FlowAR-S.pth \\
        --cfg 4.3 --num_step 25 --guidance 0.9 --output_dir output/student \\
        --cached_path imagenet_feature --vae_path kl16.ckpt

--resume is the teacher, and the sampling options are its own, as in eval.py. The student begins as the teacher and
learns what they make of noise. Training, data, files and reports are those of main_flowar.py, with other defaults; the
same command resumes. --output_dir is a run like any other: eval.py, scripts/sample.py and load_pipeline sample it with
--student_steps steps a scale.
"""
from dataclasses import dataclass, replace

from engine_flowar import train
from models import FlowAR, FlowARError, load_flowar
from models.registry import recognise_size
from models.settings import FRACTION, Sampling, drop_removed, one_of, setting
from models.variants.ablated import RELEASED
from models.variants.rectified import RectifiedFlowAR
from models.weights import file_hash
from util import cluster
from util.cluster import AUTOCAST, from_main, log
from util.command_line import POSITIVE, parse_options
from util.evaluation.pipeline import saved_sampling
from util.geometry import compare_geometry
from util.options import TrainingOptions, check_single, given_settings
from util.recipe import build_run
from util.speed import prepare
from util.training import checkpoint

DEFAULTS = dict(epochs=1, warmup_epochs=0, batch_size=16, lr=2e-3, ema_rate=0.99, save_last_freq=1, eval_freq=1,
                attn_dropout=0.0, proj_dropout=0.0, label_drop_prob=0.0)


@dataclass
class DistillationOptions(TrainingOptions):
    """distillation"""
    student_steps: int = setting(2, "steps per scale that the student samples with", POSITIVE, beyond=True)
    reuse: int = setting(4, "training times per pair of noise and teacher solution", POSITIVE, beyond=True)
    at_noise: float = setting(0.25, "fraction of training times that are exactly 1 (pure noise); 1: for one-step "
                              "sampling only", FRACTION, beyond=True)
    condition_on: str = setting("own", "coarser scales to condition on: those the teacher samples (own), or latents of "
                                "the training images", one_of("own", "latents"), beyond=True)
    teacher: str | None = None  # these three are no options: checkpoints remember them
    teacher_sha256: str | None = None
    teacher_sampling: dict | None = None


def open_teacher(args):
    """(FlowAR on the CPU, its Checkpoint, its Sampling) of --resume."""
    if not args.resume:
        raise FlowARError("--resume is missing: pass the teacher's checkpoint, or a name such as released:flowar_small")
    for name in ("dry_run", "evaluate", "init_from", "condition_noise", "guide", "attn_dropout", "proj_dropout",
                 "label_drop_prob"):
        if getattr(args, name):
            raise FlowARError(f"--{name} is not supported in distillation: leave it out")
    start = checkpoint.open_on_all(args.resume)
    teacher = load_flowar(start.path, args.weights)  # the file: of a folder another might be taken
    if type(teacher) is not FlowAR:
        raise FlowARError(f"{start.path}: models with ablation options cannot be distilled")
    sampling = Sampling.of(saved_sampling(start.content, args.resume), given_settings(args))
    teacher.schedule_sampling(sampling)  # refuses now what does not fit
    return teacher, start, sampling


def student_options(args, teacher, path, sampling):
    """The options of the student's run: the teacher's geometry, its own settings of sampling, and where it is from."""
    geometry = {**recognise_size(teacher.state_dict(), path), "scales": teacher.scale}
    for name in ("img_size", "vae_stride", "patch_size", "vae_embed_dim", "class_num"):
        geometry[name] = teacher.config[name]
    compare_geometry(args, geometry, path)
    own = {**dict.fromkeys(Sampling().by_option()), "num_step": args.student_steps, "time_grid": "uniform",
           "solver": "euler", "cfg": 1.0}
    facts = dict(teacher=str(path), teacher_sha256=from_main(lambda: file_hash(path)), teacher_sampling=vars(sampling))
    return replace(args, **geometry, **own, **facts, **RELEASED, resume=args.output_dir, weights=None)


def check_same(args):
    """FlowARError if --output_dir holds the student of another teacher or of other settings of it."""
    if not from_main(lambda: checkpoint.list_checkpoints(args.output_dir)):
        return
    start = checkpoint.open_on_all(args.output_dir)
    before = {**start.options, "teacher_sampling": drop_removed(start.options.get("teacher_sampling") or {})}
    for name in ("teacher_sha256", "teacher_sampling", "reuse", "at_noise", "condition_on"):
        if before.get(name) != getattr(args, name):
            raise FlowARError(f"{start.path}: {name} is {before.get(name)}, now {getattr(args, name)}: use the same, "
                              "or choose another --output_dir")


def main():
    args = parse_options(DistillationOptions, description=__doc__.splitlines()[0], defaults=DEFAULTS)
    if args.deterministic:
        cluster.set_deterministic()
    device = cluster.init(args.device, args.timeout)
    check_single(args)
    teacher, start, sampling = open_teacher(args)
    args = student_options(args, teacher, start.path, sampling)
    check_same(args)
    log(f"teacher: {start.path}, {', '.join(f'{name} {value}' for name, value in vars(sampling).items())}")

    def build(args, record):
        start.check_trained_on(record)
        student = RectifiedFlowAR(teacher, vars(sampling), args.reuse, args.at_noise, args.condition_on == "latents",
                                  args.t_dist)
        student.use_checkpoint = student.flownet.use_checkpoint = args.use_checkpoint
        prepare.for_sampling(teacher.to(device), AUTOCAST.get(args.precision))
        if args.compile:
            prepare.compile_sampling(teacher)
        return student

    train(build_run(args, device, build))


if __name__ == "__main__":
    cluster.run_main(main)
