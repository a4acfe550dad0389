"""Which files are data: one rule, in torchvision's order, and nothing left out without a word."""
import os
import shutil

import numpy as np
import pytest
from helpers import call
from PIL import Image
from scripts.studies.runs import write_digits

from models import FlowARError
from util.data import Images, find_split, list_images
from util.data.folders import Folder
from util.evaluation.references import count_classes

PICTURE = Image.new("RGB", (4, 4), (200, 10, 10))


def put(root, *names):
    for name in names:
        path = os.path.join(os.fsencode(root), name if isinstance(name, bytes) else os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            PICTURE.save(file, "PNG")
    return root


def names(listing):
    return [(listing.name(i), int(listing.labels[i])) for i in range(len(listing))]


def test_ordinary_folders_are_read_as_by_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder  # late, as all that is heavy: each process imports every file of tests

    write_digits(tmp_path, 3, splits=("train",))
    put(tmp_path / "train", "3/b/1.png", "3/a c/1.png", "3/a/z.png", "3/a/B.PNG", "10/x.jpeg", "Z/é.bmp", "Z/00.webp")
    found, expected = Folder(tmp_path / "train"), ImageFolder(tmp_path / "train")
    assert [(found.path(i), int(found.labels[i])) for i in range(len(found))] == expected.samples and found.classes == expected.classes
    assert found.counts == np.bincount(expected.targets).tolist()


def test_what_is_hidden_or_a_systems_is_no_image_and_no_class(tmp_path, monkeypatch):
    put(tmp_path, "a/1.png", "b/2.png", "a/._1.png", "a/.ipynb_checkpoints/1.png", ".thumbnails/1.png", "__MACOSX/a/1.png", "a/@eaDir/1.png", "lost+found/x.png")
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"x")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    found = list_images(f"~/{tmp_path.name}")
    assert names(found) == [("a/1.png", 0), ("b/2.png", 1)] and found.classes == ["a", "b"]
    assert found.summary() == "2 images; left out: 7 hidden or system files"


def test_suffixes_in_any_case_and_others_are_counted(tmp_path):
    put(tmp_path, *(f"a/{i:02d}.{suffix}" for i, suffix in enumerate(("jpg", "JPG", "Jpeg", "tiff", "heic"))), "a/x.txt", "a/y.txt", "a/z.psd", "a/plain", "top.png", "top.csv")
    found = list_images(tmp_path)
    assert len(found) == 5 and found.left_out == {".txt": 2, ".psd": 1, "without a suffix": 1, "outside the class folders": 1, ".csv": 1}


def test_images_outside_of_class_folders_are_left_out_by_one_rule(tmp_path):
    put(tmp_path, "a/1.png", "b/2.png", "top.png")
    found = list_images(tmp_path, flat=True)
    assert names(found) == [("a/1.png", 0), ("b/2.png", 1)] and found.left_out == {"outside the class folders": 1}
    assert list_images(tmp_path).identity() == found.identity() and count_classes(found) == {"a": 1, "b": 1}


def test_a_flat_set_is_one_without_classes(tmp_path):
    put(tmp_path, "1.png", "2.png", ".hidden/3.png")
    (tmp_path / "empty").mkdir()
    found = list_images(tmp_path, flat=True)
    assert names(found) == [("1.png", 0), ("2.png", 0)] and found.classes == [] and found.summary() == "2 images; left out: 1 hidden or system files"


def test_links_are_followed_and_loops_end_without_numbers_of_files_too(tmp_path, monkeypatch):
    stat = os.stat  # file systems that make their numbers up
    monkeypatch.setattr(os, "stat", lambda *args, **options: os.stat_result((*(found := stat(*args, **options))[:1], 0, *found[2:])))
    put(tmp_path / "data", "a/1.png", "a/deep/2.png", "b/3.png")
    put(tmp_path / "elsewhere", "4.png")
    for link, target in (("data/a/loop", "."), ("data/a/up", ".."), ("data/b/other", "../../elsewhere"), ("data/b/5.png", "3.png"), ("data/c", "../elsewhere")):
        (tmp_path / link).symlink_to(target)
    found = list_images(tmp_path / "data")
    assert names(found) == [("a/1.png", 0), ("a/deep/2.png", 0), ("b/3.png", 1), ("b/5.png", 1), ("b/other/4.png", 1), ("c/4.png", 2)]
    assert found.left_out == {"folders already read": 2}
    (tmp_path / "data" / "b" / "gone.png").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match="b/gone.png"):
        list_images(tmp_path / "data")


