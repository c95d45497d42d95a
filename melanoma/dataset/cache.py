"""Keeps decoded images and masks in a file until the arrays are written, so that an interrupted run can resume.

The file holds a row of bytes for each image. A journal beside it has a line for each complete row, with its checksum:
what a kill, a power failure or a full disk has damaged is decoded again.
"""

import hashlib
import inspect
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

from melanoma.dataset import decode, masks
from melanoma.dataset.workers import Workers, naming
from melanoma.log import log, progress
from melanoma.sources.records import Record

import numpy as np

ROWS, JOURNAL = "decoded.bin", "decoded.jsonl"


@dataclass(frozen=True)
class ReadInfo:
    """What is known of an image after decoding."""

    size: tuple[int, int]  # width and height of its file, in pixels
    notes: tuple[str, ...]  # what was converted or ignored, in the image or its mask
    doubts: tuple[str, ...]  # why image or mask may be wrong


class Cache:
    """The decoded images of one data folder, for one run at a time.

    Images are identified by path, size and modification time of their files. What was decoded to another size, by other
    code or by another version of Pillow is not used.
    """

    def __init__(self, data: Path, size: int) -> None:
        """Prepares a cache; nothing is read or written yet.

        Args:
            data: folder of arrays and weights; created if missing.
            size: side of the decoded images in pixels.
        """
        self.path, self.journal, self.size = data / ROWS, data / JOURNAL, size
        # Where thumbnail, image and mask end in a row, in bytes.
        self.ends = np.cumsum([decode.THUMBNAIL**2, 3 * size**2, size**2]).tolist()
        code = [inspect.getsource(module) for module in (decode, masks)]
        made_by = hashlib.sha256(repr((code, version("pillow"), size)).encode()).hexdigest()
        self.header = f"{made_by}\n".encode()
        self.rows: dict[Record, int] = {}
        self.info: dict[Record, ReadInfo] = {}
        self.problems: dict[Record, str] = {}  # why a record cannot be used

    def gigabytes(self) -> float:
        """Size of the decoded images."""
        return self.path.stat().st_size / 1e9

    def remove(self) -> None:
        """Deletes the files, once the arrays contain everything."""
        for path in (self.path, self.journal):
            path.unlink(missing_ok=True)

    def read(self, records: Sequence[Record], workers: Workers) -> None:
        """Decodes the images that are not in the cache yet, and fills `info` and `problems`.

        Raises:
            InputError: worker processes die repeatedly.
            OSError: the files cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as rows, self.journal.open("a+b") as journal:
            missing = self._look_up(records, self._complete_rows(rows, journal))
            count = rows.tell() // self.ends[-1]
            tasks = ((record.image, record.mask, self.size) for record in missing)
            results = zip(missing.items(), workers.map(decode.read, tasks), strict=True)
            for (record, key), result in progress(results, "reading", len(missing)):
                if isinstance(result, str):
                    self.problems[record] = result
                    continue
                info = ReadInfo(result.size, result.notes, result.doubts)
                content, text = row_of(result), f"{json.dumps([key, *astuple(info)])}\n".encode()
                for stream, written in ((rows, content), (journal, checksum_of(content, text) + b" " + text)):
                    with naming(stream.name):
                        stream.write(written)
                        stream.flush()
                self.rows[record], self.info[record] = count, info
                count += 1

    def _complete_rows(self, rows: BinaryIO, journal: BinaryIO) -> dict[str, tuple[int, ReadInfo]]:
        """The rows of an earlier run and what is known of their images, by key; cuts off all others."""
        found: dict[str, tuple[int, ReadInfo]] = {}
        rows.seek(0)
        journal.seek(0)
        count, end = 0, len(self.header)
        for line in journal if journal.readline() == self.header else ():
            checksum, _, text = line.partition(b" ")
            if not line.endswith(b"\n") or checksum != checksum_of(rows.read(self.ends[-1]), text):
                break
            key, size, notes, doubts = json.loads(text)
            found[key] = count, ReadInfo(tuple(size), tuple(notes), tuple(doubts))
            count, end = count + 1, end + len(line)
        rows.truncate(count * self.ends[-1])
        journal.truncate(end if count else 0)
        for stream in (rows, journal):
            stream.seek(0, os.SEEK_END)
        if not count:
            journal.write(self.header)
        return found

    def _look_up(self, records: Sequence[Record], known: dict[str, tuple[int, ReadInfo]]) -> dict[Record, str]:
        """Fills `rows` and `info` of the records that are in the cache; the others, with the keys of their files."""
        missing = {}
        for record in records:
            try:
                key = key_of(record)
            except OSError as error:
                self.problems[record] = f"{error.filename}: {error.strerror}"
            else:
                if key in known:
                    self.rows[record], self.info[record] = known[key]
                else:
                    missing[record] = key
        if self.rows:
            log.info("%d images were read by an earlier run", len(self.rows))
        return missing

    def thumbnail(self, record: Record) -> np.ndarray:
        """The thumbnail of a record that was read: uint8 (THUMBNAIL, THUMBNAIL), grey."""
        start = self.rows[record] * self.ends[-1]
        return np.fromfile(self.path, np.uint8, self.ends[0], offset=start).reshape(decode.THUMBNAIL, -1)

    def pixels(self, record: Record) -> tuple[np.ndarray, np.ndarray | None]:
        """Image and mask of a record that was read.

        Returns:
            uint8 (S, S, 3); and uint8 (S, S, 1), {0, 1}, or None if there is no mask.
        """
        row = np.fromfile(self.path, np.uint8, self.ends[-1], offset=self.rows[record] * self.ends[-1])
        _, image, mask, _ = np.split(row, self.ends)
        shape = self.size, self.size, -1
        return image.reshape(shape), None if record.mask is None else mask.reshape(shape)


def row_of(decoded: decode.Decoded) -> bytes:
    """The bytes of thumbnail, image and mask, of 0 where there is no mask."""
    mask = np.zeros((*decoded.image.shape[:2], 1), np.uint8) if decoded.mask is None else decoded.mask
    return b"".join(part.tobytes() for part in (decoded.thumbnail, decoded.image, mask))


def checksum_of(row: bytes, text: bytes) -> bytes:
    """The checksum of a row and of what its line of the journal says."""
    return b"%d" % zlib.crc32(text, zlib.crc32(row))


def key_of(record: Record) -> str:
    """Identifies the files of a record and their state: paths, sizes in bytes, modification times."""
    states = [(path.absolute(), path.stat()) for path in (record.image, record.mask) if path]
    return repr([(str(path), state.st_size, state.st_mtime_ns) for path, state in states])
