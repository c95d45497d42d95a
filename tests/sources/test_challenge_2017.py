"""The official ISIC 2017 layout: what is read and what is refused."""

import shutil
from pathlib import Path

from melanoma.classes import KERATOSIS, MELANOMA, NEVUS
from melanoma.errors import InputError
from melanoma.sources import reader
from melanoma.sources.layouts.challenge_2017 import image_folder, label_file, mask_folder, read_labels
from melanoma.sources.records import SYNTHETIC_MARKER, Record, fingerprint, is_synthetic

import pipeline
import pytest

HEADER = "image_id,melanoma,seborrheic_keratosis\n"


def label_csv(folder: Path, content: str, encoding: str = "utf-8") -> Path:
    path = folder / "labels.csv"
    path.write_bytes(content.encode(encoding))
    return path


def test_official_layout_is_read(source: Path) -> None:
    contents = reader.read(source)
    assert contents.title == "ISIC 2017 challenge"
    assert {split: len(records) for split, records in contents.splits.items()} == pipeline.COUNTS
    for split in pipeline.COUNTS:
        records = contents.splits[split]
        assert [record.id for record in records] == sorted(record.id for record in records)
        for record in records:
            assert record.image == image_folder(source, split) / f"{record.id}.jpg"
            assert record.mask == mask_folder(source, split) / f"{record.id}_segmentation.png"
            assert record.image.is_file() and record.mask.is_file()
    labels = read_labels(label_file(source, "train"))
    assert {record.id: record.label for record in contents.splits["train"]} == labels
    assert {record.label for record in contents.splits["train"]} == {NEVUS, MELANOMA, KERATOSIS}
    assert not (contents.warnings or contents.remarks or contents.left_out or contents.problems)


def test_folders_have_the_official_names() -> None:
    assert image_folder(Path("x"), "test") == Path("x/ISIC-2017_Test_v2_Data")
    assert mask_folder(Path("x"), "val") == Path("x/ISIC-2017_Validation_Part1_GroundTruth")
    assert label_file(Path("x"), "train") == Path("x/ISIC-2017_Training_Part3_GroundTruth.csv")


def test_superpixels_and_other_files_are_not_images(own_source: Path) -> None:
    before = pipeline.records(own_source, "val")
    folder, image = image_folder(own_source, "val"), before[0].image
    shutil.copy(image, folder / f"{image.stem}_superpixels.png")
    (folder / "ATTRIBUTION.txt").touch()
    contents = reader.read(own_source)
    assert contents.splits["val"] == before
    assert contents.remarks == ["1 superpixel files skipped"]


def test_capital_suffix_is_an_image(own_source: Path) -> None:
    image = pipeline.records(own_source, "val")[0].image
    image.rename(image.with_suffix(".JPG"))
    assert pipeline.records(own_source, "val")[0].image.name == f"{image.stem}.JPG"


def test_folders_and_files_may_be_in_lower_case(own_source: Path) -> None:
    before = reader.read(own_source)
    for path in [*own_source.iterdir(), *image_folder(own_source, "val").iterdir()]:
        if path.exists():
            path.rename(path.with_name(path.name.lower()))
    after = reader.read(own_source)
    assert {split: [record.label for record in records] for split, records in after.splits.items()} == {
        split: [record.label for record in records] for split, records in before.splits.items()
    }
    assert all(record.mask for record in after.records)


@pytest.mark.parametrize("name", ["ISIC-2017_Training_Data (1)", "ISIC-2017_Test_Data", "isic_2017_backup"])
def test_look_alike_folder_that_is_not_used_is_a_warning(name: str, own_source: Path) -> None:
    shutil.copytree(image_folder(own_source, "val"), own_source / name)
    contents = reader.read(own_source)
    assert contents.warnings == [f"folder not used: {name} ({pipeline.COUNTS['val']} images)"]


def test_other_folder_of_images_is_named(own_source: Path) -> None:
    shutil.copytree(image_folder(own_source, "val"), own_source / "holiday")
    contents = reader.read(own_source)
    assert contents.remarks == [f"folder not used: holiday ({pipeline.COUNTS['val']} images)"]


def test_missing_split_is_absent(own_source: Path) -> None:
    shutil.rmtree(image_folder(own_source, "test"))
    assert sorted(map(str, reader.read(own_source).splits)) == ["train", "val"]


def test_missing_mask_folder_and_label_file_give_none(own_source: Path) -> None:
    shutil.rmtree(mask_folder(own_source, "test"))
    label_file(own_source, "test").unlink()
    contents = reader.read(own_source)
    records = contents.splits["test"]
    assert len(records) == pipeline.COUNTS["test"] and not contents.problems
    assert {(record.mask, record.label) for record in records} == {(None, None)}


def test_folder_without_images_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no images found\. To download them: python download_data\.py"):
        reader.read(tmp_path)


def test_missing_folder_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such folder"):
        reader.read(tmp_path / "nowhere")


def test_folder_that_holds_images_itself_is_a_folder_of_images(own_source: Path) -> None:
    contents = reader.read(image_folder(own_source, "test"))
    assert (contents.title, len(contents.records)) == ("a folder of images", pipeline.COUNTS["test"])


