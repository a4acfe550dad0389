"""FlowAR: scale-wise autoregressive image generation with a flow-matching head (arXiv 2412.15205, ICML 2025).

A latent is turned into a pyramid of scales, 1x1 to full size. A block-causal transformer reads the coarser scales
and gives a condition z for every token of the next one; the flow head turns noise into that scale's tokens.

    training    pyramid -> condition (teacher forced) -> flow head's velocity error, summed over scales
    sampling    for each scale: condition (cached keys and values) -> Euler -> input of the next scale

What may be changed where: the noise path, solver and guidance in flow_matching.py, the velocity network in
flow_head.py, the sizes in MODELS at the end of this file.
"""
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend

from models import flow_matching as fm
from models.errors import FlowARError
from models.flow_head import FlowHead, per_token
from models.layers import GatedMLP, KVCache, Linear, RMSNorm, SelfAttention, modulate, run_block, spans


MOST_TOKENS = 32768  # of all scales together; 512 pixels have 1,365


class CausalBlock(nn.Module):
    """Transformer block modulated by the class embedding c (B, cond_dim)."""

    def __init__(self, dim, num_heads, cond_dim, mlp_ratio, attn_dropout, proj_dropout):
        super().__init__()
        self.attn = SelfAttention(dim, num_heads, True, attn_dropout, proj_dropout, causal=True)
        self.mlp = GatedMLP(dim, mlp_ratio, proj_dropout)
        self.ada_lin = nn.Sequential(nn.SiLU(), Linear(cond_dim, 6 * dim))

    def forward(self, x, c, rope_table, scales=None, cache=None):
        gate1, gate2, scale1, scale2, shift1, shift2 = self.ada_lin(c)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(x, scale1, shift1), rope_table, scales, cache)
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

    Raises FlowARError for a geometry that cannot work.
    """

    def __init__(self, img_size=256, vae_stride=16, patch_size=1, vae_embed_dim=16, scale=(1, 2, 4, 8, 16),
                 class_num=1000, encoder_embed_dim=1024, encoder_depth=8, encoder_num_heads=16,
                 decoder_embed_dim=1024, decoder_depth=8, decoder_num_heads=16, mlp_ratio=4.0,
                 label_drop_prob=0.1, attn_dropout=0.0, proj_dropout=0.0, diffloss_d=3, diffloss_w=1024,
                 cross=False, buffer_size=0, use_checkpoint=False):
        super().__init__()
        check_geometry(img_size, vae_stride, patch_size, scale)
        check_heads("encoder", encoder_embed_dim, encoder_num_heads)
        check_heads("decoder", decoder_embed_dim, decoder_num_heads)
        if encoder_embed_dim // encoder_num_heads != decoder_embed_dim // decoder_num_heads:
            raise FlowARError(
                f"encoder and decoder heads are {encoder_embed_dim // encoder_num_heads} and "
                f"{decoder_embed_dim // decoder_num_heads} wide: expected one head size for both")
        if buffer_size != 0:
            raise FlowARError(f"buffer_size is {buffer_size}: only 0 is supported (the class embedding is the one "
                              "token before the scales)")
        if class_num < 1:
            raise FlowARError(f"class_num is {class_num}: expected at least 1")
        self.img_size, self.vae_stride, self.patch_size = img_size, vae_stride, patch_size
        self.vae_embed_dim = vae_embed_dim
        self.scale = tuple(scale)
        self.class_num = class_num
        self.label_drop_prob = label_drop_prob
        self.use_checkpoint = use_checkpoint
        self.token_channels = vae_embed_dim * patch_size ** 2

        self.spans = spans(self.scale)
        self.tokens = tokens = self.spans[-1].stop

        self.class_emb = nn.Embedding(class_num + 1, encoder_embed_dim)
        self.z_proj = Linear(self.token_channels, encoder_embed_dim)
        self.z_proj_ln = RMSNorm(encoder_embed_dim)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, tokens, encoder_embed_dim))
        self.encoder_blocks = nn.ModuleList([
            CausalBlock(encoder_embed_dim, encoder_num_heads, encoder_embed_dim, mlp_ratio, attn_dropout, proj_dropout)
            for _ in range(encoder_depth)])
        self.encoder_norm = RMSNorm(encoder_embed_dim)
        self.decoder_embed = Linear(encoder_embed_dim, decoder_embed_dim)
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, tokens, decoder_embed_dim))
        self.decoder_blocks = nn.ModuleList([
            CausalBlock(decoder_embed_dim, decoder_num_heads, encoder_embed_dim, mlp_ratio, attn_dropout, proj_dropout)
            for _ in range(decoder_depth)])
        self.decoder_norm = RMSNorm(decoder_embed_dim)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, tokens, decoder_embed_dim))
        self.flownet = FlowHead(self.token_channels, decoder_embed_dim, diffloss_d, diffloss_w, mlp_ratio, cross,
                                use_checkpoint)
        self.register_buffer("mask", block_causal_mask(self.scale).to(self.class_emb.weight.device))
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

    # ---- speed ----------------------------------------------------------------------------------------------

    def for_sampling(self, dtype=None):
        """Make this model one that only samples, in place: what autocast to `dtype` and the padding of narrow layers would
        do to the weights at every call is done to them once. The results are the same; the weights are no longer to be
        trained or saved.
        """
        self.eval().requires_grad_(False)
        for module in self.modules():
            if isinstance(module, GatedMLP):
                module.widen()
        for module in self.modules():
            if isinstance(module, nn.Linear) and dtype is not None:
                module.to(dtype)
        return self

    def compile_blocks(self):
        """torch.compile of every block for training: one graph a kind of block, however many there are."""
        for block in (*self.blocks, *self.flownet.res_blocks):
            block.compile()

    def compile_sampler(self, what="blocks"):
        """torch.compile of the flow head's steps in sampling: of its blocks, once for all scales and batch sizes, or with
        "graphs" of the whole head with CUDA graphs, which a device needs that small batches cannot keep busy.
        """
        if what == "graphs":
            self.flownet.velocity = torch.compile(self.flownet.velocity, dynamic=True, mode="reduce-overhead")
        else:
            for block in self.flownet.res_blocks:
                block.step = torch.compile(block.step, dynamic=True)

    def attention_kernel(self, dtype=None):
        """Name of the kernel that attention over the finest scale runs with: torch.nn.attention.SDPBackend."""
        attention, like = self.blocks[0].attn, self.class_emb.weight
        tokens = self.scale[-1] ** 2
        q = torch.empty(1, attention.num_heads, tokens, 4 * len(attention.rope.freqs), device=like.device, dtype=dtype or like.dtype)
        dropout = attention.attn_dropout if self.training else 0.0
        return SDPBackend(torch._fused_sdp_choice(q, q, q, dropout_p=dropout)).name

    # ---- the pyramid ----------------------------------------------------------------------------------------

    def patchify(self, latents):
        """(B, C, H, W) -> (B, token_channels, H / patch_size, W / patch_size)."""
        side = self.scale[-1] * self.patch_size
        expected = (self.vae_embed_dim, side, side)
        if latents.ndim != 4 or tuple(latents.shape[1:]) != expected:
            raise FlowARError(f"latents are {tuple(latents.shape)}: expected (batch, {', '.join(map(str, expected))})")
        return F.pixel_unshuffle(latents, self.patch_size)

    def unpatchify(self, grid):
        """The inverse of patchify."""
        return F.pixel_shuffle(grid, self.patch_size)

    def pyramid(self, latents):
        """The latent at every scale by area interpolation: a list of (B, token_channels, s, s), coarse to fine."""
        grid = self.patchify(latents)
        return [grid if s == self.scale[-1] else F.interpolate(grid, size=(s, s), mode="area") for s in self.scale]

    def next_input(self, grid, k):
        """Input grid of scale k + 1 from scale k's latent: bicubic to full size, then area down."""
        full, s = self.scale[-1], self.scale[k + 1]
        grid = F.interpolate(grid, size=(full, full), mode="bicubic", align_corners=False)
        return grid if s == full else F.interpolate(grid, size=(s, s), mode="area")

    # ---- the scale-wise transformer -------------------------------------------------------------------------

    @property
    def blocks(self):
        """The blocks of both halves of the transformer."""
        return (*self.encoder_blocks, *self.decoder_blocks)

    def _transformer(self, tokens, c, span, rope_table, scales=None, caches=None):
        """Condition z of the tokens (B, N, D) in `span`, given the class embedding c (B, D).

        Either the tokens of several `scales` at once, or those of the scale that follows what is in `caches`.
        """
        caches = iter(caches or [None] * len(self.blocks))

        def run(block, x):
            return run_block(block, self.use_checkpoint, x, c, rope_table, scales, next(caches))

        x = self.z_proj_ln(tokens + self.encoder_pos_embed_learned[:, span])
        for block in self.encoder_blocks:
            x = run(block, x)
        x = self.decoder_embed(self.encoder_norm(x)) + self.decoder_pos_embed_learned[:, span]
        for block in self.decoder_blocks:
            x = run(block, x)
        return self.decoder_norm(x) + self.diffusion_pos_embed_learned[:, span]

    def rope_table(self, scales):
        return self.encoder_blocks[0].attn.rope.table(scales)

    def _condition(self, grids, labels):
        c = self.class_emb(labels)
        inputs = [self.next_input(grid, k) for k, grid in enumerate(grids[:-1])]
        tokens = [c[:, None]]
        if inputs:
            tokens.append(self.z_proj(torch.cat([to_tokens(grid) for grid in inputs], dim=1)))
        return self._transformer(torch.cat(tokens, dim=1), c, slice(None), self.rope_table(self.scale), self.scale)

    def condition(self, latents, labels):
        """Teacher-forced condition z, (B, tokens, D), of latents (B, C, H, W) and labels (B,).

        A label may be class_num, the null class.
        """
        self._check_labels(labels, self.class_num + 1)
        return self._condition(self.pyramid(latents), labels)

    # ---- training -------------------------------------------------------------------------------------------

    def scale_losses(self, latents, labels, *, t=None, noise=None, drop=None):
        """Mean squared velocity error of every scale and image, (scales, B), unweighted.

        Args:
            latents: (B, C, H, W), scaled; labels: (B,) in 0..class_num - 1.
            t: (scales, B) times in [0, 1], drawn uniformly if None.
            noise: list of (B, s*s, token_channels), coarse to fine, drawn if None.
            drop: (B,) bool, labels to replace by the null class; if None drawn with label_drop_prob in training
                mode, and none in eval mode.
        """
        self._check_labels(labels, self.class_num, wait=False)
        if drop is None and self.training:
            drop = torch.rand(len(labels), device=labels.device) < self.label_drop_prob
        if drop is not None:
            labels = torch.where(drop, self.class_num, labels)
        grids = self.pyramid(latents)
        z = self._condition(grids, labels)
        targets = [to_tokens(grid) for grid in grids]
        if noise is None:
            noise = [torch.randn_like(x) for x in targets]
        if t is None:
            t = torch.rand(len(self.scale), len(labels), device=latents.device)
        x, noise = torch.cat(targets, dim=1), torch.cat(noise, dim=1)
        velocity = self.flownet.all_scales(fm.interpolate(x, noise, per_token(t.T[..., None], self.scale)), t, z, self.scale)
        error = (velocity - fm.velocity_target(x, noise).float()).square().mean(dim=2)
        return torch.stack([error[:, span].mean(dim=1) for span in self.spans])

    def scale_weights(self, device=None):
        """Factor s^2 / S^2 of every scale in the loss, (scales,)."""
        return torch.tensor([s * s / self.scale[-1] ** 2 for s in self.scale], device=device)

    def forward(self, latents, labels, *, t=None, noise=None, drop=None, return_scales=False):
        """Training loss, a scalar: the sum over scales of the batch mean of scale_losses times s^2 / S^2.

        With return_scales also the batch mean of every scale, (scales,), unweighted and detached.
        """
        per_scale = self.scale_losses(latents, labels, t=t, noise=noise, drop=drop).mean(dim=1)
        loss = sum(loss * (s / self.scale[-1]) ** 2 for loss, s in zip(per_scale, self.scale))
        return (loss, per_scale.detach()) if return_scales else loss

    # ---- sampling -------------------------------------------------------------------------------------------

    def sample_tokens(self, labels, **options):
        """Latents (B, C, H, W), still scaled, of the given labels (B,). Options: see sample_pyramid."""
        return self.unpatchify(self.sample_pyramid(labels, **options)[-1])

    @torch.no_grad()
    def sample_pyramid(self, labels, *, num_steps=25, cfg=1.0, guidance=0.9, num_steps_last=None,
                       cfg_schedule="linear", temperature=1.0, solver="euler", noise=None, generator=None,
                       calls=None):
        """Generate every scale: a list of (B, token_channels, s, s), coarse to fine.

        Args:
            labels: (B,) in 0..class_num - 1.
            num_steps: length of the time grid; see flow_matching.time_grid (25 makes 24 Euler steps).
            num_steps_last: anneal the steps from num_steps at the first scale to this at the last.
            cfg: guidance scale of the last scale; 1 is no guidance. cfg_schedule: "linear" ramp or "constant".
            guidance: guidance acts only where t <= guidance.
            temperature: factor of the starting noise.
            solver: one of flow_matching.SOLVERS: "euler" (the release's), "heun", "ab2".
            noise: list of (B, s*s, token_channels), coarse to fine; drawn with `generator` if None.
            calls: if given, a list that gets a list for every scale: the number of images in each call of the flow
                head, 2 B where guidance acts and B elsewhere. Its length is the scale's NFE.

        Dropout is off whatever the module's mode.
        """
        self._check_labels(labels, self.class_num)
        if solver not in fm.SOLVERS:
            raise FlowARError(f"solver is {solver!r}: expected one of {', '.join(fm.SOLVERS)}")
        steps = fm.annealed_steps(num_steps, num_steps_last, len(self.scale))
        weights = fm.guidance_scales(cfg, len(self.scale), cfg_schedule)
        grids = [fm.time_grid(n) for n in steps]
        noise = self._starting_noise(len(labels), noise, generator)
        guided = max(weights) > 1
        training = self.training
        self.eval()
        try:
            return self._sample(labels, noise, grids, weights, guidance, temperature, guided, solver, calls)
        finally:
            self.train(training)

    def _sample(self, labels, noise, grids, weights, guidance, temperature, guided, solver, calls):
        batch = len(labels)
        if guided:  # the null branch follows the class branch's latents with a cache of its own
            labels = torch.cat((labels, torch.full_like(labels, self.class_num)))
        c = self.class_emb(labels)
        caches = [KVCache(self.tokens) for _ in self.blocks]
        rope_table = self.rope_table(self.scale)
        tokens, latents = c[:, None], []
        for k, s in enumerate(self.scale):
            z = self._transformer(tokens, c, self.spans[k], tuple(part[self.spans[k]] for part in rope_table),
                                  caches=caches)
            velocity = self._velocity(z, batch, grids[k], s, weights[k], guidance, calls)
            x = fm.SOLVERS[solver](velocity, noise[k] * temperature, grids[k])
            latents.append(to_grid(x.to(c.dtype), s))
            if k + 1 < len(self.scale):
                tokens = self.z_proj(to_tokens(self.next_input(latents[k], k)))
                tokens = tokens.repeat(2, 1, 1) if guided else tokens
        return latents

    def _velocity(self, z, batch, grid, s, weight, guidance, calls):
        """velocity(x, t) of one scale for the solver, at the times of `grid`; z: of `batch` images, then of their null branch."""
        number = {t: i for i, t in enumerate(grid.tolist())}
        if weight <= 1:
            z = z[:batch]
        both = self.flownet.prepare(z, grid.to(z.device, torch.float32), self.flownet.rope_table([s]))

        def network(x, t, prepared):
            step = torch.full((1,), number[t], device=x.device)  # on the device: another number is no other graph
            return self.flownet.velocity(x.to(self.class_emb.weight.dtype), step, prepared)

        if calls is not None:
            calls.append([])
            network = fm.counted(network, calls[-1])
        return fm.guided_velocity(network, both.first(batch), both if weight > 1 else None, weight, guidance)

    def _starting_noise(self, batch, noise, generator):
        shapes = [(batch, s * s, self.token_channels) for s in self.scale]
        weight = self.class_emb.weight
        if noise is None:
            device = weight.device if generator is None else generator.device
            noise = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
        found = [tuple(e.shape) for e in noise]
        if found != shapes:
            raise FlowARError(f"noise has shapes {found}: expected {shapes}")
        return [e.to(weight.device) for e in noise]

    def _check_labels(self, labels, limit, wait=True):
        """Refuse labels outside 0..limit - 1; with wait=False on an accelerator by an assertion that does not synchronise."""
        if labels.is_meta:
            return
        valid = ((labels >= 0) & (labels < limit)).all()
        if not wait and labels.device.type != "cpu":
            torch._assert_async(valid)
        elif not valid:
            bad = labels[(labels < 0) | (labels >= limit)][0].item()
            raise FlowARError(f"label {bad} is outside 0..{limit - 1}")


