"""What a run wants of its folders before it works: that they can be written, and that no other run is at work there."""

import contextlib
import errno
import fcntl
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from melanoma.errors import InputError

PREFIX = "KERAS_DISTRIBUTION_"  # of Keras' environment variables that make processes members of one job
LOCK = ".lock"  # in the data folder, while a run is at work there
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # some network file systems know none


def check_writable(folder: Path) -> None:
    """Makes a file in a folder, or in the nearest one above that exists, and takes it away.

    Raises:
        InputError: it cannot be made.
    """
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".melanoma_"):
            pass
    except OSError as error:
        raise InputError(f"{there}: nothing can be written there ({error.strerror}); name another folder") from None


def is_leader() -> bool:
    """Whether this process writes the files: of the members of a distributed job the first alone does."""
    return os.environ.get(f"{PREFIX}PROCESS_ID", "0") == "0"


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps a second run out of a data folder; the system takes the lock away from a process that dies.

    The folder is made where needed, and is gone afterwards if nothing came into it. Processes that this one starts do
    not inherit the lock: Python opens files so.

    Raises:
        InputError: another run is at work there.
    """
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    handle = _lock(path)
    try:
        os.truncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {platform.node()}: {shlex.join(sys.argv)}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock goes: whoever waits for it sees that
        os.close(handle)
        with contextlib.suppress(OSError):  # there is something in it now
            for one in made:
                one.rmdir()


def _lock(path: Path) -> int:
    """An open, locked file that lies at the path."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
        except BlockingIOError:
            holder = os.read(handle, 10_000).decode(errors="replace") or "another process"
            os.close(handle)
            raise InputError(
                f"{path.parent}: another run is at work in this folder ({holder}): wait until it ends, or end it, or "
                "name another --data"
            ) from None
        except OSError as error:
            if error.errno in NO_LOCKS:
                return handle
            os.close(handle)
            raise
        os.close(handle)  # the run that had it has just taken the file away
