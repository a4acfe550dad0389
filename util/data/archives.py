"""Archives of class folders: .zip, stored or deflated, and uncompressed .tar. Nothing is unpacked.

An archive is indexed once, by one rank. Its files are then read by their offsets with pread, which moves no position:
an archive that is open may be inherited by forked data workers, and others open it themselves. What lies inside is
named ARCHIVE/NAME, as if the archive were a folder.
"""
import functools
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from array import array
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from models import FlowARError
from models.errors import name_some, reading
from util.data.folders import (HIDDEN, IMAGE_SUFFIXES, NO_FILE, OUTSIDE, Packed, check_listed, is_left_behind, pack,
                               suffix_of, suffix_reason)

SUFFIXES = (".zip", ".tar")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
METHODS = AS_IT_IS, STORED, DEFLATED = -1, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED  # a tar's; a zip's
FOLDER, OTHER = -2, -3
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip's file: mark, lengths of its name and of what follows that
BLOCK = 1 << 20


class Member(NamedTuple):
    """What an archive says of one of its files."""
    name: str
    method: int  # of METHODS, or FOLDER, OTHER
    size: int = 0
    start: int = 0  # of the file in a tar, of its header in a zip
    length: int = 0  # in the archive
    crc: int = 0  # of the file in a zip, of its header in a tar
    refused: str = ""  # why it cannot be read


class Index(NamedTuple):
    """The Members of an archive, in arrays."""
    names: bytes  # with a zero byte between them
    methods: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    crcs: np.ndarray


def find_archive(path):
    """(archive, what is inside of it) of a path that leads into one, such as imagenet.zip/train; None for any other."""
    archive, inside = str(path).rstrip("/"), ""
    while archive and not os.path.exists(archive):
        archive, _, name = archive.rpartition("/")
        inside = f"{name}/{inside}" if inside else name
    is_one = archive.lower().endswith((*SUFFIXES, *COMPRESSED)) and os.path.isfile(archive)
    return (archive, inside) if is_one else None


def stamp(status):
    """By which an archive that was changed is told."""
    return status.st_size, status.st_mtime_ns


def index(archive):
    """Index of an archive, or FlowARError."""
    if archive.lower().endswith(COMPRESSED):
        raise FlowARError(f"{archive}: no image can be read from the middle of a compressed archive: expected .zip or "
                          f".tar; decompress it (gunzip, bunzip2, unxz, unzstd: .tar remains), which costs images next "
                          "to no room")
    return read_index(archive, stamp(os.stat(archive)))


@functools.lru_cache(maxsize=2)  # of training and of validation
def read_index(archive, _):
    kind, members = (("a zip archive", zip_members) if archive.lower().endswith(".zip") else
                     ("an uncompressed tar archive", tar_members))
    names, columns = [], [array("q") for _ in range(5)]  # a million tuples would take a gigabyte
    with reading(archive):
        try:
            for member in members(archive):
                names.append(os.fsencode(checked_name(archive, member)))
                for column, value in zip(columns, member[1:6]):
                    column.append(value)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
            raise FlowARError(f"{archive}: cannot be read as {kind} ({error}): cut short, damaged, or of another kind "
                              "than its name says; copy or pack it again") from error
    if not names:
        raise FlowARError(f"{archive}: an empty archive")
    kinds = np.int16, np.int64, np.int64, np.int64, np.uint32
    return Index(b"\0".join(names), *(np.array(column, kind) for column, kind in zip(columns, kinds)))


def checked_name(archive, member):
    """A member's name as one below the archive: of ./a//b and /a/b too. FlowARError for images that cannot be had."""
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    climbs, hidden = ".." in parts, any(is_left_behind(part) for part in parts if part != "..")
    refused = "its name leads out of its folder, by .." if climbs else member.refused
    if refused and not hidden and (suffix_of(member.name) in IMAGE_SUFFIXES or member.method == OTHER):
        raise FlowARError(f"{archive}: {member.name}: {refused}")
    return "/".join(parts)


