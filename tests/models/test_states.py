"""Everything in a weights file is used, or named: other people's shapes of files, averages, what is left over."""
import copy
import re

import pytest
import torch
from helpers import SCALES, small_vae
from safetensors.torch import save_file

from models import FlowARError, build_model, load_flowar, load_vae
from models.files import read_file
from models.files.checkpoints import COMPUTED, find_model
from models.vaes import read_vae, save_vae

VAE = {"vae_embed_dim": 4, "vae_stride": 4}
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
AVERAGES = ("ema", "ema_model", "model_ema", "ema_state_dict", "shadow", "state_dict_ema", "swa_model")


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def parameters(state):
    """What an average of parameters holds."""
    return {name: value for name, value in state.items() if not COMPUTED.fullmatch(name)}


def undotted(state):
    return {name.replace(".", ""): value for name, value in state.items()}


torch.manual_seed(0)
EMA = build_model("flowar_tiny", img_size=16, scale=SCALES, class_num=10, **VAE).state_dict()
RAW = {name: value if COMPUTED.fullmatch(name) else value + 1 for name, value in EMA.items()}
OTHER = {name: value if COMPUTED.fullmatch(name) else value + 2 for name, value in EMA.items()}

# name -> (content, which weights and under which key by default)
SHAPES = {
    "bare": (EMA, EMA, ""),
    **{key: ({key: EMA, "epoch": 3}, EMA, key) for key in ("model", "state_dict", "model_state_dict", "network")},
    "module": ({"module": EMA}, EMA, ""),
    "nested": ({"checkpoint": {"model": {"state_dict": EMA}}}, EMA, "checkpoint.model.state_dict"),
    "in a list": ([EMA], EMA, "0"),
    **{f"{name} before": ({"model": under(f"{name}.", EMA)}, EMA, "model") for name in WRAPPERS},
    **{f"{name} within": ({name_.replace("attn.", f"attn.{name}."): value for name_, value in EMA.items()}, EMA, "")
       for name in WRAPPERS},
    "wrappers in wrappers": (under("module._orig_mod.", {f"a.{name}": value for name, value in EMA.items()}), EMA, "a"),
    "lightning": ({"state_dict": {**under("model._orig_mod.", RAW), **under("ema.module.", EMA)}}, EMA, "state_dict.ema"),
    **{f"{key} alone": ({key: EMA}, EMA, key) for key in AVERAGES},
    **{f"{key} beside": ({"model": RAW, key: EMA}, EMA, key) for key in AVERAGES},
    "shadow in ema": ({"model": RAW, "ema": {"decay": 0.9, "shadow": parameters(EMA)}}, EMA, "ema.shadow"),
    "a list": ({"model": RAW, "ema": {"shadow_params": list(parameters(EMA).values())}}, EMA, "ema.shadow_params"),
    "without dots": ({"state_dict": {**under("model.", RAW), **under("model_ema.", undotted(parameters(EMA))),
                                     "model_ema.decay": torch.tensor(0.9)}}, EMA, "state_dict.model_ema"),
    "of the whole, without dots": (
        {"state_dict": {**under("net.", RAW), **under("model_ema.", undotted(under("net.", parameters(EMA))))}}, EMA,
        "state_dict.model_ema"),
    "AveragedModel": ({"model": RAW, "other": {**under("module.", EMA), "n_averaged": torch.tensor(3)}}, EMA, "other"),
    "ema-pytorch": ({"ema": {**under("online_model.", RAW), **under("ema_model.", EMA)}}, EMA, "ema.ema_model"),
    "moments of an optimizer": (
        {"model": EMA, "optimizer": {"exp_avg": list(parameters(RAW).values()), "exp_avg_sq": RAW}, "exp_avg": RAW, "grads": RAW}, EMA, "model"),
    "one network under two names": ({"state_dict": {**under("a.", EMA), **under("b._orig_mod.", EMA)}}, EMA, "state_dict.a"),
}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], value) for name, value in other.items())


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_other_people(name):
    content, expected, key = SHAPES[name]
    found = find_model(content, "x.pth")
    assert same({name: found.tensors[name] for name in expected}, expected) and found.key == key
    assert f"under '{key}'" in found.describe() if key else "under" not in found.describe()


