"""Training and evaluation: train, train_one_epoch, validate; evaluate_sweep, evaluate.

What they take is built from a program's options: a Run by util/recipe.py, an evaluation by util/evaluation/pipeline.py.
"""
import contextlib
import gc
import math
import time
from typing import NamedTuple

import torch

from models import FlowARError
from util import manifest
from util.cluster import (Preempted, all_reduce_sum, autocast, barrier, from_main, gather_to_main, is_main, log, rank,
                          stop_signals, world_size)
from util.evaluation.reports import describe_speed, print_report, write_sweep
from util.evaluation.sampler import count_passes, sample_and_measure
from util.evaluation.store import Store, write_png
from util.training.checkpoint import content_of
from util.training.health import report_bad_step
from util.training.optimization import adjust_learning_rate
from util.training.parallel import gathered, local, snapshot, whole
from util.training.randomness import TRAINING, VALIDATION, derive_seed, draw, draw_each, seed_dropout

MAX_BAD_STEPS = 20  # in a row, with a loss or gradient that is not finite, before training stops


# ---- a training --------------------------------------------------------------------------------------------


def train(run):
    """Train a util.recipe.Run to its last epoch, with checkpoints and reports between epochs."""
    recipe, progress = run.recipe, run.progress
    gc.collect()
    gc.freeze()  # leave out what is there already: a long collection on one rank delays all
    with stop_signals() as signals, run.writer or contextlib.nullcontext():
        run = run._replace(signals=signals)
        if progress.done == 0 and is_report_epoch(recipe, progress.epoch):
            if from_main(lambda: progress.step not in run.logger.reported):  # the run before ended first
                report(run)
        while progress.epoch < recipe.epochs:
            train_one_epoch(run)
            report_due = is_report_epoch(recipe, progress.epoch)
            due = report_due or any(every and progress.epoch % every == 0 for every in recipe.save_epochs)
            # Nothing is saved after an epoch of bad steps alone, so that good checkpoints stay.
            if (due and progress.bad_in_a_row < run.steps) or progress.epoch == recipe.epochs:
                save_checkpoint(run)
            if report_due:
                report(run)
    gc.unfreeze()
    barrier()
    run.logger.close()


def is_report_epoch(recipe, finished):
    """Whether a report follows when `finished` epochs are done."""
    return finished > 0 and (finished % recipe.report_epochs == 0 or finished == recipe.epochs)


def report(run):
    """Validation loss of raw and EMA weights, sample grids, evaluation, all after the last finished epoch. A signal
    ends it at once, since the step before it is or is being saved; a resume repeats it.
    """
    step, epoch, reports = run.progress.step, run.progress.epoch, run.reports
    message = f"stopped by a signal: saved after step {step}; a resume repeats the report of this step"
    with run.signals.at_once(message), gathered(run.network, run.ema.module):
        if reports.validation is not None:
            for name, module in (("val", run.network), ("val_ema", run.ema.module)):
                loss, scales = validate(module, reports.validation, run.recipe.precision)
                scales = {f"loss_scale_{s}": value for s, value in scales.items()}
                run.logger.scalars(name, step, epoch, {"loss": loss, **scales})
                log(f"epoch {epoch}: {name} loss {loss:.4f}")
        if reports.sampler is not None and is_main():
            log_samples(run, "ema", reports.sampler)
            if run.ema.rate**step > 0.01:  # the average is partly the random start, and its pictures noise
                log_samples(run, "raw", reports.sampler._replace(model=run.network.eval(), name="the model"))
        if reports.sampler is not None and reports.measure is not None:
            description = {"model": reports.model, "epoch": epoch, "weights": "ema"}
            output = reports.output / f"eval_epoch{epoch:04d}"
            results = evaluate(reports.sampler, reports.plan, reports.measure, description, output)
            if results is not None:
                values = {name: results[name] for name in results["metrics"]}
                run.logger.scalars("eval", step, epoch, values)
                log(f"epoch {epoch}: {values}")
        run.logger.report_done(step, epoch)
        barrier()


