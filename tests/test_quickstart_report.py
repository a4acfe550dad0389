"""The quickstart's data, and its table of images that are those of demo:fashion's student."""
import pytest
from helpers import call, write_digits
from test_plot_run import write_run

from models import FlowARError
from util.evaluation import load_pipeline
from util.files import read_json, write_json


def test_the_classifier_reads_the_labels_that_were_drawn_for(tmp_path, monkeypatch):
    root, name = tmp_path, "frechet_distance_x"
    write_digits(root / "images", 1, size=32, val_per_class=1)
    write_run(root / "run")
    (root / "eval" / "images").mkdir(parents=True)
    pictures = load_pipeline("demo:fashion/student.safetensors", device="cpu")([i // 2 for i in range(20)])
    for i, picture in enumerate(pictures):
        picture.save(root / "eval" / "images" / f"{i:06d}.png")
    write_json({"metrics": ["fid", name], name: 12.34, "num_images": 20, "class_num": 10}, root / "eval" / "results.json")
    call(monkeypatch, f"scripts/quickstart_report.py --root {root} --device cpu")
    summary = read_json(root / "summary.json")
    found = summary["classifier_accuracy"]
    assert summary[name] == 12.34 and found["generated"] >= 0.8 > found["test images"]  # digits
    assert (root / "results.md").read_text().splitlines()[2] == f"| generated | {found['generated']:.1%} | 12.3 |"
    assert (root / "loss.png").is_file()


def test_images_of_another_quickstart_are_refused(tmp_path, monkeypatch, capsys):
    write_digits(tmp_path / "images", 2, val_per_class=1)
    call(monkeypatch, f"scripts/quickstart_data.py --output {tmp_path}/images --train 2 --val 1")
    assert "20 training and 10 test images" in capsys.readouterr().out
    with pytest.raises(FlowARError, match="images: 20 training and 10 test images, expected 10000 and 2000: move or remove"):
        call(monkeypatch, f"scripts/quickstart_data.py --output {tmp_path}/images")
