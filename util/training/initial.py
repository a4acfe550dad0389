"""--init_from: a training that begins with the weights of another, whose classes, image size or scales may differ."""
import math

import torch
import torch.nn.functional as F

from models import FlowARError
from models.errors import name_some
from models.layers import spans
from models.weights import find_model, scales_of
from util.cluster import log
from util.training.checkpoint import open_on_all
from util.training.record import saved_data

CLASS_TABLE = "class_emb.weight"
POSITIONS = "encoder_pos_embed_learned", "decoder_pos_embed_learned", "diffusion_pos_embed_learned"
LEAST = 0.5  # of the network's numbers, which have to come from the file


@torch.no_grad()
def load_initial_weights(name, network, record):
    """Load what fits of the weights of a path or name (the average where the file has one) into a new network; log what
    was loaded, resized and left. record: of now, see util.training.record. FlowARError if little fits. A collective.
    """
    checkpoint = open_on_all(name)
    path, content = checkpoint.path, checkpoint.content
    weights, resized = find_model(content, path), []
    state, own = weights.tensors, dict(network.named_parameters())
    fitting = {key: state[key] for key in own if key in state and state[key].shape == own[key].shape}

    # Classes by name where the file names them, else by number.
    before, now = saved_data(content).get("classes"), record["data"]["classes"]
    other_classes = CLASS_TABLE not in fitting or before is not None and before != now
    table, own_table = state.get(CLASS_TABLE), own[CLASS_TABLE]
    if other_classes and table is not None and table.shape[1] == own_table.shape[1]:
        fitting[CLASS_TABLE], by_name = class_table(table, len(own_table), before or [], now)
        resized.append(f"{CLASS_TABLE} ({by_name} of {len(now)} classes by name; the others begin as the null class)")

    # Positions by scale.
    scales = scales_of(state["mask"])
    for key in POSITIONS:
        if scales != network.scale and key in state and state[key].shape[2] == own[key].shape[2]:
            fitting[key] = carry_positions(state[key], scales, network.scale)
            resized.append(f"{key} (scales {','.join(map(str, scales))} to {','.join(map(str, network.scale))})")

    left = [f"{key} {tuple(own[key].shape)}" for key in own if key not in fitting]
    share = sum(own[key].numel() for key in fitting) / sum(value.numel() for value in own.values())
    if share < LEAST:
        raise FlowARError(f"--init_from {path}: contains only {share:.0%} of the model's weights, not "
                          f"{name_some(left, 3)}: set --model, --diffloss_d and --diffloss_w as in its training")
    for key, value in fitting.items():
        own[key].copy_(value)
    by_number = ", classes by number (the file has no names)" if before is None and not other_classes else ""
    log(f"--init_from {path}: {weights.describe([])}; {len(fitting)} of {len(own)} tensors{by_number}; resized: "
        f"{', '.join(resized) or 'none'}; randomly initialised: {name_some(left) or 'none'}")


def class_table(table, size, before, now):
    """(Class table of `size` rows, how many of them are of a class of the same name) out of another; the others begin
    as its null class, the last row. before, now: names of the classes, [] where they are not known.
    """
    rows = {name: row for row, name in enumerate(before)}
    chosen = [rows.get(name, -1) for name in now]
    chosen += [-1] * (size - len(chosen))
    return table[chosen], sum(row >= 0 for row in chosen)


def carry_positions(table, old, new):
    """A table of positions (1, tokens, D) for another list of scales: a scale's own, or those of the one nearest in
    size, resized bicubically: the positions of every scale span the same square (see RotaryEmbedding).
    """
    tables, resized = {s: table[:, span] for s, span in zip(old, spans(old))}, []
    for s in new:
        nearest = min(tables, key=lambda other: abs(math.log(other / s)))
        positions = tables[nearest]
        if nearest != s:
            grid = positions.float().transpose(1, 2).unflatten(2, (nearest, nearest))
            grid = F.interpolate(grid, size=(s, s), mode="bicubic", align_corners=False)
            positions = grid.flatten(2).transpose(1, 2)
        resized.append(positions)
    return torch.cat(resized, dim=1)
