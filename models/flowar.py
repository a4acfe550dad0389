"""FlowAR: scale-wise autoregressive image generation with a flow-matching head (arXiv 2412.15205, ICML 2025).

A latent is turned into a pyramid of scales, 1x1 to full size. A block-causal transformer reads the coarser scales
and gives a condition z for every token of the next one; the flow head turns noise into that scale's tokens.

    training    pyramid -> condition (teacher forced) -> flow head's velocity error, summed over scales
    sampling    for each scale: condition (cached keys and values) -> solver -> input of the next scale

Times, solvers and guidance are in flow_matching.py, the velocity network in flow_head.py, the sizes in registry.py;
docs/extending.md says what to change for what.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from models import flow_matching as fm
from models.checks import check_grids, check_guide, check_labels, check_scales, check_shapes
from models.errors import FlowARError
from models.flow_head import FlowHead
from models.kernels import Linear, modulate, per_token, run_block, with_coarse_mask
from models.layers import GatedMLP, KVCache, RMSNorm, SelfAttention, spans
from models.patterns import Pattern
from models.settings import Sampling


def visible_scales(k):
    """The scales that tokens of scale number k attend to: their own and all coarser ones (block-causal)."""
    return range(k + 1)


class Draws(NamedTuple):
    """What training or validation draws for n images."""
    t: torch.Tensor  # (scales, n)
    noise: list  # of (n, s*s, token_channels), coarse to fine
    drop: torch.Tensor  # (n,) bool: labels to replace by the null class
    condition_noise: list = ()  # like noise, of all scales but the last: what is added to what the transformer reads

    def take(self, images):
        """The draws of a slice of the images."""
        t, noise, drop, condition_noise = self
        return Draws(t[:, images], [e[images] for e in noise], drop[images], [e[images] for e in condition_noise])


class CausalBlock(nn.Module):
    """Transformer block modulated by the class embedding c (B, cond_dim)."""

    def __init__(self, dim, num_heads, cond_dim, mlp_ratio, attn_dropout, proj_dropout):
        super().__init__()
        self.attn = SelfAttention(dim, num_heads, True, attn_dropout, proj_dropout)
        self.mlp = GatedMLP(dim, mlp_ratio, proj_dropout)
        self.ada_lin = nn.Sequential(nn.SiLU(), Linear(cond_dim, 6 * dim))

    def forward(self, x, c, rope_table, pattern, cache=None):
        """x: (B, N, dim); rope_table: (cos, sin) of the N tokens; pattern: a Pattern; cache: a KVCache in sampling."""
        gate1, gate2, scale1, scale2, shift1, shift2 = self.ada_lin(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(x, scale1, shift1), rope_table, pattern, cache)
        return x + gate2 * self.mlp(modulate(x, scale2, shift2))


class FlowAR(nn.Module):
    """The model. Latents are (B, vae_embed_dim, H, W) with H = W = img_size / vae_stride, scaled to a std of about 1.

    Args:
        img_size, vae_stride, patch_size, vae_embed_dim: geometry; the finest scale has
            img_size / vae_stride / patch_size tokens a side, each of vae_embed_dim * patch_size**2 channels.
        scale: tokens a side of every scale, coarse to fine, from 1 to the finest.
        class_num: number of classes; the null class of classifier-free guidance is one more.
        encoder_*, decoder_*: the two halves of the transformer.
        mlp_ratio: the gated MLPs are int(dim * mlp_ratio * 2/3) wide.
        label_drop_prob: probability of replacing a training label by the null class.
        attn_dropout, proj_dropout: dropout on attention weights, and after projections and in the MLP.
        diffloss_d, diffloss_w, cross: depth, width and kind of block of the flow head.
        buffer_size: kept for the release's signature; only 0 exists.
        use_checkpoint: recompute each block's activations in the backward pass.
        t_dist: times of training, of flow_matching.TIME_DISTRIBUTIONS; a list has one for each scale.
        condition_noise: std, at most, of the noise on the scales that the transformer reads in training.

    Raises FlowARError for a geometry that cannot work.
    """
    objective = fm  # a module with its interpolate, velocity_target and SOLVERS

    def __init__(self, img_size=256, vae_stride=16, patch_size=1, vae_embed_dim=16, scale=(1, 2, 4, 8, 16),
                 class_num=1000, encoder_embed_dim=1024, encoder_depth=8, encoder_num_heads=16,
                 decoder_embed_dim=1024, decoder_depth=8, decoder_num_heads=16, mlp_ratio=4.0,
                 label_drop_prob=0.1, attn_dropout=0.0, proj_dropout=0.0, diffloss_d=3, diffloss_w=1024,
                 cross=False, buffer_size=0, use_checkpoint=False, t_dist="uniform", condition_noise=0.0):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        check_scales(img_size, vae_stride, patch_size, scale)
        if buffer_size != 0:
            raise FlowARError(f"buffer_size is {buffer_size}: only 0 is supported (the class is the one token before)")
        self.img_size, self.vae_stride, self.vae_embed_dim = img_size, vae_stride, vae_embed_dim
        self.patch_size, self.scale, self.class_num = patch_size, tuple(scale), class_num
        self.label_drop_prob, self.condition_noise = label_drop_prob, condition_noise
        t_dists = fm.of_each_scale("t_dist", t_dist, len(self.scale))
        self.time_distributions = [fm.read_time_distribution(text) for text in t_dists]
        self.use_checkpoint = use_checkpoint
        self.token_channels = vae_embed_dim * patch_size ** 2
        self.spans = spans(self.scale)
        self.tokens = tokens = self.spans[-1].stop
        self.pattern = Pattern(tuple(s * s for s in self.scale),
                               tuple(tuple(visible_scales(k)) for k in range(len(self.scale))))

        def build_blocks(dim, depth, num_heads):
            options = num_heads, encoder_embed_dim, mlp_ratio, attn_dropout, proj_dropout
            return nn.ModuleList([CausalBlock(dim, *options) for _ in range(depth)])

        self.class_emb = nn.Embedding(class_num + 1, encoder_embed_dim)
        self.z_proj = Linear(self.token_channels, encoder_embed_dim)
        self.z_proj_ln = RMSNorm(encoder_embed_dim)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, tokens, encoder_embed_dim))
        self.encoder_blocks = build_blocks(encoder_embed_dim, encoder_depth, encoder_num_heads)
        self.encoder_norm = RMSNorm(encoder_embed_dim)
        self.decoder_embed = Linear(encoder_embed_dim, decoder_embed_dim)
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, tokens, decoder_embed_dim))
        self.decoder_blocks = build_blocks(decoder_embed_dim, decoder_depth, decoder_num_heads)
        self.decoder_norm = RMSNorm(decoder_embed_dim)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, tokens, decoder_embed_dim))
        self.flownet = FlowHead(self.token_channels, decoder_embed_dim, diffloss_d, diffloss_w, mlp_ratio, cross,
                                use_checkpoint)
        # Attention reads self.pattern; the mask is a buffer of the released files, and tells their scales and pattern.
        self.register_buffer("mask", self.pattern.mask()[None, None].to(self.class_emb.weight.device))
        self._initialize()

    def _initialize(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for table in (self.class_emb.weight, self.encoder_pos_embed_learned, self.decoder_pos_embed_learned,
                      self.diffusion_pos_embed_learned):
            nn.init.normal_(table, std=0.02)

    # ---- the pyramid (paper: simple scale sequence) ---------------------------------------------------------

    def patchify(self, latents):
        """(B, C, H, W) -> (B, token_channels, H / patch_size, W / patch_size)."""
        side = self.scale[-1] * self.patch_size
        check_shapes("latents", [latents], [(len(latents), self.vae_embed_dim, side, side)])
        return F.pixel_unshuffle(latents, self.patch_size)

    def unpatchify(self, grid):
        """The inverse of patchify."""
        return F.pixel_shuffle(grid, self.patch_size)

    def pyramid(self, latents):
        """The latent at every scale by area interpolation: a list of (B, token_channels, s, s), coarse to fine."""
        grid = self.patchify(latents)
        return [grid if s == self.scale[-1] else F.interpolate(grid, size=(s, s), mode="area") for s in self.scale]

    def training_pyramid(self, latents):
        """The pyramid that training models; variants differ."""
        return self.pyramid(latents)

    def next_input(self, grid, k):
        """Input grid of scale k + 1 from scale k's latent: bicubic to full size, then area down."""
        full, s = self.scale[-1], self.scale[k + 1]
        grid = F.interpolate(grid, size=(full, full), mode="bicubic", align_corners=False)
        return grid if s == full else F.interpolate(grid, size=(s, s), mode="area")

    # ---- the scale-wise transformer (paper: generative autoregressive transformer) --------------------------

    @property
    def blocks(self):
        """The blocks of both halves of the transformer."""
        return (*self.encoder_blocks, *self.decoder_blocks)

    def run_transformer(self, tokens, c, pattern, span=slice(None), caches=None):
        """Condition z of the tokens (B, N, D) in `span`, given the class embedding c (B, D).

        Either all tokens at once, or those of one scale, whose coarser ones are in `caches`.
        """
        cos, sin = self.encoder_blocks[0].attn.rope.table(self.scale)  # the blocks' are alike
        rope_table = cos[span], sin[span]
        caches = iter(caches or [None] * len(self.blocks))
        x = self.z_proj_ln(tokens + self.encoder_pos_embed_learned[:, span])
        for block in self.encoder_blocks:
            x = run_block(block, self.use_checkpoint, x, c, rope_table, pattern, next(caches))
        x = self.decoder_embed(self.encoder_norm(x)) + self.decoder_pos_embed_learned[:, span]
        for block in self.decoder_blocks:
            x = run_block(block, self.use_checkpoint, x, c, rope_table, pattern, next(caches))
        return self.decoder_norm(x) + self.diffusion_pos_embed_learned[:, span]

    def condition_on(self, pyramid, labels):
        """condition() of a pyramid, a list of (B, token_channels, s, s), coarse to fine."""
        c = self.class_emb(labels)
        tokens = c[:, None]
        inputs = [to_tokens(self.next_input(grid, k)) for k, grid in enumerate(pyramid[:-1])]
        if inputs:
            tokens = torch.cat((tokens, self.z_proj(torch.cat(inputs, dim=1))), dim=1)
        return self.run_transformer(tokens, c, with_coarse_mask(self.pattern, tokens))

    def condition(self, latents, labels):
        """Teacher-forced condition z, (B, tokens, D), of latents (B, C, H, W) and labels (B,), class_num the null."""
        check_labels(labels, self.class_num + 1)
        return self.condition_on(self.pyramid(latents), labels)

    # ---- training (paper: scale-wise flow matching model) ---------------------------------------------------

    def draw(self, batch, generator=None):
        """The Draws of `batch` images, on the generator's device or the model's."""
        device = (generator or self.class_emb.weight).device
        t = torch.rand(len(self.scale), batch, generator=generator, device=device)
        if self.training:  # validation stays uniform: losses compare
            t = torch.stack([times(u) for times, u in zip(self.time_distributions, t)])
        noise = self.draw_noise(batch, generator)
        drop = torch.rand(batch, generator=generator, device=device) < self.label_drop_prob
        if not self.condition_noise or not self.training:
            return Draws(t, noise, drop)
        std = self.condition_noise * torch.rand(batch, 1, 1, generator=generator, device=device)
        return Draws(t, noise, drop, [std * e for e in self.draw_noise(batch, generator)[:-1]])

    def draw_noise(self, batch, generator=None):
        """Noise e of every scale, x at t = 1: a list of (batch, s*s, token_channels), coarse to fine."""
        device = (generator or self.class_emb.weight).device
        return [torch.randn(batch, s * s, self.token_channels, generator=generator, device=device) for s in self.scale]

    def scale_losses(self, latents, labels, *, t=None, noise=None, drop=None, condition_noise=()):
        """Mean squared velocity error of every scale and image, (scales, B), unweighted.

        Args:
            latents: (B, C, H, W), scaled; labels: (B,) in 0..class_num - 1.
            t, noise, drop, condition_noise: see Draws; what is None is drawn, condition_noise with t. No label is
                dropped in eval mode unless `drop` says so.
        """
        check_labels(labels, self.class_num)
        if t is None or noise is None or drop is None and self.training:
            draws = self.draw(len(labels))
            if t is None:
                t, condition_noise = draws.t, draws.condition_noise
            if noise is None:
                noise = draws.noise
            if drop is None and self.training:
                drop = draws.drop
        if drop is not None:
            labels = torch.where(drop, self.class_num, labels)
        pyramid = self.training_pyramid(latents)
        read = list(pyramid)  # what the transformer reads
        for k, e in enumerate(condition_noise):
            read[k] = read[k] + to_grid(e, self.scale[k])
        return self.velocity_errors(pyramid, self.condition_on(read, labels), t, noise)

    def velocity_errors(self, pyramid, z, t, noise):
        """The scale_losses of a pyramid, given the condition z."""
        x, noise = torch.cat([to_tokens(grid) for grid in pyramid], dim=1), torch.cat(noise, dim=1)
        x_t = self.objective.interpolate(x, noise, per_token(t.T[..., None], self.pattern))
        velocity = self.flownet(x_t, t, z, self.scale)
        error = (velocity - self.objective.velocity_target(x, noise).float()).square().mean(dim=2)
        return torch.stack([part.mean(dim=1) for part in error.split(self.pattern.sizes, dim=1)])

    def scale_weights(self):
        """Factor s^2 / S^2 of every scale in the loss."""
        return [s * s / self.scale[-1] ** 2 for s in self.scale]

    def weighted(self, losses):
        """The loss, a scalar, of every scale's own, (scales,)."""
        return sum(loss * weight for loss, weight in zip(losses, self.scale_weights()))

    def forward(self, latents, labels, *, return_scales=False, **draws):
        """Training loss, a scalar: the sum over scales of the batch mean of scale_losses(..., **draws) times s^2 / S^2.

        With return_scales also the batch mean of every scale, (scales,), unweighted and detached.
        """
        losses = self.scale_losses(latents, labels, **draws).mean(dim=1)
        loss = self.weighted(losses)
        return (loss, losses.detach()) if return_scales else loss

    # ---- sampling (paper: inference pipeline) ---------------------------------------------------------------

    def sample_tokens(self, labels, **options):
        """Latents (B, C, H, W), still scaled, of the given labels (B,). Options: see sample_pyramid."""
        return self.unpatchify(self.sample_pyramid(labels, **options)[-1])

    def schedule_sampling(self, settings):
        """(solver, time grid of every scale, guidance weight of every scale) of a Sampling that fits this model."""
        if settings.solver not in self.objective.SOLVERS:
            raise FlowARError(f"solver is {settings.solver!r}: expected one of {', '.join(self.objective.SOLVERS)}")
        scales = len(self.scale)
        return self.objective.SOLVERS[settings.solver], settings.times(scales), settings.guidance_weights(scales)

    @torch.no_grad()
    def sample_pyramid(self, labels, *, noise=None, generator=None, guide=None, given=(), known=None, forced=None,
                       **settings):
        """Generate every scale: a list of (B, token_channels, s, s), coarse to fine. Dropout is off in any mode.

        Args:
            labels: (B,) in 0..class_num - 1.
            noise: see draw_noise, which draws it with `generator` if None. A solver that draws uses `generator` too.
            guide: a weaker FlowAR, in the null class's place (autoguidance); it reads what this model draws.
            given: latents of the first scales, (B, token_channels, s, s) each, which are kept as they are.
            known: (latents of every scale like what is returned, a bool (B or 1, 1, s, s) for every scale: which cells
                are kept as they are). The others are drawn to fit.
            forced: a pyramid that the transformer reads in place of what is drawn, as in training.
            settings: of models.settings.Sampling: num_steps, cfg, guidance, solver, ...
        """
        # On a GPU checked on the host: an assertion there would end the process.
        check_labels(labels.cpu() if labels.is_cuda else labels, self.class_num)
        settings = Sampling.of({}, settings)
        solver, times, weights = self.schedule_sampling(settings)
        if noise is None:
            noise = self.draw_noise(len(labels), generator)
        check_grids(self, len(labels), noise, given, known)
        branches = labels
        if guide is not None:
            check_guide(self, guide)
        elif max(weights) > 1:
            branches = torch.cat((labels, torch.full_like(labels, self.class_num)))
        training = self.training
        self.eval()
        try:
            transformer = CachedTransformer(self, branches)
            guide_transformer = CachedTransformer(guide, labels) if guide is not None else None
            pyramid = []
            for k, s in enumerate(self.scale):
                z, guide_head = transformer.condition(k, forced or pyramid), None
                if guide is not None:
                    guide_head = guide.flownet, guide_transformer.condition(k, forced or pyramid)
                if k < len(given):
                    x = to_tokens(given[k])
                else:
                    velocity = self.flownet.guided(z, len(labels), weights[k], settings.guidance_low,
                                                   settings.guidance, guide_head)
                    e = noise[k].to(z.device) * settings.temperature
                    if known:
                        x_known, cells = to_tokens(known[0][k]).to(e), to_tokens(known[1][k]).to(e.device)
                        velocity = fm.keep_cells(velocity, x_known, e, cells)
                    x = solver(velocity, e, times[k], generator)
                    if known:
                        x = torch.where(cells, x_known, x)
                pyramid.append(to_grid(x.to(transformer.c), s))
            return pyramid
        finally:
            self.train(training)


class CachedTransformer:
    """The transformer in sampling: the condition scale by scale, with caches of the coarser ones.

    labels: (B,), or (2 B,) with those of the null branch, which reads the class branch's latents.
    """

    def __init__(self, model, labels):
        self.model, self.c = model, model.class_emb(labels)
        self.caches = [KVCache() for _ in model.blocks]

    def condition(self, k, pyramid):
        """z of scale k, (len(labels), s*s, D), of a pyramid whose coarser scales are there."""
        model, tokens = self.model, self.c[:, None]
        if k > 0:
            tokens = model.z_proj(to_tokens(model.next_input(pyramid[k - 1], k - 1)))
            tokens = tokens.repeat(len(self.c) // len(tokens), 1, 1)
        return model.run_transformer(tokens, self.c, model.pattern.at(k), model.spans[k], self.caches)


def to_tokens(grid):
    """(B, C, s, s) -> (B, s*s, C), row-major."""
    return grid.flatten(2).transpose(1, 2)


def to_grid(tokens, s):
    """(B, s*s, C) -> (B, C, s, s)."""
    return tokens.transpose(1, 2).unflatten(2, (s, s))
