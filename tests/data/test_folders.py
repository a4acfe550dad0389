"""Which files are data: one rule, in torchvision's order, and nothing left out without a word."""
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from scripts.studies.runs import write_digits
from torchvision.datasets import ImageFolder

from models import FlowARError
from util.data import Images
from util.data.folders import advice, list_classes, list_files
from util.data.inspection import inspect, sample_advice
from util.evaluation.references import class_counts

PICTURE = Image.new("RGB", (4, 4), (200, 10, 10))


def put(root, *names):
    for name in names:
        path = os.path.join(os.fsencode(root), name if isinstance(name, bytes) else os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            PICTURE.save(file, "PNG")
    return root


def names(listing):
    return [(listing.name(i), listing[i][1]) for i in range(len(listing))]


def test_ordinary_folders_are_read_as_by_torchvision(tmp_path):
    write_digits(tmp_path, 3, splits=("train",))
    put(tmp_path / "train", "3/b/1.png", "3/a c/1.png", "3/a/z.png", "3/a/B.PNG", "10/x.jpeg", "Z/é.bmp", "Z/00.webp")
    found, expected = list_classes(tmp_path / "train"), ImageFolder(tmp_path / "train")
    assert list(found) == expected.samples and found.classes == expected.classes
    assert found.counts == np.bincount(expected.targets).tolist()


def test_what_is_hidden_or_a_systems_is_no_image_and_no_class(tmp_path):
    put(tmp_path, "a/1.png", "b/2.png", "a/._1.png", "a/.ipynb_checkpoints/1.png", ".thumbnails/1.png", "__MACOSX/a/1.png", "a/@eaDir/1.png", "lost+found/x.png")
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"x")
    found = list_classes(tmp_path)
    assert names(found) == [("a/1.png", 0), ("b/2.png", 1)] and found.classes == ["a", "b"]
    assert found.summary() == "2 images; left out: 7 hidden or a system's"
    assert [found.name(0), len(list_files(tmp_path))] == ["a/1.png", 2]


SUFFIXES = ("jpg", "JPG", "jpeg", "jpe", "jfif", "png", "PNG", "apng", "webp", "bmp", "dib", "gif", "ppm", "pgm", "pbm", "pnm", "tif", "tiff", "TIFF", "jp2",
            "avif", "heic", "heif")


def test_one_list_of_suffixes_and_others_are_counted(tmp_path):
    put(tmp_path, *(f"a/{i:02d}.{suffix}" for i, suffix in enumerate(SUFFIXES)), "a/x.txt", "a/y.txt", "a/z.psd", "a/plain", "top.png", "top.csv")
    found = list_classes(tmp_path)
    assert len(found) == len(SUFFIXES) == len(list_files(tmp_path)) - 1
    assert found.left_out == {".txt": 2, ".psd": 1, "without a suffix": 1, "outside of the class folders": 1, ".csv": 1}


def test_links_are_followed_once(tmp_path):
    put(tmp_path / "data", "a/1.png", "a/deep/2.png", "b/3.png")
    put(tmp_path / "elsewhere", "4.png")
    for link, target in (("data/a/loop", "."), ("data/a/up", ".."), ("data/a/again", "deep"), ("data/b/other", "../../elsewhere"), ("data/b/5.png", "3.png"),
                         ("data/b/gone.png", "nowhere"), ("data/b/circle.png", "circle.png"), ("data/all", "."), ("data/c", "../elsewhere"), ("data/alias", "b")):
        (tmp_path / link).symlink_to(target)
    found = list_classes(tmp_path / "data")
    assert names(found) == [("a/1.png", 0), ("a/deep/2.png", 0), ("b/3.png", 1), ("b/5.png", 1), ("c/4.png", 2)]
    assert found.left_out == {"folders already read": 6, "links to nothing": 2}


def test_a_folder_is_read_where_it_is_and_not_through_a_link_before_it(tmp_path):
    """References count classes by the folders at the top, as training does."""
    put(tmp_path, "a/1.png", "b/2.png", "b/deep/3.png", "b/deep/er/4.png")
    for link, target in (("a/all", "../b"), ("b/again", "deep")):
        (tmp_path / link).symlink_to(target)
    whole, classes = list_files(tmp_path), list_classes(tmp_path)
    assert [whole.name(i) for i in range(len(whole))] == ["a/1.png", "b/2.png", "b/deep/3.png", "b/deep/er/4.png"]
    assert class_counts(whole) == {"a": 1, "b": 3} and names(classes) == [(whole.name(i), int(i > 0)) for i in range(4)]


