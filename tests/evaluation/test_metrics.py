"""Feature networks, distances and their references."""
import functools
from types import SimpleNamespace

from scripts import benchmark
import numpy as np
import pytest
from scripts import reference_stats
import torch
import torch.nn.functional as F
from helpers import write_digits
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import seams
from models import FlowARError
from models.weights import file_hash
from util.evaluation import extractors, metrics, references
from util.speed import prepare


def build(feature_extractor="inception", file=None):
    return extractors.EXTRACTORS[feature_extractor](torch.device("cpu"), file)


def extract(folder, *args, **options):
    """References to a folder's images, one for each network."""
    return references.extract_folder(references.list_reference(folder), *args, **options)


def test_distance_and_statistics_are_torch_fidelitys():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric  # late, as all that is heavy

    a, b = (torch.randn(200, 16, generator=torch.Generator().manual_seed(i)) + i for i in range(2))
    expected = fid_statistics_to_metric(fid_features_to_statistics(a.double()), fid_features_to_statistics(b.double()), False)
    actual = metrics.frechet_distance(metrics.statistics(a), metrics.statistics(b))
    assert actual == pytest.approx(expected["frechet_inception_distance"], rel=1e-9)


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """A weights file of Inception's shape, since the real one needs a download."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    benchmark.write_random_inception(path)
    return str(path)


class PlainDINOv2(nn.Module):
    """The network that torch-fidelity gets from GitHub, in its words: positions are resampled as an image goes through."""
    def __init__(self, state, heads):
        super().__init__()
        self.state, self.heads = state, heads

    def forward(self, x):
        p = self.state
        x = F.conv2d(x, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=14)
        grid = p["pos_embed"][:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=((x.shape[2] + 0.1) / 37, (x.shape[3] + 0.1) / 37), mode="bicubic").flatten(2).mT
        x = torch.cat((p["cls_token"].expand(len(x), -1, -1) + p["pos_embed"][:, :1], x.flatten(2).mT + grid), dim=1)
        norm = lambda name, x: F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)  # noqa: E731
        linear = lambda name, x: F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])  # noqa: E731
        for block in ("blocks.0", "blocks.1"):
            q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            attended = (q @ k.mT / q.shape[-1]**0.5).softmax(-1) @ v
            x = x + p[f"{block}.ls1.gamma"] * linear(f"{block}.attn.proj", attended.transpose(1, 2).flatten(2))
            x = x + p[f"{block}.ls2.gamma"] * linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x))))
        return norm("norm", x)[:, 0]


@pytest.fixture
def random_transformers(tmp_path, monkeypatch):
    """{name: weights file} of small random DINOv2 and CLIP, of which torch-fidelity's have the same."""
    import timm
    from torch_fidelity import feature_extractor_clip as clip

    torch.manual_seed(0)
    heads, create = 2, timm.create_model
    small = dict(embed_dim=32, depth=2, num_heads=heads)
    dino = {name: torch.randn_like(value) / 4 for name, value in create("vit_base_patch14_dinov2", num_classes=0, **small).state_dict().items()}
    assert dino["pos_embed"].shape == (1, 1 + 37 * 37, 32)
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **small, **options))
    monkeypatch.setattr(torch.hub, "load", lambda repository, name: PlainDINOv2(dino, heads))
    sizes = (24, 224, 2, 64, 32)
    monkeypatch.setitem(extractors.EXTRACTORS, "clip-vit-b-32", functools.partial(extractors.CLIP, "b-32", sizes))
    tower = {name: value.half() for name, value in clip.CLIPVisual(*sizes).state_dict().items()}  # OpenAI's precision
    tower |= {"text_projection": torch.zeros(8, 24), "logit_scale": torch.zeros(())}
    monkeypatch.setattr(clip, "load_state_dict_from_url", lambda *args, **options: SimpleNamespace(state_dict=lambda: dict(tower)))
    files = {"dinov2-vit-b-14": tmp_path / "dino.pth", "clip-vit-b-32": tmp_path / "clip.safetensors"}
    torch.save(dino | {"mask_token": torch.zeros(1, 32)}, files["dinov2-vit-b-14"])
    save_file(tower, files["clip-vit-b-32"])
    return files


