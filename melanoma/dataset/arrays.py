"""Writes the arrays of a split: original images, and for train the augmented copies after them."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.classes import SPLITS, TASKS
from melanoma.dataset import augment
from melanoma.dataset.cache import Cache
from melanoma.dataset.splits import UNLABELLED, rows_to_copy
from melanoma.dataset.workers import Workers
from melanoma.log import log, progress
from melanoma.sources.records import Record

import numpy as np


@dataclass(frozen=True)
class Row:
    """One row of the arrays."""

    record: Record
    source: int  # row of the original; its own row for an original
    copy: int | None  # number of the augmented copy; None: the original

    @property
    def label(self) -> int:
        """Index into CLASSES, or UNLABELLED."""
        return UNLABELLED if self.record.label is None else self.record.label


def plan_rows(records: Sequence[Record], split: str, times: float) -> list[Row]:
    """The rows of a split: its records, and for train the augmented copies after them.

    Args:
        records: records of the split.
        split: train, val or test.
        times: factor by which the minority classes of train are enlarged; 1 makes no copies. Unlabelled images have
            none.

    Returns:
        Originals first.
    """
    rows = [Row(record, row, None) for row, record in enumerate(records)]
    if split == "train":
        labels = np.array([row.label for row in rows])
        copied = rows_to_copy(labels, TASKS, times)
        rows += [Row(records[original], original, copy) for copy, original in enumerate(copied, start=1)]
    return rows


def read_rows(rows: Sequence[Row], cache: Cache, seed: int, workers: Workers) -> Iterator[augment.ImageAndMask]:
    """Image (S, S, 3), and mask (S, S, 1) or None, of every row, one at a time.

    Args:
        rows: from `plan_rows`.
        cache: in which all records were read.
        seed: seed of the augmented copies.
        workers: make the augmented copies.
    """
    for row in rows:
        if row.copy is None:
            yield cache.pixels(row.record)
    copies = ((cache.pixels(row.record), [seed, row.copy]) for row in rows if row.copy is not None)
    yield from workers.map(augment.augment_copy, copies)


def write_split(
    store: Store,
    files: contextlib.ExitStack,
    split: str,
    rows: Sequence[Row],
    pixels: Iterator[augment.ImageAndMask],
    numbers: Mapping[str, Mapping[Record, int]],
) -> list[str]:
    """Writes the arrays of one split, row by row.

    Args:
        store: store of the first script.
        files: the arrays replace older ones when it closes without an error.
        split: train, val or test.
        rows: from `plan_rows`; at least one.
        pixels: from `read_rows`.
        numbers: numbers of each record, 0 or more, by the name of their array.

    Returns:
        The names of the arrays.
    """
    labels = np.array([row.label for row in rows], np.int8)
    has_mask = np.array([row.record.mask is not None for row in rows])
    columns = {
        "ids": np.array([row.record.id for row in rows]),
        "source": np.array([row.source for row in rows], np.int64),
    } | {name: np.array([found[row.record] for row in rows], np.int64) for name, found in numbers.items()}
    if (labels != UNLABELLED).any():
        columns["labels"] = labels
    depths = {"images": 3}  # channels
    if has_mask.any():
        columns["has_mask"] = has_mask
        depths["masks"] = 1
    first = next(pixels)
    side = len(first[0])
    no_mask = np.zeros((side, side, 1), np.uint8)
    # The stack closes in reverse order: ids first, so that the manifest lists them among the inputs of the others.
    outputs = [
        files.enter_context(store.writer(name, len(rows), (side, side, depth), split=split))
        for name, depth in depths.items()
    ]
    for name, column in reversed(columns.items()):
        files.enter_context(store.writer(name, len(rows), (), str(column.dtype), split=split)).append(column)
    for image, mask in progress(itertools.chain([first], pixels), split, len(rows)):
        for output, array in zip(outputs, (image, no_mask if mask is None else mask), strict=False):
            output.append(array[None])
    log.info("%-5s %s", split, describe(rows))
    return [*columns, *depths]


def describe(rows: Sequence[Row]) -> str:
    """Numbers of originals and augmented copies, and of originals without label or mask if others have them."""
    originals = [row.record for row in rows if row.copy is None]
    parts = [f"{len(originals)} images"]
    for what, missing in (
        ("label", [record.label is None for record in originals]),
        ("mask", [record.mask is None for record in originals]),
    ):
        if 0 < sum(missing) < len(missing):
            parts.append(f"{sum(missing)} of them without {what}")
    return ", ".join([*parts, f"{len(rows) - len(originals)} augmented copies"])


def remove_others(store: Store, written: Mapping[str, Sequence[str]]) -> None:
    """Deletes the arrays of an earlier run that this one did not write.

    Args:
        store: store of the first script.
        written: {split: names of its arrays}.
    """
    for split in SPLITS:
        for name, file in contract.FILES.items():
            if file.writer == contract.PREPROCESSING and name not in written.get(split, []):
                store.remove(name, split=split)
