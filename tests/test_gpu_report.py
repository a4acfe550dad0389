"""scripts/gpu_report.py, rehearsed without a GPU."""
import json
import sys

import pytest
import torch
from helpers import GEOMETRY, call

from scripts import benchmark, gpu_report  # as call() imports them
from scripts.gpu_report import Stage

SMALL = f"{GEOMETRY} --vae_ch 16 --vae_ch_mult 1,1,2 --feature_extractor efficientnet-lite0"
SAMPLE = {"what": "sample", "eval_bsz": 2, "images_per_second": 4.0, "gigaflop_per_image": 2.0, "matmul_gigaflops": 100.0, "share_of_peak": 0.08,
          "ratio": 1.25, "memory_gib": 3.5}


def test_a_report_and_the_same_command_again(monkeypatch, tmp_path):
    """Of stages of which one works, one fails, one does not end, and one was done before; then of another torch."""
    about = {"device": "a GPU", "torch": torch.__version__}
    monkeypatch.setattr(gpu_report, "describe_setup", lambda device: about)
    figures = "import json, sys; json.dump({'seconds_per_image': {'sampling': 0.0015}}, open(sys.argv[-1], 'w'))"
    stages = [Stage("evaluate", ["-c", figures, "scripts/benchmark.py"]), Stage("broken", ["-c", "raise SystemExit('the kernel is missing')"]),
              Stage("endless", ["-c", "import time; print('waiting', flush=True); time.sleep(99)"], 2), Stage("sample tiny", ["sample"])]
    monkeypatch.setattr(gpu_report, "list_stages", lambda args, device: stages)
    done = {"about": about, "command": ["sample"], "status": "ok", "seconds": 7.0, "last_lines": [], "figures": SAMPLE}
    (tmp_path / "sample-tiny.json").write_text(json.dumps(done))
    command = f"scripts/gpu_report.py --device cpu --store {tmp_path}"
    call(monkeypatch, command)
    (page,) = tmp_path.glob("*.md")
    found = page.with_suffix(".json")
    text, figures = page.read_text(), json.loads(found.read_text())["stages"]["evaluate"]["figures"]
    assert "| sample tiny | ok | 7 | 250.00 | 2 | 8% of 100 | 3.5 | 1.25 |" in text
    assert figures == {"seconds_per_image": {"sampling": 0.0015}} and "| sampling 1.50 |" in text
    assert "| broken | failed with status 1 |" in text and "the kernel is missing" in text
    assert "| endless | not done after 2 s |" in text and "waiting" in text and torch.__version__ in text

    again = []
    monkeypatch.setattr(gpu_report, "run_stage", lambda stage, figures: again.append(stage.name) or {**done, "command": stage.command})
    call(monkeypatch, f"{command} --minutes 0")
    assert page.read_text() == text and not again
    call(monkeypatch, command)
    assert again == ["broken", "endless"] and "| broken | ok |" in page.read_text()
    about = {**about, "torch": "another"}
    call(monkeypatch, f"{command} --minutes 0.1")  # too short for all but one
    assert again[2:] == ["endless"] and "| broken | not run: no time was left |" in page.read_text()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_stages_are_commands_that_benchmark_takes(monkeypatch, device):
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--extra", SMALL])
    planned = gpu_report.list_stages(gpu_report.parse_args(), torch.device(device))
    assert (planned[0].name == "checks") == (device == "cuda") and len({stage.name for stage in planned}) == len(planned)
    measured = set()
    for stage in planned[device == "cuda":]:
        monkeypatch.setattr(sys, "argv", stage.command)
        what, args = benchmark.parse_args()
        assert args.device == device and args.vae_ch == 16 and (device == "cuda" or args.compile is None)
        measured.add(what)
    assert measured == set(benchmark.BENCHMARKS) - {"memory"} and sum("--num_step 1 " in " ".join(stage.command) for stage in planned) == 1