def test_metrics_equal_torch_fidelitys_own(tmp_path, random_inception, random_transformers, monkeypatch):
    """Every metric of two folders in all extractors, in one pass over the images, against calculate_metrics on the same folders."""
    import torch_fidelity
    from torch_fidelity import registry

    write_digits(tmp_path, 2)
    for split in ("train", "val"):  # torch-fidelity reads flat folders
        (tmp_path / f"flat_{split}").mkdir()
        for i, file in enumerate(sorted((tmp_path / split).rglob("*.png"))[:10]):
            Image.open(file).convert("RGB").save(tmp_path / f"flat_{split}" / f"{i:03d}.png")
    files, cpu = {"inception": random_inception, **random_transformers}, torch.device("cpu")
    joint = extractors.build_extractors([f"{name}={files[name]}" for name in ("dinov2-vit-b-14", "inception", "clip-vit-b-32")], cpu)
    for part in (joint, *joint.parts):
        part.batch = 2  # a process of tests stays below 1.5 GB
    read = seams.count(monkeypatch, (references, "read_image"))
    measure = metrics.measure_against(references.list_reference(tmp_path / "flat_val"), joint, 16, cpu)
    measure.read_references()
    measure.read_references()
    assert len(read) == 10
    images, maps, exact = references.load_uint8(sorted((tmp_path / "flat_train").iterdir())), [], metrics.frechet_distance
    seen = joint.parts[1].network.Mixed_6d.register_forward_hook(lambda module, given, output: maps.append(output))
    measured = extractors.extract(joint, images)
    assert torch.equal(measured["spatial"], torch.cat(maps).permute(0, 2, 3, 1)[..., :7].reshape(10, 2023))  # in TensorFlow's order
    monkeypatch.setattr(metrics, "frechet_distance", lambda a, b: exact(a, b) if len(a["mu"]) < 1000 else 0)  # 15 s each
    ours = measure.compute([measured], cpu)
    names = {"kid_mean": "kernel_inception_distance_mean", "kid_std": "kernel_inception_distance_std", "precision_k3": "precision", "recall_k3": "recall"}
    scores = {name: name for name in ("inception_score_mean", "inception_score_std")}
    for extractor in joint.parts:
        inception = extractor.name == "inception"
        options = dict(feature_extractor_weights_path=random_inception, feature_layer_isc="logits_unbiased", feature_layer_prc="2048", isc=True)
        theirs = torch_fidelity.calculate_metrics(
            input1=str(tmp_path / "flat_train"), input2=str(tmp_path / "flat_val"), cuda=False, fid=not inception, kid=True, prc=True, kid_subset_size=10, batch_size=2,
            feature_extractor="inception-v3-compat" if inception else extractor.name, **(options if inception else {}), verbose=False,
            save_cpu_ram=True, cache=False)
        distance = {extractor.distance: "frechet_inception_distance"} if not inception else {}  # its formula is tested above
        expected = {**distance, **{name + extractor.suffix: value for name, value in names.items()}, **(scores if inception else {})}
        assert {name for name in ours["metrics"] if name.endswith(extractor.suffix)} >= set(expected)
        for name, value in expected.items():
            assert ours[name] == pytest.approx(theirs[value], rel=1e-4, abs=1e-6), name
            del ours[name]
        if extractor.name in random_transformers:
            network = registry.FEATURE_EXTRACTORS_REGISTRY[extractor.name](extractor.name, extractor.name.split("-")[:1])
            torch.testing.assert_close(extractors.extract(extractor, images)["features"], network(images)[0], rtol=1e-4, atol=1e-5)
    assert set(ours) == {"metrics", "reference_images", "reference_left_out", "fid", "sfid"}
    seen.remove()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    prepare.compile_features(extractors.Joint(joint.parts[1:2]))
    compiled = extractors.extract(joint.parts[1], images[:4])  # two batches
    assert all(torch.equal(compiled[name], value[:4]) for name, value in {**measured, "features": joint.split(measured["features"])[1]}.items())


