"""scripts/posthoc_ema.py: a stored average to the bit, any other close to one that was tracked, in a file that everything takes."""
import os
import shutil

import pytest
import torch
from helpers import call, evaluate, make_project, read_checkpoint, train

from models import FlowARError, load_flowar
from models.weights import file_hash, read_file, write_file
from util.evaluation import load_pipeline
from util.training import checkpoint, optimization

TRACKED = {0.04: None, 0.07: None, 0.15: None}  # {width: PowerEMA}, beside the run's own


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A run of 20 steps, with snapshots after every second one; TRACKED is filled."""
    project = make_project(tmp_path_factory.mktemp("project"))
    update = optimization.EMA.update

    def track(ema, model, step=None):
        update(ema, model, step)
        for width in TRACKED:
            if step == 1:
                TRACKED[width] = optimization.PowerEMA(model, width)
            TRACKED[width].update(model, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimization.EMA, "update", track)
        train(project, project / "run", "--epochs 4 --save_every 0 --posthoc_ema 2 --cfg 2 --guidance 1 --blr 0.1")
    return project


@pytest.fixture
def script(project, monkeypatch, tmp_path):
    """Calls the script, on the run or a copy of it, with an output in tmp_path; returns what that file holds."""
    def run(options, output="ema.pth", resume=project / "run"):
        call(monkeypatch, f"scripts/posthoc_ema.py --resume {resume} --output {tmp_path}/{output} {options}")
        return read_file(tmp_path / output)
    return run


def test_stored_ones_to_the_bit(project, script):
    run = read_checkpoint(project / "run")
    files = sorted((project / "run").glob("posthoc-*.pth"))
    assert [checkpoint.step_of(path) for path in files] == list(range(2, 21, 2))
    snapshot = read_file(files[3])["posthoc"]["0.1"]
    assert snapshot.keys() == run["posthoc"]["0.1"].keys() and {value.dtype for value in snapshot.values()} == {torch.float16}
    for found, stored in ((script("--width 0.05")["model_ema"], run["posthoc"]["0.05"]),  # of the checkpoint, float32
                          (script("--width 0.10 --step 8", "of_8.pth")["model_ema"], snapshot)):
        assert all(torch.equal(found[name], value.float()) for name, value in stored.items())
        assert torch.equal(found["mask"], run["model"]["mask"])


def vector(state):
    return torch.cat([state[name].flatten() for name in TRACKED[0.07].tensors]).double()


def test_others_are_those_that_were_tracked(project, script, tmp_path, monkeypatch, capsys):
    """To less than 5 % of the distance of the two that are stored, most of it float16's: the weights of 20 steps differ little."""
    run = read_checkpoint(project / "run")
    call(monkeypatch, f"scripts/posthoc_ema.py --resume {project}/run --width 0.04,0.07,0.15 --output {tmp_path}/widths")
    said = capsys.readouterr().out
    between = (vector(run["posthoc"]["0.05"]) - vector(run["posthoc"]["0.1"])).norm()
    for width, tracked in TRACKED.items():
        content = read_file(tmp_path / "widths" / f"ema_width{width}.pth")
        error = (vector(content["model_ema"]) - vector(tracked.tensors)).norm() / between
        assert 0 < error < 0.05 and f"width {width} at step 20: combined from 20 averages, profile error {content['profile']['error']:.2%}" in said, error


def test_the_file_is_taken_as_any_weights(project, script, tmp_path):
    """By eval.py, load_flowar and load_pipeline, with settings, class names, data and VAE of the run."""
    content = script("--width 0.07")
    file = tmp_path / "ema.pth"
    loaded = load_flowar(file).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in content["model_ema"].items())
    pipe = load_pipeline(file, device="cpu")
    assert pipe.sampler.sampling.cfg == 2 and pipe.names == list("0123456789") and pipe.description["vae"] == f"{project}/vae.pth"
    report = evaluate(project, file, tmp_path / "eval")
    assert report["weights"] == "ema" and report["checkpoint_sha256"] == file_hash(file)


def test_what_cannot_be_rebuilt_is_refused(project, script, tmp_path):
    run = shutil.copytree(project / "run", tmp_path / "run", copy_function=os.link)
    snapshot, last = run / "posthoc-000000008.pth", run / "checkpoint-last.pth"

    def refuse(options, message):
        with pytest.raises(FlowARError) as error:
            script(options, resume=run)
        assert message.format(run=run) in str(error.value) and "\n" not in str(error.value)

    refuse("--width 0.01", "--width 0.01 at step 20: combined from 20 averages, profile error ")
    refuse("--width 0.07 --step 40", "--step 40: {run}/checkpoint-000000020.pth ends at step 20")
    powers = {width: {**power, "z_proj.bias": torch.zeros(3)} for width, power in read_file(snapshot)["posthoc"].items()}
    write_file({"step": 8, "posthoc": powers}, snapshot)
    refuse("--width 0.07", "{run}/posthoc-000000008.pth: tensors do not match those of {run}/checkpoint-000000020.pth")
    write_file({name: value for name, value in read_file(last).items() if name != "posthoc"}, last)
    refuse("--width 0.07", "{run}/checkpoint-last.pth: contains no averages to rebuild from")
    assert not (tmp_path / "ema.pth").exists()
