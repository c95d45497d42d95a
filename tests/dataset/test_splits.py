"""Splits, cross-validation folds, and the rows of augmented copies."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.classes import SPLITS, TASKS
from melanoma.dataset import splits
from melanoma.dataset.splits import (
    DIVIDE,
    DIVISION_2018,
    OFFICIAL,
    UNLABELLED,
    Division,
    Member,
    assign_folds,
    interleave,
    rows_to_copy,
)
from melanoma.errors import InputError
from melanoma.sources.records import Record, Source, Splits

import numpy as np
import pipeline
import pytest


def fake_records(counts: Mapping[str | None, tuple[int, int, int]]) -> Splits:
    """Records without files, with this number of images of each class."""
    labels = {split: np.repeat(range(3), of_class).tolist() for split, of_class in counts.items()}
    numbers = itertools.count()
    return {
        split: [Record(f"ISIC_{next(numbers):07d}", Path("a.jpg"), None, label) for label in of_split]
        for split, of_split in labels.items()
    }


def divide(images: Splits, name: str, seed: int = 0, per_group: int = 1) -> dict[str, list[Record]]:
    """Divides images of which `per_group` neighbours are a group."""
    sources = [Source(Path(), "", images)]
    division = Division(name, None, seed)
    group_of = {record: row // per_group for row, record in enumerate(division.images_to_read(sources))}
    return division.divide(sources, group_of)


def class_counts(records: list[Record]) -> tuple[int, ...]:
    counts = Counter(record.label for record in records)
    return tuple(counts[label] for label in range(3))


def ids(records: Iterable[Record]) -> list[str]:
    return sorted(record.id for record in records)


UNLABELLED_IMAGE = Record("unlabelled", Path("a.jpg"), None, None)

# ------------------------------------------------------------------------------------------------- division into splits


def test_division_of_2018_has_its_numbers() -> None:
    images = fake_records({"train": (1372, 374, 254), "val": (78, 30, 42), "test": (393, 117, 90)})
    assert {split: class_counts(records) for split, records in divide(images, DIVISION_2018).items()} == {
        "train": (1320, 332, 253),
        "val": (327, 130, 88),
        "test": (196, 59, 45),
    }


def test_division_of_fewer_images_as_in_2018_keeps_the_proportions() -> None:
    images = fake_records({"train": (900, 250, 180), "val": (22, 11, 13)})  # half of each class
    divided = divide(images, DIVISION_2018)
    expected = {"train": (660, 166, 126.5), "val": (163.5, 65, 44), "test": (98, 29.5, 22.5)}
    assert divided.keys() == expected.keys()
    for split, records in divided.items():
        assert class_counts(records) == pytest.approx(expected[split], abs=1.5)


def test_own_division_takes_a_tenth_and_a_fifth_of_each_class() -> None:
    divided = divide(fake_records({None: (100, 30, 20)}), DIVIDE)
    assert {split: class_counts(records) for split, records in divided.items()} == {
        "train": (70, 21, 14),
        "val": (10, 3, 2),
        "test": (20, 6, 4),
    }


@pytest.mark.parametrize("name", [DIVISION_2018, DIVIDE])
@pytest.mark.parametrize("counts", [(1372, 374, 254), (24, 9, 5), (1, 1, 1)])
@pytest.mark.parametrize("per_group", [1, 3])
def test_division_puts_every_image_into_one_split(name: str, counts: tuple[int, int, int], per_group: int) -> None:
    images = fake_records({"train": counts})
    assert ids(itertools.chain.from_iterable(divide(images, name, 0, per_group).values())) == ids(images["train"])


@pytest.mark.parametrize("name", [DIVISION_2018, DIVIDE])
def test_division_keeps_groups_together(name: str) -> None:
    images = fake_records({None: (300, 90, 60)})
    numbers = {record.id: row // 3 for row, record in enumerate(images[None])}
    groups = [{numbers[record.id] for record in records} for records in divide(images, name, 0, per_group=3).values()]
    assert len(groups) == 3 and sum(map(len, groups)) == len(set.union(*groups)) == 150


@pytest.mark.parametrize("name", [DIVISION_2018, DIVIDE])
def test_division_depends_on_the_seed_only(name: str) -> None:
    images = fake_records({"train": (100, 30, 20)})
    assert divide(images, name, 3) == divide(images, name, 3) != divide(images, name, 4)


def test_division_of_2018_leaves_unlabelled_images_out() -> None:
    images = fake_records({"train": (20, 20, 20)}) | {"test": [UNLABELLED_IMAGE]}
    assert sum(len(records) for records in divide(images, DIVISION_2018).values()) == 60


def test_division_of_2018_without_labels_is_refused() -> None:
    with pytest.raises(InputError, match="add labels"):
        divide({"train": [UNLABELLED_IMAGE]}, DIVISION_2018)


def test_groups_are_divided_in_proportion_if_any_of_several_orders_allows_it() -> None:
    """17 pairs and 6 single images, of 8 keratoses: most orders leave test or validation without one."""
    labels = [0, 2] * 5 + [0, 1] * 6 + [0, 0] * 5 + [1, 0, 1, 2, 2, 2]
    images = [Record(f"{row:02}", Path("a.jpg"), None, label) for row, label in enumerate(labels)]
    groups = {record: min(row // 2, 16) + max(0, row - 33) for row, record in enumerate(images)}
    sources = [Source(Path(), "", {None: images})]
    for seed in range(5):
        divided = Division(DIVIDE, None, seed).divide(sources, groups)
        assert class_counts(divided["test"]) == (4, 2, 2) and class_counts(divided["val"])[2] == 1


def test_unlabelled_images_beside_labelled_ones_are_for_test() -> None:
    images = fake_records({None: (20, 10, 10)})
    images[None] = [*images[None], *(Record(f"u{row}", Path("a.jpg"), None, None) for row in range(4))]
    divided = divide(images, DIVIDE)
    assert {split: sum(one.label is None for one in found) for split, found in divided.items()} == {
        "train": 0,
        "val": 0,
        "test": 4,
    }


@pytest.mark.parametrize(
    ("images", "name", "expected"),
    [
        (fake_records({"train": (1, 1, 1)}), OFFICIAL, "the source's own splits"),
        ({None: [UNLABELLED_IMAGE]}, OFFICIAL, "all images are for test, because they have neither split nor label"),
        (fake_records({None: (1, 1, 1)}), "val", "all images are for val"),
        (
            fake_records({None: (1, 1, 1)}),
            OFFICIAL,
            "70% train, 10% val, 20% test of each class, drawn with seed 7; "
            "lesions, patients and duplicates on one side",
        ),
    ],
)
def test_division_is_described(images: Splits, name: str, expected: str) -> None:
    assert Division(name, None, 7).describe([Source(Path(), "", images)]) == expected


def test_splits_of_the_source_are_official() -> None:
    images = fake_records({"train": (3, 2, 1), "test": (2, 1, 1)})
    assert {split: ids(found) for split, found in divide(images, OFFICIAL).items()} == {
        "train": ids(images["train"]),
        "test": ids(images["test"]),
    }


def test_labelled_source_without_splits_is_divided() -> None:
    images = fake_records({None: (50, 20, 10)})
    assert divide(images, OFFICIAL) == divide(images, DIVIDE)


def test_unlabelled_source_without_splits_is_for_test() -> None:
    assert divide({None: [UNLABELLED_IMAGE]}, OFFICIAL) == {"test": [UNLABELLED_IMAGE]}


def test_image_without_a_split_beside_others_is_for_train() -> None:
    divided = divide(fake_records({"val": (1, 1, 1)}) | {None: [UNLABELLED_IMAGE]}, OFFICIAL)
    assert divided["train"] == [UNLABELLED_IMAGE] and len(divided["val"]) == 3


@pytest.mark.parametrize("split", SPLITS)
def test_all_images_can_be_put_into_one_split(split: str) -> None:
    images = fake_records({"train": (3, 2, 1), None: (2, 1, 1)})
    assert {name: len(records) for name, records in divide(images, split).items()} == {split: 10}


def test_images_of_other_sources_are_added_to_train() -> None:
    base = fake_records({"train": (2, 1, 1), "val": (1, 1, 1)})
    sources = [Source(Path(), "", base), Source(Path(), "", {None: [UNLABELLED_IMAGE]})]
    division = Division(OFFICIAL, None, 0)
    group_of = {record: row for row, record in enumerate(division.images_to_read(sources))}
    divided = division.divide(sources, group_of)
    assert divided["train"][-1] == UNLABELLED_IMAGE
    assert {split: len(records) for split, records in divided.items()} == {"train": 5, "val": 3}


@pytest.mark.parametrize(("name", "expected"), [(OFFICIAL, ["train", "val"]), (DIVIDE, ["train", "val", "test"])])
def test_limit_gives_every_split_its_first_images_of_all_classes(name: str, expected: list[str]) -> None:
    sources = [Source(Path(), "", fake_records({"train": (200, 90, 60), "val": (20, 10, 10)}))]
    division = Division(name, 6, 0)
    to_read = division.images_to_read(sources)
    divided = division.divide(sources, {record: row for row, record in enumerate(to_read)})
    assert {split: len(records) for split, records in divided.items()} == dict.fromkeys(expected, 6)
    assert all(min(class_counts(records)) > 0 for records in divided.values())
    assert len(to_read) <= 60


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


def test_unlabelled_images_are_not_copied() -> None:
    assert set(rows_to_copy(np.array([UNLABELLED, 1, 2]), TASKS, 3)) == {1, 2}


def test_rows_that_are_their_own_source_are_originals() -> None:
    assert splits.are_original(np.array([0, 1, 1, 0, 1])).tolist() == [True, True, False, False, False]


def test_base_rows_are_the_originals_of_the_source(tmp_path: Path) -> None:
    pipeline.save_rows(tmp_path, "train", [0, 1, 2, 3, 1, 3], base=3)
    assert splits.base_rows(Store(tmp_path, contract.CLASSIFIER, {}), "train").tolist() == [0, 1, 2]
    assert splits.base_rows(Store(tmp_path, contract.CLASSIFIER, {"limit": 2}), "train").tolist() == [0, 1]


def test_split_without_labels_has_unlabelled_rows(tmp_path: Path) -> None:
    store = Store(tmp_path, contract.PREPROCESSING, {})
    store.save("ids", np.array(["a", "b"]), split="val")
    assert splits.load_labels(store, "val").tolist() == [UNLABELLED] * 2
    store.save("labels", np.array([2, UNLABELLED], np.int8), split="val")
    assert splits.load_labels(store, "val").tolist() == [2, UNLABELLED]


def test_originals_with_a_mask_are_found(tmp_path: Path) -> None:
    store = Store(tmp_path, contract.PREPROCESSING, {})
    assert splits.originals_with_mask(store, "val").tolist() == []
    for name, values in (
        ("ids", np.array(list("abcd"))),
        ("source", np.array([0, 1, 2, 2])),
        ("has_mask", np.array([True, False, True, True])),
        ("masks", np.zeros((4, 2, 2, 1), np.uint8)),
    ):
        store.save(name, values, split="val")
    assert splits.originals_with_mask(store, "val").tolist() == [0, 2]


# ---------------------------------------------------------------------------------------------------------------- folds


def rows_with_copies(counts: tuple[int, ...], times: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Source, groups of one image each, and labels of originals and, after them, of copies of the minority classes."""
    labels = np.repeat(range(len(counts)), counts)
    source = np.concatenate([np.arange(len(labels)), rows_to_copy(labels, TASKS, times)]).astype(int)
    return source, source, labels[source]


