"""Other ways in which the condition enters the flow head, and a head that takes every token by itself: the paper's
ablations. The released way is models/flow_head.py.
"""
import torch
import torch.nn.functional as F
from torch import nn

from models.flow_head import AttnCrossAttnMLPBlock, EmbeddedCondition, FlowHead
from models.kernels import Linear, per_token
from models.layers import SelfAttention
from models.patterns import within_scales


def by_scale(tokens, scales, dim=1):
    """The tokens of each scale; scales: None for those of one."""
    return tokens.split([s * s for s in scales], dim) if scales else [tokens]


class PooledHead(FlowHead):
    """adaLN: the modulation is that of the mean of c over the tokens of a scale."""

    def embed(self, z, scales=None):
        embedded = super().embed(z, scales)
        means = [c.mean(dim=1, keepdim=True).expand_as(c) for c in by_scale(embedded.c, scales)]
        return embedded._replace(c=torch.cat(means, dim=1))


class TimeHead(FlowHead):
    """A head whose blocks are modulated by time alone; c enters elsewhere: here it is added to the input."""

    def forward(self, x, t, z, scales=None):
        embedded = z if isinstance(z, EmbeddedCondition) else self.embed(z, scales)
        h, pattern = self.enter(self.input_proj(x).float(), embedded.c, scales)
        time = F.silu(self.time_embed(torch.atleast_2d(t).T))  # B scales width
        modulation = per_token(time, pattern)
        h = self.run_blocks(h, modulation, time, embedded, pattern)
        return self.leave(self.final_layer(h, modulation), scales)

    def enter(self, h, c, scales):
        """(The blocks' input, the pattern of its tokens) of the embedded x and c, both (B, N, width)."""
        return h + c, within_scales(scales) if scales else None

    def leave(self, velocity, scales):
        """(B, N, channels) of the last layer's output."""
        return velocity


class ConcatenatedHead(TimeHead):
    """Channel concatenation: one linear layer of x and c side by side makes the input."""

    def __init__(self, channels, cond_dim, depth, width, *options):
        super().__init__(channels, cond_dim, depth, width, *options)
        self.join = Linear(2 * width, width)

    def enter(self, h, c, scales):
        return super().enter(self.join(torch.cat((h, c), dim=-1)).float(), 0, scales)


class PrefixedHead(TimeHead):
    """Sequence concatenation: attention runs over 2 N tokens, for each scale those of c and then those of x. Both have
    the positions of their scale.
    """

    def embed(self, z, scales=None):
        embedded = super().embed(z, scales)
        cos, sin = embedded.rope_table
        return embedded._replace(rope_table=(interleave(cos, cos, scales, 0), interleave(sin, sin, scales, 0)))

    def enter(self, h, c, scales):
        pattern = None
        if scales:
            pattern = within_scales(scales)
            pattern = pattern._replace(sizes=tuple(2 * size for size in pattern.sizes))
        return interleave(c.float().expand_as(h), h, scales), pattern

    def leave(self, velocity, scales):
        """That of the tokens of x: the second half of each scale's."""
        sizes = [2 * s * s for s in scales] if scales else [velocity.shape[1]]
        return torch.cat([part[:, part.shape[1] // 2:] for part in velocity.split(sizes, dim=1)], dim=1)


def interleave(first, second, scales, dim=1):
    """For each scale its tokens of `first` and then those of `second`, in one sequence."""
    parts = []
    for pair in zip(by_scale(first, scales, dim), by_scale(second, scales, dim)):
        parts += pair
    return torch.cat(parts, dim)


class CrossHead(TimeHead):
    """Cross-attention of x to c in every block; MLPs half as wide make up for its weights."""

    def __init__(self, channels, cond_dim, depth, width, mlp_ratio, cross, use_checkpoint):
        super().__init__(channels, cond_dim, depth, width, mlp_ratio, cross, use_checkpoint)
        self.res_blocks = nn.ModuleList([AttnCrossAttnMLPBlock(width, width, mlp_ratio / 2) for _ in range(depth)])

    def embed(self, z, scales=None):
        embedded = super().embed(z, scales)
        return embedded._replace(z=embedded.c)  # which the blocks attend to

    def enter(self, h, c, scales):
        return super().enter(h.clone(), 0, scales)


HEADS = {"spatial_adaln": FlowHead, "adaln": PooledHead, "addition": TimeHead, "channel_concat": ConcatenatedHead,
         "sequence_concat": PrefixedHead, "cross_attention": CrossHead}


class TokenAttention(SelfAttention):
    """Attention of every token to itself alone, which gives its own value: the head's tokens know nothing of each other
    but what z tells. The weights of queries and keys stay, unused, so that both heads have as many.
    """

    def forward(self, x, rope_table, pattern=None, cache=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(v + 0 * (q + k))
