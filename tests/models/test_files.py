"""Files from strangers: no code from them runs, absurd claims cost no memory, and damage of any kind ends in FlowARError."""
import argparse
import copy
import io
import json
import os
import pickle
import resource
import shutil
import struct
import tarfile
import zipfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import SCALES, call, small_vae
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save, save_file

from models import AutoencoderKL, FlowARError, build_model
from models import registry
from models.vaes import find_vae, load_vae, save_vae
from models.files import read_file, writing
from models.files.states import clean_names
from scripts import plot_results, train_vae
from util.data import latents
from util.evaluation import extractors, references, reports, store
from util.data import open_image
from models.files import file_hash
from util.files import read_json

TINY = dict(img_size=16, vae_stride=4, vae_embed_dim=4, scale=SCALES, class_num=10)
MIB = 2**20
IMAGES = ("png", "jpg", "webp", "bmp", "tiff")


class Payload:
    def __reduce__(self):
        return os.system, ("touch exploited",)


@contextmanager
def frugal(limit=48):
    """The block does not raise the memory of the process by more than `limit` MiB."""
    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten, where the system can do that
    except OSError:
        pass
    before = peak()
    yield
    assert peak() - before < limit


def refused(load, path, message=None):
    """`load(path)` raises FlowARError of one line that names the file, and takes no memory for it."""
    with frugal(), pytest.raises(FlowARError, match=message) as caught:
        load(path)
    assert Path(path).name in str(caught.value) and "\n" not in str(caught.value)


# ---- valid files of every kind, and what reads them --------------------------------------------------------------


def write_cache(folder):
    """Six images of two classes in two shards of float16."""
    folder.mkdir()
    shards = []
    for number in range(2):
        path = folder / f"shard-0000{number}.safetensors"
        save_file({"moments": torch.randn(3, 2, 8, 4, 4).half(), "labels": torch.tensor([0, 1, 1]),
                   "names": torch.frombuffer(bytearray(b"0/a.png\n1/b.png\n1/c.png"), dtype=torch.uint8),
                   "skipped": torch.frombuffer(bytearray(b"\n"), dtype=torch.uint8)}, path)
        shards.append({"file": path.name, "images": 3, "bytes": path.stat().st_size, "sha256": file_hash(path)})
    index = {"format": latents.FORMAT, "images": 6, "classes": ["0", "1"], "img_size": 16, "stride": 4, "channels": 4, "variants": 2,
             "crops": "center", "seed": 0, "dtype": "float16", "vae_sha256": None, "latent_scale": [0.5, 0.1], "skipped": [],
             "measured": {"scale": 0.5, "shift": 0.1, "channel_mean": [0.0] * 4, "channel_std": [1.0] * 4}, "shards": shards}
    (folder / "index.json").write_text(json.dumps(index))


REPORT = {"nfe": [4, 4], "seconds_per_image": {"sampling": 0.1}, "images_per_second": 10.0, "cfg": 1.0, "guidance": 0.9, "num_step": 25,
          "num_step_last": None, "solver": "euler", "fid": 12.5, "model": "flowar_tiny", "metrics": ["fid"]}


def write_diffusers(folder):
    from diffusers import AutoencoderTiny
    torch.manual_seed(0)
    AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                    num_decoder_blocks=(1, 1)).save_pretrained(folder)


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """A folder with a small valid file of every kind that is read."""
    root = tmp_path_factory.mktemp("valid")
    torch.manual_seed(0)
    state = build_model("flowar_tiny", **TINY).state_dict()
    torch.save({"model": state, "model_ema": state, "epoch": 3, "args": argparse.Namespace(lr=1, scales=(1, 2))}, root / "flowar.pth")
    save_file(state, root / "flowar.safetensors")
    torch.save(torch.nn.Linear(3, 2).state_dict(), root / "network.pth", _use_new_zipfile_serialization=False)
    save_vae(small_vae(), root / "vae.pth")
    vae, optimizer = snapshot_parts()
    sum(p.sum() for p in vae.parameters()).backward()
    optimizer.step()
    torch.save({"step": 200, "model": vae.state_dict(), "optimizer": optimizer.state_dict()}, root / "snapshot.pth")
    write_cache(root / "cache")
    (root / "npz" / "a").mkdir(parents=True)
    moments = np.random.default_rng(0).standard_normal((8, 4, 4)).astype(np.float32)
    np.savez(root / "npz" / "a" / "x.npz", moments=moments, moments_flip=moments)
    (root / "npz" / "latents.json").write_text(json.dumps({"complete": True, "latent_scale": [0.5, 0.1]}))
    np.savez(root / "statistics.npz", mu=np.zeros(4), sigma=np.eye(4), features=np.zeros((9, 4), np.float32), feature_extractor="flat",
             img_size=16)
    (root / "sweep" / "cfg1").mkdir(parents=True)
    (root / "sweep" / "cfg1" / "results.json").write_text(json.dumps(REPORT))
    (root / "sweep" / "cfg1" / "settings.json").write_text(json.dumps({"cfg": 1.0}))
    (root / "results.csv").write_text("nfe,fid,solver\n8,12.5,euler\n16,11,euler\n")
    store.FinishedBatches(root / "partial").save(0, {
        "features": torch.zeros(2, 4), "logits": torch.zeros(2, 8), "bad": torch.zeros(0, dtype=torch.long), "calls": torch.ones(3, 2).long(),
        "seconds": torch.zeros(4, dtype=torch.float64), "images": torch.zeros(2, 8, 8, 3, dtype=torch.uint8)})
    pixels = Image.fromarray(np.random.default_rng(1).integers(0, 255, (24, 20, 3), dtype=np.uint8))
    for kind in IMAGES:
        pixels.save(root / f"image.{kind}")
    write_diffusers(root / "diffusers")
    return root


