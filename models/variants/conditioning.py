"""Other ways in which the condition enters the flow head, and a head that takes every
token by itself. The paper's ablations; the released way is models/flow_head.py.
"""
import torch
import torch.nn.functional as F
from torch import nn

from models.flow_head import AttnCrossAttnMLPBlock, Condition, FlowHead, per_token
from models.kernels import Linear, run_block
from models.layers import Pattern, SelfAttention, spans, within_scales


class PooledHead(FlowHead):
    """adaLN: the modulation is that of the mean of c over the tokens of a scale."""

    def prepare(self, z, scales=None, contexts=True):
        condition = super().prepare(z, scales, contexts)
        parts = [condition.c[:, span] for span in spans(scales)] if scales else [condition.c]
        return condition._replace(c=torch.cat([c.mean(dim=1, keepdim=True).expand_as(c) for c in parts], dim=1))


class TimeHead(FlowHead):
    """A head whose blocks are modulated by time alone; c enters elsewhere: here it is added to the input."""

    def forward(self, x, t, z, scales=None):
        z = z if isinstance(z, Condition) else self.prepare(z, scales, contexts=False)
        h, pattern = self.enter(self.input_proj(x).float(), z.c, scales)
        time = F.silu(self.time_embed((t if t.ndim == 2 else t[None]).T))  # B scales width
        modulation = per_token(time, pattern)
        for block, context in zip(self.res_blocks, z.contexts):
            h = run_block(block, self.use_checkpoint, h, modulation, time, z.z, context, z.rope_table, pattern)
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
        of = spans(scales) if scales else [slice(None)]
        table = [torch.cat([part[span] for span in of for _ in "cx"]) for part in condition.rope_table]
        return condition._replace(rope_table=tuple(table))

    def enter(self, h, c, scales):
        of = spans(scales) if scales else [slice(None)]
        c = c.float().expand_as(h)
        both = torch.cat([part[:, span] for span in of for part in (c, h)], dim=1)
        sizes = tuple(2 * s * s for s in scales or ())
        return both, Pattern(sizes, tuple((k,) for k in range(len(sizes)))) if scales else None

    def leave(self, velocity, scales):
        sizes = [s * s for s in scales] if scales else [velocity.shape[1] // 2]
        parts = velocity.split([2 * size for size in sizes], dim=1)
        return torch.cat([part[:, size:] for part, size in zip(parts, sizes)], dim=1)


class CrossHead(TimeHead):
    """Cross-attention of x to c in every block; MLPs half as wide make up for its weights."""

    def __init__(self, channels, cond_dim, depth, width, mlp_ratio, cross, use_checkpoint):
        super().__init__(channels, cond_dim, depth, width, mlp_ratio, cross, use_checkpoint)
        self.res_blocks = nn.ModuleList([AttnCrossAttnMLPBlock(width, width, mlp_ratio / 2) for _ in range(depth)])

    def prepare(self, z, scales=None, contexts=True):
        condition = super().prepare(z, scales, contexts=False)
        c, table = condition.c, condition.rope_table
        of_blocks = [block.context(c, table) if contexts else None for block in self.res_blocks]
        return condition._replace(z=None if contexts else c, contexts=of_blocks)

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
