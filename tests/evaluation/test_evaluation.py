"""Evaluation: in memory, the same on any number of processes, resumable, swept, measured, honest."""
import csv
import itertools
import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from helpers import GEOMETRY, call, evaluate, evaluation_command, make_project, run, train
from PIL import Image

import seams
from models import FlowARError
from util import manifest
from util.evaluation import extractors, metrics, references, reports, store
from util.evaluation.pipeline import open_for_sampling
from util.command_line import parse_options
from util.options import EvaluationOptions

METRIC = "frechet_distance_efficientnet_lite0"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"), 2)


@pytest.fixture(scope="module")
def checkpoint(project):
    train(project, project / "trained", "--epochs 1")
    return project / "trained"


@pytest.fixture(scope="module")
def whole(project, checkpoint):
    """An undisturbed evaluation of 10 images in batches of 4, and its folder."""
    output = project / "whole"
    report = evaluate(project, checkpoint, output, f"--eval_bsz 4 --save_images png,npz --fid_stats {project}/images/val")
    return report, output


class Colors(extractors.Extractor):
    """A feature network of an image's mean red, green and blue."""
    name, dim, resize = "colors", 3, "none"
    network = torch.nn.Identity()

    def __init__(self, device, file=None):
        pass

    def forward(self, images):
        return {"features": images.float().mean(dim=(2, 3))}


@pytest.fixture
def colors(monkeypatch):
    """The option of a feature network that costs no time."""
    monkeypatch.setitem(extractors.EXTRACTORS, "colors", Colors)
    return "--feature_extractor colors"


def pictures(folder, count=10):
    return np.stack([np.asarray(Image.open(folder / "images" / f"{i:06d}.png")) for i in range(count)])


def same_figures(a, b):
    timing = ("seconds_per_image", "images_per_second", "world_size")
    return {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}


# ---- in memory and on disk -------------------------------------------------------------------------------------


def test_report(whole):
    report, output = whole
    assert json.loads((output / "results.json").read_text()) == json.loads(json.dumps(report))
    for key in ("model", "checkpoint_sha256", "vae_sha256", "solver", "num_step", "cfg", "guidance", "precision", "seed",
                "num_images", "feature_extractor", "extractor_sha256", "extractor_batch", "versions", "reference", "commit"):
        assert report[key] is not None, key
    assert "fid" not in report and report[METRIC] > 0 and report["nfe"] == report["steps"] == [6, 6, 6]
    assert {f"{name}_efficientnet_lite0" for name in ("kid_mean", "kid_std", "precision_k3", "recall_k3")} <= set(report)
    assert set(report["seconds_per_image"]) == set(reports.STAGES) and min(report["seconds_per_image"].values()) > 0
    assert not (output / "partial").exists()


def test_distance_in_memory_equals_that_of_saved_images(project, whole):
    report, output = whole
    joint = extractors.Joint([extractors.EfficientNetLite0(torch.device("cpu"))])
    saved, reference = (references.extract_folder(references.list_reference(folder), joint, torch.device("cpu"))[0]
                        for folder in (output / "images", project / "images" / "val"))
    distance = metrics.frechet_distance(saved.statistics, reference.statistics)
    assert report[METRIC] == pytest.approx(distance, rel=1e-6)


def test_npz_is_what_adms_evaluator_reads(whole):
    with np.load(whole[1] / "samples.npz") as file:
        assert file["arr_0"].dtype == np.uint8 and file["arr_0"].shape == (10, 16, 16, 3)
        assert np.array_equal(file["arr_0"], pictures(whole[1])) and file["arr_1"].tolist() == list(range(10))


def test_without_a_reference_nothing_is_written_but_the_report(project, checkpoint, tmp_path, capsys):
    evaluate(project, checkpoint, tmp_path / "out", "--num_images 2")
    assert "no reference, frechet_distance" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "settings.json", "run.json", ".lock"}


