"""A checkpoint knows its classes, its images and its VAE; what is at hand and differs is refused or said."""
import json
import shutil

import pytest
import torch
from helpers import GEOMETRY, make_project, train, training_command

import engine_flowar
from models import FlowARError
from util.command_line import parse_options
from util.options import TrainingOptions
from util.recipe import build_run
from util.training.record import LatentOrigin, check_data, check_origin, saved_origin

DATA = {"classes": ["cat", "dog", "owl"], "counts": [5, 5, 0], "images": 10, "sha256": "a" * 64}


@pytest.mark.parametrize("classes,message", [
    (["cat", "cow", "dog", "owl"], "label 1 was class dog, now it is cow"), (["cat", "dog"], "label 2 was class owl, now it is no class"),
    ([*DATA["classes"], "yak"], "label 3 was no class, now it is yak")])
def test_a_label_that_moved_or_has_no_room_is_refused_by_name(classes, message):
    with pytest.raises(FlowARError, match=f"run.pth: {message}: a class folder was added, renamed or removed; restore"):
        check_data({"data": DATA}, "run.pth", {**DATA, "classes": classes}, 3)


@pytest.mark.parametrize("now,said", [
    (DATA, ""), ({**DATA, "sha256": "b", "images": 12}, "the data has changed: 10 images of 3 classes, now 12 of 3"),
    ({**DATA, "sha256": "b", "classes": [*DATA["classes"], "yak"]}, "the data has changed: 10 images of 3 classes, now 10 of 4")])
def test_other_images_are_said(now, said, capsys):
    check_data({"data": DATA}, "run.pth", now, 5)
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("found,message", [
    (LatentOrigin("a", "1" * 64, (2.0, 0.0)), "its VAE is a .sha256 .*, but b has .*: use the same VAE"),
    (LatentOrigin("a", None, (1.0, 0.0)), r"latent scale and shift are \(1.0, 0.0\), those of b \(2.0, 0.0\): use")])
def test_latents_of_another_vae_or_scale_are_refused(found, message):
    with pytest.raises(FlowARError, match=f"what: {message}"):
        check_origin("what", found, LatentOrigin("b", "2" * 64, (2.0, 0.0)))


def test_latent_scales_of_many_numbers_are_compared_and_named_in_a_short_line():
    """Nested tuples, and the lists of a file; numbers that differ in the last."""
    ours, other = (LatentOrigin(name, "1" * 64, ((((1.0,) * 16,) * 15 + ((1.0,) * 15 + (end,),),) * 78, 0.0)) for name, end in (("a", 1.0), ("b", 1.5)))
    assert saved_origin({"vae": json.loads(json.dumps(ours._asdict()))}) == ours
    check_origin("what", ours, ours._replace(latent_scale=json.loads(json.dumps(ours.latent_scale))))
    with pytest.raises(FlowARError, match=r"^what: .* \('78 x 16 x 16 numbers \w{12}', 0.0\), those of b .*: use the VAE it was made with.{,200}$"):
        check_origin("what", ours, other)


def test_the_same_vae_in_another_file_is_the_same():
    check_origin("what", LatentOrigin("a", "1" * 64, (2.0, 0.0), "t"), LatentOrigin("b", "2" * 64, [2, 0], "t"))
    with pytest.raises(FlowARError, match="what: its VAE is a .tensors t., but b has tensors u"):
        check_origin("what", LatentOrigin("a", "1" * 64, None, "t"), LatentOrigin("b", "1" * 64, None, "u"))


def test_a_run_remembers_and_compares(tmp_path, capsys):
    project = make_project(tmp_path, per_class=4)
    images = project / "images" / "train"
    (images / "5" / "000.png").rename(images / "5" / "0 0\n0.png")
    for file in (images / "7").iterdir():
        file.unlink()
    content = train(project, tmp_path / "run", "--batch_size 6 --epochs 1")
    printed = capsys.readouterr().out
    assert "36 images in " in printed
    assert content["data"]["classes"] == [str(i) for i in range(10)] and content["data"]["counts"] == [4] * 7 + [0] + [4] * 2
    assert content["vae"]["name"] == f"--vae_path {project}/vae.pth" and content["vae"]["latent_scale"] == (2.0, pytest.approx(0.1))
    assert {path.name for path in (tmp_path / "run").glob("*.png")} == {"samples_epoch0001.png", "samples_epoch0001_raw.png"}
    shutil.copy(images / "1" / "000.png", images / "2" / "more.png")
    more = f"--resume {tmp_path}/run --batch_size 6 --epochs"
    train(project, tmp_path / "run", f"{more} 2")
    assert "the data has changed: 36 images of 10 classes, now 37 of 10" in capsys.readouterr().out
    (images / "55").mkdir()
    shutil.copy(images / "1" / "000.png", images / "55")
    with pytest.raises(FlowARError, match="label 6 was class 6, now it is 55"):
        train(project, tmp_path / "run", f"{more} 3")


def test_the_number_of_classes_follows_from_the_folders(tmp_path):
    """--class_num is not given: as many as there are folders, then the checkpoint's."""
    project = make_project(tmp_path, per_class=2)
    for label in range(7, 10):
        shutil.rmtree(project / "images" / "train" / str(label))
    for extra in ("--epochs 1", f"--epochs 2 --resume {tmp_path}/run"):
        words = training_command(project, tmp_path / "run", f"--batch_size 4 {extra}").replace(GEOMETRY, GEOMETRY.replace("--class_num 10", ""))
        engine_flowar.train(build_run(parse_options(TrainingOptions, words.split()[1:]), torch.device("cpu")))
        content = torch.load(tmp_path / "run" / "checkpoint-last.pth", weights_only=True)
        assert len(content["model"]["class_emb.weight"]) == 8 and content["args"]["class_num"] == 7


def test_a_val_that_cannot_be_used_is_left_out_with_a_word(tmp_path, capsys):
    project = make_project(tmp_path, per_class=2)
    shutil.rmtree(project / "images" / "val" / "3")
    train(project, tmp_path / "run", "--batch_size 10 --epochs 1")
    printed = capsys.readouterr().out
    assert "val: classes of the validation and training set differ (only in one of them: 3)" in printed
    assert "warning: no validation loss: " in printed and "val loss" not in printed
