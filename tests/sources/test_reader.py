"""Every layout is recognised and read into the same records."""

import os
from collections.abc import Callable
from pathlib import Path

from melanoma.classes import KERATOSIS, MELANOMA, NEVUS
from melanoma.errors import InputError
from melanoma.sources import reader
from melanoma.sources.records import Record, Source, origins

import pytest
import toy_sources
from toy_sources import image, mask, text

Make = Callable[[Path], Path]
N, M, K = NEVUS, MELANOMA, KERATOSIS

# Layout: function, and the labels of its splits.
EXPECTED: dict[str, tuple[Make, dict[str | None, list[int | None]]]] = {
    "isic2016": (toy_sources.isic2016, {"train": [N, M, N], "test": [N, M]}),
    "isic2018": (toy_sources.isic2018, {"train": [M, N, K], "val": [N], "test": [M]}),
    "isic2019": (toy_sources.isic2019, {"train": [M, N, K]}),
    "ham10000": (toy_sources.ham10000, {None: [M, N, K, N, N]}),
    "isic2020": (toy_sources.isic2020, {"train": [M, K, N], "test": [None]}),
    "isic-cli": (toy_sources.isic_archive, {None: [N, M, K]}),
    "ph2": (toy_sources.ph2, {None: [N, N, M]}),
    "folder": (toy_sources.image_folder, {None: [None, None, None]}),
}


def labels(source: Source) -> dict[str | None, list[int | None]]:
    return {split: [record.label for record in records] for split, records in source.splits.items()}


def reasons(source: Source) -> list[str]:
    return [one.reason for one in source.left_out]


def groups(source: Source) -> list[str | None]:
    return [record.group for record in source.records]


@pytest.mark.parametrize("name", EXPECTED)
def test_layout_is_recognised_and_labelled(name: str, tmp_path: Path) -> None:
    make, expected = EXPECTED[name]
    source = reader.read(make(tmp_path))
    assert (source.title, labels(source)) == (reader.LAYOUTS[name].title, expected)
    assert not source.problems and not source.warnings


@pytest.mark.parametrize("name", EXPECTED)
def test_layout_nested_by_unzipping_is_read_alike(name: str, tmp_path: Path) -> None:
    make, expected = EXPECTED[name]
    make(tmp_path / "outer" / "download")
    source = reader.read(tmp_path / "outer")
    assert (source.title, labels(source)) == (reader.LAYOUTS[name].title, expected)


def test_two_words_of_2016_become_classes_and_the_log_says_so(tmp_path: Path) -> None:
    source = reader.read(toy_sources.isic2016(tmp_path))
    assert all(record.mask for record in source.records)
    assert any("benign is not divided into nevus and seborrheic keratosis" in remark for remark in source.class_notes)


def test_benign_keratosis_is_more_than_seborrheic_keratosis_and_the_log_says_so(tmp_path: Path) -> None:
    source = reader.read(toy_sources.ham10000(tmp_path))
    assert [note.partition(" is ")[0] for note in source.class_notes] == ["1 images: bkl"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ham10000", ["no class: bcc"]),
        ("isic2018", ["no class: bcc"]),
        ("isic2019", ["no class: scc"]),
        ("isic2020", ["no class: lentigo NOS"]),
        ("isic-cli", ["no class: Benign epidermal proliferations, unspecified", "not dermoscopic: clinical: overview"]),
    ],
)
def test_diagnosis_without_a_class_is_left_out_and_listed(name: str, expected: list[str], tmp_path: Path) -> None:
    assert reasons(reader.read(EXPECTED[name][0](tmp_path))) == expected


def test_diagnosis_without_a_class_is_kept_as_benign_on_request_and_the_log_says_so(tmp_path: Path) -> None:
    source = reader.read(toy_sources.ham10000(tmp_path), keep_others=True)
    assert labels(source) == {None: [M, N, K, N, N, N]} and reasons(source) == []
    assert source.class_notes[1:] == ["1 images: bcc is none of the three classes; it counts as benign nevus"]


