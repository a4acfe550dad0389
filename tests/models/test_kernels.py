"""What makes it fast changes nothing: against the plain way, padded, compiled, recomputed, prepared for sampling."""
import copy
from types import SimpleNamespace

from scripts import flops
import golden
import plain
import pytest
import torch
from helpers import inputs, small_model
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from models import build_model
from models import kernels
from models.layers import GatedMLP
from models.patterns import Pattern, within_scales
from util.speed import prepare
from util.training.optimization import build_optimizer


aten = torch.ops.aten
CPU_ATTENTION = {  # PyTorch before 2.15 does not count it
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *args, **kwargs: sdpa_backward_flop_count(grad, q, k, v)}


def compiled(function):
    return torch.compile(function, backend="aot_eager")


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(found, expected):
    for name, gradient in expected.items():
        golden.assert_close(found[name], gradient, tolerance=1e-4)


@pytest.mark.parametrize("options", [{}, dict(cross=True), dict(scale=(1, 4)), dict(scale=(1, 2, 4, 8), img_size=32)])
def test_one_pass_of_all_scales_equals_one_pass_a_scale(options):
    model = small_model(**options)
    latents, labels, t, noise = inputs(model, batch=3)
    expected, per_scale = plain.loss(model, latents, labels, t, noise)
    golden.assert_close(model.scale_losses(latents, labels, t=t, noise=noise), per_scale.detach())
    loss = model(latents, labels, t=t, noise=noise)
    golden.assert_close(loss, expected.detach())
    assert_same_gradients(gradients(model, loss), gradients(model, expected))


@pytest.mark.parametrize("coarse,merged", [(0, [3, 3, 3, 3]), (5, [2, 2, 2, 3]), (14, [1, 1, 1, 1])])
def test_attention_equals_a_mask_over_all_scales(coarse, merged, monkeypatch):
    """However many of the coarse scales are one call, and where one that sees a part of them keeps them apart."""
    monkeypatch.setattr(kernels, "COARSE", coarse)
    q, k, v = torch.randn(3, 2, 4, 14, 8).unbind(0)
    sizes = (1, 4, 9)
    every = ((0,), (0, 1), (0, 1, 2)), ((0,), (1,), (2,)), ((0,), (0,), (0, 1, 2)), ((0,), (0, 1), (0, 2))
    for sees, calls in zip(every, merged):
        pattern = Pattern(sizes, sees)
        assert len(kernels.merge_coarse(pattern).sizes) == calls
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, pattern.mask())
        masked = kernels.with_coarse_mask(pattern, q)
        golden.assert_close(kernels.attention(q, k, v, masked), dense.transpose(1, 2).flatten(2))
        last = torch.nn.functional.scaled_dot_product_attention(q[:, :, 5:], k, v, pattern.mask()[5:])  # as in sampling
        golden.assert_close(kernels.attention(q[:, :, 5:], k, v, pattern.at(2)), last.transpose(1, 2).flatten(2))
    assert within_scales((1, 2, 3)) == Pattern(sizes, ((0,), (1,), (2,)))


@pytest.mark.parametrize("wrap", [lambda function: function, compiled])
def test_attention_with_a_mask_drops(wrap):
    """With values of 1 an output is what is kept of a row's probabilities, times 1 / (1 - p): 1 on average."""
    q, k = torch.randn(2, 64, 4, 21, 8).unbind(0)
    pattern = kernels.with_coarse_mask(Pattern((1, 4, 16), ((0,), (0, 1), (0, 1, 2))), q)
    y = wrap(kernels.attention)(q, k, torch.ones_like(k), pattern, 0.5)
    assert set(y[:, 0].unique().tolist()) == {0.0, 2.0} and y.mean().item() == pytest.approx(1, abs=0.02)


# ---- dropout ---------------------------------------------------------------------------------------------------


DROPOUTS = pytest.mark.parametrize("dropout", [kernels.dropout, compiled(kernels.dropout),
                                               compiled(kernels.hashed_dropout)], ids=["eager", "compiled", "hashed"])


