"""--init_from: what fits is taken, classes go by name, positions by scale, and what is left is said."""
import pytest
import torch
from helpers import call, make_project, read_checkpoint, small_model, train, training_command

from models import FlowARError, load_flowar
from util.training.initial import load_initial_weights, carry_positions, class_table

RECORD = {"vae": {}, "data": {"classes": [str(n) for n in range(10)]}}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = make_project(tmp_path_factory.mktemp("project"))
    train(project, project / "run", "--epochs 1")
    return project


def file_of(model, path, **content):
    torch.save({"model": model.state_dict(), **content}, path)
    return path


def test_what_fits_is_the_average_bit_for_bit(project, capsys):
    old = load_flowar(project / "run")
    network = type(old)(**old.config)
    load_initial_weights(project / "run", network, RECORD)
    assert all(torch.equal(value, old.state_dict()[name]) for name, value in network.state_dict().items())
    printed = capsys.readouterr().out
    assert "EMA weights" in printed and "resized: none; randomly initialised: none" in printed


def test_classes_go_by_name_and_the_others_begin_as_the_null_class(tmp_path, capsys):
    old = small_model(class_num=3)
    path = file_of(old, tmp_path / "old.pth", data={"classes": ["cat", "dog", "owl"]}, optimizer={})
    new = small_model(class_num=4)
    load_initial_weights(path, new, {**RECORD, "data": {"classes": ["ant", "dog", "owl"]}})
    table = old.class_emb.weight
    assert torch.equal(new.class_emb.weight, torch.stack([table[3], table[1], table[2], table[3], table[3]]))
    assert "2 of 3 classes by name" in capsys.readouterr().out
    same_number = small_model(class_num=3)  # as many, but others
    load_initial_weights(path, same_number, {**RECORD, "data": {"classes": ["dog", "owl", "yak"]}})
    assert torch.equal(same_number.class_emb.weight, torch.stack([table[1], table[2], table[3], table[3]]))
    assert class_table(table, 4, [], ["a", "b", "c"])[1] == 0


def test_positions_go_by_scale(tmp_path, capsys):
    old, new = small_model(), small_model(img_size=32, scale=(1, 2, 3, 4, 8))
    load_initial_weights(file_of(old, tmp_path / "old.pth"), new, RECORD)
    for name in ("encoder_pos_embed_learned", "decoder_pos_embed_learned", "diffusion_pos_embed_learned"):
        before, after = getattr(old, name), getattr(new, name)
        assert torch.equal(after[:, :5], before[:, :5]) and torch.equal(after[:, 14:30], before[:, 5:])  # 1, 2, then 4
        coarse = after[:, 30:].detach().transpose(1, 2).unflatten(2, (8, 8))
        torch.testing.assert_close(torch.nn.functional.interpolate(coarse, (4, 4), mode="area").flatten(2).transpose(1, 2), before[:, 5:].detach(),
                                   atol=0.02, rtol=0.2)
    assert torch.equal(new.flownet.input_proj.weight, old.flownet.input_proj.weight)
    assert "(scales 1,2,4 to 1,2,3,4,8)" in capsys.readouterr().out
    constant = carry_positions(torch.ones(1, 21, 2), (1, 2, 4), (1, 3, 6))
    torch.testing.assert_close(constant, torch.ones(1, 46, 2))


def test_what_does_not_fit_is_left_and_said_and_little_is_refused(tmp_path, capsys):
    old = small_model()
    other_vae = small_model(vae_embed_dim=8)
    drawn = other_vae.z_proj.weight.clone()
    load_initial_weights(file_of(old, tmp_path / "old.pth"), other_vae, RECORD)
    assert torch.equal(other_vae.z_proj.weight, drawn) and torch.equal(other_vae.encoder_norm.weight, old.encoder_norm.weight)
    assert "randomly initialised: z_proj.weight (32, 8), flownet.input_proj.weight (64, 8)" in capsys.readouterr().out
    with pytest.raises(FlowARError, match=r"only \d+% of the model's weights, not .*: set --model, --diffloss_d and --diffloss_w"):
        load_initial_weights(tmp_path / "old.pth", small_model(encoder_embed_dim=64, decoder_embed_dim=64, diffloss_w=128), RECORD)


def test_a_training_begins_with_it_once(project, tmp_path, monkeypatch, capsys):
    """The average too; the same command, which goes on, does not begin again."""
    options = f"--init_from {project}/run --resume {tmp_path}/run --save_every 1 --keep 20 --log_freq 1 --epochs"
    call(monkeypatch, training_command(project, tmp_path / "run", f"{options} 1"))
    before, first = read_checkpoint(project / "run")["model_ema"], torch.load(tmp_path / "run" / "checkpoint-000000001.pth", weights_only=True)
    for key in ("model", "model_ema"):
        torch.testing.assert_close(first[key]["z_proj.weight"], before["z_proj.weight"], atol=1e-3, rtol=0)
    assert "randomly initialised: none" in capsys.readouterr().out
    call(monkeypatch, training_command(project, tmp_path / "run", f"{options} 2"))
    assert "randomly initialised" not in (printed := capsys.readouterr().out) and "resumes from step 5" in printed
