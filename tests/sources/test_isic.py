"""The official ISIC 2017 layout: what is read and what is refused."""

import shutil
from pathlib import Path

from melanoma.classes import KERATOSIS, MELANOMA, NEVUS
from melanoma.errors import InputError
from melanoma.sources import isic

import pipeline
import pytest

HEADER = "image_id,melanoma,seborrheic_keratosis\n"


def label_csv(folder: Path, content: str, encoding: str = "utf-8") -> Path:
    path = folder / "labels.csv"
    path.write_bytes(content.encode(encoding))
    return path


def test_official_layout_is_read(source: Path) -> None:
    contents = isic.read_source(source)
    assert {split: len(records) for split, records in contents.records.items()} == pipeline.COUNTS
    for split, records in contents.records.items():
        assert [record.id for record in records] == sorted(record.id for record in records)
        for record in records:
            assert record.image == isic.image_folder(source, split) / f"{record.id}.jpg"
            assert record.mask == isic.mask_folder(source, split) / f"{record.id}_segmentation.png"
            assert record.image.is_file() and record.mask.is_file()
    labels = isic.read_labels(isic.label_file(source, "train"))
    assert {record.id: record.label for record in contents.records["train"]} == labels
    assert {record.label for record in contents.records["train"]} == {NEVUS, MELANOMA, KERATOSIS}
    assert contents.unused_labels == [] and contents.superpixels == 0


def test_folders_have_the_official_names() -> None:
    assert isic.image_folder(Path("x"), "test") == Path("x/ISIC-2017_Test_v2_Data")
    assert isic.mask_folder(Path("x"), "val") == Path("x/ISIC-2017_Validation_Part1_GroundTruth")
    assert isic.label_file(Path("x"), "train") == Path("x/ISIC-2017_Training_Part3_GroundTruth.csv")


def test_superpixels_and_other_files_are_not_images(own_source: Path) -> None:
    before = isic.read_split(own_source, "val")
    folder, image = isic.image_folder(own_source, "val"), before[0].image
    shutil.copy(image, folder / f"{image.stem}_superpixels.png")
    (folder / "ATTRIBUTION.txt").touch()
    assert isic.read_split(own_source, "val") == before
    assert isic.read_source(own_source).superpixels == 1


def test_capital_suffix_is_an_image(own_source: Path) -> None:
    image = isic.read_split(own_source, "val")[0].image
    image.rename(image.with_suffix(".JPG"))
    assert isic.read_split(own_source, "val")[0].image.name == f"{image.stem}.JPG"


def test_missing_split_is_absent(own_source: Path) -> None:
    shutil.rmtree(isic.image_folder(own_source, "test"))
    assert list(isic.read_source(own_source).records) == ["train", "val"]


def test_missing_mask_folder_and_label_file_give_none(own_source: Path) -> None:
    shutil.rmtree(isic.mask_folder(own_source, "test"))
    isic.label_file(own_source, "test").unlink()
    records = isic.read_split(own_source, "test")
    assert len(records) == pipeline.COUNTS["test"]
    assert {(record.mask, record.label) for record in records} == {(None, None)}


def test_folder_without_images_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no images found; expected at least one of ISIC-2017_Training_Data"):
        isic.read_source(tmp_path)


def test_missing_folder_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such folder"):
        isic.read_source(tmp_path / "nowhere")


def test_folder_that_holds_images_itself_is_explained(own_source: Path) -> None:
    with pytest.raises(InputError, match=r"must be in a folder below --source.*ISIC-2017_Test_v2_Data"):
        isic.read_source(isic.image_folder(own_source, "test"))


def test_missing_mask_is_named(own_source: Path) -> None:
    record = isic.read_split(own_source, "train")[3]
    assert record.mask is not None
    record.mask.unlink()
    with pytest.raises(InputError, match=f"no mask for {record.id}$"):
        isic.read_source(own_source)


def test_first_ten_missing_labels_are_named_and_the_rest_counted(own_source: Path) -> None:
    path = isic.label_file(own_source, "train")
    ids = [record.id for record in isic.read_split(own_source, "train")]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if line.split(",")[0] not in ids[:12]))
    with pytest.raises(InputError, match=f"no label for {', '.join(ids[:10])} and 2 more$"):
        isic.read_source(own_source)


