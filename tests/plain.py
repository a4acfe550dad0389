"""FlowAR the plain way, on a model's own weights: a pass of the flow head for every scale, a dense mask, keys and values
concatenated, tables and embeddings computed where they are used, the null branch in every step.

The oracle that models/ must equal, and the other side of scripts/benchmark.py.
"""
import math

import torch
import torch.nn.functional as F

from models import flow_matching as fm
from models.flowar import to_grid, to_tokens


def rms(x, weight=1.0):
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def modulate(x, scale, shift):
    return rms(x) * (1 + scale) + shift


def rotate(x, scales):
    """x: B heads N head_dim, the tokens of `scales`."""
    freqs = 10000 ** (-torch.arange(0, x.shape[-1] // 2, 2, device=x.device) / (x.shape[-1] // 2))
    place = torch.cat([torch.cartesian_prod(*[torch.arange(s, device=x.device) / s * 16] * 2).view(-1, 2) for s in scales])
    angle = (place[..., None] * freqs).flatten(1)
    u, v = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = (u * angle.cos() - v * angle.sin(), v * angle.cos() + u * angle.sin())
    return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attention(module, x, scales, mask=None, cache=None):
    q, k, v = (heads(part, module.num_heads) for part in module.qkv(x).chunk(3, dim=-1))
    q, k = rotate(q, scales), rotate(k, scales)
    if cache is not None:
        if cache:
            k, v = torch.cat((cache["k"], k), dim=2), torch.cat((cache["v"], v), dim=2)
        cache.update(k=k, v=v)
    mask = None if mask is None else mask.to(q.dtype)
    x = F.scaled_dot_product_attention(q, k, v, mask, module.attn_dropout if module.training else 0.0)
    return F.dropout(module.proj(x.transpose(1, 2).flatten(2)), module.proj_drop.p, module.training)


def cross_attention(module, x, z, scales):
    q = heads(module.q(x), module.num_heads)
    k, v = (heads(part, module.num_heads) for part in module.kv(z).chunk(2, dim=-1))
    x = F.scaled_dot_product_attention(rotate(q, scales), rotate(k, scales), v)
    return module.proj(x.transpose(1, 2).flatten(2))


def mlp(module, x):
    p, training = module.drop.p, module.training
    hidden = F.dropout(F.gelu(module.fc1_g(x)) * module.fc1_x(x), p, training)
    return F.dropout(module.fc2(hidden), p, training)


def transformer(model, tokens, c, scales, span, mask=None, caches=None):
    caches = iter(caches or [None] * 1000)

    def run(block, x):
        g1, g2, a1, a2, b1, b2 = block.ada_lin(c)[:, None].chunk(6, dim=-1)
        x = x + g1 * attention(block.attn, modulate(x, a1, b1), scales, mask, next(caches))
        return x + g2 * mlp(block.mlp, modulate(x, a2, b2))

    x = rms(tokens + model.encoder_pos_embed_learned[:, span], model.z_proj_ln.weight)
    for block in model.encoder_blocks:
        x = run(block, x)
    x = model.decoder_embed(rms(x, model.encoder_norm.weight)) + model.decoder_pos_embed_learned[:, span]
    for block in model.decoder_blocks:
        x = run(block, x)
    return rms(x, model.decoder_norm.weight) + model.diffusion_pos_embed_learned[:, span]


def velocity(head, x, t, z):
    """One scale: x (B, s*s, C), t (B,), z (B, s*s, D)."""
    scales = [math.isqrt(x.shape[1])]
    angle = (t * 1000).floor()[:, None] * 10000 ** (-torch.arange(128, device=t.device) / 128)
    t = head.time_embed.mlp(torch.cat((angle.cos(), angle.sin()), dim=-1))[:, None]
    h, c = head.input_proj(x).float(), head.cond_embed(z)
    for block in head.res_blocks:
        if hasattr(block, "crossattn"):
            gate, scale, shift = block.ada_lin_attn(F.silu(t)).chunk(3, dim=-1)
            h = h + gate * attention(block.attn, modulate(h, scale, shift), scales)
            h = h + cross_attention(block.crossattn, rms(h, block.norm2_1.weight), rms(z, block.norm2_2.weight), scales)
            gate, scale, shift = block.ada_lin_mlp(F.silu(c + t)).chunk(3, dim=-1)
            h = h + gate * mlp(block.mlp, modulate(h, scale, shift))
        else:
            g1, g2, a1, a2, b1, b2 = block.ada_lin(F.silu(t + c)).chunk(6, dim=-1)
            h = h + g1 * attention(block.attn, modulate(h, a1, b1), scales)
            h = h + g2 * mlp(block.mlp, modulate(h, a2, b2))
    shift, scale = head.final_layer.adaLN_modulation(c + t).chunk(2, dim=-1)
    return head.final_layer.linear(modulate(h, scale, shift))


def condition(model, grids, labels):
    c = model.class_emb(labels)
    inputs = [model.z_proj(to_tokens(model.next_input(grid, k))) for k, grid in enumerate(grids[:-1])]
    return transformer(model, torch.cat([c[:, None], *inputs], dim=1), c, model.scale, slice(None), model.mask)


def loss(model, latents, labels, t, noise):
    """(loss, losses of every scale and image)."""
    grids = model.pyramid(latents)
    z = condition(model, grids, labels)
    losses = []
    for k, grid in enumerate(grids):
        x, time = to_tokens(grid), t[k, :, None, None]
        v = velocity(model.flownet, (1 - time) * x + time * noise[k], t[k], z[:, model.spans[k]])
        losses.append((v.float() - (noise[k] - x)).square().mean(dim=(1, 2)))
    return sum(s * s / model.scale[-1] ** 2 * e.mean() for s, e in zip(model.scale, losses)), torch.stack(losses)


@torch.no_grad()
def sample(model, labels, noise, cfg=1.0, guidance=0.9, num_steps=25, cfg_schedule="linear"):
    """Latents (B, C, H, W): both branches in every step, though guidance acts in some."""
    both = torch.cat((labels, torch.full_like(labels, model.class_num)))
    weights = fm.guidance_weights(cfg, len(model.scale), cfg_schedule)
    caches = [{} for _ in model.blocks]
    c = model.class_emb(both)
    tokens = c[:, None]
    for k, s in enumerate(model.scale):
        z = transformer(model, tokens, c, [s], model.spans[k], caches=caches)
        x, times = noise[k].double(), fm.time_grid(num_steps).tolist()
        for t, t_next in zip(times, times[1:]):
            now = torch.full((len(both),), t, dtype=torch.float32, device=x.device)
            v, v_null = velocity(model.flownet, torch.cat((x, x)).to(c.dtype), now, z).float().chunk(2)
            if t <= guidance and weights[k] > 1:
                v = v_null + weights[k] * (v - v_null)
            x = x + (t_next - t) * v.double()
        grid = to_grid(x.to(c.dtype), s)
        if k + 1 < len(model.scale):
            tokens = model.z_proj(to_tokens(model.next_input(grid, k))).repeat(2, 1, 1)
    return model.unpatchify(grid)
