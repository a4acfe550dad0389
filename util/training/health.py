"""What went wrong in a step: a loss far above the usual, or something infinite or NaN, and where it began; and whether
the device computes the same for the same input.
"""
import socket
import warnings
from functools import partial

import torch

from util.cluster import gather_to_main
from util.training.parallel import gathered


def first_not_finite(network, losses, latents):
    """One line that names the first thing of a step that is not finite, or None.

    losses: functions, one a forward pass of the step, that compute its (scaled) loss; latents: what each of them reads.
    Latents come first, then modules' outputs in the order of the forward pass, then gradients in that of the backward
    pass, the parameters' last. Gradients that the network holds are left alone.
    """
    with gathered(network), torch.compiler.set_stance("force_eager"):  # hooks need modules; ranks stop at other places
        return _first_in_step(network, losses, latents)


def _first_in_step(network, losses, latents):
    for part, (loss, values) in enumerate(zip(losses, latents)):
        bad = (~values.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
        if bad:
            return f"the latents of image {', '.join(map(str, bad[:8]))} of this rank's batch {part}"
        found = _first_in_pass(network, loss)
        if found:
            return found
    return None


def _first_in_pass(network, loss):
    found = []

    def check(value, what):
        # Detached: recomputation counts what is saved.
        if not found and isinstance(value, torch.Tensor) and not value.detach().isfinite().all():
            found.append(what)

    def after(name, module, args, output):
        check(output, f"the output of {name}")
        if isinstance(output, torch.Tensor) and output.requires_grad and not found:
            output.register_hook(partial(check, what=f"the gradient of the output of {name}"))

    hooks = [module.register_forward_hook(partial(after, name)) for name, module in network.named_modules() if name]
    try:
        value = loss()
        check(value, "the loss")
        if not found:
            names, parameters = zip(*network.named_parameters())
            for name, gradient in zip(names, torch.autograd.grad(value, parameters, allow_unused=True)):
                check(gradient, f"the gradient of {name}")
    except torch.OutOfMemoryError:
        found.append("something that there is not enough memory to look for")
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def report_spike(logger, step, losses, images):
    """Log a loss spike with the rank of the largest loss and its images. losses: (this one, usual one, this rank's)."""
    loss, usual, own = losses
    of_ranks = gather_to_main((own, images))
    if of_ranks is not None:
        rank, (highest, images) = max(enumerate(of_ranks), key=lambda found: found[1][0])
        logger.event("spike", step, f"loss {loss:.4f}, usually {usual:.4f}; {highest:.4f} on rank {rank}",
                     loss=loss, usual=usual, rank=rank, loss_rank=highest, images=images)


def report_bad_step(logger, step, found, first, images):
    """Log a step that was skipped. found: (gradient norm, loss, bad steps in a row); first: see first_not_finite."""
    norm, loss, in_a_row = found
    of_ranks = gather_to_main((first, images))
    if of_ranks is not None:
        guilty = next((r for r, (what, _) in enumerate(of_ranks) if what), None)
        what = "no module's output or gradient, but their sum over all"
        if guilty is not None:
            what = f"{of_ranks[guilty][0]} on rank {guilty}"
        logger.event("bad_step", step, f"skipped: not finite: first {what} (gradient norm {norm}, loss {loss})",
                     first=what, rank=guilty, images=of_ranks[guilty or 0][1], in_a_row=in_a_row)


# ---- silent corruption -----------------------------------------------------------------------------------------


def check_device(logger, step, network, losses):
    """After something odd: make the step's passes twice more and log ranks whose device computes other bits the second
    time, which is then what is odd. losses: see first_not_finite.
    """
    of_ranks = gather_to_main((first_difference(network, losses), socket.gethostname()))
    for rank, (what, host) in enumerate(of_ranks or ()):
        if what:
            logger.event("device", step, f"rank {rank} on {host}: this device computes different results for the same "
                         f"input, first {what}: take the host out of the job, and go on from a checkpoint before",
                         rank=rank, host=host, first=what)


def first_difference(network, losses):
    """The first of losses and gradients whose bits differ when the same is computed twice, None if none does.

    Gradients count where PyTorch can make them in one order of sums; on CUDA some kernels cannot, and warn.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    names = [name for name, _ in network.named_parameters()]
    with (gathered(network), torch.compiler.set_stance("force_eager"),  # another mode would be compiled anew
          warnings.catch_warnings(record=True) as warned):
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            first, second = (_bits_of_passes(network, losses) for _ in range(2))
        except torch.OutOfMemoryError:
            return None
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)
    if any("deterministic" in str(warning.message) for warning in warned):
        first, second = first[:len(losses)], second[:len(losses)]
    differ = (torch.stack(first) != torch.stack(second)).nonzero().flatten().tolist()
    what = ["the loss"] * len(losses) + [f"the gradient of {name}" for name in names * len(losses)]
    return what[differ[0]] if differ else None


def _bits_of_passes(network, losses):
    """Sums over the bits of every pass's loss, then of its gradients: whole numbers, whose order does not matter."""
    found, gradients = [], []
    for loss in losses:
        value = loss()
        made = torch.autograd.grad(value, list(network.parameters()), allow_unused=True)
        found.append(_bits(value))
        gradients += [value.new_zeros((), dtype=torch.int64) if part is None else _bits(part) for part in made]
    return found + gradients


def _bits(tensor):
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(kinds[tensor.element_size()]).sum(dtype=torch.int64)
