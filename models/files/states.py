"""State dicts in the shapes of other people's files: under keys, in wrappers, with averages and other things beside."""
import re
from typing import NamedTuple

import torch

from models.errors import FlowARError
from models.files.tensors import name_some, reading

# Parts of a name that wrappers add, wherever they wrap: DDP, torch.compile, FSDP, checkpointing, fairscale, DeepSpeed;
# the last three stand in modules that were pickled whole.
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_fpw_module|"
                      r"_forward_module|_modules|_parameters|_buffers)\.")
AVERAGE = re.compile(r"(?:^|_)(?:ema|shadow|swa|avg|averaged?)(?:_|\d|$)", re.IGNORECASE)  # a part of a key
ONLINE = re.compile(r"(?:^|_)online(?:_|$)")  # beside ema_model in ema-pytorch's state: the weights themselves
OPTIMIZER = re.compile(r"(?:^|\.)(?:optim\w*|\w*exp_avg\w*|momentum\w*|grads?|gradients?|"  # names like the weights'
                       r"posthoc)\.")  # the power averages of util.training.optimization
AVERAGED = "n_averaged"  # in the state of torch's AveragedModel
HALF_PRECISION = 1e-2  # by which a buffer differs in a file that was converted to it
LONGEST = 1000  # characters of keys in keys
KINDS = {"ema": "the average (EMA)", "raw": "weights (not called an average)",
         "unnamed": "weights (not called an average)"}
ORDER = {None: ("ema", "unnamed", "raw"), "ema": ("ema",), "raw": ("raw",),  # of --weights: the first that is there
         "raw first": ("raw", "unnamed", "ema")}  # of training that goes on


class Weights(NamedTuple):
    """The weights of one network out of a file."""

    tensors: dict  # {name: tensor}, names without keys of the file and wrappers' prefixes
    kind: str  # of KINDS
    key: str  # where in the file, "" for the file itself
    others: list  # names of the file's other tensors

    def source(self):
        """Which weights these are."""
        return KINDS[self.kind] + location(self.key)

    def describe(self, left_out=()):
        """That, and what of the file is not used. left_out: further names, of `tensors`."""
        prefix = f"{self.key}." if self.key else ""
        return f"{self.source()}; {unused([*self.others, *(prefix + name for name in left_out)], prefix)}"


def find_weights(content, path, what, markers, wanted=None, computed=None):
    """The Weights of a network in a file's content; FlowARError where there are none, or several that differ.

    Args:
        what: the network's name, for messages.
        markers: names of tensors that every network of the kind has; they tell where one lies.
        wanted: of ORDER; None takes an average where there is one, "ema" and "raw" nothing else.
        computed: pattern of names that an average of parameters may lack; they are taken from the weights beside it.
    """
    if wanted not in ORDER:
        raise FlowARError(f"weights is {wanted!r}: expected 'ema', 'raw' or None")
    names, twice = clean_names(content)
    restore_names(names, markers, computed)
    found = find_prefixes(names, markers)
    if not found:
        raise FlowARError(f"{path}: no {what} weights in this file (expected a state dict with {markers[0]}, by itself "
                          "or under a key such as model, state_dict, ema); it holds "
                          f"{name_some(grouped(names)) or 'no tensors'}")
    kinds = {prefix: kind_of(prefix, names) for prefix in found}
    if kinds == {"": "raw"} and not of_averages(names):
        kinds = {"": "unnamed"}
    kind = next((kind for kind in ORDER[wanted] if kind in kinds.values()), None)
    if kind is None:
        there = name_some([KINDS[kinds[prefix]] + location(prefix[:-1]) for prefix in found])
        raise FlowARError(f"{path}: it holds only {there}, but --weights is {wanted}: leave it out")
    first, *others = (prefix for prefix in found if kinds[prefix] == kind)
    differ = [prefix for prefix in others if not same(found[prefix], found[first])]
    if differ:
        there = name_some([KINDS[kind] + location(prefix[:-1]) for prefix in [first, *differ]])
        raise FlowARError(f"{path}: it holds several {what} weights, which differ: {there}: expected one; torch.load "
                          "the file, and torch.save the one that is meant")
    tensors = found[first]
    for name in tensors:
        if first + name in twice:
            both = " and ".join(map(printable, twice[first + name]))
            raise FlowARError(f"{path}: {both} are both {printable(name)} without keys and the prefixes of wrappers: "
                              "expected one of them")
    used = {first + name for name in tensors}
    if computed and kind == "ema":
        tensors = {name: value for beside in found.values() for name, value in beside.items()
                   if computed.fullmatch(name)} | tensors
    return Weights(tensors, kind, first[:-1], [name for name in names if name not in used])


def clean_names(content):
    """({dotted name: tensor} without wrappers' prefixes, {name: the two names in the file that both became it})."""
    names, origins, twice, waiting = {}, {}, {}, [("", content)]
    while waiting:
        prefix, value = waiting.pop()
        if isinstance(value, torch.Tensor):
            name = WRAPPERS.sub("", prefix)[:-1]
            if name in names:
                twice[name] = origins[name], prefix[:-1]
            names[name], origins[name] = value, prefix[:-1]
        elif isinstance(value, (dict, list, tuple)) and len(prefix) <= LONGEST:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += reversed([(f"{prefix}{key}.", item) for key, item in items])
    return names, twice