def snapshot_parts():
    torch.manual_seed(0)
    vae = AutoencoderKL(embed_dim=2, ch=4, ch_mult=(1, 1), num_res_blocks=0)
    return vae, torch.optim.AdamW(vae.parameters())


def load_flowar(path):
    """What eval.py does with a checkpoint."""
    state = registry.find_model(read_file(path, mmap=True), path).tensors
    known = {**registry.recognise_geometry(state, path, 4), **registry.recognise_size(state, path)}
    scale = known.pop("scales")
    registry.open_model(state, path, known.pop("model"), img_size=4 * known["patch_size"] * scale[-1], vae_stride=4, vae_embed_dim=4,
                        scale=scale, **known)


def load_cache(path):
    data = latents.ShardedMoments(Path(path).parent, train=True)
    latents.verify_checksums(data.root, data.index)
    return [data[(0, int(index))] for index in data.order(0, 0)]


def load_shard(path):
    index = latents.parse_index(path.parent / "index.json")
    moments, _ = latents.open_shard(path, index, 3)
    latents.is_whole(path, index)
    return moments[:], latents.read_texts(path, "names"), latents.read_texts(path, "skipped")


def load_npz(path):
    data = latents.NpzMoments(path.parents[1], (8, 4, 4), train=True)
    return data[(0, 0)], data[(1, 0)], data[(2, 0)]


def load_npz_info(path):
    return latents.kind_of_cache(path.parent), latents.npz_latent_scale(path.parent, 4)


def load_statistics(path):
    return references.load_statistics(path, SimpleNamespace(name="flat", suffix="_flat", dim=4), 16)


def load_sweep(path):
    rows = reports.sweep_rows(path.parents[1])
    reports.write_table(rows, path.parents[1] / "table.csv")
    store.check_settings(path.parent, {"cfg": 1.0})
    return rows


def load_batch(path):
    kept = store.FinishedBatches(path.parent)
    return kept.load(0), kept.images(0), kept.has(0, (2, 4))


def load_table(path):
    return plot_results.lines_of(path, "nfe", None, "solver")


def load_image(path):
    return references.load_uint8([path], 8)


def load_snapshot(path):
    return train_vae.resume(*snapshot_parts(), path, {"lr": 1e-3})


def load_diffusers(path):
    return find_vae(f"diffusers:{path.parent}", None).open()


LOADERS = {  # file in the folder of valid ones -> what reads it
    "flowar.pth": load_flowar, "flowar.safetensors": load_flowar, "network.pth": extractors.inception_weights, "vae.pth": load_vae,
    "snapshot.pth": load_snapshot, "cache/index.json": load_cache, "cache/shard-00000.safetensors": load_shard, "npz/a/x.npz": load_npz,
    "npz/latents.json": load_npz_info, "statistics.npz": load_statistics, "sweep/cfg1/results.json": load_sweep,
    "sweep/cfg1/settings.json": load_sweep, "partial/batch-000000.safetensors": load_batch, "results.csv": load_table,
    "diffusers/config.json": load_diffusers, "diffusers/diffusion_pytorch_model.safetensors": load_diffusers,
    **{f"image.{kind}": load_image for kind in IMAGES},
}


@pytest.fixture(params=LOADERS, scope="module")
def loader(request, valid, tmp_path_factory):
    """(copy of the valid files, path of the one to damage, what reads it)."""
    root = tmp_path_factory.mktemp("damaged") / "files"
    shutil.copytree(valid, root)
    return root, root / request.param, LOADERS[request.param]


# ---- any damage ---------------------------------------------------------------------------------------------------


