"""Feature networks, distances and their references."""
import numpy as np
import pytest
import reference_stats
import torch
import torch_fidelity
from helpers import run, write_digits
from PIL import Image
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as inception_module
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from models import FlowARError
from util.evaluation import metrics, references


def build(feature_extractor="inception", fid_weights=None):
    return metrics.build_extractor(feature_extractor, fid_weights, torch.device("cpu"))


def test_distance_and_statistics_are_torch_fidelitys():
    a, b = (torch.randn(200, 16, generator=torch.Generator().manual_seed(i)) + i for i in range(2))
    expected = fid_statistics_to_metric(fid_features_to_statistics(a.double()), fid_features_to_statistics(b.double()), False)
    actual = metrics.frechet_distance(metrics.statistics(a), metrics.statistics(b))
    assert actual == pytest.approx(expected["frechet_inception_distance"], rel=1e-9)


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """A weights file of Inception's shape, since the real one needs a download."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    patch = pytest.MonkeyPatch()
    patch.setattr(inception_module, "load_state_dict_from_url", lambda *args, **kwargs: {})
    patch.setattr(nn.Module, "load_state_dict", lambda self, state: None)
    torch.manual_seed(0)
    network = inception_module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    patch.undo()
    torch.save(network.state_dict(), path)
    return str(path)


def test_inception_metrics_equal_torch_fidelitys_own(tmp_path, random_inception):
    """Every metric of two folders, with --fid_weights a local file, against calculate_metrics on the same folders."""
    write_digits(tmp_path, 2)
    for split in ("train", "val"):  # torch-fidelity reads flat folders
        (tmp_path / f"flat_{split}").mkdir()
        for i, file in enumerate(sorted((tmp_path / split).rglob("*.png"))[:12]):
            Image.open(file).convert("RGB").save(tmp_path / f"flat_{split}" / f"{i:03d}.png")
    expected = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "flat_train"), input2=str(tmp_path / "flat_val"), cuda=False, fid=True, isc=True, kid=True,
        prc=True, kid_subset_size=12, feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=random_inception, feature_layer_isc="logits_unbiased", feature_layer_prc="2048",
        verbose=False, save_cpu_ram=True, cache=False)
    cpu = torch.device("cpu")
    extractor = build(fid_weights=random_inception)
    flat = references.folder_features(tmp_path / "flat_val", extractor, cpu, 16)
    reference = references.Reference("val", **flat.statistics, features=flat.features)
    found = metrics.compute_metrics(*metrics.extract(extractor, references.load_uint8([path for path, _ in references.list_images(tmp_path / "flat_train")])),
                            reference, extractor, cpu)
    names = {"fid": "frechet_inception_distance", "inception_score_mean": "inception_score_mean",
             "inception_score_std": "inception_score_std", "kid_mean": "kernel_inception_distance_mean",
             "kid_std": "kernel_inception_distance_std", "precision_k3": "precision", "recall_k3": "recall"}
    assert set(found) == set(names)
    for ours, theirs in names.items():
        assert found[ours] == pytest.approx(expected[theirs], rel=1e-4, abs=1e-7), ours


class Payload:
    def __reduce__(self):
        return print, ("code from the file runs",)


def test_weights_that_cannot_be_had_are_explained(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(inception_module, "load_state_dict_from_url", offline)
    with pytest.raises(FlowARError, match="cannot be downloaded.*--fid_weights.*efficientnet-lite0"):
        build()
    with pytest.raises(FlowARError, match="nowhere.pth: no such file"):
        build(fid_weights="nowhere.pth")
    torch.save({"a": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(FlowARError, match="evil.pth: not a file of tensors"):
        build(fid_weights=str(tmp_path / "evil.pth"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(FlowARError, match="other.pth: not torch-fidelity's Inception weights"):
        build(fid_weights=str(tmp_path / "other.pth"))
    with pytest.raises(FlowARError, match="--fid_weights is for inception"):
        build(feature_extractor="efficientnet-lite0", fid_weights="x")


def test_efficientnet_features_tell_images_apart(tmp_path):
    write_digits(tmp_path, 3)
    extractor = build(feature_extractor="efficientnet-lite0")
    images = references.load_uint8([path for path, _ in references.list_images(tmp_path / "train")])
    features, logits = metrics.extract(extractor, images)
    alone, _ = metrics.extract(extractor, images[3:4])
    assert features.shape == (30, 1280) and logits is None
    torch.testing.assert_close(features[3:4], alone, atol=1e-4, rtol=1e-3)
    assert "fid" not in extractor.distance
    same = metrics.frechet_distance(metrics.statistics(features), metrics.statistics(features))
    noise = metrics.statistics(metrics.extract(extractor, torch.randint_like(images, 255))[0])
    assert abs(same) < 1e-2 < metrics.frechet_distance(metrics.statistics(features), noise)


class Flat:
    """A feature network of 4 numbers, for tests of files."""

    name, dim, suffix, distance, batch, resize = "flat", 4, "_flat", "frechet_distance_flat", 8, "none"

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.network = nn.Linear(3, 4)

    def forward(self, images):
        return self.network(images.float().mean(dim=(2, 3)) / 255), None


def test_bad_statistics_are_named(tmp_path):
    path, flat = tmp_path / "stats.npz", Flat()

    def load():
        return references.load_statistics(path, flat, 16)

    said = dict(feature_extractor="flat", img_size=16)
    with pytest.raises(FlowARError, match="stats.npz: no such file"):
        load()
    path.write_bytes(b"PK junk")
    with pytest.raises(FlowARError, match="not an .npz with mu and sigma"):
        load()
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3), **said)
    with pytest.raises(FlowARError, match=r"mu is \(3,\) and sigma \(3, 3\), expected \(4,\)"):
        load()
    np.savez(path, mu=np.full(4, np.nan), sigma=np.eye(4), **said)
    with pytest.raises(FlowARError, match="not finite"):
        load()
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4), features=np.zeros((9, 5), np.float32), **said)
    with pytest.raises(FlowARError, match=r"features are \(9, 5\), expected \(images, 4\)"):
        load()
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4), **said)
    assert load().sigma.shape == (4, 4) and load().features is None
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(FlowARError, match="not an .npz with mu and sigma"):
        load()


@pytest.mark.parametrize("keep", [False, True])
def test_statistics_say_what_they_are(tmp_path, keep):
    path, features = tmp_path / "stats.npz", torch.randn(20, 4)
    statistics = metrics.statistics(features)
    listing = references.Listing("nowhere", [], [], {".txt": 2})
    listing.samples = [(f"nowhere/{i}.png", 0) for i in range(20)]
    reference_stats.save_statistics(path, references.FolderFeatures(statistics, features if keep else None, 16, listing), Flat())
    found = references.load_statistics(path, Flat(), 16)
    np.testing.assert_array_equal(found.mu, features.double().numpy().mean(axis=0))
    assert (found.features is not None) == keep and (not keep or torch.equal(found.features, features))
    with np.load(path) as file:
        assert file["num_images"] == 20 and file["resize"] == "none" and file["left_out"] == 2
    with pytest.raises(FlowARError, match="its img_size is 16, here it is 32; make statistics with scripts/reference_stats.py"):
        references.load_statistics(path, Flat(), 32)
    with pytest.raises(FlowARError, match="its weights_sha256 is"):
        references.load_statistics(path, Flat(seed=1), 16)
    other = Flat()
    other.name = "inception"
    with pytest.raises(FlowARError, match="its feature_extractor is flat, here it is inception"):
        references.load_statistics(path, other, 16)


def test_statistics_of_others_are_taken_for_inceptions_with_one_warning(tmp_path, capsys):
    """ADM's hold mu_s, sigma_s and more, CIFAR-10's and pytorch-fid's mu and sigma alone: of any image size."""
    path, inception = tmp_path / "stats.npz", Flat()
    inception.name = "inception"
    for more in ({}, {"mu_s": np.zeros(7), "sigma_s": np.eye(7), "arr_0": np.zeros((2, 8, 8, 3), np.uint8)}):
        np.savez(path, mu=np.zeros(4), sigma=np.eye(4, dtype=np.float32), **more)
        for size in (32, 256, 512):
            assert references.load_statistics(path, inception, size).mu.shape == (4,)
            assert capsys.readouterr().out.splitlines() == [
                f"warning: --fid_stats {path} does not say its feature network, image size, preprocessing, extractor weights, number of "
                f"images: whether they are those of this evaluation (inception, {size} pixels) cannot be checked"]
    with pytest.raises(FlowARError, match="its feature_extractor is inception, here it is flat .one that says nothing"):
        references.load_statistics(path, Flat(), 256)
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4), img_size=256)
    with pytest.raises(FlowARError, match="its img_size is 256, here it is 512"):
        references.load_statistics(path, inception, 512)


