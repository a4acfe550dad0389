"""The flow head: one velocity network for all scales (paper: scale-wise flow matching model)."""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models import flow_matching as fm
from models.errors import FlowARError
from models.kernels import Linear, modulate, per_token, run_block, with_coarse_mask
from models.layers import CrossAttention, GatedMLP, RMSNorm, SelfAttention
from models.patterns import within_scales

HEAD_DIM = 64
FREQUENCIES = 128
TIME_STEPS = 1000  # the network sees floor(1000 t)


class TimeEmbedder(nn.Module):
    """floor(1000 t) -> 128 cosines and 128 sines -> Linear-SiLU-Linear. t: (...) -> (..., width)."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(Linear(2 * FREQUENCIES, width), nn.SiLU(), Linear(width, width))

    def forward(self, t):
        step = (t.float() * TIME_STEPS).floor()
        j = torch.arange(FREQUENCIES, device=t.device, dtype=torch.float32)
        angle = step[..., None] * torch.exp(-math.log(10000) * j / FREQUENCIES)
        return self.mlp(torch.cat((angle.cos(), angle.sin()), dim=-1))


class AttnMLPBlock(nn.Module):
    """FlowAR-S: self-attention inside the scale and a gated MLP, both modulated per token by SiLU(t + c)."""

    def __init__(self, width, cond_dim, mlp_ratio):
        super().__init__()
        self.attn = SelfAttention(width, width // HEAD_DIM, qkv_bias=False)
        self.mlp = GatedMLP(width, mlp_ratio)
        self.ada_lin = Linear(width, 6 * width)

    def keys_and_values(self, z, rope_table):
        """None: z (B, N, cond_dim) enters through the modulation alone."""
        return None

    def forward(self, h, modulation, time, z, keys_values, rope_table, pattern):
        """h: (B, N, width) float32; modulation: SiLU(t + c), (B, N, width); the others as in FlowAR-L's block."""
        gate1, gate2, scale1, scale2, shift1, shift2 = self.ada_lin(modulation).chunk(6, dim=-1)
        h = h + gate1 * self.attn(modulate(h, scale1, shift1), rope_table, pattern)
        return h + gate2 * self.mlp(modulate(h, scale2, shift2))


