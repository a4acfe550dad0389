"""The flow head: one velocity network for all scales (paper section 3.3, "flow matching model")."""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models.errors import FlowARError
from models.layers import CrossAttention, GatedMLP, Linear, RMSNorm, SelfAttention, modulate, run_block

HEAD_DIM = 64
FREQUENCIES = 128
TIME_STEPS = 1000  # the network sees floor(1000 t)


class TimeEmbedder(nn.Module):
    """floor(1000 t) -> 128 cosines and 128 sines -> Linear-SiLU-Linear. t: (B,) -> (B, width)."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(Linear(2 * FREQUENCIES, width), nn.SiLU(), Linear(width, width))

    def forward(self, t):
        step = (t.float() * TIME_STEPS).floor()
        j = torch.arange(FREQUENCIES, device=t.device, dtype=torch.float32)
        angle = step[:, None] * torch.exp(-math.log(10000) * j / FREQUENCIES)
        return self.mlp(torch.cat((angle.cos(), angle.sin()), dim=-1))


class FlowBlock(nn.Module):
    """A block of the flow head. What does not depend on the state h is apart, for a sampler to compute once."""

    def time_modulation(self, silu_t):
        """What follows from SiLU(t) (B, times, width) alone."""

    def context(self, z, rope_table):
        """What follows from the transformer's condition z (B, N, cond_dim) alone."""

    def step(self, h, a, time, context, rope_table, scales):
        """h: (B, N, width); a: SiLU(c + t) per token; time, context: of the methods above, time per token or (1, 1, .)."""
        raise NotImplementedError

    def forward(self, h, a, silu_t, z, rope_table, scales):
        time = self.time_modulation(silu_t)
        time = time if time is None else per_token(time, scales)
        return self.step(h, a, time, self.context(z, rope_table), rope_table, scales)


