"""Where a training run is, and its sums since the last log entry: resumed, it logs as if undisturbed."""
from dataclasses import dataclass, field


@dataclass
class Progress:
    epoch: int = 0  # the epoch that is being trained
    done: int = 0  # its optimizer steps that are done
    step: int = 0  # optimizer steps since the start of training, skipped ones included
    bad_steps: int = 0  # steps that were skipped since the start of training
    bad_in_a_row: int = 0
    period: int = 0  # finite steps since the last log entry
    sums: list = field(default_factory=list)  # of gradient norm, loss, and the loss of every scale, over them

    def advance(self, steps):
        """One more step of an epoch of `steps`."""
        self.step, self.done = self.step + 1, self.done + 1
        if self.done == steps:
            self.epoch, self.done = self.epoch + 1, 0

    def add(self, grad_norm, losses):
        """A finite step. losses: [loss, that of every scale]."""
        self.bad_in_a_row = 0
        self.period += 1
        values = [grad_norm, *losses]
        self.sums = [a + b for a, b in zip(self.sums or [0.0] * len(values), values)]

    def add_bad(self):
        """A step that was skipped."""
        self.bad_steps += 1
        self.bad_in_a_row += 1

    def take_means(self):
        """(gradient norm, [loss, that of every scale]), means over the finite steps since the last call, of which there
        is at least one.
        """
        grad_norm, *losses = [value / self.period for value in self.sums]
        self.period, self.sums = 0, []
        return grad_norm, losses
