"""Floating-point operations of FlowAR, counted from its sizes: 2 for every multiply and add of a matrix product.

Only matrix products count, at their published sizes (a padded layer's zeros do not), and a backward pass is two forward
passes: recomputation earns nothing. So "share of peak" is what nanoGPT and PaLM call model FLOPs utilisation.
"""
from models import flow_matching as fm
from models.flow_head import AttnCrossAttnMLPBlock


def linear(layer):
    """Of one row."""
    return 2 * layer.in_features * layer.out_features


def attention(dim, pairs):
    """Scores and their product with the values, for `pairs` of a query and a key it sees."""
    return 4 * dim * pairs


def mlp(module):
    return linear(module.fc1_g) + linear(module.fc1_x) + linear(module.fc2)


def transformer(model, tokens, pairs):
    """Of `tokens` tokens of an image in one pass."""
    total = tokens * linear(model.decoder_embed)
    for block in model.blocks:
        total += tokens * (linear(block.attn.qkv) + linear(block.attn.proj) + mlp(block.mlp))
        total += attention(block.attn.proj.in_features, pairs) + linear(block.ada_lin[1])
    return total


def time_tables(head, times):
    """Of the embeddings of `times` times and what the blocks derive from them alone."""
    embed = linear(head.time_embed.mlp[0]) + linear(head.time_embed.mlp[2])
    return times * (embed + sum(linear(block.ada_lin_attn) for block in head.res_blocks if _has_context(block)))


def context(head, tokens):
    """Of what follows from the condition alone."""
    keys = sum(linear(block.crossattn.kv) for block in head.res_blocks if _has_context(block))
    return tokens * (linear(head.cond_embed) + keys)


def velocity(head, tokens, pairs):
    """Of one evaluation, given time_tables and context."""
    total = tokens * (linear(head.input_proj) + linear(head.final_layer.adaLN_modulation[1]) + linear(head.final_layer.linear))
    for block in head.res_blocks:
        crossed = _has_context(block)
        total += tokens * (linear(block.attn.qkv) + linear(block.attn.proj) + mlp(block.mlp))
        total += tokens * (linear(block.ada_lin_mlp if crossed else block.ada_lin))
        total += attention(block.attn.proj.in_features, pairs)
        if crossed:
            total += tokens * (linear(block.crossattn.q) + linear(block.crossattn.proj)) + attention(block.crossattn.proj.in_features, pairs)
    return total


def _has_context(block):
    return isinstance(block, AttnCrossAttnMLPBlock)


def forward_flops(model):
    """Of one image in training, forward: {transformer, head}."""
    sizes = [s * s for s in model.scale]
    seen = sum(n * span.stop for n, span in zip(sizes, model.spans))  # a token sees its own scale and all coarser ones
    body = (model.tokens - 1) * linear(model.z_proj) + transformer(model, model.tokens, seen)
    own = sum(n * n for n in sizes)
    head = time_tables(model.flownet, len(sizes)) + context(model.flownet, model.tokens) + velocity(model.flownet, model.tokens, own)
    return {"transformer": body, "head": head}


def training_flops(model):
    """Of one image, forward and backward."""
    return 3 * sum(forward_flops(model).values())


def sampling_flops(model, batch, *, num_steps=25, num_steps_last=None, cfg=1.0, guidance=0.9, cfg_schedule="linear"):
    """Of one image of a batch, Euler's steps, the null branch where it is needed: {transformer, head}."""
    body = head = 0
    weights = fm.guidance_scales(cfg, len(model.scale), cfg_schedule)
    steps = fm.annealed_steps(num_steps, num_steps_last, len(model.scale))
    branches = 2 if max(weights) > 1 else 1
    for k, s in enumerate(model.scale):
        n = s * s
        body += branches * transformer(model, n, n * model.spans[k].stop) + (n * linear(model.z_proj) if k else 0)
        times = fm.time_grid(steps[k]).tolist()
        doubled = sum(t <= guidance for t in times[:-1]) if weights[k] > 1 else 0
        head += context(model.flownet, n) * (2 if weights[k] > 1 else 1) + time_tables(model.flownet, len(times)) / batch
        head += (len(times) - 1 + doubled) * velocity(model.flownet, n, n * n)
    return {"transformer": body, "head": head}
