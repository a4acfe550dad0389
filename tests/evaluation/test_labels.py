"""Which classes the images of an evaluation are of, and the distance between folders of images."""
import sys

from scripts import distance
import numpy as np
import pytest
import torch
from helpers import evaluate, make_project, train

from models import FlowARError
from util.evaluation.extractors import Extractor, Joint
from util.evaluation.labels import Classes, choose_labels, classes_of, image_label, warn_of_mix
from util.evaluation.references import Reference
from util.files import read_json

FEW = {"classes": ["ant", "bee", "cat", "dog"], "counts": [90, 0, 9, 1], "images": 100, "sha256": "x"}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A run whose checkpoint says FEW of its data."""
    p = make_project(tmp_path_factory.mktemp("project"))
    content = train(p, p / "run", "--epochs 1")
    (p / "few").mkdir()
    torch.save({**content, "data": FEW}, p / "few" / "checkpoint-last.pth")
    return p


def test_balanced_labels_are_the_published_ones():
    found = choose_labels("balanced", 50000, Classes(1000)).values
    assert found.dtype == np.int64 and found.tolist() == [i * 1000 // 50000 for i in range(50000)]
    assert choose_labels("balanced", 50000, Classes(1000, None, np.full(1000, 3))).values.tolist() == found.tolist()
    uneven = np.bincount([image_label(i, 2003, 10) for i in range(2003)])
    assert uneven.max() - uneven.min() <= 1


def test_classes_without_training_images_are_not_sampled():
    few = classes_of(FEW, 1000, "x.pth")
    assert set(choose_labels("balanced", 9, few).values) == {0, 2, 3}


def test_training_proportions_are_exact():
    counts = np.array([1300, 0, 732, 1, 977, 2**52])
    for total in (1, 7, 50000, 2**21):
        found = np.bincount(choose_labels("train", total, Classes(6, None, counts)).values, minlength=6)
        shares = [total * int(count) / sum(map(int, counts)) for count in counts]
        assert found.sum() == total and all(abs(a - b) < 1 for a, b in zip(found, shares)) and found[1] == 0
    assert np.bincount(choose_labels("train", 10, Classes(3, None, np.array([1, 1, 1]))).values).tolist() == [4, 3, 3]
    assert np.bincount(choose_labels("train", 10, Classes(3, None, np.array([5, 3, 2]))).values).tolist() == [5, 3, 2]


@pytest.mark.parametrize("text,expected", [
    ("ant\ncat\n0\n2\n", [0, 2, 0, 2]), ("\ufeff3\r\n ant \r\n0\r\n0", [3, 0, 0, 0]),
    ("0\n0\n0\nbee", [0, 0, 0, 1]),
    ("0\n0\n0", "3 lines, but --num_images is 4: use --num_images 3"), ("0\n10\n0\n0", "line 2 is '10', expected a label from 0 to 9")])
def test_labels_of_a_file(tmp_path, text, expected):
    file, few = tmp_path / "labels.txt", classes_of(FEW, 10, "x.pth")
    file.write_text(text, newline="")
    if isinstance(expected, list):
        assert choose_labels(str(file), 4, few).values.tolist() == expected
    else:
        with pytest.raises(FlowARError, match=f"--labels .*labels.txt: {expected}"):
            choose_labels(str(file), 4, few)


def test_numbers_that_name_other_classes_are_labels(tmp_path):
    file, numbers = tmp_path / "labels.txt", Classes(10, sorted(map(str, range(1, 11))), np.ones(10, int))
    file.write_text("1\n2\n")
    assert choose_labels(str(file), 2, numbers).values.tolist() == [1, 2]


def test_a_checkpoint_that_knows_more_classes_than_the_model_is_refused():
    with pytest.raises(FlowARError, match="x.pth: was trained on 11 classes, but the model has 10"):
        classes_of({"classes": list("abcdefghijk"), "counts": [1] * 11}, 10, "x.pth")
    assert classes_of({"images": 3}, 10, "x.pth") == classes_of({}, 10, "x.pth") == Classes(10)


def test_evaluation_samples_what_was_trained(project, tmp_path, capsys):
    report = evaluate(project, project / "few", tmp_path / "few", "--save_images npz --num_step 2")
    assert "7 of 10 classes have no training images and are not sampled (to sample them, pass a file to --labels)" in capsys.readouterr().out
    with np.load(tmp_path / "few" / "samples.npz") as file:
        assert file["arr_1"].tolist() == [0, 0, 0, 0, 2, 2, 2, 3, 3, 3]
    assert (report["labels"], report["classes_sampled"]) == ("balanced", 3)


def test_training_knows_its_own_counts(tmp_path, capsys):
    """Online evaluation in the proportions of the training images, the reference of another mix."""
    p = make_project(tmp_path, 8)
    for path in sorted((p / "images" / "train" / "0").iterdir())[2:]:
        path.unlink()
    train(p, p / "run", f"--epochs 1 --batch_size 8 --eval_freq 1 --online_eval --num_images 6 --labels train --fid_stats {p}/images/val "
          "--class_num 12 --feature_extractor efficientnet-lite0")
    report = read_json(p / "run" / "eval_epoch0001" / "results.json")
    assert (report["labels"], report["classes_sampled"], report["num_images"]) == ("train", 6, 6)
    out = capsys.readouterr().out
    assert f"class proportions of the reference {p}/images/val and the samples differ by" in out


@pytest.mark.parametrize("kind,classes,reference,share", [
    ("balanced", Classes(3), {"a": 300, "b": 100, "c": 50}, "33%"), ("balanced", Classes(3), {"a": 30, "b": 30, "c": 31}, None),
    ("train", Classes(3, list("abc"), np.array([300, 100, 50])), {"c": 50, "b": 100, "a": 300}, None),
    ("balanced", Classes(4, list("abc"), np.array([3, 1, 5, 0])), {"a": 9, "b": 9, "x": 9}, "33%")])
def test_a_reference_of_another_mix_is_said(capsys, kind, classes, reference, share):
    warn_of_mix(choose_labels(kind, 60, classes), Reference("ref", classes=reference))
    found = capsys.readouterr().out
    assert (share is None and not found) or f"the samples differ by {share}, which raises the distance" in found


# ---- the distance between folders ----------------------------------------------------------------------------------


class Means(Extractor):
    """A feature network of the 16 means of an image's squares: distances cost no time."""
    name, dim, batch, resize = "means", 16, 8, "none"

    def forward(self, images):
        return {"features": torch.nn.functional.adaptive_avg_pool2d(images.float().mean(1), 4).flatten(1)}


