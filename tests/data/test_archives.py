"""Archives of class folders give what the folders give, bit for bit, or are refused in a line."""
import json
import os
import pickle
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call, make_project, train
from PIL import Image

from models import FlowARError
from util.data import Images, build_loader, find_split, list_images

KINDS = ("stored.zip", "deflated.zip", "gnu.tar", "pax.tar", "absolute.tar")


def put(root, name, seed=0, size=24):
    path = os.path.join(os.fsencode(root), name if isinstance(name, bytes) else name.encode())
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 4), dtype=np.uint8)).save(file, "PNG")


def make_archive(folder, archive):
    """A folder's content, in the order of the disk, as users pack it."""
    kind = archive.name.rpartition(".")[0]
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED) as file:
            for path in sorted(Path(folder).rglob("*"), reverse=True):
                file.write(path, path.relative_to(folder))
    else:
        form = tarfile.PAX_FORMAT if kind == "pax" else tarfile.GNU_FORMAT
        with tarfile.open(archive, "w", format=form, encoding="utf-8", errors="surrogateescape") as file:
            file.add(folder, "/" if kind == "absolute" else ".")
    return archive


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Class folders with all that lies around on disks."""
    root = tmp_path_factory.mktemp("folder")
    names = ("b/2.png", "b/10.png", "b/a c/1.png", "b/a/z.png", "b/a/B.PNG", "a/1.png", "a/\né.png", "Z/" + "long" * 40 + ".png", "B/1.png", "B/2.png",
             "a/._1.png", "a/.ipynb_checkpoints/1.png", "a/.ipynb_checkpoints/2.png", "__MACOSX/a/1.png", "only_hidden/.x.png", "a/x.txt", "top.png", "top.csv")
    for split, first in (("train", 0), ("val", 100)):
        for i, name in enumerate(names):
            put(root / split, name, first + i)
        (root / split / "empty").mkdir()
    return root


@pytest.fixture(scope="module", params=KINDS)
def archive(folder, tmp_path_factory, request):
    return make_archive(folder, tmp_path_factory.mktemp("archive") / request.param)


def test_an_archive_gives_what_its_folders_give(folder, archive):
    for split in ("train", "val"):
        plain, packed = (Images(find_split(place, split), 16, 3, train=split == "train", background=(9, 8, 7)) for place in (folder, archive))
        assert packed.identity() == plain.identity() and packed.listing.left_out == plain.listing.left_out != {}
        assert packed.classes == ["B", "Z", "a", "b", "empty", "only_hidden"]
        assert [packed.listing.path(i) for i in range(len(packed))] == [plain.listing.path(i).replace(str(folder), str(archive)) for i in range(len(plain))]
        for key in ((1, i) for i in range(len(plain))):
            (one, label), (other, same) = plain[key], packed[key]
            assert torch.equal(one, other) and label == same
        sent = pickle.loads(pickle.dumps(packed.listing))  # as to other ranks
        assert [sent.read(i) for i in range(len(sent))] == [Path(plain.listing.path(i)).read_bytes() for i in range(len(sent))]


def test_names_that_are_no_utf8(tmp_path):
    put(tmp_path / "odd", b"n\xe9w/\xff\xfe.png")
    archive = tmp_path / "odd.tar"
    subprocess.run(["tar", "-cf", archive, "-C", tmp_path / "odd", "."], check=True)
    assert list_images(archive).identity() == list_images(tmp_path / "odd").identity()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_data_workers_read_at_once_what_one_process_reads(tmp_path):
    """Also where they inherit an archive that is open: a shared position would mix the images up."""
    for i in range(60):
        put(tmp_path / "images", f"{i % 3}/{i}.png", i, size=16)
    for name in ("deflated.zip", "gnu.tar"):
        data = Images(make_archive(tmp_path / "images", tmp_path / name), 16)
        alone = torch.stack([data[(0, i)][0] for i in range(60)])
        loader = build_loader(data, 5, num_workers=4)
        for _ in range(3):
            assert torch.equal(torch.cat([images for images, _ in loader]), alone)


def test_a_training_and_a_cache_are_those_of_the_folder(tmp_path, monkeypatch):
    project = make_project(tmp_path, per_class=4)
    make_archive(project / "images", tmp_path / "deflated.zip")
    plain, zipped = (train(project, tmp_path / f"run_{name}", f"--epochs 1 --data_path {tmp_path}/{name}") for name in ("images", "deflated.zip"))
    assert zipped["data"] == plain["data"] and all(torch.equal(zipped["model"][key], value) for key, value in plain["model"].items())
    command = f"scripts/cache_latents.py --cached_path {tmp_path}/cache --vae_path {project}/vae.pth --img_size 16 --num_workers 0 --device cpu"
    call(monkeypatch, f"{command} --data_path {project}/images")
    call(monkeypatch, f"{command} --data_path {tmp_path}/deflated.zip")  # the finished cache is one of these images


# ---- dataset.json ----------------------------------------------------------------------------------------------


def edm(path, labels, images=4):
    """A zip as EDM's dataset_tool writes it: folders of thousands, labels beside."""
    with zipfile.ZipFile(path, "w") as file:
        for i in range(images):
            put(path.parent, "one.png", i, 16)
            file.write(path.parent / "one.png", f"0000{i % 2}/img{i:08d}.png")
        file.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def test_labels_of_edms_tools(tmp_path):
    names = [f"0000{i % 2}/img{i:08d}.png" for i in range(4)]
    data = Images(edm(tmp_path / "train.zip", [[name, label] for name, label in zip(names, (10, 0, 0, 2))]), 16)
    assert [(data.listing.name(i), data[(0, i)][1]) for i in range(4)] == [(names[0], 10), (names[2], 0), (names[1], 0), (names[3], 2)]
    assert data.classes == [f"{label:02d}" for label in range(11)] and not data.listing.left_out
    zipfile.ZipFile(tmp_path / "train.zip").extractall(tmp_path / "unpacked")
    assert list_images(tmp_path / "unpacked").identity() == data.identity()
    swapped = Images(edm(tmp_path / "swapped.zip", [[name, label] for name, label in zip(names, (10, 0, 2, 0))]), 16).identity()
    assert swapped["counts"] == data.identity()["counts"] and swapped["sha256"] != data.identity()["sha256"]


