"""Splits, cross-validation folds, and the rows of augmented copies."""

import itertools
from collections import Counter
from pathlib import Path

from melanoma.artifacts import contract
from melanoma.classes import TASKS
from melanoma.dataset import splits
from melanoma.dataset.splits import COPY_SUFFIX, Member, assign_folds, divide_2018, interleave, rows_to_copy
from melanoma.errors import InputError
from melanoma.sources.isic import Record

import numpy as np
import pytest


def fake_records(counts: dict[str, tuple[int, int, int]]) -> dict[str, list[Record]]:
    """Records without files, with this number of images of each class."""
    labels = {split: np.repeat(range(3), of_class).tolist() for split, of_class in counts.items()}
    numbers = itertools.count()
    return {
        split: [Record(f"ISIC_{next(numbers):07d}", Path("a.jpg"), None, label) for label in of_split]
        for split, of_split in labels.items()
    }


def class_counts(records: list[Record]) -> tuple[int, ...]:
    counts = Counter(record.label for record in records)
    return tuple(counts[label] for label in range(3))


# ----------------------------------------------------------------------------------------------------- division of 2018


def test_division_of_2018_has_its_numbers() -> None:
    divided = divide_2018(fake_records({"train": (1372, 374, 254), "val": (78, 30, 42), "test": (393, 117, 90)}), 0)
    assert {split: class_counts(records) for split, records in divided.items()} == {
        "train": (1320, 332, 253),
        "val": (327, 130, 88),
        "test": (196, 59, 45),
    }


def test_division_of_fewer_images_keeps_the_proportions() -> None:
    divided = divide_2018(fake_records({"train": (900, 250, 180), "val": (22, 11, 13)}), seed=0)  # half of each class
    expected = {"train": (660, 166, 126.5), "val": (163.5, 65, 44), "test": (98, 29.5, 22.5)}
    assert divided.keys() == expected.keys()
    for split, records in divided.items():
        assert class_counts(records) == pytest.approx(expected[split], abs=1.5)


@pytest.mark.parametrize("counts", [(1372, 374, 254), (24, 9, 5), (1, 1, 1)])
def test_division_puts_every_image_into_one_split(counts: tuple[int, int, int]) -> None:
    official = fake_records({"train": counts})
    divided = divide_2018(official, seed=0)
    ids = [record.id for record in itertools.chain.from_iterable(divided.values())]
    assert sorted(ids) == [record.id for record in official["train"]]


def test_division_depends_on_the_seed_only() -> None:
    official = fake_records({"train": (100, 30, 20)})
    assert divide_2018(official, 3) == divide_2018(official, 3) != divide_2018(official, 4)


def test_division_leaves_unlabelled_images_out() -> None:
    official = fake_records({"train": (20, 20, 20)})
    official["test"] = [Record("unlabelled", Path("a.jpg"), None, None)]
    divided = divide_2018(official, 0)
    assert sum(len(records) for records in divided.values()) == 60


def test_division_without_labels_is_refused() -> None:
    with pytest.raises(InputError, match="add a label file"):
        divide_2018({"train": [Record("unlabelled", Path("a.jpg"), None, None)]}, 0)


def test_division_needs_masks_of_all_images_or_of_none() -> None:
    official = fake_records({"train": (3, 3, 3)})
    official["val"] = [Record("masked", Path("a.jpg"), Path("a.png"), 0)]
    with pytest.raises(InputError, match="all or none of them must have a mask folder"):
        divide_2018(official, 0)


def test_interleaved_records_begin_with_every_class() -> None:
    records = fake_records({"train": (7, 3, 2)})["train"]
    interleaved = interleave(records)
    assert [record.label for record in interleaved] == [0, 1, 2, 0, 1, 2, 0, 1, 0, 0, 0, 0]
    assert sorted(interleaved, key=lambda record: record.id) == records


# ----------------------------------------------------------------------------------------------------- augmented copies


@pytest.mark.parametrize(("count", "expected"), [(1, 4), (2, 7), (3, 10), (10, 35), (254, 889), (374, 1309)])
def test_minority_gets_three_and_a_half_times_as_many_images(count: int, expected: int) -> None:
    labels = np.repeat([0, 1, 2], [50, count, 2])
    rows = rows_to_copy(labels, (1,), 3.5)
    assert count + len(rows) == expected
    assert set(labels[rows]) == {1}


def test_originals_are_copied_in_turn() -> None:
    rows = rows_to_copy(np.array([0, 1, 2, 1, 0]), TASKS, 3.5)
    assert np.bincount(rows, minlength=5).tolist() == [0, 3, 3, 2, 0]


def test_factor_one_and_missing_classes_give_no_copies() -> None:
    assert rows_to_copy(np.array([0, 1, 2]), TASKS, 1.0) == []
    assert rows_to_copy(np.array([0, 0]), TASKS, 3.5) == []


