"""Building blocks shared by the scale-wise transformer and the flow head.

Norms, rotary angles and softmax are computed in float32 whatever the autocast dtype.
"""
import torch
import torch.nn.functional as F
from timm.layers import SwiGLU
from torch import nn

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
    """adaLN: normalise without weight, then scale by (1 + scale) and shift."""
    return rms_norm(x) * (1 + scale) + shift


def gated_mlp(dim, mlp_ratio=4.0, dropout=0.0):
    """fc2(GELU(fc1_g x) * fc1_x x), hidden width int(dim * mlp_ratio * 2/3). The gate is exact GELU."""
    return SwiGLU(dim, int(dim * mlp_ratio * 2 / 3), act_layer=nn.GELU, drop=dropout)


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
    cos, sin = table
    u, v = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((u * cos - v * sin, v * cos + u * sin), dim=-1).flatten(-2).to(x.dtype)


class KVCache:
    """Keys (rotated) and values of one attention layer for the scales generated so far.

    Made, owned and dropped by the sampler: the modules hold no state.
    """

    def __init__(self):
        self.k = self.v = None

    def extend(self, k, v):
        """Append along the token dimension and return everything held. k, v: B heads N head_dim."""
        self.k = k if self.k is None else torch.cat((self.k, k), dim=2)
        self.v = v if self.v is None else torch.cat((self.v, v), dim=2)
        return self.k, self.v


def _split_heads(x, num_heads):
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # B N (heads head_dim) -> B heads N head_dim


def _merge_heads(x):
    return x.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Multi-head self-attention with RoPE. x: B N dim; mask: additive, broadcastable to B heads N N."""

    def __init__(self, dim, num_heads, qkv_bias, attn_dropout=0.0, proj_dropout=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.attn_dropout = attn_dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_dropout)
        self.rope = RotaryEmbedding(dim // num_heads)

    def forward(self, x, rope_table, mask=None, cache=None):
        q, k, v = (_split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = rotate(q, rope_table), rotate(k, rope_table)
        if cache is not None:
            k, v = cache.extend(k, v)
        x = F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=None if mask is None else mask.to(q.dtype),
            dropout_p=self.attn_dropout if self.training else 0.0,
        )
        return self.proj_drop(self.proj(_merge_heads(x)))


class CrossAttention(nn.Module):
    """Queries from x (B N dim), keys and values from context (B N context_dim), RoPE on q and k."""

    def __init__(self, dim, context_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(context_dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.rope = RotaryEmbedding(dim // num_heads)

    def forward(self, x, context, rope_table):
        q = _split_heads(self.q(x), self.num_heads)
        k, v = (_split_heads(part, self.num_heads) for part in self.kv(context).chunk(2, dim=-1))
        x = F.scaled_dot_product_attention(rotate(q, rope_table), rotate(k, rope_table), v)
        return self.proj(_merge_heads(x))