@pytest.mark.parametrize("folder,cause", [("", "no network"), ("/dev/null", ".*Not a directory.*")])
def test_weights_that_cannot_be_downloaded(tmp_path, monkeypatch, folder, cause):
    def fail(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: folder or str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", fail)
    with pytest.raises(FlowARError, match=f"--feature_extractor inception: weights cannot be downloaded from .* .{cause}.: .*inception=FILE"):
        build()


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_only_the_weights_of_a_network_are_taken(tmp_path, random_transformers, monkeypatch):
    from torch_fidelity import feature_extractor_clip as clip

    other = tmp_path / "other.safetensors"
    save_file({"visual.proj": torch.zeros(64, 24)}, other)
    for name, file in (("clip-vit-b-32", other), ("dinov2-vit-b-14", random_transformers["clip-vit-b-32"])):
        with pytest.raises((RuntimeError, KeyError)):
            build(name, file)
    program = str(tmp_path / "program.pt")  # OpenAI's file is one: run if it is that very file alone
    network = type("Program", (clip.CLIPVisual,), {"forward": lambda self, images: self.visual(images)})(24, 224, 2, 64, 32)
    network.load_state_dict(load_file(random_transformers["clip-vit-b-32"]), strict=False)
    torch.jit.save(torch.jit.trace(network, torch.zeros(1, 3, 224, 224)), program)
    with pytest.raises((FlowARError, RuntimeError)):
        build("clip-vit-b-32", program)
    monkeypatch.setitem(clip.MODEL_METADATA, "clip-vit-b-32", {"hash": file_hash(program)})
    found, expected = (build("clip-vit-b-32", file).network.state_dict() for file in (program, random_transformers["clip-vit-b-32"]))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


class Flat(extractors.Extractor):
    """A feature network of 4 numbers, for tests of files."""

    name, dim, batch, resize = "flat", 4, 8, "none"

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.network = nn.Linear(3, 4)

    def forward(self, images):
        return {"features": self.network(images.float().mean(dim=(2, 3)) / 255)}


@pytest.mark.parametrize("changed,message", [
    ({"mu": np.zeros(3)}, r"expected mu of shape \(4,\), finite"),
    ({"feature_extractor": "other"}, "feature_extractor is other, expected flat"), ({"img_size": 32}, "img_size is 32, expected 16"),
    ({"resize": "bicubic"}, "resize is bicubic, expected none"), ({"weights_sha256": "x"}, "weights_sha256 is x")])
def test_statistics_of_something_else_are_refused(tmp_path, changed, message):
    content = dict(mu=np.zeros(4), sigma=np.eye(4), feature_extractor="flat", img_size=16)
    np.savez(tmp_path / "stats.npz", **content)
    reference = references.load_statistics(tmp_path / "stats.npz", Flat(), 16)
    assert reference.statistics["sigma"].shape == (4, 4) and reference.features is None and len(reference.sha256) == 64
    np.savez(tmp_path / "stats.npz", **{**content, **changed})
    with pytest.raises(FlowARError, match=f"stats.npz: {message}"):
        references.load_statistics(tmp_path / "stats.npz", Flat(), 16)


class Alike(Flat):
    """In Inception's place."""
    name, suffix, distance, classes, spatial = "inception", "", "fid", 4, 3

    def forward(self, images):
        measured = super().forward(images)
        return {**measured, "logits": measured["features"], **({"spatial": images[:, :, 0, 0].float()} if self.spatial else {})}


def test_adms_reference_batch_gives_the_five_columns_of_its_table(tmp_path, monkeypatch):
    """By its name, from where a download is kept. There is no sFID of batches that an earlier version left, or without mu_s."""
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", tmp_path)
    (tmp_path / "flowar" / "references" / "adm").mkdir(parents=True)
    real, images = torch.randint(0, 256, (2, 40, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    known = extractors.extract(Alike(), real)
    own, spatial = metrics.statistics(known["features"]), metrics.statistics(known["spatial"])
    args, cpu = SimpleNamespace(fid_stats="released:adm_in256", feature_extractor=["inception"], compile=False), torch.device("cpu")
    monkeypatch.setitem(extractors.EXTRACTORS, "inception", lambda device, file: Alike())
    arrays = {**own, "mu_s": spatial["mu"], "sigma_s": spatial["sigma"], "arr_0": real.permute(0, 2, 3, 1).numpy()}
    np.savez(tmp_path / "flowar" / "references" / "adm" / "VIRTUAL_imagenet256_labeled.npz", **arrays)
    measure = metrics.build_measure(args, 16, None, cpu)
    measure.read_references()
    measured = extractors.extract(measure.extractor, images)
    found = measure.compute([measured], cpu)
    assert {"fid", "sfid", "inception_score_mean", "precision_k3", "recall_k3"} <= set(found["metrics"])
    assert found["sfid"] == pytest.approx(metrics.frechet_distance(metrics.statistics(images[:, :, 0, 0]), spatial))
    assert torch.equal(measure.reference.features, known["features"])
    del measured["spatial"]
    assert found == {**measure.compute([measured], cpu), "sfid": found["sfid"], "metrics": found["metrics"]}
    with pytest.raises(FlowARError, match="released:adm_in256: img_size is 16, expected 32"):
        metrics.build_measure(args, 32, None, cpu)
    args.fid_stats, args.feature_extractor = "released:adm_in265", ["inception", "none such"]
    with pytest.raises(FlowARError, match="adm_in265"):  # before a network is downloaded
        metrics.build_measure(args, 16, None, cpu)
    args.feature_extractor = ["inception"]
    args.fid_stats = f"{tmp_path}/stats.npz"  # as CIFAR-10's and pytorch-fid's
    np.savez(args.fid_stats, **own)
    assert "spatial" not in extractors.extract(metrics.build_measure(args, 32, None, cpu).extractor, images)
    with pytest.raises(FlowARError, match="feature_extractor is inception, expected flat .a file without feature_extractor"):
        references.load_statistics(args.fid_stats, Flat(), 32)
    with pytest.raises(FlowARError, match=r"expected mu_s of shape \(3,\), finite"):
        np.savez(args.fid_stats, **own, mu_s=np.zeros(7), sigma_s=np.eye(7))
        metrics.build_measure(args, 16, None, cpu)


def test_one_file_holds_several_extractors_and_what_fdr_needs(tmp_path, capsys):
    write_digits(tmp_path, 3)
    path, cpu, joint = tmp_path / "stats.npz", torch.device("cpu"), extractors.Joint([Flat(), Alike(seed=1)])
    train, val = (extract(tmp_path / split, joint, cpu) for split in ("train", "val"))
    reference_stats.save_statistics(path, train, joint, val)
    with np.load(path) as file:  # where others look for Inception's
        np.testing.assert_allclose(file["mu"], metrics.statistics(train[1].features)["mu"], atol=1e-9)
    read = references.load_statistics(path, Alike(seed=1), 16)
    assert read.held_out[1] == 30 and np.array_equal(read.spatial["sigma"], train[1].spatial["sigma"])
    measure = metrics.Measure(joint, [references.load_statistics(path, part, 16) for part in joint.parts])
    assert not capsys.readouterr().out.count("warning")
    generated = torch.cat([part.features for part in val], dim=1) + torch.tensor([0.1, 0, 0, 0, 0.3, 0, 0, 0])
    found = measure.compute([{"features": generated}], cpu)
    for extractor, mine, theirs, reals in zip(joint.parts, joint.split(generated), train, val):
        near, far = (metrics.frechet_distance(metrics.statistics(x), theirs.statistics) for x in (reals.features, mine))
        assert found[extractor.distance] == pytest.approx(far, rel=1e-4)
        assert found[f"fdr{extractor.suffix}"] == pytest.approx(far / near, rel=1e-3) and far > 2 * near
    assert found["fdr_mean_of_2"] == pytest.approx((found["fdr"] + found["fdr_flat"]) / 2) and found["fdr"] != found["fdr_flat"]
    assert len(measure.settings()["reference_sha256"]) == 2 and measure.settings()["feature_extractor"] == "flat,inception"
    measure.compute([{"features": generated[:20]}], cpu)
    assert "warning: fdr of flat compares 20 images with 30 held-out ones: distances grow with fewer" in capsys.readouterr().out
    with pytest.raises(FlowARError, match="weights_sha256 is"):
        references.load_statistics(path, Flat(seed=1), 16)


@pytest.mark.parametrize("keep", [False, True])
def test_statistics_say_what_they_are(tmp_path, keep):
    write_digits(tmp_path, 2)
    (tmp_path / "val" / "3" / "000.png").unlink()
    path, joint, cpu = tmp_path / "stats.npz", extractors.Joint([Flat()]), torch.device("cpu")
    written, = extract(tmp_path / "val", joint, cpu, keep=keep)
    reference_stats.save_statistics(path, [written], joint)
    found = references.load_statistics(path, Flat(), 16)
    assert found.classes == {str(digit): 2 - (digit == 3) for digit in range(10)} and extract(tmp_path / "val" / "0", joint, cpu)[0].classes is None
    np.testing.assert_array_equal(found.statistics["mu"], written.statistics["mu"])
    assert (found.features is not None) == keep and (not keep or torch.equal(found.features, written.features))
    with np.load(path) as file:
        assert file["num_images"] == 19 and file["resize"] == "none" and file["left_out"] == 0


def test_features_of_a_folder_crop_refuse_and_are_kept_if_they_can_be_compared_in_pairs(tmp_path, monkeypatch, capsys):
    write_digits(tmp_path / "digits", 1)
    folder, flat, cpu = tmp_path / "digits" / "val", extractors.Joint([Flat()]), torch.device("cpu")
    found, = extract(folder, flat, cpu)
    assert found.features.shape == (10, 4) and found.img_size == 16
    assert extract(folder, flat, cpu, 8, crop=True)[0].img_size == 8
    sums, = extract(folder, flat, cpu, keep=False)
    assert sums.features is None
    for key, value in metrics.statistics(found.features).items():
        np.testing.assert_allclose(sums.statistics[key], value, atol=1e-9)
    for most, kept in ((10, True), (9, False)):
        monkeypatch.setattr(metrics, "MOST_FEATURES", most)
        measure = metrics.measure_against(references.list_reference(folder), flat, 16, cpu)
        measure.read_references()
        assert (measure.reference.features is not None) == kept and measure.reference.statistics["sigma"].shape == (4, 4)
        assert (f"no KID, precision and recall: they compare all pairs of images, and these are more than {most}" in capsys.readouterr().out) != kept
    with pytest.raises(FlowARError, match="16x16 pixels, expected 8x8: make statistics of centre crops with scripts/reference_stats.py --img_size"):
        extract(folder, flat, cpu, 8)
