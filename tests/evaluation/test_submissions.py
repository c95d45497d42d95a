"""Prediction files in the challenge's format: accepted forms, refused content, round trip."""

from pathlib import Path

from melanoma.errors import InputError
from melanoma.evaluation import submissions

import numpy as np
import pytest

IDS = {"val": ["ISIC_1", "ISIC_2"], "test": ["ISIC_3"]}
EXPECTED = [[0.6, 0.3, 0.1], [0.0, 0.75, 0.25]]
HEADER = "image_id,melanoma,seborrheic_keratosis"


def write(folder: Path, *lines: str) -> Path:
    path = folder / "system.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "lines",
    [
        (HEADER, "ISIC_1,0.3,0.1", "ISIC_2,0.75,0.25"),
        ("ISIC_1,0.3,0.1", "ISIC_2,0.75,0.25"),
        ("ISIC_2.jpg,0.75,0.25", "ISIC_1.jpg, 0.30, 1e-1"),
        ("Seborrheic_Keratosis,image_id,age,melanoma", "0.1,ISIC_1,40,0.3", "0.25,ISIC_2.JPG,,0.75"),
        ("image,benign_nevus,melanoma,seborrheic_keratosis,flags", "ISIC_1,0.6,0.3,0.1,", "ISIC_2,0,0.75,0.25,small"),
        (HEADER, "isic_1,0.3,0.1", "Isic_2.TIFF,0.75,0.25", "ISIC_1.png,0.30,0.1"),
        (f"\ufeff{HEADER}\r", "ISIC_1,0.3,0.1\r", "", "ISIC_2,0.75,0.25\r"),
    ],
    ids=[
        "header",
        "no header",
        "suffixes, other order",
        "other columns",
        "of predict.py",
        "case, repeated row",
        "BOM, CRLF, empty line",
    ],
)
def test_common_forms_are_read(lines: tuple[str, ...], tmp_path: Path) -> None:
    found = submissions.read(write(tmp_path, *lines), IDS)
    assert list(found) == ["val"]
    assert found["val"] == pytest.approx(np.array(EXPECTED))


def test_file_may_cover_several_splits(tmp_path: Path) -> None:
    found = submissions.read(write(tmp_path, "ISIC_3,1,0", "ISIC_1,0.3,0.1", "ISIC_2,0.75,0.25"), IDS)
    assert found["test"].tolist() == [[0, 1, 0]] and found["val"] == pytest.approx(np.array(EXPECTED))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((HEADER, "ISIC_1,0.3,0.1"), "no predictions for some ids of val: ISIC_2"),
        (("ISIC_3,0,0", "ISIC_3.jpg,0,0.5"), "line 2: ISIC_3 is listed twice with different content, first in line 1"),
        (("ISIC_3,0,0", ",0,0.5"), "line 2: no image id"),
        (("ISIC_3,0,0", "ISIC_9,0,0"), "that are in no split of the data folder: ISIC_9"),
        (("ISIC_3,1.01,0",), "outside 0 to 1: ISIC_3"),
        (("ISIC_3,0,-0.01",), "outside 0 to 1: ISIC_3"),
        (("ISIC_3,nan,0",), "line 1: ISIC_3 has melanoma 'nan'"),
        (("ISIC_3,NaN,0",), "line 1: ISIC_3 has melanoma 'NaN'"),
        (("ISIC_3,inf,0",), "outside 0 to 1: ISIC_3"),
        (("ISIC_3,,0",), "outside 0 to 1: ISIC_3"),
        (("ISIC_3,high,0",), "line 1: ISIC_3 has melanoma 'high'"),
        (("ISIC_3,0",), "has 2 columns"),
        (("ISIC_3,0,0,0",), "has 4 columns"),
        (("image_id,melanoma,nevus", "ISIC_3,0,0"), "no column seborrheic_keratosis; it has image_id, melanoma, nevus"),
        (("image_id,melanoma,melanoma,seborrheic_keratosis", "ISIC_3,0,0,0"), "more than one column is named melanoma"),
        ((HEADER,), "contains no predictions"),
        (("ISIC_3,0,0", "ISIC_1,0,0,0"), "line 2: 4 cells, but the first line has 3"),
        (("",), "the file is empty"),
    ],
)
def test_unusable_predictions_are_refused(lines: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        submissions.read(write(tmp_path, *lines), IDS)


def test_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        submissions.read(tmp_path / "none.csv", IDS)
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.raises(InputError, match="not a CSV file; save a spreadsheet as CSV"):
        submissions.read(tmp_path / "picture.csv", IDS)


def test_written_file_is_read_back(tmp_path: Path) -> None:
    submissions.write(tmp_path / "own.csv", IDS["val"], np.array(EXPECTED))
    assert (tmp_path / "own.csv").read_text().splitlines()[0] == HEADER
    assert submissions.read(tmp_path / "own.csv", IDS)["val"] == pytest.approx(np.array(EXPECTED))
