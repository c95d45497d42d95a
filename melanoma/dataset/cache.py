"""Keeps decoded images and masks in a file until the arrays are written, so that an interrupted run can resume."""

import hashlib
import inspect
import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType

from melanoma.cli import locking
from melanoma.dataset import decode, masks
from melanoma.dataset.workers import Workers
from melanoma.errors import InputError
from melanoma.log import log, progress
from melanoma.sources.records import Record

import numpy as np

NAME = "cache.sqlite"
ROWS_PER_COMMIT = 64  # at most so many images are decoded again after a kill
PAGE_SIZE = 65536  # bytes, SQLite's maximum; a row at 256 pixels has 300,000
PRIMARY_CODE = 0xFF  # of SQLite's extended error codes
# What SQLite reports on a drive without file locks, depending on the drive.
LOCK_ERRORS = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PROTOCOL}
LAYOUT = "decoded (key TEXT PRIMARY KEY, info TEXT, thumbnail BLOB, image BLOB, mask BLOB)"


@dataclass(frozen=True)
class ReadInfo:
    """What is known of an image after decoding."""

    size: tuple[int, int]  # width and height of its file, in pixels
    notes: tuple[str, ...]  # what was converted or ignored, in the image or its mask
    doubts: tuple[str, ...]  # why image or mask may be wrong


