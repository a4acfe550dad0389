"""Functions that equal one textbook line each, faster, and what prepares them. What depends on device or compiler is
here.

To change what one of them computes, write its textbook line (it is in the docstring) where it is called.
"""
import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

ALIGNMENT = 64  # tensor cores want matrix sizes that are multiples of it
COARSE = 128  # tokens of coarse scales that attend in one call with a mask: fewer kernels for a few more operations


# ---- linear layers -------------------------------------------------------------------------------------------


def linear(x, weight, bias=None):
    """F.linear(x, weight, bias). Compiled, the bias is added apart, where it fuses with what follows."""
    if bias is None or not torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    y = F.linear(x, weight)
    return y + bias.to(y.dtype)


class Linear(nn.Linear):
    """nn.Linear. With pad="out" or "in" that side is padded with zeros to a multiple of 64 while the layer runs: the
    gated MLP's 2,730 is slow on tensor cores. A padded unit is GELU(0) * 0 = 0: output and gradients are the same.
    """

    def __init__(self, in_features, out_features, bias=True, pad=None):
        super().__init__(in_features, out_features, bias)
        self.pad = pad

    def padded(self):
        """(weight, bias) at the padded width."""
        missing = -(self.out_features if self.pad == "out" else self.in_features) % ALIGNMENT
        if not missing:
            return self.weight, self.bias
        if self.pad == "out":
            return F.pad(self.weight, (0, 0, 0, missing)), F.pad(self.bias, (0, missing))
        return F.pad(self.weight, (0, missing)), self.bias

    def forward(self, x):
        if self.pad is None or self.weight.is_meta:  # where operations are counted, zeros are none
            return linear(x, self.weight, self.bias)
        return linear(x, *self.padded())

    @torch.no_grad()
    def widen(self):
        """Pad the weight itself, for a copy of the model that only samples."""
        weight, bias = self.padded()
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = weight.shape
        self.pad = None


# ---- dropout -------------------------------------------------------------------------------------------------