def test_names_are_bytes(tmp_path):
    odd = [b"n\xe9w/a\nb .png", b"n\xe9w/\xff\xfe.png", b" sp ace/tab\t.png"]
    put(tmp_path, *odd)
    data = Images(tmp_path, 4)
    assert sorted(os.fsencode(data.folder.name(i)) for i in range(3)) == sorted(odd)
    assert all(data[(0, i)][0].shape == (3, 4, 4) for i in range(3))
    assert [os.fsencode(name) for name in data.classes] == [b" sp ace", b"n\xe9w"] and data.identity()["counts"] == [1, 2]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    put(tmp_path, "a/1.png", "a/deep/2.png")
    original = os.scandir

    def scandir(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(FlowARError, match="a/deep: this folder cannot be read .Permission denied"):
        list_classes(tmp_path)


@pytest.mark.parametrize("files,message", [
    ((), "no class folders .expected images in class folders"), (("1.png", "2.png"), "2 images but no class folders: put them into a folder for each class"),
    (("a/x.txt", "b/.hidden.png"), "no images in its class folders .a, b; expected images in class folders; left out: 1 .txt, 1 hidden")])
def test_folders_without_images_are_named(tmp_path, files, message):
    put(tmp_path, *files)
    with pytest.raises(FlowARError, match=message):
        list_classes(tmp_path)


@pytest.mark.parametrize("files,line", [
    (("train/a/1.png", "train/b/1.png"), "one class folder, train: every image gets the same label"),
    (("train/a/1.png", "train/b/1.png"), "1 of 1 class folders hold only folders (train): an image in train/a gets the label of train"),
    (("rosa/alba/1.png", "acer/rubrum/1.png"), "2 of 2 class folders hold only folders (acer, rosa): an image in acer/rubrum gets the label of acer"),
    (("1/1.png", "2/1.png", "10/1.png"), "class names are numbers but are in the order of text, so label 1 is folder 10"),
    (("a/1.png", "b/x.txt", "c/1.png"), "1 of 3 class folders hold no image (b): they keep their labels and are not trained")])
def test_what_looks_like_a_mistake_is_said(tmp_path, files, line):
    put(tmp_path, *files)
    assert any(found.startswith(line) for found in advice(list_classes(tmp_path)))


def test_nothing_is_said_of_ordinary_folders(tmp_path):
    write_digits(tmp_path, 2, splits=("train",))
    put(tmp_path / "train", "0/more/1.png")
    listing = list_classes(tmp_path / "train")
    assert advice(listing) == [] and sample_advice(listing, 4) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_all_bad_images_are_found_at_once(tmp_path, workers):
    put(tmp_path, *(f"a/{i:03d}.png" for i in range(300)))
    (tmp_path / "a" / "007.png").write_bytes(b"<html>")
    (tmp_path / "a" / "290.png").write_bytes(b"")
    listing = list_classes(tmp_path)
    bad = {index: look.error for index, look in inspect(listing, np.arange(300), workers) if look.error}
    assert list(bad) == [7, 290] and "007.png: cannot be read as an image: it is a web page" in bad[7]
    said = sample_advice(listing, 8)
    assert said[0].startswith("2 of 300 images looked at cannot be read, such as ") and "python scripts/check_images.py" in said[0]
    assert said[1].startswith("298 of 298 images looked at are smaller than --img_size 8 (shorter side 4 to 4 pixels")


def test_whole_images_are_decoded_if_asked(tmp_path):
    put(tmp_path, "a/1.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "a" / "1.png")
    content = (tmp_path / "a" / "1.png").read_bytes()
    (tmp_path / "a" / "2.png").write_bytes(content[:len(content) // 2])
    found = [[bool(look.error) for _, look in inspect(list_classes(tmp_path), np.arange(2), whole=whole)] for whole in (False, True)]
    assert found == [[False, False], [False, True]]


def test_identity_follows_names_and_sizes(tmp_path):
    put(tmp_path / "one", "a/1.png", "b/2.png")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    first, second = (list_classes(tmp_path / name).identity() for name in ("one", "two"))
    assert first == second and first["images"] == 2 and first["counts"] == [1, 1]
    (tmp_path / "two" / "a" / "1.png").write_bytes(b"longer or shorter")
    os.rename(tmp_path / "one" / "b" / "2.png", tmp_path / "one" / "b" / "3.png")
    assert len({first["sha256"], *(list_classes(tmp_path / name).identity()["sha256"] for name in ("one", "two"))}) == 3
