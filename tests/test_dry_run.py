"""--dry_run: the published commands as jobs of 32 and 64 processes, what it refuses, and that it writes nothing."""
import re
from pathlib import Path

import pytest
import torch
from helpers import ROOT, call, make_project, needs_muon, small_model, train, training_command
from safetensors.torch import save

from models import AutoencoderKL, FlowARError, MODELS
from models.vaes import save_vae
from models.weights import file_hash
from util import cluster
from util.data import latents
from util.files import write_bytes, write_json
from util.speed import memory

IMAGES = 4200


def make_shards(folder, count, shape, stride, shard_size=600):
    """Synthetic float16 moments in shards with an index, as cache_latents.py writes them."""
    shards = []
    for number, first in enumerate(range(0, count, shard_size)):
        size = min(shard_size, count - first)
        file = folder / f"shard-{number:05d}.safetensors"
        write_bytes(save({"moments": torch.zeros(size, 2, *shape, dtype=torch.float16), "labels": torch.randint(1000, (size,)),
                          "names": torch.zeros(1, dtype=torch.uint8)}), file, sync=False)
        shards.append({"file": file.name, "images": size, "bytes": file.stat().st_size, "sha256": file_hash(file)})
    unknown = {"seed": 0, "skipped": [], "vae_sha256": None, "measured": {"scale": 1, "shift": 0, "channel_mean": [], "channel_std": []}}
    write_json({"format": latents.FORMAT, "images": count, "classes": [str(i) for i in range(1000)], "variants": 2, "crops": "center",
                "img_size": shape[2] * stride, "stride": stride, "channels": shape[0] // 2, "dtype": "float16",
                "latent_scale": [0.2325, 0.0], "shards": shards, **unknown}, folder / latents.INDEX)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Synthetic latents of a 16 x 16 grid with 16 channels, in 1000 classes."""
    folder = tmp_path_factory.mktemp("latents")
    make_shards(folder, IMAGES, (32, 16, 16), 16)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    p = make_project(tmp_path_factory.mktemp("project"))
    train(p, p / "run", "--epochs 1")
    with pytest.MonkeyPatch.context() as patch:
        call(patch, f"scripts/cache_latents.py --data_path {p}/images --vae_path {p}/vae.pth --cached_path {p}/shards --img_size 16 --num_workers 0")
    torch.manual_seed(5)
    save_vae(AutoencoderKL(embed_dim=4, ch=16, ch_mult=(1, 1, 2), num_res_blocks=1), p / "other.pth")
    return p


def files(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


def published(size, cache, output):
    text = (ROOT / "scripts" / f"train_flowar_{size}.sh").read_text()
    command = re.search(r"(main_flowar\.py \\\n.*)\"\$@\"", text, re.DOTALL)[1].replace("\\\n", " ")
    command = re.sub(r"\"\$\{OUTPUT:-[^}]*\}\"", str(output), command)
    return re.sub(r"\"\$\{CACHE:-[^}]*\}\"", str(cache), command)


@pytest.mark.parametrize("size,world,batch,sharded,blocks", [
    ("s", 32, 2048, 3.0, 29.6), pytest.param("l", 64, 4096, None, None, marks=pytest.mark.slow),
    pytest.param("h", 32, 1024, None, None, marks=pytest.mark.slow)])
def test_the_published_commands(cache, tmp_path, monkeypatch, capsys, size, world, batch, sharded, blocks):
    sizes = {True: 45 * 2**20, False: 471 * 2**20}  # of FlowAR-S, as they were counted; below those of the page are counted again
    monkeypatch.setattr(memory, "image_bytes", lambda *args, use_checkpoint, **changes: sizes[use_checkpoint])
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, f"{published(size, cache, tmp_path / 'out')} --dry_run {world}")
    said = capsys.readouterr().out
    assert f"dry run of {world} processes: nothing was written" in said and not files(tmp_path)
    assert f"{batch:,} images per step: {batch // world} x {world} processes x 1 forward passes" in said
    assert f"{IMAGES // batch} per epoch, {400 * (IMAGES // batch):,} in total; {batch * 341:,} tokens per step" in said
    assert f"learning rate {5e-5 * batch / 256:.3g}, after 100 of 400 epochs; then cosine to 1e-05" in said
    assert f"4,200 cached latents; {IMAGES % batch:,} dropped per epoch" in said and "a new run" in said
    if sharded:
        assert re.search(rf"total with --fsdp: first line / {world}, plus one whole block +{sharded} +{blocks}\n", said)
    assert cluster.world_size() == 1


@needs_muon
def test_what_options_add_to_disk_and_memory(project, tmp_path, monkeypatch, capsys):
    call(monkeypatch, f"{training_command(project, tmp_path / 'out')} --dry_run 2 --posthoc_ema 2 --precision bf16 --keep_every 1 --optimizer muon")
    said = capsys.readouterr().out
    assert "32 images per step: 16 x 2 processes x 1 forward passes" in said and "2 per epoch, 4 in total" in said
    assert "2 kept by --keep_every, 2 snapshots for --posthoc_ema" in said and "copies of the weights in bf16" in said and re.search("power averages +0.017", said)
    assert " and 63,744 with weight decay 0.02 and 663,168 with weight decay 0.02, by Muon)" in said  # one moment less of these
    assert "--fsdp" not in said


def test_it_goes_on_from_a_run(project, monkeypatch, capsys):
    before = files(project)
    call(monkeypatch, f"{training_command(project, project / 'run')} --resume {project}/run --dry_run 4 --batch_size 4 --epochs 3")
    said = capsys.readouterr().out
    assert "at step 5, in epoch 2" in said and "16 images per step: 4 x 4 processes" in said and files(project) == before
    call(monkeypatch, f"{training_command(project, project / 'new')} --init_from {project}/run --dry_run 4 --batch_size 4")
    assert "--init_from" in capsys.readouterr().out and files(project) == before


@pytest.mark.parametrize("options,message", [
    ("--dry_run 4 --evaluate", "leave out --evaluate"),
    ("--dry_run 2 --cached_path {p}/shards --vae_path {p}/other.pth", "{p}/shards: its VAE is"),
    ("--dry_run 2 --output_dir {p}/run", "--output_dir {p}/run contains checkpoints that this run would overwrite"),
    ("--dry_run 2 --resume {p}/run --diffloss_d 4", "do not fit the model")])
def test_it_refuses_what_would_fail_later(project, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    before = files(project)
    with pytest.raises(FlowARError) as ended:
        call(monkeypatch, f"{training_command(project, tmp_path / 'out')} {options.format(p=project)}")
    assert message.format(p=project) in str(ended.value) and "\n" not in str(ended.value)
    assert cluster.world_size() == 1 and files(project) == before and not files(tmp_path)


def test_it_runs_under_torchrun_with_one_process(project, tmp_path, monkeypatch, capsys):
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    command = f"{training_command(project, tmp_path / 'out')} --dry_run 4 --batch_size 4"
    call(monkeypatch, command)
    assert "4 x 4 processes" in capsys.readouterr().out and not files(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FlowARError, match="GPUS=1 NNODES=1"):
        call(monkeypatch, command)


# ---- the count of activations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
def test_bytes_are_those_of_a_backward_pass_with_numbers(recompute):
    """Counted without numbers, and on the same model with them; what recomputing keeps of attention is beside them."""
    model = small_model(use_checkpoint=recompute, attn_dropout=0.1, proj_dropout=0.1).train()

    def held(batch):
        found = {}

        def pack(tensor):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(torch.zeros(batch, 4, 4, 4), torch.zeros(batch, dtype=torch.long))
        del loss
        return sum(found.values())

    kept = recompute * 21 * (64 + 1) * 4  # of the head's attention, with its one head's norm: it passes by the hooks
    assert memory.image_bytes(model) == pytest.approx(held(2) - held(1) + kept, rel=0.005)


def test_the_published_size_holds_what_the_page_says():
    with torch.device("meta"):
        model = small_model(**{**MODELS["flowar_small"], "img_size": 256, "vae_stride": 16, "vae_embed_dim": 16, "scale": (1, 2, 4, 8, 16),
                               "class_num": 1000, "diffloss_d": 2, "diffloss_w": 1024, "proj_dropout": 0.1})
    page = (ROOT / "docs" / "running.md").read_text()
    whole, kept = (memory.image_bytes(model, torch.bfloat16, use_checkpoint=recompute) / 2**20 for recompute in (False, True))
    assert f"| FlowAR-S | 64 | 3.2 | 0.3 | {whole / 16:.1f} ({whole:.0f} MiB an image) | {kept / 16:.1f} ({kept:.0f} MiB an image) |" in page