def zip_members(path):
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name, refused = info.filename, ""
            if not info.flag_bits & 0x800:  # not marked as UTF-8: bytes, which zipfile shows in the DOS code page
                try:
                    name = os.fsdecode(name.encode("cp437"))
                except UnicodeEncodeError:  # its name in UTF-8 lies beside
                    pass
            if info.flag_bits & 1:
                refused = "it is encrypted: pack the images without a password"
            elif info.compress_type not in METHODS:
                how = zipfile.compressor_names.get(info.compress_type, info.compress_type)
                refused = f"it is packed by {how}: pack the images with zip -0, or deflated"
            method = FOLDER if info.is_dir() else info.compress_type
            if stat.S_ISLNK(info.external_attr >> 16):
                method, refused = OTHER, "it is a symbolic link: pack what it leads to (zip without --symlinks)"
            yield Member(name, method, info.file_size, info.header_offset, info.compress_size, info.CRC, refused)


def tar_members(path):
    with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as archive:
        seen, links = {}, []  # a hard link is its file once more
        while (info := archive.next()) is not None:
            archive.members.clear()  # else all headers stay in memory
            refused, method = "", AS_IT_IS if info.isreg() else FOLDER if info.isdir() else OTHER
            if info.issparse():
                refused = "it is a sparse file: pack the images without --sparse"
            elif info.issym():
                refused = "it is a symbolic link: pack what it leads to (tar --dereference)"
            elif info.islnk():
                links.append(info)
                continue
            header = os.pread(archive.fileobj.fileno(), tarfile.BLOCKSIZE, info.offset_data - tarfile.BLOCKSIZE)
            member = Member(info.name, method, info.size, info.offset_data, info.size, zlib.crc32(header), refused)
            seen[info.name] = member
            yield member
        check_end(path, archive.offset)
    for info in links:
        if info.linkname not in seen:
            raise FlowARError(f"{path}: {info.name}: it is a hard link to {info.linkname}, which is not in the archive")
        yield seen[info.linkname]._replace(name=info.name)


def check_end(path, offset):
    """FlowARError unless a tar ends here: after a damaged header tarfile ends without a word."""
    with open(path, "rb") as file:
        file.seek(offset)
        blocks = iter(functools.partial(file.read, BLOCK), b"")
        if (first := next(blocks, b"")) == b"":
            raise FlowARError(f"{path}: it ends after a file without the mark of a tar's end: cut short; copy or pack "
                              "it again")
        if first.strip(b"\0") or any(block.strip(b"\0") for block in blocks):
            raise FlowARError(f"{path}: from byte {offset} on it is no tar: damaged, or a second archive was put "
                              "behind the first; pack it again")


class Archive(Packed):
    """Files of an archive, with labels by number."""

    def __init__(self, root, classes, rows, left_out, labels):
        """rows: (name below root, number in the index)."""
        self.archive, _ = find_archive(root)
        self.stamp, found = stamp(os.stat(self.archive)), index(self.archive)
        numbers = np.array([number for _, number in rows], np.int64)
        self.methods, self.starts, self.lengths, self.crcs = (
            column[numbers] for column in (found.methods, found.starts, found.lengths, found.crcs))
        sizes = found.sizes[numbers].tolist()
        part = pack([(os.fsencode(name), size, self.stamp[1]) for (name, _), size in zip(rows, sizes)], left_out)
        super().__init__(root, classes, [part], left_out)
        self.labels = labels

    def prepare(self):
        """Each host may have a copy of its own."""
        with reading(self.archive):
            found = stamp(os.stat(self.archive))
        if found[0] != self.stamp[0]:
            raise FlowARError(f"{self.archive}: {found[0]} bytes on one host, {self.stamp[0]} on rank 0's: all hosts "
                              "must have the same archive")
        self.stamp = found

    def read(self, index):
        file = opened(self.archive, self.stamp)
        if stamp(os.fstat(file.fileno())) != self.stamp:
            raise OSError(f"{self.archive} was written to since this program looked at it: start it again")
        method, start, length = (int(column[index]) for column in (self.methods, self.starts, self.lengths))
        if method == AS_IT_IS:
            content = read_at(file, start - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE + length)
            if zlib.crc32(content[:tarfile.BLOCKSIZE]) != self.crcs[index]:
                raise ValueError("another file is at its place: the tar is damaged, or not that of rank 0's host")
            return content[tarfile.BLOCKSIZE:]
        mark, *lengths = LOCAL_HEADER.unpack(read_at(file, start, LOCAL_HEADER.size))
        if mark != b"PK\3\4":
            raise ValueError("the zip has no file at this place: it is damaged")
        content = read_at(file, start + LOCAL_HEADER.size + sum(lengths), length)
        try:
            content = zlib.decompress(content, -zlib.MAX_WBITS) if method == DEFLATED else content
        except zlib.error as error:
            raise ValueError(f"it cannot be inflated: {error}") from error
        if zlib.crc32(content) != self.crcs[index]:
            raise ValueError("its bytes are not those that were packed: the zip is damaged")
        return content


