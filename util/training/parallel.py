"""Training on several processes: DDP, or with --fsdp weights, gradients, moments and averages sharded, one part for
each process (torch's FSDP2, fully_shard).

With --fsdp each block is gathered in float32 while it runs, so autocast and the numbers are those of DDP. Checkpoints
are those of an unsharded run.
"""
import contextlib

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from util.cluster import is_main, world_size


def distribute(network, ema, device, fsdp, static_graph):
    """What the loop calls in the network's place; the network and its EMA are made ready for it. static_graph: every
    backward pass ends in a step, see DDP, whose no_sync needs the other kind. Without other processes, or on the meta
    device, nothing is done.
    """
    if world_size() == 1 or device.type == "meta":
        return network
    if not fsdp:
        ddp = DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None,
                                      gradient_as_bucket_view=True, static_graph=static_graph)
        ddp.broadcast_buffers = False  # the mask and the frequencies never change; sent again they cost every step
        return ddp
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(device.type, (world_size(),))
    for model in (network, ema.module):
        for block in (*model.blocks, *model.flownet.res_blocks):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)  # few tensors, which backward needs again at once
    for power in ema.powers.values():
        power.tensors = shard_like(power.tensors, dict(network.named_parameters()))
    return network


def is_sharded(tensor):
    """Whether it is a DTensor, whose module takes half a second to import."""
    return hasattr(tensor, "full_tensor")


def local(tensors):
    """This process's parts of tensors, the tensors themselves where they are whole."""
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]


def whole(tensor):
    """The tensor in one piece: all processes call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(tensors, owners):
    """{name: tensor}, each sharded as the tensor of that name in `owners` is; without communication, and one at a time
    on the device.
    """
    return {name: shard(tensor, owners.get(name)) for name, tensor in tensors.items()}


def shard(value, owner):
    """This process's part of a whole tensor, as DTensor, where its owner is one of the same shape; else the value."""
    if not is_sharded(owner) or getattr(value, "shape", None) != owner.shape:
        return value
    from torch.distributed.tensor import distribute_tensor
    placed = distribute_tensor(value.to(owner.device), owner.device_mesh, owner.placements, src_data_rank=None)
    return placed.clone()  # a part alone would hold the whole


def snapshot(value):
    """A copy on rank 0's CPU of nested dicts, lists and tensors, which later steps do not change; of tensors on other
    ranks None. All processes call it; one tensor at a time is whole on the device.
    """
    if isinstance(value, torch.Tensor):
        value = whole(value.detach())
        return value.to("cpu", copy=True) if is_main() else None
    if isinstance(value, dict):
        return {key: snapshot(part) for key, part in value.items()}
    return type(value)(map(snapshot, value)) if isinstance(value, (list, tuple)) else value


@contextlib.contextmanager
def gathered(*models):
    """The models whole on every device while the block runs, so that each process may run them as it likes, without
    gradients: all processes enter and leave it. Nothing for models that are not sharded.
    """
    units, blocks = [], []
    for model in models:
        own = [unit for unit in model.modules() if hasattr(unit, "unshard")]  # FSDPModules
        units += own
        blocks += own[1:]  # the first, the model's own, stays whole after a pass anyhow
    for unit in units:
        unit.unshard()
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(True, recurse=False)
        for unit in units:
            unit.reshard()
