"""Conditions on a run's output folders: they can be written, and no other run uses them."""

import contextlib
import errno
import functools
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from melanoma.errors import InputError
from melanoma.log import log

import filelock

PREFIX = "KERAS_DISTRIBUTION_"  # of Keras' environment variables for the processes of a distributed job
LOCK = ".lock"  # in the folder, while a run uses it
HOLDER = ".lock.txt"  # describes that run; Windows lets nobody else read the locked file itself
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # raised by some network file systems


def check_writable(folder: Path) -> None:
    """Creates and deletes a file in a folder, or in its nearest parent that exists.

    Raises:
        InputError: the file cannot be created.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".melanoma_"):
            pass
    except OSError as error:
        raise InputError(f"{existing}: nothing can be written there ({error.strerror}). Use another folder") from None


def is_leader() -> bool:
    """Whether this process writes the files: only the first process of a distributed job does."""
    return os.environ.get(f"{PREFIX}PROCESS_ID", "0") == "0"


@functools.cache
def warn_without_locks(folder: Path) -> None:
    """Warns, once for each folder, that it cannot be locked against other runs."""
    log.warning(
        "warning: %s: this drive does not support file locks: do not start two runs in one folder; a folder on a "
        "local drive is safer",
        folder,
    )


@contextlib.contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder; the operating system releases the lock when the process dies.

    Creates the folder, and removes it afterwards if it is still empty. On a file system without locks the run warns and
    continues without one.

    Raises:
        InputError: another run holds the lock.
    """
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / LOCK, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InputError(
            f"{folder}: another run uses this folder ({_holder(folder)}). Wait until it ends, stop it, or use another "
            "folder"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warn_without_locks(folder)
    holder = f"process {os.getpid()} on {platform.node()}: {shlex.join(sys.argv)}"
    try:
        with contextlib.suppress(OSError):  # a full disk is reported where results are written
            (folder / HOLDER).write_text(holder, "utf-8", errors="replace")
        yield
    finally:
        for name in (HOLDER, LOCK):  # before the release: afterwards they may be another run's
            with contextlib.suppress(OSError):  # on Windows filelock deletes its file itself, after the release
                (folder / name).unlink()
        lock.release()
        with contextlib.suppress(OSError):  # not empty
            for parent in created:
                parent.rmdir()


def _holder(folder: Path) -> str:
    """Process, host and command line of the run that holds the lock, as far as it has written them."""
    with contextlib.suppress(OSError):
        return (folder / HOLDER).read_text("utf-8", errors="replace") or "another process"
    return "another process"
