"""Devices and precision on a CPU."""
import io

import pytest
import torch

from models import FlowARError
from util import cluster
from util.cluster import devices

CPU = torch.device("cpu")


def test_auto_takes_what_is_there():
    assert cluster.select_device("cpu") == CPU
    assert cluster.select_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(FlowARError, match="--precision tf32"):
        cluster.set_precision("tf32", CPU)


@pytest.mark.parametrize("says,named", [("GPU 0: Tesla T4 (UUID: GPU-1)", 1), ("Failed to initialize NVML: Driver/library version mismatch", 1),
                                        ("NVIDIA-SMI has failed because it could not communicate with the driver", 1), ("No devices were found", 0)])
def test_a_gpu_that_pytorch_cannot_use_is_named(monkeypatch, tmp_path, capsys, says, named):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{says}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for visible, rank, lines in (("0", "0", named), ("0", "1", 0), ("", "0", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert cluster.select_device("auto") == CPU
        assert capsys.readouterr().err.count(f"warning: nvidia-smi says '{says}', but PyTorch {torch.__version__} (CUDA ") == lines


@pytest.mark.parametrize("visible,index", [(1, 0), (8, 3), (2, 1)])
def test_a_rank_takes_the_gpu_that_it_sees_or_its_own(monkeypatch, visible, index):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert cluster.select_device("cuda") == torch.device("cuda", index)


@pytest.fixture
def matmul_mode():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("asked,resolved,mode", [(None, "fp32", "highest"), ("fp32", "fp32", "highest"), ("bf16", "bf16", "high")])
def test_precision_sets_the_mode_of_products(matmul_mode, asked, resolved, mode):
    assert cluster.set_precision(asked, CPU) == resolved
    assert torch.get_float32_matmul_precision() == mode
    with cluster.exact_products():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == mode


def test_emulated_bf16_is_told(matmul_mode, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, flags, emulated in (((7, 5), "avx512f", True), ((8, 0), "avx512f avx512_bf16", False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(devices, "open", lambda path: io.StringIO(flags), raising=False)
        for device, others in (("cuda", "fp16 or fp32"), ("cpu", "fp32")):
            cluster.set_precision("bf16", torch.device(device))
            assert (f"this {device} emulates bf16, several times slower: use --precision {others}\n" in capsys.readouterr().err) == emulated
