"""FlowAR: names, geometry, causality, caching, guidance, random draws."""
import golden
import plain
import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, inputs, small_model

from models import MODELS, AutoencoderKL, FlowARError, build_model
from models import flow_matching as fm
from models.flowar import to_grid, to_tokens
from models.settings import Sampling
from util.evaluation.sampler import count_passes

PARAMETERS = {"flowar_small": 171_718_072, "flowar_large": 586_862_912, "flowar_huge": 1_913_316_880}


@pytest.mark.parametrize("name", ["flowar_small", "flowar_large", "flowar_huge"])
def test_released_names_and_shapes(name):
    with torch.device("meta"):
        model = build_model(name)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == golden.released_shapes(name)
    # The released counts leave out the two fixed buffers.
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_released_vae_names_and_shapes():
    with torch.device("meta"):
        vae = AutoencoderKL()
    assert {key: list(value.shape) for key, value in vae.state_dict().items()} == golden.released_shapes("kl16")


def test_sizes_of_the_registry():
    assert list(MODELS) == ["flowar_tiny", "flowar_small", "flowar_base", "flowar_large", "flowar_huge"]
    with torch.device("meta"):
        base = build_model("flowar_base")
        tiny = build_model("flowar_tiny")
    assert 280e6 < sum(p.numel() for p in base.parameters()) < 310e6
    assert sum(p.numel() for p in tiny.parameters()) < 5e6


def test_buffers():
    model = small_model()
    level = torch.tensor([0] + [1] * 4 + [2] * 16)
    expected = torch.where(level[:, None] < level[None], -torch.inf, 0.0)
    assert model.mask.dtype == torch.float32 and torch.equal(model.mask[0, 0], expected)
    freqs = model.flownet.res_blocks[0].attn.rope.freqs
    assert freqs.dtype == torch.float32
    torch.testing.assert_close(freqs, torch.tensor([10000 ** (-2 * j / 32) for j in range(16)]))


@pytest.mark.parametrize("options,tokens", [
    (dict(img_size=32, scale=(1, 2, 4, 8)), 85),
    (dict(scale=(1, 4)), 17),
    (dict(img_size=32, patch_size=2), 21),
    (dict(vae_embed_dim=3, class_num=7), 21),
    (dict(decoder_embed_dim=64, decoder_num_heads=4), 21),
    (dict(cross=True), 21),
])
def test_geometry_reaches_everywhere(options, tokens):
    model = small_model(**options)
    latents, labels, t, noise = inputs(model)
    assert model.condition(latents, labels).shape[1] == tokens
    assert model.scale_losses(latents, labels, t=t, noise=noise).shape == (len(model.scale), 2)
    model(latents, labels).backward()
    assert all(p.grad is not None for p in model.parameters())  # DDP needs every parameter used
    assert model.sample_tokens(labels, num_steps=4, cfg=2.0).shape == latents.shape


def test_512_pixels():
    with torch.device("meta"):
        model = build_model("flowar_large", img_size=512, scale=(1, 2, 4, 8, 16, 32))
    assert model.mask.shape[-1] == 1365
    torch.testing.assert_close(torch.tensor(model.scale_weights()), torch.tensor([s * s / 1024 for s in (1, 2, 4, 8, 16, 32)]))


def test_patchify_inverts():
    model = small_model(img_size=32, patch_size=2)
    latents = inputs(model)[0]
    assert torch.equal(model.unpatchify(model.patchify(latents)), latents)


@pytest.mark.parametrize("options,message", [
    (dict(scale=(1, 2, 8)), "scale ends with 8: expected 4"),
    (dict(img_size=18), "img_size 18 is not a multiple"),
    (dict(diffloss_w=100), "diffloss_w is 100"),
])
def test_what_cannot_work_is_refused_by_name(options, message):
    with pytest.raises(FlowARError, match=message):
        small_model(**options)


@pytest.mark.parametrize("labels", [[0, 10], [-1, 3]])
def test_labels_outside_are_refused(labels):
    model = small_model()
    latents, _, _, _ = inputs(model)
    labels = torch.tensor(labels)
    for call in (lambda: model(latents, labels), lambda: model.sample_tokens(labels, num_steps=2)):
        with pytest.raises(FlowARError, match=r"label (10|-1) is outside 0..9"):
            call()