def test_lesions_and_patients_are_groups(tmp_path: Path) -> None:
    ham = groups(reader.read(toy_sources.ham10000(tmp_path / "ham")))
    assert ham == ["HAM_0000000", "HAM_0000000", "HAM_0000001", "HAM_0000002", "HAM_0000002"]
    train = reader.read(toy_sources.isic2018(tmp_path / "2018")).splits["train"]
    assert [record.group for record in train] == ["HAM_1", "HAM_1", None]
    assert groups(reader.read(toy_sources.isic2019(tmp_path / "2019"))) == [None, "MSK4_0011169", None]
    siim = reader.read(toy_sources.isic2020(tmp_path / "2020")).splits["train"]
    assert [record.group for record in siim] == ["IP_7279968", "IP_2842074", "IP_7279968"]
    assert groups(reader.read(toy_sources.isic_archive(tmp_path / "cli"))) == ["IP_1", "IP_1", "IP_2"]


def test_masks_are_found_where_there_are_some(tmp_path: Path) -> None:
    ham = reader.read(toy_sources.ham10000(tmp_path / "ham")).records
    assert [record.mask is not None for record in ham] == [True, True, True, False, False]
    assert all(record.mask for record in reader.read(toy_sources.ph2(tmp_path / "ph2")).records)


def test_lesion_is_the_group_where_there_is_no_patient(tmp_path: Path) -> None:
    table = toy_sources.isic_archive(tmp_path) / "metadata.csv"
    table.write_text(table.read_text().replace("IL_1,IP_1", "IL_1,").replace("IL_2,IP_1", "IL_1,"))
    assert groups(reader.read(tmp_path)) == ["IL_1", "IL_1", "IP_2"]


@pytest.mark.parametrize("name", ["sample_submission.csv", "my Submission 2.csv"])
def test_submission_gives_no_labels(name: str, tmp_path: Path) -> None:
    toy_sources.isic2020(tmp_path)
    text(tmp_path / name, ["image_name,target", "ISIC_0052060,0"])
    assert labels(reader.read(tmp_path))["test"] == [None]


@pytest.mark.parametrize("name", ["isic2018", "isic2019", "isic2020", "ham10000", "isic-cli"])
def test_forced_layout_without_its_table_is_refused(name: str, tmp_path: Path) -> None:
    toy_sources.image_folder(tmp_path)
    with pytest.raises(InputError, match="no table with the columns"):
        reader.read(tmp_path, layout=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.replace("mel,histo", "mel,histo,x,y,z"), r"line 2: 10 cells"),
        (lambda content: content.splitlines()[0] + "\n", "no lines below the header"),
        (lambda content: content + 'HAM_1,"ISIC_1\n', "not a readable CSV"),
    ],
)
def test_table_that_cannot_be_read_stops_instead_of_losing_the_labels(
    change: Callable[[str], str], message: str, tmp_path: Path
) -> None:
    table = toy_sources.ham10000(tmp_path) / "HAM10000_metadata.csv"
    table.write_text(change(table.read_text()))
    with pytest.raises(InputError, match=message):
        reader.read(tmp_path)


def test_two_tables_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    toy_sources.ham10000(tmp_path)
    text(tmp_path / "old.csv", ["image_id,dx", "ISIC_0024306,MEL"])
    assert labels(reader.read(tmp_path)) == EXPECTED["ham10000"][1]
    text(tmp_path / "old.csv", ["image_id,dx", "ISIC_0024306,nv"])
    with pytest.raises(InputError, match=r"old\.csv: ISIC_0024306 is nv, but mel in .*HAM10000_metadata\.csv"):
        reader.read(tmp_path)


def test_layout_can_be_forced(tmp_path: Path) -> None:
    source = reader.read(toy_sources.ham10000(tmp_path), layout="folder")
    assert labels(source) == {None: [None] * 6}


