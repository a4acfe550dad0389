"""scripts/benchmark.py: each benchmark, small."""
import copy
import json

import pytest
import torch
from helpers import GEOMETRY, call, small_vae

from util.speed import prepare

SMALL = f"{GEOMETRY} --vae_ch 16 --vae_ch_mult 1,1,2 --device cpu"


def test_an_evaluation_beside_the_releases_way(monkeypatch, tmp_path):
    call(monkeypatch, f"scripts/benchmark.py evaluate {SMALL} --num_images 3 --eval_bsz 2 --num_step 2 --feature_extractor efficientnet-lite0 --json {tmp_path}/e.json")
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["ratio"] == pytest.approx(found["seconds_through_files"] / found["seconds_in_memory"])


def test_training_beside_the_plain_way(monkeypatch, tmp_path):
    monkeypatch.setattr("scripts.benchmark.MATRIX_SIZE", {"cpu": 256})
    for what in ("train --batch_size 2 --attn_dropout 0 --proj_dropout 0", "sample --eval_bsz 2 --num_step 3 --cfg 2"):
        call(monkeypatch, f"scripts/benchmark.py {what} {SMALL} --repeats 1 --beside tests/plain.py --json {tmp_path}/t.json")
        found = json.loads((tmp_path / "t.json").read_text())
        assert found["ratio"] == pytest.approx(found["seconds"]["plain"] / found["seconds"]["fast"])
        assert found["share_of_peak"] == pytest.approx(found["gigaflops"] / found["matmul_gigaflops"])
    assert found["difference"] < 1e-4


@pytest.mark.slow  # code is generated for it
@torch.no_grad()
def test_a_compiled_decoder_and_another_layout_decode_the_same():
    vae = small_vae().eval()
    latents = torch.randn(3, vae.embed_dim, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(latents)
    torch.testing.assert_close(copy.deepcopy(vae).to(memory_format=torch.channels_last).decode(latents), expected, rtol=1e-4, atol=1e-5)
    compiled = copy.deepcopy(vae)
    prepare.compile_decoding(compiled)
    assert compiled.decoder._compiled_call_impl is not None
    for count in (3, 2):
        torch.testing.assert_close(compiled.decode(latents[:count]), expected[:count], rtol=1e-4, atol=1e-5)
