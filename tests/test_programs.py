"""The programs end to end: published commands, training, resume, processes, evaluation, messages."""
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import seams
import torch
from helpers import GEOMETRY, ROOT, call, inputs, make_project, run, small_model, train
from PIL import Image

from models import FlowARError, build_model
from util.command_line import parse_options
from util.geometry import default_scales, resolve_geometry
from util.options import SETTINGS, EvaluationOptions, SamplingOptions, TrainingOptions, check_single, check_training, model_options
from util.training.optimization import build_optimizer

PUBLISHED_TRAINING = """--img_size 256 --vae_path x/kl16.ckpt --vae_embed_dim 16 --vae_stride 16 --patch_size 1
    --model {} --diffloss_d {} --diffloss_w {} --epochs 400 --warmup_epochs 100 --batch_size {} --blr 5e-5
    --output_dir ./output_dir/ --resume ./output_dir/ --data_path /path/to/imagenet/
    --cached_path /path/to/imagenet_feature/ {}"""
PUBLISHED_EVALUATION = """--model {} --diffloss_d {} --diffloss_w {} --eval_bsz 256 --num_images 50000 --num_step {} --cfg {}
    --guidance {} --output_dir o --resume o/FlowAR.pth --vae_path x/kl16.ckpt --data_path d --evaluate"""
