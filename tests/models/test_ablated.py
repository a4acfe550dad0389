"""The paper's ablations as switches: what each changes, and that weights carry it. The released model stays what it is."""
import math

import pytest
import torch
from helpers import call, evaluate, inputs, make_project, small_model, train

from models import FlowAR, FlowARError, build_model, load_flowar
from models import flow_matching as fm
from models.registry import recognise_size
from models.variants import ablated, diffusion

GEOMETRY = dict(img_size=16, vae_stride=4, vae_embed_dim=4, scale=(1, 2, 4), class_num=10)
CONDITIONS = [name for name in ablated.CHOICES["condition"] if name != "spatial_adaln"]
SWITCHES = [{"head": "token"}, {"objective": "diffusion"}, {"pyramid": "image"}, *({"condition": name} for name in CONDITIONS)]


def variant(**chosen):
    torch.manual_seed(0)
    return build_model("flowar_tiny", **GEOMETRY, **chosen)


def test_the_released_choices_are_the_released_model():
    assert type(variant()) is FlowAR and type(variant(**ablated.RELEASED)) is FlowAR and "variant" not in variant().state_dict()


@pytest.mark.parametrize("chosen", SWITCHES, ids=lambda chosen: "-".join(*chosen.items()))
def test_every_switch(chosen):
    """One pass over all scales is that over each; as many parameters, all of which learn; its weights tell what they are of."""
    model = variant(**chosen)
    latents, labels, t, noise = inputs(model, 3)
    trained = ablated.flatten_pyramid([latents[..., :s, :s] for s in model.scale]) if "pyramid" in chosen else latents
    model.train()(trained, labels).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    z, x = model.eval().condition(latents, labels).detach(), torch.cat(noise, dim=1)
    with torch.no_grad():
        together = model.flownet(x, t, z, model.scale)
        for prepare in (lambda z: z, model.flownet.prepare):  # as in training, as in sampling
            alone = torch.cat([model.flownet(x[:, span], t[k], prepare(z[:, span])) for k, span in enumerate(model.spans)], dim=1)
            torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    for size in ("flowar_tiny", "flowar_small"):
        with torch.device("meta"):
            mine, released = (sum(p.numel() for p in build_model(size, **GEOMETRY, **options).flownet.parameters()) for options in (chosen, {}))
        assert abs(mine / released - 1) < 0.05
    assert recognise_size(model.state_dict(), "x") == {"model": "flowar_tiny", "diffloss_d": 3, "diffloss_w": 128, **ablated.RELEASED, **chosen}
    assert model.sample_tokens(labels, num_steps=5, cfg=2.0).isfinite().all()


def seen_by(model, change):
    """Which tokens' velocities of the last scale move when `change` has altered its x and z; (16,) bool."""
    _, _, t, noise = inputs(model, 1)
    x, z = noise[-1], torch.randn(1, 16, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model.flownet(x, t[-1], z)
        x, z = change(x.clone(), z.clone())
        return ((model.flownet(x, t[-1], z) - before).abs() > 1e-4).any(dim=2)[0]


def another_x(x, z):
    x[:, 3] += 1
    return x, z


def another_z(x, z):
    z[:, 3] += torch.linspace(-1, 1, 128)
    return x, z


@pytest.mark.parametrize("chosen,x_reaches,z_reaches", [({}, 16, 16), ({"head": "token"}, 1, 1), ({"head": "token", "condition": "adaln"}, 1, 16),
                                                        ({"head": "token", "condition": "addition"}, 1, 1)])
def test_what_a_token_knows_of_the_others(chosen, x_reaches, z_reaches):
    model = variant(**chosen).eval()
    assert seen_by(model, another_x).sum() == x_reaches and seen_by(model, another_z).sum() == z_reaches


def test_adaln_has_the_mean_alone():
    """Conditions that are dealt to the tokens otherwise give the same."""
    model = variant(condition="adaln").eval()
    assert not seen_by(model, lambda x, z: (x, z.roll(5, dims=1))).any() and seen_by(variant().eval(), lambda x, z: (x, z.roll(5, dims=1))).all()


@pytest.mark.parametrize("condition", [name for name in CONDITIONS if name != "adaln"])
def test_the_modulation_is_of_time_alone(condition):
    """What modulates is the same for all conditions, and another for other times."""
    model, found = variant(condition=condition).eval(), []
    model.flownet.res_blocks[0].register_forward_pre_hook(lambda block, args: found.append(args[1]))
    for t, z in ((0.2, 0.0), (0.2, 1.0), (0.7, 1.0)):
        model.flownet(torch.zeros(1, 16, 4), torch.tensor([t]), torch.full((1, 16, 128), z))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


# ---- diffusion -------------------------------------------------------------------------------------------------


def test_the_schedule():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    expected = [math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2 for u in t.tolist()]
    torch.testing.assert_close(diffusion.signal(t).square(), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)
    steps = (diffusion.step_of(torch.linspace(0, 1, 100001)[:-1]) * 1000).floor()
    assert steps.min() == 1 and steps.max() == 1000 and len(steps.unique()) == 1000


@pytest.mark.parametrize("solver", diffusion.SOLVERS)
def test_with_the_true_noise_a_solver_ends_at_the_image(solver):
    """Of an image that is certain, epsilon is what is left of x."""
    image, times = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), fm.time_grid(20, "uniform")

    def epsilon(x, t):
        a = diffusion.signal(torch.tensor(t, dtype=torch.float64))
        return (x - a * image) / (1 - a.square()).sqrt()

    start = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
    found = diffusion.SOLVERS[solver](epsilon, start, times, torch.Generator().manual_seed(2))
    torch.testing.assert_close(found, image, atol=1e-6, rtol=1e-6)


