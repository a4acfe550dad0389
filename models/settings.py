"""The settings of sampling, each once: name, default, what it may be, and help.

FlowAR.sample_tokens takes them by these names; the options of the programs, sweeps, pipelines and the records of
checkpoints and evaluations are made from these fields (util/options.py). A new setting is a field here and the line
that reads it.
"""
import dataclasses
import math
from dataclasses import dataclass

from models import flow_matching as fm
from models.errors import FlowARError


# ---- what a value may be: each takes text of a command line or a value from Python, and raises ValueError ---------


def number(kind, low, high=math.inf, below=math.inf):
    """An int or a float from `low` to `high`, less than `below`."""
    expected = f"expected {'an integer' if kind is int else 'a number'} of at least {low}"
    if high < math.inf:
        expected += f" and at most {high}"
    if below < math.inf:
        expected += f" and less than {below}"

    def convert(value):
        try:
            converted = kind(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(expected) from None
        exact = isinstance(value, str) or converted == value
        if not (exact and low <= converted <= high and converted < below):
            raise ValueError(expected)
        return converted

    return convert


def one_of(*names):
    """One of some names, which --help shows."""
    def convert(value):
        if value not in names:
            raise ValueError(f"expected one of {', '.join(names)}")
        return value

    convert.choices = names
    return convert


def per_scale(kind):
    """One value for all scales, or one for each: 1:2:3, (1, 2, 3)."""
    def convert(value):
        if isinstance(value, str) and ":" in value:
            value = value.split(":")
        return tuple(map(kind, value)) if isinstance(value, (list, tuple)) else kind(value)

    return convert


def setting(default, help, kind, **more):
    """A field of a dataclass of options. None as the default means that nothing is chosen. more: `option`, its name on
    a command line where it is another one than the field's, and what util/options.py reads.
    """
    return dataclasses.field(default=default, metadata={"help": help, "kind": kind, **more})


def option_name(field):
    """The option of a field, without its dashes."""
    return field.metadata.get("option", field.name)


def check_value(name, kind, value):
    """A value as a kind converts it, or FlowARError with its name."""
    try:
        return kind(value)
    except ValueError as error:
        raise FlowARError(f"{name} is {value!r}: {error}") from error


def check_fields(options):
    """Convert and check every field of a dataclass in place; FlowARError names the first that is wrong."""
    for field in dataclasses.fields(options):
        value, kind = getattr(options, field.name), field.metadata.get("kind")
        if kind is not None and not (value is None and field.default is None):
            object.__setattr__(options, field.name, check_value(field.name, kind, value))  # Sampling is frozen


# ---- the settings ----------------------------------------------------------------------------------------------

STEPS = number(int, 1, 10_000)
FRACTION = number(float, 0.0, 1.0)
SOLVERS = (*fm.SOLVERS, "ancestral")  # the last: of the diffusion objective alone
# What earlier versions had and stored, each with the value that changes nothing.
REMOVED = {"num_step_schedule": "linear"}


@dataclass(frozen=True)
class Sampling:
    """How images are drawn. The defaults are the release's."""
    cfg: float | tuple = setting(
        1.0, "classifier-free guidance at the last scale (1: none), or one value per scale: 1:1.5:3",
        per_scale(number(float, 1.0)))
    cfg_schedule: str = setting(
        "linear", "guidance over the scales: linear from 1 to cfg, or constant", one_of(*fm.CFG_SCHEDULES))
    guidance: float = setting(0.9, "apply guidance only at times t <= this (t = 1 is noise)", FRACTION)
    guidance_low: float = setting(0.0, "apply guidance only at times t > this", FRACTION, beyond=True)
    num_steps: int | tuple = setting(
        25, "steps per scale; on the release's time grid an odd number makes one fewer (25: 24); or one value "
            "per scale: 25:25:12",
        per_scale(STEPS), option="num_step")
    num_steps_last: int | None = setting(
        None, "num_step of the last scale, reached linearly from num_step at the first (DiSA)", STEPS,
        option="num_step_last", beyond=True)
    solver: str = setting(
        "euler", "euler, ab2 (1 network evaluation per step), heun, midpoint (2) or rk4 (4); with --objective "
                 "diffusion: euler (DDIM) or ancestral", one_of(*SOLVERS), beyond=True)
    temperature: float = setting(1.0, "scale of the initial noise", number(float, 0.0, 1e6))
    time_grid: str = setting(
        "release", "time grid of the release, or uniform with exactly num_step Euler steps",
        one_of(*fm.TIME_GRIDS), beyond=True)

    def __post_init__(self):
        check_fields(self)
        steps, last, fewest = self.num_steps, self.num_steps_last, fm.TIME_GRIDS[self.time_grid]
        if last is not None and (isinstance(steps, tuple) or last > steps):
            raise FlowARError(f"num_steps_last is {last}, num_steps {as_text(steps)}: expected a single num_steps, at "
                              "least num_steps_last")
        counts = [*steps] if isinstance(steps, tuple) else [steps, last or steps]
        if min(counts) < fewest:
            raise FlowARError(f"num_steps is {as_text(steps)}, num_steps_last {last}: the {self.time_grid} time grid "
                              f"needs at least {fewest}; use time_grid uniform for 1")
        if self.guidance_low >= self.guidance > 0:
            raise FlowARError(f"guidance_low is {self.guidance_low}, guidance {self.guidance}: expected guidance_low < "
                              "guidance; use cfg 1 for no guidance")
        if isinstance(self.cfg, tuple) and self.cfg_schedule != "linear":
            raise FlowARError(f"cfg is {as_text(self.cfg)}, one value per scale: leave out cfg_schedule "
                              f"{self.cfg_schedule}")

    @classmethod
    def of(cls, stored, given):
        """The Sampling of {name: value} that are stored, as in a checkpoint, and of those given, which come first;
        given num_steps replace stored num_steps_last too, a given list of cfg the stored cfg_schedule. FlowARError for
        a name that is none.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        by_option = {option_name(field): field.name for field in dataclasses.fields(cls)}  # num_step is num_steps
        given = {by_option.get(name, name): value for name, value in given.items()}
        for name in given:
            if name not in names:
                raise FlowARError(f"{name}: not a sampling setting; expected one of {', '.join(names)}")
        if "num_steps" in given:
            stored = {**stored, "num_steps_last": None}
        if isinstance(given.get("cfg"), (list, tuple)):
            stored = {**stored, "cfg_schedule": "linear"}
        return cls(**{**stored, **given})

    def by_option(self):
        """{option: value}, as checkpoints and results.json have them."""
        return {option_name(field): getattr(self, field.name) for field in dataclasses.fields(self)}

    def times(self, num_scales):
        """The time grid of every scale."""
        steps = fm.scale_steps(self.num_steps, self.num_steps_last, num_scales)
        return [fm.time_grid(n, self.time_grid) for n in steps]

    def guidance_weights(self, num_scales):
        """The guidance weight of every scale."""
        return fm.guidance_weights(self.cfg, num_scales, self.cfg_schedule)


def drop_removed(stored):
    """Stored {name: value} without the removed settings, where they changed nothing."""
    return {name: value for name, value in stored.items() if (name, value) not in REMOVED.items()}


def as_text(value):
    """A value as an option takes it."""
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)