RELEASE_OPTIONS = """--lr 1e-4 --min_lr 1e-5 --lr_schedule constant --weight_decay 0.02 --ema_rate 0.9999 --grad_clip 3.0
    --attn_dropout 0.1 --proj_dropout 0.1 --label_drop_prob 0.1 --class_num 1000 --seed 1 --device cpu --num_workers 10
    --pin_mem --no_pin_mem --online_eval --eval_freq 40 --save_last_freq 5 --use_cached --log_dir logs --start_epoch 3 --buffer_size 0
    --cfg_schedule constant --temperature 1.0
    --num_step_last 15 --global_batch 2048 --scales 1,4,16 --precision bf16"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def trained(project):
    return train(project, project / "trained"), project / "trained"


@pytest.fixture(scope="module")
def untrained(project):
    """A checkpoint of the first weights, hardly moved."""
    return train(project, project / "untrained", "--epochs 1 --warmup_epochs 1e9")


# ---- commands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size,depth,width,batch,flags", [
    ("flowar_small", 2, 1024, 64, ""), ("flowar_large", 12, 1024, 64, "--use_checkpoint"),
    ("flowar_huge", 12, 1536, 32, "--use_checkpoint")])
def test_published_training_commands(size, depth, width, batch, flags):
    args = parse_options(TrainingOptions, shlex.split(PUBLISHED_TRAINING.format(size, depth, width, batch, flags)))
    args = resolve_geometry(args)
    assert args.scales == (1, 2, 4, 8, 16) and args.use_checkpoint == bool(flags) and args.grad_clip == 3.0
    with torch.device("meta"):
        build_model(args.model, **model_options(args))


@pytest.mark.parametrize("size,depth,width,steps,cfg,guidance", [
    ("flowar_small", 2, 1024, 25, 4.3, 0.9), ("flowar_large", 12, 1024, 25, 2.4, 0.9),
    ("flowar_huge", 12, 1536, 50, 2.4, 0.7)])
def test_published_evaluation_commands(size, depth, width, steps, cfg, guidance):
    args = parse_options(EvaluationOptions, shlex.split(PUBLISHED_EVALUATION.format(size, depth, width, steps, cfg, guidance)))
    check_single(args)
    assert (args.model, args.diffloss_d, args.diffloss_w, args.num_step, args.cfg, args.guidance, args.num_images) == (
        size, depth, width, steps, cfg, guidance, 50000)


@pytest.mark.parametrize("size", "sblh")
@pytest.mark.parametrize("kind", ["train", "eval"])
def test_scripts_hold_the_commands(kind, size):
    text = (ROOT / "scripts" / f"{kind}_flowar_{size}.sh").read_text()
    program, options = re.search(r"(main_flowar|eval)\.py \\\n(.*)\"\$@\"", text, re.DOTALL).groups()
    args = parse_options(TrainingOptions if program == "main_flowar" else EvaluationOptions, shlex.split(options.replace("\\\n", " ")))
    assert args.model.startswith(f"flowar_{size}")


def test_the_fast_script_starts_a_training_with_muon(tmp_path):
    (tmp_path / "torchrun").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "torchrun").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(ROOT / "scripts" / "train_flowar_s_fast.sh"), "--epochs", "20"], env=environment, capture_output=True, text=True,
                          check=True)
    words = done.stdout.splitlines()
    args = parse_options(TrainingOptions, words[words.index("main_flowar.py") + 1:])
    check_training(args)
    assert (args.model, args.optimizer, args.condition_noise, args.epochs, args.batch_size) == ("flowar_small", "muon", 0.3, 20, 64)


@pytest.mark.parametrize("vae", ["sd", "dc"])
def test_commands_of_other_vaes(vae):
    text = (ROOT / "scripts" / f"flowar_s_{vae}vae.sh").read_text().replace("\\\n", " ")
    for program, options in (("main_flowar.py", TrainingOptions), ("eval.py", EvaluationOptions)):
        args = parse_options(options, shlex.split(re.search(rf"{re.escape(program)} (.*)", text)[1]))
        assert args.model == "flowar_small" and args.vae_path == "$VAE"


def test_options_of_the_release_and_new_ones():
    args = parse_options(TrainingOptions, shlex.split(RELEASE_OPTIONS))
    assert args.scales == (1, 4, 16) and args.start_epoch == 3 and args.lr_schedule == "constant"


@pytest.mark.parametrize("options,unused,files", [
    (TrainingOptions, set(), ["main_flowar.py", "engine_flowar.py", "util/recipe.py", "util/training/checkpoint.py"]),
    (EvaluationOptions, {"data_path", "evaluate"}, ["eval.py"]),  # in the published commands, without a meaning there
    (SamplingOptions, set(), ["scripts/sample.py"])])
def test_every_option_is_read(options, unused, files):
    """No option is parsed and then ignored: each name is used outside the dataclass."""
    sources = "".join((ROOT / file).read_text() for file in [
        *files, "util/evaluation/pipeline.py", "util/evaluation/metrics.py", "util/data/source.py", "util/data/tables.py", "util/geometry.py"])
    sources += (ROOT / "util" / "options.py").read_text().split("# ---- what follows")[1]
    for field in fields(options):
        if field.name not in {*unused, *SETTINGS}:
            assert re.search(rf"(args|columns)\.{field.name}\b|\"{field.name}\"", sources), field.name


@pytest.mark.parametrize("side,expected", [(16, (1, 2, 4, 8, 16)), (32, (1, 2, 4, 8, 16, 32)), (8, (1, 2, 4, 8)),
                                           (12, (1, 2, 4, 8, 12)), (1, (1,))])
def test_default_scales(side, expected):
    assert default_scales(side) == expected


# ---- training --------------------------------------------------------------------------------------------------


def test_training_leaves_a_checkpoint_and_a_log(trained):
    content, output = trained
    assert {"model", "model_ema", "optimizer", "epoch", "scaler", "args"} < set(content) and content["epoch"] == 1
    assert content["args"]["batch_size"] == 16
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    groups = {group: [line for line in lines if line["group"] == group] for group in ("train", "val", "val_ema")}
    assert [line["step"] for line in groups["train"]] == [2, 4, 5, 7, 9, 10]
    for key in ("loss", "grad_norm", "lr", "images_per_second", "memory_gib", "loss_scale_1", "loss_scale_4"):
        assert np.isfinite(groups["train"][0][key])
    assert groups["val"][-1]["loss"] != groups["val_ema"][-1]["loss"]
    assert Image.open(output / "samples_epoch0002.png").size[0] > 32
    assert list(output.glob("events.out.tfevents*"))


def distance(a, b):
    """Euclidean distance of two checkpoints' weights."""
    return sum((a["model"][name] - b["model"][name]).square().sum() for name in a["model"] if name != "mask").sqrt().item()


