"""The errors that a user can cause and mend."""

__all__ = ["InputError", "RunFailedError"]


class InputError(ValueError):
    """Bad input: the message names the file, row or flag, the rule and the fix in one line.

    The command line prints the message alone and exits with status 2.
    """


class RunFailedError(RuntimeError):
    """A run on good input failed for a stated reason; the command line exits with status 1."""
