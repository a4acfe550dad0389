"""Floating-point operations of a FlowAR: 2 for every multiply and add of a matrix product, counted on the meta device.

Only matrix products count, at their published sizes (a padded layer's zeros do not), and a backward pass is two forward
passes: recomputation earns nothing. So "share of peak" is what nanoGPT and PaLM call model FLOPs utilisation.
"""
import torch
from torch.utils.flop_counter import FlopCounterMode


def count_flops(function):
    """Operations of function()."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def on_meta(model):
    """The same model without numbers."""
    with torch.device("meta"):
        return type(model)(**model.config).eval()


def training_flops(model):
    """Of one image, forward and backward."""
    model = on_meta(model)
    side = model.scale[-1] * model.patch_size
    latents = torch.empty(1, model.vae_embed_dim, side, side, device="meta")
    labels = torch.empty(1, dtype=torch.long, device="meta")
    return 3 * count_flops(lambda: model(latents, labels))


def sampling_flops(model, batch, **options):
    """Of one image of a batch; options: of FlowAR.sample_tokens."""
    model = on_meta(model)
    labels = torch.empty(batch, dtype=torch.long, device="meta")
    return count_flops(lambda: model.sample_tokens(labels, **options)) / batch