@torch.library.custom_op("flowar::dropout_factors", mutates_args=())
def dropout_factors(shape: Sequence[int], dtype: torch.dtype, p: float, seed: torch.Tensor) -> torch.Tensor:
    """0 with probability p, else 1 / (1 - p): PyTorch's generator, slow on a CPU, seeds a faster one. A custom
    operation, which the compiler calls and does not trace into; it gets its seed, so that each call draws anew.
    """
    generator, count = np.random.Generator(np.random.SFC64(seed.item())), math.prod(shape)
    draws = generator.integers(-2**63, 2**63 - 1, size=-(-count // 4), endpoint=True).view(np.int16)[:count]
    keep = torch.ge(torch.from_numpy(draws), round(p * 2**16) - 2**15, out=torch.empty(count, dtype=dtype))
    return keep.mul_(1 / (1 - p)).view(shape)


@dropout_factors.register_fake
def _(shape, dtype, p, seed):
    return torch.empty(shape, dtype=dtype)


def dropout_mask(shape, p, seed):
    """True with probability 1 - p for each place of a shape: a hash (lowbias32) of the place and of `seed`, an int64,
    that the compiler computes inside the kernel that needs it, in fewer operations than its own generator takes.
    """
    low, high = seed.to(torch.int32), (seed >> 32).to(torch.int32)
    h = torch.arange(shape.numel(), device=seed.device).to(torch.int32) ^ low
    h = (h ^ (h >> 16 & 0xFFFF)) * 0x7FEB352D ^ high
    h = (h ^ (h >> 16 & 0xFFFF)) * 0x7FEB352D
    h = (h ^ (h >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
    return ((h ^ (h >> 16 & 0xFFFF)) >= round(p * 2**32) - 2**31).view(shape)


def hashed_dropout(x, p):
    """F.dropout(x, p) with a dropout_mask: the fastest way where it is compiled for a GPU."""
    mask = dropout_mask(x.shape, p, torch.randint(2**62, (), device=x.device))
    return torch.where(mask, x * (1 / (1 - p)), 0)


def dropout(x, p):
    """F.dropout(x, p)."""
    if not 0 < p < 1:
        return F.dropout(x, p)
    if x.device.type == "cpu":
        return x * dropout_factors(x.shape, x.dtype, p, torch.randint(2**62, ()))
    return hashed_dropout(x, p) if torch.compiler.is_compiling() else F.dropout(x, p)


class Dropout(nn.Dropout):
    """nn.Dropout."""

    def forward(self, x):
        return dropout(x, self.p) if self.training else x


# ---- norm, rotation, attention -------------------------------------------------------------------------------


def modulate(x, scale, shift):
    """F.rms_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift, in float32, then cast to scale's dtype."""
    norm = F.rms_norm(x.float(), x.shape[-1:], eps=1e-6)
    return torch.addcmul(shift.float(), norm, 1 + scale.float()).to(scale.dtype)


def rotate(x, table):
    """torch.stack((u * cos - v * sin, v * cos + u * sin), dim=-1).flatten(-2) of pairs (u, v) of neighbouring channels.

    x: B heads N head_dim; table: (cos, sin), each (N, head_dim / 2). In float32, cast back.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling() and x.device.type == "cpu":  # fused; the compiler knows no complex numbers
        (u, v), (cos, sin) = pairs.unbind(-1), table
        turned = torch.stack((u * cos - v * sin, v * cos + u * sin), dim=-1)
    elif torch.compiler.is_compiling():  # the same without a branch for each of a pair
        cos, sin = table[0][..., None], torch.stack((-table[1], table[1]), dim=-1)
        turned = pairs * cos + pairs.flip(-1) * sin
    else:  # the same product in one pass
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(*table))
    return turned.flatten(-2).to(x.dtype)


def dense_attention(q, k, v, p, mask=None):
    """F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p); on a CPU the fused kernels have no dropout."""
    if p == 0 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p)
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    probabilities = (scores if mask is None else scores + mask).softmax(dim=-1, dtype=torch.float32)
    return dropout(probabilities.to(v.dtype), p) @ v


def attention(q, k, v, pattern, p=0.0):
    """F.scaled_dot_product_attention(q, k, v, pattern.mask(), dropout_p=p).transpose(1, 2).flatten(2).

    The queries of each scale see whole scales of keys, which are cut out, so that no mask is needed and flash kernels
    apply. The coarse scales, if with_coarse_mask gave them a mask, are one call, which memory-efficient kernels take.
    q, k, v: B heads N head_dim; pattern: a Pattern, None where all see all.
    """
    if pattern is None or len(pattern.sizes) == 1:
        return dense_attention(q, k, v, p).transpose(1, 2).flatten(2)
    mask, parts = None, []
    if pattern.coarse is not None:
        mask, pattern = pattern.coarse
    queries = q.split(pattern.sizes[-len(pattern.sees):], dim=2)
    for part, keys, values in zip(queries, select_seen(k, pattern), select_seen(v, pattern), strict=True):
        parts.append(dense_attention(part, keys, values, p, mask).transpose(1, 2).flatten(2))
        mask = None  # of the first part, the coarse scales, alone
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def with_coarse_mask(pattern, x):
    """The pattern with `coarse` set: the mask of the coarse scales, in the dtype that queries have where x enters, and
    the Pattern in which they are one scale. Unchanged if it is None, if fewer than two scales are coarse, or on the
    meta device, where operations on hidden pairs must not be counted.
    """
    if pattern is None or x.is_meta:
        return pattern
    merged = merge_coarse(pattern)
    if merged is pattern:
        return pattern
    count = len(pattern.sizes) - len(merged.sizes) + 1
    mask = pattern._replace(sizes=pattern.sizes[:count], sees=pattern.sees[:count]).mask()
    padded = F.pad(mask, (0, -len(mask) % 16))  # rows begin at multiples of 16 numbers: CUDA's kernels want that
    device = x.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else x.dtype
    return pattern._replace(coarse=(padded.to(device, dtype, non_blocking=True)[:, :len(mask)], merged))


def merge_coarse(pattern):
    """The pattern in which as many of the coarsest scales as have at most COARSE tokens together are one scale. They
    are not merged if one of them sees a finer scale, or if a finer scale sees only some of them.
    """
    sizes, sees = pattern.sizes, pattern.sees
    for count in range(len(sizes), 1, -1):
        coarse, tokens = set(range(count)), sum(sizes[:count])
        if (tokens <= COARSE and all(coarse.issuperset(seen) for seen in sees[:count])
                and all(coarse.issubset(seen) or coarse.isdisjoint(seen) for seen in sees[count:])):
            others = [tuple(sorted({max(0, k - count + 1) for k in seen})) for seen in sees[count:]]
            return pattern._replace(sizes=(tokens, *sizes[count:]), sees=((0,), *others))
    return pattern


def select_seen(x, pattern):
    """The keys or values, of x, that each scale of the queries sees."""
    pieces = []
    if all(sees == tuple(range(len(sees))) for sees in pattern.sees):  # block-causal
        for sees in reversed(pattern.sees):  # each cut from the next longer: the gradient of the short ones is short
            end = sum(pattern.sizes[:len(sees)])
            x = x if x.shape[2] == end else x.narrow(2, 0, end)
            pieces.append(x)
        return pieces[::-1]
    scales = x.split(pattern.sizes, dim=2)
    for sees in pattern.sees:
        pieces.append(scales[sees[0]] if len(sees) == 1 else torch.cat([scales[k] for k in sees], dim=2))
    return pieces


def per_token(values, pattern):
    """values.repeat_interleave(torch.tensor(pattern.sizes), dim=1): one value a scale, (B, scales, n), becomes one a
    token, (B, tokens, n); a single scale's is left to broadcast. The gradient is a sum, not a scatter.
    """
    if values.shape[1] == 1:
        return values
    values = values.split(1, dim=1)
    return torch.cat([value.expand(-1, size, -1) for value, size in zip(values, pattern.sizes)], dim=1)


# ---- recomputation -------------------------------------------------------------------------------------------


def is_attention(operation):
    """Whether an operation that torch dispatches is attention, in whichever of its kernels."""
    return "scaled_dot_product" in str(operation)


def keep_attention(context, operation, *args, **options):
    """The policy of run_block."""
    return CheckpointPolicy.MUST_SAVE if is_attention(operation) else CheckpointPolicy.PREFER_RECOMPUTE


def run_block(block, recompute, *inputs):
    """block(*inputs); with recompute, activations but for attention's output are computed again for the gradient."""
    if not (recompute and torch.is_grad_enabled()):
        return block(*inputs)
    contexts = functools.partial(create_selective_checkpoint_contexts, keep_attention)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)