def groups_of(sizes: tuple[int, ...]) -> np.ndarray:
    """Groups of these sizes, in random order."""
    return np.random.default_rng(0).permutation(np.repeat(range(len(sizes)), sizes))


def random_labels(count: int) -> np.ndarray:
    """Labels of all classes; some images have none."""
    return np.random.default_rng(1).permutation(np.arange(count) % 4 - 1)


@pytest.mark.parametrize("labelled", [True, False])
def test_copies_are_in_the_fold_of_their_original(labelled: bool) -> None:
    source, groups, labels = rows_with_copies((13, 7, 3), 3.5)
    assigned = assign_folds(source, groups, labels if labelled else np.full(len(source), UNLABELLED), 5, seed=0)
    assert len(assigned) == len(source) > 23
    assert np.array_equal(assigned, assigned[source])
    assert sorted(np.bincount(assigned[:23]).tolist()) == [4, 4, 5, 5, 5]


@pytest.mark.parametrize("counts", [(61, 22, 15), (40, 40, 40), (98, 1, 1), (61, 22, 15, 12)])
def test_every_fold_has_as_many_originals_of_each_class(counts: tuple[int, ...]) -> None:
    source, groups, labels = rows_with_copies(counts, 3.5)
    total = sum(counts)
    for seed in range(10):
        assigned = assign_folds(source, groups, labels - 1, 5, seed)[:total]  # the first class is UNLABELLED
        numbers = np.array([np.bincount(labels[:total][assigned == fold], minlength=len(counts)) for fold in range(5)])
        assert numbers.sum(axis=0).tolist() == list(counts)
        assert np.ptp(numbers, axis=0).max() <= 1 and np.ptp(numbers.sum(axis=1)) <= 1


