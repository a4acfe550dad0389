"""run.json: every output folder says what was started there, whatever git says or does not."""
import shutil
import subprocess

import pytest
import torch
from helpers import evaluate, make_project, train

from util import manifest
from util.files import read_json


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = make_project(tmp_path_factory.mktemp("project"), 2)
    train(project, project / "run", "--epochs 1 --cfg 2")
    return project


def git(folder, *command):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", folder, *identity, *command], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "util").mkdir()
    (tmp_path / "util" / "manifest.py").write_text("1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "all")
    return tmp_path


def test_a_training_says_what_it_was_started_with(project):
    content = read_json(project / "run" / "run.json")
    (start,) = content["starts"]
    assert start["options"]["cfg"] == 2 and start["options"]["global_batch"] == 16 and start["options"]["scales"] == [1, 2, 4]
    assert start["versions"]["torch"] == torch.__version__ and start["hardware"]["world_size"] == 1
    assert sum(start["hardware"]["devices"].values()) == 1
    assert content["data"]["classes"] == list("0123456789") and start["data_sha256"] == content["data"]["sha256"]
    assert len(content["vae"]["sha256"]) == 64 and start["step"] == 0


def test_a_run_that_goes_on_keeps_its_earlier_starts(project, tmp_path):
    run = shutil.copytree(project / "run", tmp_path / "run")
    train(project, run, f"--epochs 2 --resume {run}")
    starts = read_json(run / "run.json")["starts"]
    assert [(start["step"], start["options"]["epochs"]) for start in starts] == [(0, 1), (1, 2)]


def test_an_evaluation_says_it_once(project, tmp_path):
    for _ in range(2):  # the second finds the results and starts nothing
        report = evaluate(project, project / "run", tmp_path)
    content = read_json(tmp_path / "run.json")
    (start,) = content["starts"]
    assert start["evaluated"]["checkpoint_sha256"] == report["checkpoint_sha256"] and start["options"]["num_images"] == 10
    assert content["data"]["classes"] == list("0123456789") and content["vae"]["sha256"] == report["vae_sha256"]


def test_git_is_asked_about_the_projects_folder(checkout, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    git(elsewhere, "init", "-q")
    monkeypatch.chdir(elsewhere)
    found = manifest.git_state(checkout)
    assert len(found["commit"]) == 40 and found["dirty"] is False
    (checkout / "new.txt").write_text("data")
    assert manifest.git_state(checkout)["dirty"] is False  # what git does not know is no change of the code
    (checkout / "util" / "manifest.py").write_text("2\n")
    assert manifest.git_state(checkout) == {**found, "dirty": True}
    assert manifest.git_state(tmp_path_factory.mktemp("none")) is None
    monkeypatch.setenv("PATH", str(checkout))  # where no git is
    assert manifest.git_state(checkout) is None