def test_labels_that_do_not_fit_the_images_are_refused(tmp_path):
    labels = [[f"0000{i % 2}/img{i:08d}.png", 0] for i in range(5)]
    with pytest.raises(FlowARError, match="dataset.json: labels and images do not match .00000/img00000004.png only in one of them"):
        list_images(edm(tmp_path / "train.zip", labels))
    with pytest.raises(FlowARError, match="dataset.json: labels are null: make it with labels, or remove it"):
        list_images(edm(tmp_path / "null.zip", None))


# ---- which place -----------------------------------------------------------------------------------------------


def test_a_split_lies_in_an_archive_or_is_one(tmp_path):
    put(tmp_path / "wrapped", "imagenet/train/a/1.png")
    make_archive(tmp_path / "wrapped", tmp_path / "wrapped.zip")
    with pytest.raises(FlowARError, match="wrapped.zip: train/ not found, only imagenet: expected train/ and val/"):
        find_split(tmp_path / "wrapped.zip", "train")
    assert list_images(find_split(tmp_path / "wrapped.zip" / "imagenet", "train")).name(0) == "a/1.png"
    make_archive(tmp_path / "wrapped" / "imagenet" / "train", tmp_path / "train.tar")
    assert find_split(tmp_path, "train") == f"{tmp_path}/train.tar" and find_split(tmp_path, "val", needed=False) is None
    put(tmp_path, "train/a/1.png")
    assert find_split(tmp_path, "train") == f"{tmp_path}/train"  # a folder comes first


def test_backslashes_are_separators_where_the_system_has_them(tmp_path):
    for system in (0, 3, 10):  # FAT; Unix, if there is no other separator; NTFS
        zip_of(file := tmp_path / f"{system}.zip", "set\\train\\0\\1.png", system=system)
        assert list_images(find_split(file / "set", "train")).path(0) == f"{file}/set/train/0/1.png"
    zip_of(tmp_path / "unix.zip", "0/a\\b.png")
    assert list_images(tmp_path / "unix.zip").name(0) == "0/a\\b.png"


def refusal(path, pattern):
    """Groups of a pattern in the line that refuses the images at a path."""
    with pytest.raises(FlowARError, match=pattern) as refused:
        list_images(path)
    return re.search(pattern, str(refused.value)).groups()


