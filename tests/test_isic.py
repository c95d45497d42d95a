"""The official layout: what is read, what is refused, and how it is divided."""

import shutil
from collections import Counter
from itertools import chain
from pathlib import Path

from melanoma import isic
from melanoma.errors import InputError

import numpy as np
import pipeline
import pytest

Splits = dict[str, list[isic.Record]]
HEADER = "image_id,melanoma,seborrheic_keratosis\n"


def label_csv(folder: Path, content: str, encoding: str = "utf-8") -> Path:
    path = folder / "labels.csv"
    path.write_bytes(content.encode(encoding))
    return path


def fake(counts: dict[str, tuple[int, int, int]]) -> Splits:
    """Records without files, with so many of each class."""
    number = 0
    splits: Splits = {}
    for split, of_class in counts.items():
        splits[split] = []
        for label, count in enumerate(of_class):
            for _ in range(count):
                splits[split].append(isic.Record(f"ISIC_{number:07d}", Path("a.jpg"), None, label))
                number += 1
    return splits


def of_each_class(records: list[isic.Record]) -> tuple[int, ...]:
    counts = Counter(record.label for record in records)
    return tuple(counts[label] for label in range(3))


def test_official_layout_is_read(source: Path) -> None:
    splits = isic.read_source(source)
    assert {split: len(records) for split, records in splits.items()} == pipeline.COUNTS
    for split, records in splits.items():
        assert [record.id for record in records] == sorted(record.id for record in records)
        for record in records:
            assert record.image == isic.image_folder(source, split) / f"{record.id}.jpg"
            assert record.mask == isic.mask_folder(source, split) / f"{record.id}_segmentation.png"
            assert record.image.is_file() and record.mask.is_file()
    labels = isic.read_labels(isic.label_file(source, "train"))
    assert {record.id: record.label for record in splits["train"]} == labels
    assert min(of_each_class(splits["train"])) > 0


def test_folders_have_the_official_names() -> None:
    assert isic.image_folder(Path("x"), "test") == Path("x/ISIC-2017_Test_v2_Data")
    assert isic.mask_folder(Path("x"), "val") == Path("x/ISIC-2017_Validation_Part1_GroundTruth")
    assert isic.label_file(Path("x"), "train") == Path("x/ISIC-2017_Training_Part3_GroundTruth.csv")


def test_superpixels_and_other_files_are_no_photographs(own_source: Path) -> None:
    before = isic.read_split(own_source, "val")
    folder, photograph = isic.image_folder(own_source, "val"), before[0].image
    shutil.copy(photograph, folder / f"{photograph.stem}_superpixels.png")
    (folder / "ATTRIBUTION.txt").touch()
    assert isic.read_split(own_source, "val") == before


def test_capital_suffix_is_a_photograph(own_source: Path) -> None:
    photograph = isic.read_split(own_source, "val")[0].image
    photograph.rename(photograph.with_suffix(".JPG"))
    assert isic.read_split(own_source, "val")[0].image.name == f"{photograph.stem}.JPG"


def test_absent_split_is_left_out(own_source: Path) -> None:
    shutil.rmtree(isic.image_folder(own_source, "test"))
    assert list(isic.read_source(own_source)) == ["train", "val"]


def test_absent_masks_and_labels_are_none(own_source: Path) -> None:
    shutil.rmtree(isic.mask_folder(own_source, "test"))
    isic.label_file(own_source, "test").unlink()
    records = isic.read_split(own_source, "test")
    assert len(records) == pipeline.COUNTS["test"]
    assert {(record.mask, record.label) for record in records} == {(None, None)}


@pytest.mark.parametrize("name", [".", "not there"])
def test_folder_without_photographs_is_refused_with_its_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no photographs here; expected at least one of ISIC-2017_Training_Data"):
        isic.read_source(tmp_path / name)


def test_missing_mask_is_named(own_source: Path) -> None:
    record = isic.read_split(own_source, "train")[3]
    assert record.mask is not None
    record.mask.unlink()
    with pytest.raises(InputError, match=f"no mask for {record.id}$"):
        isic.read_source(own_source)


def test_missing_labels_are_named_the_first_ten_and_the_rest_counted(own_source: Path) -> None:
    path = isic.label_file(own_source, "train")
    ids = [record.id for record in isic.read_split(own_source, "train")]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if line.split(",")[0] not in ids[:12]))
    with pytest.raises(InputError, match=f"no label for {', '.join(ids[:10])} and 2 more$"):
        isic.read_source(own_source)


def test_labels_become_classes(tmp_path: Path) -> None:
    path = label_csv(tmp_path, HEADER + "a,0.0,0.0\nb,1.0,0.0\nc,0,1\n")
    assert isic.read_labels(path) == {"a": isic.NEVUS, "b": isic.MELANOMA, "c": isic.KERATOSIS}


