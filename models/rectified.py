"""Rectified head: a student that samples in one or two steps a scale, without guidance (METHOD: rectified head)."""
import torch

from models.files.refusals import check_labels
from models.flowar import FlowAR


class RectifiedFlowAR(FlowAR):
    """A FlowAR that begins as its teacher, and whose flow head learns the straight paths from noise e to x', where the
    teacher's sampling carries e, given z of the coarser scales. Its transformer stays the teacher's.

    teacher: FlowAR, no part of the student's weights and copies. solution: arguments of its sample_pyramid. reuse:
    times t of a pair (e, x'). at_noise: probability of a time of exactly 1, where sampling begins; others are uniform.
    forced: the coarser scales are the latents'; else what the teacher draws, as in sampling: labels are all it takes.
    """

    def __init__(self, teacher, solution, reuse=4, at_noise=0.25, forced=False):
        super().__init__(**{**teacher.config, "attn_dropout": 0.0, "proj_dropout": 0.0})
        self.load_state_dict(teacher.state_dict())
        self.requires_grad_(False).flownet.requires_grad_(True)
        self.solve = lambda labels, **given: teacher.sample_pyramid(labels, **given, **solution)
        self.reuse, self.at_noise, self.forced = reuse, at_noise, forced

    def draw(self, batch, generator=None):
        draws = super().draw(batch, generator)
        t, chosen = torch.rand(2, *draws.t.shape, self.reuse, generator=generator, device=draws.t.device)
        return draws._replace(t=torch.where(chosen < self.at_noise, 1.0, t))  # (scales, batch, reuse)

    def scale_losses(self, latents, labels, *, t=None, noise=None, drop=None):
        """As FlowAR's, on the paths to x', the mean over the times of a pair. No label is dropped."""
        check_labels(labels, self.class_num, wait=False)
        t, noise, _ = self.draw(len(labels)) if t is None or noise is None else (t, noise, drop)
        pyramid = self.pyramid(latents) if self.forced else None
        x = self.solve(labels, noise=noise, forced=pyramid)
        z, x, noise = ([part.repeat_interleave(t.shape[2], dim=0) for part in parts]
                       for parts in ([self._condition(pyramid or x, labels)], x, noise))
        return self.velocity_errors(x, *z, t.flatten(1), noise).unflatten(1, t.shape[1:]).mean(dim=2)