@pytest.mark.parametrize("sizes", [(1,) * 10 + (2,) * 10, (5,) * 6, (20, *(1,) * 20), (2, 2, 1)])
@pytest.mark.parametrize("labelled", [True, False])
def test_groups_and_their_copies_are_in_one_fold(sizes: tuple[int, ...], labelled: bool) -> None:
    groups = groups_of(sizes)
    labels = random_labels(len(groups)) if labelled else np.full(len(groups), UNLABELLED)
    source = np.concatenate([np.arange(len(groups)), rows_to_copy(labels, TASKS, 3)]).astype(int)
    assigned = assign_folds(source, groups[source], labels[source], 3, seed=0)
    for group in set(groups.tolist()):
        assert len(set(assigned[groups[source] == group].tolist())) == 1
    assert set(assigned.tolist()) == {0, 1, 2}
    assert np.array_equal(assigned, assigned[source])


def test_folds_of_pairs_have_nearly_as_many_images_of_each_class() -> None:
    groups, labels = np.repeat(np.arange(60), 2), np.repeat([UNLABELLED, 0, 1, 2], (20, 60, 20, 20))
    assigned = assign_folds(np.arange(120), groups, labels, 5, seed=0)
    numbers = np.array([np.bincount(labels[assigned == fold] + 1, minlength=4) for fold in range(5)])
    assert np.ptp(numbers, axis=0).max() <= 2  # one pair


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("per_group", [1, 2])
def test_folds_depend_on_the_seed_only(labelled: bool, per_group: int) -> None:
    source, groups, labels = rows_with_copies((13, 7, 3), 1)
    labels = labels if labelled else np.full(len(source), UNLABELLED)
    first, again, other = (assign_folds(source, groups // per_group, labels, 5, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_class_with_fewer_images_than_folds_is_spread_over_the_folds() -> None:
    source, groups, labels = rows_with_copies((13, 7, 3), 1)
    assigned = assign_folds(source, groups, labels, 5, seed=0)
    assert len(set(assigned[labels == 2])) == 3


def test_there_may_be_as_many_folds_as_originals() -> None:
    assert sorted(assign_folds(*rows_with_copies((2, 2, 1), 3.5), 5, seed=0)[:5].tolist()) == [0, 1, 2, 3, 4]


def test_single_fold_holds_all_rows() -> None:
    source, groups, labels = rows_with_copies((2, 2, 1), 3.5)
    assert assign_folds(source, groups, labels, 1, seed=0).tolist() == [0] * len(source)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([0, 1, 2, 0], "--folds 4 is more than the 3 training images: choose fewer folds"),
        ([5, 5, 8, 5], "--folds 3 is more than the 2 groups of training images that stay together"),
    ],
)
def test_more_folds_than_groups_are_refused(groups: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        assign_folds(np.array([0, 1, 2, 0]), np.array(groups), np.array([0, 1, 0, 0]), int(message.split()[1]), 0)


def test_fold_without_images_is_refused() -> None:
    """Nearly as many folds as groups, which differ in size and class: the stratification may leave a fold empty."""
    groups, labels = np.repeat(range(4), (2, 2, 1, 4)), np.array([0, 0, 2, 2, 2, 2, 2, 2, 0])
    with pytest.raises(InputError, match="--folds 4: a fold gets no images"):
        assign_folds(np.arange(9), groups, labels, 4, seed=4)


# Rows 6 to 8 are of --extra, the last of them in a group with row 2. Rows 9 to 12 are copies.
WITH_EXTRA = np.array([*range(9), 1, 2, 6, 8])
GROUPS_WITH_EXTRA = np.array([*range(8), 2])[WITH_EXTRA]
EXTRA = np.isin(WITH_EXTRA, [6, 7, 8])


def test_extra_images_are_held_out_only_with_images_of_their_group() -> None:
    labels = WITH_EXTRA % 3
    assigned = assign_folds(WITH_EXTRA, GROUPS_WITH_EXTRA, labels, 3, 0, EXTRA).tolist()
    assert assigned[:6] == assign_folds(WITH_EXTRA[:6], GROUPS_WITH_EXTRA[:6], labels[:6], 3, 0).tolist()
    assert assigned[6:8] == [splits.NEVER_HELD_OUT] * 2 and assigned[8] == assigned[2]
    assert assigned[9:] == [assigned[row] for row in (1, 2, 6, 8)]


def test_single_fold_holds_the_images_of_the_source() -> None:
    assigned = assign_folds(WITH_EXTRA, GROUPS_WITH_EXTRA, WITH_EXTRA % 3, 1, 0, EXTRA)
    assert set(assigned[~EXTRA]) == {0} and assigned[6:8].tolist() == [splits.NEVER_HELD_OUT] * 2


def test_without_images_of_the_source_nothing_can_be_held_out() -> None:
    source, extra = np.array([0, 1, 1]), np.ones(3, bool)
    assert assign_folds(source, source, source, 1, 0, extra).tolist() == [splits.NEVER_HELD_OUT] * 3
    with pytest.raises(InputError, match="--folds 2 is more than the 0 training images"):
        assign_folds(source, source, source, 2, 0, extra)


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
