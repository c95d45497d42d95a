"""The rows and arrays of a split."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.classes import KERATOSIS, MELANOMA, NEVUS
from melanoma.dataset import arrays, augment
from melanoma.dataset.splits import UNLABELLED
from melanoma.sources.records import Record

import numpy as np
import pytest

SIZE = 4  # pixels


def record(name: str, label: int | None, mask: Path | None = None) -> Record:
    return Record(name, Path(f"{name}.jpg"), mask, label)


TRAIN = [record("a", NEVUS), record("b", MELANOMA), record("c", KERATOSIS)]


def test_train_has_augmented_copies_of_the_minority_classes_after_the_originals() -> None:
    rows = arrays.plan_rows(TRAIN, "train", times=3)
    assert [row.record.id for row in rows] == list("abcbbcc")
    assert [row.source for row in rows] == [0, 1, 2, 1, 1, 2, 2]
    assert [row.copy for row in rows] == [None, None, None, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("records", "split", "times"),
    [(TRAIN, "val", 3), (TRAIN, "train", 1), ([record("a", None), record("b", None)], "train", 3)],
)
def test_other_splits_and_unlabelled_images_have_no_copies(records: list[Record], split: str, times: float) -> None:
    rows = arrays.plan_rows(records, split, times)
    assert rows == [arrays.Row(record, row, None) for row, record in enumerate(records)]


def test_unlabelled_images_beside_labelled_ones_have_no_copies() -> None:
    rows = arrays.plan_rows([record("a", None), record("b", MELANOMA)], "train", times=3)
    assert [row.source for row in rows] == [0, 1, 1, 1]


def store(folder: Path) -> Store:
    return Store(folder, contract.PREPROCESSING, {})


def pixels(count: int, mask: bool) -> Iterator[augment.ImageAndMask]:
    for value in range(count):
        image = np.full((SIZE, SIZE, 3), value, np.uint8)
        yield image, np.full((SIZE, SIZE, 1), value % 2, np.uint8) if mask else None


def failing() -> Iterator[augment.ImageAndMask]:
    yield from pixels(1, mask=False)
    raise RuntimeError


def write(data: Store, split: str, rows: list[arrays.Row], values: Iterator[augment.ImageAndMask]) -> list[str]:
    """Writes a split whose images are each a group of their own, numbered from 7; the first is of --source."""
    numbers = {
        "groups": {row.record: 7 + row.source for row in rows},
        "origin": {row.record: row.source for row in rows},
    }
    with contextlib.ExitStack() as files:
        return arrays.write_split(data, files, split, rows, values, numbers)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_split_has_the_arrays_that_its_source_allows(labelled: bool, masked: bool, tmp_path: Path) -> None:
    records = [record(name, MELANOMA if labelled else None, Path("m.png") if masked else None) for name in "ab"]
    data = store(tmp_path)
    names = write(data, "val", arrays.plan_rows(records, "val", 1), pixels(2, masked))
    always = {"ids", "source", "groups", "origin", "images"}
    assert set(names) == {*always, *["labels"] * labelled, *["masks", "has_mask"] * masked}
    assert data.load("ids", split="val").tolist() == ["a", "b"]
    assert data.load("images", split="val")[:, 0, 0, 0].tolist() == [0, 1]
    assert data.has("labels", split="val") == labelled
    assert data.has("masks", split="val") == data.has("has_mask", split="val") == masked


def test_rows_without_label_or_mask_are_marked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    mask = Path("m.png")
    rows = arrays.plan_rows([record("a", None, mask), record("b", MELANOMA), record("c", NEVUS, mask)], "train", 2)
    data, image = store(tmp_path), np.zeros((SIZE, SIZE, 3), np.uint8)
    lesion = np.ones((SIZE, SIZE, 1), np.uint8)
    write(data, "train", rows, iter([(image, lesion), (image, None), (image, lesion), (image, None)]))
    found = {name: data.load(name, split="train") for name in ("source", "labels", "has_mask", "masks")}
    numbers = [data.load(name, split="train").tolist() for name in ("groups", "origin")]
    assert found["source"].tolist() == [0, 1, 2, 1] and numbers == [[7, 8, 9, 8], [0, 1, 2, 1]]
    assert found["labels"].tolist() == [UNLABELLED, MELANOMA, NEVUS, MELANOMA]
    assert found["has_mask"].tolist() == [True, False, True, False]
    assert found["masks"].any(axis=(1, 2, 3)).tolist() == [True, False, True, False]
    assert "3 images, 1 of them without label, 1 of them without mask, 1 augmented copies" in caplog.text


def test_error_keeps_the_arrays_of_an_earlier_run(tmp_path: Path) -> None:
    data = store(tmp_path)
    write(data, "val", arrays.plan_rows([record("a", None)], "val", 1), pixels(1, mask=False))
    with pytest.raises(RuntimeError):
        write(data, "val", arrays.plan_rows([record("b", None)], "val", 1), failing())
    assert data.load("ids", split="val").tolist() == ["a"]


def test_arrays_of_an_earlier_run_that_were_not_written_again_are_removed(tmp_path: Path) -> None:
    data, again = store(tmp_path), {"ids", "source", "groups", "origin", "images"}
    for split in ("val", "test"):
        rows = arrays.plan_rows([record("a", NEVUS, Path("m.png"))], split, 1)
        names = write(data, split, rows, pixels(1, mask=True))
    arrays.remove_others(data, {"val": list(again)})
    assert data.splits() == ["val"]
    assert {name for name in names if data.has(name, split="val")} == again < set(names)
    assert not any(data.has(name, split="test") for name in names)
