"""Autoencoders of diffusers, real classes with small random weights: cache, training, sampling and decoding end to end."""
import importlib
import json
import sys

import pytest
import torch
from helpers import call, train, write_digits
from safetensors.torch import load_file, save_file

from models import FlowARError
from models.vaes import find_vae
from util.data.latents import ShardedMoments


def diffusers():
    return importlib.import_module("diffusers")  # late: it is heavy


def small_kl(levels, **options):
    return diffusers().AutoencoderKL(block_out_channels=(8,) * levels, norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * levels,
                         up_block_types=("UpDecoderBlock2D",) * levels, layers_per_block=1, latent_channels=4, **options)


def small_dc():
    blocks = dict(encoder_block_types=("ResBlock",) * 6, decoder_block_types=("ResBlock",) * 6)
    return diffusers().AutoencoderDC(latent_channels=32, attention_head_dim=4, encoder_block_out_channels=(8,) * 5 + (32,),
                         decoder_block_out_channels=(8,) * 5 + (32,), encoder_layers_per_block=(1,) * 6, decoder_layers_per_block=(1,) * 6,
                         encoder_qkv_multiscales=((),) * 6, decoder_qkv_multiscales=((),) * 6, scaling_factor=0.41, **blocks)


def small_tiny():
    return diffusers().AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4,
                           num_decoder_blocks=(1,) * 4, latent_channels=4)


def small_asymmetric():
    return diffusers().AsymmetricAutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 3, down_block_out_channels=(8,) * 3, norm_num_groups=4,
                                   up_block_types=("UpDecoderBlock2D",) * 3, up_block_out_channels=(8,) * 3, latent_channels=4)


def small_vq():
    return diffusers().VQModel(block_out_channels=(8,) * 3, norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 3,
                   up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=3, vq_embed_dim=5, num_vq_embeddings=7)


