"""The one exception type for what a user can put right, and what its lines are made of."""


class FlowARError(ValueError):
    """Bad input: one line that names the file, option or tensor, what it is, what was expected. Exit status 2."""


def first_line(error):
    """First sentence of an error's message, or its type where there is none. A line that ends with a colon goes on."""
    lines = str(error).splitlines()
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] += " " + lines[1].strip()
    return lines[0].split(". ")[0] if lines and not isinstance(error, KeyError) else type(error).__name__


def name_some(names, limit=5):
    """'a, b, c and 7 more' for a message."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