def to_tokens(grid):
    """(B, C, s, s) -> (B, s*s, C), row-major."""
    return grid.flatten(2).transpose(1, 2)


def to_grid(tokens, s):
    """(B, s*s, C) -> (B, C, s, s)."""
    return tokens.transpose(1, 2).unflatten(2, (s, s))


def block_causal_mask(scale):
    """(1, 1, N, N) float32: 0 where a token sees (its own scale and all coarser ones), -inf where it does not."""
    level = torch.cat([torch.full((s * s,), k, device="cpu") for k, s in enumerate(scale)])
    hidden = level[:, None] < level[None]
    return torch.zeros(hidden.shape, device="cpu").masked_fill(hidden, float("-inf"))[None, None]


def check_geometry(img_size, vae_stride, patch_size, scale):
    """Raise FlowARError unless the scales fit the latent: increasing, from 1 to img_size / vae_stride / patch_size."""
    if patch_size < 1 or vae_stride < 1 or img_size % (vae_stride * patch_size):
        raise FlowARError(f"img_size {img_size} is not a multiple of vae_stride x patch_size = "
                          f"{vae_stride} x {patch_size}")
    side = img_size // (vae_stride * patch_size)
    text = ",".join(map(str, scale))
    if not scale or scale[0] != 1 or any(a >= b for a, b in zip(scale, scale[1:])):
        raise FlowARError(f"scale is {text or 'empty'}: expected an increasing list that starts with 1, the class token")
    if scale[-1] != side:
        raise FlowARError(f"scale ends with {scale[-1]}: expected {side}, the latent's size in tokens (img_size "
                          f"{img_size} / vae_stride {vae_stride} / patch_size {patch_size})")
    if sum(s * s for s in scale) > MOST_TOKENS:
        raise FlowARError(f"scale {text} makes {sum(s * s for s in scale)} tokens: expected at most {MOST_TOKENS}, whose mask takes 4 GiB")


