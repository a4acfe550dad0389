"""From Python: pictures by label and seed, and what keeping scales or cells means, bit for bit."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import golden
from scripts import sample
from helpers import call, inputs, read_checkpoint, run_with_settings, small_model, train
from models import FlowARError, vaes
from models.flow_matching import SOLVERS
from models.settings import Sampling
from models.vae import DiagonalGaussian, LatentScale
from scripts.pictures import read_settings
from util.command_line import parse_options
from util.evaluation import load_pipeline
from util.evaluation.labels import Classes, class_names, find_label
from util.evaluation.pipeline import open_for_sampling
from util.evaluation.sampler import Sampler
from util.options import EvaluationOptions


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run_with_settings(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def pipe(trained):
    return load_pipeline(trained, device="cpu")


def raw_file(run):
    """The path of a run's raw weights, alone in a file."""
    file = run.parent / "raw.pth"
    torch.save(read_checkpoint(run)["model"], file)
    return str(file)


def pixels(pictures):
    return np.stack([np.asarray(picture) for picture in pictures])


def same(some, others):
    return np.array_equal(pixels(some), pixels(others))


# ---- the mathematics: FlowAR.sample_pyramid ------------------------------------------------------------------------------


@pytest.mark.parametrize("keep,cfg", [(0, 3.0), (1, 3.0), (2, 1.0), (3, 3.0)])
def test_scales_that_are_given_stay_and_the_rest_is_drawn_as_ever(keep, cfg):
    model = small_model()
    _, labels, _, noise = inputs(model)
    options = dict(noise=noise, num_steps=4, cfg=cfg)
    whole = model.sample_pyramid(labels, **options)
    again = model.sample_pyramid(labels, given=whole[:keep], **options)
    assert all(map(torch.equal, again, whole))
    other = model.sample_pyramid((labels + 1) % 10, given=whole[:keep], **options)
    assert [torch.equal(a, b) for a, b in zip(other, whole)] == [k < keep for k in range(len(whole))]