# ------------------------------------------------------------------------------------------------------------- own CSV


def test_own_csv_gives_paths_labels_masks_splits_and_groups(tmp_path: Path) -> None:
    path = toy_sources.own_csv(tmp_path)
    source = reader.read(path)
    assert labels(source) == {"train": [M, K], "test": [N, None]}
    assert [record.id for record in source.records] == ["photos_one_mole", "photos_two_mole", "three", "Four"]
    first, second, third, fourth = source.records
    assert (first.image, first.mask) == (tmp_path / "photos/one/mole.png", tmp_path / "masks/m1.png")
    assert (third.image, fourth.image.is_file()) == (tmp_path / "photos/three.jpg", True)
    assert first.group == second.group != third.group and fourth.group is None


def test_own_csv_is_found_in_its_folder(tmp_path: Path) -> None:
    path = toy_sources.own_csv(tmp_path)
    assert reader.read(path.parent).splits == reader.read(path).splits


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("photos/three.jpg,nevus,,test,", "line 6: photos/three.jpg is listed twice"),
        ("photos/one/mole.png,melanoma,,dev,", "line 6: split 'dev'; expected train, val or test"),
        ("photos/new.jpg,nevus,,,", "line 6: no split, though other lines have one"),
        (",nevus,,test,", "line 6: no image"),
    ],
)
def test_faulty_line_of_an_own_csv_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = toy_sources.own_csv(tmp_path)
    content = (
        path.read_text()
        .replace("photos/three,", "photos/three.jpg,")
        .replace("photos/one/mole.png,melanoma", "x.png,mel")
    )
    path.write_text(content + line + "\n")
    with pytest.raises(InputError, match=message):
        reader.read(path)


def test_missing_file_of_an_own_csv_is_a_problem_of_its_image(tmp_path: Path) -> None:
    path = toy_sources.own_csv(tmp_path)
    (tmp_path / "masks" / "m1.png").unlink()
    source = reader.read(path)
    assert {record.id: reason for record, reason in source.problems.items()} == {
        "photos_one_mole": f"{tmp_path / 'masks/m1.png'}: no such file"
    }


def test_word_that_is_no_diagnosis_is_left_out_with_its_word(tmp_path: Path) -> None:
    path = toy_sources.own_csv(tmp_path)
    path.write_text(path.read_text().replace("melanoma", "Melanom"))
    assert reasons(reader.read(path)) == ["no class: Melanom"]


@pytest.mark.parametrize("header", ["image_path,diagnosis,mask,split,group", " Filename , Class ,MASK,Split,GROUP"])
def test_columns_may_have_other_usual_names(header: str, tmp_path: Path) -> None:
    path = toy_sources.own_csv(tmp_path)
    expected = reader.read(path).splits
    path.write_text(path.read_text().replace("image,label,mask,split,group", header))
    assert reader.read(path).splits == expected


@pytest.mark.parametrize("name", ["patient", "Patient_ID", "lesion", "lesion_id"])
def test_patients_and_lesions_are_groups(name: str, tmp_path: Path) -> None:
    path = toy_sources.own_csv(tmp_path)
    expected = reader.read(path).splits
    path.write_text(path.read_text().replace("group", name))
    assert reader.read(path).splits == expected


def test_label_that_is_no_known_diagnosis_is_a_warning(tmp_path: Path) -> None:
    path = toy_sources.own_csv(tmp_path)
    path.write_text(path.read_text().replace("SK", "Seb. keratosis").replace("melanoma", "basal cell carcinoma"))
    (warning,) = reader.read(path).warnings
    assert warning.startswith("labels that are no known diagnosis: Seb. keratosis (1); known ones: benign nevus, nevus")


def test_backslashes_are_folders(tmp_path: Path) -> None:
    path = toy_sources.own_csv(tmp_path)
    expected = reader.read(path).splits
    path.write_text(path.read_text().replace("/", "\\"))
    assert reader.read(path).splits == expected


