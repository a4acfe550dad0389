"""Wrong options: each ends in one line that names the option or the file, with status 2, and nothing is lost or half-written."""
import re
import shlex

import numpy as np
import pytest
import torch
from helpers import call, evaluate, evaluation_command, make_project, run, train, training_command

from models import AutoencoderKL, FlowARError
from models.vae import LatentScale
from models.vaes import save_vae
from util.training.checkpoint import LOCK
from util.options import SaveEvery, resolve_training, save_every, training_parser

LOGS = (".lock", "log.jsonl", "events.out", "run.json")  # how the names of the files begin that a training which ends with an error may leave
NAMED = re.compile(r"--[a-z]|^\S+: |[a-z]_[a-z]|^scale |^argument what")  # an option, a file, an argument of the model


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
        "scripts/reference_stats.py": f"scripts/reference_stats.py --ref_images {p}/images/val --output {out}/stats.npz "
                                      "--feature_extractor efficientnet-lite0",
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
        return capsys.readouterr().err.splitlines()[-1]
    return str(ended.value)


TRAIN, EVAL, CACHE, VAE, SAMPLE, STATS, DISTANCE, INSPECT = (
    "main_flowar.py", "eval.py", *(f"scripts/{name}.py" for name in (
        "cache_latents", "train_vae", "sample", "reference_stats", "distance", "inspect_latents")))