def log_samples(run, name, sampler):
    """A grid of samples to the log and to a file of the output folder."""
    try:
        grid = sampler.grid(run.reports.plan.labels.allowed)
    except FlowARError as error:  # such as a VAE that overflows in fp16: no reason to end a training
        log(f"warning: samples skipped: {error}")
        return
    run.logger.image(f"samples/{name}", grid, run.progress.step)
    file = f"samples_epoch{run.progress.epoch:04d}{'_raw' if name == 'raw' else ''}.png"
    write_png(grid.movedim(0, 2).numpy(), run.reports.output / file)


# ---- the loop ------------------------------------------------------------------------------------------------


def train_one_epoch(run):
    """Optimizer steps from where run.progress is to the end of its epoch. Raises FlowARError or Preempted to end the
    training, FloatingPointError where its weights are not finite.
    """
    recipe, progress, network = run.recipe, run.progress, run.network
    run.model.train()
    run.source.loader.sampler.set_epoch(progress.epoch, start=progress.done * recipe.global_batch)
    batches, epoch, save = iter(run.source.loader), progress.epoch, False
    run.logger.start_epoch(epoch, recipe.epochs, run.steps * recipe.global_batch, progress.done * recipe.global_batch)
    for index in range(progress.done, run.steps):
        # The step's rate, images and draws; the mean gradient of its forward passes.
        lr = adjust_learning_rate(run.optimizer, epoch + index / run.steps, **recipe.schedule)
        draws = draw(network, recipe.global_batch, derive_seed(recipe.seed, TRAINING, progress.step), run.source.device)
        parts = [prepare_batch(run, next(batches), draws, part) for part in range(recipe.accum_iter)]
        losses = forward_and_backward(run, parts)
        run.scaler.unscale_(run.optimizer)
        norm = whole(torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.grad_clip or math.inf))

        # Reduce loss and gradient norm over the ranks: the only point of a step where the host waits for the device.
        # Some 30 kernels of AdamW and EMA are launched after it; FlowAR-S's forward and backward pass has hundreds.
        result = read_result(run, norm, losses)

        # Update or skip, whatever the optimizer is.
        if result.finite:
            run.optimizer.step()
            run.ema.update(network, progress.step + 1)
            progress.add(result.norm, result.losses)
        else:
            progress.add_bad()
        run.scaler.update()
        network.zero_grad(set_to_none=True)  # of parameters too that the optimizer leaves alone
        progress.advance(run.steps)
        run.logger.advance(recipe.global_batch)
        if not result.finite:
            first = index * recipe.global_batch
            images = run.source.loader.sampler.indices(first, first + recipe.global_batch)  # this rank's
            numbers = result.norm, result.losses[0], result.own_loss, progress.bad_in_a_row
            report_bad_step(run.logger, progress.step, numbers, [latents for latents, _, _ in parts], images)
        if progress.bad_in_a_row >= MAX_BAD_STEPS:
            check_weights(run)
            raise FlowARError(f"{progress.bad_in_a_row} steps in a row with non-finite loss or gradients, up to step "
                              f"{progress.step}: lower --lr or --blr, or use --precision fp32")

        # Log, save, stop.
        if (index + 1) % recipe.log_steps == 0 or progress.done == 0:
            log_period(run, epoch + (index + 1) / run.steps, lr)
        if result.failed:
            raise writing_failed(run)
        save = save or result.save or any(every and progress.step % every == 0 for every in recipe.save_steps)
        if result.stop or (save and result.finite):  # good checkpoints stay
            save_checkpoint(run)
            save = False
        if result.stop:
            if run.writer is not None:
                run.writer.wait()
            barrier()
            raise Preempted(f"stopped by a signal: saved after step {progress.step}", run.signals.status)
    run.logger.end_epoch()