def test_copies_lead_to_their_originals() -> None:
    ids = ["b", "a", f"a{COPY_SUFFIX}1", f"b{COPY_SUFFIX}2", f"a{COPY_SUFFIX}13"]
    assert [splits.original_id(row_id) for row_id in ids] == ["b", "a", "a", "b", "a"]
    assert splits.are_original(ids).tolist() == [True, True, False, False, False]
    assert splits.original_rows(ids).tolist() == [0, 1, 1, 0, 1]


# ---------------------------------------------------------------------------------------------------------------- folds


def rows_with_copies(counts: tuple[int, int, int], times: float) -> tuple[list[str], np.ndarray]:
    """Ids and labels of originals and, after them, of the copies of the minority classes."""
    labels = np.repeat([0, 1, 2], counts)
    ids = [f"ISIC_{number:07d}" for number in range(len(labels))]
    copied = rows_to_copy(labels, TASKS, times)
    copies = [f"{ids[row]}{COPY_SUFFIX}{number}" for number, row in enumerate(copied)]
    return ids + copies, np.concatenate([labels, labels[copied]])


@pytest.mark.parametrize("labelled", [True, False])
def test_copies_are_in_the_fold_of_their_original(labelled: bool) -> None:
    ids, labels = rows_with_copies((13, 7, 3), 3.5)
    assigned = assign_folds(ids, labels if labelled else None, 5, seed=0)
    assert len(assigned) == len(ids) > 23
    assert np.array_equal(assigned, assigned[splits.original_rows(ids)])
    assert sorted(np.bincount(assigned[:23]).tolist()) == [4, 4, 5, 5, 5]


def test_every_fold_has_as_many_originals_of_each_class() -> None:
    ids, labels = rows_with_copies((61, 22, 15), 3.5)
    assigned = assign_folds(ids, labels, 5, seed=0)[:98]
    counts = np.array([np.bincount(labels[:98][assigned == fold], minlength=3) for fold in range(5)])
    assert counts.sum(axis=0).tolist() == [61, 22, 15]
    assert np.ptp(counts, axis=0).max() <= 1 and np.ptp(counts.sum(axis=1)) <= 1


@pytest.mark.parametrize("labelled", [True, False])
def test_folds_depend_on_the_seed_only(labelled: bool) -> None:
    ids, labels = rows_with_copies((13, 7, 3), 1)
    first, again, other = (assign_folds(ids, labels if labelled else None, 5, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_class_with_fewer_images_than_folds_is_spread_over_the_folds() -> None:
    ids, labels = rows_with_copies((13, 7, 3), 1)
    assigned = assign_folds(ids, labels, 5, seed=0)
    assert len(set(assigned[labels == 2])) == 3


def test_there_may_be_as_many_folds_as_originals() -> None:
    ids, labels = rows_with_copies((2, 2, 1), 3.5)
    assert sorted(assign_folds(ids, labels, 5, seed=0)[:5].tolist()) == [0, 1, 2, 3, 4]


def test_single_fold_holds_all_rows() -> None:
    ids, labels = rows_with_copies((2, 2, 1), 3.5)
    assert assign_folds(ids, labels, 1, seed=0).tolist() == [0] * len(ids)


def test_more_folds_than_originals_are_refused() -> None:
    with pytest.raises(InputError, match="--folds 3 is more than the 2 training images"):
        assign_folds(["a", "b", f"a{COPY_SUFFIX}1"], np.array([0, 1, 0]), 3, 0)


# -------------------------------------------------------------------------------------------------------------- members


def test_members_have_distinct_names_that_the_contract_accepts() -> None:
    for folds, seeds in itertools.product((1, 3), (1, 2)):
        members = splits.list_members(folds, seeds, 5)
        assert len({member.name for member in members}) == folds * seeds
        assert all(contract.MEMBER_NAME.fullmatch(member.name) for member in members)


def test_every_fold_has_a_member_of_each_seed() -> None:
    assert splits.list_members(1, 1, 5) == [Member("", -1, 5)]
    assert [member.seed for member in splits.list_members(1, 3, 2**32 - 2)] == [2**32 - 2, 2**32 - 1, 0]
    assert splits.list_members(2, 2, 5) == [
        Member("_fold1_seed5", 0, 5),
        Member("_fold1_seed6", 0, 6),
        Member("_fold2_seed5", 1, 5),
        Member("_fold2_seed6", 1, 6),
    ]


def test_rows_of_a_fold_are_unseen_by_its_members_only() -> None:
    unseen = splits.out_of_fold_mask(splits.list_members(2, 2, 0), np.array([0, 1, 0]))
    assert unseen is not None
    assert unseen.tolist() == [[True, True, False, False], [False, False, True, True], [True, True, False, False]]
    assert splits.out_of_fold_mask(splits.list_members(1, 2, 0), np.array([0, 0, 0])) is None