@DROPOUTS
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_and_scales_as_many_as_it_says(p, dropout):
    torch.manual_seed(0)
    y = dropout(torch.full((999, 1001), 2.0), p)
    assert (y == 0).double().mean().item() == pytest.approx(p, abs=2e-3)
    assert y.mean().item() == pytest.approx(2.0, rel=3e-3)
    assert y.unique().tolist() == [0.0, pytest.approx(2 / (1 - p))]
    columns, rows = (y == 0).double().mean(dim=0), (y == 0).double().mean(dim=1)  # independent from place to place
    assert columns.std().item() == pytest.approx((p * (1 - p) / 999) ** 0.5, rel=0.1)
    assert rows.std().item() == pytest.approx((p * (1 - p) / 1001) ** 0.5, rel=0.1)


def test_draws_of_different_seeds_and_places_have_nothing_in_common():
    seeds = torch.tensor([1, 1 + 2**32, 1 + 2**61, 3 + 2**40])  # whatever bits differ
    draws = [kernels.dropout_mask(torch.Size((2**20,)), 0.5, seed).double() - 0.5 for seed in seeds]
    pairs = [(a, b) for i, a in enumerate(draws) for b in draws[:i]]
    shifted = [(draws[0][places:], draw[:-places]) for draw in draws for places in (1, 2, 64, 2048)]
    assert max(abs((a * b).mean() * 4 * len(a)**0.5) for a, b in pairs + shifted) < 4.5  # standard deviations


@pytest.mark.parametrize("device", ["cpu", "other"])
def test_rotation_is_the_same_compiled(monkeypatch, device):
    x, table = torch.randn(2, 3, 5, 8), torch.randn(2, 5, 4).unbind(0)
    expected = kernels.rotate(x, table)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    golden.assert_close(kernels.rotate(SimpleNamespace(float=x.float, dtype=x.dtype, device=SimpleNamespace(type=device)), table), expected)


@pytest.mark.parametrize("dropout", [kernels.dropout, kernels.hashed_dropout])
@pytest.mark.parametrize("wrap", [lambda function: function, compiled])
def test_the_gradient_sees_the_dropout_of_the_forward_pass(dropout, wrap):
    def function(x):
        return dropout(x.sin(), 0.3) + dropout(x.sin(), 0.3)  # two calls, two draws

    x = torch.linspace(0.1, 1, 999, requires_grad=True)
    y = wrap(function)(x)
    gradient, = torch.autograd.grad(y.sum(), x)
    golden.assert_close(gradient, x.detach().cos() * (y / x.sin()).detach())
    assert len((y / x.sin()).detach().round(decimals=3).unique()) == 3


# ---- padded matrices -----------------------------------------------------------------------------------------


def test_the_released_width_is_padded_to_a_multiple_of_64():
    mlp = GatedMLP(1024)
    assert mlp.fc1_g.out_features == 2730 and tuple(mlp.fc2.weight.shape) == (1024, 2730)
    x = torch.randn(3, 1024, requires_grad=True)
    expected = plain.mlp(mlp, x)
    golden.assert_close(mlp(x), expected.detach())
    found, wanted = (torch.autograd.grad(y.square().sum(), [x, *mlp.parameters()]) for y in (mlp(x), expected))
    for a, b in zip(found, wanted):
        golden.assert_close(a, b)
    widen(mlp)
    assert mlp.fc1_g.weight.shape == (2752, 1024) and mlp.fc2.weight.shape == (1024, 2752)
    golden.assert_close(mlp(x), expected.detach())


