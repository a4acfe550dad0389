"""Which versions of Python and of packages are needed; importing this checks them, so it is imported first.

The floors of packages stand in requirements.txt: docs/versions.md says how they were found. An old Python must be able
to read this file: no new syntax here. python3 util/versions.py checks Python alone, before anything is installed.
"""
import os
import sys

PYTHON = (3, 11)
REQUIREMENTS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "requirements.txt")


def python_problem():
    """What is wrong with this Python, in a line; None if nothing is."""
    if sys.version_info >= PYTHON:
        return None
    return ("Python {}.{}.{} ({}) is too old, Python {}.{} or newer is needed: install one, and make .venv with it "
            "(python{}.{} -m venv .venv) or name it in FLOWAR_PYTHON"
            .format(*(sys.version_info[:3] + (sys.executable,) + PYTHON + PYTHON)))


def package_problem():
    """What is wrong with the packages that everything needs, in a line; None if nothing is."""
    from importlib import metadata

    if not os.path.isfile(REQUIREMENTS):  # the code alone, in somebody's container
        return None
    with open(REQUIREMENTS) as file:
        needed = file.read().partition("#")[0]  # what follows a comment only some need, and is named where it is used
        floors = [line.split(">=") for line in needed.splitlines() if ">=" in line]
    for name, floor in floors:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "no version"
        if numbers(found) < numbers(floor):
            return "{} is needed and {} is installed for {}: {} -m pip install -r {}".format(
                name + ">=" + floor, found, sys.executable, sys.executable, REQUIREMENTS)
    return None


def numbers(version):
    """'2.14.1+cu130' -> (2, 14, 1); letters end it."""
    parts = []
    for part in version.split("+")[0].split("."):
        digits = part[:len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
        if digits != part:
            break
    return tuple(parts)


problem = python_problem() or (package_problem() if __name__ != "__main__" else None)
if problem:
    sys.stderr.write("error: {}\n".format(problem))
    sys.exit(2)