@pytest.mark.parametrize("changed,message", [
    ({"sigma": np.triu(np.ones((4, 4)))}, "sigma is no covariance: it is not symmetric"),
    ({"sigma": -np.eye(4)}, "a variance is negative"), ({"sigma": np.full((4, 4), np.inf)}, "not finite"),
    ({"mu": np.zeros(5)}, r"mu is \(5,\)"), ({"mu": np.zeros((1, 4))}, r"mu is \(1, 4\)"), ({"mu": np.zeros(4, complex)}, "not real numbers"),
    ({"resize": "bicubic"}, "its resize is bicubic, here it is none"),
    ({"features": np.zeros((9, 4)), "num_images": 10}, "features of 9 images and says num_images 10"),
    ({"classes": np.array(["a", "b"])}, "not names and as many numbers"),
    ({"classes": np.array(["a", "b"]), "class_counts": np.array([1])}, "not names and as many numbers"),
    ({"classes": np.array(["a", "b"]), "class_counts": np.array([1, -1])}, "not names and as many numbers")])
def test_statistics_that_contradict_themselves_are_refused(tmp_path, changed, message):
    path = tmp_path / "stats.npz"
    np.savez(path, **{"mu": np.zeros(4), "sigma": np.eye(4), "feature_extractor": "flat", **changed})
    with pytest.raises(FlowARError, match=f"stats.npz: .*{message}"):
        references.load_statistics(path, Flat(), 16)