class AttnCrossAttnMLPBlock(nn.Module):
    """FlowAR-L and -H: self-attention modulated by time, cross-attention to z, MLP modulated per token (release)."""

    def __init__(self, width, cond_dim, mlp_ratio):
        super().__init__()
        self.attn = SelfAttention(width, width // HEAD_DIM, qkv_bias=False)
        self.crossattn = CrossAttention(width, cond_dim, width // HEAD_DIM)
        self.norm2_1 = RMSNorm(width)
        self.norm2_2 = RMSNorm(cond_dim)
        self.mlp = GatedMLP(width, mlp_ratio)
        self.ada_lin_attn = Linear(width, 3 * width)
        self.ada_lin_mlp = Linear(width, 3 * width)

    def keys_and_values(self, z, rope_table):
        """Those of the cross-attention, as forward takes them."""
        return self.crossattn.keys_and_values(self.norm2_2(z), rope_table)

    def forward(self, h, modulation, time, z, keys_values, rope_table, pattern):
        """h: (B, N, width) float32; modulation: SiLU(t + c), (B, N, width); time: SiLU(t), (B, scales, width); z:
        (B, N, cond_dim); keys_values: of z, None: made here; rope_table: (cos, sin); pattern: a Pattern or None.
        """
        gate, scale, shift = per_token(self.ada_lin_attn(time), pattern).chunk(3, dim=-1)
        h = h + gate * self.attn(modulate(h, scale, shift), rope_table, pattern)
        if keys_values is None:
            keys_values = self.keys_and_values(z, rope_table)
        h = h + self.crossattn(self.norm2_1(h), keys_values, rope_table, pattern)
        gate, scale, shift = self.ada_lin_mlp(modulation).chunk(3, dim=-1)
        return h + gate * self.mlp(modulate(h, scale, shift))


class FinalLayer(nn.Module):
    """Modulate by SiLU(c + t) and project to the velocity."""

    def __init__(self, width, out_channels):
        super().__init__()
        self.linear = Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(self, h, modulation):
        shift, scale = self.adaLN_modulation[1](modulation).chunk(2, dim=-1)  # SiLU is in it already
        return self.linear(modulate(h, scale, shift)).float()


class EmbeddedCondition(NamedTuple):
    """The transformer's z, and what the head computes of it once for any number of evaluations."""
    z: torch.Tensor  # (B, N, cond_dim), what the blocks attend to
    c: torch.Tensor  # (B, N, width): z, embedded
    rope_table: tuple
    keys_values: list  # of z in each block; None: the block has none, or computes them itself

    def first(self, count):
        """That of the first `count` images."""
        parts = [pair and tuple(part[:count] for part in pair) for pair in self.keys_values]
        return self._replace(z=self.z[:count], c=self.c[:count], keys_values=parts)


class FlowHead(nn.Module):
    """Velocity of the tokens of one scale or of all, given the transformer's condition.

    Args:
        channels: channels of a token.
        cond_dim: width D of the condition z.
        depth, width: number of blocks and their width; the head size is 64.
        cross: Attn-CrossAttn-MLP blocks (FlowAR-L, -H) instead of Attn-MLP (FlowAR-S).
    """

    def __init__(self, channels, cond_dim, depth, width, mlp_ratio=4.0, cross=False, use_checkpoint=False):
        super().__init__()
        if width % HEAD_DIM:
            raise FlowARError(f"diffloss_w is {width}: expected a multiple of the flow head's head size, {HEAD_DIM}")
        self.use_checkpoint = use_checkpoint
        self.time_embed = TimeEmbedder(width)
        self.cond_embed = Linear(cond_dim, width)
        self.input_proj = Linear(channels, width)
        block = AttnCrossAttnMLPBlock if cross else AttnMLPBlock
        self.res_blocks = nn.ModuleList([block(width, cond_dim, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(width, channels)

    def forward(self, x, t, z, scales=None):
        """Velocity (B, N, channels) at x (B, N, channels).

        Args:
            t: (B,) in [0, 1], or (1,) for all images; of several scales (scales, B).
            z: (B, N, cond_dim), or its EmbeddedCondition, which prepare() returns, for many evaluations.
            scales: several scales in one pass, their tokens one after the other; attention stays inside each.
        """
        pattern = within_scales(scales) if scales else None
        embedded = z if isinstance(z, EmbeddedCondition) else self.embed(z, scales)
        h = self.input_proj(x).float().clone()  # residuals stay float32; a view would cost the compiler a graph
        t = self.time_embed(torch.atleast_2d(t).T)  # B scales width
        time, modulation = F.silu(t), F.silu(embedded.c + per_token(t, pattern))
        h = self.run_blocks(h, modulation, time, embedded, pattern)
        return self.final_layer(h, modulation)

    def run_blocks(self, h, modulation, time, embedded, pattern):
        pattern = with_coarse_mask(pattern, h)
        for block, keys_values in zip(self.res_blocks, embedded.keys_values):
            h = run_block(block, self.use_checkpoint, h, modulation, time, embedded.z, keys_values,
                          embedded.rope_table, pattern)
        return h

    def guided(self, z, batch, weight, low, high, guide=None):
        """velocity(x, t) of one scale for a solver, t a number.

        Args:
            z: of `batch` images, then of their null branch, if there is one.
            weight, low, high: see flow_matching.guided_velocity.
            guide: (FlowHead, its z) of a weaker network, in the null branch's place.
        """
        both = self.prepare(z if weight > 1 else z[:batch])
        own = both.first(batch)
        if guide is not None:
            weaker, z_weaker = guide[0], guide[0].prepare(guide[1])

        def evaluate(head, x, t, condition):
            return head(x.to(z.dtype), torch.full((1,), t, device=x.device), condition)

        def velocity(x, t):
            return evaluate(self, x, t, own)

        def pair(x, t):
            if guide is None:
                return evaluate(self, torch.cat((x, x)), t, both).chunk(2)
            v = velocity(x, t).clone()  # what a CUDA graph gives lasts until the next call of one
            return v, evaluate(weaker, x, t, z_weaker)

        return fm.guided_velocity(velocity, pair, weight, low, high)

    def embed(self, z, scales=None):
        """The EmbeddedCondition of z whose keys and values each block computes when it runs, and holds no longer."""
        rope_table = self.res_blocks[0].attn.rope.table(scales or (math.isqrt(z.shape[1]),))
        return EmbeddedCondition(z, self.cond_embed(z), rope_table, [None] * len(self.res_blocks))

    def prepare(self, z):
        """The EmbeddedCondition of z of one scale: all of a velocity that depends neither on x nor on t."""
        embedded = self.embed(z)
        keys_values = [block.keys_and_values(embedded.z, embedded.rope_table) for block in self.res_blocks]
        return embedded._replace(keys_values=keys_values)
