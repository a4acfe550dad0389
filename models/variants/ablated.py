"""A FlowAR with one idea of the paper changed: what its ablations compare. Released weights are the defaults."""
import torch
import torch.nn.functional as F

from models.errors import FlowARError
from models.flowar import FlowAR
from models.variants import diffusion
from models.variants.conditioning import HEADS, TokenAttention

CHOICES = {"head": ("scale", "token"), "objective": ("flow", "diffusion"), "condition": tuple(HEADS),
           "pyramid": ("latent", "image")}  # the first: released
DEFAULTS = {name: values[0] for name, values in CHOICES.items()}
TOGETHER = "sequence_concat", "cross_attention"  # ways in which tokens read the condition of others


def build(**config):
    """FlowAR(**config), or the AblatedFlowAR where a choice is not the released one."""
    chosen = {name: config.pop(name, default) for name, default in DEFAULTS.items()}
    return FlowAR(**config) if chosen == DEFAULTS else AblatedFlowAR(**chosen, **config)


class AblatedFlowAR(FlowAR):
    """head: tokens of a scale attend to each other in the flow head, or do not. objective: velocity, or DDPM's epsilon.
    condition: the way in which z enters the head, see conditioning.HEADS. pyramid: coarse scales are of the latent, or
    latents of the downsampled image, which training gets packed, see pack. The buffer `variant` carries all in weights.
    """

    def __init__(self, head="scale", objective="flow", condition="spatial_adaln", pyramid="latent", **config):
        chosen = {"head": head, "objective": objective, "condition": condition, "pyramid": pyramid}
        for name, value in chosen.items():
            if value not in CHOICES[name]:
                raise FlowARError(f"{name} is {value!r}: expected one of {', '.join(CHOICES[name])}")
        if config.get("cross") and condition != DEFAULTS["condition"]:
            raise FlowARError(f"condition {condition}: this size has cross-attention to the condition already: take "
                              "flowar_tiny, flowar_small or flowar_base")
        if head == "token" and condition in TOGETHER:
            raise FlowARError(f"head token with condition {condition}: in it tokens read the condition of others: "
                              "leave out one of the two")
        super().__init__(**config)
        self.config.update(chosen)
        c = self.config
        self.flownet = HEADS[condition](self.token_channels, c["decoder_embed_dim"], c["diffloss_d"], c["diffloss_w"],
                                        c["mlp_ratio"], c["cross"], c["use_checkpoint"])
        for block in self.flownet.res_blocks if head == "token" else ():
            block.attn = TokenAttention(c["diffloss_w"], block.attn.num_heads, qkv_bias=False)
        self._initialize()
        said = torch.tensor(list(",".join(chosen.values()).encode()), dtype=torch.uint8, device="cpu")
        self.register_buffer("variant", said.to(self.class_emb.weight.device))

    @property
    def path(self):
        return diffusion if self.config["objective"] == "diffusion" else super().path

    def pyramid(self, latents):
        if latents.ndim != 3:
            return super().pyramid(latents)
        sides = [s * self.patch_size for s in self.scale]
        parts = latents.split([side * side for side in sides], dim=2)
        return [F.pixel_unshuffle(part.unflatten(2, (s, s)), self.patch_size) for part, s in zip(parts, sides)]

    def velocity_errors(self, pyramid, z, t, noise):
        return super().velocity_errors(pyramid, z, diffusion.step_of(t) if self.path is diffusion else t, noise)

    def sample_pyramid(self, labels, *, known=None, **options):
        if known and self.path is diffusion:
            raise FlowARError("a model with the diffusion objective keeps no known cells: their paths are not straight")
        return super().sample_pyramid(labels, known=known, **options)


def pack(pyramid):
    """(B, C, cells of all) of latents (B, C, h, w) of every scale: one tensor, for what passes it on."""
    return torch.cat([latents.flatten(2) for latents in pyramid], dim=2)


def describe(model):
    """', head token, objective diffusion': a FlowAR's choices that are not the released ones, '' of a released one."""
    return "".join(f", {name} {value}" for name, value in chosen(model).items() if value != DEFAULTS[name])


def chosen(model):
    return {name: model.config.get(name, default) for name, default in DEFAULTS.items()}


def differences(model, state, path):
    """'--head token (here scale)': what a FlowAR's weights were trained with and it is not made with, '' if nothing."""
    told = {**DEFAULTS, **read_variant(state, path)}
    other = [(name, here) for name, here in chosen(model).items() if told[name] != here]
    return ", ".join(f"--{name} {told[name]} (here {here})" for name, here in other)


def check_variant(model, state, path):
    """FlowARError if weights are of other choices than the model's."""
    if other := differences(model, state, path):
        raise FlowARError(f"{path}: was trained with {other}: give the same")


def read_variant(state, path):
    """{argument of AblatedFlowAR: value} that a state dict's tensors tell, {} of released ones."""
    if "variant" not in state:
        return {}
    said = bytes(state["variant"].flatten()[:100].tolist()).decode("ascii", "replace").split(",")
    if len(said) != len(CHOICES) or any(value not in CHOICES[name] for name, value in zip(CHOICES, said)):
        raise FlowARError(f"{path}: its variant is {','.join(said)!r}, of another version of this code")
    return dict(zip(CHOICES, said))
