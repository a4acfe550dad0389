"""Zip archives from strangers, torch files and .npz: looked at before anything of them is unpickled or allocated."""
import json
import math
import pickletools
import re
import shlex
import zipfile

import numpy as np

from models.errors import FlowARError
from models.files.downloads import AGAIN

ZIP, LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
LEGACY_PICKLES = 5  # magic number, protocol, machine, content, keys of the storages
# What files of tensors name. weights_only lets more through: functions that multiply what they are given.
NAMES = re.compile(r"collections OrderedDict|argparse Namespace|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|"
                   r"torch (\w+Storage|Size|device|bool|(u?int|b?float|complex)\d+)")
NEWEST_PROTOCOL = 3  # that weights_only knows
DEEPEST = 100  # containers in containers
EXTRACTION = (
    'import pickle, types, torch; S = type("S", (dict,), {"__init__": lambda s, *a, **k: None, '
    '"__hash__": lambda s: 0, "__setstate__": lambda s, x: s.update(x) if isinstance(x, dict) else None}); '
    'U = type("U", (pickle.Unpickler,), {"find_class": lambda s, m, n: pickle.Unpickler.find_class(s, m, n) '
    'if m in ("collections", "torch", "torch._utils", "torch.storage") else S}); '
    'f = lambda x: x.data if isinstance(x, torch.Tensor) else '
    '{k if type(k) is int else str(k): f(v) for k, v in x.items()} if isinstance(x, dict) else '
    '[f(v) for v in x] if isinstance(x, (list, tuple)) else x if type(x) in (int, float, bool, str) else None; '
    'M = types.ModuleType("M"); M.Unpickler, M.load = U, lambda *a, **k: U(*a, **k).load(); '
    'torch.save(f(torch.load(open(SOURCE, "rb"), "cpu", M, weights_only=False)), TARGET)')
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def check_torch_file(path, legacy=False):
    """(bytes of its pickle, whether it is a zip file) of a torch file, after a look at what torch.load would do to it.

    FlowARError for what is no zip file of torch.save (with legacy=True also of PyTorch before 1.6) and for what would
    run code, unpack to more than the file, or take for ever. Other exceptions, of zipfile or pickletools, mean damage.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(len(LEGACY))
        file.seek(0)
        if start.startswith(ZIP):
            try:
                archive = zipfile.ZipFile(file)
            except zipfile.BadZipFile as error:
                raise FlowARError(f"{path}: damaged or cut short, {size} bytes of a zip file without its end: "
                                  f"{AGAIN}") from error
            with archive:
                data = archive.read(find_pickle(archive, size, path))
            check_pickle(data, len(data), path)
            return len(data), True
        if start == LEGACY and legacy:
            for _ in range(LEGACY_PICKLES):
                check_pickle(file, size, path)
            return size, False
    if start == LEGACY:
        raise FlowARError(f"{path}: a torch file of before PyTorch 1.6, expected a newer one: torch.load it and "
                          f"torch.save it again; {extraction_command(path)}")
    what = "a bare pickle: if you trust where it is from, torch.save what pickle.load returns" if (
        start[:1] == b"\x80") else "or damaged"
    raise FlowARError(f"{path}: not a weights file, {what}; expected one of torch.save, or of safetensors")


def extraction_command(path):
    """What to do about a torch file that safe loading refuses: a command that keeps its tensors and plain values.

    It makes objects of what tensors are made of; whatever else the pickle names becomes an empty stand-in (S): what
    wrote the file need not be installed.
    """
    target = path.with_suffix(".tensors.pth")
    names = {"SOURCE": json.dumps(str(path)), "TARGET": json.dumps(str(target))}
    code = re.sub("SOURCE|TARGET", lambda match: names[match[0]], EXTRACTION)
    return f"if you trust where it is from, this takes its tensors out, into {target}: python -c {shlex.quote(code)}"


def find_pickle(archive, size, path):
    """The member that holds the pickle. Every way in which another reader of zip files finds another one is refused."""
    members = archive.infolist()
    names = [member.filename.lower() for member in members]
    pickles = [member for member, name in zip(members, names) if name.endswith("/data.pkl")]
    if not pickles:
        what = ", ".join(ascii(member.filename[:100]) for member in members[:3]) + ", ..." * (len(members) > 3)
        raise FlowARError(f"{path}: not a weights file, but a zip archive of {what or 'nothing'}: unpack it (unzip), "
                          "and take the file in it")
    if any("/code/" in name for name in names):
        raise FlowARError(f"{path}: a TorchScript archive, expected tensors: where it is trusted, torch.save what "
                          "torch.jit.load(...).state_dict() returns")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise FlowARError(f"{path}: {member.filename} is compressed, expected members as torch.save stores them")
    if sum(member.file_size for member in members) > size:
        raise FlowARError(f"{path}: its members are longer than the file")
    if archive.comment or len(set(names)) < len(names) or min(member.header_offset for member in members) != 0:
        raise FlowARError(f"{path}: not a zip file as torch.save writes it "
                          "(comment, repeated names or something before it)")
    if len(pickles) != 1:
        raise FlowARError(f"{path}: {len(pickles)} members are called data.pkl, expected one")
    return pickles[0]


def check_pickle(pickle, limit, path):
    """Follow a pickle without making its objects: FlowARError for names outside NAMES, and for tuples that share parts
    until they are longer than `limit` or deeper than DEEPEST: to hash them, as keys, would not end, or overflow.
    """
    stack, memo = [], {}  # of (items, depth); None is a mark
    for code, argument, _ in pickletools.genops(pickle):
        if code.name == "GLOBAL" and not NAMES.fullmatch(argument):
            name = ascii(argument.replace(" ", "."))[1:-1]
            raise FlowARError(f"{path}: not a file of tensors (it names {name}); {extraction_command(path)}")
        if code.name == "PROTO" and argument > NEWEST_PROTOCOL:
            raise FlowARError(f"{path}: pickled with protocol {argument}, expected at most {NEWEST_PROTOCOL}, for safe "
                              f"loading; {extraction_command(path)}")
        if code.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif code.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        else:
            taken = take(stack, code.stack_before)
            items, depth = 1 + sum(items for items, _ in taken), max((depth for _, depth in taken), default=0)
            depth += code.name.startswith("TUPLE")
            if items > limit or depth > DEEPEST:
                raise FlowARError(f"{path}: not a file of tensors (tuples in tuples without end)")
            stack += [None if kind is pickletools.markobject else (items, depth) for kind in code.stack_after]


def take(stack, kinds):
    """Pop what an opcode takes."""
    taken = []
    if pickletools.markobject in kinds:
        while (top := stack.pop()) is not None:
            taken.append(top)
        kinds = kinds[:kinds.index(pickletools.markobject)]
    return taken + [stack.pop() for _ in kinds]


def read_npz(path, limits):
    """{name: array} of the arrays of an .npz that are there of `limits`, {name: largest number of bytes}, which is
    checked before one is read. Nothing is unpickled. Raises what a damaged file makes zipfile and numpy raise, of
    whatever type, and ValueError for an array that is too large: the caller names the file.
    """
    with zipfile.ZipFile(path) as archive:
        there = set(archive.namelist())
        return {name: read_array(archive, f"{name}.npy", limit) for name, limit in limits.items()
                if f"{name}.npy" in there}


def read_array(archive, name, limit):
    member = archive.getinfo(name)
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in a way that .npz files are not")
    with archive.open(member) as file:
        shape, fortran_order, dtype = HEADERS[np.lib.format.read_magic(file)](file)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or min(shape, default=0) < 0 or size > limit:
            raise ValueError(f"{name} is {shape} of {dtype}, expected numbers of at most {limit} bytes")
        array = np.frombuffer(bytearray(file.read(size)), dtype)  # a bytearray: the array can be written to
    return array.reshape(shape[::-1]).T if fortran_order else array.reshape(shape)
