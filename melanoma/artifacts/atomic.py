"""Files that are complete or absent, whatever interrupts the writing."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file that replaces `path` at the end; on an error it is deleted and an older file stays.

    Raises:
        OSError: the file cannot be written. Its filename is set, on a full disk too.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # renamed, or never created
            temporary.unlink()


def write_text(path: Path, content: str) -> None:
    """Writes text as UTF-8, completely or not at all; bytes of file names that are not UTF-8 are escaped."""
    with atomic_write(path) as stream:
        stream.write(content.encode(errors="backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, completely or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")
