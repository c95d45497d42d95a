"""Splits, cross-validation folds, and the rows of augmented copies.

The rows of a split are its original images, then the augmented copies; a copy's id is its original's id with a suffix.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from melanoma.classes import CLASSES, SPLITS
from melanoma.errors import InputError
from melanoma.sources import isic

import numpy as np

# Images per class (nevus, melanoma, keratosis) in the 2018 repository: all 2750, and those of validation and test.
POOL_2018 = (1843, 521, 386)
PARTS_2018 = {"val": (327, 130, 88), "test": (196, 59, 45)}

COPY_SUFFIX = "_copy"  # in the id of an augmented copy: original's id, suffix, number of the copy


@dataclass(frozen=True)
class Member:
    """One network of an ensemble."""

    name: str  # suffix of its files' names, e.g. _fold1_seed2; empty for a single network
    fold: int  # fold that it is not trained on; -1: it is trained on all images
    seed: int  # of its training


def divide_2018(splits: dict[str, list[isic.Record]], seed: int) -> dict[str, list[isic.Record]]:
    """Pools all labelled images and divides them as the 2018 repository did, class by class.

    Validation and test get PARTS_2018, train the rest. If a class has fewer images than POOL_2018, its parts shrink in
    proportion.

    Args:
        splits: records by official split; unlabelled ones are left out.
        seed: seed of the random division.

    Returns:
        Records by split, sorted by id; no empty splits.

    Raises:
        InputError: no image is labelled, or only some of the labelled images have masks.
    """
    pool = [record for records in splits.values() for record in records if record.label is not None]
    if not pool:
        raise InputError("--split 2018 divides labelled images, and there are none: add a label file (docs/data.md)")
    if len({record.mask is None for record in pool}) > 1:
        raise InputError(
            "--split 2018 pools the official splits, so either all or none of them must have a mask folder"
        )
    order = np.random.default_rng(seed).permutation(len(pool))
    divided: dict[str, list[isic.Record]] = {split: [] for split in SPLITS}
    for label in range(len(CLASSES)):
        of_class = [pool[row] for row in order if pool[row].label == label]
        scale = min(1.0, len(of_class) / POOL_2018[label])
        start = 0
        for split, counts in PARTS_2018.items():
            stop = start + round(counts[label] * scale)
            divided[split] += of_class[start:stop]
            start = stop
        divided["train"] += of_class[start:]
    return {split: sorted(records, key=lambda record: record.id) for split, records in divided.items() if records}


def interleave(records: list[isic.Record]) -> list[isic.Record]:
    """Sorts records so that the classes alternate: with --limit, the first rows of a split hold every class."""
    counts: dict[int | None, int] = {}
    rounds = []
    for record in records:
        rounds.append(counts.get(record.label, 0))
        counts[record.label] = rounds[-1] + 1
    return [records[row] for row in np.argsort(rounds, kind="stable")]


def rows_to_copy(labels: np.ndarray, minorities: tuple[int, ...], times: float) -> list[int]:
    """Chooses the rows to copy so that each minority class gets `times` as many images.

    Args:
        labels: int (N,), of the originals.
        minorities: classes to enlarge.
        times: 1 or more. A class of n images gets round(times * n) images, originals included.

    Returns:
        Row of the original of every copy, class by class; the originals of a class are copied in turn.
    """
    rows: list[int] = []
    for label in minorities:
        originals = np.flatnonzero(labels == label)
        copies = round(times * len(originals)) - len(originals)
        rows += [int(originals[number % len(originals)]) for number in range(copies)]
    return rows


def original_id(row_id: str) -> str:
    """The id of the original image of a row."""
    return row_id.partition(COPY_SUFFIX)[0]


def is_original(row_id: str) -> bool:
    """Whether a row is an original image, not an augmented copy."""
    return original_id(row_id) == row_id


def are_original(ids: Sequence[str]) -> np.ndarray:
    """`is_original` of every row, bool (N,)."""
    return np.array([is_original(row_id) for row_id in ids], bool)


def original_rows(ids: Sequence[str]) -> np.ndarray:
    """The row of every row's original, int (N,)."""
    row_of_id = {row_id: row for row, row_id in enumerate(ids)}
    return np.array([row_of_id[original_id(row_id)] for row_id in ids])


def list_members(folds: int, seeds: int, seed: int) -> list[Member]:
    """The networks of a cross-validation with several seeds.

    Args:
        folds: number of folds; 1: no cross-validation, every network is trained on all images.
        seeds: networks for each fold.
        seed: seed of the first network of each fold; the others count up from it, and from 2**32 - 1 to 0.
    """
    return [
        Member(
            name=(f"_fold{fold + 1}" if folds > 1 else "") + (f"_seed{number}" if seeds > 1 else ""),
            fold=fold if folds > 1 else -1,
            seed=number,
        )
        for fold in range(folds)
        for number in ((seed + count) % 2**32 for count in range(seeds))  # NumPy and Keras accept no larger seed
    ]


def assign_folds(ids: Sequence[str], labels: np.ndarray | None, folds: int, seed: int) -> np.ndarray:
    """Assigns every row to a cross-validation fold; an augmented copy is in the fold of its original.

    Only the originals are divided, so that copies of the minority classes do not unbalance the folds. Fold sizes, and
    the images of each class in a fold, differ by at most one. Classes are ignored if all have fewer images than there
    are folds.

    Args:
        ids: ids of the rows; the original of every copy is among them.
        labels: int (N,), of the rows; None: without regard to classes.
        folds: number of folds, 1 or more.
        seed: seed of the random assignment.

    Returns:
        int (N,), 0 to folds - 1.

    Raises:
        InputError: there are fewer originals than folds.
    """
    originals = np.flatnonzero(are_original(ids))
    if len(originals) < folds:
        raise InputError(f"--folds {folds} is more than the {len(originals)} training images")
    fold_of_row = np.zeros(len(ids), int)
    if folds > 1:
        from sklearn.model_selection import KFold, StratifiedKFold  # 60 MB that step 1 does not need

        classes = None if labels is None else np.asarray(labels)[originals]
        stratify = classes is not None and np.bincount(classes).max() >= folds
        splitter = (StratifiedKFold if stratify else KFold)(folds, shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a class with fewer images than folds; it is no error here
            for fold, (_, held_out) in enumerate(splitter.split(originals, classes)):
                fold_of_row[originals[held_out]] = fold
    return fold_of_row[original_rows(ids)]


def out_of_fold_mask(members: Sequence[Member], fold_of_row: np.ndarray) -> np.ndarray | None:
    """Which networks were not trained on which rows.

    Args:
        members: members of the ensemble.
        fold_of_row: int (N,), from `assign_folds`.

    Returns:
        bool (N, number of members); None if a network was trained on all rows.
    """
    left_out = np.array([member.fold for member in members])
    return fold_of_row[:, None] == left_out if (left_out >= 0).all() else None
