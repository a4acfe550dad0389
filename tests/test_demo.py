"""demo:fashion: the committed weights are those of models/hub.py, their samples those of goldens/demo.npz."""
import json
import shutil
import socket

import golden
import huggingface_hub
import numpy as np
import pytest
import torch
from helpers import call, make_project, train

from models import FlowARError, hub, load_flowar, load_vae
from scripts.quickstart_report import accuracy, gray, load_classifier
from util.evaluation import load_pipeline

LABELS = [0, 5, 8, 9]
STEPS = dict(num_steps=6, cfg=3.0, guidance=1.0)
SETTINGS = {
    "own": {},
    **{solver: dict(STEPS, solver=solver) for solver in ("euler", "ab2", "heun", "midpoint", "rk4")},
    "uniform": dict(STEPS, time_grid="uniform"),
    "interval": dict(STEPS, guidance=0.8, guidance_low=0.2),
    "constant": dict(STEPS, cfg_schedule="constant"),
    "each_scale": dict(STEPS, cfg=(1.0, 2.0, 4.0), num_steps=(3, 6, 9)),
    "annealed": dict(STEPS, num_steps_last=3),
    "cool": dict(STEPS, temperature=0.9),
    "plain": dict(STEPS, cfg=1.0),
}
TOLERANCE = 1e-4  # CPUs with and without AVX-512 differ by 2e-5 of the largest value after these steps
STUDENT, GUIDED = "demo:fashion/student.safetensors", dict(cfg=1.5, guidance=1.0, num_step=6)


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("demo:fashion", device="cpu")


def draw(pipe, **settings):
    """Latents of LABELS, (4, 4, 8, 8)."""
    noise = pipe.noise(0, range(len(LABELS)))
    return pipe.sampler.model.unpatchify(pipe.latents(LABELS, noise, **settings)[-1])


@pytest.mark.parametrize("name", SETTINGS)
def test_samples_are_golden(pipe, name):
    arrays, meta = golden.load("demo")
    assert meta["weights"] == hub.DEMO_FILES
    golden.assert_close(draw(pipe, **SETTINGS[name]), arrays[name], TOLERANCE)


@pytest.mark.parametrize("steps", [1, 2])
def test_samples_of_the_student_are_golden(steps):
    arrays, _ = golden.load("demo")
    golden.assert_close(draw(load_pipeline(STUDENT, device="cpu"), num_steps=steps), arrays[f"student_{steps}"], TOLERANCE)


def test_samples_guided_by_the_student_are_golden():
    arrays, _ = golden.load("demo")
    golden.assert_close(draw(load_pipeline("demo:fashion", device="cpu", guide=STUDENT, **GUIDED)), arrays["guided"], TOLERANCE)


def test_the_classifier_finds_the_labels(pipe):
    """Of chance 10 %; a sampler that takes a wrong step, label or scale is far below."""
    labels = [label for label in range(10) for _ in range(20)]
    for one in (pipe, load_pipeline(STUDENT, device="cpu")):
        images = np.stack([np.asarray(image) for image in one(labels, solver="euler", num_steps=STEPS["num_steps"])])
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
        assert accuracy(load_classifier("cpu"), gray(images), torch.tensor(labels), "cpu") >= 0.9


# ---- the files -----------------------------------------------------------------------------------------------------


def test_the_card_has_the_files_and_their_hashes_and_they_are_small():
    folder = hub.DEMO_FOLDER / "fashion"
    card, files = (folder / "README.md").read_text(), sorted(folder.glob("*.safetensors"))
    assert {f"fashion/{file.name}" for file in files} == set(hub.DEMO_FILES)
    assert sum(file.stat().st_size for file in files) <= 8e6
    for name, sha256 in hub.DEMO_FILES.items():
        assert sha256 in card and hub.local_file(f"demo:{name}").is_file()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 3229892\n"


@pytest.mark.parametrize("change", ["altered", "pointer", "missing"])
@pytest.mark.parametrize("name, load", [("vae", load_vae), ("model", load_flowar), ("model", load_pipeline)])
def test_a_file_that_is_not_the_committed_one_is_refused(name, load, change, tmp_path, monkeypatch):
    shutil.copytree(hub.DEMO_FOLDER, tmp_path / "demo")
    monkeypatch.setattr(hub, "DEMO_FOLDER", tmp_path / "demo")
    load("demo:fashion")
    file = tmp_path / "demo" / "fashion" / f"{name}.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()
    if change != "missing":
        file.write_bytes(content if change == "altered" else POINTER.format(hub.DEMO_FILES[f"fashion/{file.name}"]).encode())
    with pytest.raises(FlowARError, match=f"{file.name}: missing, modified or a Git LFS pointer .*git checkout HEAD"):
        load("demo:fashion")


def test_another_name_is_refused():
    with pytest.raises(FlowARError, match="demo:mode: expected demo:fashion, or demo:FILE with FILE one of fashion/model"):
        load_flowar("demo:mode")


def test_a_grid_needs_no_network_and_writes_nothing_beside_it(tmp_path, monkeypatch):
    asked = []
    for place, name in ((socket.socket, "connect"), (huggingface_hub, "hf_hub_download")):
        monkeypatch.setattr(place, name, lambda *args, **options: asked.append(args))
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in hub.DEMO_FOLDER.rglob("*")}
    for name in ("demo:fashion", STUDENT):
        call(monkeypatch, f"scripts/sample.py --resume {name} --per_class 1 --num_step 2 --device cpu --grid {name[-9:-5]}.png")
    assert not asked and len(list(tmp_path.glob("*.png"))) == len(list(tmp_path.iterdir())) == 2
    assert {path: path.stat().st_mtime_ns for path in hub.DEMO_FOLDER.rglob("*")} == before


def test_a_run_of_its_vae_is_exported_without_a_copy(tmp_path, monkeypatch):
    """The VAE stays a name, which whoever has this code can open."""
    project = make_project(tmp_path, 2)
    (project / "vae.pth").unlink()
    train(project, project / "run", "--vae_path demo:fashion --epochs 1")
    call(monkeypatch, f"scripts/export.py --resume {project}/run --output {project}/export")
    shutil.rmtree(project / "run")
    assert not list((project / "export").glob("vae*"))
    assert load_pipeline(project / "export", device="cpu").description["vae"] == "demo:fashion"
    assert hub.name_of_sibling("vae.pth", "demo:fashion", project / "model.safetensors") == str(project / "vae.pth")


def make_golden():
    """goldens/demo.npz, of the weights that are there."""
    pipe, student = load_pipeline("demo:fashion", device="cpu"), load_pipeline(STUDENT, device="cpu")
    arrays = {name: draw(pipe, **settings).numpy() for name, settings in SETTINGS.items()}
    arrays.update({f"student_{steps}": draw(student, num_steps=steps).numpy() for steps in (1, 2)})
    arrays["guided"] = draw(load_pipeline("demo:fashion", device="cpu", guide=STUDENT, **GUIDED)).numpy()
    meta = {"labels": LABELS, "seed": 0, "settings": SETTINGS, "weights": hub.DEMO_FILES}
    np.savez_compressed(golden.GOLDENS / "demo.npz", meta=np.array(json.dumps(meta)), **arrays)


if __name__ == "__main__":  # PYTHONPATH=.:tests python tests/test_demo.py
    make_golden()
