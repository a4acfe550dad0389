"""The commands of docs/your-data.md, as they are printed, with small numbers in the place of theirs."""
import re
import shlex

from helpers import ROOT, call, write_digits
from util.files import read_json

SMALL = {"img_size": "16", "ch": "8", "ch_mult": "1,2,2", "steps": "3", "batch_size": "4", "epochs": "1", "warmup_epochs": "0.5", "eval_freq": "1",
         "num_images": "10", "num_step": "3", "per_class": "1"}


def commands(page):
    """The lines of the page's blocks that call a program of the project, those that end with a backslash joined."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("python ").split("  #")[0] for line in lines if line.startswith("python ")]


def test_from_a_folder_of_pictures_to_samples_and_a_distance(tmp_path, monkeypatch, capsys):
    write_digits(tmp_path / "pictures", 4, size=20)
    found = commands(ROOT / "docs" / "your-data.md")
    programs = [command.split()[0] for command in found]
    assert [name for name in ("scripts/check_images.py", "scripts/train_vae.py", "scripts/cache_latents.py", "main_flowar.py", "eval.py",
                              "scripts/reference_stats.py", "scripts/sample.py", "scripts/distance.py", "scripts/plot_run.py") if name not in programs] == []
    for command in found:
        words = shlex.split(command)
        for i, word in enumerate(words):
            if words[i - 1].removeprefix("--") in SMALL and words[i - 1].startswith("--"):
                words[i] = SMALL[words[i - 1].removeprefix("--")]
            words[i] = re.sub(r"^(pictures|output)/?", lambda match: f"{tmp_path}/{match[0]}", words[i])
        workers = ["--num_workers", "0"] if words[0] in ("scripts/train_vae.py", "scripts/cache_latents.py", "main_flowar.py") else []
        device = ["--device", "cpu"] * (words[0] not in ("scripts/check_images.py", "scripts/plot_run.py"))
        call(monkeypatch, shlex.join([*words, *workers, *device]))
    report = read_json(tmp_path / "output" / "pictures" / "eval" / "results.json")
    assert report["labels"] == "train" and report["reference"].endswith("train.npz") and report["metrics"]
    assert (tmp_path / "output" / "pictures" / "grid.png").is_file() and "floor" in capsys.readouterr().out