def widen(mlp):
    for layer in (mlp.fc1_g, mlp.fc1_x, mlp.fc2):
        layer.widen()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_padding_stays_zero_under_training(dropout):
    """A layer whose weights are padded themselves learns the same, and its padding stays zero, decay and all."""
    torch.manual_seed(0)
    narrow = GatedMLP(32, dropout=dropout)  # 85 wide
    wide = copy.deepcopy(narrow)
    widen(wide)
    wide.requires_grad_(True)
    assert wide.fc1_g.out_features == 128
    optimizers = [build_optimizer(mlp, 1e-2, 0.1) for mlp in (narrow, wide)]
    for step in range(5):
        x = torch.randn(16, 32)
        for mlp, optimizer in zip((narrow, wide), optimizers):
            torch.manual_seed(step)
            mlp(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for weight, dim in ((wide.fc1_g.weight, 0), (wide.fc1_x.weight, 0), (wide.fc1_g.bias, 0), (wide.fc1_x.bias, 0), (wide.fc2.weight, 1)):
        assert not weight.narrow(dim, 85, 128 - 85).any() and weight.narrow(dim, 0, 85).all()
    if not dropout:
        golden.assert_close(wide.fc2.weight[:, :85], narrow.fc2.weight.detach())


# ---- prepared for sampling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cross,dtype", [(False, None), (True, torch.bfloat16), (True, torch.float16)])
def test_prepared_for_sampling_it_gives_the_same_bits(cross, dtype):
    model = small_model(cross=cross)
    _, labels, _, noise = inputs(model)

    def sample(model):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            return model.sample_tokens(labels, noise=noise, cfg=3.0, num_steps=6)

    prepared = prepare.for_sampling(copy.deepcopy(model), dtype)
    assert torch.equal(sample(prepared), sample(model))
    assert prepared.flownet.res_blocks[0].mlp.fc1_g.out_features % 64 == 0
    assert not any(p.requires_grad for p in prepared.parameters())


def test_guidance_work_runs_only_where_it_acts():
    """Tokens through the flow head's first layer: two branches in the late steps of the finer scales, else one."""
    model = small_model()
    _, labels, _, noise = inputs(model)
    batches = []
    model.flownet.input_proj.register_forward_hook(lambda module, args, output: batches.append((args[0].shape[1], len(args[0]))))
    model.sample_tokens(labels, noise=noise, cfg=3.0, guidance=0.28, num_steps=10)
    assert batches == [(1, 2)] * 10 + ([(4, 2)] * 5 + [(4, 4)] * 5) + ([(16, 2)] * 5 + [(16, 4)] * 5)


def test_what_steps_share_is_computed_once_a_scale():
    model = small_model(cross=True)
    _, labels, _, noise = inputs(model)
    head, block = model.flownet, model.flownet.res_blocks[0]
    calls = {}
    for name, module in (("condition", head.cond_embed), ("time", head.time_embed), ("keys", block.crossattn.kv),
                         ("adaLN of time", block.ada_lin_attn), ("adaLN of tokens", block.ada_lin_mlp)):
        module.register_forward_hook(lambda module, args, output, name=name: calls.setdefault(name, []).append(tuple(output.shape)))
    model.sample_tokens(labels, noise=noise, cfg=3.0, guidance=0.9, num_steps=10)
    assert {name: len(found) for name, found in calls.items()} == {
        "condition": 3, "time": 30, "keys": 3, "adaLN of time": 30, "adaLN of tokens": 30}
    assert set(calls["adaLN of time"]) == {(1, 1, 192)}  # one a step, not one an image or a token


# ---- recomputation -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context")  # of saved_bytes
@pytest.mark.parametrize("cross", [False, True])
def test_recomputing_keeps_gradients_and_attention_outputs(cross):
    model = small_model(cross=cross)
    latents, labels, t, noise = inputs(model)
    expected = gradients(model, model(latents, labels, t=t, noise=noise))
    once = step_flops(model, latents, labels, t, noise)
    held = saved_bytes(model, latents, labels, t, noise)
    model.use_checkpoint = model.flownet.use_checkpoint = True
    assert_same_gradients(gradients(model, model(latents, labels, t=t, noise=noise)), expected)
    again = step_flops(model, latents, labels, t, noise)
    assert again["attention"] == once["attention"] > 0 and again["linear"] > 1.2 * once["linear"]
    assert saved_bytes(model, latents, labels, t, noise) < 0.5 * held


def step_flops(model, latents, labels, t, noise):
    """{attention, linear}: what a training step computes, forward and backward."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        model(latents, labels, t=t, noise=noise).backward()
    total = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in total.items() if "attention" in str(op))
    return {"attention": attention, "linear": sum(total.values()) - attention}


def saved_bytes(model, latents, labels, t, noise):
    """Bytes of activations that the backward pass holds."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(latents, labels, t=t, noise=noise)
    del loss
    return sum(held.values())


# ---- torch.compile -------------------------------------------------------------------------------------------


@pytest.fixture
def graphs():
    """The number of graphs that dynamo has compiled so far."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.fixture
def no_codegen(monkeypatch):
    """torch.compile without a C++ compiler: dynamo and AOTAutograd as ever, their graphs run by PyTorch itself."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, mode=None, **options: real(*args, **options, backend="aot_eager"))


@pytest.mark.parametrize("cross,what", [(True, "blocks"), pytest.param(False, "blocks", marks=pytest.mark.slow),
                                        pytest.param(True, "graphs", marks=pytest.mark.slow)])
def test_sampling_compiles_once_for_all_scales_steps_and_batches(cross, what, graphs, no_codegen):
    model = small_model(cross=cross)
    _, labels, _, noise = inputs(model, batch=3)
    options = dict(cfg=3.0, guidance=0.5, num_steps=2)
    expected = model.sample_tokens(labels, noise=noise, **options)
    prepare.compile_sampling(model, what)
    golden.assert_close(model.sample_tokens(labels, noise=noise, **options), expected)
    first = graphs()
    assert 1 <= first <= 4  # of a block and of the last layer; the 1x1 scale has graphs of its own, views of the doubled batch may
    for batch, num_steps in ((3, 3), (7, 2)):
        _, labels, _, noise = inputs(model, batch=batch)
        model.sample_tokens(labels, noise=noise, cfg=2.0, num_steps=num_steps)
    assert graphs() == first


OLD = pytest.mark.skipif(torch.__version__ < (2, 10), reason="this PyTorch compiles nothing that is recomputed")


@pytest.mark.parametrize("cross,recompute", [(False, False), pytest.param(True, True, marks=[OLD, pytest.mark.slow])])
def test_training_compiles_one_graph_a_kind_of_block(cross, recompute, graphs, no_codegen):
    model = small_model(cross=cross, diffloss_d=2, encoder_depth=2, use_checkpoint=recompute).train()
    latents, labels, t, noise = inputs(model)
    drop = torch.zeros(2, dtype=torch.bool)
    step = lambda: gradients(model, model(latents, labels, t=t, noise=noise, drop=drop))  # noqa: E731
    expected = step()
    prepare.compile_training(model)
    assert_same_gradients(step(), expected)
    assert graphs() == 5  # blocks of transformer and flow head, RMSNorm, time embedding, last layer
    assert list(model.state_dict()) == list(small_model(cross=cross, diffloss_d=2, encoder_depth=2).state_dict())
    step()
    assert graphs() == 5


# ---- counted operations --------------------------------------------------------------------------------------


def counted(function):
    """Operations that PyTorch counts in function() on this device."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        function()
    return counter.get_total_flops()


@pytest.fixture
def unmerged(monkeypatch):
    """Attention computes nothing that a mask hides."""
    monkeypatch.setattr(kernels, "COARSE", 0)


@pytest.mark.parametrize("cross", [False, True])
def test_operations_counted_on_the_meta_device_are_those_of_the_run(cross, unmerged):
    model = small_model(cross=cross, encoder_embed_dim=96, decoder_embed_dim=96, diffloss_w=192)  # nothing padded
    latents, labels, t, noise = inputs(model, batch=3)
    assert counted(lambda: model(latents, labels, t=t, noise=noise)) == flops.training_flops(model)  # 3 images forward: one, 3 passes
    options = dict(cfg=3.0, guidance=0.5, num_steps=4, num_steps_last=2)
    assert counted(lambda: model.sample_tokens(labels, noise=noise, **options)) == 3 * flops.sampling_flops(model, 3, **options)


def test_zeros_of_padding_are_not_counted(unmerged):
    model = build_model("flowar_tiny", img_size=16, vae_stride=4, vae_embed_dim=4, scale=(1, 2, 4))
    hidden, padded, tokens = 341, 384, model.tokens
    latents, labels, t, noise = inputs(model, batch=1)
    extra = tokens * 2 * 3 * 128 * (padded - hidden) * (2 + 3)  # three products of 2 + 3 gated MLPs
    assert counted(lambda: model(latents, labels, t=t, noise=noise)) == flops.training_flops(model) / 3 + extra