def test_wrong_latents_and_noise_are_refused():
    model = small_model()
    latents, labels, _, noise = inputs(model)
    with pytest.raises(FlowARError, match=r"latents has shapes \[\(2, 4, 4, 3\)\]"):
        model(latents[..., :3], labels)
    with pytest.raises(FlowARError, match="noise has shapes"):
        model.sample_tokens(labels, num_steps=2, noise=noise[1:])


def test_causality():
    """Changing a fine scale never changes a coarser scale's condition, nor its own."""
    model = small_model()
    latents, labels, _, _ = inputs(model)
    grids = model.pyramid(latents)
    before = model.condition_on(grids, labels)
    for k in range(len(grids)):
        changed = [grid + (i >= k) * torch.randn_like(grid) for i, grid in enumerate(grids)]
        after = model.condition_on(changed, labels)
        end = model.spans[k].stop
        assert torch.equal(after[:, :end], before[:, :end])
        if k + 1 < len(grids):
            assert not torch.allclose(after[:, end:], before[:, end:])


def test_condition_depends_on_class_and_coarse_scales():
    model = small_model()
    latents, labels, _, _ = inputs(model)
    z = model.condition(latents, labels)
    assert not torch.allclose(z, model.condition(latents, (labels + 1) % 10))
    assert not torch.allclose(z[:, 1:], model.condition(latents + 1, labels)[:, 1:])
    assert torch.equal(model.condition(latents, torch.tensor([10, 10]))[0, 0], model.condition(latents, torch.tensor([10, 10]))[1, 0])


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("cfg,schedule", [(1.0, "linear"), (3.0, "linear"), (3.0, "constant")])
def test_sampling_equals_the_plain_way(cross, cfg, schedule):
    model = small_model(cross=cross)
    _, labels, _, noise = inputs(model)
    options = dict(cfg=cfg, cfg_schedule=schedule, guidance=0.7, num_steps=10)
    # An untrained network under guidance enlarges what two orders of float32 sums differ by: more on some processors.
    golden.assert_close(model.sample_tokens(labels, noise=noise, **options), plain.sample(model, labels, noise, **options),
                        5 * golden.TOLERANCE)


@torch.no_grad()
def test_the_cache_holds_what_the_whole_sequence_computes():
    """Each scale's condition in sampling is that of teacher forcing on the same latents."""
    model = small_model(cross=True)
    _, labels, _, noise = inputs(model)
    seen = []
    model.decoder_norm.register_forward_hook(lambda module, args, output: seen.append(output))
    pyramid = model.sample_pyramid(labels, noise=noise, num_steps=4)
    golden.assert_close(torch.cat(seen, dim=1) + model.diffusion_pos_embed_learned, model.condition_on(pyramid, labels))


def test_batch_size_invariance():
    model = small_model()
    _, labels, _, noise = inputs(model, batch=4)
    options = dict(cfg=2.0, num_steps=6)
    together = model.sample_tokens(labels, noise=noise, **options)
    alone = torch.cat([model.sample_tokens(labels[i:i + 1], noise=[e[i:i + 1] for e in noise], **options) for i in range(4)])
    golden.assert_close(alone, together)


def test_temperature_scales_the_starting_noise():
    model = small_model()
    _, labels, _, noise = inputs(model)
    golden.assert_close(model.sample_tokens(labels, num_steps=4, noise=noise, temperature=0.5),
                        model.sample_tokens(labels, num_steps=4, noise=[0.5 * e for e in noise]))


def test_dropped_labels_are_the_null_class():
    model = small_model()
    latents, labels, t, noise = inputs(model)
    dropped = model.scale_losses(latents, labels, t=t, noise=noise, drop=torch.tensor([True, False]))
    kept = model.scale_losses(latents, labels, t=t, noise=noise)
    assert torch.equal(dropped[:, 1], kept[:, 1]) and not torch.allclose(dropped[:, 0], kept[:, 0])


def test_eval_mode_teacher_forcing_is_deterministic_and_training_mode_drops():
    model = small_model(attn_dropout=0.2, proj_dropout=0.2, label_drop_prob=0.5)
    latents, labels, t, noise = inputs(model, batch=16)
    losses = lambda: model.scale_losses(latents, labels, t=t, noise=noise)  # noqa: E731
    assert torch.equal(losses(), losses())
    model.train()
    assert not torch.allclose(losses(), losses())
    sample = lambda: model.sample_tokens(labels, num_steps=2, generator=torch.Generator().manual_seed(0))  # noqa: E731
    assert torch.equal(sample(), sample()) and model.training