def test_columns_and_images_that_are_not_used_are_counted(tmp_path: Path) -> None:
    path = toy_sources.own_csv(tmp_path)
    path.write_text(path.read_text().replace("group", "group,age").replace(",Anna", ",Anna,50"))
    image(tmp_path / "photos" / "five.jpg", 5)
    assert reader.read(path).remarks == [
        "my.csv: columns not used: age",
        "1 images in the same folders are not listed in my.csv",
        "labels are 0 benign nevus, 1 melanoma, 2 seborrheic keratosis",
    ]


def test_one_image_in_two_spellings_is_listed_twice(tmp_path: Path) -> None:
    path = toy_sources.own_csv(tmp_path)
    path.write_text(path.read_text() + "./photos/four.jpg,nevus,,test,\nphotos/./four.jpg,mel,,test,\n")
    with pytest.raises(InputError, match=r"line 7: photos/four\.jpg is listed twice"):
        reader.read(path)


def test_two_images_of_one_id_in_an_own_csv_are_refused(tmp_path: Path) -> None:
    path = toy_sources.own_csv(tmp_path)
    path.write_text(path.read_text() + "photos/one/mole.jpg,nevus,,test,\n")
    with pytest.raises(InputError, match=r"line 6: photos/one/mole\.jpg has the id photos_one_mole, as line 2"):
        reader.read(path)


def test_two_own_csvs_in_a_folder_are_named(tmp_path: Path) -> None:
    path = toy_sources.own_csv(tmp_path)
    path.with_name("old.csv").write_text(path.read_text())
    with pytest.raises(InputError, match=r"found .*my\.csv, .*old\.csv; name one as --source"):
        reader.read(tmp_path)


