"""Building blocks against their formulas: norms, gated MLP, 2-D RoPE, attention patterns, the cache."""
import golden
import plain
import pytest
import torch
import torch.nn.functional as F

from models import layers
from models.kernels import modulate
from models.layers import CrossAttention, GatedMLP, KVCache, RMSNorm, RotaryEmbedding, SelfAttention
from models.patterns import Pattern


def test_rms_norm():
    norm, x = RMSNorm(6), torch.randn(3, 4, 6)
    norm.weight.data.normal_()
    golden.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.detach())
    assert norm(x.bfloat16()).dtype == torch.float32  # a weight of float32 brings it back


def test_modulation_is_one_plus_scale():
    x, scale, shift = torch.randn(3, 2, 4, 6).unbind(0)
    golden.assert_close(modulate(x, scale, shift), F.rms_norm(x, (6,), eps=1e-6) * (1 + scale) + shift)
    assert torch.equal(modulate(x, torch.zeros(1), torch.zeros(1)), F.rms_norm(x, (6,), eps=1e-6))


def test_the_gate_is_exact_gelu_and_the_hidden_width_is_cut():
    mlp, x = GatedMLP(12, mlp_ratio=4.0), torch.randn(5, 12)
    assert mlp.fc1_g.out_features == int(12 * 4 * 2 / 3) == 32
    golden.assert_close(mlp(x), mlp.fc2(F.gelu(mlp.fc1_g(x), approximate="none") * mlp.fc1_x(x)).detach())


def test_rotation_turns_neighbouring_pairs_by_row_and_column():
    """Head size 8: two frequencies; channels 0..3 turn with the row, 4..7 with the column, positions i / s * 16."""
    rope = RotaryEmbedding(8)
    golden.assert_close(rope.freqs, [1.0, 0.01])
    x = torch.ones(1, 1, 4, 8)  # 2x2 tokens
    turned = layers.rotate(x, rope.table((2,)))[0, 0]
    for token, (row, column) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
        angles = torch.tensor([row * 1.0, row * 0.01, column * 1.0, column * 0.01])
        expected = torch.stack((angles.cos() - angles.sin(), angles.cos() + angles.sin()), dim=-1).flatten()
        golden.assert_close(turned[token], expected)


def test_rotated_products_depend_on_the_difference_of_positions_alone():
    table = RotaryEmbedding(16).table((4,))
    q, k = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 1, 16, 16).unbind(0)
    products = (layers.rotate(q, table) @ layers.rotate(k, table).transpose(-2, -1))[0, 0].unflatten(0, (4, 4)).unflatten(2, (4, 4))
    golden.assert_close(products[1, 1, 2, 3], products[0, 0, 1, 2], tolerance=1e-4)
    golden.assert_close(products[3, 2, 1, 0], products[2, 3, 0, 1], tolerance=1e-4)


def test_the_mask_of_a_pattern():
    seen = Pattern((1, 4), ((0,), (0, 1))).mask() == 0
    assert seen.tolist() == [[True] + [False] * 4] + [[True] * 5] * 4
    assert (Pattern((1, 4), ((0,), (0, 1))).at(1).mask() == 0).tolist() == [[True] * 5] * 4


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_self_attention_equals_the_plain_way(dropout):
    attention, x = SelfAttention(16, 2, qkv_bias=True, attn_dropout=dropout, proj_dropout=dropout).eval(), torch.randn(2, 4, 16)
    golden.assert_close(attention(x, attention.rope.table((2,))), plain.attention(attention, x, [2]).detach())
    attention.train()
    assert torch.equal(attention(x, attention.rope.table((2,))), attention(x, attention.rope.table((2,)))) == (dropout == 0)


def test_cross_attention_equals_the_plain_way():
    attention, x, z = CrossAttention(16, 24, 2), torch.randn(2, 4, 16), torch.randn(2, 4, 24)
    table = attention.rope.table((2,))
    found = attention(x, attention.keys_and_values(z, table), table)
    golden.assert_close(found, plain.cross_attention(attention, x, z, [2]).detach())


def test_the_cache_holds_scale_after_scale():
    cache, parts = KVCache(), torch.randn(2, 2, 3, 5, 4)
    for piece in (slice(0, 1), slice(1, 5)):
        k, v = cache.extend(*parts[:, :, :, piece])
        assert torch.equal(k, parts[0, :, :, :piece.stop]) and torch.equal(v, parts[1, :, :, :piece.stop])
