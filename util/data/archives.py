"""Archives of class folders: .zip, stored or deflated, and uncompressed .tar. Nothing is unpacked.

An archive is indexed once; its files are then read at their offsets with pread, which moves no position: data workers
may inherit an open archive. What lies inside is named ARCHIVE/NAME, as if the archive were a folder.
"""
import functools
import os
import struct
import tarfile
import zipfile
import zlib
from array import array
from collections import Counter

import numpy as np

from models import FlowARError
from util.data.folders import (HIDDEN, IMAGE_SUFFIXES, LABELS_FILE, NO_SUFFIX, OUTSIDE, Listing, assign_edm_labels,
                               assign_labels, is_hidden, suffix_of)

SUFFIXES = (".zip", ".tar")
UNIX = 3, 19  # systems of a zip; tools of others may put backslashes for slashes
FOLDER, AS_IT_IS, STORED, DEFLATED = -2, -1, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED  # members; AS_IT_IS: of a tar
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a file in a zip: mark, lengths of its name and of what follows that


class Archive(Listing):
    """Images in the class folders of an archive, or of a folder in it, such as imagenet.zip/train."""

    def __init__(self, root):
        self.archive, top = find_archive(root)
        names, members = index_archive(self.archive)
        numbers = names_below(names, top)
        files, classes, left_out = sort_members(numbers, members)
        classes, rows = assign_labels(files, classes, left_out)
        super().__init__(root, classes, rows, left_out)
        self.members, self.bytes, self.file = members[self.places], os.path.getsize(self.archive), None
        if LABELS_FILE in numbers:
            self.open()
            assign_edm_labels(self, self.read_member(members[numbers[LABELS_FILE]]))

    @staticmethod
    def is_at(path):
        archive, top = find_archive(path) or (None, "")
        return archive is not None and (not top or b"\0%b/" % os.fsencode(top) in b"\0" + index_archive(archive)[0])

    def __getstate__(self):
        return {**self.__dict__, "file": None}  # an open file does not travel to another process

    def open(self):
        self.file = open(self.archive, "rb", buffering=0)
        if os.fstat(self.file.fileno()).st_size != self.bytes:
            raise FlowARError(f"{self.archive}: expected {self.bytes} bytes, as when it was listed: it changed since, "
                              "or this host has a different file")

    def read(self, index):
        if self.file is None:
            self.open()
        try:
            return self.read_member(self.members[index])
        except (ValueError, zlib.error) as error:
            raise FlowARError(f"{self.path(index)}: cannot be read as an image ({error})") from error

    def read_member(self, member):
        method, _, start, length, crc = member.tolist()
        if method == AS_IT_IS:
            return self.read_at(start, length)
        mark, *lengths = LOCAL_HEADER.unpack(self.read_at(start, LOCAL_HEADER.size))
        content = self.read_at(start + LOCAL_HEADER.size + sum(lengths), length)
        if method == DEFLATED:
            content = zlib.decompress(content, -zlib.MAX_WBITS)
        if mark != b"PK\3\4" or zlib.crc32(content) != crc:
            raise ValueError("checksum mismatch: the zip is damaged")
        return content

    def read_at(self, start, length):
        content = os.pread(self.file.fileno(), length, start)
        if len(content) != length:
            raise ValueError("the archive is truncated")
        return content


def find_archive(path):
    """(archive, what is inside of it) of a path that leads into one, such as imagenet.zip/train; None for any other."""
    archive, inside = str(path).rstrip("/"), ""
    while archive and not os.path.exists(archive):
        archive, _, name = archive.rpartition("/")
        inside = f"{name}/{inside}" if inside else name
    return (archive, inside) if archive.lower().endswith(SUFFIXES) and os.path.isfile(archive) else None


@functools.lru_cache(maxsize=2)  # of training and of validation
def index_archive(archive):
    """(names with a zero byte between them, (members, 5) array of method, size, start, length in the archive, CRC)."""
    names, numbers = [], array("q")  # a million tuples would take a gigabyte
    members = zip_members if archive.lower().endswith(".zip") else tar_members
    try:
        for name, member in members(archive):
            parts = [part for part in name.split("/") if part not in ("", ".")]
            hidden = any(is_hidden(part) for part in parts if part != "..")
            if (member is None or ".." in parts) and not hidden:
                raise FlowARError(f"{archive}: {name} is a link, encrypted, or of an unsupported compression: pack "
                                  "plain files (tar -h --hard-dereference; zip -0)")
            names.append(os.fsencode("/".join(parts)))
            numbers.extend(member or (AS_IT_IS, 0, 0, 0, 0))
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise FlowARError(f"{archive}: truncated, damaged, or not of the type its name says ({error})") from error
    return b"\0".join(names), np.array(numbers, np.int64).reshape(-1, 5)


def zip_members(path):
    """(name, member, None for what cannot be read) of all that a zip holds."""
    with zipfile.ZipFile(path) as archive:
        slashes = any("/" in info.filename for info in archive.infolist())
        for info in archive.infolist():
            if info.create_system not in UNIX or not slashes:
                info.filename = info.filename.replace("\\", "/")
            is_link = info.external_attr >> 28 == 0o12
            member = None
            if info.compress_type in (STORED, DEFLATED) and not info.flag_bits & 1 and not is_link:
                method = FOLDER if info.is_dir() else info.compress_type
                member = method, info.file_size, info.header_offset, info.compress_size, info.CRC
            yield info.filename, member


def tar_members(path):
    with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as archive:
        while (info := archive.next()) is not None:
            archive.members.clear()  # else all headers stay in memory
            member = None
            if (info.isreg() or info.isdir()) and not info.issparse():
                member = FOLDER if info.isdir() else AS_IT_IS, info.size, info.offset_data, info.size, 0
            yield info.name, member
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0") or archive.fileobj.tell() == archive.offset:
            raise tarfile.ReadError(f"no mark of its end at byte {archive.offset}")


def names_below(names, top):
    """{name below top: number in the index} of what an archive holds there; of a name that comes twice, the last."""
    prefix, numbers = f"{top}/" if top else "", {}
    for number, name in enumerate(os.fsdecode(names).split("\0")):
        if name.startswith(prefix):
            numbers[name[len(prefix):]] = number
    numbers.pop("", None)
    return numbers


def sort_members(numbers, members):
    """(images as (name, size, number), names of the class folders, Counter of what is left out) of {name: number}."""
    files, classes, hidden, left_out = [], set(), set(), Counter()
    for name, number in numbers.items():
        parts, is_folder, suffix = name.split("/"), members[number, 0] == FOLDER, suffix_of(name)
        if (is_folder or len(parts) > 1) and not is_hidden(parts[0]):
            classes.add(parts[0])
        if any(map(is_hidden, parts)):
            first = [is_hidden(part) for part in parts].index(True)
            hidden.add("/".join(parts[:first + 1]))  # which counts once, whatever lies in it
        elif suffix in IMAGE_SUFFIXES and not is_folder:
            files.append((name, int(members[number, 1]), number))
            left_out[OUTSIDE] += len(parts) == 1
        elif not is_folder:
            left_out[suffix or NO_SUFFIX] += 1
    left_out[HIDDEN] += len(hidden)
    return files, classes, left_out