def test_ddim_keeps_a_normal_distribution_and_so_does_ancestral():
    """Of images with standard deviation 1 epsilon is s x, and x stays normal; ancestral sampling draws, DDIM does not."""
    start = torch.randn(40000, 1, 1, generator=torch.Generator().manual_seed(0))

    def epsilon(x, t):
        return (1 - diffusion.signal(torch.tensor(t, dtype=torch.float64)).square()).sqrt() * x

    ends = {name: solver(epsilon, start, fm.time_grid(200, "uniform"), torch.Generator().manual_seed(1)) for name, solver in diffusion.SOLVERS.items()}
    assert all(abs(end.std() - 1) < 0.02 for end in ends.values())
    correlation = {name: torch.corrcoef(torch.stack([start.flatten().double(), end.flatten()]))[0, 1] for name, end in ends.items()}
    assert correlation["euler"] > 0.99 and abs(correlation["ancestral"]) < 0.1


def test_its_loss_is_epsilons():
    model = variant(objective="diffusion").eval()
    latents, labels, t, noise = inputs(model, 3)
    steps = (t * 1000).floor() + 1
    z, expected = model.condition(latents, labels), []
    for k, (grid, span) in enumerate(zip(model.pyramid(latents), model.spans)):
        a = diffusion.signal(steps[k] / 1000 + 0.0005)[:, None, None]
        x_t = a * grid.flatten(2).mT + (1 - a ** 2).sqrt() * noise[k]
        expected.append((model.flownet(x_t, (steps[k] + 0.5) / 1000, z[:, span]) - noise[k]).square().mean(dim=(1, 2)))
    torch.testing.assert_close(model.scale_losses(latents, labels, t=t, noise=noise), torch.stack(expected), atol=1e-5, rtol=1e-5)


# ---- images of every size --------------------------------------------------------------------------------------


def test_flattened_latents_are_the_pyramid():
    model = small_model(patch_size=2, scale=(1, 2))
    model = ablated.AblatedFlowAR(**model.config, pyramid="image")
    latents = [torch.randn(3, 4, 2 * s, 2 * s) for s in model.scale]
    found = model.training_pyramid(ablated.flatten_pyramid(latents))
    for grid, part in zip(found, latents):
        assert torch.equal(grid, torch.nn.functional.pixel_unshuffle(part, 2))
    assert torch.equal(model.pyramid(latents[-1])[0], FlowAR.pyramid(model, latents[-1])[0])


# ---- the programs ----------------------------------------------------------------------------------------------


def test_a_run_carries_its_choices(tmp_path, monkeypatch):
    project, options = make_project(tmp_path, 2), "--head token --objective diffusion --condition adaln --pyramid image --epochs 1"
    train(project, tmp_path / "run", options)
    model = load_flowar(tmp_path / "run")
    assert {name: model.config[name] for name in ablated.CHOICES} == {"head": "token", "objective": "diffusion", "condition": "adaln", "pyramid": "image"}
    report = evaluate(project, tmp_path / "run", tmp_path / "eval", "--solver ancestral")
    assert report["solver"] == "ancestral" and report["metrics"] == []
    with pytest.raises(FlowARError, match="solver is 'heun': expected one of euler, ancestral"):
        evaluate(project, tmp_path / "run", tmp_path / "wrong", "--solver heun")
    with pytest.raises(FlowARError, match=r"trained with --head token \(here scale\), --objective diffusion \(here flow\), --condition adaln .*: use the same"):
        train(project, tmp_path / "run", f"--epochs 2 --resume {tmp_path}/run")
    assert ablated.describe(model) == ", head token, objective diffusion, condition adaln, pyramid image" and ablated.describe(small_model()) == ""
    with pytest.raises(FlowARError, match="models with ablation options cannot be distilled"):
        call(monkeypatch, f"scripts/distill.py --resume {tmp_path}/run --output_dir {tmp_path}/student --data_path {project}/images --device cpu")


def test_what_does_not_go_together_is_refused(tmp_path):
    for chosen, message in (({"head": "token", "condition": "cross_attention"}, "would let tokens read each other's condition"),
                            ({"condition": "addition", "cross": True}, "this model size already has cross-attention")):
        with pytest.raises(FlowARError, match=message):
            variant(**chosen)
    with pytest.raises(FlowARError, match="--pyramid image encodes images at every scale: leave out --cached_path"):
        train(make_project(tmp_path, 2), tmp_path / "run", f"--pyramid image --cached_val_path {tmp_path}/none")