class Cache:
    """The decoded images of one data folder, in an SQLite file there; a context manager, for one run at a time.

    Images are identified by path, size and modification time of their files. What was decoded to another size, by other
    code or by another version of Pillow is not used.
    """

    def __init__(self, data: Path, size: int) -> None:
        """Prepares a cache; the file is opened on entering.

        Args:
            data: folder of arrays and weights; created if missing.
            size: side of the decoded images in pixels.
        """
        self.path, self.size = data / NAME, size
        code = [inspect.getsource(module) for module in (decode, masks)]
        made_by = repr((code, version("pillow"), LAYOUT, size))
        self.version = int.from_bytes(hashlib.sha256(made_by.encode()).digest()[:4], "big") >> 1  # SQLite keeps 31 bits
        self.connection: sqlite3.Connection
        self.keys: dict[Record, str] = {}  # of the files before they were read
        self.info: dict[Record, ReadInfo] = {}
        self.problems: dict[Record, str] = {}  # why a record cannot be used

    def __enter__(self) -> "Cache":
        """Opens the file exclusively; a damaged one is replaced.

        Raises:
            InputError: another run has it open, or it cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._open_or_replace()
        except sqlite3.Error as error:
            if error.sqlite_errorcode & PRIMARY_CODE not in LOCK_ERRORS or locking.supports_locks(self.path.parent):
                raise self._input_error(error) from None
            locking.warn_without_locks(self.path.parent)
            try:
                self._open_or_replace(nolock=True)
            except sqlite3.Error as again:
                raise self._input_error(again) from None
        return self

    def _open_or_replace(self, nolock: bool = False) -> None:
        if not self._open(nolock):
            self.remove()
            self._open(nolock)

    def _open(self, nolock: bool) -> bool:
        """Opens the file and creates its table; False if it is damaged."""
        address = f"{self.path.absolute().as_uri()}?nolock=1" if nolock else self.path
        self.connection = sqlite3.connect(address, timeout=0, isolation_level=None, uri=nolock)
        try:
            self.connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self.connection.execute(f"PRAGMA page_size = {PAGE_SIZE}")
            self.connection.execute("BEGIN EXCLUSIVE")
            if self.connection.execute("PRAGMA user_version").fetchone() != (self.version,):
                self.connection.execute("DROP TABLE IF EXISTS decoded")
                self.connection.execute(f"PRAGMA user_version = {self.version}")
            self.connection.execute(f"CREATE TABLE IF NOT EXISTS {LAYOUT}")
            self.connection.execute("COMMIT")
            return self.connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
        except sqlite3.Error as error:
            self.connection.close()
            if error.sqlite_errorcode in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                return False
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file; the decoded images stay in it."""
        self.connection.close()

    def _input_error(self, error: sqlite3.Error) -> InputError:
        if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            return InputError(f"{self.path.parent}: another run uses this folder; wait until it ends")
        return InputError(f"{self.path}: {error}; check free space and permissions of this folder")

    def gigabytes(self) -> float:
        """Size of the file."""
        return self.path.stat().st_size / 1e9

    def remove(self) -> None:
        """Deletes the file, once the arrays contain everything."""
        self.connection.close()
        for path in (self.path, self.path.with_name(NAME + "-journal")):
            path.unlink(missing_ok=True)

    def read(self, records: Sequence[Record], workers: Workers) -> None:
        """Decodes the images that are not in the cache yet, and fills `info` and `problems`.

        Raises:
            InputError: the file cannot be written, or worker processes die repeatedly.
        """
        try:
            self._look_up(records)
            missing = [record for record in self.keys if record not in self.info]
            if self.info:
                log.info("%d images were read by an earlier run", len(self.info))
            tasks = ((record.image, record.mask, self.size) for record in missing)
            results = zip(missing, workers.map(decode.read, tasks), strict=True)
            for done, (record, result) in enumerate(progress(results, "reading", len(missing))):
                if done % ROWS_PER_COMMIT == 0:
                    self._commit()
                    self.connection.execute("BEGIN")
                if isinstance(result, str):
                    self.problems[record] = result
                else:
                    self._add(record, result)
            self._commit()
        except sqlite3.Error as error:
            raise self._input_error(error) from None

    def _look_up(self, records: Sequence[Record]) -> None:
        """Fills `keys`, and `info` of the records that are in the cache."""
        known = dict(self.connection.execute("SELECT key, info FROM decoded"))
        for record in records:
            try:
                self.keys[record] = key(record)
            except OSError as error:
                self.problems[record] = f"{error.filename}: {error.strerror}"
            else:
                if text := known.get(self.keys[record]):
                    self._set_info(record, text)

    def _commit(self) -> None:
        if self.connection.in_transaction:
            self.connection.execute("COMMIT")

    def _add(self, record: Record, decoded: decode.Decoded) -> None:
        info = json.dumps([decoded.size, decoded.notes, decoded.doubts])
        arrays = (decoded.thumbnail, decoded.image, decoded.mask)
        row = (self.keys[record], info, *(None if array is None else array.tobytes() for array in arrays))
        self.connection.execute("INSERT OR REPLACE INTO decoded VALUES (?, ?, ?, ?, ?)", row)
        self._set_info(record, info)

    def _set_info(self, record: Record, text: str) -> None:
        (width, height), notes, doubts = json.loads(text)
        self.info[record] = ReadInfo((width, height), tuple(notes), tuple(doubts))

    def _select(self, record: Record, columns: str) -> tuple[bytes | None, ...]:
        query = f"SELECT {columns} FROM decoded WHERE key = ?"
        try:
            return self.connection.execute(query, [self.keys[record]]).fetchone()
        except sqlite3.Error as error:
            raise self._input_error(error) from None

    def thumbnail(self, record: Record) -> np.ndarray:
        """The thumbnail of a record that was read: uint8 (THUMBNAIL, THUMBNAIL), grey."""
        (content,) = self._select(record, "thumbnail")
        return np.frombuffer(content or b"", np.uint8).reshape(decode.THUMBNAIL, decode.THUMBNAIL)

    def pixels(self, record: Record) -> tuple[np.ndarray, np.ndarray | None]:
        """Image and mask of a record that was read.

        Returns:
            uint8 (S, S, 3); and uint8 (S, S, 1), {0, 1}, or None if there is no mask.
        """
        image, mask = (
            None if content is None else np.frombuffer(content, np.uint8).reshape(self.size, self.size, -1)
            for content in self._select(record, "image, mask")
        )
        assert image is not None
        return image, mask


def key(record: Record) -> str:
    """Identifies the files of a record and their state: paths, sizes in bytes, modification times."""
    states = [(path.absolute(), path.stat()) for path in (record.image, record.mask) if path]
    return repr([(str(path), state.st_size, state.st_mtime_ns) for path, state in states])