def test_several_extractors(project, checkpoint, whole, colors, tmp_path, monkeypatch):
    """Each as alone, from the same images; interrupted too; with FDr of a file that can give it."""
    both = f"{colors},efficientnet-lite0"
    call(monkeypatch, f"scripts/reference_stats.py --ref_images {project}/images/val --held_out {project}/images/train "
                      f"--keep_features --output {tmp_path}/stats.npz {both} --device cpu")
    options = f"--eval_bsz 4 {both} --fid_stats {tmp_path}/stats.npz"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        seams.interrupt(patch, seams.KEPT_BATCH, 1)
        evaluate(project, checkpoint, tmp_path / "out", options)
    report = evaluate(project, checkpoint, tmp_path / "out", options)
    for name in whole[0]["metrics"]:
        assert report[name] == pytest.approx(whole[0][name], rel=1e-5, abs=1e-6), name
    assert report["fdr_mean_of_2"] == pytest.approx((report["fdr_colors"] + report["fdr_efficientnet_lite0"]) / 2) and report["fdr_colors"] > 1
    assert report["metrics"][0] == "frechet_distance_colors" and report["feature_extractor"] == "colors,efficientnet-lite0"
    with pytest.raises(FlowARError, match="--held_out .*val: contains the same images as --ref_images"):
        call(monkeypatch, f"scripts/reference_stats.py --ref_images {project}/images/val --held_out {project}/images/val "
                          f"--output {tmp_path}/same.npz --feature_extractor colors --device cpu")


def test_compile_is_for_all_that_computes(project, checkpoint, whole, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(getattr(function, "__self__", None)) or function)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    report = evaluate(project, checkpoint, tmp_path, f"--eval_bsz 4 --compile --fid_stats {project}/images/val")
    names = [type(module).__name__ for module in compiled if module is not None]  # others: trials
    assert names == ["AttnMLPBlock"] + ["FinalLayer", "Decoder", "EfficientNetLite0"]
    assert report[METRIC] == whole[0][METRIC]


# ---- the same images everywhere ----------------------------------------------------------------------------------


def test_images_do_not_depend_on_processes_and_batches(project, checkpoint, whole, tmp_path):
    images, options = pictures(whole[1]).astype(int), f"--save_images --fid_stats {project}/images/val"
    run(evaluation_command(project, checkpoint, tmp_path / "two", f"--eval_bsz 4 {options}"), processes=2)
    two, three = json.loads((tmp_path / "two" / "results.json").read_text()), evaluate(project, checkpoint, tmp_path / "three", f"--eval_bsz 3 {options}")
    assert (two["world_size"], three["world_size"]) == (2, 1) and images.std() > 1
    assert np.array_equal(images, pictures(tmp_path / "two")) and np.abs(images - pictures(tmp_path / "three")).max() <= 1
    assert two[METRIC] == pytest.approx(whole[0][METRIC], rel=1e-6) and three[METRIC] == pytest.approx(whole[0][METRIC], rel=1e-3)


# ---- interrupted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where,calls,left", [
    (seams.LATENTS, 2, 1), (seams.PNG, 6, 2), (seams.REMOVAL, 0, 0),
    *(pytest.param(*where, marks=pytest.mark.slow) for where in ((seams.KEPT_BATCH, 1, 2), (seams.NPZ, 0, 0), (seams.REPORT, 0, 0)))])
def test_interrupted_it_goes_on(project, checkpoint, whole, tmp_path, monkeypatch, where, calls, left):
    options = f"--eval_bsz 4 --save_images png,npz --fid_stats {project}/images/val"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        seams.interrupt(patch, where, calls)
        evaluate(project, checkpoint, tmp_path / "out", options)
    sampled = seams.count(monkeypatch, seams.LATENTS)
    report = evaluate(project, checkpoint, tmp_path / "out", options)
    assert len(sampled) == left
    assert same_figures(report, whole[0])
    assert np.array_equal(pictures(tmp_path / "out"), pictures(whole[1]))
    assert (tmp_path / "out" / "samples.npz").read_bytes() == (whole[1] / "samples.npz").read_bytes()


def test_a_torn_batch_is_sampled_again_by_another_commit_too(project, checkpoint, whole, tmp_path, monkeypatch, capsys):
    options = f"--eval_bsz 4 --save_images png,npz --fid_stats {project}/images/val"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(manifest, "code_version", lambda: "abc")
        seams.interrupt(patch, seams.METRICS)
        evaluate(project, checkpoint, tmp_path / "out", options)
    torn = tmp_path / "out" / "partial" / "batch-000001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    (tmp_path / "out" / "images" / "000002.png").write_bytes(b"")  # of another batch, whose features are whole
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    (tmp_path / "out" / "settings.json").write_text(json.dumps({**settings, "code_sha256": "of an earlier version", "num_step_schedule": "linear"}))
    sampled = seams.count(monkeypatch, seams.LATENTS)
    assert same_figures(evaluate(project, checkpoint, tmp_path / "out", options), whole[0]) and len(sampled) == 2
    assert np.array_equal(pictures(tmp_path / "out"), pictures(whole[1]))
    assert "contains results of commit abc, the current commit is" in capsys.readouterr().out


