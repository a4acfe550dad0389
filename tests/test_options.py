"""Wrong options: each ends in one line that names the option or the file, with status 2, and nothing is lost or half-written."""
import argparse
import contextlib
import re
import shlex

import numpy as np
import pytest
import torch
from helpers import ROOT, call, evaluate, evaluation_command, make_project, run, train, training_command

from models import AutoencoderKL, FlowARError
from models.settings import Sampling
from models.vae import LatentScale
from models.vaes import save_vae
from util.files import LOCK
from util.command_line import parse_options
from util.options import EvaluationOptions, SaveEvery, TrainingOptions, beyond_release, resolve_training, stored_settings, sweep

LOGS = (".lock", "log.jsonl", "events.out", "run.json")  # how the names of the files begin that a training which ends with an error may leave


def command_of(program, p, out):
    """A small command of a program that works, for the wrong options to be added to. p: folder of `project`."""
    vae, data = f"--vae_path {p}/vae.pth", f"--data_path {p}/images"
    return {
        "main_flowar.py": training_command(p, out),
        "eval.py": evaluation_command(p, p / "run", out),
        "scripts/cache_latents.py": f"scripts/cache_latents.py {data} {vae} --cached_path {out} --img_size 16 --num_workers 0",
        "scripts/train_vae.py": f"scripts/train_vae.py {data} --output {out}/vae.pth --img_size 16 --ch 16 --ch_mult 1,2 --steps 2 "
                                "--batch_size 16 --num_workers 0",
        "scripts/sample.py": f"scripts/sample.py --resume {p}/run {vae} --num_step 4 --per_class 1 --grid {out}/grid.png",
        "scripts/distance.py": f"scripts/distance.py {p}/images/val --feature_extractor efficientnet-lite0",
        "scripts/inspect_latents.py": f"scripts/inspect_latents.py --cached_path {p}/shards {vae} --images 2 --output {out}/latents.png",
    }[program]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Images, VAEs, a trained run, caches, an evaluation and a table; an empty folder and a file that is nothing."""
    p = make_project(tmp_path_factory.mktemp("project"))
    train(p, p / "run", "--epochs 1")
    evaluate(p, p / "run", p / "eval")
    with pytest.MonkeyPatch.context() as patch:
        for form in ("shards", "npz"):
            call(patch, f"{command_of('scripts/cache_latents.py', p, p / form)} --format {form}")
    save_vae(AutoencoderKL(embed_dim=2, ch=16, ch_mult=(1, 1, 2), num_res_blocks=1), p / "channels2.pth")
    save_vae(AutoencoderKL(embed_dim=4, ch=16, ch_mult=(1, 2), num_res_blocks=1), p / "stride2.pth")
    save_vae(AutoencoderKL(embed_dim=4, ch=16, ch_mult=(1, 1, 2), num_res_blocks=1, latent_scale=LatentScale(3.0, 0.1)), p / "other.pth")
    np.savez(p / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(p / "other.npz", feature_extractor="efficientnet-lite0", mu=np.full(1280, np.nan))
    (p / "file").write_text("nothing\n")
    (p / "empty").mkdir()
    return p


def files(folder):
    """{path: (bytes, time of the last change)} of the files below a folder; of locks, which say who looked last, alone that they are there."""
    return {path: path.name == LOCK or (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def message_of(monkeypatch, capsys, command):
    """The line that a program ends with, as distributed.run_main and argparse write it."""
    with pytest.raises((FlowARError, SystemExit)) as ended:
        call(monkeypatch, command)
    if ended.type is SystemExit:
        assert ended.value.code == 2
        return capsys.readouterr().err.strip()
    return str(ended.value)


TRAIN, EVAL, CACHE, VAE, SAMPLE, DISTANCE, INSPECT = (
    "main_flowar.py", "eval.py", *(f"scripts/{name}.py" for name in (
        "cache_latents", "train_vae", "sample", "distance", "inspect_latents")))

# Program, options, the essential part of the message. {p} is the fixture `project`, {out} the output folder.
TABLE = [
    # names and values
    (TRAIN, "--epochs 0", "--epochs: '0': expected an integer of at least 1 and at most 2147483647"),
    (TRAIN, "--data_path ''", "--data_path: '': expected a path"),
    # an option that would be ignored
    (TRAIN, "--feature_extractor efficientnet-lite0", "--feature_extractor is for evaluation only (--evaluate, or --online_eval in training)"),
    (TRAIN, "--guide {p}/run", "--guide is for evaluation only"),
    # settings of sampling
    (EVAL, "--num_step 4:5:6 --num_step_last 3", "num_steps_last is 3, num_steps 4:5:6: expected a single num_steps, at least num_steps_last"),
    (EVAL, "--guidance 0.5 --guidance_low 0.5", "guidance_low is 0.5, guidance 0.5: expected guidance_low < guidance"),
    (EVAL, "--weights raw --guide {p}/run --cfg 1", "--guide {p}/run needs --cfg above 1"),
    # geometry that cannot work
    (TRAIN, "--scales 1,2", "scale ends with 2: expected 4, the latent's size in tokens"),
    (TRAIN, "--img_size 18", "img_size 18 is not a multiple of vae_stride x patch_size = 4 x 1"),
    (TRAIN, "--vae_embed_dim 8", "--vae_embed_dim is 8, but the VAE {p}/vae.pth has 4"),
    (TRAIN, "--vae_path {p}/stride2.pth", "--vae_stride is 4, but the VAE {p}/stride2.pth has 2"),
    (TRAIN, "--class_num 7", "the training set has 10 classes (0, 1, 2 and 7 more), but the model has 7 (--class_num"),
    # contradictions
    (TRAIN, "--compile graphs", "--compile graphs is for sampling only: use --compile in training"),
    (TRAIN, "--start_epoch 2", "--start_epoch 2 leaves nothing to train: --epochs is 2"),
    (TRAIN, "--precision tf32", "--precision tf32 needs CUDA: the device is cpu; use fp32 or bf16"),
    (TRAIN, "--cfg 1,2", "--cfg has 2 values: only an evaluation takes more than one"),
    (TRAIN, "--global_batch 96", "80 training images are fewer than one global batch of 96"),
    (TRAIN, "--lr 1e30 --grad_clip 0 --warmup_epochs 0 --batch_size 4", "20 steps in a row with non-finite loss or gradients, up to step 21: lower --lr"),
    (TRAIN, "--online_eval --feature_extractor efficientnet-lite0 --labels nowhere", "--labels nowhere: expected balanced, train, or a file with one label per line"),
    (TRAIN, "--online_eval --feature_extractor efficientnet-lite0 --cached_path {p}/shards --vae_path nowhere.pth", "--online_eval needs a VAE to decode images"),
    # files and folders
    (TRAIN, "--data_path nowhere", "--data_path nowhere: not found: expected a folder, archive (.zip, .tar) or dataset"),
    (TRAIN, "--vae_path {p}/file", "{p}/file: cannot be read"),
    (TRAIN, "--use_cached --cached_path nowhere", "--cached_path nowhere: no cached latents found: make them with: torchrun"),
    (TRAIN, "--cached_path {p}/shards --img_size 32", "{p}/shards: this cache has img_size 16, but --img_size is 32"),
    (TRAIN, "--cached_path {p}/shards --background black", "{p}/shards: this cache has background (255, 255, 255), but --background is (0, 0, 0)"),
    (TRAIN, "--evaluate", "--log_freq is for training only: leave it out with --evaluate"),
    (EVAL, "--fid_stats {p}/other.npz", "--fid_stats {p}/other.npz: expected mu of shape (1280,), finite"),
    (TRAIN, "--resume {p}/vae.pth", "{p}/vae.pth: no FlowAR weights under 'model'"),
    (TRAIN, "--resume {p}/run --diffloss_w 128", "22 tensors do not fit the model: flownet.time_embed.mlp.0.weight is (64, 256)"),
    (TRAIN, "--resume {p}/run --class_num 12", "--class_num is 12, but {p}/run/checkpoint-000000005.pth was trained with 10"),
    (TRAIN, "--output_dir {p}/run", "--output_dir {p}/run contains checkpoints that this run would overwrite"),
    # evaluation
    (EVAL, "--vae_path {p}/channels2.pth", "checkpoint-000000005.pth: its VAE is --vae_path {p}/vae.pth (tensors "),
    (EVAL, "--fid_stats {p}/stats.npz", "--fid_stats {p}/stats.npz: feature_extractor is inception, expected efficientnet-lite0"),
    (EVAL, "--fid_stats {p}/empty", "{p}/empty: 0 images; expected images in class folders"),
    (EVAL, "--output_dir {p}/eval --cfg 3", "{p}/eval: contains an evaluation with cfg 2.0, now it is 3.0: choose another --output_dir"),
    # scripts
    (CACHE, "--img_size 18", "--img_size 18 is not a multiple of the VAE's stride 4"),
    (CACHE, "--format npz --crops 2", "--format npz always stores the centre crop and its flipped copy, as MAR does: leave out --crops and --no_flip"),
    (CACHE, "--cached_path {p}/shards --seed 3", "{p}/shards: this cache was made with seed 0, now it is 3; choose another --cached_path"),
    (CACHE, "--cached_path {p}/npz", "{p}/npz: this cache was made with another --format"),
    (VAE, "--lr 1e30", "the VAE's weights are not finite"),
    (VAE, "--output {p}/vae.pth", "{p}/vae.pth: already exists: choose another --output"),
    (SAMPLE, "--labels 3,10", "label 10: the model has classes 0..9"),
    (INSPECT, "--vae_path {p}/channels2.pth", "{p}/shards: its VAE is {p}/vae.pth (tensors "),
    (TRAIN, "--resume {p}/run --vae_path {p}/other.pth --epochs 3", "checkpoint-000000005.pth: its VAE is --vae_path {p}/vae.pth (tensors "),
]


@pytest.mark.parametrize("program,options,message", TABLE, ids=[f"{program.split('/')[-1]} {options[:60]}" for program, options, _ in TABLE])
def test_one_line_names_what_is_wrong(project, tmp_path, monkeypatch, capsys, program, options, message):
    out, before = tmp_path / "out", files(project)
    monkeypatch.chdir(tmp_path)  # "nowhere" is not there, and what is written into the working directory is seen
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = f"{command_of(program, project, out)} --device cpu"
    command = f"{command} {options.format(p=project, out=out)}"
    found = message_of(monkeypatch, capsys, command)
    assert message.format(p=project, out=out) in found
    assert "\n" not in found
    assert not [path for path in files(tmp_path) if not path.name.startswith(LOGS)]
    assert files(project) == before


@pytest.mark.parametrize("command,message", [
    ("main_flowar.py --scales 1,x", "error: --scales: '1,x': expected an integer of at least 1 and at most 2147483647"),
    ("eval.py --resume nowhere.pth", "error: nowhere.pth: not found: expected a checkpoint file"),
])
def test_status_and_last_line(command, message):
    done = run(command, check=False)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr and "usage" not in done.stderr


TEXTS = {"weights", "wandb", "labels", "feature_extractor", "image_column_name", "label_column_name", "dataset_config_name", "host", "license", "push",
         "extra", "options", "x", "y", "by"}  # what else may hold any text
PROGRAMS = sorted(str(path.relative_to(ROOT)) for folder in (".", "scripts", "scripts/studies") for path in (ROOT / folder).glob("*.py")
                  if "parse_" in path.read_text() and "__main__" in path.read_text())


def test_every_path_of_every_program_knows_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    actions, make = [], argparse.Action.__init__
    monkeypatch.setattr(argparse.Action, "__init__", lambda action, *args, **options: (actions.append(action), make(action, *args, **options))[1])
    for program in PROGRAMS:
        with pytest.raises(SystemExit):
            call(monkeypatch, f"{program} {'train ' * ('benchmark' in program)}--help")
    texts, paths = set(), set()
    for action in actions:
        if action.nargs == 0 or action.choices:
            continue
        with contextlib.suppress(ValueError, argparse.ArgumentTypeError):
            value = (action.type or str)("~/x")
            (paths if value == "/home/me/x" else texts).add(action.dest)
    assert texts <= TEXTS and {"again", "inpaint", "folder", "output", "tables", "root", "store", "data_path", "vae_path"} <= paths


# ---- what follows from good ones ---------------------------------------------------------------------------------


def resolved(options, processes, saved=None):
    args = resolve_training(parse_options(TrainingOptions, shlex.split(options)), processes, saved)
    return args.batch_size, args.accum_iter, args.global_batch


@pytest.mark.parametrize("options,processes,saved,expected", [
    ("--batch_size 64", 32, None, (64, 1, 2048)), ("--batch_size 64 --global_batch 4096", 32, None, (64, 2, 4096)),
    ("--batch_size 64 --global_batch 2048", 8, None, (64, 4, 2048)), ("--batch_size 64", 8, 2048, (64, 4, 2048)),
    ("--batch_size 48 --global_batch 256", 4, None, (32, 2, 256)), ("--batch_size 64 --global_batch 512", 8, 2048, (64, 1, 512))])
def test_global_batch_on_any_number_of_processes(options, processes, saved, expected):
    assert resolved(options, processes, saved) == expected


@pytest.mark.parametrize("options,processes,saved,message", [
    ("--global_batch 256", 3, None, "the global batch of 256 is not a multiple of 3 processes: change --global_batch or the number of processes"),
    ("--batch_size 64", 3, 256, "the global batch of 256 is not a multiple of 3 processes"),
    ("--global_batch 2", 4, None, "the global batch of 2 is not a multiple of 4 processes")])
def test_global_batches_that_cannot_be_split(options, processes, saved, message):
    with pytest.raises(FlowARError) as ended:
        resolved(options, processes, saved)
    assert message in str(ended.value)


# ---- from Python -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options,message", [
    (dict(epochs=0), "epochs is 0: expected an integer of at least 1"), (dict(epochs=2.5), "epochs is 2.5: expected an integer"),
    (dict(lr=float("nan")), "lr is nan: expected a number of at least 0.0"), (dict(precision="fp8"), "precision is 'fp8': expected one of"),
    (dict(num_step=0), "num_step is 0: expected an integer of at least 1"), (dict(cfg=(1, 0.5)), "cfg is (1, 0.5): expected a number of at least 1")])
def test_values_from_python_are_checked_by_the_same_code(options, message):
    with pytest.raises(FlowARError, match=re.escape(message)):
        TrainingOptions(**options)


def test_text_and_values_make_the_same_options():
    text = "--scales 1,2,4 --cfg 1:2:3 --num_step 5 --save_every 7 --t_dist uniform;shift:2;shift:3 --no_flip --background black --save_images " \
           "--feature_extractor inception=a,efficientnet-lite0"
    values = dict(scales=[1, 2, 4], cfg=(1, 2, 3), num_step=5, save_every=SaveEvery(7), t_dist=["uniform", "shift:2", "shift:3"], flip=False,
                  background=(0, 0, 0), save_images=["png"], feature_extractor=["inception=a", "efficientnet-lite0"])
    assert parse_options(TrainingOptions, text.split()) == TrainingOptions(**values)


def test_save_every():
    texts = {"500": SaveEvery(steps=500), "30m": SaveEvery(minutes=30.0), "0": SaveEvery(), "0m": SaveEvery()}
    assert {text: parse_options(TrainingOptions, ["--save_every", text]).save_every for text in texts} == texts
    for text in ("m", "30s", "1.5", "-5", "-1m", "nanm"):
        with pytest.raises(SystemExit):
            parse_options(TrainingOptions, [f"--save_every={text}"])


def test_settings_come_from_the_options_then_the_checkpoint_then_the_release():
    stored = {"num_steps": 50, "num_steps_last": 15, "cfg": 3.0}
    assert Sampling.of(stored, {}) == Sampling(**stored) and Sampling.of(stored, {"cfg": 2}) == Sampling(**{**stored, "cfg": 2})
    assert Sampling.of(stored, {"num_steps": 10}) == Sampling(num_steps=10, cfg=3.0)
    assert Sampling.of({"cfg_schedule": "constant"}, {"cfg": (1, 2)}).cfg_schedule == "linear"
    with pytest.raises(FlowARError, match="steps: not a sampling setting; expected one of cfg, cfg_schedule, "):
        Sampling.of(stored, {"steps": 3})


def test_a_stored_setting_that_was_removed_is_named_where_it_changed_images(capsys):
    assert stored_settings({"num_step": 5, "num_step_schedule": "linear", "temperature": None}) == {"num_steps": 5} and not capsys.readouterr().out
    assert stored_settings({"num_step": 5, "num_step_schedule": "cosine"}) == {"num_steps": 5}
    assert "warning: the checkpoint sets --num_step_schedule cosine, which no longer exists" in capsys.readouterr().out


def test_a_sweep_has_every_combination():
    args = parse_options(EvaluationOptions, "--cfg 1,2:3 --num_step 5 --solver euler,heun --guidance_low 0,0.1".split())
    points = sweep(args)
    assert len(points) == 8 and points["cfg2.0:3.0_guidance_low0.1_solverheun"].cfg == (2.0, 3.0)
    assert all(point.num_step == 5 for point in points.values())


def test_what_is_chosen_beyond_the_release():
    text = "--time_grid uniform --fsdp --no_flip --scales 1,4 --save_every 10"
    chosen = beyond_release(parse_options(TrainingOptions, f"--epochs 3 --cfg 2 {text}".split()))
    assert sorted(chosen.split()) == sorted(text.split())
    assert beyond_release(TrainingOptions()) == ""


def test_help_has_the_release_first_and_names_choices(capsys):
    with pytest.raises(SystemExit):
        parse_options(TrainingOptions, ["--help"])
    text = capsys.readouterr().out
    first, rest = text.split("beyond the release:", 1)
    assert text.startswith("usage: ") and text.splitlines()[0].endswith(" [options]")
    assert "--batch_size" in first and "--cfg" in first and "--fsdp" not in first and "--fsdp" in rest
    assert "--lr_schedule {cosine,constant,linear_end}" in text and "{euler,heun,ab2,midpoint,rk4,ancestral}" in text