# name -> (network, stride, channels, scale, shift)
NETWORKS = {
    "sd": (lambda: small_kl(4, scaling_factor=0.18215), 8, 4, 0.18215, 0.0),
    "sd3": (lambda: small_kl(4, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
            8, 4, 1.5305, 0.0609),
    "kl16": (lambda: small_kl(5), 16, 4, 0.18215, 0.0),
    "dc": (small_dc, 32, 32, 0.41, 0.0),
    "tiny": (small_tiny, 8, 4, 1.0, 0.0),
    "asymmetric": (small_asymmetric, 4, 4, 0.18215, 0.0),
    "vq": (small_vq, 4, 5, 0.18215, 0.0),
}


@pytest.fixture(scope="module", params=NETWORKS)
def saved(request, tmp_path_factory):
    """(folder with the network in vae/, its name)."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    NETWORKS[request.param][0]().save_pretrained(folder / "vae")
    return folder, request.param


def test_configuration_and_round_trip(saved):
    folder, name = saved
    make, stride, channels, scale, shift = NETWORKS[name]
    vae, extra = find_vae(f"diffusers:{folder}:vae").open()
    assert (vae.stride, vae.embed_dim, *vae.latent_scale) == (stride, channels, scale, shift) and extra == []
    network, images = vae.network, torch.rand(2, 3, 64, 64) * 2 - 1
    posterior = vae.encode(images)
    assert posterior.parameters.shape == (2, 2 * channels, 64 // stride, 64 // stride)
    with torch.no_grad():
        encoded = network.encode(images)
        expected = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded[0]
        assert torch.equal(posterior.mode(), expected)
        if name in ("dc", "tiny", "vq"):  # deterministic: a sample is the mean
            torch.testing.assert_close(posterior.sample(), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(vae.decode(expected), network.decode(expected).sample)


@pytest.mark.parametrize("saved", ["sd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("kl16", "dc"))], indirect=True)  # strides 8, 16, 32
def test_cache_training_sampling_and_decoding(saved, tmp_path, monkeypatch):
    folder, name = saved
    _, stride, channels, scale, shift = NETWORKS[name]
    size, vae = 4 * stride, f"diffusers:{folder / 'vae'}"
    write_digits(tmp_path / "images", 2, size=32)
    call(monkeypatch, f"scripts/cache_latents.py --data_path {tmp_path}/images --cached_path {tmp_path}/latents --vae_path {vae} --img_size {size} "
                      "--num_workers 0 --device cpu")
    index = ShardedMoments(tmp_path / "latents").index
    assert (index["stride"], index["channels"], *index["latent_scale"]) == (stride, channels, scale, shift)
    options = (f"--model flowar_tiny --vae_path {vae} --class_num 10 --cached_path {tmp_path}/latents --data_path {tmp_path}/images "
               f"--output_dir {tmp_path}/run --epochs 1 --warmup_epochs 0 --batch_size 4 --num_workers 0 --device cpu --num_step 2")
    call(monkeypatch, f"main_flowar.py {options}")
    call(monkeypatch, f"eval.py --resume {tmp_path}/run --vae_path {vae} --num_images 3 --num_step 2 --output_dir {tmp_path}/eval --save_images "
                      "--feature_extractor efficientnet-lite0 --device cpu")
    report = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert report["scales"] == [1, 2, 4] and report["img_size"] == size and report["vae"] == vae
    assert len(list((tmp_path / "eval" / "images").iterdir())) == 3


@pytest.mark.parametrize("change,message", [
    (lambda state: state.pop("encoder.conv_in.weight"), "1 tensors do not fit the VAE: encoder.conv_in.weight is missing"),
    (lambda state: state.update({"encoder.extra.weight": torch.zeros(2)}), "1 tensors do not fit the VAE: encoder.extra.weight is not in the VAE"),
    (lambda state: state.update({"loss.logvar": torch.zeros(1)}), None)])
def test_tensors_that_are_missing_or_left_over(tmp_path, monkeypatch, change, message):
    """diffusers draws what is missing at random, and goes on without what is left over."""
    small_kl(2).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)
    if message:
        with pytest.raises(FlowARError, match=message):
            find_vae(f"diffusers:{tmp_path}").open()
    else:
        monkeypatch.setenv("HOME", str(tmp_path))
        assert find_vae("diffusers:~").open()[1] == ["diffusers:~: not used: loss.logvar"]


RAE = dict(encoder_hidden_size=64, encoder_patch_size=14, encoder_num_hidden_layers=1, decoder_hidden_size=32, decoder_num_hidden_layers=1,
           decoder_num_attention_heads=4, decoder_intermediate_size=64, patch_size=4, encoder_input_size=56)


@pytest.mark.parametrize("encoder", ["dinov2", "mae"])
def test_a_representation_autoencoder(tmp_path, encoder):
    """Images of [-1, 1] become its [0, 1]; it normalises by position itself; one image size."""
    pytest.importorskip("transformers")
    mean, std = torch.randn(64, 4, 4), torch.rand(64, 4, 4) + 0.5
    diffusers().AutoencoderRAE(encoder_type=encoder, latents_mean=mean, latents_std=std, **RAE).save_pretrained(tmp_path)
    vae, notes = find_vae(f"diffusers:{tmp_path}").open()
    plain = diffusers().AutoencoderRAE(encoder_type=encoder, **RAE)
    plain.load_state_dict({**vae.network.state_dict(), "_latents_mean": torch.zeros(1), "_latents_std": torch.ones(1)})
    images = torch.rand(2, 3, 16, 16)
    assert (vae.stride, vae.embed_dim, tuple(vae.latent_scale), notes) == (4, 64, (1.0, 0.0), [])
    with torch.no_grad():
        tokens = plain.eval().encode(images).latent
        latents = vae.encode(images * 2 - 1).mode()
        torch.testing.assert_close(latents, (tokens - mean) / std, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(vae.decode(latents), plain.decode(tokens).sample * 2 - 1, atol=2e-4, rtol=1e-4)
    for wrong in (lambda: vae.encode(torch.zeros(1, 3, 32, 32)), lambda: vae.decode(torch.zeros(1, 64, 8, 8))):
        with pytest.raises(FlowARError, match="needs images of 16 x 16 pixels, got 32 x 32: use --img_size 16"):
            wrong()


def test_contradictions_and_missing_things_are_refused(tmp_path, monkeypatch):
    small_kl(4).save_pretrained(tmp_path / "vae")
    write_digits(tmp_path / "images", 2)
    with pytest.raises(FlowARError, match="--vae_stride is 4, but the VAE diffusers:.* has 8"):
        train(tmp_path, tmp_path / "out", f"--vae_path diffusers:{tmp_path}/vae")
    config = tmp_path / "vae" / "config.json"
    config.write_text(config.read_text().replace('"AutoencoderKL"', '"AutoencoderOobleck"'))
    with pytest.raises(FlowARError, match="class AutoencoderOobleck is not supported, expected one of AutoencoderKL"):
        find_vae(f"diffusers:{tmp_path}/vae").open()
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(FlowARError, match="needs diffusers: pip install diffusers"):
        find_vae("diffusers:x").open()
