"""Rectified head: a student that samples in one or two steps a scale, without guidance."""
import torch

from models.checks import check_labels
from models.flowar import FlowAR


class RectifiedFlowAR(FlowAR):
    """A FlowAR that begins as its teacher and learns the straight paths from noise e to x', where the teacher's
    sampling carries e, given z of the coarser scales. z learns too: x' follows from the null class's z besides.

    teacher: FlowAR, no part of the student's weights and copies. solution: arguments of its sample_pyramid. reuse:
    times t of a pair (e, x'). at_noise: probability of a time of exactly 1, where sampling begins; others: t_dist.
    forced: the coarser scales are the latents'; else what the teacher draws, as in sampling: labels are all it takes.
    """

    def __init__(self, teacher, solution, reuse=4, at_noise=0.25, forced=False, t_dist="uniform"):
        super().__init__(**{**teacher.config, "attn_dropout": 0.0, "proj_dropout": 0.0, "condition_noise": 0.0,
                            "t_dist": t_dist})
        self.load_state_dict(teacher.state_dict())
        self.solve = lambda labels, **given: teacher.sample_pyramid(labels, **given, **solution)
        self.reuse, self.at_noise, self.forced = reuse, at_noise, forced

    def draw(self, batch, generator=None):
        draws = super().draw(batch, generator)
        t, chosen = torch.rand(2, *draws.t.shape, self.reuse, generator=generator, device=draws.t.device)
        if self.training:
            t = torch.stack([times(u) for times, u in zip(self.time_distributions, t)])
        return draws._replace(t=torch.where(chosen < self.at_noise, 1.0, t))  # (scales, batch, reuse)

    def scale_losses(self, latents, labels, *, t=None, noise=None, drop=None, condition_noise=()):
        """As FlowAR's, on the paths to x', the mean over the times of a pair. Of the draws, t and noise are used."""
        check_labels(labels, self.class_num, wait=False)
        t, noise = self.draw(len(labels))[:2] if t is None or noise is None else (t, noise)
        pyramid = self.pyramid(latents) if self.forced else None
        x = self.solve(labels, noise=noise, forced=pyramid)
        z, x, noise = ([part.repeat_interleave(t.shape[2], dim=0) for part in parts]
                       for parts in ([self.condition_on(pyramid or x, labels)], x, noise))
        return self.velocity_errors(x, *z, t.flatten(1), noise).unflatten(1, t.shape[1:]).mean(dim=2)