def test_tars_of_tars_and_webdatasets_are_named_with_what_unpacks_them(tmp_path):
    for name in ("a", "b"):
        put(tmp_path / "images", f"{name}/1.png")
        put(tmp_path / "samples", f"{name}1.png")
        (tmp_path / "samples" / f"{name}1.cls").write_text("10" if name == "a" else "9")
    (tmp_path / "classes").mkdir(), (tmp_path / "shards").mkdir()
    for name in ("a", "b"):
        make_archive(tmp_path / "images" / name, tmp_path / "classes" / f"{name}.tar")
    shard = make_archive(tmp_path / "samples", tmp_path / "shards" / "00000.tar")
    refusal(make_archive(tmp_path / "classes", tmp_path / "all.tar"), "0 images; left out: 2 .tar; (unpack) them in place")
    unpack_classes, unpack_shards = refusal(tmp_path / "classes", "if each is a class: (for .* done); if they are shards: (.*)")
    assert refusal(shard, r"labels are in .cls files.*folder \((.*)\), and") == (unpack_shards,)
    subprocess.run(["bash", "-c", unpack_classes], cwd=tmp_path / "classes", check=True)
    assert list_images(tmp_path / "classes").identity() == list_images(tmp_path / "images").identity()
    subprocess.run(["bash", "-c", unpack_shards], cwd=tmp_path / "shards", check=True)
    (sort,) = refusal(tmp_path / "shards", "sort them into class folders: (.*)")
    subprocess.run(["bash", "-c", sort], cwd=tmp_path / "shards", check=True)
    sorted_listing = list_images(tmp_path / "shards")
    assert [sorted_listing.name(i) for i in range(2)] == ["00009/b1.png", "00010/a1.png"]


# ---- damage ----------------------------------------------------------------------------------------------------


def tar_of(path, *members):
    with tarfile.open(path, "w") as file:
        for name, options in members:
            info = tarfile.TarInfo(name)
            info.size = 0 if "type" in options else 700
            for key, value in options.items():
                setattr(info, key, value)
            file.addfile(info, None if "type" in options else open("/dev/zero", "rb"))
    return path


def zip_of(path, name, mode=0o644, system=3):
    with zipfile.ZipFile(path, "w") as file:
        info = zipfile.ZipInfo(name)
        info.external_attr, info.create_system = mode << 16, system
        file.writestr(info, b"\0" * 700)
    return path


PLAIN = "is a link, encrypted, or of an unsupported compression: pack plain files"


@pytest.mark.parametrize("name,make,message", [
    ("x.zip", lambda path: zip_of(path, "a/1.png", mode=0o120777), f": a/1.png {PLAIN}"), ("x.zip", lambda path: zip_of(path, "a/../b/1.png"), PLAIN),
    ("x.zip", lambda path: path.write_bytes(zip_of(path, "a/1.png").read_bytes()[:-30]), "truncated, damaged, or not of the type"),
    ("x.tar", lambda path: path.write_bytes(b"\x1f\x8b" + bytes(5000)), "truncated, damaged, or not of the type"),
    ("x.tar", lambda path: tar_of(path, ("a", {"type": tarfile.SYMTYPE, "linkname": "b"}), ("b/1.png", {})), f": a {PLAIN}"),
    ("x.tar", lambda path: path.write_bytes(tar_of(path, *[(f"a/{i}.png", {}) for i in range(9)]).read_bytes()[:3 * 1536]), "no mark of its end at byte")])
def test_an_archive_that_cannot_be_read_as_its_folders_is_refused(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(FlowARError, match=f"{name}.*{message}"):
        list_images(tmp_path / name)


def test_of_a_name_that_comes_twice_the_last_counts_as_when_unpacked(tmp_path):
    tar_of(tmp_path / "x.tar", ("a/1.png", {"size": 600}), ("./a//1.png", {"size": 700}), ("a/.1.png", {"type": tarfile.SYMTYPE, "linkname": "x"}))
    found = list_images(tmp_path / "x.tar")
    assert found.sizes.tolist() == [700] and found.summary() == "1 images; left out: 1 hidden or system files"


def test_damaged_bytes_are_named_and_may_be_skipped(tmp_path):
    for i in range(3):
        put(tmp_path / "images", f"a/{i}.png", i)
    content = bytearray(make_archive(tmp_path / "images", tmp_path / "stored.zip").read_bytes())
    content[content.index(b"a/1.png") + 900] ^= 1  # one bit of its pixels
    (tmp_path / "stored.zip").write_bytes(content)
    data = Images(tmp_path / "stored.zip", 16, on_bad="error")
    with pytest.raises(FlowARError, match="stored.zip/a/1.png: cannot be read as an image .checksum mismatch: the zip is damaged.*--on_bad_image skip"):
        data[(0, 1)]
    data.on_bad = "skip"
    assert torch.equal(data[(0, 1)][0], data[(0, 2)][0])


def test_hosts_may_have_copies_but_not_another_archive(tmp_path):
    put(tmp_path / "images", "a/1.png", 1)
    archive = make_archive(tmp_path / "images", tmp_path / "gnu.tar")
    data = Images(archive, 16)
    os.utime(archive, (1, 1))
    assert pickle.loads(pickle.dumps(data))[(0, 0)][1] == 0
    archive.write_bytes(archive.read_bytes() + b"\0")
    with pytest.raises(FlowARError, match="gnu.tar: expected .* bytes, as when it was listed"):
        pickle.loads(pickle.dumps(data))[(0, 0)]
