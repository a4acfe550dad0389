"""Names of a model's classes: what captions show, and what a person may type for a label."""
import difflib
import re

from models import FlowARError
from models.errors import name_some

IMAGENET, WNID = 1000, re.compile(r"n\d{8}")  # classes; a class folder's name there


def class_names(classes):
    """A name for each of a model's Classes: the checkpoint's, ImageNet's for 1000 classes of it, else numbers."""
    names = classes.names or []
    if classes.number == IMAGENET and all(map(WNID.fullmatch, names)) and len(names) in (0, IMAGENET):
        from torchvision.models import ResNet18_Weights  # its metadata: nothing is downloaded
        return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    return names + [str(label) for label in range(len(names), classes.number)]


def find_label(asked, names):
    """The label of what was asked for: a number, or a name, whatever its case. FlowARError if there is none, or two."""
    text = str(asked).strip()
    if isinstance(asked, int) or text.isdecimal():
        if not 0 <= int(asked) < len(names):
            raise FlowARError(f"label {asked}: the model has classes 0..{len(names) - 1}")
        return int(asked)
    found = [label for label, name in enumerate(names) if name == text]
    found = found or [label for label, name in enumerate(names) if name.casefold() == text.casefold()]
    if len(found) > 1:
        raise FlowARError(f"label {text!r}: {len(found)} classes have this name, give a number: "
                          f"{', '.join(map(str, found))}")
    if not found:
        near = [name for name in names if text.casefold() in name.casefold()]
        near += difflib.get_close_matches(text, names, n=5)
        raise FlowARError(f"label {text!r}: no class of this name"
                          + (f"; near are: {name_some(dict.fromkeys(near))}" if near else f" ({name_some(names, 3)})"))
    return found[0]
