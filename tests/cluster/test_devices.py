"""Devices and precision on a CPU."""
import pytest
import torch

from models import FlowARError
from util import cluster

CPU = torch.device("cpu")


def test_auto_takes_what_is_there():
    assert cluster.select_device("cpu") == CPU
    assert cluster.select_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(FlowARError, match="--precision tf32"):
        cluster.set_precision("tf32", CPU)


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
