"""Where a step became infinite or NaN."""
import torch


def first_not_finite(network, losses, latents):
    """One line that names the first thing of a step that is not finite, or None.

    Args:
        losses: functions, one a forward pass of the step, that compute its loss (scaled as it was).
        latents: what each of them reads.

    First come the latents themselves, then the modules' outputs in the order of the forward pass, then gradients in the order
    of the backward pass, those of the parameters last. Gradients that the network holds are left alone.
    """
    for part, (loss, values) in enumerate(zip(losses, latents)):
        bad = (~values.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
        if bad:
            return f"the latents of image {', '.join(map(str, bad[:8]))} of this rank's batch {part}"
        with torch.compiler.set_stance("force_eager"):  # the hooks need the modules themselves
            found = _first_in_pass(network, loss)
        if found:
            return found
    return None


def _first_in_pass(network, loss):
    found = []

    def check(value, what):
        if not found and isinstance(value, torch.Tensor) and not value.detach().isfinite().all():  # detached: recomputation counts what is saved
            found.append(what)

    def after(name):
        def hook(module, args, output):
            check(output, f"the output of {name}")
            if isinstance(output, torch.Tensor) and output.requires_grad and not found:
                output.register_hook(lambda gradient: check(gradient, f"the gradient of the output of {name}"))
        return hook

    hooks = [module.register_forward_hook(after(name)) for name, module in network.named_modules() if name]
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