def test_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    path = label_csv(tmp_path, (HEADER + "a,1.0,0.0\nb,0.0,0.0\n").replace("\n", "\r\n"), "utf-8-sig")
    assert isic.read_labels(path) == {"a": isic.MELANOMA, "b": isic.NEVUS}


@pytest.mark.parametrize("row", ["b,1,1", "b,2,0", "b,-1,0", "b,0.5,0", "b,yes,0", "b,,0", "b,nan,0", "a,0,0"])
def test_bad_label_is_refused_with_its_line(tmp_path: Path, row: str) -> None:
    path = label_csv(tmp_path, f"{HEADER}a,1,0\n{row}\nc,0,0\n")
    with pytest.raises(InputError, match=rf"labels\.csv, line 3: {row[0]}"):
        isic.read_labels(path)


def test_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column seborrheic_keratosis"):
        isic.read_labels(label_csv(tmp_path, "image_id,melanoma\na,1\n"))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x01", HEADER.encode() + b"a,1,0\nb,1,0,0,0\n"])
def test_file_that_is_no_label_table_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"labels\.csv"):
        isic.read_labels(path)


def test_division_of_2018_has_its_numbers() -> None:
    splits = isic.divide_2018(fake({"train": (1372, 374, 254), "val": (78, 30, 42), "test": (393, 117, 90)}), seed=0)
    assert {split: of_each_class(records) for split, records in splits.items()} == {
        "train": (1320, 332, 253),
        "val": (327, 130, 88),
        "test": (196, 59, 45),
    }


def test_division_of_fewer_images_keeps_the_proportions() -> None:
    splits = isic.divide_2018(fake({"train": (900, 250, 180), "val": (22, 11, 13)}), seed=0)  # half of each class
    counts = {split: of_each_class(records) for split, records in splits.items()}
    expected = {"train": (660, 166, 126.5), "val": (163.5, 65, 44), "test": (98, 29.5, 22.5)}
    for split, numbers in counts.items():
        assert numbers == pytest.approx(expected[split], abs=1.5)


@pytest.mark.parametrize("counts", [(1372, 374, 254), (24, 9, 5), (1, 1, 1)])
def test_division_is_disjoint_and_complete(counts: tuple[int, int, int]) -> None:
    official = fake({"train": counts})
    divided = isic.divide_2018(official, seed=0)
    ids = [record.id for record in chain.from_iterable(divided.values())]
    assert sorted(ids) == [record.id for record in official["train"]]


def test_division_is_seeded() -> None:
    official = fake({"train": (100, 30, 20)})
    assert isic.divide_2018(official, 3) == isic.divide_2018(official, 3) != isic.divide_2018(official, 4)


def test_division_leaves_unlabelled_images_out() -> None:
    official = fake({"train": (20, 20, 20)})
    official["test"] = [isic.Record("unlabelled", Path("a.jpg"), None, None)]
    divided = isic.divide_2018(official, 0)
    assert sum(len(records) for records in divided.values()) == 60


def test_division_needs_masks_of_all_or_of_none() -> None:
    official = fake({"train": (3, 3, 3)})
    official["val"] = [isic.Record("masked", Path("a.jpg"), Path("a.png"), 0)]
    with pytest.raises(InputError, match="mask"):
        isic.divide_2018(official, 0)


def test_first_rows_hold_each_class() -> None:
    records = fake({"train": (7, 3, 2)})["train"]
    turns = isic.interleave(records)
    assert [record.label for record in turns] == [0, 1, 2, 0, 1, 2, 0, 1, 0, 0, 0, 0]
    assert sorted(turns, key=lambda record: record.id) == records


def test_fingerprint_changes_with_label_split_and_file_size(own_source: Path) -> None:
    splits = isic.read_source(own_source)
    first = isic.fingerprint(splits)
    assert first == isic.fingerprint(isic.read_source(own_source))
    record = splits["val"][0]
    other_label = isic.Record(record.id, record.image, record.mask, 2 - (record.label or 0))
    assert isic.fingerprint(splits | {"val": [other_label, *splits["val"][1:]]}) != first
    assert isic.fingerprint({"train": splits["val"], "val": splits["train"], "test": splits["test"]}) != first
    with record.image.open("ab") as stream:
        stream.write(b" ")
    assert isic.fingerprint(splits) != first


def test_ids_are_shortened_in_messages() -> None:
    ids = [str(number) for number in np.arange(12)]
    assert isic.first_ids(ids[:2]) == "0, 1"
    assert isic.first_ids(ids) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
