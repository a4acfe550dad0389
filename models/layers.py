"""Building blocks shared by the scale-wise transformer and the flow head.

Norms, rotary angles and softmax are computed in float32 whatever the autocast dtype.
"""
import itertools

import torch
import torch.nn.functional as F
from torch import nn

from models.kernels import Dropout, Linear, attention, rotate

ROPE_BASE = 10000.0
ROPE_EXTENT = 16.0  # every scale spans the same coordinate range, whatever its resolution


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; in float32, cast back before the weight."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype) * self.weight


class GatedMLP(nn.Module):
    """fc2(GELU(fc1_g x) * fc1_x x), hidden width int(dim * mlp_ratio * 2/3). The gate is exact GELU (release)."""

    def __init__(self, dim, mlp_ratio=4.0, dropout=0.0):
        super().__init__()
        hidden = int(dim * mlp_ratio * 2 / 3)
        self.fc1_g = Linear(dim, hidden, pad="out")
        self.fc1_x = Linear(dim, hidden, pad="out")
        self.fc2 = Linear(hidden, dim, pad="in")
        self.drop = Dropout(dropout)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1_g(x)) * self.fc1_x(x))))


class RotaryEmbedding(nn.Module):
    """2-D axial RoPE: half of the channels turn with the row, half with the column. The released files have the buffer
    `freqs`, (head_dim / 4,) float32, in every attention; all are the same, so the first makes the table for all.
    """

    def __init__(self, head_dim):
        super().__init__()
        exponents = torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2)
        self.register_buffer("freqs", ROPE_BASE ** -exponents)

    def table(self, scales):
        """(cos, sin), each (tokens, head_dim / 2), for the given scales one after the other, row-major."""
        angles = []
        for s in scales:
            position = torch.arange(s, device=self.freqs.device, dtype=torch.float32) / s * ROPE_EXTENT
            angle = position[:, None] * self.freqs.float()  # s, head_dim / 4
            row, column = angle[:, None].expand(s, s, -1), angle[None].expand(s, s, -1)
            angles.append(torch.cat((row, column), dim=-1).flatten(0, 1))
        angles = torch.cat(angles)
        return angles.cos(), angles.sin()


def spans(scales):
    """The tokens of each scale in a sequence of all of them, as slices."""
    ends = itertools.accumulate(s * s for s in scales)
    return [slice(end - s * s, end) for s, end in zip(scales, ends)]


class KVCache:
    """Keys (rotated) and values of one attention layer for the scales generated so far. The sampler owns it."""

    def __init__(self):
        self.k = self.v = None

    def extend(self, k, v):
        """Append keys and values, B heads N head_dim, and return all."""
        if self.k is not None:
            k, v = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        self.k, self.v = k, v
        return k, v


def split_heads(x, num_heads):
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # B N (heads head_dim) -> B heads N head_dim


class SelfAttention(nn.Module):
    """Multi-head self-attention with RoPE. x: B N dim; pattern: which keys a token sees, all if None."""

    def __init__(self, dim, num_heads, qkv_bias, attn_dropout=0.0, proj_dropout=0.0):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.attn_dropout = attn_dropout
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = Dropout(proj_dropout)
        self.rope = RotaryEmbedding(self.head_dim)

    def forward(self, x, rope_table, pattern=None, cache=None):
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = rotate(q, rope_table), rotate(k, rope_table)
        if cache is not None:
            k, v = cache.extend(k, v)
        dropout = self.attn_dropout if self.training else 0.0
        return self.proj_drop(self.proj(attention(q, k, v, pattern, dropout)))


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
        k, v = (split_heads(part, self.num_heads) for part in self.kv(context).chunk(2, dim=-1))
        return rotate(k, rope_table), v

    def forward(self, x, keys_and_values, rope_table, pattern=None):
        q = rotate(split_heads(self.q(x), self.num_heads), rope_table)
        return self.proj(attention(q, *keys_and_values, pattern))