def test_csv_cannot_have_another_layout(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--layout ham10000: .* can only be a CSV of your own"):
        reader.read(toy_sources.own_csv(tmp_path), layout="ham10000")


# --------------------------------------------------------------------------------------------------------------- files


def test_hidden_files_are_skipped_and_counted(tmp_path: Path) -> None:
    toy_sources.image_folder(tmp_path)
    image(tmp_path / ".thumb.jpg")
    text(tmp_path / "left" / "._a.tif", ["resource fork"])
    image(tmp_path / "__MACOSX" / "a.jpg")
    source = reader.read(tmp_path)
    assert len(source.records) == 3
    assert source.remarks == ["1 hidden folders skipped", "2 hidden files skipped"]


@pytest.mark.parametrize("other", ["left/a.jpg", "right/a.tif", "A.png"])
def test_two_files_of_one_id_stop_with_both_names(other: str, tmp_path: Path) -> None:
    toy_sources.image_folder(tmp_path)
    image(tmp_path / other, 7)
    with pytest.raises(InputError, match=r"two files have the same id: .*[aA]\.\w+ and .*[aA]\.\w+"):
        reader.read(tmp_path)


def test_equal_file_in_another_folder_is_counted(tmp_path: Path) -> None:
    toy_sources.ham10000(tmp_path)
    first = tmp_path / "HAM10000_images_part_1"
    (tmp_path / "ham10000_images_part_1").mkdir()
    for path in first.iterdir():
        (tmp_path / "ham10000_images_part_1" / path.name).write_bytes(path.read_bytes())
    source = reader.read(tmp_path)
    assert len(source.records) == 5
    twins = [one.name for one in source.left_out if one.reason == "same name and content as another file"]
    assert len(twins) == 3 and all("= HAM10000_images_part_1" in name for name in twins)


def test_two_masks_of_one_image_stop_with_both_names(tmp_path: Path) -> None:
    toy_sources.image_folder(tmp_path)
    mask(tmp_path / "left" / "a_segmentation.png", 3)
    with pytest.raises(InputError, match=r"same id: .*a_mask.png and .*a_segmentation.png"):
        reader.read(tmp_path)


@pytest.mark.parametrize("suffix", [".gif", ".HEIC", ".dcm"])
def test_unread_format_is_listed(suffix: str, tmp_path: Path) -> None:
    toy_sources.image_folder(tmp_path)
    text(tmp_path / f"d{suffix}", ["x"])
    source = reader.read(tmp_path)
    assert [(one.name, one.reason) for one in source.left_out] == [(f"d{suffix}", "format is not read")]


def test_name_that_is_not_utf8_is_refused_plainly(tmp_path: Path) -> None:
    toy_sources.image_folder(tmp_path)
    image(tmp_path / "b\udcff.png")
    with pytest.raises(InputError, match=r"b\\udcff.png': this file name is not valid UTF-8") as error:
        reader.read(tmp_path)
    str(error.value).encode()


@pytest.mark.parametrize(
    "ending", ["_Segmentation", "_lesion", "_mask", "_SEG", "-mask", " mask", "_gt", "_Mask1", "_seg_v2", "_binary"]
)
def test_usual_endings_of_masks_are_found(ending: str, tmp_path: Path) -> None:
    image(tmp_path / "images" / "mole.jpg")
    mask(tmp_path / "images" / f"mole{ending}.png")
    (record,) = reader.read(tmp_path).records
    assert record.mask == tmp_path / "images" / f"mole{ending}.png"


@pytest.mark.parametrize("folder", ["masks", "Ground_Truth", "mole_segmentations"])
def test_mask_with_the_name_of_its_image_is_found_in_a_folder_of_masks(folder: str, tmp_path: Path) -> None:
    image(tmp_path / "images" / "Mole.jpg")
    mask(tmp_path / folder / "mole.png")
    (record,) = reader.read(tmp_path).records
    assert record.mask == tmp_path / folder / "mole.png"


@pytest.mark.parametrize("folder", ["masks/part1", "Segmentations/a/b"])
def test_folders_inside_a_folder_of_masks_hold_masks(folder: str, tmp_path: Path) -> None:
    image(tmp_path / "segmentation data" / "images" / "mole.jpg")
    mask(tmp_path / "segmentation data" / folder / "mole.png")
    (record,) = reader.read(tmp_path).records
    assert record.mask == tmp_path / "segmentation data" / folder / "mole.png"


@pytest.mark.parametrize("folder", ["skin_lesion", "lesion", "unmasked"])
def test_folder_that_only_sounds_like_one_of_masks_holds_images(folder: str, tmp_path: Path) -> None:
    image(tmp_path / folder / "a.jpg", 1)
    image(tmp_path / "other" / "b.jpg", 2)
    assert [record.id for record in reader.read(tmp_path).records] == ["a", "b"]


@pytest.mark.parametrize("name", ["d", "d.jpg_", "d.001"])
def test_image_without_a_usual_suffix_is_read_by_its_content(name: str, tmp_path: Path) -> None:
    toy_sources.image_folder(tmp_path)
    image(tmp_path / "d.jpg", 5).rename(tmp_path / name)
    text(tmp_path / "README", ["BMI is no image"])
    assert [record.id for record in reader.read(tmp_path).records] == ["a", "b", "c", "d"]


def test_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_sources.image_folder(tmp_path)
    scandir = os.scandir

    def refuse(folder: str) -> object:
        if str(folder).endswith("left"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="left: this folder cannot be read"):
        reader.read(tmp_path)


def test_mask_without_an_image_is_listed_with_a_warning(tmp_path: Path) -> None:
    toy_sources.image_folder(tmp_path)
    mask(tmp_path / "masks" / "z.png")
    source = reader.read(tmp_path)
    assert (reasons(source), source.warnings) == (["mask without an image"], ["1 masks belong to no image"])


def test_mask_in_a_folder_without_a_split_belongs_to_the_image_of_its_id(tmp_path: Path) -> None:
    toy_sources.isic2018(tmp_path)
    mask(tmp_path / "HAM_masks" / "ISIC_0024307_segmentation.png")
    train = reader.read(tmp_path).splits["train"]
    assert [record.id for record in train if record.mask] == ["ISIC_0024307"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.txt", "a mel"),
        ("labels.csv", "name,what\na,mel\n"),
        ("labels.xlsx", "x"),
        ("noheader.csv", "left/a.tif,mel\n"),
        ("labels.json", "{}"),
    ],
)
def test_table_beside_unlabelled_images_that_is_not_used_is_a_warning(name: str, content: str, tmp_path: Path) -> None:
    toy_sources.image_folder(tmp_path)
    text(tmp_path / name, [content])
    text(tmp_path / "ATTRIBUTION.txt", ["x"])
    warning = f"there are images without labels, and tables that are not used: {name}"
    assert reader.read(tmp_path).warnings == [warning]


