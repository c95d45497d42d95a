"""Subgroups by sex and age: who belongs to which, what is refused, what evaluate.py writes."""

import json
from pathlib import Path

from melanoma.artifacts import contract
from melanoma.classes import MELANOMA
from melanoma.errors import InputError
from melanoma.evaluation import report, subgroups

import numpy as np
import pandas as pd
import pipeline
import pytest
from pipeline import reader


def write_metadata(folder: Path, path: Path) -> Path:
    """Writes ages and sexes in turn for the test split of a chain, without its last image."""
    ids = reader(folder).load("ids", split="test").tolist()[:-1]
    ages, sexes = [str(20 + 10 * (place % 6)) for place in range(len(ids))], ["female", "male", ""] * len(ids)
    table = {"image_id": ids, "age_approximate": [*ages[:-1], "unknown"], "sex": sexes[: len(ids)]}
    pd.DataFrame(table).to_csv(path, index=False)
    return path


def test_age_bands_start_with_their_first_year() -> None:
    metadata = pd.DataFrame({"age_approximate": [39, 40, 59, 60, np.nan], "sex": ["male"] * 5}, index=list("abcde"))
    found = {name: rows.tolist() for name, rows in subgroups.subgroups(metadata, list("abcde")).items()}
    assert [found[name] for name in (*subgroups.AGE_BANDS, "age unknown")] == [[0], [1, 2], [3], [4]]


def test_groups_without_images_are_left_out_and_missing_ids_are_unknown() -> None:
    metadata = pd.DataFrame({"age_approximate": [70.0], "sex": ["female"]}, index=["a"])
    found = {name: rows.tolist() for name, rows in subgroups.subgroups(metadata, ["b", "a"]).items()}
    assert found == {"female": [1], "sex unknown": [0], "60 years and more": [1], "age unknown": [0]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image_id,sex\nISIC_1,male\n", "no column age_approximate"),
        ("image_id,age_approximate,sex\nISIC_1,30,male\nISIC_1,35,male\n", "line 3: ISIC_1 is listed twice"),
        ("", "the file is empty"),
        (None, "no such file"),
        ("image_id,age_approximate,sex\nISIC_2,30,male\n,,\n,,\n", "has no id of these images"),
    ],
)
def test_unusable_metadata_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "metadata.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        subgroups.read_metadata([path], {"val": ["ISIC_1"]})


@pytest.mark.parametrize(
    "header", ["image_id,age_approximate,sex", "isic_id,age_approx,sex", "image_name,AGE,Sex", "image,age,sex"]
)
def test_usual_column_names_and_spellings_are_read(header: str, tmp_path: Path) -> None:
    path = tmp_path / "metadata.csv"
    path.write_text(f"{header}\nisic_1.jpg,30,F\nISIC_2,85+,Male\nISIC_2,85+,male\nISIC_9,,\n")
    metadata = subgroups.read_metadata([path], {"val": ["ISIC_1"], "test": ["ISIC_2", "ISIC_3"]})
    assert metadata.index.tolist() == ["ISIC_1", "ISIC_2"]
    assert metadata["sex"].tolist() == ["female", "male"]
    assert metadata["age_approximate"][["ISIC_1"]].tolist() == [30] and np.isnan(metadata["age_approximate"]["ISIC_2"])


def test_ages_that_are_no_number_are_counted_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "melanoma")
    path = tmp_path / "metadata.csv"
    path.write_text("image;age;sex\nISIC_1;old;male\nISIC_2;;male\nISIC_3;555;W\nISIC_4;-1;\n")
    subgroups.read_metadata([path], {"val": ["ISIC_1", "ISIC_5"]})
    assert caplog.messages == [
        f"{path}: read with delimiter ;, unreadable ages taken as unknown: 3, unreadable sexes taken as unknown: 1",
        "--metadata: 1 of 2 images are listed; 3 other lines are ignored",
    ]


def test_files_may_repeat_an_image_but_not_differ(tmp_path: Path) -> None:
    paths = [tmp_path / "first.csv", tmp_path / "second.csv"]
    paths[0].write_text("image_id,age_approximate,sex\nISIC_1,30,male\n")
    paths[1].write_text("image_id,age_approximate,sex\nisic_1,30.0,male\n")
    assert len(subgroups.read_metadata(paths, {"val": ["ISIC_1"]})) == 1
    paths[1].write_text("image_id,age_approximate,sex\nisic_1,,male\n")
    with pytest.raises(InputError, match="the files differ in age or sex of: isic_1"):
        subgroups.read_metadata(paths, {"val": ["ISIC_1"]})


def test_metadata_of_other_images_is_refused_before_results_are_removed(own_chain: Path, tmp_path: Path) -> None:
    path, before = tmp_path / "metadata.csv", (own_chain / "graphics" / "metrics.json").read_bytes()
    path.write_text("image_id,age_approximate,sex\nISIC_1,30,male\n")
    with pytest.raises(InputError, match="has no id of these images"):
        pipeline.run(contract.EVALUATION, own_chain, "--metadata", str(path))
    assert (own_chain / "graphics" / "metrics.json").read_bytes() == before


def test_metrics_by_sex_and_age_are_of_those_images(own_chain: Path, tmp_path: Path) -> None:
    path = write_metadata(own_chain, tmp_path / "metadata.csv")
    pipeline.run(contract.EVALUATION, own_chain, "--metadata", str(path))
    graphics, labels = own_chain / "graphics", reader(own_chain).load("labels", split="test")
    groups = json.loads((graphics / "metrics.json").read_text())["systems"][pipeline.BACKBONE]["subgroups"]
    assert set(groups["val"]) == {"sex unknown", "age unknown"}
    assert groups["test"]["female"]["n"] == 4 and groups["test"]["sex unknown"]["n"] == 4
    for names in (("female", "male", "sex unknown"), (*subgroups.AGE_BANDS, "age unknown")):
        assert sum(groups["test"][name]["n"] for name in names) == len(labels)
        assert sum(groups["test"][name]["melanomas"] for name in names) == (labels == MELANOMA).sum()
    card = (graphics / report.CARD).read_text(encoding="utf-8")
    assert "| female | 4 |" in card and "By sex and age: not" not in card
    assert '<th scope="row">female</th><td>4</td>' in (graphics / report.PAGE).read_text(encoding="utf-8")