def test_other_settings_in_the_same_place_are_refused(project, checkpoint, tmp_path):
    evaluate(project, checkpoint, tmp_path, "--num_images 2")
    for extra, message in (("--cfg 3", "cfg 2.0, now it is 3.0"), ("--weights raw", "weights ema, now it is raw")):
        with pytest.raises(FlowARError, match=f"with {message}: choose another --output_dir"):
            evaluate(project, checkpoint, tmp_path, f"--num_images 2 {extra}")


# ---- bound to content, not to places and code ----------------------------------------------------------------------


def test_a_moved_run_is_known_again(project, checkpoint, colors, tmp_path, monkeypatch, capsys):
    """Checkpoint, VAE, reference and output elsewhere: the same evaluation, at once."""
    for name, source in {"run": checkpoint, "images": project / "images" / "val"}.items():
        shutil.copytree(source, tmp_path / "a" / name)
    shutil.copy(project / "vae.pth", tmp_path / "a" / "vae.pth")
    first = evaluate(tmp_path / "a", tmp_path / "a" / "run", tmp_path / "a" / "out", f"{colors} --fid_stats {tmp_path}/a/images")
    assert len(first["labels_sha256"]) == len(first["reference_sha256"]) == 64
    (tmp_path / "a").rename(tmp_path / "b")
    calls = [seams.count(monkeypatch, seam) for seam in (seams.LATENTS, (metrics, "extract_folder"))]
    again = evaluate(tmp_path / "b", tmp_path / "b" / "run", tmp_path / "b" / "out", f"{colors} --fid_stats {tmp_path}/b/images")
    assert again == first and "already evaluated" in capsys.readouterr().out
    assert calls == [[], []]  # no image, no feature
    (tmp_path / "b" / "images" / "3" / "000.png").unlink()
    with pytest.raises(FlowARError, match="with reference_sha256 .*: choose another"):
        evaluate(tmp_path / "b", tmp_path / "b" / "run", tmp_path / "b" / "out", f"{colors} --fid_stats {tmp_path}/b/images")
    torch.save({**torch.load(checkpoint / "checkpoint-last.pth", weights_only=True), "more": 1}, tmp_path / "other.pth")
    with pytest.raises(FlowARError, match="with checkpoint_sha256 "):
        evaluate(tmp_path / "b", tmp_path / "other.pth", tmp_path / "b" / "out", colors)


def test_pictures_of_another_evaluation_are_not_mixed_with_these(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "000023.png").touch()
    with pytest.raises(FlowARError, match="with cfg None, now it is 2: choose another --output_dir"):
        store.Store(tmp_path).resume({"cfg": 2, "save_images": True}, {0: range(4)})


def test_a_sweeps_table_has_rows_of_other_settings_alike(project, checkpoint, tmp_path, capsys):
    evaluate(project, checkpoint, tmp_path, "--cfg 1,2 --num_images 2 --num_step 2")
    evaluate(project, checkpoint, tmp_path, "--cfg 2,3 --num_images 2 --num_step 2")
    assert [row["cfg"] for row in csv.DictReader((tmp_path / "results.csv").open())] == ["1.0", "2.0", "3.0"]
    evaluate(project, checkpoint, tmp_path, "--cfg 4,5 --num_images 2 --num_step 2 --weights raw")
    assert [row["cfg"] for row in csv.DictReader((tmp_path / "results.csv").open())] == ["4.0", "5.0"]
    assert "3 results with other settings are not in the table" in capsys.readouterr().out


# ---- sweeps and solvers ------------------------------------------------------------------------------------------


