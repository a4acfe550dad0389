"""scripts/studies/step_plan.py: local errors are those of the definition, and the list is the best of all."""

import pytest
from scripts.studies import step_plan
import torch
from helpers import call, make_project, train

from models import flow_matching as fm


def test_the_rate_is_that_of_the_path_and_its_integral_eulers_error():
    """dx/dt = t^2: |dv/dt| = 2 t, and Euler's error is what it is."""
    times = fm.time_grid(1000, "uniform")
    _, rate = step_plan.integrate(lambda x, t: torch.full_like(x, t * t), torch.zeros(2, 3, dtype=torch.float64), times.tolist())
    torch.testing.assert_close(rate[:-1], (times[:-2] + times[1:-1]), atol=1e-9, rtol=0)
    for kind, steps in (("uniform", 1), ("uniform", 5), ("release", 9), ("release", 25)):
        grid = fm.time_grid(steps, kind)
        found = fm.euler(lambda x, t: torch.full_like(x, t * t), torch.zeros(1), grid).item()
        assert step_plan.euler_error(rate, grid) == pytest.approx(abs(found + 1 / 3), rel=0.02)


def test_its_lists_are_what_num_step_takes(tmp_path, monkeypatch, capsys):
    project = make_project(tmp_path, 2)
    train(project, tmp_path / "run", "--epochs 1")
    call(monkeypatch, f"scripts/studies/step_plan.py --resume {tmp_path}/run --vae_path {tmp_path}/vae.pth --device cpu --cfg 2 --evaluations 9,18 "
         "--time_grid uniform --reference 20 --images 4")
    *_, nine, eighteen = capsys.readouterr().out.strip().splitlines()
    for row, evaluations in ((nine, 9), (eighteen, 18)):
        _, said, steps, error, even, _ = row.split("|")
        assert int(said) == evaluations == sum(map(int, steps.split(":"))) and 0 < float(error) <= float(even)
    assert "measured" not in fm.SOLVERS