def test_averages_and_raw_weights_by_choice(tmp_path, capsys):
    both = {"model": RAW, "model_ema": EMA, "args": VAE}
    torch.save(both, tmp_path / "x.pth")
    for weights, expected, line in ((None, EMA, "the average (EMA) under 'model_ema'; not used: model (86 tensors)"),
                                    ("ema", EMA, "the average (EMA) under 'model_ema'; not used: model (86 tensors)"),
                                    ("raw", RAW, "weights (not called an average) under 'model'; not used: model_ema (86 tensors)")):
        assert same(load_flowar(tmp_path / "x.pth", weights).state_dict(), expected)
        assert capsys.readouterr().err == f"{tmp_path}/x.pth: {line}\n"
    assert same(find_model(both, "x", "raw first").tensors, RAW) and same(find_model({"ema": EMA}, "x", "raw first").tensors, EMA)
    odd = {**RAW, "ema": {name.replace(".", "/"): value for name, value in EMA.items()}}
    assert same(find_model(odd, "x", "raw").tensors, RAW | {f"ema.{name}": value for name, value in odd["ema"].items()})
    assert find_model(EMA, "x").kind == "unnamed" and find_model({"model": EMA}, "x", "raw").kind == "raw"
    for content, weights, message in (
            ({"ema": EMA}, "raw", "x: it holds only the average (EMA) under 'ema', but --weights is raw: leave it out"),
            ({"model": RAW}, "ema", "x: it holds only weights (not called an average) under 'model', but --weights is ema: leave it out"),
            (EMA, "raw", "x: it holds only weights (not called an average), but --weights is raw: leave it out"),
            (both, "best", "weights is 'best': expected 'ema', 'raw' or None")):
        with pytest.raises(FlowARError, match=re.escape(message)):
            find_model(content, "x", weights)


