"""docs/extending.md: its changes, exactly as they are printed, act where they must and nowhere else."""
import csv
import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, make_project
from PIL import Image

PAGE = (ROOT / "docs" / "extending.md").read_text()
CODE = ("models", "util", "scripts", "tests/helpers.py", "engine_flowar.py", "main_flowar.py", "eval.py")


def section(title):
    """{file: hunks [(lines out, lines in)], options: the text of a bash block} of a section of the page."""
    text = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)[1]
    options = re.search(r"```bash\n(.*?)```", text, re.S)
    hunks = {}
    for file, diff in re.findall(r"^`(\S+)`\n\n```diff\n(.*?)```", text, re.M | re.S):
        hunks[file] = []
        for line in diff.splitlines():
            if line[0] == "-" and (not hunks[file] or hunks[file][-1][1]):
                hunks[file].append(([], []))
            hunks[file][-1]["-+".index(line[0])].append(line[1:])
    return hunks, options[1].strip() if options else ""


def apply(tree, hunks):
    for file, changes in hunks.items():
        text = (tree / file).read_text()
        for out, into in changes:
            old = "".join(f"{line}\n" for line in out)
            assert text.count(old) == 1, f"{file} does not hold once: {old}"
            text = text.replace(old, "".join(f"{line}\n" for line in into))
        (tree / file).write_text(text)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("extending"))


@pytest.fixture(scope="module")
def probe(project, tmp_path_factory):
    """probe(title, options) -> what the code computes with a section's change; title None: as it is."""
    process = subprocess.Popen([sys.executable, str(ROOT / "tests" / "probe.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(title=None, extra="", settings=(), evaluate=False, sweep="", commands=()):
        folder = tmp_path_factory.mktemp("tree")
        tree = folder / "code"
        for name in CODE:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / name, tree / name)
        options = extra
        if title:
            hunks, options = section(title)
            options = f"{options} {extra}"
            apply(tree, hunks)
        process.stdin.write(json.dumps({"tree": str(tree), "output": str(folder / "run"), "project": str(project), "options": options,
                                        "settings": dict(settings), "evaluate": evaluate, "sweep": sweep, "commands": commands}) + "\n")
        process.stdin.flush()
        found = json.loads(process.stdout.readline())
        assert "error" not in found, found["error"] + (folder / "run.txt").read_text()[-2000:]
        return found

    yield ask
    process.stdin.close()
    process.wait(60)


@pytest.fixture(scope="module")
def unchanged(probe):
    return probe(evaluate=True)


def moved(found, unchanged):
    return {name for name in ("train", "val", "samples") if found[name] != unchanged[name]}


def test_the_unchanged_code_gives_the_same_bits_again(probe, unchanged):
    assert moved(probe(), unchanged) == set() and len(unchanged["train"]) == 5 and len(unchanged["val"]) == 1


@pytest.mark.parametrize("title,expected", [
    ("Another distribution of times", {"train", "val"}), ("Another weight of the scales in the loss", {"train", "val"}),
    ("Another attention pattern between scales", {"train", "val", "samples"}),
    ("Another way in which the condition enters the flow head", {"train", "val", "samples"})])
def test_a_change_acts_in_training_validation_and_sampling_alike(probe, unchanged, title, expected):
    found = probe(title)
    assert moved(found, unchanged) == expected
    assert found["train"][0] != unchanged["train"][0]  # from the first step on
    if "weight" in title:  # the first step's loss is the sum of the scales' losses, which the change leaves alone, with the page's weights
        assert found["scale_losses"] == unchanged["scale_losses"]
        assert found["train"][0] == pytest.approx(sum(loss * side / 4 for loss, side in zip(found["scale_losses"], (1, 2, 4))))


def test_a_solver(probe, unchanged):
    assert moved(probe("A solver", settings={"solver": "ralston"}, extra="--solver ralston"), unchanged) == {"samples"}


def test_a_sampling_option(probe, unchanged):
    """It moves samples alone; that it is stored, offered in Python and swept takes nothing more."""
    found = probe("A sampling option", settings={"time_shift": 2.0}, sweep="--time_shift 1,2")
    assert moved(found, unchanged) == {"samples"} and found["stored"] == {"time_shift": 2.0}
    assert found["pipeline"]["time_shift"] == 2.0 and found["called"]["time_shift"] == 3.0
    assert [row["time_shift"] for row in csv.DictReader(io.StringIO(found["table"]))] == ["1.0", "2.0"]


def test_an_optimizer(probe, unchanged):
    found = probe("Another optimizer")
    assert moved(found, unchanged) == {"train", "val"} and found["train"][0] == unchanged["train"][0]  # a first loss is that of the start


def test_another_list_of_scales(probe, unchanged):
    found = probe("Another list of scales")
    assert found["scales"] == [1, 4] and {"train", "val"} <= moved(found, unchanged)


def test_a_dataset(probe, unchanged, project, tmp_path):
    for split in ("train", "val"):
        files = sorted((project / "images" / split).rglob("*.png"))
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / "images.npy", np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]))
        np.save(tmp_path / split / "labels.npy", [int(file.parent.name) for file in files])
    commands = [f"scripts/cache_latents.py --data_path {tmp_path} --vae_path {project}/vae.pth --cached_path {{out}}/cache --img_size 16 "
                "--num_workers 0 --device cpu", f"scripts/check_images.py {tmp_path}/train --num_workers 0"]
    found = probe("Your own dataset", f"--data_path {tmp_path}", commands=commands)
    still = probe("Your own dataset", f"--no_flip --data_path {tmp_path}")
    assert "80 images" in found["printed"].rpartition("cache")[2]
    assert moved(found, unchanged) == set() and moved(still, unchanged) == {"train", "val"}  # the same images, from another kind of place


def test_a_vae(probe, unchanged):
    found = probe("Your own VAE", "--vae_path pixels --vae_embed_dim 48", evaluate=True)
    assert {"train", "val"} <= moved(found, unchanged) and found["report"]["vae"] == "pixels"


def test_a_metric(probe, unchanged):
    found = probe("Your own metric", evaluate=True)
    name = "diversity_efficientnet_lite0"
    assert moved(found, unchanged) == set() and name not in unchanged["report"] and name in found["report"]["metrics"]
    assert found["report"][name] > 0
