"""scripts/distill.py: an ordinary run of the project's loop, whose settings of sampling are used wherever it is sampled."""
import pytest
import seams
import torch
from helpers import call, evaluate, evaluation_command, make_project, read_checkpoint, read_log, train
from PIL import Image

from models import FlowARError, load_flowar
from scripts.pictures import read_settings
from scripts.studies import few_step
from util.evaluation import load_pipeline
from util.files import read_json


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = make_project(tmp_path_factory.mktemp("project"))
    train(project, project / "teacher", "--epochs 1 --cfg 2 --guidance 1 --num_step 6")
    return project


def command(project, output, extra=""):
    return (f"scripts/distill.py --resume {project}/teacher --vae_path {project}/vae.pth --data_path {project}/images --output_dir {output} "
            f"--epochs 2 --batch_size 8 --reuse 2 --num_workers 0 --device cpu --log_freq 2 --eval_freq 100 {extra}")


@pytest.fixture(scope="module")
def student(project):
    with pytest.MonkeyPatch.context() as monkeypatch:
        call(monkeypatch, command(project, project / "student", "--save_every 4"))
    return project / "student"


def test_the_student_is_an_ordinary_checkpoint(project, student):
    teacher, content = read_checkpoint(project / "teacher"), read_checkpoint(student)
    assert set(content) == set(teacher) and content["model"].keys() == teacher["model"].keys()
    for key in ("model", "model_ema"):
        moved = {name for name, value in content[key].items() if not torch.equal(value, teacher["model_ema"][name])}
        assert moved == {name for name, _ in load_flowar(student).named_parameters()}
    args = content["args"]
    assert (args["num_step"], args["cfg"], args["time_grid"], args["solver"]) == (2, 1.0, "uniform", "euler")
    assert args["teacher_sampling"] == {"num_steps": 6, "num_steps_last": None, "cfg": 2.0, "guidance": 1.0,
                                        "guidance_low": 0.0, "cfg_schedule": "linear", "temperature": 1.0, "solver": "euler", "time_grid": "release"}
    assert load_flowar(student).config["scale"] == (1, 2, 4)
    losses = [line["loss"] for line in read_log(student) if line["group"] == "train"]
    assert losses[-1] < losses[0]
    assert [line for line in read_log(student) if line["group"] == "val_ema"], "the same loss of validation latents"


def test_its_settings_are_used_by_default(project, student, tmp_path, monkeypatch):
    command = evaluation_command(project, student, tmp_path / "eval").replace("--num_step 6 --cfg 2", "")
    call(monkeypatch, command)
    report = read_json(tmp_path / "eval" / "results.json")
    assert report["steps"] == [2, 2, 2] and report["time_grid"] == "uniform" and report["cfg"] == 1.0
    assert report["nfe"] == [2, 2, 2] and report["flow_head_passes_per_image"] == 6
    pipe = load_pipeline(student, vae=project / "vae.pth", device="cpu")
    assert pipe.settings()["steps"] == [2, 2, 2] and pipe.settings()["cfg"] == 1.0
    image, = pipe([3], seed=5)
    call(monkeypatch, f"scripts/sample.py --resume {student} --vae_path {project}/vae.pth --device cpu --labels 3 --seeds 5 --folder {tmp_path}/folder")
    file, = (tmp_path / "folder").glob("*.png")
    assert read_settings(file)["steps"] == [2, 2, 2] and Image.open(file).tobytes() == image.tobytes()
    other = evaluate(project, student, tmp_path / "other", "--num_step 1 --cfg 1")
    assert other["steps"] == [1, 1, 1]
    with pytest.raises(FlowARError, match="num_steps is 1, .*the release time grid needs at least 2"):
        evaluate(project, student, tmp_path / "no", "--num_step 1 --cfg 1 --time_grid release")


def test_times_and_picture_beside_the_teacher(project, student, tmp_path, monkeypatch):
    for name, target in (("run", project / "teacher"), ("val_stats.npz", project / "vae.pth")):
        (tmp_path / name).symlink_to(target)
    call(monkeypatch, f"scripts/studies/few_step.py --root {tmp_path} --student {student} --images 0 --batch 2 --repeats 1 --device cpu")
    table = (student / "few_step_times.md").read_text().splitlines()
    assert len(table) == 2 + 1 + 10 + 4 and table[3].startswith("| teacher, euler, 8 |") and table[-1].startswith("| student, euler, 1 |")
    assert all(value > 0 for value in read_json(student / "few_step_times.json")["milliseconds"].values())
    assert Image.open(student / "few_step.png").size[0] > Image.open(student / "few_step.png").size[1]
    rows = {name: [300.0 + i] for i, name in enumerate(few_step.make_rows())}
    few_step.draw_curves(rows, {name: 1 + i for i, name in enumerate(rows)}, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size == (1000, 400)


def test_another_teacher_or_setting_is_refused(project, student, monkeypatch):
    with pytest.raises(FlowARError, match=r"teacher_sampling is .*, now .*: use the same, or choose another --output_dir"):
        call(monkeypatch, command(project, student, "--cfg 3"))
    with pytest.raises(FlowARError, match="reuse is 2, now 3"):
        call(monkeypatch, command(project, student).replace("--reuse 2", "--reuse 3"))
    with pytest.raises(FlowARError, match="--proj_dropout is not supported in distillation"):
        call(monkeypatch, command(project, student, "--proj_dropout 0.1"))


@pytest.mark.slow
def test_bf16_leaves_it_its_gradients(project, tmp_path, monkeypatch, capsys):
    recomputed = seams.count(monkeypatch, seams.RECOMPUTED)
    call(monkeypatch, command(project, tmp_path, "--precision bf16 --epochs 1 --use_checkpoint"))
    assert recomputed and len(recomputed) % (2 + 1) == 0  # of the student: 2 transformer blocks, 1 flow block
    assert (said := capsys.readouterr().out).count("starting from scratch") == 1 and "random start" not in said
    content, whole = read_checkpoint(tmp_path), read_checkpoint(project / "teacher")
    assert all(value.dtype == torch.float32 for value in content["model"].values())
    still = [name for name, value in content["model"].items() if "freqs" not in name and name != "mask"
             and torch.equal(value, whole["model_ema"][name])]
    assert not still
