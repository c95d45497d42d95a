"""Splits, cross-validation folds, and the rows of augmented copies.

The rows of a split are its original images, then the augmented copies. `source` holds the row of each row's original.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from melanoma.artifacts.store import Store
from melanoma.classes import CLASSES, SPLITS
from melanoma.errors import InputError
from melanoma.sources import isic

import numpy as np

# Images per class (nevus, melanoma, keratosis) in the 2018 repository: all 2750, and those of validation and test.
POOL_2018 = (1843, 521, 386)
PARTS_2018 = {"val": (327, 130, 88), "test": (196, 59, 45)}

UNLABELLED = -1  # instead of a class, in the labels of a split of which only some images have a label


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
        labels: int (N,), of the originals; UNLABELLED where there is none.
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


def are_original(source: np.ndarray) -> np.ndarray:
    """Whether each row is an original image and not an augmented copy, bool (N,).

    Args:
        source: int (N,), row of the original of each row.
    """
    return np.asarray(source) == np.arange(len(source))


def load_labels(store: Store, split: str) -> np.ndarray:
    """Labels of the rows of a split, int (N,), UNLABELLED where there is none."""
    if store.has("labels", split=split):
        return np.array(store.load("labels", split=split))
    return np.full(store.rows(split), UNLABELLED)


def originals_with_mask(store: Store, split: str) -> np.ndarray:
    """Rows of a split that are original images with a lesion mask, int (K,); empty if the split is absent."""
    if not store.has("masks", split=split):
        return np.zeros(0, int)
    return np.flatnonzero(are_original(store.load("source", split=split)) & store.load("has_mask", split=split))


def list_members(folds: int, seeds: int, seed: int) -> list[Member]:
    """The networks of a cross-validation with several seeds.

    Args:
        folds: number of folds; 1: no cross-validation, every network is trained on all images.
        seeds: networks for each fold.
        seed: seed of the first network of each fold; the others count up from it.
    """
    return [
        Member(
            name=(f"_fold{fold + 1}" if folds > 1 else "") + (f"_seed{number}" if seeds > 1 else ""),
            fold=fold if folds > 1 else -1,
            seed=number,
        )
        for fold in range(folds)
        for number in range(seed, seed + seeds)
    ]


def assign_folds(source: np.ndarray, groups: np.ndarray, classes: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Assigns every row to a cross-validation fold, a group as a whole and an augmented copy with its original.

    Only the originals are divided, so that copies of the minority classes do not unbalance the folds. If every image
    is a group of its own, fold sizes, and the images of each class in a fold, differ by at most one; otherwise the
    folds are as similar as the groups allow. Classes are ignored if all have fewer images than there are folds.

    Args:
        source: int (N,), row of the original of each row.
        groups: int (N,), equal for images of one group.
        classes: int (N,), what to have in equal numbers in all folds; unlabelled images are a class too.
        folds: number of folds, 1 or more.
        seed: seed of the random assignment.

    Returns:
        int (N,), 0 to folds - 1.

    Raises:
        InputError: there are fewer groups than folds, or a fold gets no images.
    """
    originals = np.flatnonzero(are_original(source))
    groups, classes = np.asarray(groups)[originals], np.unique(np.asarray(classes)[originals], return_inverse=True)[1]
    count = len(np.unique(groups))
    one_image_each = count == len(originals)
    if count < folds:
        kind = "training images" if one_image_each else "groups of training images that stay together"
        raise InputError(f"--folds {folds} is more than the {count} {kind}: choose fewer folds")
    fold_of_row = np.zeros(len(source), int)
    if folds > 1:
        # 60 MB that step 1 does not need
        from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedKFold

        stratified = (
            StratifiedKFold if one_image_each else StratifiedGroupKFold
        )  # the latter balances single images less
        splitter = stratified if np.bincount(classes).max() >= folds else GroupKFold
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a class with fewer images than folds; it is no error here
            divided = splitter(folds, shuffle=True, random_state=seed).split(originals, classes, groups)
            for fold, (_, held_out) in enumerate(divided):
                if not len(held_out):
                    raise InputError(
                        f"--folds {folds}: a fold gets no images, because only {count} groups of training images can "
                        "be divided: choose fewer folds or another --seed"
                    )
                fold_of_row[originals[held_out]] = fold
    return fold_of_row[source]


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