def test_programs_start_without_what_they_may_not_need():
    """torchvision alone takes as long to import as torch: what needs it imports it late."""
    heavy = {"torchvision", "torch_fidelity", "torch._dynamo", "torch.utils.tensorboard", "timm", "scipy", "matplotlib", "huggingface_hub"}
    code = f"import sys, main_flowar, eval; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_two_processes_of_two_forward_passes_train_as_one(project, untrained, tmp_path):
    """Same global batch, on gloo: the same images, times, noise and dropped labels, so the same weights."""
    common = (f"main_flowar.py {GEOMETRY} --vae_path {project}/vae.pth --data_path {project}/images --epochs 1 "
              "--warmup_epochs 0 --blr 1e-2 --num_workers 0 --device cpu --attn_dropout 0 --proj_dropout 0 "
              "--eval_freq 100 --num_step 2 --num_images 2")
    run(f"{common} --batch_size 4 --global_batch 16 --use_checkpoint --output_dir {tmp_path}/two", processes=2)
    one = train(project, tmp_path / "one", "--epochs 1 --warmup_epochs 0 --attn_dropout 0 --proj_dropout 0")
    two = torch.load(tmp_path / "two" / "checkpoint-last.pth", weights_only=True)
    # AdamW turns rounding of tiny gradients into steps of the learning rate's size: compare with how far training went.
    assert distance(one, two) < 0.01 * distance(one, untrained)
    losses = [[json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
               if json.loads(line)["group"] == "val"][-1] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_bf16_trains(project, trained, untrained, tmp_path):
    """bf16 keeps float32 parameters and follows float32 training."""
    bf16 = train(project, tmp_path, "--precision bf16")
    assert all(value.dtype == torch.float32 for value in bf16["model"].values())
    assert 0 < distance(trained[0], bf16) < 0.5 * distance(trained[0], untrained)


def test_main_program_evaluates(project, trained, tmp_path, monkeypatch):
    call(monkeypatch, f"main_flowar.py --evaluate --resume {trained[1]} --vae_path {project}/vae.pth --num_images 3 --num_step 2 --device cpu "
         f"--feature_extractor efficientnet-lite0 --output_dir {tmp_path}")
    assert json.loads((tmp_path / "results.json").read_text())["num_images"] == 3


def test_without_a_cache_one_is_told_how_to_make_it(project, tmp_path, capsys):
    with pytest.raises(FlowARError, match="cached_path .*empty: no cached latents found: make them with: torchrun .*cache_latents.py"):
        train(project, tmp_path / "out", f"--cached_path {tmp_path}/empty --use_cached")
    train(project, tmp_path / "out2", f"--cached_path {tmp_path}/empty --epochs 1")
    assert "encoding images on the fly. To cache them: torchrun" in capsys.readouterr().out


def test_use_checkpoint_changes_nothing(project, trained, tmp_path, monkeypatch):
    recomputed = seams.count(monkeypatch, seams.RECOMPUTED)
    again = train(project, tmp_path, "--use_checkpoint")
    assert len(recomputed) == 10 * (2 + 1)  # 10 steps: 2 transformer blocks, 1 flow block
    assert distance(trained[0], again) < 1e-5


@pytest.mark.slow  # tests/models/test_kernels.py compares the blocks themselves
def test_compile_changes_nothing(project, tmp_path, monkeypatch):
    """Training and the EMA's sample grid through torch.compile, without code generation (and so without a compiler). Dropout draws otherwise."""
    common = "--attn_dropout 0 --proj_dropout 0 --epochs 1 --diffloss_d 1"
    expected = train(project, tmp_path / "eager", common)
    compiled, real = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: (
        compiled.append(function), real(function, **options, backend="aot_eager"))[1])
    again = train(project, tmp_path / "compiled", f"{common} --compile --eval_freq 1")
    torch._dynamo.reset()
    # Of the network 2 transformer blocks, 1 flow block, 3 norms, time embedding, last layer; of the EMA flow block, last layer
    assert len(compiled) == 2 + 1 + 5 + 2
    assert distance(expected, again) < 1e-5


def test_learns_real_images():
    """A few seconds of training on handwritten digits: the loss falls, and stays below that of predicting the mean."""
    from sklearn.datasets import load_digits

    data = torch.from_numpy(load_digits().images).float()[:, None]
    labels = torch.from_numpy(load_digits().target)
    data = (data - data.mean()) / data.std()
    model = small_model(img_size=8, vae_stride=1, vae_embed_dim=1, scale=(1, 4, 8))
    grids = model.pyramid(data)
    # The best constant velocity at every position is -mean, and its error is 1 (the noise) + the data's variance.
    mean_predictor = sum(w * (1 + grid.var(dim=0).mean()) for w, grid in zip(model.scale_weights(), grids)).item()
    optimizer = build_optimizer(model, 4e-3, 0.02)
    model.train()
    losses = []
    for step in range(50):
        g = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(data), (16,), generator=g)
        _, _, t, noise = inputs(model, batch=16, seed=step)
        loss = model(data[chosen], labels[chosen], t=t, noise=noise, drop=torch.zeros(16, dtype=torch.bool))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    late = losses[-10:]
    assert max(late) < 0.75 * mean_predictor
    assert np.mean(late) < 0.6 * np.mean(losses[:5])
