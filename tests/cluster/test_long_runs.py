"""What concerns runs of weeks: garbage is collected at steps of all ranks, and NCCL's flight recorder is set and named."""
import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from helpers import make_project, train

import engine_flowar
from util import cluster
from util.cluster import ending, flight, watch


class Cycle:
    def __init__(self):
        self.me = self


def leave_cycle():
    return weakref.ref(Cycle())


# ---- garbage -----------------------------------------------------------------------------------------------------


def test_cycles_are_collected_where_asked_alone():
    outside, frozen = gc.isenabled(), gc.get_freeze_count()
    with cluster.collect_by_hand():
        assert not gc.isenabled() and gc.get_freeze_count() > 1000
        lost = leave_cycle()
        [[] for _ in range(10**5)]  # many times what would start the automatic one
        assert lost() is not None
        cluster.collect_garbage()
        assert lost() is None
        child = os.fork()
        if child == 0:
            os._exit(0 if gc.isenabled() else 1)
        assert os.waitpid(child, 0)[1] == 0, "a data worker collects by itself"
    assert gc.isenabled() == outside and gc.get_freeze_count() == frozen
    lost = leave_cycle()
    gc.disable()
    try:
        cluster.collect_garbage()
        assert lost() is not None, "outside it is not this program's business"
    finally:
        gc.enable()


def test_the_state_is_restored_after_an_error():
    with pytest.raises(KeyError), cluster.collect_by_hand():
        raise KeyError
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.disable()
    try:
        with cluster.collect_by_hand():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


# ---- the flight recorder -----------------------------------------------------------------------------------------


@pytest.fixture
def clean(monkeypatch):
    monkeypatch.setattr(flight, "_recording", False)
    for name in (*flight.SIZE, *flight.FILE, *flight.ON_TIMEOUT):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


@pytest.mark.parametrize("version,size,file", [
    ("2.14.1", "TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE"), ("2.6.0", "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")])
def test_what_is_set_before_nccl_starts(clean, monkeypatch, tmp_path, version, size, file):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    flight.record_collectives(tmp_path / "run")
    assert os.environ[size] == "2000" and os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert os.environ[file] == f"{tmp_path}/run/nccl_trace_rank_"
    assert sum(name in os.environ for name in (*flight.SIZE, *flight.FILE)) == 2
    assert flight.trace_hint() == f"; what every rank came to last may be in {tmp_path}/run/nccl_trace_rank_<rank>, for torchfrtrace"


def test_what_the_user_set_stays(clean, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "0")
    monkeypatch.setenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "/else/where_")
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    flight.record_collectives(tmp_path)
    assert "TORCH_FR_BUFFER_SIZE" not in os.environ and "TORCH_FR_DUMP_TEMP_FILE" not in os.environ
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0" and flight.setting(flight.FILE) == "/else/where_"
    assert flight.trace_hint() == "", "it records nothing"


def test_this_pytorch_reads_these_names():
    """In the text of its libraries, where it was built for CUDA."""
    if not torch.distributed.is_nccl_available():
        pytest.skip("this PyTorch has no NCCL")
    content = (Path(torch.__file__).parent / "lib" / "libtorch_cpu.so").read_bytes()
    newest = torch.__version__ >= (2, 10)
    for names in (flight.SIZE, flight.FILE):
        assert names[0 if newest else -1].encode() in content


def test_the_line_about_a_lost_rank_names_the_traces(clean, monkeypatch, tmp_path, capsys):
    class Store:
        def get(self, key):
            return b"host-a"

        def compare_set(self, key, before, mine):
            return mine.encode()

    left = []
    monkeypatch.setattr(watch, "leave", left.append)
    monkeypatch.setattr(watch, "_way_on", ("start it again", ""))
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", lambda: b"what it recorded", raising=False)
    alive = watch.Watch(Store(), 0, 2, 5)
    monkeypatch.setattr(ending, "watch", lambda: alive)
    monkeypatch.setattr(alive, "silent_ranks", lambda: ["rank 1 (host host-a)"])
    monkeypatch.setattr(ending.signal, "signal", lambda *_: None)
    alive._end("rank 1 (host host-a) was silent for 5 s")
    assert "or its host or network is down; start it again" in capsys.readouterr().err and not list(tmp_path.iterdir())
    flight.record_collectives(tmp_path)
    alive._end("rank 1 (host host-a) was silent for 5 s")
    hint = f"; what every rank came to last may be in {tmp_path}/nccl_trace_rank_<rank>, for torchfrtrace; start it again"
    assert f"error (rank 0): rank 1 (host host-a) was silent for 5 s: it was killed (for memory?), or its host or network is down{hint}" in (
        capsys.readouterr().err)
    assert (tmp_path / "nccl_trace_rank_0").read_bytes() == b"what it recorded" and left == [watch.LOST] * 2
    message, status = ending.explain(RuntimeError("NCCL error: remote process exited"))
    assert message == f"lost rank 1 (host host-a): NCCL error: remote process exited{hint}" and status == watch.LOST
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", lambda: 1 / 0)
    flight.write_trace(1)  # whatever fails, the program ends with its own line
    assert not (tmp_path / "nccl_trace_rank_1").exists()
