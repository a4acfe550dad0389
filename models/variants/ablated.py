"""A FlowAR with one idea of the paper changed: what its ablations compare. Released weights are the defaults."""
import torch
import torch.nn.functional as F

from models.errors import FlowARError
from models.flowar import FlowAR
from models.variants import diffusion
from models.variants.conditioning import HEADS, TokenAttention

CHOICES = {"head": ("scale", "token"), "objective": ("flow", "diffusion"), "condition": tuple(HEADS),
           "pyramid": ("latent", "image")}  # the first: released
RELEASED = {name: values[0] for name, values in CHOICES.items()}
TOGETHER = "sequence_concat", "cross_attention"  # ways in which tokens read the condition of others


class AblatedFlowAR(FlowAR):
    """head: tokens of a scale attend to each other in the flow head, or do not. objective: velocity, or DDPM's epsilon.
    condition: the way in which z enters the head, see conditioning.HEADS. pyramid: coarse scales are of the latent, or
    latents of the downsampled image, which training gets as flatten_pyramid has them. The buffer `variant` tells all.
    """

    def __init__(self, head="scale", objective="flow", condition="spatial_adaln", pyramid="latent", **config):
        choices = {"head": head, "objective": objective, "condition": condition, "pyramid": pyramid}
        for name, value in choices.items():
            if value not in CHOICES[name]:
                raise FlowARError(f"{name} is {value!r}: expected one of {', '.join(CHOICES[name])}")
        if config.get("cross") and condition != RELEASED["condition"]:
            raise FlowARError(f"condition {condition}: this model size already has cross-attention to the condition")
        if head == "token" and condition in TOGETHER:
            raise FlowARError(f"head token: condition {condition} would let tokens read each other's condition")
        super().__init__(**config)
        self.config.update(choices)
        c = self.config
        self.flownet = HEADS[condition](self.token_channels, c["decoder_embed_dim"], c["diffloss_d"], c["diffloss_w"],
                                        c["mlp_ratio"], c["cross"], c["use_checkpoint"])
        if head == "token":
            for block in self.flownet.res_blocks:
                block.attn = TokenAttention(c["diffloss_w"], block.attn.num_heads, qkv_bias=False)
        self._initialize()
        text = torch.tensor(list(",".join(choices.values()).encode()), dtype=torch.uint8, device="cpu")
        self.register_buffer("variant", text.to(self.z_proj.weight.device))

    @property
    def objective(self):
        return diffusion if self.config["objective"] == "diffusion" else super().objective

    def training_pyramid(self, latents):
        if self.config["pyramid"] == "latent":
            return super().training_pyramid(latents)
        sides = [s * self.patch_size for s in self.scale]
        parts = latents.split([side * side for side in sides], dim=2)
        return [F.pixel_unshuffle(part.unflatten(2, (s, s)), self.patch_size) for part, s in zip(parts, sides)]

    def velocity_errors(self, pyramid, z, t, noise):
        if self.objective is diffusion:
            t = diffusion.step_of(t)
        return super().velocity_errors(pyramid, z, t, noise)

    def sample_pyramid(self, labels, *, known=None, **options):
        if known and self.objective is diffusion:
            raise FlowARError("the diffusion objective does not support known cells, which inpainting needs")
        return super().sample_pyramid(labels, known=known, **options)


def flatten_pyramid(pyramid):
    """(B, C, cells of all) of latents (B, C, h, w) of every scale: one tensor, for what passes it on."""
    return torch.cat([latents.flatten(2) for latents in pyramid], dim=2)


def describe(model):
    """', head token, objective diffusion': a FlowAR's choices that are not the released ones, '' of a released one."""
    choices = [(name, model.config.get(name, value)) for name, value in RELEASED.items()]
    return "".join(f", {name} {value}" for name, value in choices if value != RELEASED[name])
