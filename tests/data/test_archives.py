"""Archives of class folders give what the folders give, bit for bit, or are refused in a line."""
import json
import multiprocessing
import os
import pickle
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call, make_project, read_log, train
from PIL import Image

from models import FlowARError
from util.data import Images
from util.data.folders import open_file
from util.data.loaders import Loader
from util.data.places import find_split, list_images, name_images
from util.data.source import other_classes

KINDS = ("stored.zip", "deflated.zip", "gnu.tar", "pax.tar", "absolute.tar")


def put(root, name, seed=0, size=24):
    path = os.path.join(os.fsencode(root), name if isinstance(name, bytes) else name.encode())
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 4), dtype=np.uint8)).save(file, "PNG")


def pack(folder, archive):
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
        os.link(root / split / "a" / "1.png", root / split / "a" / "again.png")
    return root


@pytest.fixture(scope="module", params=KINDS)
def archive(folder, tmp_path_factory, request):
    return pack(folder, tmp_path_factory.mktemp("archive") / request.param)


def test_an_archive_gives_what_its_folders_give(folder, archive):
    for split in ("train", "val"):
        plain, packed = (Images(find_split(place, split), 16, 3, train=split == "train", background=(9, 8, 7)) for place in (folder, archive))
        assert packed.identity() == plain.identity() and packed.folder.left_out == plain.folder.left_out != {}
        assert packed.classes == name_images(archive / split) == ["B", "Z", "a", "b", "empty", "only_hidden"]
        assert [str(packed.folder[i][0]) for i in range(len(packed))] == [plain.folder[i][0].replace(str(folder), str(archive)) for i in range(len(plain))]
        for key in ((1, i) for i in range(len(plain))):
            (one, label), (other, same) = plain[key], packed[key]
            assert torch.equal(one, other) and label == same
        assert packed.counts[:] == plain.counts[:]  # of conversions
        sent = pickle.loads(pickle.dumps(packed.folder.for_workers()))  # as to workers that are not forked
        assert [open_file(sent[i][0]).read() for i in range(len(sent))] == [Path(plain.folder[i][0]).read_bytes() for i in range(len(sent))]


def test_names_that_are_no_utf8(tmp_path):
    put(tmp_path / "odd", b"n\xe9w/\xff\xfe.png")
    archive = tmp_path / "odd.tar"
    subprocess.run(["tar", "-cf", archive, "-C", tmp_path / "odd", "."], check=True)
    assert list_images(archive).identity() == list_images(tmp_path / "odd").identity()
    with zipfile.ZipFile(tmp_path / "dos.zip", "w") as file:  # names of bytes, without the mark of UTF-8
        file.writestr("nXw/1.png", b"x")
    content = (tmp_path / "dos.zip").read_bytes().replace(b"nXw", b"n\xe9w")
    (tmp_path / "dos.zip").write_bytes(content)
    assert os.fsencode(list_images(tmp_path / "dos.zip").name(0)) == b"n\xe9w/1.png"


