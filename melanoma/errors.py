"""Errors that the user can fix; `melanoma.cli.run` prints their message and exits with their code."""

from collections.abc import Sequence


class InputError(Exception):
    """Wrong usage or bad input. The message says what is wrong, where, and what to do."""

    exit_code = 2


class StageError(InputError):
    """A file of an earlier script is missing, changed or stale. The message names the script to run."""

    exit_code = 3


class DifferenceError(InputError):
    """What was written computes something else than what it was made from. The message names the file."""

    exit_code = 1


def list_first(ids: Sequence[str], count: int = 10) -> str:
    """Formats the first ids of a list, and the number of the others, for a message."""
    more = f" and {len(ids) - count} more" if len(ids) > count else ""
    return ", ".join(ids[:count]) + more
