"""Photographs and masks, each decoded once: what is done is kept in a file, so a killed run goes on where it was."""

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType

from melanoma import images
from melanoma.command import log, progress
from melanoma.errors import InputError
from melanoma.images import THUMBNAIL, Pair
from melanoma.isic import Record
from melanoma.parallel import Workers

import numpy as np

NAME = "cache.sqlite"
ROWS = 64  # decoded between two commits: at most so many are decoded again after a kill
LAYOUT = "pairs (key TEXT PRIMARY KEY, facts TEXT, thumbnail BLOB, image BLOB, mask BLOB)"


@dataclass(frozen=True)
class Facts:
    """What was met while reading one photograph."""

    size: tuple[int, int]  # width and height of its file, in pixels
    notes: tuple[str, ...]  # what was converted, in it or its mask


class Cache:
    """The decoded pictures of one data folder, in an SQLite file there; a context manager, for one run at a time.

    Pictures are known by path, size and time of change of their files. What was decoded to another size, by other code
    or by another Pillow is not used.
    """

    def __init__(self, data: Path, size: int) -> None:
        """Names the file; it is opened on entering.

        Args:
            data: folder of arrays and weights; created where needed.
            size: side of the decoded pictures in pixels.
        """
        self.path, self.size = data / NAME, size
        made_by = repr((Path(images.__file__).read_bytes(), version("pillow"), LAYOUT, size))
        self.version = int.from_bytes(hashlib.sha256(made_by.encode()).digest()[:4], "big") >> 1  # SQLite keeps 31 bits
        self.connection: sqlite3.Connection
        self.keys: dict[Record, str] = {}  # of the files as they were before they were read
        self.facts: dict[Record, Facts] = {}
        self.problems: dict[Record, str] = {}  # why a record cannot be used

    def __enter__(self) -> "Cache":
        """Opens the file for this run alone; a damaged one is begun anew.

        Raises:
            InputError: another run has it open, or it cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if not self._open():
                self.remove()
                self._open()
        except sqlite3.Error as error:
            raise self._plain(error) from None
        return self

    def _open(self) -> bool:
        """Makes the file ready; False where it is damaged."""
        self.connection = sqlite3.connect(self.path, timeout=0, isolation_level=None)
        try:
            self.connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self.connection.execute("PRAGMA page_size = 65536")  # bytes: a row has 300,000
            self.connection.execute("BEGIN EXCLUSIVE")
            if self.connection.execute("PRAGMA user_version").fetchone() != (self.version,):
                self.connection.execute("DROP TABLE IF EXISTS pairs")
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
        """Closes the file; what was decoded stays in it."""
        self.connection.close()

    def _plain(self, error: sqlite3.Error) -> InputError:
        if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            return InputError(f"{self.path.parent}: another run is at work in this folder")
        return InputError(f"{self.path}: {error}; is there space, and may it be written?")

    def remove(self) -> None:
        """Takes the file away: the arrays hold everything now."""
        self.connection.close()
        for path in (self.path, self.path.with_name(NAME + "-journal")):
            path.unlink(missing_ok=True)

    def read(self, records: Sequence[Record], workers: Workers) -> None:
        """Decodes what is not here yet, and fills `facts` and `problems`.

        Raises:
            InputError: the file cannot be written, or worker processes die again and again.
        """
        try:
            known = dict(self.connection.execute("SELECT key, facts FROM pairs"))
            for record in records:
                try:
                    self.keys[record] = key(record)
                except OSError as error:
                    self.problems[record] = f"{error.filename}: {error.strerror}"
                else:
                    if text := known.get(self.keys[record]):
                        self._note(record, text)
            missing = [record for record in self.keys if record not in self.facts]
            if self.facts:
                log.info("%d photographs were read before", len(self.facts))
            tasks = ((record.image, record.mask, self.size) for record in missing)
            results = zip(missing, workers.map(images.read, tasks), strict=True)
            for done, (record, pair) in enumerate(progress(results, "reading", len(missing))):
                if done % ROWS == 0:
                    self._commit()
                    self.connection.execute("BEGIN")
                if isinstance(pair, str):
                    self.problems[record] = pair
                else:
                    self._add(record, pair)
            self._commit()
        except sqlite3.Error as error:
            raise self._plain(error) from None

    def _commit(self) -> None:
        if self.connection.in_transaction:
            self.connection.execute("COMMIT")

    def _add(self, record: Record, pair: Pair) -> None:
        facts = json.dumps([pair.size, pair.notes])
        blobs = (pair.thumbnail, pair.image, pair.mask)
        row = (self.keys[record], facts, *(None if blob is None else blob.tobytes() for blob in blobs))
        self.connection.execute("INSERT OR REPLACE INTO pairs VALUES (?, ?, ?, ?, ?)", row)
        self._note(record, facts)

    def _note(self, record: Record, text: str) -> None:
        (width, height), notes = json.loads(text)
        self.facts[record] = Facts((width, height), tuple(notes))

    def _blobs(self, record: Record, columns: str) -> tuple[bytes | None, ...]:
        query = f"SELECT {columns} FROM pairs WHERE key = ?"
        try:
            return self.connection.execute(query, [self.keys[record]]).fetchone()
        except sqlite3.Error as error:
            raise self._plain(error) from None

    def thumbnail(self, record: Record) -> np.ndarray:
        """Grey picture of a record that was read, uint8 (THUMBNAIL, THUMBNAIL)."""
        (content,) = self._blobs(record, "thumbnail")
        return np.frombuffer(content or b"", np.uint8).reshape(THUMBNAIL, THUMBNAIL)

    def pixels(self, record: Record) -> tuple[np.ndarray, np.ndarray | None]:
        """Image uint8 (S, S, 3) and mask uint8 (S, S, 1) of {0, 1}, or None for it, of a record that was read."""
        image, mask = (
            None if content is None else np.frombuffer(content, np.uint8).reshape(self.size, self.size, -1)
            for content in self._blobs(record, "image, mask")
        )
        assert image is not None
        return image, mask


def key(record: Record) -> str:
    """Tells the files of a record from other ones, and from themselves before a change."""
    states = [(path.absolute(), path.stat()) for path in (record.image, record.mask) if path]
    return repr([(str(path), state.st_size, state.st_mtime_ns) for path, state in states])
