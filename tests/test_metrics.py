"""Feature networks, distances and their references."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_fidelity
from helpers import write_digits
from PIL import Image
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as inception_module
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from models import FlowARError
from util import metrics


def options(**changes):
    return SimpleNamespace(**{"feature_extractor": "inception", "fid_weights": None, **changes})


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
    """FID and IS of two folders, with --fid_weights a local file, against calculate_metrics on the same folders."""
    write_digits(tmp_path, 2)
    for split in ("train", "val"):  # torch-fidelity reads flat folders
        (tmp_path / f"flat_{split}").mkdir()
        for i, file in enumerate(sorted((tmp_path / split).rglob("*.png"))[:12]):
            Image.open(file).convert("RGB").save(tmp_path / f"flat_{split}" / f"{i:03d}.png")
    expected = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "flat_train"), input2=str(tmp_path / "flat_val"), cuda=False, fid=True, isc=True,
        feature_extractor_weights_path=random_inception, verbose=False, save_cpu_ram=True, cache=False)
    extractor = metrics.build_extractor(options(fid_weights=random_inception), torch.device("cpu"))
    reference = metrics.folder_statistics(tmp_path / "flat_val", extractor, torch.device("cpu"))
    with torch.no_grad():
        features, logits = extractor(metrics.load_uint8(metrics.image_files(tmp_path / "flat_train")))
    fid = metrics.frechet_distance(metrics.statistics(features), reference)
    assert fid == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    mean, std = metrics.inception_score(logits)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert std == pytest.approx(expected["inception_score_std"], rel=1e-4, abs=1e-9)


def test_weights_that_cannot_be_had_are_explained(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(inception_module, "load_state_dict_from_url", offline)
    with pytest.raises(FlowARError, match="cannot be downloaded.*--fid_weights.*efficientnet-lite0"):
        metrics.build_extractor(options(), "cpu")
    with pytest.raises(FlowARError, match="nowhere.pth: no such file"):
        metrics.build_extractor(options(fid_weights="nowhere.pth"), "cpu")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(FlowARError, match="other.pth: not torch-fidelity's Inception weights"):
        metrics.build_extractor(options(fid_weights=str(tmp_path / "other.pth")), "cpu")
    with pytest.raises(FlowARError, match="--fid_weights is for inception"):
        metrics.build_extractor(options(feature_extractor="efficientnet-lite0", fid_weights="x"), "cpu")


def test_efficientnet_features_tell_images_apart(tmp_path):
    write_digits(tmp_path, 3)
    extractor = metrics.build_extractor(options(feature_extractor="efficientnet-lite0"), torch.device("cpu"))
    images = metrics.load_uint8(metrics.image_files(tmp_path / "train"))
    with torch.no_grad():
        features, logits = extractor(images)
        alone, _ = extractor(images[3:4])
    assert features.shape == (30, 1280) and logits is None
    torch.testing.assert_close(features[3:4], alone, atol=1e-4, rtol=1e-3)
    assert "fid" not in extractor.distance
    same = metrics.frechet_distance(metrics.statistics(features), metrics.statistics(features))
    noise = metrics.statistics(extractor(torch.randint_like(images, 255))[0].detach())
    assert abs(same) < 1e-2 < metrics.frechet_distance(metrics.statistics(features), noise)


def test_bad_statistics_are_named(tmp_path):
    path = tmp_path / "stats.npz"
    with pytest.raises(FlowARError, match="stats.npz: no such file"):
        metrics.load_statistics(path, 4)
    path.write_bytes(b"PK junk")
    with pytest.raises(FlowARError, match="cannot read mu and sigma"):
        metrics.load_statistics(path, 4)
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(FlowARError, match=r"mu is \(3,\) and sigma \(3, 3\), expected \(4,\)"):
        metrics.load_statistics(path, 4)
    np.savez(path, mu=np.full(4, np.nan), sigma=np.eye(4))
    with pytest.raises(FlowARError, match="not finite"):
        metrics.load_statistics(path, 4)
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4))
    assert metrics.load_statistics(path, 4)["sigma"].shape == (4, 4)


def test_bad_reference_folders_are_named(tmp_path):
    with pytest.raises(FlowARError, match="no such folder of images"):
        metrics.image_files(tmp_path / "nowhere")
    with pytest.raises(FlowARError, match="0 images found"):
        metrics.image_files(tmp_path)
    for i, size in enumerate((8, 9)):
        Image.new("RGB", (size, size)).save(tmp_path / f"{i}.png")
    with pytest.raises(FlowARError, match="1.png: 9x9 pixels, but .*0.png is 8x8"):
        metrics.load_uint8(metrics.image_files(tmp_path))
