"""Memory of a training step, counted without one: for scripts/benchmark.py memory and --dry_run."""
import contextlib
import warnings

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models.kernels import is_attention

FLOAT = 4  # bytes
STATES = 5  # of every parameter, in float32: weights, gradients, two moments of AdamW, EMA


class Shapes(FakeTensorMode):
    """Inside, tensors have shapes and no numbers, whatever their device; a number that is read is True.

    FakeTensorMode is no public part of torch: the meta device, which is, has no autocast, and that decides on half of
    what a pass keeps. If torch moves it, this import fails, and with it --dry_run and scripts/benchmark.py.

    attended: storages of what attention gave, by their identity.
    """

    def __init__(self):
        super().__init__()
        self.attended = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return True
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if is_attention(function):
            storages = [part.untyped_storage() for part in result if isinstance(part, torch.Tensor)]
            self.attended.update((id(storage), storage) for storage in storages)
        return result


def bytes_for_backward(model, mode, batch, dtype=None):
    """Bytes that the backward pass of a batch needs, low-precision copies of the weights included; model, mode: of
    image_bytes. dtype: of autocast, None for none.
    """
    side, kept = model.scale[-1] * model.patch_size, {}
    mode.attended.clear()

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[id(storage)] = storage
        return tensor

    with (mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), warnings.catch_warnings(),
          torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()):
        warnings.simplefilter("ignore", FutureWarning)  # of what run_block keeps, which is counted here
        loss = model(torch.empty(batch, model.vae_embed_dim, side, side), torch.empty(batch, dtype=torch.long))
    del loss
    if model.use_checkpoint:
        kept |= mode.attended
    return sum(storage.nbytes() for storage in kept.values())


def image_bytes(model, dtype=None, **changes):
    """Bytes of activations an image: everything grows in proportion to the batch but the weights. model: anywhere, the
    meta device too; changes: of its arguments.
    """
    with torch.device("meta"):
        copy = type(model)(**{**model.config, **changes}).train()
    with Shapes() as mode:  # on the CPU, as autocast needs it
        for module in copy.modules():
            for name, value in module.named_parameters(recurse=False):
                module.register_parameter(name, torch.nn.Parameter(torch.empty(value.shape)))
            for name, value in module.named_buffers(recurse=False):
                module.register_buffer(name, torch.empty(value.shape, dtype=value.dtype))
    return bytes_for_backward(copy, mode, 2, dtype) - bytes_for_backward(copy, mode, 1, dtype)


def largest_block(model):
    """Bytes of the weights of its largest block, float32."""
    blocks = *model.blocks, *model.flownet.res_blocks
    return FLOAT * max(sum(p.numel() for p in block.parameters()) for block in blocks)
