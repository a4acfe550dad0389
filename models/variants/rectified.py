"""Rectified head: a student that samples in one or two steps a scale, without guidance."""
import torch

from models.checks import check_labels
from models.flowar import FlowAR


class RectifiedFlowAR(FlowAR):
    """A FlowAR that begins as its teacher and learns the straight lines from noise e to x', where the teacher's
    sampling carries e, given z of the coarser scales. z learns too: x' follows from the null class's z besides.

    teacher: FlowAR, no part of the student's weights and copies. solution: arguments of its sample_pyramid. reuse:
    times t of a pair (e, x'). at_noise: probability of a time of exactly 1, where sampling begins; others: t_dist.
    on_latents: the coarser scales are the latents'; else the teacher's samples, so that labels are enough.
    """

    def __init__(self, teacher, solution, reuse=4, at_noise=0.25, on_latents=False, t_dist="uniform"):
        super().__init__(**{**teacher.config, "attn_dropout": 0.0, "proj_dropout": 0.0, "condition_noise": 0.0,
                            "t_dist": t_dist})
        self.load_state_dict(teacher.state_dict())
        self.solve = lambda labels, **given: teacher.sample_pyramid(labels, **given, **solution)
        self.reuse, self.at_noise, self.on_latents = reuse, at_noise, on_latents

    def draw(self, batch, generator=None):
        draws = super().draw(batch, generator)
        t, chosen = torch.rand(2, *draws.t.shape, self.reuse, generator=generator, device=draws.t.device)
        if self.training:
            t = torch.stack([times(u) for times, u in zip(self.time_distributions, t)])
        return draws._replace(t=torch.where(chosen < self.at_noise, 1.0, t))  # (scales, batch, reuse)

    def scale_losses(self, latents, labels, *, t=None, noise=None, drop=None, condition_noise=()):
        """As FlowAR's, with x' in the latents' place, the mean over the times of a pair; it uses t and noise alone."""
        check_labels(labels, self.class_num)
        if t is None or noise is None:
            t, noise = self.draw(len(labels))[:2]
        forced = self.pyramid(latents) if self.on_latents else None
        solution = self.solve(labels, noise=noise, forced=forced)
        z = self.condition_on(forced or solution, labels)
        scales, batch, reuse = t.shape
        z = z.repeat_interleave(reuse, dim=0)
        solution = [x.repeat_interleave(reuse, dim=0) for x in solution]
        noise = [e.repeat_interleave(reuse, dim=0) for e in noise]
        return self.velocity_errors(solution, z, t.flatten(1), noise).unflatten(1, (batch, reuse)).mean(dim=2)