@pytest.fixture(params=["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def start_method(request):
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_data_workers_read_at_once_what_one_process_reads(tmp_path, start_method):
    """Also where they inherit an archive that is open: a shared position would mix the images up."""
    for i in range(60):
        put(tmp_path / "images", f"{i % 3}/{i}.png", i, size=16)
    names, workers, epochs = (("deflated.zip", "gnu.tar"), 4, 5) if start_method == "fork" else (("gnu.tar",), 1, 1)
    for name in names:
        data = Images(pack(tmp_path / "images", tmp_path / name), 16)
        alone = [data[(0, i)][0] for i in range(60)]
        found = [images for images, _ in Loader(data, batch_size=5, num_workers=workers, sampler=[(0, i) for i in range(60)] * epochs)]
        assert torch.equal(torch.cat(found), torch.stack(alone * epochs))


def test_a_training_and_a_cache_are_those_of_the_folder(tmp_path, monkeypatch, capsys):
    project = make_project(tmp_path, per_class=4)
    pack(project / "images", tmp_path / "deflated.zip")
    (tmp_path / "beside").mkdir()
    for split in ("train", "val"):
        pack(project / "images" / split, tmp_path / "beside" / f"{split}.tar")
    places, options = ("images", "deflated.zip", "beside"), "--epochs 1 --eval_freq 1"
    plain, zipped, beside = (train(project, tmp_path / f"run_{name}", f"{options} --data_path {tmp_path}/{name}") for name in places)
    for name, found in zip(places[1:], (zipped, beside)):
        assert found["data"] == plain["data"] and all(torch.equal(found["model"][key], value) for key, value in plain["model"].items())
        assert read_log(tmp_path / f"run_{name}") == read_log(tmp_path / "run_images")  # of the validation too
    command = f"scripts/cache_latents.py --cached_path {tmp_path}/cache --vae_path {project}/vae.pth --img_size 16 --num_workers 0 --device cpu"
    call(monkeypatch, f"{command} --data_path {project}/images")
    call(monkeypatch, f"{command} --data_path {tmp_path}/deflated.zip --verify")  # names, sizes and contents
    assert "all images are those that it was made of" in capsys.readouterr().out
    call(monkeypatch, f"scripts/check_images.py {tmp_path}/deflated.zip/train --img_size 16")
    assert "40 images" in capsys.readouterr().out


def test_another_cache_of_classes_is_told_from_an_archive(folder, archive):
    class Cache:
        classes = ["B", "Z", "a", "b", "empty", "only_hidden"]
    assert other_classes(Cache, archive) == ""
    Cache.classes = Cache.classes[1:]
    assert "only in one of them: B" in other_classes(Cache, archive)


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
    assert [(data.folder.name(i), data[(0, i)][1]) for i in range(4)] == [(names[0], 10), (names[2], 0), (names[1], 0), (names[3], 2)]
    assert data.classes == [f"{label:02d}" for label in range(11)] and not data.folder.left_out
    zipfile.ZipFile(tmp_path / "train.zip").extractall(tmp_path / "unpacked")
    assert list_images(tmp_path / "unpacked").identity() == data.identity()
    swapped = Images(edm(tmp_path / "swapped.zip", [[name, label] for name, label in zip(names, (10, 0, 2, 0))]), 16).identity()
    assert swapped["counts"] == data.identity()["counts"] and swapped["sha256"] != data.identity()["sha256"]


@pytest.mark.parametrize("labels,message", [
    (None, "dataset.json: it says that the images have no labels"), ([["00000/img00000000.png", 0]], "dataset.json has no label for 00000/img00000002.png, "),
    ([[f"0000{i % 2}/img{i:08d}.png", 0] for i in range(5)], "names files that are not there or no images: 00000/img00000004.png"),
    ([["a", -1]], "are not a list of .name, whole number"), ([["a", 1], ["a", 2]], "each name once")])
def test_labels_that_do_not_fit_the_images_are_refused(tmp_path, labels, message):
    with pytest.raises(FlowARError, match=message):
        list_images(edm(tmp_path / "train.zip", labels))


# ---- which place -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files,data_path,message", [
    (("wrapped.zip",), "wrapped.zip", "there is no train/ in it: it is in imagenet/: give .*wrapped.zip/imagenet"),
    (("train.zip",), "train.zip", "there is no train/ in it: give "), (("flat.tar",), "flat.tar", "one of the training images alone goes into a folder as train.tar"),
    (("train.tar.gz",), "", "there is train.tar.gz, which is compressed: decompress it to train.tar"), (("x.tgz",), "x.tgz", "compressed archive: expected .zip or .tar"),
    (("train.zip", "train.tar"), "", "train.zip and .*train.tar are there: which holds the images")])
def test_a_split_that_is_not_there_is_said_with_the_way_on(tmp_path, files, data_path, message):
    put(tmp_path / "wrapped", "imagenet/train/a/1.png")
    put(tmp_path / "flat", "a/1.png")
    for name in files:
        pack(tmp_path / ("wrapped" if "wrapped" in name else "flat"), tmp_path / name) if name.endswith((".zip", ".tar")) else (tmp_path / name).write_bytes(b"\x1f\x8b")
    with pytest.raises(FlowARError, match=message):
        find_split(tmp_path / data_path, "train")
    if "wrapped" in data_path:
        assert list_images(find_split(tmp_path / data_path / "imagenet", "train")).name(0) == "a/1.png"


