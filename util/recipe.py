"""From the options of a training to the Run that engine_flowar.train takes: data, networks, optimizer, files."""
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from models import build_model
from models.settings import Sampling
from models.variants.ablated import describe
from util import cluster, dry_run, manifest
from util.cluster import from_main, is_main, log, world_size
from util.data.loaders import rank_cpus
from util.data.source import Source, check_classes, open_training_data
from util.evaluation.metrics import Measure, build_measure
from util.evaluation.pipeline import plan_reports
from util.evaluation.sampler import Sampler
from util.evaluation.store import Plan
from util.geometry import compare_geometry
from util.options import beyond_release, check_training, given_settings, model_options, resolve_training
from util.speed import prepare
from util.training import checkpoint
from util.training.checkpoint import CheckpointWriter
from util.training.initial import load_initial_weights
from util.training.logging import TrainingLog
from util.training.optimization import EMA, build_optimizer
from util.training.parallel import distribute
from util.training.progress import Progress
from util.training.record import make_record


class Recipe(NamedTuple):
    """The numbers of a training loop."""
    batch_size: int  # images of a rank's forward pass
    accum_iter: int  # forward passes of an optimizer step
    global_batch: int  # images of an optimizer step
    epochs: int
    schedule: dict  # of util.training.optimization.learning_rate
    grad_clip: float  # 0: none
    precision: str
    seed: int
    log_steps: int  # between log entries
    save_steps: tuple  # numbers of steps between checkpoints; 0 or None: no such
    save_epochs: tuple  # numbers of epochs between checkpoints; 0: no such
    report_epochs: int  # between reports


class Reports(NamedTuple):
    """What is told of a training between its epochs."""
    validation: Source | None
    sampler: Sampler | None  # of the EMA; None without a VAE
    plan: Plan
    measure: Measure | None  # of the EMA's images
    model: str
    output: Path


class Run(NamedTuple):
    """What a training consists of."""
    recipe: Recipe
    model: torch.nn.Module  # the network, or DDP around it
    network: torch.nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    source: Source  # of the training set
    progress: Progress
    reports: Reports
    writer: CheckpointWriter | None  # on rank 0
    logger: TrainingLog
    record: dict  # of what is trained on, for checkpoints
    lock: object  # while it lives, no other run writes to the output folder
    signals: cluster.StopSignals | None = None

    @property
    def images(self):
        """Of the training set."""
        return len(self.source.loader.dataset)

    @property
    def steps(self):
        """Optimizer steps of an epoch: whole global batches."""
        return self.images // self.recipe.global_batch


def build_run(args, device, build=lambda args, record: build_model(args.model, **model_options(args))):
    """The Run of TrainingOptions. build(options, what checkpoints will say of the data) -> the network. With --dry_run
    it is described instead, and None returned.
    """
    # ---- 1. options, and what to resume
    check_training(args)
    beyond = beyond_release(args)
    args = replace(args, precision=cluster.set_precision(args.precision, dry_run.device_of(args, device)))
    lock = []  # on rank 0
    from_main(lambda: lock.append(checkpoint.claim_folder(args.output_dir, args.resume, args.dry_run)))
    start = checkpoint.find_start(args.resume, args.output_dir)
    args = resolve_training(args, world_size(), start and start.global_batch)

    # ---- 2. data
    data = open_training_data(args, device, class_num=start and start.class_num)
    args, source, vae = data.options, data.source, data.vae
    record = make_record(vars(args), data.identity, data.origin)
    if start:
        start.check_trained_on(record)
        compare_geometry(args, start.geometry(args.vae_embed_dim), start.path)
    check_classes(record["data"]["classes"], args.class_num)
    plan = from_main(lambda: plan_reports(args, record["data"]))
    measure = build_measure(args, args.img_size, plan.labels, device) if args.online_eval else None
    if measure and not args.dry_run:
        measure.read_references()

    # ---- 3. network, average, optimizer
    torch.manual_seed(args.seed)
    network, device = dry_run.place(lambda: build(args, record), device, args.dry_run, args.fsdp)
    network.schedule_sampling(Sampling.of({}, given_settings(args)))  # of the reports: refuses now what does not fit
    if args.init_from and start is None:
        load_initial_weights(args.init_from, network, record)
    ema = EMA(network, args.ema_rate, posthoc=args.posthoc_ema > 0)
    if args.compile and not args.dry_run:
        prepare.compile_training(network)
        prepare.compile_sampling(ema.module, args.compile)
    model = distribute(network, ema, device, args.fsdp, static_graph=args.accum_iter == 1)
    optimizer = build_optimizer(network, args.lr, args.weight_decay, args.optimizer, args.betas)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    progress = checkpoint.resume(start, (network, ema, optimizer, scaler), record)
    del start  # the file is mapped no longer
    if args.warmup_epochs >= args.epochs:
        log(f"warning: --warmup_epochs {args.warmup_epochs:g} with --epochs {args.epochs}: the learning rate never "
            "reaches its peak")
    if args.dry_run:
        return dry_run.report(args, source, network, optimizer, progress)
    cluster.agree("the step to resume at", (progress.epoch, progress.step))

    # ---- 4. the loop's numbers, reports and files
    schedule = dict(lr=args.lr, min_lr=args.min_lr, epochs=args.epochs, warmup_epochs=args.warmup_epochs,
                    schedule=args.lr_schedule)
    recipe = Recipe(batch_size=args.batch_size, accum_iter=args.accum_iter, global_batch=args.global_batch,
                    epochs=args.epochs, schedule=schedule, grad_clip=args.grad_clip, precision=args.precision,
                    seed=args.seed, log_steps=args.log_freq, save_steps=(args.save_every.steps, args.posthoc_ema),
                    save_epochs=(args.save_last_freq, args.keep_every), report_epochs=args.eval_freq)
    sampler = None
    if vae is not None:
        sampling = Sampling.of({}, given_settings(args))
        sampler = Sampler(ema.module, vae, sampling, args.precision, args.seed, args.eval_bsz)
    reports = Reports(data.validation, sampler, plan, measure, args.model, Path(args.output_dir))
    writer = None
    if is_main():
        writer = CheckpointWriter(args.output_dir, args.keep, minutes=args.save_every.minutes, step=progress.step,
                                  keep_every=args.keep_every, resume=args.resume)
    logger = TrainingLog(args.log_dir or args.output_dir, device, progress.step, args.wandb, record["args"])
    manifest.add_start(args.output_dir, manifest.describe_start(record, device, step=progress.step))
    log(f"{args.model}{describe(network)}: {sum(p.numel() for p in network.parameters()):,} parameters, scales "
        f"{network.scale}, {world_size()} x {device.type} with {rank_cpus():g} CPUs and {source.loader.num_workers} "
        f"data workers each, {args.precision}, global batch {args.global_batch}, peak lr {args.lr:.2e}; options beyond "
        f"the release: {beyond or 'none'}")
    return Run(recipe, model, network, ema, optimizer, scaler, source, progress, reports, writer, logger, record, lock)
