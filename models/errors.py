"""The one exception type for what a user can put right."""


class FlowARError(ValueError):
    """Bad input: one line that names the file, option or tensor, what was found, what was expected. Exit status 2."""
