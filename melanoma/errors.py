"""Errors that a user can mend: `melanoma.command.run` prints them plainly and exits with their code."""


class InputError(Exception):
    """Bad usage or bad input. The message says what, where, and what to do next."""

    exit_code = 2


class StageError(InputError):
    """A file that an earlier script writes is missing, changed or stale. The message names that script."""

    exit_code = 3