@pytest.mark.parametrize("content,message", [
    ({"ema1": EMA, "ema2": OTHER}, "several FlowAR weights, which differ: the average (EMA) under 'ema1', the average (EMA) under 'ema2'"),
    ({"model": RAW, "ema": {0.99: EMA, 0.999: OTHER}}, "under 'ema.0.99', the average (EMA) under 'ema.0.999'"),
    ({"model": RAW, "best": EMA}, "several FlowAR weights, which differ: weights (not called an average) under 'model', weights"),
    ({"model": RAW, "ema": {"shadow_params": list(parameters(EMA).values())[1:]}}, "its average (EMA) cannot be used, as names or shapes are not the model's: ema ("),
    ({**RAW, "ema": under("x/", EMA)}, "its average (EMA) cannot be used, as names or shapes are not the model's: ema ("),
    ({**EMA, "old": RAW}, "several FlowAR weights, which differ"),
    ({"model": {**EMA, "module.mask": EMA["mask"]}}, "model.mask and model.module.mask are both mask without keys and the prefixes"),
    ({"model": {**EMA, **under("_orig_mod.", RAW)}}, "are both encoder_pos_embed_learned without"),
    ({"a": {"b": {"mask": torch.zeros(1)}}, **under("a.b.", EMA)}, "a.b.mask and a.b.mask are both mask"),
    ({"optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}, "it holds optimizer.state.0.exp_avg"),
    (torch.zeros(2), "no FlowAR weights in this file"), ({}, "it holds no tensors"), ({"model": None}, "it holds no tensors"),
    ({"ema": parameters(EMA)}, "the geometry cannot be recognised: 'mask' is missing"),
    ({"model": RAW, "ema": {name: value for name, value in EMA.items() if name != "z_proj_ln.weight"}}, "z_proj_ln.weight is missing"),
    ({**EMA, "flownet.res_blocks.0.extra.weight": torch.zeros(2)}, "1 tensors do not fit the model: flownet.res_blocks.0.extra.weight is not in"),
    ({**EMA, "mask.x": torch.zeros(1)}, "mask.x is not in the model"), ({**EMA, "mask_token": torch.zeros(2)}, "mask_token is not in the model"),
    ({**EMA, "z_proj.class_emb.weight": torch.zeros(1)}, "z_proj.class_emb.weight is not in the model"),
    ({**EMA, "z_proj.weight": EMA["z_proj.weight"].to(torch.int8)}, "z_proj.weight is torch.int8, the model's is torch.float32")])
def test_what_is_ambiguous_missing_or_of_another_network_is_refused(tmp_path, content, message):
    content = {**content, "args": VAE} if isinstance(content, dict) else content
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(FlowARError, match=re.escape(message)) as caught:
        load_flowar(tmp_path / "x.pth")
    assert str(caught.value).startswith(f"{tmp_path}/x.pth: ") and "\n" not in str(caught.value)


def test_what_is_not_the_networks_is_named(tmp_path, capsys):
    more = {**under("loss.", {str(i): torch.zeros(2) for i in range(5)}), "disc.w": torch.zeros(2), "steps": torch.tensor(3), "a\nb.x": torch.zeros(2)}
    torch.save({"model": {**EMA, **more}, "args": VAE}, tmp_path / "x.pth")
    load_flowar(tmp_path / "x.pth")
    assert capsys.readouterr().err == (f"{tmp_path}/x.pth: weights (not called an average) under 'model'; "
                                       "not used: model.loss (5 tensors), model.disc.w, model.steps, model.a?b.x\n")


# ---- VAEs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """(A VAE, the content of its file)."""
    path, vae = tmp_path_factory.mktemp("vae") / "vae.pth", small_vae()
    save_vae(vae, path)
    return vae, torch.load(path, weights_only=True)


def opened(tmp_path, content):
    torch.save(content, tmp_path / "x.ckpt")
    found, notes = read_vae(tmp_path / "x.ckpt")
    return found, [note.replace(f"{tmp_path}/x.ckpt", "x.ckpt") for note in notes]


@pytest.mark.parametrize("shape,line", [
    (lambda state: {"model": state}, None), (lambda state: {"state_dict": under("first_stage_model.", state)}, None),
    (lambda state: {"model": under("module.", state)}, None),
    (lambda state: {"module": {name.replace("decoder.", "decoder._fsdp_wrapped_module."): value for name, value in state.items()}}, None),
    (lambda state: {"state_dict": {**state, "loss.logvar": torch.zeros(1), "loss.d.w": torch.zeros(2)}},
     "x.ckpt: weights (not called an average) under 'state_dict'; not used: state_dict.loss.logvar, state_dict.loss.d.w"),
    (lambda state: {"model": {name: value + 1 for name, value in state.items()}, "ema": {"shadow": state}},
     "x.ckpt: the average (EMA) under 'ema.shadow'; not used: model (162 tensors)"),
    (lambda state: {"state_dict": {**under("first_stage_model.", state), **under("cond.encoder.", {
        name: value + 1 for name, value in state.items() if name.startswith("encoder.")})}},
     "x.ckpt: weights (not called an average) under 'state_dict.first_stage_model'; not used: state_dict.cond (72 tensors)")])
def test_vaes_of_other_people(tmp_path, vae, shape, line):
    found, notes = opened(tmp_path, {**shape(vae[1]["model"]), "config": vae[1]["config"]})
    assert same(found.state_dict(), vae[0].state_dict()) and found.latent_scale == vae[0].latent_scale
    assert notes == ([line] if line else [])


def test_a_vae_without_its_configuration_is_recognised_but_for_its_latent_scale(tmp_path, vae):
    for content in (vae[1]["model"], {"state_dict": vae[1]["model"], "config": {"optimizer": "adam"}}):
        found, notes = opened(tmp_path, content)
        assert found.config == vae[0].config and same(found.state_dict(), vae[0].state_dict())
        assert len(notes) == 1 and notes[0].startswith("warning: x.ckpt does not tell its latent scale: KL-16's is taken, 0.2325; ")


@pytest.mark.parametrize("more", ["encoder.extra.weight", "decoder.up.2.attn.0.q.weight", "decoder.up.0.block.9.conv1.weight",
                                  "quant_conv.lora", "post_quant_conv.x.y", "decoder._orig_mod.extra"])
def test_layers_that_a_vae_lacks_are_refused(tmp_path, vae, more):
    content = copy.copy(vae[1]) | {"model": {**vae[1]["model"], more: torch.zeros(1)}}
    with pytest.raises(FlowARError, match=f"tensors do not fit the VAE: {more.replace('_orig_mod.', '')} is not in the VAE"):
        opened(tmp_path, content)


def test_names_of_diffusers_and_other_networks(tmp_path, vae):
    state = {name.replace("encoder.down.", "encoder.down_blocks."): value for name, value in vae[1]["model"].items()}
    with pytest.raises(FlowARError, match="x.ckpt: a VAE of the diffusers library, by its names: give --vae diffusers:FOLDER"):
        opened(tmp_path, state)
    with pytest.raises(FlowARError, match=r"x.ckpt: no VAE weights in this file .*; it holds model \(86 tensors\)"):
        opened(tmp_path, {"model": EMA})


def test_the_suffix_does_not_matter(tmp_path, vae):
    save_file(EMA, tmp_path / "x.pth")
    assert same(find_model(read_file(tmp_path / "x.pth"), "x").tensors, EMA)
    save_file({name: value.contiguous() for name, value in vae[1]["model"].items()}, tmp_path / "x.ckpt")
    assert same(load_vae(tmp_path / "x.ckpt").state_dict(), vae[0].state_dict())
    torch.save({"model": EMA, "args": VAE}, tmp_path / "x.safetensors")
    assert same(load_flowar(tmp_path / "x.safetensors").state_dict(), EMA)