def test_names_are_bytes(tmp_path):
    odd = [b"n\xe9w/a\nb .png", b"n\xe9w/\xff\xfe.png", b" sp ace/tab\t.png"]
    put(tmp_path, *odd)
    data = Images(tmp_path, 4)
    assert sorted(os.fsencode(data.listing.name(i)) for i in range(3)) == sorted(odd)
    assert all(data[(0, i)][0].shape == (3, 4, 4) for i in range(3))
    assert [os.fsencode(name) for name in data.classes] == [b" sp ace", b"n\xe9w"] and data.identity()["counts"] == [1, 2]


@pytest.mark.parametrize("files,message", [
    (("a/x.txt",), "0 images; left out: 1 .txt; expected images in class folders"),
    (("a.zip", "b.zip"), "0 images; left out: 2 .zip; unpack them in place: for z in .*zip; do unzip -qd"),
    (("1.png", "2.png", "1.json"), "2 images; left out: 1 .json; no class folders found .label files are not read.: put the images into one folder per class"),
    (("train/a/1.png", "train/b/1.png"), "the only class folder contains just folders, such as train/a: if these are the classes, move them up")])
def test_folders_without_images_or_classes_are_named(tmp_path, files, message):
    put(tmp_path, *files)
    with pytest.raises(FlowARError, match=message):
        list_images(tmp_path)


def test_a_class_may_hold_one_folder_or_images_beside_folders(tmp_path):
    """As Tiny ImageNet's n01443537/images/."""
    put(tmp_path / "one", "a/images/1.png", "b/images/2.png")
    put(tmp_path / "beside", "a/1.png", "a/x/2.png", "a/y/3.png")
    assert list_images(tmp_path / "one").counts == [1, 1] and list_images(tmp_path / "beside").counts == [3]


@pytest.mark.parametrize("files,place,message", [
    (("train/a/1.png",), "train", "train: train/ not found, only a: expected train/ and val/, each with one folder per class"),
    ((), "nowhere", "nowhere: not found: expected a folder, archive .* or dataset")])
def test_a_path_that_is_one_folder_off_is_named_with_what_is_there(tmp_path, files, place, message):
    put(tmp_path, *files)
    with pytest.raises(FlowARError, match=f"--data_path .*{message}"):
        find_split(tmp_path / place, "train")
    assert find_split(tmp_path / place, "val", needed=False) is None


def test_bad_images_and_possible_mistakes_are_listed(tmp_path, monkeypatch, capsys):
    put(tmp_path, *(f"{i}/{i:03d}.png" for i in range(1, 12)), "5/nested/1.png", "only/deeper/1.png")
    (tmp_path / "7" / "bad.png").write_bytes(b"<html>")
    content = (tmp_path / "1" / "001.png").read_bytes()
    (tmp_path / "9" / "half.png").write_bytes(content[:len(content) // 2])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FlowARError, match="2 of 15 images cannot be read .listed above."):
        call(monkeypatch, f"scripts/check_images.py {tmp_path} --img_size 8 --num_workers 1")
    printed = capsys.readouterr().out
    assert "15 images\n" in printed and "7/bad.png: cannot be read as an image" in printed and "9/half.png: cannot be read" in printed
    for line in ("1 of 13 class folders contain no images (empty), but count", "1 of 13 class folders contain only folders (only)", "13 of 13 images are smaller than"):
        assert f"warning: {line}" in printed, line
    shutil.rmtree(tmp_path / "only")
    shutil.rmtree(tmp_path / "empty")
    for bad in ("7/bad.png", "9/half.png"):
        (tmp_path / bad).unlink()
    call(monkeypatch, f"scripts/check_images.py {tmp_path} --img_size 4 --num_workers 0")
    assert capsys.readouterr().out.count("warning: ") == 1  # numbers in the order of text


def test_identity_follows_names_and_sizes(tmp_path):
    put(tmp_path / "one", "a/1.png", "b/2.png")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    first, second = (list_images(tmp_path / name).identity() for name in ("one", "two"))
    assert first == second and first["images"] == 2 and first["counts"] == [1, 1]
    (tmp_path / "two" / "a" / "1.png").write_bytes(b"longer or shorter")
    os.rename(tmp_path / "one" / "b" / "2.png", tmp_path / "one" / "b" / "3.png")
    assert len({first["sha256"], *(list_images(tmp_path / name).identity()["sha256"] for name in ("one", "two"))}) == 3