@pytest.mark.parametrize("solver", SOLVERS)
def test_known_cells_stay_at_every_scale_and_time(solver):
    """What the flow head reads of them is (1 - t) x + t e; at the end they are x, bit for bit."""
    model = small_model()
    latents, labels, _, noise = inputs(model)
    pyramid = model.pyramid(latents)
    cells = [torch.zeros(1, 1, s, s, dtype=torch.bool) for s in model.scale]
    for mask in cells[1:]:
        mask[..., : mask.shape[-1] // 2] = True
    seen = []
    model.flownet.register_forward_pre_hook(lambda module, given: seen.append((given[0][:len(labels)], float(given[1][0]))))
    drawn = model.sample_pyramid(labels, noise=noise, num_steps=5, cfg=2.0, solver=solver, known=(pyramid, cells))
    for x, known, mask in zip(drawn, pyramid, cells):
        there = mask.expand_as(x)
        assert torch.equal(x[there], known[there]) and not torch.isclose(x[~there], known[~there]).any()
    for x, t in seen:
        k = [s * s for s in model.scale].index(x.shape[1])
        path = (1 - t) * pyramid[k].flatten(2).mT + t * noise[k]
        there = cells[k].flatten(2).mT.expand_as(x)
        if there.any():
            golden.assert_close(x[there], path[there])


def test_all_known_is_the_image_itself_and_none_is_as_ever():
    model = small_model()
    latents, labels, _, noise = inputs(model)
    pyramid = model.pyramid(latents)
    for value in (True, False):
        cells = [torch.full((1, 1, s, s), value) for s in model.scale]
        expected = pyramid if value else model.sample_pyramid(labels, noise=noise, num_steps=4)
        assert all(map(torch.equal, model.sample_pyramid(labels, noise=noise, num_steps=4, known=(pyramid, cells)), expected))


# ---- names ------------------------------------------------------------------------------------------------------------------


def test_names_of_imagenet_need_no_download():
    names = class_names(Classes(1000))
    assert names[207] == "golden retriever" and class_names(Classes(1000, [f"n{i:08d}" for i in range(1000)])) == names
    assert find_label("Golden Retriever", names) == find_label("207", names) == find_label(207, names) == 207
    with pytest.raises(FlowARError, match="'crane': 2 classes have this name, use a number: 0, 2"):
        find_label("crane", ["crane", "dog", "crane"])
    with pytest.raises(FlowARError, match="'retriever': no such class; similar names: .*golden retriever"):
        find_label("retriever", names)
    with pytest.raises(FlowARError, match="the model has classes 0..999"):
        find_label(1000, names)


def test_other_names_are_the_checkpoints():
    assert class_names(Classes(3, ["cat", "dog"])) == ["cat", "dog", "2"] and class_names(Classes(2)) == ["0", "1"]
    assert find_label("dog", ["Dog", "dog"]) == 1 and find_label("DOG", ["cat", "dog"]) == 1


# ---- the pipeline -----------------------------------------------------------------------------------------------------------


def test_it_samples_as_the_run_was_told(pipe):
    assert (pipe.sampler.sampling.cfg, pipe.sampler.sampling.guidance, pipe.sampler.sampling.num_steps) == (2.0, 1.0, 4)
    assert pipe.names == list("0123456789") and pipe.description["weights"] == "ema" and pipe.description["vae"].endswith("vae.pth")


@pytest.mark.parametrize("extra,kind,key", [("", "ema", "model_ema"), ("--weights raw", "raw", "model")])
def test_weights_that_are_asked_for_are_used_and_named(trained, capsys, extra, kind, key):
    saved = read_checkpoint(trained)
    sampler, description, *_ = open_for_sampling(parse_options(EvaluationOptions, f"--resume {trained} {extra}".split()), torch.device("cpu"))
    assert torch.equal(sampler.model.class_emb.weight, saved[key]["class_emb.weight"])
    assert not torch.equal(saved["model"]["class_emb.weight"], saved["model_ema"]["class_emb.weight"])
    assert (description["weights"], description["weights_key"]) == (kind, key) and f"under '{key}'" in capsys.readouterr().out


def test_the_same_pixels_as_the_sampler_the_script_and_eval(pipe, trained, tmp_path, monkeypatch):
    labels = [0, 3, 5, 9]
    drawn = pipe(labels, seed=5)
    assert [(image.size, image.mode) for image in drawn] == [((16, 16), "RGB")] * 4
    plain = Sampler(pipe.sampler.model, pipe.sampler.vae, pipe.sampler.sampling, "fp32", 5, 64)
    assert np.array_equal(pixels(drawn), plain.images(labels).permute(0, 2, 3, 1).numpy())
    (tmp_path / "labels.txt").write_text("0\n3\n5\n9\n")
    common = f"--resume {trained} --seed 5 --device cpu"
    call(monkeypatch, f"eval.py {common} --num_images 4 --labels {tmp_path}/labels.txt --save_images --output_dir {tmp_path}/eval "
                      "--feature_extractor efficientnet-lite0")
    assert same(drawn, [Image.open(tmp_path / "eval" / "images" / f"{i:06d}.png") for i in range(4)])
    call(monkeypatch, f"scripts/sample.py {common} --labels 0,3,5,9 --per_class 1 --folder {tmp_path}/single")
    assert same(drawn, [Image.open(tmp_path / "single" / f"{label:04d}-0000.png") for label in labels])
    assert same(pipe("3", seed=5), pipe([3], seed=5)) and not same(pipe([3], seed=5, cfg=4.0), pipe([3], seed=5))


def test_keeping_scales(pipe):
    whole = pipe([3], seed=7)
    grown = pipe.grow(3, seed=7)
    assert len(grown) == len(pipe.sampler.model.scale) and same(grown[-1:], whole)
    varied = pipe.variations(3, keep_scales=2, count=3, seed=7)
    assert same(varied[:1], whole) and not same(varied[1:2], whole) and not same(varied[1:2], varied[2:])
    assert same(pipe.variations(3, keep_scales=3, count=2, seed=7), whole * 2)
    edited = pipe.edit(3, 8, keep_scales=2, seed=7)
    assert len(edited) == 1 and not same(edited, whole) and same(pipe.edit(3, 3, 1, seed=7), whole)
    assert same(pipe.edit(3, 8, 0, seed=7), pipe([8], seed=7)) and same(pipe.edit(3, 8, 3, seed=7), whole)
    assert same(pipe.variations(3, count=3, seed=7), varied) and same(pipe(np.array([3]), seed=7), whole)
    with pytest.raises(FlowARError, match="keep_scales is 4: expected 0 to 3"):
        pipe.variations(3, keep_scales=4)


def test_other_settings_and_precision_of_one_model(pipe, trained):
    rounded = load_pipeline(trained, device="cpu", precision="bf16")
    assert same(pipe.using("bf16", cfg=4.0)([3]), rounded([3], cfg=4.0)) and not same(pipe([3], cfg=4.0), rounded([3], cfg=4.0))
    assert same(pipe.using("bf16").using("fp32")([3]), pipe([3])) and pipe.using(cfg=4.0).settings()["cfg"] == 4.0
    assert same(rounded.using(cfg=4.0)([3]), rounded([3], cfg=4.0))
    with pytest.raises(FlowARError, match="precision fp32: this pipeline was opened with weights in torch.bfloat16"):
        rounded.using("fp32")


def test_a_guide_and_lists_for_the_scales(pipe, trained):
    plain, raw = load_pipeline(trained, device="cpu", cfg=1), load_pipeline(trained, device="cpu", weights="raw", cfg=1)
    guided = load_pipeline(trained, device="cpu", guide=raw_file(trained), cfg=(3, 3, 3), num_step=[6, 6, 4])
    assert guided.settings()["cfg"] == (3.0, 3.0, 3.0) and guided.settings()["steps"] == [6, 6, 4] and guided.settings()["guide"] == raw_file(trained)
    steps = {"num_steps": [6, 6, 4]}
    images = guided([3], seed=5)
    assert not same(images, plain([3], seed=5, **steps)) and not same(images, pipe([3], seed=5, cfg=(3, 3, 3), **steps))
    assert same(guided([3], seed=5, cfg=1.0), plain([3], seed=5, **steps)) and not same(plain([3], seed=5), raw([3], seed=5))


def test_interpolation_ends_at_the_seeds(pipe):
    found = pipe.interpolate(3, 1, 2, count=4)
    assert len(found) == 4 and same(found[:1], pipe([3], seed=1)) and same(found[-1:], pipe([3], seed=2))
    assert not same(found[1:2], found[:1])
    assert same(pipe.interpolate(3, 1, 1, count=3), pipe([3], seed=1) * 3)


def test_inpainting_keeps_what_is_not_white(pipe, monkeypatch, tmp_path):
    image, mask = pipe([3], seed=1)[0], Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 9, 16))  # one pixel more than half: the cells there are drawn too
    kept = []
    original = pipe.sampler.model.sample_pyramid
    monkeypatch.setattr(pipe.sampler.model, "sample_pyramid", lambda *a, **options: kept.append((options["known"], original(*a, **options))) or kept[-1][1])
    drawn = pipe.inpaint(image, mask, "8", count=2, seed=4)
    (latents, cells), pyramid = kept[0]
    assert [m[0, 0].int().tolist()[0] for m in cells] == [[0], [0, 0], [0, 0, 0, 1]] and len(drawn) == 2 and not same(drawn[:1], drawn[1:])
    assert all(torch.equal(x[m.expand_as(x)], y[m.expand_as(y)]) for x, y, m in zip(pyramid, latents, cells))
    monkeypatch.undo()
    image.save(tmp_path / "i.png"), mask.save(tmp_path / "m.png")
    assert same(pipe.inpaint(tmp_path / "i.png", str(tmp_path / "m.png"), 8, count=2, seed=4), drawn)
    with pytest.raises(FlowARError, match="the mask is 8x8 pixels, the image 16x16"):
        pipe.inpaint(image, Image.new("L", (8, 8), 255), 8)


