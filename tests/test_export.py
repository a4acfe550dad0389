"""scripts/export.py: the same bits, the same pictures, nothing of this machine, and a card that invents nothing."""
import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from helpers import call, evaluate, make_project, train

from models import FlowAR, FlowARError, load_flowar
from models import hub
from models.weights import read_file
from scripts import export
from util.evaluation import load_pipeline
from util.command_line import parse_options
from util.options import TrainingOptions

KEYS = {"ema": "model_ema", "raw": "model"}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A run that was told how to sample, evaluated, and its export in both formats."""
    project = make_project(tmp_path_factory.mktemp("machine"), 2)
    train(project, project / "run", "--cfg 2 --guidance 1 --ema_rate 0.5 --label_drop_prob 0.2")
    evaluate(project, project / "run", project / "eval")
    with pytest.MonkeyPatch.context() as patch:
        for form in ("safetensors", "pth"):
            call(patch, f"scripts/export.py --resume {project}/run --output {project}/{form} --format {form}")
        call(patch, f"scripts/export.py --resume {project}/run --output {project}/raw --weights raw")
    return project


def pixels(pipe, **options):
    return np.stack([np.asarray(image) for image in pipe([3, 7], seed=5, **options)])


@pytest.mark.parametrize("folder,weights", [("safetensors", "ema"), ("pth", "ema"), ("raw", "raw")])
def test_the_same_bits(project, folder, weights):
    expected = read_file(project / "run" / "checkpoint-last.pth")[KEYS[weights]]
    found = load_flowar(project / folder).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    if folder == "pth":  # the released layout
        bare = read_file(project / folder / "model.pth")
        assert all(torch.equal(bare[name], expected[name]) for name in expected)


@pytest.mark.parametrize("folder", ["safetensors", "pth"])
def test_the_folder_draws_what_the_run_draws(project, folder, tmp_path, monkeypatch):
    """By its own VAE, names and settings: moved away, with the project gone from where it was."""
    shutil.copytree(project / folder, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    ours, theirs = load_pipeline(project / "run", device="cpu"), load_pipeline(tmp_path / "moved", device="cpu")
    assert np.array_equal(pixels(ours), pixels(theirs)) and theirs.names == ours.names == list("0123456789")
    assert theirs.sampler.sampling == ours.sampler.sampling and theirs.sampler.sampling.cfg == 2
    assert theirs.classes.counts.tolist() == 10 * [2] and theirs.description["vae"] == str(tmp_path / "moved" / "vae.pth")


def test_an_evaluation_takes_the_folder(project, tmp_path):
    ours = json.loads((project / "eval" / "results.json").read_text())
    theirs = evaluate(project, project / "safetensors", tmp_path / "eval")
    assert theirs["weights"] == "ema" and theirs["guidance"] == 1 and theirs["labels_sha256"] == ours["labels_sha256"]


def test_the_configuration_builds_the_model(project):
    config = json.loads((project / "safetensors" / "config.json").read_text())
    model = FlowAR(**config["model"])
    model.load_state_dict(load_flowar(project / "safetensors").state_dict())
    assert config["model"]["label_drop_prob"] == 0.2 and config["data"]["classes"] == list("0123456789")
    assert config["sampling"]["cfg"] == 2 and config["weights"] == "ema" and len(config["vae"]["sha256"]) == 64


def test_nothing_of_this_machine_is_published(project, monkeypatch, tmp_path):
    for folder in ("safetensors", "pth"):
        for path in (project / folder).iterdir():
            content = path.read_bytes()
            assert str(project).encode() not in content and project.name.encode() not in content and b"checkpoint-last" not in content, path
    options = vars(parse_options(TrainingOptions, ["--data_path", "secret", "--resume", "secret", "--log_dir", "secret", "--wandb", "secret"]))
    assert "secret" not in export.public_options(options).values() and export.public_options(options)["epochs"] == 400
    assert export.public_vae({"vae_path": f"diffusers:{tmp_path}"}, None) is None
    assert export.public_vae({"vae_path": "diffusers:some/vae:sub"}, None) == "diffusers:some/vae:sub"
    assert export.public_vae({"vae": "diffusers:some/vae:sub"}, None) == "diffusers:some/vae:sub"  # of an earlier version
    assert export.public_vae({"vae": "kl16", "vae_path": "/x/kl16.ckpt"}, None) is None
    assert export.public_vae({"vae": "kl16", "vae_path": "hf:a/b/c.pth"}, None) == "hf:a/b/c.pth"
    assert export.public_vae({"vae_path": "/x/my.pth"}, None) == "my.pth"


def card_of(folder):
    _, header, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header), text


def test_the_card_says_what_is_known(project):
    header, text = card_of(project / "safetensors")
    results = json.loads((project / "eval" / "results.json").read_text())
    assert header["license"] == "unknown" and "arxiv:2412.15205" in header["tags"]
    for metric in results["metrics"]:
        assert f"| {metric.replace('*', '')} | {results[metric]:.4g} |" in text
    assert "| epochs | 2 |" in text and "| cfg | 2.0 |" in text
    assert "`vae.pth` of these files" in text and "| 3 | 3 |" in text
    assert "These weights have not been measured" in card_of(project / "raw")[1]


def test_the_hub_has_the_vae_beside(project, tmp_path, monkeypatch):
    assert hub.name_of_sibling("vae.pth", "hf:me/it", tmp_path) == "hf:me/it/vae.pth"
    assert hub.name_of_sibling("vae.pth", "hf:me/it/sub.pth@v1", tmp_path) == "hf:me/it/vae.pth@v1"
    assert hub.name_of_sibling("vae.pth", "run", Path("a/model.pth")) == "a/vae.pth"
    assert hub.name_of_sibling("x/vae.pth", "run", Path("a/model.pth")) == "x/vae.pth" and hub.name_of_sibling("hf:a/b/c", "run", Path("a/m")) == "hf:a/b/c"
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file, **options: asked.append((repo, file)) or project / "safetensors" / file)
    theirs = load_pipeline("hf:me/it", device="cpu")
    assert ("me/it", "vae.pth") in asked and np.array_equal(pixels(theirs), pixels(load_pipeline(project / "run", device="cpu")))


def test_a_vae_of_another_run_is_refused(project, tmp_path, monkeypatch):
    with pytest.raises(FlowARError, match="not the VAE that the run was trained with"):
        call(monkeypatch, f"scripts/export.py --resume {project}/run --output {tmp_path}/out --vae_path {project}/run/checkpoint-last.pth")
    assert not list((tmp_path / "out").glob("*"))


class Api:
    """A hub that remembers."""
    calls = []

    def create_repo(self, repo, **options):
        Api.calls.append((repo, options))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        Api.calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


def test_push(project, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    call(monkeypatch, f"scripts/export.py --resume {project}/run --output {tmp_path} --push me/it")
    assert Api.calls == [("me/it", {"exist_ok": True}), ("me/it", ["README.md", "config.json", "model.safetensors", "vae.pth"])]
    assert 'load_pipeline("hf:me/it")' in card_of(tmp_path)[1]
