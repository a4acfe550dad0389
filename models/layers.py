"""Building blocks shared by the scale-wise transformer and the flow head.

Norms, rotary angles and softmax are computed in float32 whatever the autocast dtype.
"""
import functools
import itertools

import torch
import torch.nn.functional as F
from timm.layers import SwiGLU
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from models.dropout import Dropout, attention

NORM_EPS = 1e-6
ROPE_BASE = 10000.0
ROPE_EXTENT = 16.0  # every scale spans the same coordinate range, whatever its resolution


def rms_norm(x, weight=None):
    """RMS-normalise the last dimension in float32, cast back to x's dtype, then apply `weight` if given."""
    y = F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPS).to(x.dtype)
    return y if weight is None else y * weight


class RMSNorm(nn.Module):
    """RMSNorm with a learned weight."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return rms_norm(x, self.weight)


def modulate(x, scale, shift):
    """adaLN in float32: normalise without weight, then scale by (1 + scale) and shift. The result has the dtype of scale, a
    linear layer's output, as the linear layers that follow would cast it.
    """
    return torch.addcmul(shift.float(), rms_norm(x.float()), 1 + scale.float()).to(scale.dtype)


def linear(x, weight, bias=None):
    """F.linear. Compiled, the bias is added apart, where it fuses with what follows: a CPU writes it out before the product."""
    if bias is None or not torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    y = F.linear(x, weight)
    return y + bias.to(y.dtype)


class Linear(nn.Linear):
    """nn.Linear through linear()."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


ALIGNMENT = 64  # tensor cores want matrix sizes that are multiples of it


class GatedMLP(SwiGLU):
    """fc2(GELU(fc1_g x) * fc1_x x), hidden width int(dim * mlp_ratio * 2/3). The gate is exact GELU.

    A hidden width of 2,730 is slow on tensor cores: it is padded with zeros to a multiple of 64 when the layer runs. A
    padded unit is GELU(0) * 0 = 0, so output and gradients are those of the weights, which keep their size.
    """

    def __init__(self, dim, mlp_ratio=4.0, dropout=0.0):
        super().__init__(dim, int(dim * mlp_ratio * 2 / 3), act_layer=nn.GELU)
        self.drop1, self.drop2 = Dropout(dropout), Dropout(dropout)

    def padded(self):
        """(weight, bias) of fc1_g and fc1_x, and fc2's weight, at the padded width."""
        missing = -self.fc1_g.out_features % ALIGNMENT
        if not missing:
            return (self.fc1_g.weight, self.fc1_g.bias), (self.fc1_x.weight, self.fc1_x.bias), self.fc2.weight
        rows = [(F.pad(layer.weight, (0, 0, 0, missing)), F.pad(layer.bias, (0, missing))) for layer in (self.fc1_g, self.fc1_x)]
        return (*rows, F.pad(self.fc2.weight, (0, missing)))

    def forward(self, x):
        gate, value, out = self.padded()
        hidden = self.drop1(self.act(linear(x, *gate)) * linear(x, *value))
        return self.drop2(linear(hidden, out, self.fc2.bias))

    @torch.no_grad()
    def widen(self):
        """Pad the weights themselves, for a copy of the model that only samples."""
        gate, value, out = self.padded()
        for layer, (weight, bias) in ((self.fc1_g, gate), (self.fc1_x, value), (self.fc2, (out, self.fc2.bias))):
            layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
            layer.out_features, layer.in_features = weight.shape


class RotaryEmbedding(nn.Module):
    """2-D axial RoPE. Half of the channels turn with the row, half with the column.

    `freqs` (head_dim / 4,) float32 is a buffer because the released checkpoints carry it.
    """

    def __init__(self, head_dim):
        super().__init__()
        exponents = torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2)
        self.register_buffer("freqs", ROPE_BASE ** -exponents)

    def table(self, scales):
        """(cos, sin), each (tokens, head_dim / 2), for the given scales one after the other, row-major."""
        return tuple(torch.cat(parts) for parts in zip(*(self._one_scale(s) for s in scales)))

    def _one_scale(self, s):
        position = torch.arange(s, device=self.freqs.device, dtype=torch.float32) / s * ROPE_EXTENT
        angle = position[:, None] * self.freqs.float()  # s, head_dim / 4
        row = angle[:, None].expand(s, s, -1)
        column = angle[None].expand(s, s, -1)
        angles = torch.cat((row, column), dim=-1).flatten(0, 1)
        return angles.cos(), angles.sin()