# Program, options, the essential part of the message. {p} is the fixture `project`, {out} the output folder.
TABLE = [
    # names, and numbers of every kind
    (TRAIN, "--no_such_option 3", "unrecognized arguments: --no_such_option 3"),
    (TRAIN, "flowar_small", "unrecognized arguments: flowar_small"),
    (TRAIN, "--epochs", "--epochs: expected one argument"),
    (TRAIN, "--epochs 0", "--epochs: 0 is out of range: expected 1 or more"),
    (TRAIN, f"--epochs 1{400 * '0'}", "is out of range: expected between 1 and 2147483647"),
    (TRAIN, "--warmup_epochs inf", "--warmup_epochs: inf is not finite"),
    (TRAIN, "--blr nan", "--blr: nan is not finite"),
    (TRAIN, "--min_lr=-1e-5", "--min_lr: -1e-5 is out of range: expected 0.0 or more"),
    (TRAIN, "--ema_rate 1.5", "--ema_rate: 1.5 is out of range: expected between 0.0 and 1.0"),
    (TRAIN, "--save_every 5h", "--save_every: '5h' is neither a number of steps ('500') nor of minutes ('30m')"),
    (TRAIN, "--timeout 0", "--timeout: 0 is out of range: expected between 1.0 and 1000000.0"),
    (TRAIN, "--wandb a/b", "--wandb: 'a/b' is no name of a project"),
    (TRAIN, "--data_path ''", "--data_path: it is empty: expected a path"),
    # geometry that cannot work
    (TRAIN, "--scales 1,x", "--scales: '1,x' is not a comma-separated list of integers"),
    (TRAIN, "--scales 2,4", "scale is 2,4: expected an increasing list that starts with 1"),
    (TRAIN, "--scales 1,2", "scale ends with 2: expected 4, the latent's size in tokens"),
    (TRAIN, "--img_size 18", "img_size 18 is not a multiple of vae_stride x patch_size = 4 x 1"),
    (TRAIN, "--vae_embed_dim 8", "--vae_embed_dim is 8, but the VAE {p}/vae.pth has 4"),
    (TRAIN, "--vae_path {p}/channels2.pth", "--vae_embed_dim is 4, but the VAE {p}/channels2.pth has 2"),
    (TRAIN, "--vae_path {p}/stride2.pth", "--vae_stride is 4, but the VAE {p}/stride2.pth has 2"),
    (TRAIN, "--class_num 7", "the training set has 10 classes (0, 1, 2 and 7 more), but the model has 7 (--class_num"),
    (TRAIN, "--diffloss_w 100", "diffloss_w is 100: expected a multiple of the flow head's head size, 64"),
    (TRAIN, "--buffer_size 2", "buffer_size is 2: only 0 is supported"),
    # contradictions
    (TRAIN, "--compile graphs", "--compile graphs is for sampling: in training use --compile"),
    (TRAIN, "--precision tf32", "--precision tf32 needs CUDA: the device is cpu; use fp32 or bf16"),
    (TRAIN, "--cfg 1,2", "--cfg has 2 values: only an evaluation takes several"),
    (TRAIN, "--use_cached", "--use_cached needs --cached_path"),
    (TRAIN, "--start_epoch 2", "--start_epoch 2 leaves nothing to train of --epochs 2"),
    (TRAIN, "--global_batch 24 --accum_iter 2", "--global_batch is 24, but --batch_size 16 x 1 processes x --accum_iter 2 is 32"),
    (TRAIN, "--global_batch 96", "80 training images are fewer than one global batch of 96"),
    (TRAIN, "--lr 1e30 --grad_clip 0 --warmup_epochs 0 --max_bad_steps 3", "3 steps in a row were not finite, up to step 4 (--max_bad_steps 3)"),
    (TRAIN, "--labels train", "--labels train is for an evaluation: in training it needs --online_eval"),
    (TRAIN, "--online_eval --feature_extractor efficientnet-lite0 --labels nowhere", "--labels nowhere: expected balanced, train, or a file with a label in each line"),
    (TRAIN, "--online_eval --feature_extractor efficientnet-lite0 --labels train --all_classes", "--all_classes is for --labels balanced or a file"),
    (TRAIN, "--weights raw", "--weights raw is for an evaluation: training goes on with both"),
    (TRAIN, "--eval_num_images 50", "--eval_num_images is for an evaluation: in training it needs --online_eval"),
    (TRAIN, "--feature_extractor efficientnet-lite0", "--feature_extractor is for an evaluation: in training it needs --online_eval"),
    (TRAIN, "--lr_schedule constant --min_lr 1e-6", "--min_lr 1e-06 is where the cosine ends: leave it out with --lr_schedule constant"),
    (EVAL, "--fid_stats {p}/stats.npz --background black", "--background is of transparent images in --ref_images: leave it out"),
    (TRAIN, "--fid_stats {p}/stats.npz", "--fid_stats is for an evaluation: in training it needs --online_eval"),
    (TRAIN, "--online_eval --feature_extractor efficientnet-lite0 --fid_stats {p}/stats.npz --ref_images {p}/images/val", "--fid_stats and --ref_images are two references: give one"),
    (TRAIN, "--online_eval --feature_extractor efficientnet-lite0 --fid_weights {p}/file", "--fid_weights is for inception, but --feature_extractor is efficientnet-lite0"),
    (TRAIN, "--online_eval --feature_extractor efficientnet-lite0 --cached_path {p}/shards --vae_path nowhere.pth", "--online_eval needs the VAE to decode with"),
    (TRAIN, "--online_eval --feature_extractor efficientnet-lite0 --cached_path nowhere --vae_path nowhere.pth", "nowhere.pth: no such file"),
    (TRAIN, "--evaluate", "--resume is missing"),
    # files and folders
    (TRAIN, "--data_path nowhere", "--data_path nowhere: no such file or folder"),
    (TRAIN, "--data_path {p}/empty", "--data_path {p}/empty: there is no train/ in it: it holds train/ and val/, each with a folder per class"),
    (TRAIN, "--vae nothing", "--vae nothing: expected one of kl16, diffusers"),
    (TRAIN, "--vae_path {p}/file", "{p}/file: not a weights file, or damaged"),
    (TRAIN, "--use_cached --cached_path nowhere", "--cached_path nowhere: no cached latents there; make them with: torchrun"),
    (TRAIN, "--cached_path {p}/file", "--cached_path {p}/file: is a file, expected a directory"),
    (TRAIN, "--cached_path {p}/shards --img_size 32", "{p}/shards: this cache has img_size 16, but --img_size is 32"),
    (EVAL, "--num_step 4:5:6 --num_step_last 3", "--num_step 4:5:6 has one for each scale: leave out --num_step_last 3"),
    (EVAL, "--num_step 4:5", "--num_step 4:5 has 2 values: expected one for each of 3 scales"),
    (EVAL, "--cfg 2:3:4:5", "--cfg 2.0:3.0:4.0:5.0 has 4 values: expected one for each of 3 scales"),
    (EVAL, "--num_step 4:1:6", "--num_step 1 is too few for the release time grid: give at least 2, or --time_grid uniform"),
    (EVAL, "--guidance 0.5 --guidance_low 0.5", "--guidance_low 0.5 is not below --guidance 0.5: guidance would act nowhere"),
    (EVAL, "--weights raw --guide {p}/run --cfg 1", "--guide {p}/run: give --guide_strength, or --cfg, above 1"),
    (EVAL, "--num_step_schedule cosine", "--num_step_schedule cosine needs --num_step_last, to which it leads"),
    (EVAL, "--cfg 1:2:3 --cfg_schedule constant", "--cfg 1.0:2.0:3.0 has one for each scale: leave out --cfg_schedule constant"),
    (EVAL, "--guide nowhere.pth", "nowhere.pth: no such checkpoint"),
    (TRAIN, "--guide {p}/run", "--guide {p}/run is for sampling: training draws its samples without"),
    (TRAIN, "--num_step 4:5", "--num_step 4:5 has 2 values: expected one for each of 3 scales"),
    (TRAIN, "--init_from nowhere.pth", "nowhere.pth: no such checkpoint"),
    (TRAIN, "--t_dist normal", "t_dist is 'normal': expected uniform, logit_normal:MEAN,STD or shift:K"),
    (TRAIN, "--t_dist 'uniform;shift:2'", "t_dist has 2 values (('uniform', 'shift:2')): expected one for each of 3 scales"),
    (EVAL, "--num_step 4 --num_step_last 9", "--num_step_last 9 is above --num_step 4: steps are annealed down to it"),
    (TRAIN, "--background blueish", "--background: 'blueish' is no colour: expected white, '#ff8000' or 255,128,0"),
    (TRAIN, "--no_val --cached_val_path {p}/shards", "--no_val and --cached_val_path: give one of them"),
    (TRAIN, "--cached_path {p}/shards --background black", "{p}/shards: this cache has background [255, 255, 255], but --background is [0, 0, 0]"),
    (TRAIN, "--cached_path {p}/npz --img_size 32", "is (8, 4, 4): expected (8, 8, 8)"),
    (TRAIN, "--cached_val_path {p}/empty", "--cached_val_path {p}/empty: no cached latents there"),
    (TRAIN, "--resume {p}/vae.pth", "{p}/vae.pth: no FlowAR weights in this file"),
    (TRAIN, "--resume {p}/run --diffloss_w 64", "44 tensors do not fit the model: flownet.time_embed.mlp.0.weight is (128, 256)"),
    (TRAIN, "--resume {p}/run --class_num 12", "--class_num is 12, but {p}/run/checkpoint-000000005.pth was trained with 10"),
    (TRAIN, "--output_dir {p}/run", "--output_dir {p}/run holds checkpoints that this run would overwrite"),
    (TRAIN, "--output_dir {p}/file", "{p}/file: cannot be made"),
    # evaluation
    (EVAL, "--labels nowhere", "--labels nowhere: expected balanced, train, or a file with a label in each line"),
    (EVAL, "--labels {p}/file", "--labels {p}/file: line 1 is 'nothing', expected a label from 0 to 9"),
    (EVAL, "--labels train --all_classes", "--all_classes is for --labels balanced or a file"),
    (EVAL, "--guidance 0.5,1.5", "--guidance: 1.5 is out of range: expected between 0.0 and 1.0"),
    (EVAL, "--solver euler,rk5", "--solver: 'rk5' is unknown: expected one of euler, heun, ab2, midpoint, rk4"),
    (EVAL, "--precision tf32", "--precision tf32 needs CUDA"),
    (EVAL, "--feature_extractor resnet", "--feature_extractor: 'resnet' is unknown: expected one of inception, "),
    (EVAL, "--resume ''", "--resume is missing: give a checkpoint"),
    (EVAL, "--resume {p}/empty", "{p}/empty: no checkpoint-last.pth in this directory"),
    (EVAL, "--resume {p}/file", "{p}/file: not a weights file, or damaged"),
    (EVAL, "--vae_path {p}/channels2.pth", "checkpoint-000000005.pth: its VAE is --vae_path {p}/vae.pth (tensors "),
    (EVAL, "--class_num 12", "--class_num is 12, but {p}/run/"),
    (EVAL, "--scales 1,4", "--scales is (1, 4), but {p}/run/"),
    (EVAL, "--model flowar_small", "212 tensors do not fit the model: encoder_pos_embed_learned is (1, 21, 128), the model's is (1, 21, 768)"),
    (EVAL, "--diffloss_d 4", "12 tensors do not fit the model: flownet.res_blocks.3.attn.qkv.weight is missing"),
    (EVAL, "--fid_stats {p}/stats.npz --ref_images {p}/images/val", "--fid_stats and --ref_images are two references: give one"),
    (EVAL, "--fid_stats {p}/stats.npz", "--fid_stats {p}/stats.npz: its feature_extractor is inception, here it is efficientnet-lite0"),
    (EVAL, "--fid_stats {p}/file", "--fid_stats {p}/file: not an .npz with mu and sigma"),
    (EVAL, "--ref_images nowhere", "nowhere: no such folder of images"),
    (EVAL, "--ref_images {p}/empty", "{p}/empty: 0 images found, expected at least 2"),
    (EVAL, "--feature_extractor clip-vit-b-32 --fid_weights clip-vit-b-32={p}/vae.pth", "--fid_weights {p}/vae.pth: not the weights of clip-vit-b-32"),
    (EVAL, "--fid_weights {p}/file", "--fid_weights is for inception, but --feature_extractor is efficientnet-lite0"),
    (EVAL, "--feature_extractor efficientnet-lite0 --fid_weights efficientnet-lite0={p}/vae.pth", "--fid_weights {p}/vae.pth: not the weights of efficientnet-lite0"),
    (EVAL, "--feature_extractor inception --fid_weights {p}/vae.pth", "--fid_weights {p}/vae.pth: not the weights of inception"),
    (EVAL, "--output_dir {p}/eval --cfg 3", "{p}/eval: the evaluation there has cfg 2.0, now it is 3.0; choose another --output_dir"),
    (EVAL, "--output_dir {p}/file", "{p}/file: cannot be made"),
    # scripts
    (CACHE, "--img_size 18", "--img_size 18 is not a multiple of the VAE's stride 4"),
    (CACHE, "--crops 100000000000", "--crops: 100000000000 is out of range: expected between 1 and 1000"),
    (CACHE, "--format npz --crops 2", "--format npz is MAR's layout, which holds the centre crop only: leave out --crops"),
    (CACHE, "--cached_path {p}/npz --format npz --verify", "--verify is for a finished cache of shards"),
    (CACHE, "--verify", "--verify is for a finished cache of shards, which remembers its images: there is none at {out}"),
    (CACHE, "--data_path {p}/images/train", "--data_path {p}/images/train: there is no train/ in it: give {p}/images"),
    (CACHE, "--cached_path {p}/shards --seed 3", "{p}/shards: this cache was made with seed 0, now it is 3; choose another --cached_path"),
    (CACHE, "--cached_path {p}/npz", "{p}/npz: this cache was made with another --format"),
    (CACHE, "--cached_path {p}/shards --format npz", "{p}/shards: this cache was made with another --format"),
    (CACHE, "--cached_path {p}/file", "{p}/file: cannot be made"),
    (VAE, "--img_size 17", "--img_size 17 is not a multiple of the VAE's stride 2 (2 levels)"),
    (VAE, "--batch_size 1000", "{p}/images/train: 80 images are fewer than --batch_size 1000"),
    (VAE, "--lr 1e30", "the VAE's weights are not finite"),
    (VAE, "--output {p}/vae.pth", "{p}/vae.pth: a file is there already: train it further with --resume"),
    (VAE, "--output {p}/images", "{p}/images: is a directory, expected a file to write"),
    (SAMPLE, "--labels 3,10", "label 10: the model has classes 0..9"),
    (SAMPLE, "--num_step 4,8", "--num_step has 2 values: only an evaluation takes several"),
    (SAMPLE, "--grid ''", "argument --grid: it is empty: expected a path"),
    (SAMPLE, "--grid {out}/grid.xyz", "{out}/grid.xyz: no kind of picture ends so, expected .png or the like"),
    (SAMPLE, "--class_names {p}/file", "{p}/file: no such folder (expected class folders)"),
    (STATS, "--ref_images {p}/file", "{p}/file: no such folder of images (a file is there: unpack it)"),
    (STATS, "--output {p}/images", "{p}/images: is a directory, expected a file to write"),
    (STATS, "--fid_weights {p}/file", "--fid_weights is for inception, but --feature_extractor is efficientnet-lite0"),
    (DISTANCE, "--vae_path {p}/vae.pth --halves", "two folders, or one and --vae or --vae_path, or one and --halves: give one of these"),
    (DISTANCE, "nowhere", "nowhere: no such folder of images"),
    (DISTANCE, "--vae nothing", "--vae nothing: expected one of kl16, diffusers"),
    (INSPECT, "--cached_path {p}/npz", "--cached_path {p}/npz: no cache of shards there; scripts/cache_latents.py makes one"),
    (INSPECT, "--vae_path {p}/channels2.pth", "{p}/shards: 4 channels, but the VAE has 2"),
    (INSPECT, "--vae_path {p}/other.pth", "{p}/shards: its VAE is kl16 (tensors "),
    (TRAIN, "--resume {p}/run --vae_path {p}/other.pth --epochs 3", "checkpoint-000000005.pth: its VAE is --vae_path {p}/vae.pth (tensors "),
    (TRAIN, "--cached_path {p}/shards --vae_path {p}/other.pth", "{p}/shards: its VAE is kl16 (tensors "),
    (INSPECT, "--data_path {p}/empty", "--data_path {p}/empty: there is no train/ in it"),
    ("main_flowar.py", "--pyramid image --latent_norm channel --data_path {p}/images --vae_path {p}/vae.pth", "cached latents, which --pyramid image cannot take"),
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
    assert NAMED.search(found.split(" error: ")[-1])
    assert not [path for path in files(tmp_path) if not path.name.startswith(LOGS)]
    assert files(project) == before


@pytest.mark.parametrize("command,message", [
    ("main_flowar.py --scales 1,x", "main_flowar.py: error: argument --scales: '1,x' is not a comma-separated list of integers"),
    ("eval.py --resume nowhere.pth", "nowhere.pth: no such checkpoint file or directory"),
])
def test_status_and_last_line(command, message):
    done = run(command, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(message) and "Traceback" not in done.stderr


# ---- what follows from good ones ---------------------------------------------------------------------------------


def resolved(options, processes, saved=None):
    args = training_parser().parse_args(shlex.split(options))
    args = resolve_training(args, processes, saved)
    return args.batch_size, args.accum_iter, args.global_batch


@pytest.mark.parametrize("options,processes,saved,expected", [
    ("--batch_size 64", 32, None, (64, 1, 2048)), ("--batch_size 64 --accum_iter 4", 8, None, (64, 4, 2048)),
    ("--batch_size 64 --global_batch 2048", 8, None, (64, 4, 2048)), ("--batch_size 64", 8, 2048, (64, 4, 2048)),
    ("--batch_size 48 --global_batch 256", 4, None, (32, 2, 256)), ("--batch_size 64 --global_batch 512", 8, 2048, (64, 1, 512))])
def test_global_batch_on_any_number_of_processes(options, processes, saved, expected):
    assert resolved(options, processes, saved) == expected


@pytest.mark.parametrize("options,processes,saved,message", [
    ("--global_batch 256", 3, None, "a global batch of 256 cannot be dealt to 3 processes: use a divisor of it, or --global_batch"),
    ("--batch_size 64", 3, 256, "a global batch of 256 cannot be dealt to 3 processes"),
    ("--global_batch 2", 4, None, "a global batch of 2 cannot be dealt to 4 processes"),
    ("--global_batch 512 --accum_iter 2", 8, None, "--batch_size 64 x 8 processes x --accum_iter 2 is 1024: leave out --accum_iter")])
def test_global_batches_that_cannot_be_dealt(options, processes, saved, message):
    with pytest.raises(FlowARError) as ended:
        resolved(options, processes, saved)
    assert message in str(ended.value)


@pytest.mark.parametrize("option", ["--output_dir", "--log_dir", "--cached_path", "--cached_val_path"])
def test_folders_of_others_files_are_utf8(option, capsys):
    with pytest.raises(SystemExit):
        training_parser().parse_args([option, "n\udce9w"])
    assert "is not UTF-8, which TensorBoard and safetensors need" in capsys.readouterr().err


def test_a_base_rate_that_is_not_used_is_said(capsys):
    resolved("--lr 1e-3 --blr 1e-4", 1)
    assert "warning: --blr 0.0001 is not used: --lr is given" in capsys.readouterr().out


def test_a_minimum_above_the_peak_rate_is_said(capsys):
    resolved("--min_lr 5 --batch_size 16 --blr 1e-2", 1)
    assert "--min_lr 5 is above the peak learning rate 0.000625" in capsys.readouterr().out


def test_a_warm_up_that_does_not_end_is_said(capsys):
    resolved("--epochs 50", 1)
    assert "--warmup_epochs 100 is more than --epochs 50: the peak learning rate will not be reached" in capsys.readouterr().out


@pytest.mark.parametrize("text,expected", [
    ("500", SaveEvery(steps=500)), ("30m", SaveEvery(minutes=30.0)), ("0", SaveEvery()), ("0m", SaveEvery())])
def test_save_every(text, expected):
    assert save_every(text) == expected