def test_labels_without_an_image_are_unused(own_source: Path) -> None:
    with isic.label_file(own_source, "val").open("a") as stream:
        stream.write("ISIC_9999991.jpg,0.0,0.0\n" * 2)
    assert isic.read_source(own_source).unused_labels == ["ISIC_9999991"]


def test_labels_match_images_without_regard_to_case_and_extension(own_source: Path) -> None:
    before, path = isic.read_split(own_source, "val"), isic.label_file(own_source, "val")
    lines = [line.replace(",", ".JPG,", 1).lower() for line in path.read_text().splitlines()]
    path.write_text("\n".join(["Image,Melanoma,Seborrheic_Keratosis", *lines[1:]]))
    assert isic.read_split(own_source, "val") == before and isic.read_source(own_source).unused_labels == []


def test_labels_become_classes(tmp_path: Path) -> None:
    path = label_csv(tmp_path, HEADER + "a,0.0,0.0\nb,1.0,0.0\nc,0,1\n")
    assert isic.read_labels(path) == {"a": NEVUS, "b": MELANOMA, "c": KERATOSIS}


def test_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    path = label_csv(tmp_path, (HEADER + "a,1.0,0.0\nb,0.0,0.0\n").replace("\n", "\r\n"), "utf-8-sig")
    assert isic.read_labels(path) == {"a": MELANOMA, "b": NEVUS}


@pytest.mark.parametrize("row", ["b,1,1", "b,2,0", "b,-1,0", "b,0.5,0", "b,maybe,0", "b,,0", "b,nan,0", "a,0,0"])
def test_bad_label_is_refused_with_its_line(tmp_path: Path, row: str) -> None:
    path = label_csv(tmp_path, f"{HEADER}a,1,0\n{row}\nc,0,0\n")
    with pytest.raises(InputError, match=rf"labels\.csv, line 3: {row[0]}"):
        isic.read_labels(path)


def test_repeated_label_counts_once_and_a_different_one_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = label_csv(tmp_path, f"{HEADER}a,1,0\nb,0,0\na.jpg,1.0,FALSE\n")
    assert isic.read_labels(path) == {"a": MELANOMA, "b": NEVUS}
    with pytest.raises(InputError, match="line 4: A is listed twice with different content, first in line 2"):
        isic.read_labels(label_csv(tmp_path, f"{HEADER}a,1,0\nb,0,0\nA,0,0\n"))


def test_label_without_id_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 3: no image id"):
        isic.read_labels(label_csv(tmp_path, f"{HEADER}a,1,0\n,0,0\n"))


def test_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column seborrheic_keratosis"):
        isic.read_labels(label_csv(tmp_path, "image_id,melanoma\na,1\n"))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x01", HEADER.encode() + b"a,1,0\nb,1,0,0,0\n"])
def test_file_that_is_not_a_label_table_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"labels\.csv"):
        isic.read_labels(path)


def test_fingerprint_changes_with_label_split_and_file_size(own_source: Path) -> None:
    splits = isic.read_source(own_source).records
    first = isic.fingerprint(splits)
    assert first == isic.fingerprint(isic.read_source(own_source).records)
    record = splits["val"][0]
    other_label = isic.Record(record.id, record.image, record.mask, 2 - (record.label or 0))
    assert isic.fingerprint(splits | {"val": [other_label, *splits["val"][1:]]}) != first
    assert isic.fingerprint({"train": splits["val"], "val": splits["train"], "test": splits["test"]}) != first
    with record.image.open("ab") as stream:
        stream.write(b" ")
    assert isic.fingerprint(splits) != first


def test_only_a_generated_source_is_synthetic(own_source: Path) -> None:
    assert isic.is_synthetic(own_source)
    (own_source / isic.SYNTHETIC_MARKER).unlink()
    assert not isic.is_synthetic(own_source)
    assert not isic.is_synthetic(own_source / "nowhere")
