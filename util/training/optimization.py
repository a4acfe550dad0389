"""Parameter groups, learning-rate schedule and EMA of the release's recipe.

And the averages from which an EMA of any width is rebuilt after a training (EDM2, arXiv 2312.02696).
"""
import copy
import math

import numpy as np
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models import FlowARError
from util.training.parallel import local

BETAS = (0.9, 0.95)
OPTIMIZERS = ("adamw", "muon")
MATRICES = {"attn.qkv.weight": 3, "crossattn.kv.weight": 2}  # how many matrices lie in a weight of a block, else one
LR_SCHEDULES = ("cosine", "constant", "linear_end")
END = 0.2  # part of the training after the warm-up in which linear_end falls
POWER_WIDTHS = 0.05, 0.10  # of the two averages that are tracked, as in EDM2


def peak_learning_rate(blr, global_batch):
    """Linear scaling rule: blr * global_batch / 256."""
    return blr * global_batch / 256


def build_optimizer(model, lr, weight_decay, name="adamw", betas=BETAS):
    """Fused AdamW, or of OPTIMIZERS "muon", see MuonWithAdamW; weight decay on every parameter with two or more
    dimensions, none on the others.
    """
    matrices = count_matrices(model) if name == "muon" else {}
    parameters = [p for p in model.parameters() if p.requires_grad and p not in matrices]
    groups = [{"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
              {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay}]
    if matrices:
        return MuonWithAdamW(groups, matrices, lr, weight_decay, betas)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def count_matrices(model):
    """{weight: how many matrices lie in it, one below the other} of what Muon trains: all two-dimensional weights of
    the blocks of transformer and head.
    """
    matrices = {}
    for block in (*model.blocks, *model.flownet.res_blocks):
        for name, parameter in block.named_parameters():
            if parameter.requires_grad and parameter.ndim == 2:
                matrices[parameter] = MATRICES.get(name, 1)
    return matrices


class MuonWithAdamW(torch.optim.Optimizer):
    """AdamW on `groups` and torch's Muon on `matrices`, see count_matrices, as one optimizer with one state; its last
    group is Muon's. By "match_rms_adamw" a rate and a weight decay mean the same in both.
    """

    def __init__(self, groups, matrices, lr, weight_decay, betas):
        if not hasattr(torch.optim, "Muon"):
            raise FlowARError(f"--optimizer muon needs torch 2.9 or newer, this is {torch.__version__}")
        self.matrices = matrices
        self.adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
        self.muon = torch.optim.Muon(list(matrices), lr, weight_decay, adjust_lr_fn="match_rms_adamw")
        super().__init__(self.adamw.param_groups + self.muon.param_groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        """Muon sees each matrix of a weight as a parameter of its own; momentum is stored for whole weights."""
        *self.adamw.param_groups, group = self.param_groups
        self.adamw.state = self.state  # load_state_dict makes another
        self.adamw.step()
        state = {}
        for weight in group["params"]:
            if weight.grad is None:
                continue
            if weight not in self.state:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            parts = weight, weight.grad, self.state[weight]["momentum_buffer"]
            for matrix, grad, momentum in zip(*(part.detach().chunk(self.matrices[weight]) for part in parts)):
                matrix.grad = grad
                state[matrix] = {"momentum_buffer": momentum}
        self.muon.param_groups, self.muon.state = [{**group, "params": list(state)}], state
        self.muon.step()
        self.muon.param_groups, self.muon.state = [], {}  # else gradients outlive the step


def learning_rate(epoch, *, lr, min_lr, epochs, warmup_epochs, schedule="cosine"):
    """Rate at a fractional epoch: linear warm-up, then by `schedule`, one of LR_SCHEDULES, cosine from lr to min_lr,
    constant, or constant with a linear end at min_lr.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    if schedule == "constant":
        return lr
    progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
    if schedule == "linear_end":
        return min_lr + (lr - min_lr) * min(1, (1 - progress) / END)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def adjust_learning_rate(optimizer, epoch, **schedule):
    """Set the rate of every group and return that of the schedule; see learning_rate. An lr that a group was built with
    is relative to the peak: the groups keep their ratios.
    """
    if not hasattr(optimizer, "relative_rates"):
        peak = schedule["lr"]
        optimizer.relative_rates = [group["lr"] / peak if peak else 1.0 for group in optimizer.param_groups]
    rate = learning_rate(epoch, **schedule)
    for group, relative in zip(optimizer.param_groups, optimizer.relative_rates, strict=True):
        group["lr"] = rate * relative
    return rate


def update_average(averages, model, rate):
    """averages + (1 - rate) (parameters - averages), in place, in one pass; of sharded tensors this process's parts."""
    get_ema_multi_avg_fn(rate)(local(averages), local(model.parameters()), None)


class EMA:
    """Exponential moving average of a model's parameters, kept as a model of its own (eval mode, no gradients).

    posthoc: keep the power averages of POWER_WIDTHS too, {width: PowerEMA} in `powers`.
    """

    def __init__(self, model, rate, posthoc=False):
        self.rate = rate
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.powers = {f"{width:g}": PowerEMA(model, width) for width in POWER_WIDTHS if posthoc}

    @torch.no_grad()
    def update(self, model, step=None):
        """ema + (1 - rate) (parameter - ema). step: this optimizer step's number, from 1 on, for power averages."""
        update_average(self.module.parameters(), model, self.rate)
        for power in self.powers.values():
            power.update(model, step)


# ---- power averages, from which scripts/posthoc_ema.py rebuilds any other (EDM2) -------------------------------


class PowerEMA:
    """Average of a model's parameters in which step i of n weighs (i^(g + 1) - (i - 1)^(g + 1)) / n^(g + 1)."""

    def __init__(self, model, width):
        self.exponent = power_exponent(width)
        self.tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, model, step):
        """At the end of optimizer step 1, 2, ...: after the first it is the weights, and holds nothing of their start.
        """
        update_average(self.tensors.values(), model, (1 - 1 / step) ** (self.exponent + 1))


def power_exponent(width):
    """g of the relative width sqrt(g + 1) / ((g + 2) sqrt(g + 3)): the profile's standard deviation in trainings."""
    return max(root.real for root in np.roots([1, 7, 16 - width**-2, 12 - width**-2]))