def check_heads(name, dim, num_heads):
    if num_heads < 1 or dim % num_heads or dim // num_heads % 4:
        raise FlowARError(f"{name}_num_heads is {num_heads}: expected a divisor of {name}_embed_dim = {dim} that "
                          "leaves a head size divisible by 4 (2-D RoPE)")


def _size(dim, depth, heads, diffloss_d, diffloss_w, cross=False):
    return dict(encoder_embed_dim=dim, encoder_depth=depth, encoder_num_heads=heads, decoder_embed_dim=dim,
                decoder_depth=depth, decoder_num_heads=heads, diffloss_d=diffloss_d, diffloss_w=diffloss_w, cross=cross)


MODELS = {
    #                    D  depth of a half  heads  flow depth x width
    "flowar_tiny": _size(128, 1, 4, 3, 128),  # 1.6 M, for demonstrations and tests
    "flowar_small": _size(768, 6, 12, 2, 1024),  # 172 M parameters, FID 3.61 (paper)
    "flowar_base": _size(768, 8, 12, 6, 1024),  # about 290 M, FID 2.90 (paper; never released)
    "flowar_large": _size(1024, 8, 16, 12, 1024, cross=True),  # 587 M, FID 1.90 (paper)
    "flowar_huge": _size(1536, 15, 16, 12, 1536, cross=True),  # 1.91 B, FID 1.65 (paper)
}


def build_model(name, **overrides):
    """A FlowAR of the registry's size `name`; overrides are FlowAR's arguments, None meaning the size's own."""
    if name not in MODELS:
        raise FlowARError(f"model {name!r} is unknown: expected one of {', '.join(MODELS)}")
    return FlowAR(**{**MODELS[name], **{key: value for key, value in overrides.items() if value is not None}})