def test_the_trajectory_begins_in_noise_and_ends_in_the_image(pipe):
    path = pipe.trajectory(3, seed=2)
    assert len(path) == 5 and same(path[-1:], pipe([3], seed=2)) and not same(path[:1], path[-1:])
    assert not pipe.sampler.model.flownet._forward_pre_hooks


def test_a_setting_goes_by_its_option_too():
    assert Sampling.of({}, {"num_step": 3}) == Sampling(num_steps=3)


@pytest.mark.parametrize("call,message", [
    (lambda pipe: pipe([11]), "label 11: the model has classes 0..9"), (lambda pipe: pipe([1], cfg=0.5), "cfg is 0.5: expected a number"),
    (lambda pipe: pipe([1], steps=3), "steps: not a sampling setting; expected one of cfg, cfg_schedule, guidance"),
    (lambda pipe: pipe([1], num_steps=4, num_steps_last=6), "at least num_steps_last"),
    (lambda pipe: load_pipeline("x", cfg="3,4"), "cfg has 2 values")])
def test_bad_calls_are_named(pipe, call, message):
    with pytest.raises(FlowARError, match=message):
        call(pipe)


def test_the_vae_is_the_runs_own_or_the_one_that_is_named(trained, tmp_path):
    project = shutil.copytree(trained, tmp_path / "run")
    vae = shutil.copy(trained.parent / "vae.pth", tmp_path / "other.pth")
    assert load_pipeline(project, vae, weights="raw").description["vae"] == str(vae)
    content = torch.load(project / "checkpoint-last.pth", weights_only=True)
    content["args"]["vae_path"] = "gone.pth"
    torch.save(content, tmp_path / "moved.pth")
    with pytest.raises(FlowARError, match="gone.pth: file not found"):
        load_pipeline(tmp_path / "moved.pth")


