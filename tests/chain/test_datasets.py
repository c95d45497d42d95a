"""The first script on every layout, on several data sets at once, and on lesions with several images."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.classes import KERATOSIS, MELANOMA, SPLITS
from melanoma.dataset.splits import are_original

import pandas as pd
import pipeline
import pytest
import toy_sources
from pipeline import exit_code, places, reader

pytestmark = pytest.mark.usefixtures("logging_restored")

Run = Callable[..., int | str | None]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the first script as from a shell and returns its exit code."""
    flags = (*places(tmp_path), "--size", "32", "--jobs", "1", "--copies", "1")
    return lambda source, *more: exit_code(monkeypatch, contract.PREPROCESSING, *flags, "--source", str(source), *more)


def ids(folder: Path, split: str) -> list[str]:
    store = reader(folder)
    return store.load("ids", split=split).tolist() if store.has("ids", split=split) else []


def left_out(folder: Path) -> dict[str, str]:
    table = pd.read_csv(folder / "graphics" / "left_out.csv")
    return dict(zip(table["image"], table["reason"], strict=True))


LAYOUTS = {
    "isic2016": (toy_sources.isic2016, "ISIC 2016 challenge, part 3", {"train": 3, "test": 2}),
    "isic2018": (toy_sources.isic2018, "ISIC 2018 challenge, task 3", {"train": 3, "val": 1, "test": 1}),
    "isic2019": (toy_sources.isic2019, "ISIC 2019 challenge", {"train": 3}),
    "ham10000": (toy_sources.ham10000, "HAM10000", {"train": 5}),
    "isic2020": (toy_sources.isic2020, "SIIM-ISIC 2020 challenge", {"train": 3, "test": 1}),
    "isic-cli": (toy_sources.isic_archive, "ISIC archive, as isic-cli downloads it", {"train": 3}),
    "ph2": (toy_sources.ph2, "PH2", {"train": 3}),
    "folder": (toy_sources.image_folder, "a folder of images", {"test": 3}),
    "csv": (toy_sources.own_csv, "a CSV of image,label,mask,split,group", {"train": 2, "test": 2}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_becomes_arrays(name: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, title, counts = LAYOUTS[name]
    source = make(tmp_path / "source")
    assert run(source) == 0
    assert f"{source}: read as {title}, {sum(counts.values())} images" in capsys.readouterr().out
    assert {split: len(found) for split in SPLITS if (found := ids(tmp_path, split))} == counts
    for split in counts:
        shapes = {len(reader(tmp_path).load(column, split=split)) for column in ("images", "source", "groups")}
        assert shapes == {counts[split]}


def test_what_is_left_out_is_counted_and_listed(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(toy_sources.isic_archive(tmp_path / "source")) == 0
    reasons = "no class: Benign epidermal proliferations, unspecified (1), not dermoscopic: clinical: overview (1)"
    assert f"left out: 2: {reasons}; all of them are in left_out.csv" in capsys.readouterr().out
    assert set(left_out(tmp_path)) == {"ISIC_0000003", "ISIC_0000004"}


def test_other_diagnoses_are_kept_as_benign_on_request(run: Run, tmp_path: Path) -> None:
    assert run(toy_sources.ham10000(tmp_path / "source"), "--other", "benign") == 0
    assert len(ids(tmp_path, "train")) == 6 and left_out(tmp_path) == {}


def test_layout_can_be_forced_and_an_unknown_one_is_refused(run: Run, tmp_path: Path) -> None:
    source = toy_sources.ham10000(tmp_path / "source")
    assert run(source, "--layout", "folder") == 0
    assert len(ids(tmp_path, "test")) == 6
    assert run(source, "--layout", "isic2015") == 2


def test_folder_can_be_read_as_another_layout_only_with_its_tables(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(toy_sources.image_folder(tmp_path / "source"), "--layout", "isic2017") == 2
    assert "read as ISIC 2017 challenge, but no image can be used" in capsys.readouterr().err


def test_figures_and_arrays_below_the_source_are_not_read(tmp_path: Path, run: Run) -> None:
    toy_sources.image_folder(tmp_path / "images")
    for _ in range(2):
        assert run(tmp_path) == 0
        assert ids(tmp_path, "test") == ["a", "b", "c"]
        toy_sources.image(tmp_path / "graphics" / "roi.png")


# --------------------------------------------------------------------------------------------------- more training data


@pytest.fixture
def extra(tmp_path: Path) -> Path:
    """A data set with a copy of a validation image, a lesion of the test split, and three other images."""
    base = toy_sources.isic2018(tmp_path / "source")
    text = (base / "ISIC2018_Task3_Training_LesionGroupings.csv").read_text()
    test = "ISIC_0024311"
    (base / "ISIC2018_Task3_Training_LesionGroupings.csv").write_text(text + f"{test},HAM_9,x\n")
    folder = tmp_path / "more"
    for number, name in enumerate(("a", "b", "c", "same_lesion")):
        toy_sources.image(folder / f"{name}.png", 30 + number)
    shutil.copy(base / "ISIC2018_Task3_Validation_Input" / "ISIC_0024310.jpg", folder / "copy.jpg")
    toy_sources.mask(folder / "masks" / "a.png", 30)
    lines = ["lesion_id,image_id,dx", "L1,a,mel", "L1,b,bkl", ",c,nv", "HAM_9,same_lesion,mel", ",copy,nv"]
    toy_sources.text(folder / "HAM10000_metadata.csv", lines)
    return folder


def test_extra_images_are_added_to_train(run: Run, extra: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "source", "--extra", str(extra)) == 0
    store = reader(tmp_path)
    assert ids(tmp_path, "train")[3:] == ["a", "b", "c"] and ids(tmp_path, "val") == ["ISIC_0024310"]
    assert store.load("labels", split="train")[3:].tolist() == [MELANOMA, KERATOSIS, 0]
    assert store.load("has_mask", split="train").tolist() == [False, False, False, True, False, False]
    groups = store.load("groups", split="train")
    assert groups[3] == groups[4] != groups[5]
    assert store.load("origin", split="train").tolist() == [0, 0, 0, 1, 1, 1]
    described = store.written_with("ids", split="train")["sources"]
    assert [(one["layout"], one["images"]) for one in described] == [
        ("ISIC 2018 challenge, task 3", 5),
        ("HAM10000", 3),
    ]


def test_extra_image_of_validation_or_test_is_left_out(
    run: Run, extra: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "source", "--extra", str(extra)) == 0
    out = capsys.readouterr().out
    assert "1 images left out of train: duplicate of another image" in out
    assert "1 images left out of train: same lesion or patient as an image of validation or test" in out
    assert {name: reason for name, reason in left_out(tmp_path).items() if not name.startswith("ISIC")} == {
        "copy": "duplicate of another image",
        "same_lesion": "same lesion or patient as an image of validation or test",
    }
    assert run(tmp_path / "source", "--extra", str(extra), "--keep-duplicates") == 0
    assert {"copy", "same_lesion"} <= set(ids(tmp_path, "train"))


def test_several_sources_may_be_added(run: Run, extra: Path, tmp_path: Path) -> None:
    folder = toy_sources.image_folder(tmp_path / "third")
    assert run(tmp_path / "source", "--extra", str(extra), "--extra", str(folder)) == 0
    assert ids(tmp_path, "train")[6:] == ["third_a", "third_b", "third_c"]
    assert reader(tmp_path).load("origin", split="train").tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_source_that_is_added_to_itself_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = toy_sources.ham10000(tmp_path / "source")
    assert run(source, "--extra", str(source)) == 2
    assert "this is --source itself" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("division", ["official", "divide", "2018"])
def test_lesion_and_duplicates_are_on_one_side_of_a_division(division: str, run: Run, tmp_path: Path) -> None:
    """30 lesions of three images each; two images of every fifth lesion also occur under another lesion's id."""
    folder, lines, number = tmp_path / "source", ["lesion_id,image_id,dx"], 0
    for lesion in range(30):
        diagnosis = ("nv", "mel", "bkl")[lesion % 3]
        for _ in range(3):
            toy_sources.image(folder / f"i{number:03}.png", number)
            lines.append(f"L{lesion},i{number:03},{diagnosis}")
            number += 1
        if lesion % 5 == 0:
            shutil.copy(folder / f"i{number - 1:03}.png", folder / f"j{number:03}.png")
            lines.append(f"M{lesion},j{number:03},{diagnosis}")
    toy_sources.text(folder / "HAM10000_metadata.csv", lines)
    assert run(folder, "--split", division) == 0
    lesion_of = {line.split(",")[1]: int(line.split(",")[0][1:]) for line in lines[1:]}
    lesions = {split: {lesion_of[name] for name in ids(tmp_path, split)} for split in SPLITS}
    assert all(lesions.values())
    assert sum(map(len, lesions.values())) == len(set.union(*lesions.values())) == 30
    for split in SPLITS:
        store = reader(tmp_path)
        groups, names = store.load("groups", split=split), ids(tmp_path, split)
        assert len({(group, lesion_of[name]) for group, name in zip(groups, names, strict=True)}) == len(lesions[split])
        assert are_original(store.load("source", split=split)).all()


@pytest.mark.parametrize("split", SPLITS)
def test_all_images_go_into_one_split_on_request(split: str, run: Run, tmp_path: Path) -> None:
    assert run(toy_sources.ham10000(tmp_path / "source"), "--split", split) == 0
    assert {name: len(ids(tmp_path, name)) for name in SPLITS} == {name: 5 * (name == split) for name in SPLITS}


def test_arrays_do_not_depend_on_the_order_of_files_and_rows(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = toy_sources.ham10000(tmp_path / "source")
    assert run(source) == 0
    before = pipeline.array_bytes(tmp_path)
    table = source / "HAM10000_metadata.csv"
    header, *rows = table.read_text().splitlines()
    toy_sources.text(table, [header, *reversed(rows)])
    walk = os.walk

    def reversed_walk(*arguments: Any, **options: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        for folder, folders, names in walk(*arguments, **options):
            yield folder, folders, sorted(names, reverse=True)

    monkeypatch.setattr(os, "walk", reversed_walk)
    assert run(source) == 0
    assert pipeline.array_bytes(tmp_path) == before