def test_missing_mask_is_a_problem_of_its_image(own_source: Path) -> None:
    record = pipeline.records(own_source, "train")[3]
    assert record.mask is not None
    record.mask.unlink()
    contents = reader.read(own_source)
    assert [(one.id, reason) for one, reason in contents.problems.items()] == [
        (record.id, "no lesion mask, though other images of its split have one")
    ]


def test_missing_labels_are_problems_of_their_images(own_source: Path) -> None:
    path = label_file(own_source, "train")
    ids = [record.id for record in pipeline.records(own_source, "train")]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if line.split(",")[0] not in ids[:12]))
    problems = reader.read(own_source).problems
    assert [record.id for record in problems] == ids[:12]
    assert set(problems.values()) == {f"no label in {path.name}"}


def test_label_file_of_other_images_only_makes_every_image_a_problem(own_source: Path) -> None:
    label_file(own_source, "val").write_text(f"{HEADER}ISIC_9999991,0.0,0.0\n")
    assert len(reader.read(own_source).problems) == pipeline.COUNTS["val"]


def test_labels_without_an_image_are_a_warning(own_source: Path) -> None:
    with label_file(own_source, "val").open("a") as stream:
        stream.write("ISIC_9999991.jpg,0.0,0.0\n" * 2)
    assert reader.read(own_source).warnings == ["1 ids in the tables have no image and are ignored: ISIC_9999991"]


def test_metadata_of_the_challenge_is_no_unused_table(own_source: Path) -> None:
    label_file(own_source, "test").unlink()
    (own_source / "ISIC-2017_Test_v2_Data_metadata.csv").write_text("image_id,age_approximate,sex\nISIC_1,30,male\n")
    assert not reader.read(own_source).warnings
    (own_source / "ISIC-2017_Test_v2_Part3_GroundTruth (1).csv").write_text(f"{HEADER}ISIC_1,0,0\n")
    (warning,) = reader.read(own_source).warnings
    assert warning.endswith("tables that are not used: ISIC-2017_Test_v2_Part3_GroundTruth (1).csv")


def test_labels_become_classes(tmp_path: Path) -> None:
    path = label_csv(tmp_path, HEADER + "a,0.0,0.0\nb,1.0,0.0\nc,0,1\n")
    assert read_labels(path) == {"a": NEVUS, "b": MELANOMA, "c": KERATOSIS}


def test_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    path = label_csv(tmp_path, (HEADER + "a,1.0,0.0\nb,0.0,0.0\n").replace("\n", "\r\n"), "utf-8-sig")
    assert read_labels(path) == {"a": MELANOMA, "b": NEVUS}


@pytest.mark.parametrize("row", ["b,1,1", "b,2,0", "b,-1,0", "b,0.5,0", "b,maybe,0", "b,,0", "b,nan,0", "a,0,0"])
def test_bad_label_is_refused_with_its_line(tmp_path: Path, row: str) -> None:
    path = label_csv(tmp_path, f"{HEADER}a,1,0\n{row}\nc,0,0\n")
    with pytest.raises(InputError, match=rf"labels\.csv, line 3: {row[0]}"):
        read_labels(path)


def test_repeated_label_counts_once_and_a_different_one_is_refused_with_both_lines(tmp_path: Path) -> None:
    assert read_labels(label_csv(tmp_path, f"{HEADER}a,1,0\nb,0,0\na.jpg,1.0,FALSE\n")) == {"a": MELANOMA, "b": NEVUS}
    with pytest.raises(InputError, match="line 4: A is listed twice with different content, first in line 2"):
        read_labels(label_csv(tmp_path, f"{HEADER}a,1,0\nb,0,0\nA,0,0\n"))


def test_label_without_id_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 3: no image id"):
        read_labels(label_csv(tmp_path, f"{HEADER}a,1,0\n,0,0\n"))


def test_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column seborrheic_keratosis"):
        read_labels(label_csv(tmp_path, "image_id,melanoma\na,1\n"))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x01", HEADER.encode() + b"a,1,0\nb,1,0,0,0\n"])
def test_file_that_is_not_a_label_table_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"labels\.csv"):
        read_labels(path)


def test_fingerprint_changes_with_label_split_and_file_size(own_source: Path) -> None:
    splits = {split: pipeline.records(own_source, split) for split in pipeline.COUNTS}
    first = fingerprint(splits)
    assert first == fingerprint({split: pipeline.records(own_source, split) for split in pipeline.COUNTS})
    record = splits["val"][0]
    other_label = Record(record.id, record.image, record.mask, 2 - (record.label or 0))
    assert fingerprint(splits | {"val": [other_label, *splits["val"][1:]]}) != first
    assert fingerprint({"train": splits["val"], "val": splits["train"], "test": splits["test"]}) != first
    with record.image.open("ab") as stream:
        stream.write(b" ")
    assert fingerprint(splits) != first


def test_only_a_generated_source_is_synthetic(own_source: Path) -> None:
    assert is_synthetic([own_source])
    (own_source / SYNTHETIC_MARKER).unlink()
    assert not is_synthetic([own_source])
    assert not is_synthetic([own_source / "nowhere"])