def test_folders_named_after_diagnoses_give_labels_and_splits(tmp_path: Path) -> None:
    names = ("train/melanoma", "train/nevus", "train/seborrheic keratosis", "train/basal cell carcinoma", "Test/nevus")
    for number, name in enumerate(names):
        image(tmp_path / name / f"{number}.jpg", number)
    source = reader.read(tmp_path)
    assert labels(source) == {"train": [M, N, K], "test": [N]}
    assert reasons(source) == ["no class: basal cell carcinoma"]
    assert source.remarks == ["the names of the folders are the diagnoses"]


def test_id_of_two_splits_is_made_unique(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "test")):
        image(tmp_path / split / "melanoma" / "1.jpg", number)
        image(tmp_path / split / "nevus" / "2.jpg", 5 + number)
    assert [record.id for record in reader.read(tmp_path).records] == ["1", "2", "train_1", "train_2"]


@pytest.mark.parametrize(("diagnosis", "target"), [("nevus", 1), ("melanoma", 0), ("seborrheic keratosis", 1)])
def test_target_that_contradicts_the_diagnosis_is_refused(diagnosis: str, target: int, tmp_path: Path) -> None:
    table = toy_sources.isic2020(tmp_path) / "train.csv"
    rows = table.read_text().splitlines()
    rows[2] = f"ISIC_0015719,IP_1,female,45,x,{diagnosis},x,{target}"
    text(table, rows)
    with pytest.raises(InputError, match=f"line 3: the diagnosis is {diagnosis}, but the target says"):
        reader.read(tmp_path)


def test_second_table_that_only_knows_the_target_does_not_contradict_the_first(tmp_path: Path) -> None:
    toy_sources.isic2020(tmp_path)
    text(tmp_path / "v2.csv", ["image_name,patient_id,target", "ISIC_0052212,IP_2842074,0", "ISIC_0015719,IP_1,1"])
    assert labels(reader.read(tmp_path)) == EXPECTED["isic2020"][1]


@pytest.mark.parametrize("label", ["3", "7"])
def test_number_that_is_no_class_is_refused(label: str, tmp_path: Path) -> None:
    path = toy_sources.own_csv(tmp_path)
    path.write_text(path.read_text().replace("SK", label))
    with pytest.raises(InputError, match=f"line 3: label {label}; numbers are 0 benign nevus, 1 melanoma"):
        reader.read(path)


@pytest.mark.parametrize("word", ["NaN", "unknown", "None"])
def test_word_for_no_diagnosis_is_no_label(word: str, tmp_path: Path) -> None:
    path = toy_sources.own_csv(tmp_path)
    path.write_text(path.read_text().replace("SK", word))
    assert labels(reader.read(path))["train"] == [M, None]


def test_accents_may_be_written_in_two_ways(tmp_path: Path) -> None:
    image(tmp_path / "me\u0301lanome.jpg")
    text(tmp_path / "my.csv", ["image,label", "m\u00e9lanome.jpg,melanoma"])
    assert not reader.read(tmp_path).problems


