"""scripts/benchmark.py: what a GPU would need, counted; the VAE, and what is used of it."""
import copy
import json

from scripts import flops
import pytest
import torch
from helpers import GEOMETRY, call, small_vae
from scripts.measure import count_work

from util.speed import prepare

SMALL = f"{GEOMETRY} --vae_ch 16 --vae_ch_mult 1,1,2 --device cpu"


def test_an_operation_that_returns_nothing_moves_what_it_writes_too():
    """EMA's lerp reads both and writes one; AdamW reads weight, gradient and two moments, and writes three of them."""
    a, b = [torch.zeros(10)], [torch.ones(10)]
    assert count_work(lambda: torch._foreach_lerp_(a, b, 0.5)) == (1, 3 * 40)
    assert count_work(lambda: torch.add(a[0], b[0])) == (1, 3 * 40)


def test_roofline(monkeypatch, capsys, tmp_path):
    call(monkeypatch, f"scripts/benchmark.py roofline {SMALL} --batch_size 2 --eval_bsz 4 --num_step 3 --cfg 2 --precision bf16 --json {tmp_path}/r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    assert [row["what"] for row in found["rows"]] == ["training step", "sampling", "decoding"]
    for row in found["rows"]:
        assert row["operations"] > 0 and row["teraflop"] >= row["least_teraflop"] > 0 and row["gigabytes"] > row["least_gigabytes"]
        for name, gpu in flops.GPUS.items():
            limits = row["ms_per_image"][name]
            assert limits["eager"] > limits["floor"] > 0
            floor = max(row["least_teraflop"] * 1e12 / gpu.reached, row["least_gigabytes"] * 1e9 / gpu.bandwidth)
            assert limits["floor"] == pytest.approx(1000 * floor / row["images"])
    assert "| flowar_tiny, sampling | 4 |" in capsys.readouterr().out


def test_benchmark_of_the_vae(monkeypatch, capsys, tmp_path):
    call(monkeypatch, f"scripts/benchmark.py vae {SMALL} --batch_size 2 --repeats 1 --json {tmp_path}/v.json")
    rows = json.loads((tmp_path / "v.json").read_text())["rows"]
    assert [row["way"] for row in rows] == 2 * ["contiguous, fp32", "channels_last, fp32", "contiguous, bf16", "channels_last, bf16"]
    assert [row["difference"] < (1e-4 if "fp32" in row["way"] else 0.1) for row in rows] == 8 * [True]
    assert rows[0]["ratio"] == rows[4]["ratio"] == 1


def test_an_evaluation_is_timed_as_it_is_run(monkeypatch, tmp_path):
    prepared = []
    monkeypatch.setattr(prepare, "for_evaluation", lambda models, vae, dtype, what: prepared.append((dtype, what)))
    monkeypatch.setattr(prepare, "compile_features", lambda extractor: prepared.append(extractor.name))
    call(monkeypatch, f"scripts/benchmark.py evaluate {SMALL} --num_images 2 --eval_bsz 2 --num_step 2 --feature_extractor efficientnet-lite0 --precision bf16 "
                      f"--compile --json {tmp_path}/e.json")
    assert prepared == [(torch.bfloat16, "blocks"), "efficientnet-lite0"] and json.loads((tmp_path / "e.json").read_text())["compile"] == "blocks"


def test_ways_of_a_feature_network(monkeypatch, tmp_path):
    monkeypatch.setattr(prepare, "compile_features", lambda extractor: None)
    call(monkeypatch, f"scripts/benchmark.py features {SMALL} --feature_extractor efficientnet-lite0 --batch_size 2 --repeats 1 --compile --json {tmp_path}/f.json")
    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert [row["way"] for row in rows] == ["contiguous", "channels_last", "contiguous, compiled", "channels_last, compiled"]
    assert all(row["what"] == "efficientnet-lite0" and row["difference"] < 1e-5 and row["ms_per_image"] > 0 for row in rows)


@pytest.mark.slow  # code is generated for it
@torch.no_grad()
def test_a_compiled_decoder_and_another_layout_decode_the_same():
    vae = small_vae().eval()
    latents = torch.randn(3, vae.embed_dim, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(latents)
    torch.testing.assert_close(copy.deepcopy(vae).to(memory_format=torch.channels_last).decode(latents), expected, rtol=1e-4, atol=1e-5)
    prepare.for_decoding(vae)
    assert vae.decoder._compiled_call_impl is None
    compiled = copy.deepcopy(vae)
    prepare.for_decoding(compiled, "blocks")
    assert compiled.decoder._compiled_call_impl is not None
    for count in (3, 2):
        torch.testing.assert_close(compiled.decode(latents[:count]), expected[:count], rtol=1e-4, atol=1e-5)
