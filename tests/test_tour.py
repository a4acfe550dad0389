"""docs/tour.ipynb runs from its first cell to its last."""
import json
import re
import subprocess
import sys

import pytest
from helpers import ROOT

TOUR = ROOT / "docs" / "tour.ipynb"
PICTURES = 8


def notebook():
    return json.loads(TOUR.read_text())


def pictures(cells):
    data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    return [one["image/png"] for one in data if "image/png" in one]


def test_the_tour_runs_with_any_model(monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    for name, value in (("FLOWAR_RUN", "demo:fashion/student.safetensors"), ("CUDA_VISIBLE_DEVICES", ""), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)
    cells = nbformat.read(TOUR, as_version=4)
    committed = pictures(cells.cells)
    at = {"metadata": {"path": str(TOUR.parent)}}
    nbclient.NotebookClient(cells, timeout=300, kernel_name="python3", resources=at).execute()
    made = pictures(cells.cells)
    assert len(made) == PICTURES and not set(made) & set(committed)
    printed = "".join(output.get("text", "") for cell in cells.cells for output in cell.get("outputs", []))
    assert "class_num        10" in printed and re.search(r"trained +1 epochs on 20000 images", printed)


def test_what_is_committed_has_its_pictures_and_no_paths():
    text, cells = TOUR.read_text(), notebook()["cells"]
    assert len(text) < 500_000 and len(pictures(cells)) == PICTURES
    assert not re.findall(r"/(?:tmp|work|root|opt|home|usr)\b", re.sub(r'"image/(png|jpeg)": "[^"]*"', "", text))
    assert all(output["output_type"] != "error" for cell in cells for output in cell.get("outputs", []))
    order = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert order == list(range(1, 1 + len(order)))


def test_outside_of_the_repository_it_is_fetched_and_installed(tmp_path, monkeypatch):
    first, commands = next("".join(cell["source"]) for cell in notebook()["cells"] if cell["cell_type"] == "code"), []

    def record(command, check):
        commands.append(command)
        (tmp_path / "FlowAR").mkdir(exist_ok=True)

    monkeypatch.setattr(subprocess, "run", record), monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("FLOWAR_REPOSITORY", "https://example.org/FlowAR")
    for folder in (tmp_path, ROOT / "docs"):
        monkeypatch.chdir(folder)
        exec(first, {})
    clone, install = commands  # nothing of it in docs/
    assert clone == ["git", "clone", "--depth", "1", "https://example.org/FlowAR", str(tmp_path / "FlowAR")]
    assert install[1:4] == ["-m", "pip", "install"] and install[-1] == str(tmp_path / "FlowAR" / "requirements.txt")