@functools.lru_cache(maxsize=8)  # archives, in every process
def opened(archive, _):
    return open(archive, "rb", buffering=0)


def read_at(file, start, length):
    content = os.pread(file.fileno(), length, start)
    if len(content) != length:
        raise ValueError(f"the archive ends in it, {len(content)} of {length} bytes are there")
    return content


def names_below(path):
    """(number in the index, name below the path) of all that an archive holds there."""
    archive, top = find_archive(path)
    for number, name in enumerate(os.fsdecode(index(archive).names).split("\0")):
        if name and not top or name.startswith(f"{top}/"):
            yield number, name[len(top) + bool(top):]


def has_folder(path):
    return any(name for _, name in names_below(path))


def read_file(path):
    """Bytes of a file of an archive, None if there is none of the name; links and the like are none."""
    folder, name = os.path.split(path)
    for number, found in names_below(folder):
        if found == name and index(find_archive(path)[0]).methods[number] in METHODS:
            return Archive(folder, [], [(name, number)], Counter(), np.zeros(1, np.int32)).read(0)
    return None


def list_archive(root, flat=False):
    """Listing of the images below a path into an archive, by the rule of util.data.folders: in class folders, or with
    flat=True at any depth, without classes.
    """
    archive, top = find_archive(root)
    methods, rows, classes, hidden, left_out = index(archive).methods.tolist(), [], set(), set(), Counter()
    for number, name in names_below(root):
        parts, is_folder = name.split("/"), methods[number] == FOLDER
        last = next((i for i, part in enumerate(parts) if is_left_behind(part)), None)
        if last is not None:
            hidden.add("/".join(parts[:last + 1]))
            parts, is_folder = parts[:last], True
        classes.update(parts[:1] if is_folder else parts[:-1][:1])
        if is_folder:
            continue
        if len(parts) == 1 and not flat:
            left_out[OUTSIDE if suffix_of(name) in IMAGE_SUFFIXES else suffix_reason(name)] += 1
        elif suffix_of(name) not in IMAGE_SUFFIXES:
            left_out[suffix_reason(name)] += 1
        elif methods[number] == OTHER:
            left_out[NO_FILE] += 1
        else:
            rows.append(("" if flat else parts[0], name.rpartition("/")[0], name, number))
    if top and not rows and not classes and not left_out and not hidden:
        raise FlowARError(f"{root}: {archive} holds no such folder (expected images in class folders)")
    left_out[HIDDEN] += len(hidden)
    rows.sort()
    if twice := [one[2] for one, other in pairwise(rows) if one[2] == other[2]]:
        raise FlowARError(f"{root}: {name_some(twice, 3)}: the archive holds more than one file of this name; pack it "
                          "again")
    classes = [] if flat else sorted(classes)
    number_of = {name: label for label, name in enumerate(classes)}
    labels = np.array([0 if flat else number_of[row[0]] for row in rows], np.int32)
    listing = Archive(root, classes, [row[2:] for row in rows], +left_out, labels)
    return listing if flat else check_listed(listing)
