"""Other ways in which the condition enters the flow head, and a head that takes every token by itself: the paper's
ablations. The released way is models/flow_head.py.
"""
import torch
import torch.nn.functional as F
from torch import nn

from models.flow_head import AttnCrossAttnMLPBlock, Condition, FlowHead
from models.kernels import Linear, per_token, run_block
from models.layers import Pattern, SelfAttention, within_scales


def by_scale(tokens, scales, dim=1):
    """The tokens of each scale; scales: None for those of one."""
    return tokens.split([s * s for s in scales], dim) if scales else [tokens]


class PooledHead(FlowHead):
    """adaLN: the modulation is that of the mean of c over the tokens of a scale."""

    def prepare(self, z, scales=None, contexts=True):
        condition = super().prepare(z, scales, contexts)
        means = [c.mean(dim=1, keepdim=True).expand_as(c) for c in by_scale(condition.c, scales)]
        return condition._replace(c=torch.cat(means, dim=1))


class TimeHead(FlowHead):
    """A head whose blocks are modulated by time alone; c enters elsewhere: here it is added to the input."""

    def forward(self, x, t, z, scales=None):
        z = z if isinstance(z, Condition) else self.prepare(z, scales, contexts=False)
        h, pattern = self.enter(self.input_proj(x).float(), z.c, scales)
        time = F.silu(self.time_embed(torch.atleast_2d(t).T))  # B scales width
        modulation = per_token(time, pattern)
        for block, context in zip(self.res_blocks, z.contexts):
            h = run_block(block, self.use_checkpoint, h, modulation, time, context, z.rope_table, pattern)
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
    """Sequence concatenation: the tokens of c stand before those of x, scale by scale; attention runs over both."""

    def prepare(self, z, scales=None, contexts=True):
        condition = super().prepare(z, scales, contexts)
        cos, sin = (self.join(table, table, scales, dim=0) for table in condition.rope_table)
        return condition._replace(rope_table=(cos, sin))

    def join(self, c, x, scales, dim=1):
        pairs = zip(by_scale(c, scales, dim), by_scale(x, scales, dim))
        return torch.cat([torch.cat(pair, dim) for pair in pairs], dim)

    def enter(self, h, c, scales):
        pattern = None
        if scales:
            sizes, sees = within_scales(scales)
            pattern = Pattern(tuple(2 * size for size in sizes), sees)
        return self.join(c.float().expand_as(h), h, scales), pattern

    def leave(self, velocity, scales):
        sizes = [2 * s * s for s in scales] if scales else [velocity.shape[1]]
        return torch.cat([part[:, part.shape[1] // 2:] for part in velocity.split(sizes, dim=1)], dim=1)


class CrossHead(TimeHead):
    """Cross-attention of x to c in every block; MLPs half as wide make up for its weights."""

    def __init__(self, channels, cond_dim, depth, width, mlp_ratio, cross, use_checkpoint):
        super().__init__(channels, cond_dim, depth, width, mlp_ratio, cross, use_checkpoint)
        self.res_blocks = nn.ModuleList([AttnCrossAttnMLPBlock(width, width, mlp_ratio / 2) for _ in range(depth)])

    def prepare(self, z, scales=None, contexts=True):
        condition = super().prepare(z, scales, contexts=False)
        c, table = condition.c, condition.rope_table
        return condition._replace(contexts=[block.context(c, table) if contexts else c for block in self.res_blocks])

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