def fuzz(examples):
    return settings(max_examples=examples * int(os.environ.get("FUZZ", 1)), deadline=None, database=None,
                    derandomize="FUZZ" not in os.environ, suppress_health_check=list(HealthCheck))


def survives(load, path):
    try:
        load(path)
    except FlowARError as error:
        assert str(error)


def position(content):
    """Headers and tables of contents are at the ends of a file."""
    last = len(content) - 1
    return st.one_of(st.integers(0, min(last, 1000)), st.integers(max(0, last - 1000), last), st.integers(0, last))


@st.composite
def damaged(draw, content, others):
    """The bytes of a file: cut short, with bits flipped, with a block overwritten, or those of a file of another kind."""
    kind = draw(st.sampled_from(("truncated", "flipped", "overwritten", "moved", "mislabelled")))
    if kind == "mislabelled":
        return draw(st.sampled_from(others))
    if kind == "truncated":
        return content[:draw(position(content))]
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(position(content))
        if kind == "flipped":
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "moved":
            source = draw(position(content))
            content[at:at + 16] = content[source:source + 16]
        else:
            block = st.sampled_from((bytes(8), b"\xff" * 8, struct.pack("<q", 2**40)))
            content[at:at + 8] = draw(st.one_of(block, st.binary(min_size=1, max_size=8)))
    return bytes(content)


def test_the_valid_files_load(loader):
    _, path, load = loader
    load(path)


@fuzz(60)
@given(data=st.data())
def test_damage_of_any_kind_ends_in_one_error(loader, valid, data):
    root, path, load = loader
    content = (valid / path.relative_to(root)).read_bytes()
    others = [(valid / name).read_bytes() for name in LOADERS if name != str(path.relative_to(root))]
    path.write_bytes(data.draw(damaged(content, others)))
    survives(load, path)


WRONG = (None, True, -1, 0, 1, 2**31, 10**12, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "x", "../x", "\ud800", "a\0b", [], [[]],
         {}, {"a": 1}, [1, 2, 3], ["x"] * 3)


@st.composite
def with_a_wrong_value(draw, content, wrong):
    """A copy of nested dicts and lists with one value, or name, replaced or left out."""
    content = copy.deepcopy(content)
    inside = content
    while True:
        key = draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside))))
        if not (isinstance(inside[key], (dict, list)) and inside[key]) or draw(st.integers(0, 3)) == 0:
            break
        inside = inside[key]
    action = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add")))
    if action == "remove":
        del inside[key]
    elif action == "replace" or isinstance(inside, list):
        inside[key] = draw(st.sampled_from(wrong))
    else:
        inside[draw(st.sampled_from(("x", "ckpt_path", "quantization_config")))] = draw(st.sampled_from(wrong))
    return content


@fuzz(60)
@given(data=st.data())
@pytest.mark.parametrize("loader", [name for name in LOADERS if name.endswith(".json")], indirect=True)
def test_wrong_values_in_json_end_in_one_error(loader, valid, data):
    root, path, load = loader
    path.write_text(json.dumps(data.draw(with_a_wrong_value(read_json(valid / path.relative_to(root)), WRONG))))
    survives(load, path)


TENSORS = (torch.zeros(0), torch.zeros(()), torch.zeros(1), torch.zeros(1, 1, 21, 21), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(1).bool(),
           torch.zeros(4, 4, dtype=torch.complex64), torch.full((1, 1, 3, 3), float("nan")), torch.zeros(1).expand(10**6), torch.zeros(0, 10**15))


@fuzz(30)
@given(data=st.data())
@pytest.mark.parametrize("loader", ["flowar.pth", "vae.pth", "snapshot.pth"], indirect=True)
def test_wrong_values_in_torch_files_end_in_one_error(loader, valid, data):
    root, path, load = loader
    content = torch.load(valid / path.relative_to(root), weights_only=False)
    torch.save(data.draw(with_a_wrong_value(content, (*WRONG, *TENSORS))), path)
    survives(load, path)


# ---- code ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", [name for name in LOADERS if name.endswith(".pth")])
def test_code_in_a_torch_file_is_not_run(tmp_path, monkeypatch, name, old):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Payload()}, name, _use_new_zipfile_serialization=not old)
    with pytest.raises(FlowARError, match=name):
        LOADERS[name](Path(name))
    Path(name).write_bytes(pickle.dumps(Payload()))
    with pytest.raises(FlowARError, match=name):
        LOADERS[name](Path(name))
    assert not (tmp_path / "exploited").exists()


