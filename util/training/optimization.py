"""Parameter groups, learning-rate schedule and EMA of the release's recipe (METHOD: paper section 4 and release)."""
import copy
import math

import torch

from models import FlowARError

BETAS = (0.9, 0.95)
LR_SCHEDULES = ("cosine", "constant")
LR_REFERENCE_BATCH = 256
EMA_HOLDS = 0.01  # of the random start: more shows in samples


def peak_learning_rate(blr, global_batch):
    """Linear scaling rule: blr images^-1 times the global batch, relative to 256 images."""
    return blr * global_batch / LR_REFERENCE_BATCH


def build_optimizer(model, lr, weight_decay, betas=BETAS):
    """Fused AdamW; weight decay on every parameter with two or more dimensions, none on the others."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
              {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def learning_rate(epoch, *, lr, min_lr, epochs, warmup_epochs, schedule="cosine"):
    """Rate at a fractional epoch: linear warm-up, then cosine from lr to min_lr, or constant."""
    if schedule not in LR_SCHEDULES:
        raise FlowARError(f"lr_schedule is {schedule!r}: expected one of {', '.join(LR_SCHEDULES)}")
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    if schedule == "constant":
        return lr
    progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def adjust_learning_rate(optimizer, epoch, **schedule):
    """Set and return the rate of every group; see learning_rate."""
    rate = learning_rate(epoch, **schedule)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def ema_advice(rate, steps):
    """A line where the EMA of so many steps will still hold more than 1 % of the weights it began with, else None."""
    held = rate**steps
    if held <= EMA_HOLDS * (1 + 1e-9):
        return None
    forgets = 1 - EMA_HOLDS ** (1 / steps)  # a step
    places = math.ceil(-math.log10(forgets))
    suits = f"{1 - math.ceil(forgets * 10**places) / 10**places:.{places}f}"
    return (f"--ema_rate {rate:g}: after the {steps} steps of this training the EMA will still be {held:.0%} random "
            f"start, and its samples noise; --ema_rate {suits} suits so few steps, or look at the raw weights "
            "(--weights raw)")


class EMA:
    """Exponential moving average of a model's parameters, kept as a model of its own (eval mode, no gradients)."""

    def __init__(self, model, rate):
        self.rate = rate
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model, skip=None):
        """ema + (1 - rate) (parameter - ema), in one pass; nothing where `skip`, a tensor (1,) on the device, is 1."""
        # A step of SGD against `parameter - ema` is just that; its kernel can be told on the device to do nothing.
        average, parameters = list(self.module.parameters()), list(model.parameters())
        torch._fused_sgd_(average, parameters, [], weight_decay=1.0, momentum=0.0, lr=1 - self.rate, dampening=0.0,
                          nesterov=False, maximize=True, is_first_step=False, found_inf=skip)
