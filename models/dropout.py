"""Dropout that does not hold up a CPU: PyTorch's draws there number by number, on one core, which costs a third of a training step."""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

LEVELS = 1 << 16  # a random int16 an element: the probability is met within 1 / 65,536


@torch.library.custom_op("flowar::dropout_factors", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def dropout_factors(x: torch.Tensor, p: float) -> torch.Tensor:
    """0 with probability p, else 1 / (1 - p), for each element of x and in its dtype.

    They follow from the state of torch's generator, which seeds a faster one.
    """
    generator = np.random.Generator(np.random.SFC64(torch.randint(2**62, ()).item()))
    draws = generator.integers(-2**63, 2**63 - 1, size=-(-x.numel() // 4), endpoint=True).view(np.int16)[:x.numel()]
    kept = torch.ge(torch.from_numpy(draws), round(p * LEVELS) - LEVELS // 2, out=torch.empty(x.numel(), dtype=torch.int16))
    if x.element_size() == 2:  # 0 or 1, times the bits of the factor: no conversion
        return kept.mul_(torch.tensor(1 / (1 - p), dtype=x.dtype).view(torch.int16).item()).view(x.dtype).view(x.shape)
    return kept.to(x.dtype).mul_(1 / (1 - p)).view(x.shape)


@dropout_factors.register_fake
def _(x, p):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def dropout(x, p):
    """F.dropout(x, p) in training."""
    if p == 0 or p == 1 or x.device.type != "cpu":
        return F.dropout(x, p)
    return x * dropout_factors(x.detach(), p)


class Dropout(nn.Dropout):
    """nn.Dropout through dropout()."""

    def forward(self, x):
        return dropout(x, self.p) if self.training else x


def attention(q, k, v, p):
    """Attention of B heads N head_dim with dropout p on its weights; the fused kernels do that on a GPU but not on a CPU."""
    if p == 0 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p)
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1, dtype=torch.float32)
    return dropout(weights.to(v.dtype), p) @ v
