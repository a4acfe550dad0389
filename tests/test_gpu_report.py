"""scripts/gpu_report.py, rehearsed without a GPU."""
import json
import sys

import pytest
import torch
from helpers import GEOMETRY, call

from scripts import benchmark, gpu_report  # as call() imports them
from scripts.gpu_report import Stage

SMALL = f"{GEOMETRY} --vae_ch 16 --vae_ch_mult 1,1,2 --feature_extractor efficientnet-lite0"


def rehearsal(folder):
    return f"scripts/gpu_report.py --device cpu --sizes flowar_tiny --batches 2 --minutes 5 --store {folder}/store --output {folder}/out"


def stages():
    """One that works, one that fails, one that does not end; one that was done before, see figures()."""
    bench = f"scripts/benchmark.py memory {SMALL} --batch_size 2 --precision fp32 --device cpu"
    return [Stage("memory tiny", [sys.executable, *bench.split()], 120),
            Stage("broken", [sys.executable, "-c", "raise SystemExit('the kernel is missing')"], 60),
            Stage("endless", [sys.executable, "-c", "import time; print('waiting', flush=True); time.sleep(99)"], 3),
            Stage("sample tiny", ["sample"], 60)]


def figures():
    """Of `sample`, which takes its time for a large matrix product: 4 images/s, of 2 GFLOP, beside a product of 100 GFLOP/s."""
    return {"what": "sample", "eval_bsz": 2, "images_per_second": 4.0, "gigaflop_per_image": 2.0, "matmul_gigaflops": 100.0,
            "share_of_peak": 0.08, "ratio": 1.25, "memory_gib": 3.5, "work": {"fast": {"operations": 1234, "gigabytes": 0.5, "kernels": 777}}}


def test_a_report_and_the_same_command_again(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_report, "plan", lambda args, device: (stages(), ["what needs two GPUs"]))
    done = {"name": "sample tiny", "command": ["sample"], "code": gpu_report.code_version(), "status": "ok", "seconds": 7.0, "last_lines": [],
            "figures": figures()}
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "sample-tiny.json").write_text(json.dumps(done))
    call(monkeypatch, rehearsal(tmp_path))
    text, found = (tmp_path / "out" / "cpu.md").read_text(), json.loads((tmp_path / "out" / "cpu.json").read_text())
    assert "| sample tiny | 250.00 | 20.00 | 12.5 |  | 8 % | 1.25 | 777 | 3.5 |" in text
    measured = found["stages"]["memory tiny"]["figures"]
    assert measured["batch_size"] == 2 and f"| memory tiny | {measured['fixed_gib']:.1f} |" in text
    assert "| broken | failed with status 1 |" in text and "the kernel is missing" in text
    assert "| endless | failed: not done after 3 s |" in text
    assert "Left out: what needs two GPUs." in text and torch.__version__ in text and found["commit"] in text
    assert found["not_run"] == []

    monkeypatch.setattr(gpu_report, "run_stage", lambda *_: pytest.fail("what is done is not run again"))
    call(monkeypatch, rehearsal(tmp_path))
    assert (tmp_path / "out" / "cpu.md").read_text() == text

    (tmp_path / "store" / "broken.json").write_text("[1, 2")
    with pytest.raises(pytest.fail.Exception):
        call(monkeypatch, rehearsal(tmp_path))
    monkeypatch.setattr(gpu_report, "code_version", lambda: "another commit")
    with pytest.raises(pytest.fail.Exception):
        call(monkeypatch, rehearsal(tmp_path))


def test_what_does_not_fit_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_report, "run_stage", lambda *_: pytest.fail("there is no time"))
    assert gpu_report.run_stages(stages(), tmp_path, minutes=0) == {}
    monkeypatch.setattr(sys, "argv", rehearsal(tmp_path).split())
    (tmp_path / "out").mkdir()
    path = gpu_report.write_report(gpu_report.parse_args(), torch.device("cpu"), stages(), [], {})
    assert "| broken | not run: no time was left |" in path.read_text()
    assert len(json.loads(path.with_suffix(".json").read_text())["not_run"]) == 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_stages_are_commands_that_benchmark_takes(monkeypatch, device, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--checks", "checks.py", "--beside", "plain.py"])
    planned, left_out = gpu_report.plan(gpu_report.parse_args(), torch.device(device))
    assert (planned[0].name == "checks" and "checks.py" in planned[0].command) == (device == "cuda") and len({stage.name for stage in planned}) == len(planned)
    assert any("two GPUs" in line for line in left_out)
    for stage in planned[device == "cuda":]:
        monkeypatch.setattr(sys, "argv", stage.command[1:])
        args = benchmark.parse_args()
        assert args.device == device and (device == "cuda" or args.compile is None)
    assert {"train", "sample", "vae", "features", "evaluate", "memory"} <= {stage.command[2] for stage in planned[device == "cuda":]}