def test_statistics_know_their_classes(tmp_path):
    write_digits(tmp_path, 2)
    (tmp_path / "val" / "3" / "000.png").unlink()
    found = references.folder_features(tmp_path / "val", Flat(), torch.device("cpu"))
    assert found.classes == {str(digit): 2 - (digit == 3) for digit in range(10)}
    reference_stats.save_statistics(tmp_path / "stats.npz", found, Flat())
    assert references.load_statistics(tmp_path / "stats.npz", Flat(), 16).classes == found.classes
    assert references.folder_features(tmp_path / "val" / "0", Flat(), torch.device("cpu")).classes is None  # flat


def test_folder_features_crop_and_refuse(tmp_path):
    write_digits(tmp_path / "digits", 1)
    folder, flat, cpu = tmp_path / "digits" / "val", Flat(), torch.device("cpu")
    found = references.folder_features(folder, flat, cpu)
    assert found.features.shape == (10, 4) and found.img_size == 16
    assert references.folder_features(folder, flat, cpu, 8, crop=True).img_size == 8
    sums = references.folder_features(folder, flat, cpu, keep=False)
    assert sums.features is None
    for key, value in metrics.statistics(found.features).items():
        np.testing.assert_allclose(sums.statistics[key], value, atol=1e-9)
    with pytest.raises(FlowARError, match="16x16 pixels, expected 8x8; scripts/reference_stats.py --img_size"):
        references.folder_features(folder, flat, cpu, 8)


def test_reference_stats_script(tmp_path):
    """Two processes find what one finds."""
    write_digits(tmp_path / "digits", 2)
    for processes in (0, 2):
        run(f"scripts/reference_stats.py --ref_images {tmp_path}/digits/val --output {tmp_path}/{processes}.npz --keep_features "
            "--feature_extractor efficientnet-lite0 --device cpu", processes=processes)
    with np.load(tmp_path / "0.npz") as one, np.load(tmp_path / "2.npz") as two:
        assert set(one) == {"mu", "sigma", "features", "feature_extractor", "weights_sha256", "resize", "num_images", "img_size",
                            "classes", "class_counts", "left_out"}
        np.testing.assert_allclose(one["features"], two["features"], atol=1e-5)
        np.testing.assert_allclose(one["sigma"], two["sigma"], atol=1e-5)
        assert one["num_images"] == two["num_images"] == 20 and one["img_size"] == 16


def test_bad_reference_folders_are_named(tmp_path):
    with pytest.raises(FlowARError, match="no such folder of images"):
        references.list_images(tmp_path / "nowhere")
    with pytest.raises(FlowARError, match="0 images found"):
        references.list_images(tmp_path)
    for i, size in enumerate((8, 9)):
        Image.new("RGB", (size, size)).save(tmp_path / f"{i}.png")
    with pytest.raises(FlowARError, match="1.png: 9x9 pixels, but .*0.png is 8x8"):
        references.load_uint8([path for path, _ in references.list_images(tmp_path)])