class Pixels(torch.nn.Module):
    """A VAE of one's own, as in docs/extending.md."""
    embed_dim, stride, latent_scale = 48, 4, LatentScale(2.0)

    def encode(self, images):
        return DiagonalGaussian.of_mean(torch.nn.functional.pixel_unshuffle(images, self.stride))

    def decode(self, latents):
        return torch.nn.functional.pixel_shuffle(latents, self.stride)


class PixelVAE(vaes.NamedVAE):
    def open(self):
        return Pixels(), []


def test_a_vae_of_ones_own_kind_is_the_runs_and_can_be_named(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(vaes.VAES, "pixels", PixelVAE)
    train(trained.parent, tmp_path / "run", "--vae_path pixels --vae_embed_dim 48 --epochs 1")
    content = torch.load(tmp_path / "run" / "checkpoint-last.pth", weights_only=True)
    content["args"].update(vae="pixels", vae_path=None)  # as earlier versions had it
    torch.save(content, tmp_path / "before.pth")
    images = [load_pipeline(tmp_path / run, vae, device="cpu") for run, vae in (("run", None), ("run", "pixels"), ("before.pth", None))]
    assert all(pipe.description["vae"] == "pixels" and same(pipe([3]), images[0]([3])) for pipe in images)
    with pytest.raises(FlowARError, match="pixels: file not found"):
        monkeypatch.delitem(vaes.VAES, "pixels")
        load_pipeline(tmp_path / "run", device="cpu")
    with pytest.raises(FlowARError, match="its VAE is"):
        load_pipeline(tmp_path / "run", trained.parent / "vae.pth", device="cpu")


# ---- the script -------------------------------------------------------------------------------------------------------------


def test_every_picture_of_the_script_and_once_more(pipe, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pipe([3])[0].save("i.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    mask.save("m.png")

    def script(words):
        monkeypatch.setattr("sys.argv", ["sample.py", *words.split()])
        sample.main()

    script(f"--resume {trained} --labels 3,8 --seeds 0-1,5 --grid --strip --trajectory --variations --interpolate v.png --edit --keep_scales 2 "
           "--per_class 4 --inpaint i.png m.png --device cpu")
    sizes = {name: Image.open(f"{name}.png").size for name in ("grid", "strip", "trajectory", "variations", "v", "edit", "inpaint")}
    columns = {name: round((width - 12) / 66) for name, (width, height) in sizes.items()}
    assert columns == dict(grid=3, strip=3, trajectory=5, variations=4, v=4, edit=2, inpaint=6) and sizes["grid"][1] > 128
    said = read_settings("grid.png")
    assert (said["cfg"], said["checkpoint_sha256"], said["class_num"]) == (2.0, json.loads(json.dumps(said))["checkpoint_sha256"], 10)
    shutil.copy("edit.png", "before.png")
    Path("grid.png").unlink()
    monkeypatch.setattr(sample, "code_version", lambda: "def")
    script("--again before.png --edit after.png")
    assert f"before.png: made with commit {said['commit']}, the current commit is def" in capsys.readouterr().out
    assert not Path("grid.png").exists()  # that picture alone
    assert same([Image.open("after.png")], [Image.open("before.png")]) and read_settings("after.png")["command"][-2:] == ["--edit", "after.png"]
    words = ["--num_step_schedule", "linear", "--class_names", "x", "--vae", "kl16", "--vae", "diffusers:x", "--grid", "--cfg", "2"]
    assert sample.by_options_of_now(words) == ["--vae_path", "diffusers:x", "--grid", "--cfg", "2"]  # of an earlier version
    script(f"--resume {trained} --device cpu --grid")
    assert same([Image.open("grid.png").crop((11, 2, 75, 66))], [pipe(list(range(10)))[0].resize((64, 64), 0)])