def rotate(x, table):
    """Turn each pair (u, v) of neighbouring channels: (u cos - v sin, v cos + u sin). x: B heads N head_dim."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # fused; the compiler knows no complex numbers
        (u, v), (cos, sin) = pairs.unbind(-1), table
        turned = torch.stack((u * cos - v * sin, v * cos + u * sin), dim=-1)
    else:  # the same product in one pass
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(*table))
    return turned.flatten(-2).to(x.dtype)


class KVCache:
    """Keys (rotated) and values of one attention layer for the scales generated so far, of `tokens` tokens in all.

    Made, owned and dropped by the sampler: the modules hold no state.
    """

    def __init__(self, tokens):
        self.tokens, self.length = tokens, 0
        self.k = self.v = None

    def extend(self, k, v):
        """Write behind what is there and return everything held. k, v: B heads N head_dim."""
        if self.k is None:
            size = (*k.shape[:2], self.tokens, k.shape[3])
            self.k, self.v = k.new_empty(size), v.new_empty(size)
        new = slice(self.length, self.length + k.shape[2])
        self.k[:, :, new], self.v[:, :, new] = k, v
        self.length = new.stop
        return self.k[:, :, :new.stop], self.v[:, :, :new.stop]


def spans(scales):
    """The tokens of each scale in a sequence of all of them, as slices."""
    ends = list(itertools.accumulate(s * s for s in scales))
    return [slice(end - s * s, end) for s, end in zip(scales, ends)]


def attend(q, k, v, scales=None, causal=False, dropout=0.0):
    """Attention of B heads N head_dim -> B N (heads head_dim).

    With `scales`, a token sees those of its own scale, and with causal=True those of all coarser ones too. Each scale
    sees a contiguous piece of the keys, so no mask is needed and the flash and memory-efficient kernels apply.
    """
    if scales is None or len(scales) == 1:
        return _merge_heads(attention(q, k, v, dropout))
    sizes = [s * s for s in scales]
    pieces = _prefixes if causal else torch.split
    parts = zip(q.split(sizes, dim=2), pieces(k, sizes, dim=2), pieces(v, sizes, dim=2))
    return torch.cat([_merge_heads(attention(*part, dropout)) for part in parts], dim=1)


def _prefixes(x, sizes, dim):
    """x up to the end of each size. Each is cut from the next longer one: then the gradient of the short ones is short."""
    pieces = [x]
    for size in reversed(sizes[1:]):
        pieces.append(pieces[-1].narrow(dim, 0, pieces[-1].shape[dim] - size))
    return pieces[::-1]


def _split_heads(x, num_heads):
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # B N (heads head_dim) -> B heads N head_dim


def _merge_heads(x):
    return x.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Multi-head self-attention with RoPE. x: B N dim, the tokens of `scales`; see attend."""

    def __init__(self, dim, num_heads, qkv_bias, attn_dropout=0.0, proj_dropout=0.0, causal=False):
        super().__init__()
        self.num_heads = num_heads
        self.attn_dropout = attn_dropout
        self.causal = causal
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = Dropout(proj_dropout)
        self.rope = RotaryEmbedding(dim // num_heads)

    def forward(self, x, rope_table, scales=None, cache=None):
        q, k, v = (_split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = rotate(q, rope_table), rotate(k, rope_table)
        if cache is not None:
            k, v = cache.extend(k, v)
        dropout = self.attn_dropout if self.training else 0.0
        return self.proj_drop(self.proj(attend(q, k, v, scales, self.causal, dropout)))


class CrossAttention(nn.Module):
    """Queries from x (B N dim), keys and values from context (B N context_dim) of the same scale, RoPE on q and k."""

    def __init__(self, dim, context_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, dim, bias=False)
        self.kv = Linear(context_dim, 2 * dim, bias=False)
        self.proj = Linear(dim, dim)
        self.rope = RotaryEmbedding(dim // num_heads)

    def keys_and_values(self, context, rope_table):
        """(rotated keys, values), each B heads N head_dim."""
        k, v = (_split_heads(part, self.num_heads) for part in self.kv(context).chunk(2, dim=-1))
        return rotate(k, rope_table), v

    def forward(self, x, keys_and_values, rope_table, scales=None):
        q = rotate(_split_heads(self.q(x), self.num_heads), rope_table)
        return self.proj(attend(q, *keys_and_values, scales))


# ---- recomputation -------------------------------------------------------------------------------------------

ATTENTION_KERNELS = [getattr(torch.ops.aten, name).default for name in (
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu")]


def run_block(block, recompute, *inputs):
    """block(*inputs); with recompute, its activations but for the attention's output are computed again for the gradient."""
    if not (recompute and torch.is_grad_enabled()):
        return block(*inputs)
    keep_attention = functools.partial(create_selective_checkpoint_contexts, ATTENTION_KERNELS)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=keep_attention)