def test_ph2_table_in_another_encoding_is_read_and_an_empty_one_refused(tmp_path: Path) -> None:
    table = toy_sources.ph2(tmp_path) / "PH2Dataset" / "PH2_dataset.txt"
    table.write_text(table.read_text(), encoding="utf-16")
    assert labels(reader.read(tmp_path)) == EXPECTED["ph2"][1]
    table.write_text("Legends")
    with pytest.raises(InputError, match="no line with a name and a clinical diagnosis"):
        reader.read(tmp_path)


def test_image_that_is_called_like_a_mask_is_kept(tmp_path: Path) -> None:
    image(tmp_path / "skin_lesion" / "arm_lesion.jpg")
    assert [record.id for record in reader.read(tmp_path).records] == ["arm_lesion"]


def test_image_with_copy_in_its_name_is_an_image(tmp_path: Path) -> None:
    for number, name in enumerate(("mole.jpg", "mole_copy.jpg", "mole_copy2.jpg")):
        image(tmp_path / name, number)
    assert [record.id for record in reader.read(tmp_path).records] == ["mole", "mole_copy", "mole_copy2"]


@pytest.mark.parametrize("name", ["ISIC2018_Task3_Training_LesionGroupings.csv", "ISIC_2019_Training_Metadata.csv"])
def test_table_without_diagnoses_adds_groups_only(name: str, tmp_path: Path) -> None:
    make = toy_sources.isic2018 if "2018" in name else toy_sources.isic2019
    make(tmp_path)
    (tmp_path / name).unlink()
    assert set(groups(reader.read(tmp_path))) == {None}


def test_image_without_a_row_is_a_problem_and_a_row_without_an_image_a_warning(tmp_path: Path) -> None:
    toy_sources.ham10000(tmp_path)
    table = tmp_path / "HAM10000_metadata.csv"
    table.write_text(table.read_text().replace("ISIC_0024306", "ISIC_9999999"))
    source = reader.read(tmp_path)
    assert [record.id for record in source.problems] == ["ISIC_0024306"]
    assert source.warnings == ["1 ids in the tables have no image and are ignored: ISIC_9999999"]


def test_letters_case_never_matters(tmp_path: Path) -> None:
    toy_sources.ham10000(tmp_path)
    table = tmp_path / "HAM10000_metadata.csv"
    table.write_text(
        table.read_text().replace("ISIC_", "isic_").replace("image_id,dx", "IMAGE_ID,Dx").replace("mel", "MEL")
    )
    assert labels(reader.read(tmp_path)) == EXPECTED["ham10000"][1]


# ----------------------------------------------------------------------------------------------------- several sources


def test_id_that_occurs_in_two_sources_is_made_unique(tmp_path: Path) -> None:
    first, second = toy_sources.image_folder(tmp_path / "one"), toy_sources.image_folder(tmp_path / "two")
    sources = reader.read_all(first, [second], None, False)
    assert [record.id for source in sources for record in source.records] == ["a", "b", "c", "two_a", "two_b", "two_c"]


def test_ids_of_several_extra_sources_are_unique(tmp_path: Path) -> None:
    folders = [toy_sources.image_folder(tmp_path / name / "images") for name in ("one", "two", "three")]
    sources = reader.read_all(folders[0], folders[1:], None, False)
    ids = [record.id for source in sources for record in source.records]
    assert len(set(ids)) == 9 and ids[3] == "images_a" and ids[6] == "images2_a"


def test_origin_of_an_image_is_the_place_of_its_source(tmp_path: Path) -> None:
    first, second = (Source(tmp_path, "", {None: [Record(name, tmp_path / name, None, 0)]}) for name in "ab")
    assert {record.id: place for record, place in origins([first, second]).items()} == {"a": 0, "b": 1}


def test_source_given_twice_is_refused(tmp_path: Path) -> None:
    first, second = toy_sources.image_folder(tmp_path / "one"), toy_sources.image_folder(tmp_path / "two")
    with pytest.raises(InputError, match="two: given twice"):
        reader.read_all(first, [second, tmp_path / "one" / ".." / "two"], None, False)