def test_code_in_other_files_is_not_run(tmp_path, monkeypatch, valid):
    monkeypatch.chdir(tmp_path)
    objects = np.array([Payload()], dtype=object)
    np.savez("statistics.npz", mu=objects, sigma=objects)
    (tmp_path / "a").mkdir()
    np.savez("a/x.npz", moments=objects, moments_flip=objects)
    refused(load_statistics, Path("statistics.npz"))
    refused(lambda path: latents.NpzMoments(tmp_path, (8, 4, 4))[(0, 0)], Path("a/x.npz"), "cannot read moments .*expected numbers")
    shutil.copytree(valid / "diffusers", "diffusers")
    Path("diffusers/diffusion_pytorch_model.safetensors").unlink()
    torch.save({"x": Payload()}, "diffusers/diffusion_pytorch_model.bin")
    refused(lambda path: find_vae(f"diffusers:{path}", None).open(), Path("diffusers"))
    Path("image.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch exploited) system\n")
    refused(open_image, Path("image.png"), "cannot be read as an image")
    assert not (tmp_path / "exploited").exists()


# ---- downloads -------------------------------------------------------------------------------------------------------


def packed(name, content):
    file = io.BytesIO()
    if name == "zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("kl16.ckpt", content)
    else:
        with tarfile.open(fileobj=file, mode=name) as archive:
            archive.addfile(tarfile.TarInfo("kl16.ckpt"), io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("content,message", [
    (b"", "it is empty; it was not downloaded or copied to its end: do that again"), (bytes(9000), "it holds zeros alone at its start"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 687430000\n",
     "but the pointer of git-LFS to one of 687,430,000 bytes: git lfs install, then git lfs pull"),
    (b"\n<!DOCTYPE html>\n<html>", "but a web page"), (b"<HTML><body>Sign in", "but a web page"), (b"<?xml version='1.0'?><Error>", "but a web page"),
    (b"Entry not found", "it is text, which begins with 'Entry not found'"), ("R\u00e9pertoire\n".encode() * 99, "begins with 'R\u00e9pertoire'"),
    (b'{"error": "Repository not found"}', "it is text"), (packed("zip", b"x"), "but a zip archive of 'kl16.ckpt': unpack it"),
    (packed("w", b"x"), "but a tar archive: unpack it"), (packed("w:gz", b"x"), "but a gzip archive: unpack it .gunzip, or tar -xzf"),
    (packed("w:xz", b"x"), "but a xz archive"), (packed("w:bz2", b"x"), "but a bzip2 archive"), (pickle.dumps({"a": 1}), "a bare pickle: if you trust")],
    ids=lambda value: value if isinstance(value, str) else "")  # archives hold the time
def test_failed_downloads_and_archives_are_named_with_the_cure(tmp_path, content, message, suffix):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(content)
    refused(read_file, path, f"not a weights file.*{message}")


def test_files_that_are_cut_short_are_named(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.pth")
    save_file({"a": torch.zeros(1000)}, tmp_path / "x.safetensors")
    for path, messages in ((tmp_path / "x.pth", ["bytes of a zip file without its end: it was not downloaded"] * 3),
                           (tmp_path / "x.safetensors", ["cut short, 2036 of 4072 bytes", "cut short, 60 of 72 bytes", "cut short, 9 of 72 bytes"])):
        content = path.read_bytes()
        for length, message in zip((len(content) // 2, 60, 9), messages):
            path.write_bytes(content[:length])
            refused(read_file, path, message)


class Callback:
    def __init__(self):
        self.best, self.folder = 1.5, Path("runs")


class Attributes(dict):
    pass


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("more", [
    {"callbacks": {Callback: Callback()}}, {"best": np.float64(0.5), "step": np.int64(3), "array": np.zeros(3)}, {Path("a"): Path("b")},
    {"hyper_parameters": Attributes(lr=1)}, {"net": torch.nn.Linear(3, 2)}], ids=["callbacks", "numpy", "paths", "attributes", "a module"])
def test_the_line_that_takes_tensors_out_of_what_safe_loading_refuses(tmp_path, monkeypatch, more, old):
    """It works where the classes that the file names are not installed, and runs nothing of theirs."""
    path = tmp_path / "it's.ckpt"
    torch.save({"state_dict": {"w": torch.arange(3.0), "p": torch.nn.Parameter(torch.ones(2))}, "evil": Payload(), "config": {"ch": (1, 2)}, **more},
               path, _use_new_zipfile_serialization=not old)
    with pytest.raises(FlowARError, match="it names|of before PyTorch 1.6") as caught:
        read_file(path)
    call(monkeypatch, str(caught.value).partition("if you trust where it is from: python ")[2])
    content = read_file(tmp_path / "it's.tensors.pth")
    assert content["state_dict"]["w"].tolist() == [0, 1, 2] and content["state_dict"]["p"].tolist() == [1, 1] and content["config"] == {"ch": [1, 2]}
    torch.save({"w": torch.ones(2)}, path, pickle_protocol=4)
    refused(read_file, path, "pickled with protocol 4, expected at most 3, for safe loading; if you trust where it is from: python")
    if "net" in more:
        assert clean_names(content["net"])[0].keys() == {"weight", "bias"}
    assert not Path("exploited").exists()


# ---- torch files -----------------------------------------------------------------------------------------------------


def repack(path, change, **options):
    """Write a zip file again with its pickle changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)


def test_views_and_storages_that_claim_more_than_the_file(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(1).expand(10**12)}, path)
    refused(read_file, path, "its tensors claim 4000000000000 bytes, but the file has")
    torch.save({"a": [{"b": (torch.zeros(1).expand(10**6),)}]}, path)
    refused(read_file, path, "claim 4000000 bytes")
    shared = torch.zeros(1000)
    torch.save({str(i): shared[i:] for i in range(100)}, path)
    refused(read_file, path, "claim")
    torch.save({"a": {"x": shared, "z": shared}, "b": {"x": shared}, "c": {"y": shared[3:]}}, path)
    assert torch.equal(read_file(path)["c"]["y"], shared[3:])  # what a model and its copy share is no claim
    for numbers in (5, 2**31 - 1):  # numbers of the storage and of the tensor; the file has 4
        torch.save({"a": torch.arange(4.0)}, path)
        longer = b"J" + struct.pack("<i", numbers)
        repack(path, lambda data: data.replace(b"K\x04tq", longer + b"tq").replace(b"K\x04\x85", longer + b"\x85"))
        with frugal():
            survives(read_file, path)


def test_zip_bombs_and_ambiguous_archives(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({}, path)
    repack(path, lambda data: bytes(100 * MIB), compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < MIB
    refused(read_file, path, "is compressed, expected members as torch.save stores them")
    torch.save({"a": torch.zeros(3)}, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x/DATA.PKL", b"other")
    refused(read_file, path, "repeated names")
    path.write_bytes(whole)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("y/data.pkl", b"other")
    refused(read_file, path, "2 members are called data.pkl")
    path.write_bytes(whole)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"x"
    refused(read_file, path, "comment")
    end = whole.rindex(b"PK\x01\x02")
    path.write_bytes(whole[:end + 20] + struct.pack("<II", 2**30, 2**30) + whole[end + 28:])
    refused(read_file, path, "its members are longer than the file")


def test_the_format_before_1_6_is_explained(tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    refused(read_file, path, "of before PyTorch 1.6, expected a newer one: torch.load it")
    assert torch.equal(read_file(path, legacy=True)["a"], torch.zeros(3))
    torch.save({"a": torch.zeros(1).expand(10**12)}, path, _use_new_zipfile_serialization=False)
    refused(lambda path: read_file(path, legacy=True), path, "its tensors claim")


@pytest.mark.parametrize("pickled", [
    b"})q\x00" + b"h\x00\x86q\x00" * 60 + b"K\x01s.", b"})" + b"\x85" * 100000 + b"K\x01s.", b"]q\x00" + b"](h\x00h\x00eq\x00" * 60 + b".",
    b"]q\x00" + b"](h\x00eq\x00" * 300 + b".", b"]q\x00h\x00a."], ids=["wide keys", "deep keys", "wide lists", "deep lists", "itself"])
def test_structures_without_end(tmp_path, pickled):
    """A key of 2^60 parts would be hashed for ever, one 100000 deep would end the interpreter."""
    torch.save({}, tmp_path / "x.pth")
    repack(tmp_path / "x.pth", lambda data: b"\x80\x02" + pickled)
    refused(read_file, tmp_path / "x.pth", "in .* without end")


@pytest.mark.parametrize("make", [
    lambda: torch.eye(3).to_sparse(), lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8), lambda: torch.ones(3, device="meta"),
    lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])], ids=["sparse", "quantized", "meta", "nested"])
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_other_kinds(tmp_path, make):
    torch.save({"a": make()}, tmp_path / "x.pth")
    refused(read_file, tmp_path / "x.pth", "not a file of tensors")


# ---- sizes that a file asks for ----------------------------------------------------------------------------------------


def tiny_state():
    torch.manual_seed(0)
    return build_model("flowar_tiny", **TINY).state_dict()


def test_absurd_sizes_of_the_model(tmp_path):
    path, state = tmp_path / "x.pth", tiny_state()

    def load(changes, message):
        torch.save({**state, **changes}, path)
        refused(load_flowar, path, message)

    weight = "flownet.res_blocks.{}.attn.qkv.weight"
    load({weight.format(10**9): torch.zeros(1)}, "size cannot be recognised .*4 blocks flownet.res_blocks.*without a gap")
    load({weight.format(number): torch.zeros(1) for number in range(3, 3000)}, "expected 1 to 256")
    load({weight.format(number): torch.zeros(1) for number in range(3, 9)}, "tensors do not fit the model")
    load({"flownet.cond_embed.weight": torch.zeros(19968, 128)}, "tensors do not fit the model")
    load({"flownet.cond_embed.weight": torch.zeros(())}, "size cannot be recognised")
    load({"class_emb.weight": torch.zeros(())}, "geometry cannot be recognised")
    load({"z_proj.weight": torch.zeros(128, 0)}, "tokens have 0 channels")
    load({3: torch.zeros(2)}, "3 is not in the model")
    load({"module." * 100000 + "x": torch.zeros(2)}, "x is not in the model")
    for mask in (torch.zeros(()), torch.zeros(1, 1, 5, 7), torch.zeros(1, 1, 21, 21).bool(), torch.full((1, 1, 21, 21), float("nan")),
                 torch.ones(1, 1, 0, 0), torch.zeros(1, 1, 2, 2)):
        load({"mask": mask}, "cannot be recognised|tensors do not fit|scale ")
    assert registry.recognise_geometry({**state, "mask": state["mask"].half()}, "x", 4)["scales"] == SCALES


def test_absurd_tokens():
    with frugal(), pytest.raises(FlowARError, match="makes 262145 tokens: expected at most 32768"):
        build_model("flowar_tiny", img_size=512, vae_stride=1, scale=(1, 512))


def test_check_fits_needs_no_memory(tmp_path):
    with torch.device("meta"):
        model = build_model("flowar_huge")
    with frugal(), pytest.raises(FlowARError, match=r"x: \d+ tensors do not fit the model: encoder_pos_embed_learned is \(1, 21, 128\)"):
        registry.check_fits(model, tiny_state(), "x")


@pytest.mark.parametrize("config", [
    {"ch": 8192}, {"ch": 10**6}, {"ch": 10**400}, {"ch": 0}, {"ch": -16}, {"ch": "16"}, {"ch": True}, {"embed_dim": 4096}, {"embed_dim": 0},
    {"num_res_blocks": 10**9}, {"num_res_blocks": -1}, {"ch_mult": ()}, {"ch_mult": (1,) * 10**5}, {"ch_mult": (1, 8192)}, {"ch_mult": (1, 0)},
    {"ch_mult": 3}, {"ch_mult": {1: 2}}, {"latent_scale": "12"}, {"latent_scale": (0.0, 1.0)}, {"latent_scale": (float("nan"),)},
    {"latent_scale": (1, 2, 3)}, {"latent_scale": (10**400, 0)}, {"latent_scale": torch.ones(2)}, {"ckpt_path": "other.pth"}, {"x": 1}, {1: 2}],
    ids=lambda config: str(config)[:40])
def test_absurd_vae_configurations(tmp_path, config):
    save_vae(small_vae(), tmp_path / "vae.pth")
    content = torch.load(tmp_path / "vae.pth", weights_only=True)
    torch.save({**content, "config": {**content["config"], **config}}, tmp_path / "vae.pth")
    refused(load_vae, tmp_path / "vae.pth")


@pytest.mark.parametrize("config", [
    {"encoder_block_out_channels": [4096, 4096]}, {"encoder_block_out_channels": [10**6] * 2}, {"num_encoder_blocks": [10**9, 1]},
    {"decoder_block_out_channels": [8] * 10**5}, {"latent_channels": "4"}, {"latent_channels": -4}, {"scaling_factor": "1"},
    {"scaling_factor": None}, {"shift_factor": [1]}, {"act_fn": "os.system"}, {"block_out_channels": True},
    {"_class_name": "FlaxAutoencoderKL"}, {"_class_name": ["AutoencoderKL"]}, {"_class_name": None},
    {"quantization_config": {"quant_method": "x"}}], ids=lambda config: str(config)[:40])
def test_absurd_diffusers_configurations(tmp_path, valid, config):
    shutil.copytree(valid / "diffusers", tmp_path / "diffusers")
    file = tmp_path / "diffusers" / "config.json"
    file.write_text(json.dumps({**read_json(file), **config}))
    refused(lambda path: find_vae(f"diffusers:{path}", None).open(), tmp_path / "diffusers")


# ---- caches and statistics -------------------------------------------------------------------------------------------


def write_npy(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def header(shape, descr="<f4"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize("shape,descr", [((10**12,), "<f4"), ((10**6, 10**6), "<f8"), ((1,), "<U300000000"), ((-1, 4), "<f4"),
                                         ((2**62, 2**62), "<f4"),
                                         ((10**12,), "<U0"), ((3,), "|O")])
def test_npy_headers_that_claim_too_much(tmp_path, shape, descr):
    (tmp_path / "a").mkdir()
    array = header(shape, descr)
    write_npy(tmp_path / "a" / "x.npz", {"moments": array})
    refused(lambda path: latents.NpzMoments(tmp_path, (8, 4, 4))[(0, 0)], tmp_path / "a" / "x.npz", "cannot read moments")
    for name in ("mu", "sigma", "features", "img_size", "weights_sha256", "held_out"):
        np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=np.eye(4), feature_extractor="flat", img_size=16)
        with zipfile.ZipFile(tmp_path / "s.npz") as archive:
            members = {member.removesuffix(".npy"): archive.read(member) for member in archive.namelist()}
        write_npy(tmp_path / "s.npz", {**members, name: array})
        refused(load_statistics, tmp_path / "s.npz")


def test_compressed_arrays_are_read_but_no_bombs(tmp_path):
    (tmp_path / "a").mkdir()
    path, moments = tmp_path / "a" / "x.npz", np.asfortranarray(np.random.default_rng(0).random((8, 4, 4)))
    np.savez_compressed(path, moments=moments)
    found = latents.NpzMoments(tmp_path, (8, 4, 4))[(0, 0)][0]
    np.testing.assert_array_equal(found, moments.astype(np.float32))
    found += 1  # in memory of its own
    write_npy(path, {"moments": header((2**28,)) + bytes(2**28)}, zipfile.ZIP_DEFLATED)
    refused(lambda path: latents.NpzMoments(tmp_path, (8, 4, 4))[(0, 0)], path, "cannot read moments")
    write_npy(path, {"moments": header((8, 4, 4)) + bytes(512)}, zipfile.ZIP_LZMA)
    refused(lambda path: latents.NpzMoments(tmp_path, (8, 4, 4))[(0, 0)], path, "compressed in a way")
    np.savez(path, moments=np.array(["x"] * 128).reshape(8, 4, 4))
    refused(lambda path: latents.NpzMoments(tmp_path, (8, 4, 4))[(0, 0)], path, "expected floating-point numbers")
    with path.open("wb") as file:
        np.save(file, np.zeros((8, 4, 4)))
    refused(lambda path: latents.NpzMoments(tmp_path, (8, 4, 4))[(0, 0)], path, "cannot read moments")


@pytest.mark.parametrize("changes,message", [
    ({"images": 10**12}, "do not add up"), ({"images": -6}, "images is -6"), ({"images": 6.0}, "images is 6.0"), ({"images": True}, "images is True"),
    ({"variants": 3}, "variants is 3, expected an even number"), ({"variants": 0}, "variants is 0"), ({"img_size": 10**9}, "img_size is"),
    ({"img_size": 18}, "not a multiple of stride"), ({"stride": 0}, "stride is 0"), ({"channels": 10**6}, "is said to hold 3 images"),
    ({"classes": "ab"}, "classes is 'ab'"), ({"classes": [1, 2]}, "classes is"), ({"dtype": "object"}, "dtype is 'object'"),
    ({"dtype": []}, "dtype is"), ({"latent_scale": ["1", "2"]}, "latent_scale is"), ({"latent_scale": [float("nan"), 0]}, "latent_scale is"),
    ({"shards": {}}, "shards is"), ({"shards": [1]}, "file is missing"), ({"vae_sha256": 1}, "vae_sha256 is 1"), ({"measured": []}, "measured is"),
    ({"crops": -1}, "crops is -1"), ({"skipped": None}, "skipped is None"), ({"format": {}}, "format is")])
def test_indices_with_wrong_values(tmp_path, valid, changes, message):
    folder = tmp_path / "cache"
    shutil.copytree(valid / "cache", folder)
    file = folder / "index.json"
    file.write_text(json.dumps({**read_json(file), **changes}))
    refused(load_cache, file, message)


@pytest.mark.parametrize("changes,message", [
    ({"images": 10**12}, "is said to hold 1000000000000 images in"), ({"images": 0}, "images is 0"),
    ({"bytes": 10**15}, "bytes, expected 10000000000"),
    ({"file": ""}, "outside of the cache"), ({"file": "."}, "outside of the cache"), ({"file": ".."}, "outside of the cache"),
    ({"file": "../cache/shard-00000.safetensors"}, "outside of the cache"),
    ({"file": "/etc/passwd"}, "outside of the cache"), ({"file": 3}, "file is 3"),
    ({"file": "shard-00001.safetensors"}, "named twice"), ({"file": "a\0b"}, "missing"), ({"file": "\ud800"}, "cannot be read|missing"),
    ({"sha256": None}, "sha256 is None"), ({"sha256": "x"}, "damaged")])
def test_shards_with_wrong_values(tmp_path, valid, changes, message):
    folder = tmp_path / "cache"
    shutil.copytree(valid / "cache", folder)
    file = folder / "index.json"
    index = read_json(file)
    index["shards"][0].update(changes)
    file.write_text(json.dumps(index))
    with frugal(), pytest.raises(FlowARError, match=message):
        load_cache(file)


@pytest.mark.parametrize("changes", [
    {"moments": torch.zeros(3, 2, 8, 4, 5).half()}, {"moments": torch.zeros(3, 2, 8, 4, 4)}, {"moments": torch.zeros(()).half()},
    {"labels": torch.tensor([0, 1, 2])}, {"labels": torch.tensor([0, -1, 1])}, {"labels": torch.tensor([0.0, 1.0, 1.0])},
    {"labels": torch.tensor([0, 1])}, {"labels": torch.tensor(1)}, {"labels": None}, {"moments": None}], ids=str)
def test_shards_that_are_not_what_the_index_says(tmp_path, valid, changes):
    folder = tmp_path / "cache"
    shutil.copytree(valid / "cache", folder)
    path, index = folder / "shard-00001.safetensors", latents.parse_index(folder / "index.json")
    content = {"moments": torch.zeros(3, 2, 8, 4, 4).half(), "labels": torch.tensor([0, 1, 1]), "names": torch.zeros(1, dtype=torch.uint8)}
    path.write_bytes(save({name: value for name, value in {**content, **changes}.items() if value is not None}))
    refused(lambda path: latents.open_shard(path, index, 3), path)
    assert not latents.is_whole(path, index)


def test_deep_json(tmp_path):
    for text in ("[" * 10**6, '{"a":' * 10**6, '{"a": ' + "9" * 10**5 + "}", "[1, 2]"):
        (tmp_path / "x.json").write_text(text)
        refused(read_json, tmp_path / "x.json")
    refused(read_json, tmp_path / "x.json", r"expected a JSON object, found something else \(a list\): ")


# ---- evaluations and images ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {"nfe": None}, {"nfe": "12"}, {"nfe": [1e3]}, {"seconds_per_image": [1]}, {"seconds_per_image": {"a": "b"}}, {"fid": "low"}, {"cfg": None},
    {"solver": "$x"}, {"num_step_last": "x"}, {"images_per_second": 10**400}], ids=str)
def test_reports_with_wrong_values(tmp_path, changes):
    (tmp_path / "cfg1").mkdir()
    file = tmp_path / "cfg1" / "results.json"
    file.write_text(json.dumps({**REPORT, **changes}))
    refused(load_sweep, file, f"{next(iter(changes))} is ")
    file.write_text(json.dumps({name: value for name, value in REPORT.items() if name not in changes}))
    if changes.keys() != {"fid"}:
        refused(load_sweep, file, f"{next(iter(changes))} is missing")


@pytest.mark.parametrize("changes", [
    {"features": None}, {"features": torch.zeros(4)}, {"features": torch.zeros(2, 4).half()}, {"logits": torch.zeros(3, 8)}, {"bad": torch.zeros(1)},
    {"calls": torch.ones(3).long()}, {"seconds": torch.zeros(5, dtype=torch.float64)}, {"seconds": None}], ids=str)
def test_a_batch_of_something_else_is_missing(valid, tmp_path, changes):
    shutil.copytree(valid / "partial", tmp_path / "partial")
    kept = store.FinishedBatches(tmp_path / "partial")
    assert kept.has(0) and kept.has(0, (2, 4)) and not kept.has(0, (3, 4)) and not kept.has(1)
    kept.save(0, {name: value for name, value in {**kept.load(0), **changes}.items() if value is not None})
    assert not kept.has(0)
    refused(lambda path: kept.load(0), kept.path(0), "not a batch of an evaluation")
    refused(lambda path: kept.images(0), kept.path(0))


def test_images_that_are_absurdly_long(tmp_path):
    Image.new("RGB", (30000, 2)).save(tmp_path / "x.png")
    refused(load_image, tmp_path / "x.png", "30000x2 pixels, expected sides within a factor of 100")


def test_a_snapshot_with_other_moments_is_refused(tmp_path, valid):
    content = torch.load(valid / "snapshot.pth", weights_only=True)
    content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1)
    torch.save(content, tmp_path / "x.pth")
    refused(load_snapshot, tmp_path / "x.pth", "moments of other shapes")


@pytest.mark.parametrize("error", [KeyboardInterrupt, FlowARError, OSError])
def test_a_file_that_is_not_written_to_its_end_is_not_there(tmp_path, error):
    (tmp_path / "kept").write_bytes(b"before")
    with pytest.raises(FlowARError if error is OSError else error), writing(tmp_path / "kept") as file:
        file.write(b"half")
        raise error("x")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept").read_bytes() == b"before"
