"""scripts/quickstart_report.py: the table of a quickstart whose generated images are the test images themselves."""
import shutil

import torch
from helpers import call, save_vae, small_vae, write_digits
from scripts import quickstart_report
from test_plot_run import write_run

from util.data import list_images
from util.evaluation import extractors
from util.files import read_json, write_json

FRECHET = "frechet_distance_mean"


class Mean(extractors.Extractor):
    name, dim, resize, network = "mean", 3, "none", torch.nn.Identity()

    def forward(self, images):
        return {"features": torch.cat([images[:, :1].float().mean(dim=(2, 3)), images[:, 0, ::16, 16].float()], dim=1) / 255}


def test_generated_test_images_are_at_distance_0_and_found_as_often(tmp_path, monkeypatch):
    root = tmp_path
    save_vae(small_vae(), root / "vae.pth")
    write_digits(root / "images", 6, size=32, val_per_class=2)
    write_run(root / "run")
    (root / "eval" / "images").mkdir(parents=True)
    test = list_images(root / "images" / "val")
    for index in range(len(test)):
        shutil.copy(test.path(index), root / "eval" / "images" / f"{index:06d}.png")
    monkeypatch.setitem(extractors.EXTRACTORS, "mean", lambda device, file: Mean())
    monkeypatch.setattr(quickstart_report, "STEPS", 3)
    call(monkeypatch, f"scripts/reference_stats.py --ref_images {test.root} --feature_extractor mean --output {root}/val.npz")
    write_json({"feature_extractor": "mean", "reference": f"{root}/val.npz", "img_size": 32, "num_images": len(test)},
               root / "eval" / "results.json")
    call(monkeypatch, f"scripts/quickstart_report.py --root {root} --device cpu")
    summary = read_json(root / "summary.json")
    assert abs(summary["generated"][FRECHET]) < 1e-6 < summary["training images (the floor)"][FRECHET]
    assert summary["generated"]["classifier_accuracy"] == summary["test images"]["classifier_accuracy"]
    assert (root / "results.md").read_text().startswith("| 20 images |") and (root / "loss.png").is_file()
