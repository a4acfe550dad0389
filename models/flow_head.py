"""The flow head: one velocity network for all scales (paper: scale-wise flow matching model)."""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models import flow_matching as fm
from models.errors import FlowARError
from models.kernels import Linear, modulate, per_token, run_block
from models.layers import CrossAttention, GatedMLP, RMSNorm, SelfAttention, within_scales

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

    def context(self, z, rope_table):
        """What the block makes of z, a tuple of tensors: none, z enters through c alone."""
        return ()

    def forward(self, h, modulation, time, context, rope_table, pattern):
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

    def context(self, z, rope_table):
        """Keys and values of the cross-attention."""
        return self.crossattn.keys_and_values(self.norm2_2(z), rope_table)

    def forward(self, h, modulation, time, context, rope_table, pattern):
        gate, scale, shift = per_token(self.ada_lin_attn(time), pattern).chunk(3, dim=-1)
        h = h + gate * self.attn(modulate(h, scale, shift), rope_table, pattern)
        if isinstance(context, torch.Tensor):  # z
            context = self.context(context, rope_table)
        h = h + self.crossattn(self.norm2_1(h), context, rope_table, pattern)
        gate, scale, shift = self.ada_lin_mlp(modulation).chunk(3, dim=-1)
        return h + gate * self.mlp(modulate(h, scale, shift))


class FinalLayer(nn.Module):
    """Modulate by SiLU(c + t) and project to the velocity."""

    def __init__(self, width, out_channels):
        super().__init__()
        self.linear = Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(self, h, modulation):
        shift, scale = self.adaLN_modulation[1](modulation).chunk(2, dim=-1)  # its SiLU has acted before
        return self.linear(modulate(h, scale, shift)).float()


class Condition(NamedTuple):
    """The transformer's z as the head's blocks read it."""
    c: torch.Tensor  # (B, N, width): z, embedded
    contexts: list  # for each block what its context() makes of z, or z itself
    rope_table: tuple

    def first(self, count):
        """That of the first `count` images; the contexts are tuples."""
        contexts = [tuple(part[:count] for part in context) for context in self.contexts]
        return self._replace(c=self.c[:count], contexts=contexts)


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
            z: (B, N, cond_dim), or its Condition, for many evaluations: see prepare.
            scales: several scales in one pass, their tokens one after the other; attention stays inside each.
        """
        pattern = within_scales(scales) if scales else None
        z = z if isinstance(z, Condition) else self.prepare(z, scales, contexts=False)
        h = self.input_proj(x).float().clone()  # residuals stay float32; a view would cost the compiler a graph
        t = self.time_embed(torch.atleast_2d(t).T)  # B scales width
        time, modulation = F.silu(t), F.silu(z.c + per_token(t, pattern))
        for block, context in zip(self.res_blocks, z.contexts):
            h = run_block(block, self.use_checkpoint, h, modulation, time, context, z.rope_table, pattern)
        return self.final_layer(h, modulation)

    def guided(self, z, batch, guidance, guide=None):
        """velocity(x, t) of one scale for a solver, t a number.

        Args:
            z: of `batch` images, then of their null branch, if there is one.
            guidance: (weight, low, high), see flow_matching.guided_velocity.
            guide: (FlowHead, its z) of a weaker network, in the null branch's place.
        """
        both = self.prepare(z if guidance[0] > 1 else z[:batch])
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

        return fm.guided_velocity(velocity, pair, *guidance)

    def prepare(self, z, scales=None, contexts=True):
        """The Condition of z: all of a velocity that depends neither on x nor on t. contexts=False leaves the contexts
        to the blocks, which then hold them no longer than they need them.
        """
        rope_table = self.res_blocks[0].attn.rope.table(scales or (math.isqrt(z.shape[1]),))
        of_blocks = [block.context(z, rope_table) if contexts else z for block in self.res_blocks]
        return Condition(self.cond_embed(z), of_blocks, rope_table)