def prepare_batch(run, batch, draws, part):
    """(latents, labels, draws) of forward pass `part` of a step, on the device, given the draws of its global batch."""
    count = run.recipe.batch_size * world_size()
    inputs, labels = (value.to(run.source.device, non_blocking=True) for value in batch)
    mine = draws.take(slice(part * count + rank(), (part + 1) * count, world_size()))
    return run.source.latents(inputs, mine.posterior), labels, mine.draws


def forward_and_backward(run, parts):
    """Gradients of the mean loss over the forward passes; returns (1 + scales,), the loss and that of every scale."""
    seed_dropout(run.recipe.seed, run.progress.step)
    losses = []
    for part, (latents, labels, draws) in enumerate(parts):
        last = part + 1 == len(parts)
        with contextlib.nullcontext() if last or run.model is run.network else run.model.no_sync():
            with autocast(latents.device, run.recipe.precision):
                loss, scales = run.model(latents, labels, **draws._asdict(), return_scales=True)
            run.scaler.scale(loss / len(parts)).backward()
        losses.append(torch.cat((loss.detach()[None], scales)))
    return torch.stack(losses).mean(dim=0)


class StepResult(NamedTuple):
    """What came of a step's forward and backward passes."""
    norm: float  # of the gradients, before they were clipped
    losses: list  # of the global batch, then of every scale
    own_loss: float  # of this rank's images
    finite: bool  # loss and gradient norm, on every rank
    stop: bool  # whether some rank got a signal to stop
    save: bool  # whether a checkpoint is due by the clock
    failed: bool  # whether the checkpoint before could not be written


def read_result(run, norm, losses):
    """The StepResult, by one small collective; all but own_loss is the same on all ranks, so that they decide alike."""
    writer = run.writer
    requests = losses.new_tensor([run.signals.asked, writer is not None and writer.is_due(),
                                  writer is not None and writer.error is not None])
    shared = all_reduce_sum(torch.cat((losses, requests, norm.detach()[None]))) / world_size()
    norm, own_loss, *losses, stop, save, failed, mean_norm = torch.cat((norm[None], losses[:1], shared)).tolist()
    finite = math.isfinite(losses[0]) and math.isfinite(mean_norm)
    return StepResult(norm, losses, own_loss, finite, stop=stop > 0, save=save > 0, failed=failed > 0)


def writing_failed(run):
    """The error that ends the training on every rank, where rank 0 could not write; it alone prints the reason."""
    if run.writer is not None:
        return run.writer.error
    error = FlowARError("rank 0 could not write a checkpoint")
    error.on_all_ranks = True
    return error


def check_weights(run):
    """FloatingPointError where the network's weights are not finite, on every rank alike."""
    finite = [weight.isfinite().all() for weight in local([weight.detach() for weight in run.network.parameters()])]
    if all_reduce_sum((~torch.stack(finite)).sum()) > 0:
        raise FloatingPointError(f"weights are not finite after step {run.progress.step}: the optimizer made them so; "
                                 "no checkpoint of them is written, the last one before is whole")


def log_period(run, epoch, lr):
    """A log entry of the finite steps since the last one, if there are any."""
    if not run.progress.period:
        return
    grad_norm, (loss, *losses) = run.progress.take_means()
    left = (run.recipe.epochs - epoch) * run.steps * run.recipe.global_batch  # images
    scales = {f"loss_scale_{s}": value for s, value in zip(run.network.scale, losses)}
    values = {"loss": loss, "grad_norm": grad_norm, "lr": lr, **scales}
    run.logger.training(run.progress, epoch, left, values)


def save_checkpoint(run):
    """Begin to write a checkpoint of the last step, unless there is one; FloatingPointError where weights are not
    finite: the last checkpoint before stays.
    """
    if not from_main(lambda: run.writer.wants(run.progress.step)):
        return
    check_weights(run)
    content = snapshot(content_of(run.network, run.ema, run.optimizer, run.scaler, run.progress, run.record))
    if run.writer is not None:
        run.logger.flush()
        run.writer.save(content, run.progress.step)


