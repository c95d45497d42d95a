"""Writes the arrays of a split: original images, and for train the augmented copies after them."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from melanoma.artifacts.store import Store
from melanoma.classes import SPLITS, TASKS
from melanoma.dataset import augment
from melanoma.dataset.cache import Cache
from melanoma.dataset.splits import COPY_SUFFIX, rows_to_copy
from melanoma.dataset.workers import Workers
from melanoma.log import log, progress
from melanoma.sources import isic

import numpy as np

DEPTHS = {"images": 3, "masks": 1}  # channels
COPIES_PER_BLOCK = 64  # augmented copies in memory at a time


@dataclass(frozen=True)
class Row:
    """One row of the arrays."""

    record: isic.Record
    copy: int | None  # number of the augmented copy; None: the original

    @property
    def id(self) -> str:
        """The id to store."""
        return self.record.id if self.copy is None else f"{self.record.id}{COPY_SUFFIX}{self.copy}"


def plan_rows(records: Sequence[isic.Record], split: str, times: float) -> list[Row]:
    """The rows of a split: its records, and for train the augmented copies after them.

    Args:
        records: records of the split; all labelled or none.
        split: train, val or test.
        times: factor by which the minority classes of train are enlarged; 1 makes no copies.

    Returns:
        Originals first.
    """
    rows = [Row(record, None) for record in records]
    if split == "train" and records[0].label is not None:
        labels = np.array([record.label for record in records])
        rows += [
            Row(records[original], copy) for copy, original in enumerate(rows_to_copy(labels, TASKS, times), start=1)
        ]
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
    yield from workers.map(augment.augment_copy, copies, COPIES_PER_BLOCK)


def write_split(
    store: Store,
    files: contextlib.ExitStack,
    split: str,
    rows: Sequence[Row],
    pixels: Iterator[augment.ImageAndMask],
    size: int,
) -> list[str]:
    """Writes the arrays of one split, row by row.

    Args:
        store: store of the first script.
        files: the arrays replace older ones when it closes without an error.
        split: train, val or test.
        rows: from `plan_rows`.
        pixels: from `read_rows`.
        size: side of the images in pixels.

    Returns:
        The names of the arrays.
    """
    columns = {"ids": np.array([row.id for row in rows])}
    if rows[0].record.label is not None:
        columns["labels"] = np.array([row.record.label for row in rows], dtype=np.int8)
    names = list(DEPTHS) if rows[0].record.mask else ["images"]
    # The stack closes in reverse order: ids first, so that the manifest lists them among the inputs of the others.
    outputs = [
        files.enter_context(store.writer(name, len(rows), (size, size, DEPTHS[name]), split=split)) for name in names
    ]
    for name, column in reversed(columns.items()):
        files.enter_context(store.writer(name, len(rows), (), str(column.dtype), split=split)).append(column)
    for image_and_mask in progress(pixels, split, len(rows)):
        for output, array in zip(outputs, image_and_mask, strict=False):
            if array is not None:
                output.append(array[None])
    copies = sum(row.copy is not None for row in rows)
    log.info("%-5s %d images, %d augmented copies", split, len(rows) - copies, copies)
    return [*columns, *names]


def remove_others(store: Store, written: Mapping[str, Sequence[str]]) -> None:
    """Deletes the arrays of an earlier run that this one did not write.

    Args:
        store: store of the first script.
        written: {split: names of its arrays}.
    """
    for split in SPLITS:
        for name in {"ids", "images", "masks", "labels"} - set(written.get(split, [])):
            store.remove(name, split=split)
