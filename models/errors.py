"""The one exception type for what a user can put right, and what its lines are made of."""


class FlowARError(ValueError):
    """Bad input: one line that names the file, option or tensor, what it is, what was expected."""
    status = 2  # of the process that ends with it
    on_all_ranks = False  # True: each raises it, and the first of them prints it


def first_sentence(error):
    """First sentence of an error's message, for a line of our own; its type where there is none."""
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__


def name_some(names, limit=5):
    """'a, b, c and 7 more' for a message."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
