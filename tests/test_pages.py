"""README and docs: links lead somewhere, every command is one; those of data.md and evaluation.md run, with small numbers in the place of theirs."""
import argparse
import importlib
import re
import shlex
import sys

import pytest
from helpers import ROOT, call, write_digits

from util.evaluation.pipeline import Pipeline
from util.files import read_json

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "models" / "demo" / "fashion" / "README.md"]
SMALL = {"img_size": "16", "ch": "8", "ch_mult": "1,2,2", "steps": "3", "batch_size": "4", "epochs": "1", "warmup_epochs": "0.5", "eval_freq": "1",
         "num_images": "10", "num_step": "3", "per_class": "1"}


def commands(page):
    """[program, argument, ...] of each command of the page's blocks that starts a program of the project."""
    blocks = re.findall(r"```(?:bash|text)\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if re.match(r"\s*(python|torchrun) ", line)]
    starts = [next(i for i, word in enumerate(line) if word.endswith(".py")) for line in words]
    return [line[start:] for line, start in zip(words, starts)]


class Parsed(Exception):
    """A command's options are known and have good values."""


def stop_after(parse):
    def parse_and_stop(*words):
        parse(*words)
        raise Parsed
    return parse_and_stop


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_options(page, monkeypatch):
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if anchor else []
        assert target.exists() and (not anchor or anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}), link
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stop_after(getattr(argparse.ArgumentParser, name)))
    for program, *arguments in commands(page):
        if not {"...", "--again"} & set(arguments):  # --again reads a picture
            monkeypatch.setattr(sys, "argv", [program, *arguments])
            with pytest.raises(Parsed):
                importlib.import_module(program.removesuffix(".py").replace("/", ".")).main()


def test_from_a_folder_of_pictures_to_samples_and_a_distance(tmp_path, monkeypatch, capsys):
    write_digits(tmp_path / "pictures", 4, size=20)
    found = [command for command in commands(ROOT / "docs" / "data.md") if re.search(r"\b(output/)?pictures\b", " ".join(command))]
    assert {command[0] for command in found} == {"scripts/check_images.py", "scripts/train_vae.py", "scripts/cache_latents.py", "main_flowar.py", "eval.py",
                                                 "scripts/reference_stats.py", "scripts/sample.py", "scripts/distance.py", "scripts/plot_run.py"}
    for words in found:
        for i, word in enumerate(words):
            if words[i - 1].removeprefix("--") in SMALL and words[i - 1].startswith("--"):
                words[i] = SMALL[words[i - 1].removeprefix("--")]
            words[i] = re.sub(r"^(pictures|output)/?", lambda match: f"{tmp_path}/{match[0]}", words[i])
        workers = ["--num_workers", "0"] if words[0] in ("scripts/train_vae.py", "scripts/cache_latents.py", "main_flowar.py") else []
        device = ["--device", "cpu"] * (words[0] not in ("scripts/check_images.py", "scripts/plot_run.py"))
        call(monkeypatch, shlex.join([*words, *workers, *device]))
    report = read_json(tmp_path / "output" / "pictures" / "eval" / "results.json")
    assert report["labels"] == "train" and report["reference"].endswith("train.npz") and report["metrics"]
    assert (tmp_path / "output" / "pictures" / "grid.png").is_file() and "floor" in capsys.readouterr().out


def test_pictures_from_python_and_from_the_command_line(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "evaluation.md").read_text()
    methods = {name for name in vars(Pipeline) if not name.startswith("_") and name != "kept"}
    assert methods == set(re.findall(r"`pipe\.(\w+)\(", page))
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", page, re.S)[1], {})
    for command in commands(ROOT / "docs" / "evaluation.md"):
        if command[0] == "scripts/sample.py":
            call(monkeypatch, shlex.join(command))
    made = {"sneaker", "grid", "boots", "strip", "variations", "edit", "more"}
    assert {path.stem for path in tmp_path.glob("*.png")} == made
    assert len(list((tmp_path / "single").iterdir())) == 24