def find_prefixes(names, markers):
    """{prefix: {name without it: tensor}} of the networks in `names`: those with all markers, else those with any."""
    seen = {}
    for name in names:
        for marker in markers:
            prefix = name[:-len(marker)]
            if name == marker or name.endswith(f".{marker}") and not OPTIMIZER.search(prefix):
                seen.setdefault(prefix, set()).add(marker)
    found = {prefix: {} for prefix in seen if len(seen[prefix]) == len(markers)} or {prefix: {} for prefix in seen}
    lengths = sorted(set(map(len, found)), reverse=True)
    for name, value in names.items():  # the longest prefix has it
        prefix = next((name[:length] for length in lengths if name[:length] in found), None)
        if prefix is not None:
            found[prefix][name[len(prefix):]] = value
    return found


def kind_of(prefix, names):
    """Whether the keys of a prefix, the innermost first, name an average: "ema" or "raw"."""
    if prefix + AVERAGED in names:
        return "ema"
    parts = [part for part in reversed(prefix.split(".")) if AVERAGE.search(part) or ONLINE.search(part)]
    return "ema" if parts and not ONLINE.search(parts[0]) else "raw"


def of_averages(names):
    """Those names whose keys name an average."""
    return [name for name in names if not OPTIMIZER.search(name) and any(map(AVERAGE.search, name.split(".")[:-1]))]


def restore_names(names, markers, computed):
    """Give tensors of averages that were kept without dots in their names (LDM's LitEma), or in a list (torch-ema,
    diffusers), the names of the weights beside them.
    """
    found, lists = find_prefixes(names, markers), {}
    prefix = next((prefix for prefix in found if kind_of(prefix, names) == "raw"), None)
    own, parts = found.get(prefix, {}), (prefix or "").split(".")
    undotted = {"".join(parts[i:]) + name.replace(".", ""): name for i in range(len(parts)) for name in own}
    for name in list(names):
        key, _, last = name.rpartition(".")
        if AVERAGE.search(key.rpartition(".")[2]) and not OPTIMIZER.search(name):
            if last.isdecimal():
                lists.setdefault(key, []).append(name)
            elif last in undotted and f"{key}.{undotted[last]}" not in names:
                names[f"{key}.{undotted[last]}"] = names.pop(name)
    parameters = [name for name in own if not (computed and computed.fullmatch(name))]
    for key, members in lists.items():
        if [names[member].shape for member in members] == [own[name].shape for name in parameters]:
            names.update({f"{key}.{name}": names.pop(member) for name, member in zip(parameters, members)})


def same(state, other):
    """Whether two state dicts are equal: one network under two names."""
    return state.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value, other[name]) for name, value in state.items())


def check_fits(network, state, path, what="model"):
    """Names in `state` that are not the network's and mean nothing to it: of a loss, a discriminator, counters.

    FlowARError with the first names that the network (it may be on the meta device) lacks in one of its own modules,
    that are missing, or that are of other shapes or kinds of numbers: without them it would compute something else.
    """
    own, modules, left_out = network.state_dict(), {name for name, _ in network.named_children()}, []
    wrong = [f"{name} is {tuple(state[name].shape)}, the {what}'s is {tuple(own[name].shape)}" for name in own
             if name in state and state[name].shape != own[name].shape]
    wrong += [f"{name} is {state[name].dtype}, the {what}'s is {own[name].dtype}" for name in own
              if name in state and state[name].is_floating_point() != own[name].is_floating_point()]
    wrong += [f"{name} is missing" for name in own if name not in state]
    for name in (name for name in state if name not in own):
        module, dot, _ = name.partition(".")
        if module in modules or module in own or not dot and state[name].numel() > 1:
            wrong.append(f"{printable(name)} is not in the {what}")
        else:
            left_out.append(name)
    if wrong:
        raise FlowARError(f"{path}: {len(wrong)} tensors do not fit the {what}: {name_some(wrong, 3)}")
    return left_out


def check_buffers(model, state, path):
    """FlowARError if a buffer of a state dict that fits a FlowAR says that it was trained otherwise."""
    with reading(path):
        for name, own in model.named_buffers():
            if not own.is_meta and not torch.allclose(state[name].to(own), own, rtol=HALF_PRECISION):
                what = "attention pattern" if name == "mask" else "rotary frequencies"
                raise FlowARError(f"{path}: {name} is not the model's: these weights were trained with another {what}")


def grouped(names, prefix=""):
    """['loss (3 tensors)', ...]: names by the first part in which they differ from `prefix`."""
    groups = {}
    for name in names:
        parts, depth = name.split("."), 1
        while depth < len(parts) and prefix.startswith(".".join(parts[:depth]) + "."):
            depth += 1
        groups.setdefault(".".join(parts[:depth]), []).append(name)
    return [printable(members[0]) if len(members) == 1 else f"{printable(group)} ({len(members)} tensors)"
            for group, members in groups.items()]


def unused(names, prefix=""):
    """What to say of tensors that nothing uses."""
    names = grouped(names, prefix) if len(names) > 5 else map(printable, names)
    return f"not used: {name_some(names) or 'nothing'}"


def location(key):
    return f" under {printable(key)!r}" if key else ""


def printable(name):
    """A name out of a file for a line of text."""
    name = "".join(char if char.isprintable() else "?" for char in name[:200])
    return name + "..." * (len(name) == 200)
