"""The rows and arrays of a split."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.classes import KERATOSIS, MELANOMA, NEVUS
from melanoma.dataset import arrays, augment
from melanoma.sources import isic

import numpy as np
import pytest

SIZE = 4  # pixels


def record(name: str, label: int | None, mask: Path | None = None) -> isic.Record:
    return isic.Record(name, Path(f"{name}.jpg"), mask, label)


TRAIN = [record("a", NEVUS), record("b", MELANOMA), record("c", KERATOSIS)]


def test_train_has_augmented_copies_of_the_minority_classes_after_the_originals() -> None:
    rows = arrays.plan_rows(TRAIN, "train", times=3)
    assert [row.id for row in rows] == ["a", "b", "c", "b_copy1", "b_copy2", "c_copy3", "c_copy4"]


@pytest.mark.parametrize(
    ("records", "split", "times"),
    [(TRAIN, "val", 3), (TRAIN, "train", 1), ([record("a", None), record("b", None)], "train", 3)],
)
def test_other_splits_and_unlabelled_images_have_no_copies(
    records: list[isic.Record], split: str, times: float
) -> None:
    assert arrays.plan_rows(records, split, times) == [arrays.Row(record, None) for record in records]


def store(folder: Path) -> Store:
    return Store(folder, contract.PREPROCESSING, {})


def pixels(count: int, mask: bool) -> Iterator[augment.ImageAndMask]:
    for value in range(count):
        image = np.full((SIZE, SIZE, 3), value, np.uint8)
        yield image, np.full((SIZE, SIZE, 1), value % 2, np.uint8) if mask else None


def failing() -> Iterator[augment.ImageAndMask]:
    yield from pixels(1, mask=False)
    raise RuntimeError


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_split_has_the_arrays_that_its_source_allows(labelled: bool, masked: bool, tmp_path: Path) -> None:
    records = [record(name, MELANOMA if labelled else None, Path("m.png") if masked else None) for name in "ab"]
    rows = arrays.plan_rows(records, "val", 1)
    data = store(tmp_path)
    with contextlib.ExitStack() as files:
        names = arrays.write_split(data, files, "val", rows, pixels(2, masked), SIZE)
    assert set(names) == {"ids", "images", *["labels"] * labelled, *["masks"] * masked}
    assert data.load("ids", split="val").tolist() == ["a", "b"]
    assert data.load("images", split="val")[:, 0, 0, 0].tolist() == [0, 1]
    assert data.has("labels", split="val") == labelled and data.has("masks", split="val") == masked


def test_error_keeps_the_arrays_of_an_earlier_run(tmp_path: Path) -> None:
    data = store(tmp_path)
    first, second = (arrays.plan_rows([record(name, None)], "val", 1) for name in "ab")
    with contextlib.ExitStack() as files:
        arrays.write_split(data, files, "val", first, pixels(1, mask=False), SIZE)
    with pytest.raises(RuntimeError), contextlib.ExitStack() as files:
        arrays.write_split(data, files, "val", second, failing(), SIZE)
    assert data.load("ids", split="val").tolist() == ["a"]


def test_arrays_of_an_earlier_run_that_were_not_written_again_are_removed(tmp_path: Path) -> None:
    data = store(tmp_path)
    for split in ("val", "test"):
        with contextlib.ExitStack() as files:
            rows = arrays.plan_rows([record("a", NEVUS)], split, 1)
            names = arrays.write_split(data, files, split, rows, pixels(1, mask=False), SIZE)
    arrays.remove_others(data, {"val": [name for name in names if name != "labels"]})
    assert data.splits() == ["val"]
    assert data.has("images", split="val") and not data.has("labels", split="val")
