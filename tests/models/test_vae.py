"""The VAE: geometry, files, the latent scale that travels with it, and scripts/train_vae.py."""
import pytest
import torch
from helpers import call, small_vae, write_digits

from models import AutoencoderKL, FlowARError
from models.vae import KL16_LATENT_SCALE, DiagonalGaussian, LatentScale
from models.vaes import load_vae, read_latent_scale, read_vae, save_vae
from scripts import train_vae


@pytest.mark.parametrize("ch_mult,stride", [((1,), 1), ((1, 2), 2), ((1, 1, 2), 4), ((1, 1, 2, 2), 8)])
def test_narrow_ones_of_any_stride(ch_mult, stride):
    vae = AutoencoderKL(embed_dim=3, ch=16, ch_mult=ch_mult, num_res_blocks=1)
    posterior = vae.encode(torch.zeros(2, 3, 16, 16))
    assert vae.stride == stride
    assert posterior.parameters.shape == (2, 6, 16 // stride, 16 // stride)
    assert vae.decode(posterior.mode()).shape == (2, 3, 16, 16)


def test_posterior():
    parameters = torch.randn(2, 8, 4, 4)
    parameters[:, 4:] = torch.tensor([-100.0, 100.0, 0.0, 1.0]).view(1, 4, 1, 1)
    posterior = DiagonalGaussian(parameters)
    assert posterior.logvar.min() == -30 and posterior.logvar.max() == 20
    noise = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(posterior.sample(noise=noise)[:, 2], posterior.mean[:, 2] + noise[:, 2])
    a, b = (posterior.sample(torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(posterior.mode(), posterior.mean)
    standard = DiagonalGaussian(torch.zeros(2, 8, 4, 4))
    assert torch.equal(standard.kl(), torch.zeros(2))


def test_latent_scale():
    assert KL16_LATENT_SCALE == (0.2325, 0.0) and AutoencoderKL(ch=16).latent_scale == KL16_LATENT_SCALE
    raw = torch.randn(5)
    scale = LatentScale(2.0, 0.5)
    torch.testing.assert_close(scale.restore(scale.normalize(raw)), raw)
    assert scale.normalize(torch.tensor(1.5)) == 2.0


@pytest.mark.parametrize("shape", [(4,), (4, 2, 3)])
def test_latent_scale_of_channels_and_positions(shape):
    """By hand; what is of other channels or positions is refused, as broadcasting would not."""
    std, mean = torch.rand(shape) + 0.5, torch.randn(shape)
    scale, raw = LatentScale(totuple(1 / std), totuple(mean)), torch.randn(5, 4, 2, 3)
    by_hand = (raw - mean.view(4, *shape[1:], *(1,) * (3 - len(shape)))) / std.view(4, *shape[1:], *(1,) * (3 - len(shape)))
    torch.testing.assert_close(scale.normalize(raw), by_hand)
    torch.testing.assert_close(scale.restore(by_hand), raw)
    assert scale.normalize(raw.half()).dtype == torch.float16
    for other in (torch.zeros(5, 1, 2, 3), torch.zeros(5, 3, 2, 3), *([torch.zeros(5, 4, 1, 1)] if shape[1:] else [])):
        with pytest.raises(FlowARError, match="the latent scale has shape .4.*, the latents .*: expected one number"):
            scale.restore(other)


def totuple(tensor):
    return tuple(map(totuple, tensor)) if tensor.ndim else tensor.item()


@pytest.mark.parametrize("bad", [None, [1.0], [[1.0, 0.0], 0], [["1", 1], 0], [[1.0, [1.0, 2.0]], 0], [1.0, float("inf")], [[[[float("nan")] * 99]] * 9, 0]])
def test_what_is_no_latent_scale_is_refused_in_a_short_line(bad):
    with pytest.raises(FlowARError, match="file: latent_scale is .{4,200}, expected .*per channel or position.{,30}$"):
        read_latent_scale(bad, "file")


def test_file_carries_configuration_and_latent_scale(tmp_path):
    for scale in (LatentScale(2.0, 0.1), LatentScale(totuple(torch.rand(4, 4, 4) + 0.5), totuple(torch.randn(4)))):
        vae = small_vae().eval()
        vae.latent_scale = scale
        save_vae(vae, tmp_path / "vae.pth")
        loaded, extra = read_vae(tmp_path / "vae.pth")
        assert loaded.latent_scale == scale and loaded.config == vae.config and extra == []
        images = torch.rand(1, 3, 16, 16)
        assert torch.equal(loaded.encode(images).parameters, vae.encode(images).parameters)


def test_bad_images():
    with pytest.raises(FlowARError, match=r"images are \(1, 3, 18, 16\).*stride 4"):
        small_vae().encode(torch.zeros(1, 3, 18, 16))


def test_train_vae(tmp_path, monkeypatch, capsys):
    """The script learns, reports PSNR, draws, and its file loads; killed after a snapshot it ends with the same weights."""
    write_digits(tmp_path / "images", 10)
    monkeypatch.setattr(train_vae, "SNAPSHOT_STEPS", 20)

    def run_to(output, last_step=None):
        original, steps = train_vae.autoencoder_loss, []

        def loss(*args):
            steps.append(1)
            if len(steps) == last_step:
                raise KeyboardInterrupt
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(train_vae, "autoencoder_loss", loss)
            call(patch, f"scripts/train_vae.py --data_path {tmp_path}/images --img_size 16 --embed_dim 4 --ch 16 --ch_mult 1,2 --num_res_blocks 0 "
                        f"--batch_size 16 --lr 5e-3 --num_workers 0 --device cpu --steps 40 --output {output} --perceptual 0.1 --perceptual_from 38 "
                        "--ema_rate 0.9")
        return len(steps)

    assert run_to(tmp_path / "whole.pth") == 40
    assert float(capsys.readouterr().out.split("held-out images: ")[1].split()[0]) > 13
    vae = load_vae(tmp_path / "whole.pth")
    assert vae.stride == 2 and vae.latent_scale.scale > 0
    assert (tmp_path / "whole.pth.png").is_file() and not (tmp_path / "whole.pth.training").exists()
    with pytest.raises(KeyboardInterrupt):
        run_to(tmp_path / "parts.pth", 22)
    assert run_to(tmp_path / "parts.pth") == 20  # from the snapshot
    whole, parts = (torch.load(tmp_path / f"{name}.pth", weights_only=True)["model"] for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_the_perceptual_loss():
    """0 for the same images, it falls on the way to them, and its gradient points there."""
    loss, generator = train_vae.PerceptualLoss("cpu"), torch.Generator().manual_seed(0)
    images, other = (torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1 for _ in range(2))
    assert loss(images, images) == 0
    far, near = ((images + part * (other - images)).requires_grad_() for part in (1.0, 0.3))
    assert loss(far, images) > loss(near, images) > 0
    loss(near, images).backward()
    assert loss(near - 0.1 * near.grad / near.grad.abs().max(), images) < loss(near, images)