def test_a_folder_is_taken_before_an_archive_and_that_is_said(tmp_path, capsys):
    put(tmp_path, "train/a/1.png")
    pack(tmp_path / "train", tmp_path / "train.tar")
    assert find_split(tmp_path, "train") == f"{tmp_path}/train" and find_split(tmp_path, "val", needed=False) is None
    assert f"{tmp_path}/train is read, not {tmp_path}/train.tar" in capsys.readouterr().out


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


def zip_of(path, *names, method=zipfile.ZIP_STORED, mode=0o644):
    with zipfile.ZipFile(path, "w", method) as file:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.create_system, info.compress_type = mode << 16, 3, method
            file.writestr(info, b"\0" * 700)
    return path


def encrypted(path):
    content = bytearray(zip_of(path, "a/1.png").read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)


def cut(path, change):
    tar_of(path, *[(f"a/{i}.png", {}) for i in range(9)])
    path.write_bytes(change(path.read_bytes()))


HALF = 512 + 1024  # header and content of a member


@pytest.mark.parametrize("name,make,message", [
    ("x.zip", encrypted, ": a/1.png: it is encrypted: pack"),
    ("x.zip", lambda path: zip_of(path, "a/1.png", method=zipfile.ZIP_LZMA), "a/1.png: it is packed by lzma: pack"),
    ("x.zip", lambda path: zip_of(path, "a/1.png", mode=0o120777), "a/1.png: it is a symbolic link: pack"),
    ("x.zip", lambda path: zip_of(path, "a/../b/1.png"), "its name leads out of its folder"),
    ("x.zip", lambda path: zip_of(path, "a/1.png", "a//1.png"), "a/1.png: the archive holds more than one file of this name"),
    ("x.zip", lambda path: path.write_bytes(zip_of(path, "a/1.png").read_bytes()[:-30]), "cannot be read as a zip archive .*cut short"),
    ("x.zip", lambda path: zip_of(path), "an empty archive"), ("x.zip", lambda path: zip_of(path, "1.png"), "1 images but no class folders"),
    ("x.zip", lambda path: zip_of(path, "a/1.txt"), "no images in its class folders .a; .* left out: 1 .txt"),
    ("x.tar", lambda path: path.write_bytes(b"\x1f\x8b" + bytes(5000)), "cannot be read as an uncompressed tar archive"),
    ("x.tar", lambda path: tar_of(path, ("a/1.png", {"type": tarfile.SYMTYPE, "linkname": "2.png"})), "a/1.png: it is a symbolic link: pack"),
    ("x.tar", lambda path: tar_of(path, ("a", {"type": tarfile.SYMTYPE, "linkname": "b"}), ("b/1.png", {})), ": a: it is a symbolic link: pack"),
    ("x.tar", lambda path: tar_of(path, ("a/1.png", {"type": tarfile.LNKTYPE, "linkname": "a/2.png"})), "a hard link to a/2.png, which is not in"),
    ("x.tar", lambda path: tar_of(path, ("../1.png", {})), "its name leads out"),
    ("x.tar", lambda path: tar_of(path, ("a/1.png", {}), ("./a/1.png", {})), "more than one file of this name"),
    ("x.tar", lambda path: cut(path, lambda content: content[:3 * HALF]), "without the mark of a tar's end: cut short"),
    ("x.tar", lambda path: cut(path, lambda content: content[:3 * HALF - 700]), "unexpected end of data"),
    ("x.tar", lambda path: cut(path, lambda content: content[:3 * HALF] + b"?" * 512 + content[3 * HALF + 512:]), "from byte 4608 on it is no tar: damaged"),
    ("x.tar", lambda path: cut(path, lambda content: content * 2), "a second archive was put behind")])
