"""The recipe of a training: from options to data, network, average and optimizer; epochs, and reports between them.

main_flowar.py trains a FlowAR by it, scripts/distill.py a student. The loops are in engine_flowar.py.
"""
import contextlib
import gc
from dataclasses import replace
from pathlib import Path

import torch

from engine_flowar import Recipe, Run, evaluate, save_checkpoint, train_one_epoch, validate
from models import FlowARError, build_model
from models.settings import Sampling
from models.variants.ablated import describe
from util import cluster, dry_run, manifest
from util.cluster import from_main, is_main, log, world_size
from util.data.source import check_classes, open_sources
from util.evaluation.metrics import build_measure
from util.evaluation.pipeline import build_sampler, plan_reports
from util.evaluation.store import write_png
from util.geometry import check_geometry
from util.speed import prepare
from util.options import beyond_release, check_training, given_settings, model_options, resolve_training
from util.training import checkpoint
from util.training.initial import load_initial_weights
from util.training.logging import TrainingLog
from util.training.optimization import EMA, build_optimizer
from util.training.parallel import distribute, gathered
from util.training.record import make_record


def train(args, device, build=lambda args, record: build_model(args.model, **model_options(args))):
    """build(options, what checkpoints will say of the data) -> the network."""
    # ---- 1. options, and what to resume
    check_training(args)
    beyond = beyond_release(args)
    args = replace(args, precision=cluster.set_precision(args.precision, dry_run.device_of(args, device)))
    lock = is_main() and checkpoint.claim_folder(args.output_dir, args.resume, args.dry_run)
    start = checkpoint.find_start(args.resume, args.output_dir)
    args = resolve_training(args, world_size(), start and start.global_batch)

    # ---- 2. data
    args, source, validation, vae, origin = open_sources(args, device, start and start.class_num)
    there = source.is_moments, validation is not None, vae is not None
    cluster.agree("whether there are cached latents, a validation set and a VAE", there)
    record = make_record(vars(args), from_main(source.identity), origin)
    if start:
        start.check_trained_on(record)
        check_geometry(args, start.geometry(args.vae_embed_dim), start.path)
    check_classes(record["data"]["classes"], args.class_num)
    plan = from_main(lambda: plan_reports(args, record["data"]))
    measure = build_measure(args, args.img_size, plan.labels, device) if args.online_eval else None
    if measure and not args.dry_run:
        measure.open()

    # ---- 3. model, average, optimizer
    torch.manual_seed(args.seed)
    network, device = dry_run.place(lambda: build(args, record), device, args.dry_run, args.fsdp)
    network.plan_sampling(Sampling.of({}, given_settings(args)))  # of the reports: refuses now what does not fit
    if args.init_from and start is None:
        load_initial_weights(args.init_from, network, record)
    ema = EMA(network, args.ema_rate, args.ema_warmup, posthoc=args.posthoc_ema > 0)
    if args.compile and not args.dry_run:
        prepare.compile_training(network)
        prepare.compile_sampling(ema.module, args.compile)
    model = distribute(network, ema, device, args.fsdp, static_graph=args.accum_iter == 1)
    optimizer = build_optimizer(network, args.lr, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    progress = checkpoint.resume(start, (network, ema, optimizer, scaler), record)
    del start  # the file is mapped no longer
    if args.dry_run:
        return dry_run.report(args, source, network, optimizer, progress)
    cluster.agree("the step to resume at", (progress.epoch, progress.step))

    # ---- 4. what the loop needs
    schedule = dict(lr=args.lr, min_lr=args.min_lr, epochs=args.epochs, warmup_epochs=args.warmup_epochs,
                    schedule=args.lr_schedule)
    recipe = Recipe(args.batch_size, args.accum_iter, args.global_batch, args.epochs, schedule, args.grad_clip,
                    args.precision, args.seed, args.log_freq, (args.save_every.steps, args.posthoc_ema))
    saving = args.output_dir, args.keep, args.save_every.minutes, progress.step, args.keep_every, args.resume
    writer = checkpoint.CheckpointWriter(*saving) if is_main() else None
    logger = TrainingLog(args.log_dir or args.output_dir, device, progress.step, args.wandb, record["args"])
    manifest.add_start(args.output_dir, manifest.describe_start(record, device, step=progress.step))
    log(f"{args.model}{describe(network)}: {sum(p.numel() for p in network.parameters()):,} parameters, scales "
        f"{network.scale}, {world_size()} x {device.type}, {args.precision}, global batch {args.global_batch}, peak lr "
        f"{args.lr:.2e}; beyond the release: {beyond or 'nothing'}")

    # ---- 5. epochs, and reports between them
    gc.collect()
    gc.freeze()  # what is there already: collections then take microseconds, and no rank holds up the others
    with cluster.stop_signals() as signals, writer or contextlib.nullcontext():
        run = Run(recipe, model, network, ema, optimizer, scaler, source, progress, writer, logger, signals, record)
        unreported = progress.done == 0 and from_main(lambda: progress.step not in logger.reported)
        if unreported and is_report_epoch(args, progress.epoch):
            report_or_stop(run, args, validation, plan, measure)  # the run before did not end this one
        while progress.epoch < args.epochs:
            train_one_epoch(run)
            saved = any(every and progress.epoch % every == 0 for every in (args.save_last_freq, args.keep_every))
            if saved or is_report_epoch(args, progress.epoch):
                save_checkpoint(run)
            if is_report_epoch(args, progress.epoch):
                report_or_stop(run, args, validation, plan, measure)
    gc.unfreeze()
    cluster.barrier()
    logger.close()
    del lock  # until here no other run may write to the folder


def is_report_epoch(args, finished):
    """Whether a report follows when `finished` epochs are done."""
    return finished > 0 and (finished % args.eval_freq == 0 or finished == args.epochs)


def report_or_stop(run, args, validation, plan, measure):
    """report(); a signal ends it at once, since the step before it is or is being saved. It is then made again."""
    message = f"asked to leave: saved after step {run.progress.step}, the report after it will be made again"
    with run.signals.at_once(message), gathered(run.network, run.ema.module):
        report(run, args, validation, plan, measure)


def report(run, args, validation, plan, measure):
    """Validation loss of raw and EMA weights, a sample grid, --online_eval, all after the last finished epoch."""
    step, epoch, out = run.progress.step, run.progress.epoch, Path(args.output_dir)
    if validation is not None:
        for name, module in (("val", run.network), ("val_ema", run.ema.module)):
            loss, scales = validate(module, validation, args.seed, args.precision)
            run.logger.scalars(name, step, epoch, {"loss": loss, **{f"loss_scale_{s}": v for s, v in scales.items()}})
            log(f"epoch {epoch}: {name} loss {loss:.4f}")
    if run.source.vae is not None:
        sampler = build_sampler(replace(args, resume=""), run.ema.module, run.source.vae, args.precision,
                                plan.labels.allowed)
        if is_main():
            samplers = {"ema": sampler}
            if run.ema.share_of_start(step) > 0.01:  # the average is partly the random start, and its pictures noise
                samplers["raw"] = sampler._replace(model=run.network.eval(), weights="the model")
            for name, sampled in samplers.items():
                try:
                    grid = sampled.grid()
                except FlowARError as error:  # such as a VAE that overflows in fp16: no reason to end a training
                    log(f"warning: no samples: {error}")
                    continue
                run.logger.image(f"samples/{name}", grid, step)
                write_png(grid.movedim(0, 2).numpy(), out / f"samples_epoch{epoch:04d}{'_raw' * (name == 'raw')}.png")
        if measure is not None:
            description = {"model": args.model, "epoch": epoch, "weights": "ema"}
            results = evaluate(sampler, plan, measure, description, out / f"eval_epoch{epoch:04d}")
            if results is not None:
                run.logger.scalars("eval", step, epoch, values := {name: results[name] for name in results["metrics"]})
                log(f"epoch {epoch}: {values}")
    run.logger.report_done(step, epoch)
    cluster.barrier()