class AttnMLPBlock(FlowBlock):
    """FlowAR-S: self-attention inside the scale and a gated MLP, both modulated per token by SiLU(t + c)."""

    def __init__(self, width, cond_dim, mlp_ratio):
        super().__init__()
        self.attn = SelfAttention(width, width // HEAD_DIM, qkv_bias=False)
        self.mlp = GatedMLP(width, mlp_ratio)
        self.ada_lin = Linear(width, 6 * width)

    def step(self, h, a, time, context, rope_table, scales):
        gate1, gate2, scale1, scale2, shift1, shift2 = self.ada_lin(a).chunk(6, dim=-1)
        h = h + gate1 * self.attn(modulate(h, scale1, shift1), rope_table, scales)
        return h + gate2 * self.mlp(modulate(h, scale2, shift2))


class AttnCrossAttnMLPBlock(FlowBlock):
    """FlowAR-L and -H: self-attention modulated by time, cross-attention to z, MLP modulated per token."""

    def __init__(self, width, cond_dim, mlp_ratio):
        super().__init__()
        self.attn = SelfAttention(width, width // HEAD_DIM, qkv_bias=False)
        self.crossattn = CrossAttention(width, cond_dim, width // HEAD_DIM)
        self.norm2_1 = RMSNorm(width)
        self.norm2_2 = RMSNorm(cond_dim)
        self.mlp = GatedMLP(width, mlp_ratio)
        self.ada_lin_attn = Linear(width, 3 * width)
        self.ada_lin_mlp = Linear(width, 3 * width)

    def time_modulation(self, silu_t):
        return self.ada_lin_attn(silu_t)

    def context(self, z, rope_table):
        return self.crossattn.keys_and_values(self.norm2_2(z), rope_table)

    def step(self, h, a, time, context, rope_table, scales):
        gate, scale, shift = time.chunk(3, dim=-1)
        h = h + gate * self.attn(modulate(h, scale, shift), rope_table, scales)
        h = h + self.crossattn(self.norm2_1(h), context, rope_table, scales)
        gate, scale, shift = self.ada_lin_mlp(a).chunk(3, dim=-1)
        return h + gate * self.mlp(modulate(h, scale, shift))


class FinalLayer(nn.Module):
    """Modulate by a = SiLU(c + t) and project to the velocity."""

    def __init__(self, width, out_channels):
        super().__init__()
        self.linear = Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width))

    def forward(self, h, a):
        shift, scale = self.adaLN_modulation[1](a).chunk(2, dim=-1)
        return self.linear(modulate(h, scale, shift)).float()


def per_token(values, scales):
    """One value a scale, (B, scales, n) -> one a token, (B, tokens, n); a single scale's is left to broadcast."""
    if values.shape[1] == 1:
        return values
    # expand and cat rather than an index: its gradient is a sum, not a scatter
    return torch.cat([values[:, k:k + 1].expand(-1, s * s, -1) for k, s in enumerate(scales)], dim=1)


class Prepared(NamedTuple):
    """What the steps of an integration share, for one condition: see FlowHead.prepare."""

    c: torch.Tensor  # (B, N, width): the condition, embedded
    t: torch.Tensor  # (times, width): every time, embedded
    modulations: list  # of every block: (times, 3 width), or None
    contexts: list  # of every block: keys and values of z, or None
    rope_table: tuple

    def first(self, count):
        """The same for the first `count` images."""
        contexts = [context and tuple(part[:count] for part in context) for context in self.contexts]
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
        if depth < 1:
            raise FlowARError(f"diffloss_d is {depth}: the flow head needs at least one block")
        self.use_checkpoint = use_checkpoint
        self.time_embed = TimeEmbedder(width)
        self.cond_embed = Linear(cond_dim, width)
        self.input_proj = Linear(channels, width)
        block = AttnCrossAttnMLPBlock if cross else AttnMLPBlock
        self.res_blocks = nn.ModuleList([block(width, cond_dim, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(width, channels)

    def rope_table(self, scales):
        return self.res_blocks[0].attn.rope.table(scales)

    def forward(self, x, t, z):
        """x: (B, s*s, channels) at time t: (B,) in [0, 1]; z: (B, s*s, cond_dim) -> velocity (B, s*s, channels)."""
        return self.all_scales(x, t[None], z, (math.isqrt(x.shape[1]),))

    def all_scales(self, x, t, z, scales):
        """Velocities of all scales in one pass: every layer on all tokens at once, attention inside each scale.

        x: (B, N, channels), the tokens of `scales` one after the other; t: (scales, B); z: (B, N, cond_dim).
        """
        rope_table = self.rope_table(scales)
        h = self.input_proj(x).float()  # the residual stream stays float32 under autocast
        t = self.time_embed(t.T.flatten()).unflatten(0, t.T.shape)  # B scales width
        silu_t, a = F.silu(t), F.silu(self.cond_embed(z) + per_token(t, scales))
        for block in self.res_blocks:
            h = run_block(block, self.use_checkpoint, h, a, silu_t, z, rope_table, scales)
        return self.final_layer(h, a)

    def prepare(self, z, times, rope_table):
        """Everything in a velocity that does not depend on x, for one scale's z (B, s*s, cond_dim) and all times (n,)."""
        t = self.time_embed(times)
        silu_t = F.silu(t)
        return Prepared(self.cond_embed(z), t, [block.time_modulation(silu_t) for block in self.res_blocks],
                        [block.context(z, rope_table) for block in self.res_blocks], rope_table)

    def velocity(self, x, step, prepared):
        """Velocity (B, s*s, channels) at x and the time of number `step`, a tensor (1,) on the device."""
        h = self.input_proj(x).float().clone()  # not a view: the compiler would take it for another kind of input than later blocks'
        a = F.silu(prepared.c + prepared.t[step])
        for block, modulation, context in zip(self.res_blocks, prepared.modulations, prepared.contexts):
            time = None if modulation is None else modulation[step][None]
            h = block.step(h, a, time, context, prepared.rope_table, None)
        return self.final_layer(h, a)
