"""The one exception type for what a user can put right."""


class FlowARError(ValueError):
    """Bad input: a file, an option or a tensor that cannot be used.

    The message is one line that names the thing, what was found and what was expected; the programs print
    it and exit with status 2.
    """
