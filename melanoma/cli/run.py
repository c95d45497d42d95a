"""Runs a script: its locks, exit codes, error messages and closing line."""

import argparse
import contextlib
import errno
import io
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

from melanoma.cli import hardware, locking
from melanoma.errors import InputError
from melanoma.log import log

# A full disk, or a folder that cannot be written: the user can fix these.
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
}


received: list[int] = []  # signals that end the work


class Terminated(KeyboardInterrupt):
    """The process received SIGTERM, for example from a cloud that takes the machine back."""


def interrupt(signal_number: int, frame: FrameType | None) -> None:
    """Signal handler that ends the work, for Ctrl-C and SIGTERM."""
    received.append(signal_number)
    check_interrupted()


def check_interrupted() -> None:
    """Raises again what `interrupt` raised: NumPy drops an exception that is raised while it converts a JAX array."""
    if received:
        raise Terminated if signal.SIGTERM in received else KeyboardInterrupt


def resume_hint() -> str:
    """Names the command that continues an interrupted run."""
    return "the same command" + " without --restart" * ("--restart" in sys.argv)


def user_message(error: BaseException) -> tuple[str, int] | None:
    """Message and exit code for an error that the user can fix; None for a bug."""
    if isinstance(error, InputError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        place = error.filename or "writing a file"
        return f"{place}: {error.strerror}. Fix this and run the command again", InputError.exit_code
    if isinstance(error, KeyboardInterrupt) or received:  # Keras can fail while it ends an interrupted step
        number = signal.SIGTERM if isinstance(error, Terminated) or signal.SIGTERM in received else signal.SIGINT
        return f"interrupted. To continue, run {resume_hint()}", 128 + number
    advice = hardware.advice(error)
    return (advice, InputError.exit_code) if advice else None


def run(
    parser: argparse.ArgumentParser,
    main: Callable[[argparse.Namespace], None],
    writes: Sequence[str] = ("data", "graphics"),
) -> None:
    """Parses the command line, runs `main`, logs its duration and peak memory, and exits.

    Exit codes: 0 success; 1 a bug, or a wrong result (DifferenceError); 2 wrong usage, bad input, or unsuitable
    hardware; 3 an earlier stage is missing or stale; 130 interrupted by Ctrl-C, 143 by SIGTERM.

    Args:
        parser: the script's command line.
        main: the script's work.
        writes: settings that name output folders. Each is checked before any work, and locked against other runs.
            Processes of a distributed job that write nothing skip both.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may contain bytes that are not UTF-8
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout, force=True)
    log.setLevel(logging.INFO)
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # it warns that several networks are compiled
    received.clear()
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in background jobs
        signal.signal(signal.SIGINT, interrupt)
    start = time.perf_counter()
    try:
        arguments = parser.parse_args()
        with contextlib.ExitStack() as stack:
            if writes and (locking.is_leader() or not getattr(arguments, "distribute", False)):
                folders = {folder.resolve(): folder for folder in (getattr(arguments, name) for name in writes)}
                for folder in folders.values():
                    locking.check_writable(folder)
                for folder in folders.values():
                    stack.enter_context(locking.exclusive_lock(folder))
            main(arguments)
            check_interrupted()
    except BaseException as error:
        if not (message_and_code := user_message(error)):
            raise
        message, code = message_and_code
        print(f"{parser.prog}: {message}", file=sys.stderr)
        sys.exit(code)
    log.info("done in %.0f s, peak memory %.2f GiB", time.perf_counter() - start, hardware.peak_memory())
