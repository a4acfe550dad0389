"""scripts/studies/step_plan.py: local errors are those of the definition, and the list is the best of all."""

import pytest
from scripts.studies import step_plan
import torch
from helpers import call

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


def test_its_lists_are_what_num_step_takes(monkeypatch, capsys):
    call(monkeypatch, "scripts/studies/step_plan.py --resume demo:fashion --device cpu --evaluations 9,18 --reference 20 --images 4 "
         "--time_grid uniform")
    *_, nine, eighteen = capsys.readouterr().out.strip().splitlines()
    for row, evaluations in ((nine, 9), (eighteen, 18)):
        _, said, steps, error, even, _ = row.split("|")
        assert int(said) == evaluations == sum(map(int, steps.split(":"))) and 0 < float(error) <= float(even)
    assert "measured" not in fm.SOLVERS