def test_an_archive_that_cannot_be_read_as_its_folders_is_refused(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(FlowARError, match=f"{name}.*{message}"):
        list_images(tmp_path / name)


def test_sparse_files_and_hidden_oddities(tmp_path):
    put(tmp_path / "s", "a/1.png")
    with open(tmp_path / "s" / "a" / "1.png", "r+b") as file:
        file.truncate(1 << 20)
    subprocess.run(["tar", "--sparse", "-cf", tmp_path / "s.tar", "-C", tmp_path / "s", "."], check=True)
    with pytest.raises(FlowARError, match="a/1.png: it is a sparse file: pack the images without --sparse"):
        list_images(tmp_path / "s.tar")
    tar_of(tmp_path / "h.tar", ("a/1.png", {}), ("a/.1.png", {"type": tarfile.SYMTYPE, "linkname": "x"}), ("a/2.png", {"type": tarfile.FIFOTYPE}))
    assert list_images(tmp_path / "h.tar").summary() == "1 images; left out: 1 neither files nor folders, 1 hidden or a system's"


def test_damaged_bytes_are_named_and_may_be_skipped(tmp_path, capsys):
    for i in range(3):
        put(tmp_path / "images", f"a/{i}.png", i)
    content = bytearray(pack(tmp_path / "images", tmp_path / "stored.zip").read_bytes())
    content[content.index(b"a/1.png") + 900] ^= 1  # one bit of its pixels
    (tmp_path / "stored.zip").write_bytes(content)
    data = Images(tmp_path / "stored.zip", 16, on_bad="error")
    with pytest.raises(FlowARError, match="stored.zip/a/1.png: cannot be read as an image .its bytes are not those that were packed.*--on_bad_image skip"):
        data[(0, 1)]
    data.on_bad = "skip"
    assert torch.equal(data[(0, 1)][0], data[(0, 2)][0])


def test_hosts_may_have_copies_but_not_another_archive(tmp_path):
    """prepare() is what every rank does with the listing of rank 0."""
    put(tmp_path / "images", "a/1.png", 1)
    put(tmp_path / "images", "a/2.png", 1)  # of the same size
    for kind, said in (("stored.zip", "not those that were packed|no file at this place"), ("gnu.tar", "another file is at its place")):
        archive = pack(tmp_path / "images", tmp_path / kind)
        data = Images(archive, 16)
        os.utime(archive, (1, 1))
        data.folder.prepare()
        data[(0, 0)]
        content = bytearray(archive.read_bytes())
        where = content.index(b"a/1.png")
        content[where + 2] = ord("2") if "tar" in kind else ord("1")
        if "zip" in kind:
            content[where + 600] ^= 1
        archive.unlink()
        archive.write_bytes(content)
        data.folder.prepare()
        with pytest.raises(FlowARError, match=f"{kind}/a/1.png: cannot be read as an image .*({said})"):
            data[(0, 0)]
        archive.write_bytes(content + b"\0")
        with pytest.raises(FlowARError, match=f"{kind}: {len(content) + 1} bytes on one host, {len(content)} on rank 0's"):
            data.folder.prepare()


@pytest.mark.parametrize("replace", [True, False])
def test_an_archive_that_changes_under_a_running_program_is_not_misread(tmp_path, replace):
    for i in range(3):
        put(tmp_path / "images", f"a/{i}.png", i)
    archive = pack(tmp_path / "images", tmp_path / "gnu.tar")
    data, fresh = Images(archive, 16), Images(archive, 16)
    before = data[(0, 0)][0]  # it is open
    put(tmp_path / "images", "a/0.png", 9, size=90)
    if replace:
        archive.unlink()
        pack(tmp_path / "images", archive)
        assert torch.equal(data[(0, 0)][0], before)  # of the file that is still open
        fresh.folder.archive = f"{tmp_path}/./gnu.tar"  # in a process that has not opened it
    else:
        with open(archive, "r+b") as file:
            file.write(pack(tmp_path / "images", tmp_path / "pax.tar").read_bytes())
    with pytest.raises(FlowARError, match="gnu.tar/a/0.png: cannot be read .*gnu.tar was written to since this program looked at it"):
        fresh[(0, 0)]
