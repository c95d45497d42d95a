"""Splits, cross-validation folds, and the rows of augmented copies.

The rows of a split are its original images, then the augmented copies. `source` holds the row of each row's original.
"""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from melanoma.artifacts.store import Store
from melanoma.classes import SPLITS
from melanoma.errors import InputError
from melanoma.sources.records import Record, Source, Splits

import numpy as np

OFFICIAL, DIVIDE, DIVISION_2018 = "official", "divide", "2018"
DIVISIONS = (OFFICIAL, DIVIDE, DIVISION_2018, *SPLITS)
ORDERS = 20  # of groups that are tried
PARTS = {"val": 0.1, "test": 0.2}  # of the images of each class; the rest is for train

# Images per class (nevus, melanoma, keratosis) in the 2018 repository: all 2750, and those of validation and test.
POOL_2018 = (1843, 521, 386)
PARTS_2018 = {"val": (327, 130, 88), "test": (196, 59, 45)}

NEVER_HELD_OUT = -2  # fold of images that every network is trained on
UNLABELLED = -1  # instead of a class, in the labels of a split of which only some images have a label


@dataclass(frozen=True)
class Member:
    """One network of an ensemble."""

    name: str  # suffix of its files' names, e.g. _fold1_seed2; empty for a single network
    fold: int  # fold that it is not trained on; -1: it is trained on all images
    seed: int  # of its training


@dataclass(frozen=True)
class Division:
    """How the images of data sets are divided into train, validation and test.

    Attributes:
        name: one of DIVISIONS. OFFICIAL: the source's own splits; images without a split are divided as by DIVIDE if
            any of them is labelled, else they are for test; if only some images have no split, they are for train.
            DIVIDE: all are pooled, and PARTS of each class go to validation and test. DIVISION_2018: all labelled
            images are pooled and divided in the numbers of the 2018 repository. A split: all images are for it.
        limit: maximum number of images per split, and of each source that is added to train; None: no maximum.
        seed: seed of the random division.
    """

    name: str
    limit: int | None
    seed: int

    def describe(self, sources: Sequence[Source]) -> str:
        """How the images are divided, for log and model card."""
        together = f"drawn with seed {self.seed}; lesions, patients and duplicates on one side"
        base = sources[0].splits
        if self.name in SPLITS:
            return f"all images are for {self.name}"
        if self.name == DIVISION_2018:
            return f"as in 2018, {together}"
        if self.name == OFFICIAL and any(split for split in base):
            return "the source's own splits"
        if self.name == OFFICIAL and all(record.label is None for record in sources[0].records):
            return "all images are for test, because they have neither split nor label"
        parts = {"train": 1 - sum(PARTS.values()), **PARTS}
        return ", ".join(f"{part:.0%} {split}" for split, part in parts.items()) + f" of each class, {together}"

    def images_to_read(self, sources: Sequence[Source]) -> list[Record]:
        """The images of which `divide` chooses, in a fixed order: all, or with a limit enough of each class."""
        base, *extra = sources
        chosen = [interleave(found)[: self._candidate_limit(split)] for split, found in self._candidates(base).items()]
        chosen += [self._first(source.records) for source in extra]
        return [record for records in chosen for record in sorted(records, key=by_id)]

    def _candidates(self, source: Source) -> Splits:
        if self.name in (DIVIDE, DIVISION_2018):
            return {None: source.records}
        order = (*SPLITS, None)
        return {split: source.splits[split] for split in order if split in source.splits}

    def _candidate_limit(self, split: str | None) -> int | None:
        if self.limit is None or split is not None:
            return self.limit
        return round(self.limit / min(PARTS.values()))  # for the smallest part

    def divide(self, sources: Sequence[Source], group_of: Mapping[Record, int]) -> dict[str, list[Record]]:
        """Images by split, classes alternating; images of one group stay together, except in a source's own splits.

        Args:
            sources: the images of the first are divided, those of the others are for train.
            group_of: number of the group of each image of `images_to_read`.

        Raises:
            InputError: no image is labelled, and the division is that of 2018.
        """
        base, *extra = sources
        candidates = {
            split: [record for record in records if record in group_of] for split, records in base.splits.items()
        }
        divided = {split: self._first(records) for split, records in self._divide(candidates, group_of).items()}
        for source in extra:
            added = self._first([record for record in source.records if record in group_of])
            divided["train"] = divided.get("train", []) + added
        return {split: divided[split] for split in SPLITS if divided.get(split)}

    def _first(self, records: Sequence[Record]) -> list[Record]:
        return interleave(sorted(records, key=by_id))[: self.limit]

    def _divide(self, splits: Splits, group_of: Mapping[Record, int]) -> dict[str, list[Record]]:
        pool = [record for split in (*SPLITS, None) for record in splits.get(split, [])]
        if self.name in SPLITS:
            return {self.name: pool}
        if self.name == DIVISION_2018:
            pool = [record for record in pool if record.label is not None]
            if not pool:
                raise InputError("--split 2018 divides labelled images, and there are none: add labels (docs/data.md)")
        if self.name == OFFICIAL:
            undecided = splits.get(None, [])
            given = {split: list(splits[split]) for split in SPLITS if splits.get(split)}
            if given:
                return given | {"train": given.get("train", []) + undecided}
            if all(record.label is None for record in undecided):
                return {"test": undecided}
        return _fill(pool, _part_sizes(pool, self.name), group_of, self.seed)


