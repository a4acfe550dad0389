"""The flow head: one velocity network for all scales (paper section 3.3, "flow matching model")."""
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.errors import FlowARError
from models.layers import CrossAttention, RMSNorm, SelfAttention, gated_mlp, modulate

HEAD_DIM = 64
FREQUENCIES = 128
TIME_STEPS = 1000  # the network sees floor(1000 t)


class TimeEmbedder(nn.Module):
    """floor(1000 t) -> 128 cosines and 128 sines -> Linear-SiLU-Linear. t: (B,) -> (B, width)."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        step = (t.float() * TIME_STEPS).floor()
        j = torch.arange(FREQUENCIES, device=t.device, dtype=torch.float32)
        angle = step[:, None] * torch.exp(-math.log(10000) * j / FREQUENCIES)
        return self.mlp(torch.cat((angle.cos(), angle.sin()), dim=-1))


class AttnMLPBlock(nn.Module):
    """FlowAR-S: self-attention inside the scale and a gated MLP, both modulated per token by SiLU(t + c)."""

    def __init__(self, width, cond_dim, mlp_ratio):
        super().__init__()
        self.attn = SelfAttention(width, width // HEAD_DIM, qkv_bias=False)
        self.mlp = gated_mlp(width, mlp_ratio)
        self.ada_lin = nn.Linear(width, 6 * width)

    def forward(self, h, t, c, z, rope_table):
        gate1, gate2, scale1, scale2, shift1, shift2 = self.ada_lin(F.silu(t + c)).chunk(6, dim=-1)
        h = h + gate1 * self.attn(modulate(h, scale1, shift1), rope_table)
        return h + gate2 * self.mlp(modulate(h, scale2, shift2))


class AttnCrossAttnMLPBlock(nn.Module):
    """FlowAR-L and -H: self-attention modulated by time, cross-attention to z, MLP modulated per token."""

    def __init__(self, width, cond_dim, mlp_ratio):
        super().__init__()
        self.attn = SelfAttention(width, width // HEAD_DIM, qkv_bias=False)
        self.crossattn = CrossAttention(width, cond_dim, width // HEAD_DIM)
        self.norm2_1 = RMSNorm(width)
        self.norm2_2 = RMSNorm(cond_dim)
        self.mlp = gated_mlp(width, mlp_ratio)
        self.ada_lin_attn = nn.Linear(width, 3 * width)
        self.ada_lin_mlp = nn.Linear(width, 3 * width)

    def forward(self, h, t, c, z, rope_table):
        gate, scale, shift = self.ada_lin_attn(F.silu(t)).chunk(3, dim=-1)
        h = h + gate * self.attn(modulate(h, scale, shift), rope_table)
        h = h + self.crossattn(self.norm2_1(h), self.norm2_2(z), rope_table)
        gate, scale, shift = self.ada_lin_mlp(F.silu(c + t)).chunk(3, dim=-1)
        return h + gate * self.mlp(modulate(h, scale, shift))


class FinalLayer(nn.Module):
    """Modulate by SiLU(c + t) and project to the velocity."""

    def __init__(self, width, out_channels):
        super().__init__()
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, h, t, c):
        shift, scale = self.adaLN_modulation(c + t).chunk(2, dim=-1)
        return self.linear(modulate(h, scale, shift))


class FlowHead(nn.Module):
    """Velocity of one scale's tokens, given the transformer's condition.

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
        self.cond_embed = nn.Linear(cond_dim, width)
        self.input_proj = nn.Linear(channels, width)
        block = AttnCrossAttnMLPBlock if cross else AttnMLPBlock
        self.res_blocks = nn.ModuleList([block(width, cond_dim, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(width, channels)

    def forward(self, x, t, z):
        """x: (B, s*s, channels) at time t: (B,) in [0, 1]; z: (B, s*s, cond_dim) -> velocity (B, s*s, channels)."""
        rope_table = self.res_blocks[0].attn.rope.table([math.isqrt(x.shape[1])])
        h = self.input_proj(x).float()  # the residual stream stays float32 under autocast
        t = self.time_embed(t)[:, None]
        c = self.cond_embed(z)
        for block in self.res_blocks:
            if self.use_checkpoint and torch.is_grad_enabled():
                h = checkpoint(block, h, t, c, z, rope_table, use_reentrant=False)
            else:
                h = block(h, t, c, z, rope_table)
        return self.final_layer(h, t, c)