def test_loss_weights():
    model = small_model()
    latents, labels, t, noise = inputs(model)
    losses = model.scale_losses(latents, labels, t=t, noise=noise).mean(dim=1)
    loss, scales = model(latents, labels, t=t, noise=noise, return_scales=True)
    torch.testing.assert_close(loss, (losses * torch.tensor([1 / 16, 4 / 16, 1])).sum())
    torch.testing.assert_close(scales, losses)


def test_pyramid_is_area_then_bicubic_then_area():
    model = small_model()
    latents = inputs(model)[0]
    grids = model.pyramid(latents)
    torch.testing.assert_close(grids[1], F.avg_pool2d(latents, 2))
    torch.testing.assert_close(grids[0], latents.mean(dim=(2, 3), keepdim=True))
    up = F.interpolate(grids[1], size=(4, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.next_input(grids[1], 1), up)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_residual_stream_in_float32(precision):
    model = small_model()
    latents, labels, t, noise = inputs(model)
    seen = []
    for block in (*model.encoder_blocks, *model.decoder_blocks, *model.flownet.res_blocks):
        block.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    exact = model(latents, labels, t=t, noise=noise)
    with torch.autocast("cpu", precision):
        loss = model(latents, labels, t=t, noise=noise)
    assert set(seen) == {torch.float32}
    golden.assert_close(loss, exact.detach(), tolerance=0.02)


# ---- beyond the release ----------------------------------------------------------------------------------------


def test_autoguidance_is_that_of_a_plain_computation():
    """v_guide + w (v - v_guide), the guide's condition of the latents that the model draws."""
    model, guide = small_model(), small_model(encoder_depth=2, diffloss_d=2)
    _, labels, _, noise = inputs(model)
    options = dict(num_steps=4, cfg=[1.5, 2.0, 3.0], guidance=0.8, guidance_low=0.1, noise=noise)
    drawn = model.sample_pyramid(labels, guide=guide, **options)
    conditions = [network.condition_on(drawn, labels) for network in (model, guide)]
    for k, (span, weight) in enumerate(zip(model.spans, options["cfg"])):
        def velocity(x, t, span=span, weight=weight):
            v, v_guide = (network.flownet(x.float(), torch.full((1,), t), z[:, span]) for network, z in zip((model, guide), conditions))
            return v_guide + weight * (v - v_guide) if 0.1 < t <= 0.8 else v
        expected = fm.euler(velocity, noise[k], fm.time_grid(4)).float()
        torch.testing.assert_close(to_tokens(drawn[k]), expected, atol=1e-4, rtol=1e-4)
    assert count_passes(model, Sampling(num_steps=4, cfg=[1.5, 2.0, 3.0], guidance=0.8, guidance_low=0.1)) == 3 * [[1, 2, 2, 2]]
    own = model.sample_pyramid(labels, guide=small_model(), **options)  # guided by itself
    for found, expected in zip(own, model.sample_pyramid(labels, **{**options, "cfg": 1.0})):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for other in (dict(scale=(1, 4)), dict(class_num=CLASSES + 1)):
        with pytest.raises(FlowARError, match="guide: .* is .*, expected the model's .*: use a checkpoint of the same geometry"):
            model.sample_pyramid(labels, guide=small_model(**other), **options)


def test_lists_for_the_scales_are_the_ramps_written_out():
    model = small_model()
    _, labels, _, noise = inputs(model)
    ramps = model.sample_tokens(labels, num_steps=10, num_steps_last=6, cfg=3.0, noise=noise)
    assert torch.equal(ramps, model.sample_tokens(labels, num_steps=[10, 8, 6], cfg=[1, 2, 3], noise=noise))
    assert not torch.equal(ramps, model.sample_tokens(labels, num_steps=[10, 8, 6], cfg=[1, 2, 3], guidance_low=0.3, noise=noise))


def test_noise_on_what_is_read_changes_the_condition_and_not_the_target():
    model = small_model()
    latents, labels, t, noise = inputs(model)
    added = [0.3 * torch.randn_like(e) for e in noise[:-1]]
    plain, noisy = model.scale_losses(latents, labels, t=t, noise=noise), model.scale_losses(latents, labels, t=t, noise=noise, condition_noise=added)
    assert torch.equal(plain[0], noisy[0]) and (plain[1:] != noisy[1:]).all()
    grids = [x + to_grid(e, s) for x, e, s in zip(model.pyramid(latents), [*added, 0 * noise[-1]], model.scale)]
    assert torch.equal(noisy, model.velocity_errors(model.pyramid(latents), model.condition_on(grids, labels), t, noise))