def _part_sizes(pool: Sequence[Record], division: str) -> dict[str, Counter[int | None]]:
    """How many images of each class validation and test get."""
    available = Counter(record.label for record in pool)
    if division == DIVISION_2018:
        scales = [min(1.0, available[label] / count) for label, count in enumerate(POOL_2018)]
        return {
            split: Counter({label: round(count * scales[label]) for label, count in enumerate(counts)})
            for split, counts in PARTS_2018.items()
        }
    sizes = {
        split: Counter({label: round(part * count) for label, count in available.items()})
        for split, part in PARTS.items()
    }
    if len(available) > 1 and None in available:  # beside labelled images, those without a label are for prediction
        sizes["val"][None], sizes["test"][None] = 0, available[None]
    return sizes


def _fill(
    pool: Sequence[Record], sizes: Mapping[str, Counter[int | None]], group_of: Mapping[Record, int], seed: int
) -> dict[str, list[Record]]:
    """Puts every group, in random order, into the first split that has room for all its images, else into train.

    Of several orders, that one counts which leaves the least room in validation and test.
    """
    rng, best, least = np.random.default_rng(seed), dict[str, list[Record]](), np.inf
    for _ in range(ORDERS):
        groups: dict[int, list[Record]] = {}
        for row in rng.permutation(len(pool)):
            groups.setdefault(group_of[pool[row]], []).append(pool[row])
        divided: dict[str, list[Record]] = {split: [] for split in SPLITS}
        room = {split: Counter(counts) for split, counts in sizes.items()}
        for group in groups.values():
            needed = Counter(record.label for record in group)
            split = next((split for split, free in room.items() if needed <= free), "train")
            divided[split] += group
            if split in room:
                room[split] -= needed
        # Relative to what each class should have: a rare class must not be absent.
        left = sum(free[label] / sizes[split][label] for split, free in room.items() for label in free if free[label])
        if left < least:
            best, least = divided, left
        if not left:
            break
    return best


def by_id(record: Record) -> str:
    """Sort key."""
    return record.id


def interleave(records: list[Record]) -> list[Record]:
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


def base_rows(store: Store, split: str) -> np.ndarray:
    """Rows of a split that are original images of --source, int (K,): the first ones."""
    original = are_original(store.load("source", split=split))
    return np.flatnonzero(original & (store.load("origin", split=split) == 0))


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
        seed: seed of the first network of each fold; the others count up from it, and from 2**32 - 1 to 0.
    """
    return [
        Member(
            name=(fold_name(fold) if folds > 1 else "") + (f"_seed{number}" if seeds > 1 else ""),
            fold=fold if folds > 1 else -1,
            seed=number,
        )
        for fold in range(folds)
        for number in ((seed + count) % 2**32 for count in range(seeds))  # NumPy and Keras accept no larger seed
    ]


def fold_name(fold: int) -> str:
    """The part of a member's name that says its fold."""
    return f"_fold{fold + 1}"


def assign_folds(
    source: np.ndarray, groups: np.ndarray, classes: np.ndarray, folds: int, seed: int, extra: np.ndarray | None = None
) -> np.ndarray:
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
        extra: bool (N,), rows that are trained on in every fold, unless an image of their group is held out; None:
            there are none.

    Returns:
        int (N,), 0 to folds - 1, or NEVER_HELD_OUT.

    Raises:
        InputError: there are fewer groups than folds, or a fold gets no images.
    """
    if extra is not None and extra.any():
        return _assign_around_extra(source, groups, classes, folds, seed, extra)
    originals = np.flatnonzero(are_original(source))
    groups, classes = np.asarray(groups)[originals], np.unique(np.asarray(classes)[originals], return_inverse=True)[1]
    count = len(np.unique(groups))
    one_image_each = count == len(originals)
    if count < folds and folds > 1:
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


def _assign_around_extra(
    source: np.ndarray, groups: np.ndarray, classes: np.ndarray, folds: int, seed: int, extra: np.ndarray
) -> np.ndarray:
    """`assign_folds` of the rows that are not extra; the others follow their group or are never held out."""
    base = np.flatnonzero(are_original(source) & ~extra)
    fold_of_group = dict(
        zip(
            groups[base].tolist(),
            assign_folds(np.arange(len(base)), groups[base], classes[base], folds, seed).tolist(),
            strict=True,
        )
    )
    return np.array([fold_of_group.get(group, NEVER_HELD_OUT) for group in np.asarray(groups).tolist()])


def load_folds(store: Store, folds: int, seed: int) -> np.ndarray:
    """The fold of every row of train in a cross-validation of classifiers, see `assign_folds`."""
    source, groups, labels, origin = (
        store.load(name, split="train") for name in ("source", "groups", "labels", "origin")
    )
    return assign_folds(source, groups, labels, folds, seed, origin > 0)


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