def ask(monkeypatch, capsys, *options):
    """[(what, distance, images)] that the script prints."""
    monkeypatch.setattr(distance, "build_extractors", lambda *args: Joint([Means()]))
    monkeypatch.setattr(sys, "argv", ["distance.py", *map(str, options), "--device", "cpu"])
    distance.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("frechet_distance")]
    parts = [line.removeprefix("frechet_distance_means of ").rpartition(": ") for line in lines]
    return [(what, float(value.split()[0]), value.split(" ", 1)[1]) for what, _, value in parts]


def test_distance_script(project, monkeypatch, capsys):
    a, b = project / "images" / "train", project / "images" / "train" / "0"
    whole, half, *floors = ask(monkeypatch, capsys, a, b)
    assert whole[0] == half[0] == f"{a} to {b}" and (whole[2], half[2]) == ("(80 and 8 images)", "(4 and 4 images)")
    assert [what for what, *_ in floors] == [f"two halves of {folder}, the floor" for folder in (a, b)]
    same, apart, floor, again = ask(monkeypatch, capsys, a, a)
    assert abs(same[1]) < 1e-2 < 10 * floor[1] and apart[1] == floor[1] == again[1] > 10  # halves of one folder have no image in common
    assert ask(monkeypatch, capsys, "--halves", a) == ask(monkeypatch, capsys, a) == [floor]
    assert ask(monkeypatch, capsys, a, "--seed", 1)[0][1] != floor[1]
    through, *_ = ask(monkeypatch, capsys, a, "--vae_path", project / "vae.pth")
    assert through[0] == f"{a} to itself through the VAE {project}/vae.pth" and through[1] > floor[1]  # it is untrained
