"""Dataclasses of options as command lines: what values may be, and a parser made from the fields.

A field has its default, and in its metadata: help; kind, which converts and checks a value; option, its name where that
is not the field's; beyond, where it goes beyond the release; aliases, metavar, nargs, const as in argparse.
"""
import argparse
import dataclasses
import inspect
import os
from dataclasses import fields

from models.settings import check_fields, number, one_of, option_name
from util.data.pixels import parse_color

# ---- what a value may be: each takes text or a value from Python, and raises ValueError ---------------------------

POSITIVE, COUNT = number(int, 1, 2**31 - 1), number(int, 0, 2**31 - 1)
REAL, BELOW_ONE = number(float, 0.0), number(float, 0.0, below=1.0)
SEED, PIXELS, WORKERS = number(int, 0, 2**32 - 1), number(int, 1, 8192), number(int, 0, 1024)
DEVICE = one_of("auto", "cpu", "cuda")


def path(text):
    """A path; ~ is the user's home wherever it stands."""
    if not str(text):
        raise ValueError("expected a path")
    return os.path.expanduser(str(text))


def optional_path(text):
    """A path, or nothing."""
    return path(text) if text else ""


def list_of(kind):
    """'1,2,4' -> (1, 2, 4)."""
    def convert(value):
        return tuple(kind(part) for part in (value.split(",") if isinstance(value, str) else value))
    return convert


def several(kind):
    """One value of a kind, or a list of them separated by commas."""
    as_list = list_of(kind)

    def convert(value):
        if not isinstance(value, (str, list)):
            return kind(value)
        values = list(as_list(value))
        return values if len(values) > 1 else values[0]
    return convert


def color(value):
    """(red, green, blue)."""
    return value if isinstance(value, tuple) else parse_color(value)


# ---- dataclasses ----------------------------------------------------------------------------------------------------


def flag(help, **more):
    """A field that an option turns on."""
    return dataclasses.field(default=False, metadata={"help": help, **more})


def turned_off_by(option, help, **more):
    """A field that is on unless an option turns it off. on: an option that says that it is on."""
    return dataclasses.field(default=True, metadata={"help": help, "option": option, **more})


class Checked:
    """Converts and checks every field, whoever makes the options."""

    def __post_init__(self):
        check_fields(self)


# ---- command lines --------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with a short usage line and one-line errors."""

    def __init__(self, description, usage="%(prog)s [options]", **more):
        super().__init__(description=description, usage=usage, allow_abbrev=False, **more)

    def add_argument(self, *names, **more):
        """argparse's; the help shows the default, if there is one."""
        help, default = more.get("help"), more.get("default")
        shown = default is not False and default not in (None, "", (), argparse.SUPPRESS)
        if help and shown and "default" not in help:
            more["help"] = f"{help} (default {','.join(map(str, default)) if type(default) is tuple else default})"
        return super().add_argument(*names, **more)

    def error(self, message):
        text = f"error: {message.removeprefix('argument ')}\n"
        # Once a host: all ranks have these options.
        self.exit(2, None if "RANK" in os.environ and os.environ.get("LOCAL_RANK") not in (None, "0") else text)


def as_type(kind):
    """An argparse type of a kind of values."""
    def convert(text):
        try:
            return kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    return convert


def make_parser(options, description=None):
    """A parser of a dataclass of options: what the release has first, then what goes beyond it."""
    parser = Parser(description)
    for beyond in (False, True):
        for group in options.__mro__:
            own = inspect.get_annotations(group)
            members = [field for field in fields(options) if field.name in own and "help" in field.metadata
                       and field.metadata.get("beyond", False) == beyond]
            if members:
                title = inspect.getdoc(group).splitlines()[0] + ", beyond the release" * beyond
                add_options(parser.add_argument_group(title), members)
    return parser


def add_options(parser, members):
    """Add the flags of fields to a parser or a group of one."""
    for field in members:
        more, kind = field.metadata, field.metadata.get("kind")
        flags, common = [f"--{option_name(field)}"], dict(dest=field.name, default=field.default)
        if kind is None:
            flags += [f"--{alias}" for alias in more.get("aliases", ())]
            action = "store_false" if field.default else "store_true"
            parser.add_argument(*flags, action=action, help=more["help"], **common)
            if "on" in more:
                parser.add_argument(f"--{more['on']}", action="store_true", help="the default", **common)
            continue
        default = ",".join(map(str, field.default)) if type(field.default) is tuple else "%(default)s"
        shown = "" if field.default in (None, "") or "default" in more["help"] else f" (default {default})"
        extra = {name: more[name] for name in ("nargs", "const") if name in more}
        metavar = more.get("metavar") or choices_of(kind)
        parser.add_argument(*flags, type=as_type(kind), help=more["help"] + shown, metavar=metavar, **common, **extra)


def parse_options(options, words=None, description=None, defaults=()):
    """An instance of a dataclass of options from the command line. defaults: {name: value} in place of the fields'."""
    parser = make_parser(options, description)
    parser.set_defaults(**dict(defaults))
    return take_options(options, parser.parse_args(words))


def take_options(options, parsed):
    """An instance of a dataclass of options from what a parser returned, which may hold more."""
    names = [field.name for field in fields(options)]
    return options(**{name: value for name, value in vars(parsed).items() if name in names})


def choices_of(kind):
    """{a,b} of a kind with names, None of others."""
    return "{" + ",".join(kind.choices) + "}" if hasattr(kind, "choices") else None
