"""Where a training run is, its sums since the last log entry, its usual loss: resumed, it logs as if undisturbed."""
import math
import statistics
from dataclasses import asdict, dataclass, field

SPIKE_MEMORY = 100  # steps whose losses are the usual ones, and before which nothing counts as a spike
SPIKE = 6.0  # standard deviations above the usual loss: 1.4826 times the median deviation, as for a normal law


@dataclass
class Progress:
    epoch: int = 0  # the epoch that is being trained
    done: int = 0  # its optimizer steps that are done
    step: int = 0  # optimizer steps since the start of training, skipped ones included
    bad_steps: int = 0  # steps that were skipped since the start of training
    bad_in_a_row: int = 0
    period: int = 0  # finite steps since the last log entry
    sums: list = field(default_factory=list)  # of gradient norm, loss, and the loss of every scale, over them
    recent: list = field(default_factory=list)  # losses of the last finite steps

    @property
    def usual(self):
        """Median of the recent losses: spikes hardly move it."""
        return statistics.median(self.recent or [math.nan])

    def advance(self, steps):
        """One more step of an epoch of `steps`."""
        self.step, self.done = self.step + 1, self.done + 1
        if self.done == steps:
            self.epoch, self.done = self.epoch + 1, 0

    def add(self, values):
        """A finite step's [gradient norm, loss, loss of every scale]. Returns whether the loss is a spike."""
        self.bad_in_a_row = 0
        self.period += 1
        self.sums = [a + b for a, b in zip(self.sums or [0.0] * len(values), values)]
        loss, usual = values[1], self.usual
        deviation = 1.4826 * statistics.median(abs(value - usual) for value in self.recent or [math.nan])
        spike = len(self.recent) == SPIKE_MEMORY and loss > usual + SPIKE * deviation
        self.recent = [*self.recent, loss][-SPIKE_MEMORY:]
        return spike

    def add_bad(self):
        """A step that was skipped."""
        self.bad_steps += 1
        self.bad_in_a_row += 1

    def take_means(self):
        """Means over the finite steps since the last call, or None if there were none."""
        means = [value / self.period for value in self.sums] if self.period else None
        self.period, self.sums = 0, []
        return means

    def state_dict(self):
        return asdict(self)