def test_sweep(project, checkpoint, colors, tmp_path):
    evaluate(project, checkpoint, tmp_path, f"--cfg 1,2.5 --guidance 0.5,1 --num_step 4 {colors} --fid_stats {project}/images/val")
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [(row["cfg"], row["guidance"]) for row in rows] == [("1.0", "0.5"), ("1.0", "1.0"), ("2.5", "0.5"), ("2.5", "1.0")]
    metric = "frechet_distance_colors"
    assert rows[0][metric] == rows[1][metric] != rows[3][metric]  # without guidance its interval changes nothing
    single = json.loads((tmp_path / "cfg2.5_guidance0.5" / "results.json").read_text())
    assert float(rows[2][metric]) == single[metric] and float(rows[2]["nfe"]) == 12
    assert Image.open(tmp_path / "sweep.png").size == (1200, 400)
    assert {path.parent.name for path in tmp_path.rglob("run.json")} == {f"cfg{cfg}_guidance{guidance}" for cfg in (1.0, 2.5) for guidance in (0.5, 1.0)}


def test_evaluations_of_the_network_are_reported(project, checkpoint, tmp_path):
    evaluate(project, checkpoint, tmp_path, "--solver euler,heun --num_step_last 4 --guidance 1 --num_images 2")
    for solver, nfe, at_zero in (("euler", [6, 4, 4], 0), ("heun", [12, 8, 8], 2)):  # guidance acts neither at time 0 nor at the first scale
        report = json.loads((tmp_path / f"solver{solver}" / "results.json").read_text())
        assert report["nfe"] == nfe and report["flow_head_passes_per_image"] == nfe[0] + 2 * sum(nfe[1:]) - at_zero


# ---- during training ---------------------------------------------------------------------------------------------


def test_online_evaluation_leaves_training_alone(project, colors, tmp_path):
    common, online = "--eval_freq 1 --attn_dropout 0.2", f"--online_eval {colors}"
    plain = train(project, tmp_path / "plain", common)
    watched = train(project, tmp_path / "watched", f"{common} {online} --num_images 6 --fid_stats {project}/images/val")
    assert all(torch.equal(plain[key][name], watched[key][name]) for key in ("model", "model_ema") for name in plain[key])
    for epoch in (1, 2):
        result = json.loads((tmp_path / "watched" / f"eval_epoch000{epoch}" / "results.json").read_text())
        assert result["frechet_distance_colors"] > 0 and result["num_images"] == 6 and result["epoch"] == epoch
    lines = [json.loads(line) for line in (tmp_path / "watched" / "log.jsonl").read_text().splitlines()]
    assert "frechet_distance_colors" in [line for line in lines if line["group"] == "eval"][0]


def test_pictures_that_are_not_finite_end_no_training(project, colors, tmp_path, monkeypatch, capsys):
    seams.wrap(monkeypatch, seams.DECODED, lambda original, *args: (original(*args)[0], torch.zeros(len(args[1]), dtype=torch.bool)))
    train(project, tmp_path, f"--epochs 1 --online_eval {colors} --num_images 6 --fid_stats {project}/images/val")
    assert "warning: evaluation skipped: 6 of 6 images are not finite" in capsys.readouterr().out and not list(tmp_path.glob("eval*/results.json"))


# ---- bad input ---------------------------------------------------------------------------------------------------


def test_geometry_comes_from_the_checkpoint_and_explicit_options_agree(project, checkpoint, tmp_path):
    trained = torch.load(checkpoint / "checkpoint-last.pth", weights_only=True)
    for extra in ("", GEOMETRY):
        args = parse_options(EvaluationOptions, shlex.split(evaluation_command(project, checkpoint, tmp_path, extra))[1:])
        sampler, description, *_ = open_for_sampling(args, torch.device("cpu"))
        assert description["model"] == "flowar_tiny" and sampler.model.scale == (1, 2, 4) and sampler.vae.stride == 4
    for name, value in sampler.model.state_dict().items():
        expected = trained["model_ema"][name]
        assert torch.equal(value[tuple(map(slice, expected.shape))], expected)  # layers are padded for sampling


def test_images_that_are_not_finite_are_named_and_never_averaged(project, checkpoint, tmp_path, monkeypatch):
    made = itertools.count()

    def spoiled(original, *args):
        images, finite = original(*args)
        return images, finite & torch.tensor([index not in (3, 9) for index in itertools.islice(made, len(images))])

    seams.wrap(monkeypatch, seams.DECODED, spoiled)
    with pytest.raises(FlowARError, match="2 of 10 images are not finite: 3, 9; "):
        evaluate(project, checkpoint, tmp_path, "--eval_bsz 4")
    assert not (tmp_path / "results.json").exists()
