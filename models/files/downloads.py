"""What lies in a weights file's place after a download that failed, or was not unpacked: by name, with the cure."""
import codecs
import json
import re

from models.errors import FlowARError

HEAD = 512  # bytes that tell
LONGEST_HEADER = 10**8  # of safetensors
AGAIN = "it was not downloaded or copied to its end: do that again"
LFS = b"version https://git-lfs.github.com/spec/"
PAGE = re.compile(rb"\s*(<!--.*?-->\s*)?<(!doctype|html|head|body|\?xml|error)", re.IGNORECASE | re.DOTALL)
PACKED = {b"\x1f\x8b": ("gzip", "gunzip, or tar -xzf"), b"BZh": ("bzip2", "bunzip2, or tar -xjf"),
          b"\xfd7zXZ\0": ("xz", "unxz, or tar -xJf"), b"\x28\xb5\x2f\xfd": ("zstd", "unzstd, or tar --zstd -xf"),
          b"7z\xbc\xaf\x27\x1c": ("7z", "7z x"), b"Rar!": ("rar", "unrar x")}


def check_download(path):
    """FlowARError for what is no weights file, as far as its beginning tells."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if not head.strip(b"\0"):
        what = "it holds zeros alone at its start" if head else "it is empty"
        raise FlowARError(f"{path}: not a weights file: {what}; {AGAIN}")
    if head.startswith(LFS):
        size = re.search(rb"\nsize (\d{1,18})", head)
        size = f" of {int(size[1]):,} bytes" if size else ""
        raise FlowARError(f"{path}: not a weights file, but the pointer of git-LFS to one{size}: git lfs install, then "
                          "git lfs pull in its repository")
    if PAGE.match(head):
        raise FlowARError(f"{path}: not a weights file, but a web page, of a log-in, an error or about the file: "
                          "download from the address of the file itself (Hugging Face's has /resolve/, not /blob/)")
    for magic, (kind, command) in PACKED.items():
        if head.startswith(magic):
            raise FlowARError(f"{path}: not a weights file, but a {kind} archive: unpack it ({command}), and take the "
                              "file in it")
    if head[257:262] == b"ustar":
        raise FlowARError(f"{path}: not a weights file, but a tar archive: unpack it (tar -xf), and take the file in "
                          "it")
    if text := text_of(head):
        raise FlowARError(f"{path}: not a weights file, or damaged: it is text, which begins with {text[:60]!r}; "
                          "such is what a server answers in place of a file: download it again")


def text_of(head):
    """The first line of a text, None for what is none."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # which may end within a character
    except UnicodeDecodeError:
        return None
    text = text.strip()
    return text.splitlines()[0] if all(char.isprintable() or char in "\t\r\n" for char in text) else None


def is_safetensors(path):
    """Whether a file is one, by its beginning, whatever its name; FlowARError for one that is cut short."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length, brace = int.from_bytes(file.read(8), "little"), file.read(1)
        if brace != b"{" or length > LONGEST_HEADER:
            return False
        header = brace + file.read(length - 1)
    try:
        tensors = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        expected = 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError):
        expected = 8 + length  # what else is wrong safetensors says
    if size < expected:
        raise FlowARError(f"{path}: cut short, {size} of {expected} bytes: {AGAIN}")
    return True
