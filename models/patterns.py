"""Which tokens attend to which: whole scales see whole scales."""
from typing import NamedTuple

import torch


class Pattern(NamedTuple):
    """Which keys a query sees: whole scales of them."""
    sizes: tuple  # tokens of each scale of the keys
    sees: tuple  # for each scale of the queries, the last ones of the keys': numbers of the scales that it sees
    coarse: tuple | None = None  # of kernels.with_coarse_mask: (mask of the coarse scales, Pattern where they are one)

    def mask(self):
        """(queries, keys) float32: 0 where a token sees, -inf where it does not. On the CPU even while a model is built
        on another default device, such as meta.
        """
        keys = torch.cat([torch.full((size,), k, device="cpu") for k, size in enumerate(self.sizes)])
        rows = []
        for sees, size in zip(self.sees, self.sizes[-len(self.sees):]):
            rows.append(torch.isin(keys, torch.tensor(sees, device="cpu")).expand(size, -1))
        return torch.zeros(1, device="cpu").masked_fill(~torch.cat(rows), float("-inf"))

    def at(self, k):
        """The Pattern of scale k's queries alone, over the keys of scales 0 to k."""
        return Pattern(self.sizes[:k + 1], self.sees[k:k + 1])


def within_scales(scales):
    """The Pattern in which a token sees its own scale."""
    return Pattern(tuple(s * s for s in scales), tuple((k,) for k in range(len(scales))))