@torch.no_grad()
def validate(network, source, precision):
    """(loss, {scale: loss}) of a validation set, without dropout or label drop. An image's draws are always the same,
    whatever --seed: draws of their own would move the losses of seeds apart by more than most changes do.
    """
    training, loader = network.training, source.loader
    network.eval()
    total = torch.zeros(len(network.scale) + 1, dtype=torch.float64, device=source.device)  # sums per scale, count
    for i, (batch, labels) in enumerate(loader):
        first = rank() + i * loader.batch_size * world_size()
        indices = range(first, first + len(labels) * world_size(), world_size())
        mine = draw_each(network, 0, VALIDATION, indices, source.device)
        latents, labels = source.latents(batch.to(source.device), mine.posterior), labels.to(source.device)
        with autocast(source.device, precision):
            losses = network.scale_losses(latents, labels, t=mine.draws.t, noise=mine.draws.noise)
        total[:-1] += losses.double().sum(dim=1)
        total[-1] += len(labels)
    network.train(training)
    means = (all_reduce_sum(total)[:-1] / total[-1]).tolist()
    return network.weighted(means), dict(zip(network.scale, means))


# ---- evaluation ----------------------------------------------------------------------------------------------


def evaluate_sweep(samplers, plan, measure, description, output):
    """evaluate() with each of {name: Sampler} into a folder of its name; of several, a table and a plot."""
    for name, sampler in samplers.items():
        report = evaluate(sampler, plan, measure, description, output / name)
        if report is None:
            continue
        print_report(report, output / name)
        if len(samplers) > 1:
            write_sweep(output, report, sampler.sampling.by_option())


def evaluate(sampler, plan, measure, description, output):
    """Sample images on all ranks and measure them at once; the report goes to <output>/results.json.

    Batches of consecutive images are dealt to the ranks, so that a picture does not depend on their number. Finished
    batches are kept in <output>/partial until the end: the same command resumes where it was killed.

    Args:
        sampler: util.evaluation.sampler.Sampler; plan, measure: Plan of util.evaluation.store, Measure of .metrics.
        description: what is evaluated, for the report, which is returned on rank 0 (None where a training's pictures
            are not finite). Global random state is left alone.
    """
    store, count = Store(output), plan.num_images
    batches = {number: range(first, min(first + sampler.batch, count))
               for number, first in enumerate(range(0, count, sampler.batch))}
    settings = {**description, **sampler.settings(), **plan.settings(), **measure.settings(),
                "commit": from_main(manifest.code_version)}
    missing = list(batches)
    if plan.persistent:
        report, missing = from_main(lambda: store.resume(settings, batches))
        if report is not None:
            log(f"{output}: already evaluated with the same settings")
            store.close()
            return report if is_main() else None
    manifest.add_start(output, plan.start)
    measure.read_references()
    start = time.time()
    mine = {number: batches[number] for number in missing[rank()::world_size()]}
    parts = gather_to_main(sample_and_measure(sampler, plan, measure.extractor, mine, store))
    seconds = time.time() - start  # of the slowest rank
    if parts is None:
        return None
    for part in parts:
        store.finished.update(part)
    measured = [store.finished[number] for number in batches]
    bad = torch.cat([batch["bad"] for batch in measured]).tolist()
    if bad and not plan.persistent:  # no reason to end a training, which would meet them again when it is resumed
        log(f"warning: evaluation skipped: {len(bad)} of {count} images are not finite")
        return None
    sampler.refuse_not_finite(bad, count)
    report = {**measure.compute(measured, sampler.device), **settings,
              **describe_speed(measured, count, count_passes(sampler.model, sampler.sampling)),
              "images_per_second": sum(len(batches[number]) for number in missing) / max(seconds, 1e-9),
              **manifest.describe_machine(sampler.device)}
    if plan.save_npz:
        store.write_npz(len(batches), plan.labels.values)
    store.finish(report)
    return report
