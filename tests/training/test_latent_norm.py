"""--latent_norm channel: what training does to the latents, sampling undoes, wherever the checkpoint goes."""
import numpy as np
import pytest
import torch
from helpers import call, evaluate, make_project, train, training_command
from PIL import Image
from safetensors.torch import load_file

from models import FlowARError, load_vae
from models.weights import read_file, write_file
from util.data.source import open_training_data
from util.evaluation import load_pipeline
from util.command_line import parse_options
from util.options import TrainingOptions


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Images, a VAE, the training images' latents, and a run on them with --latent_norm channel."""
    project = make_project(tmp_path_factory.mktemp("norm"), 2)
    with pytest.MonkeyPatch.context() as patch:
        call(patch, f"scripts/cache_latents.py --data_path {project}/images --cached_path {project}/shards --vae_path {project}/vae.pth "
                    "--img_size 16 --dtype float32 --num_workers 0 --device cpu")
    train(project, project / "run", options(project, "--epochs 1 --cfg 2 --ema_rate 0.5"))
    return project


def options(project, more=""):
    return f"--batch_size 10 --warmup_epochs 0 --cached_path {project}/shards --latent_norm channel {more}"


def statistics(project):
    """(mean, std) of every channel, (C, 1, 1), of the latents as training draws them: from the shards, by hand."""
    moments = torch.cat([load_file(file)["moments"][:, 0] for file in sorted((project / "shards").glob("*.safetensors"))]).double()
    mean, logvar = moments.chunk(2, dim=1)
    std = (mean.var(dim=(0, 2, 3), correction=0) + logvar.exp().mean(dim=(0, 2, 3))).sqrt()
    return mean.mean(dim=(0, 2, 3))[:, None, None].float(), std[:, None, None].float()


def test_training_and_validation_see_channels_of_mean_0_and_std_1(project):
    """Of the cache, and of images that are encoded on the fly; both with the training set's statistics."""
    args = parse_options(TrainingOptions, training_command(project, "out", options(project)).split()[1:])
    data = open_training_data(args, torch.device("cpu"))
    source, validation = data.source, data.validation
    (mean, std), noise = statistics(project), torch.zeros(10, 4, 4, 4)
    batch = next(iter(validation.loader))[0]
    assert source.is_moments and not validation.is_moments
    torch.testing.assert_close(validation.latents(batch, noise), (load_vae(project / "vae.pth").encode(batch).mean - mean) / std)
    moments = torch.stack([source.loader.dataset[(0, i)][0] for i in range(20)])
    torch.testing.assert_close(source.latents(moments, torch.zeros(20, 4, 4, 4)), (moments[:, :4] - mean) / std)
    assert data.origin.latent_scale == tuple(data.vae.latent_scale) == tuple(source.latent_scale)


def test_pictures_are_those_of_the_same_latents_by_hand(project, tmp_path, monkeypatch):
    """Of the run, and of its export; decoded with the statistics out of the shards."""
    mean, std = statistics(project)
    pipe = load_pipeline(project / "run", device="cpu")
    latents = pipe.sampler.model.unpatchify(pipe.latents([3, 7], pipe.noise(5, range(2)))[-1])
    with torch.no_grad():
        pixels = load_vae(project / "vae.pth").decode(latents * std + mean)
    expected = ((pixels + 1) * 127.5).clamp(0, 255).round().permute(0, 2, 3, 1).numpy()
    found = np.stack([np.asarray(image) for image in pipe([3, 7], seed=5)])
    assert np.abs(found - expected).max() <= 1 and found.std() > 1
    call(monkeypatch, f"scripts/export.py --resume {project}/run --output {tmp_path}/export")
    assert all(np.array_equal(a, b) for a, b in zip(found, load_pipeline(tmp_path / "export", device="cpu")([3, 7], seed=5)))


def test_evaluation_decodes_with_the_runs_statistics(project, tmp_path):
    """eval.py's first image is the pipeline's of the same seed and label; a run's record holds the statistics."""
    evaluate(project, project / "run", tmp_path / "eval", "--save_images --num_images 10")
    first = sorted((tmp_path / "eval" / "images").iterdir())[0]
    pipe = load_pipeline(project / "run", device="cpu", num_step=6, cfg=2.0, vae=str(project / "vae.pth"))
    assert np.abs(np.asarray(Image.open(first), dtype=int) - np.asarray(pipe([0])[0], dtype=int)).max() <= 1
    scale, shift = read_file(project / "run" / "checkpoint-last.pth")["vae"]["latent_scale"]
    torch.testing.assert_close(torch.tensor(shift), statistics(project)[0].flatten())
    torch.testing.assert_close(1 / torch.tensor(scale), statistics(project)[1].flatten())


def test_another_norm_or_a_guide_of_another_is_refused_on_the_way_on(project, tmp_path):
    with pytest.raises(FlowARError, match=r"latent scale and shift are \('4 numbers \w{12}', .* \(2.0, 0.1\): .*the same --latent_norm"):
        train(project, project / "run", f"--batch_size 10 --epochs 2 --resume {project}/run --cached_path {project}/shards")
    with pytest.raises(FlowARError, match="--latent_norm channel needs channel statistics"):
        train(project, tmp_path / "images", "--latent_norm channel")
    train(project, tmp_path / "plain", f"--batch_size 10 --epochs 1 --warmup_epochs 0 --cached_path {project}/shards")
    with pytest.raises(FlowARError, match="--guide .*plain.*: latent scale and shift are"):
        load_pipeline(project / "run", device="cpu", guide=str(tmp_path / "plain"))


def test_a_checkpoint_without_its_statistics_is_refused(project, tmp_path):
    content = read_file(project / "run" / "checkpoint-last.pth")
    write_file({**content, "vae": {**content["vae"], "latent_scale": None}}, tmp_path / "bare.pth")
    with pytest.raises(FlowARError, match="bare.pth: latent_scale is None, expected"):
        load_pipeline(tmp_path / "bare.pth", device="cpu", vae=str(project / "vae.pth"))
