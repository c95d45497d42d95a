"""CSV tables: every dialect reads the same, by every reader; what cannot be read for certain is refused."""

import csv
import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from melanoma.classes import KERATOSIS, MELANOMA, NEVUS
from melanoma.errors import InputError
from melanoma.evaluation import subgroups, submissions
from melanoma.sources import csv_table
from melanoma.sources.layouts import challenge_2017

import numpy as np
import pytest

IDS = {"val": ["ISIC_1", "ISIC_2", "ISIC_3"]}
NOTE = ["note", "naïve", "größer, älter", 'called "mole"; flat']  # non-ASCII letters, delimiters, quotes


def labels(path: Path) -> Any:
    return {name.upper(): label for name, label in challenge_2017.read_labels(path).items()}


def predictions(path: Path) -> Any:
    return submissions.read(path, IDS)["val"].round(6).tolist()


def metadata(path: Path) -> Any:
    return subgroups.read_metadata([path], IDS).to_dict("index")


class Case(NamedTuple):
    """A reader, a table for it, and what it returns."""

    read: Callable[[Path], Any]
    header: list[str]
    rows: list[list[str]]
    expected: Any


HEADER = ["image_id", "melanoma", "seborrheic_keratosis"]
CASES = {
    "labels": Case(
        labels,
        HEADER,
        [["ISIC_1", "1.0", "0.0"], ["ISIC_2", "0.0", "0.0"], ["ISIC_3", "0.0", "1.0"]],
        {"ISIC_1": MELANOMA, "ISIC_2": NEVUS, "ISIC_3": KERATOSIS},
    ),
    "predictions": Case(
        predictions,
        HEADER,
        [["ISIC_1", "0.5", "0.25"], ["ISIC_2", "1", "0"], ["ISIC_3", "1e-1", "0.9"]],
        [[0.25, 0.5, 0.25], [0, 1, 0], [0, 0.1, 0.9]],
    ),
    "metadata": Case(
        metadata,
        ["image_id", "age_approximate", "sex"],
        [["ISIC_1", "40", "male"], ["ISIC_2", "55.5", "female"], ["ISIC_3", "7", "male"]],
        {
            "ISIC_1": {"age_approximate": 40, "sex": "male"},
            "ISIC_2": {"age_approximate": 55.5, "sex": "female"},
            "ISIC_3": {"age_approximate": 7, "sex": "male"},
        },
    ),
}
CLASSES_AND_PROBABILITIES = [CASES["labels"], CASES["predictions"]]
every_reader = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
two_readers = pytest.mark.parametrize("case", CLASSES_AND_PROBABILITIES, ids=["labels", "predictions"])


def write(
    path: Path, rows: Sequence[Sequence[str]], delimiter: str = ",", encoding: str = "utf-8", newline: str = "\n"
) -> Path:
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter, lineterminator=newline).writerows(rows)
    path.write_bytes(stream.getvalue().encode(encoding))
    return path


def with_note(case: Case) -> list[list[str]]:
    return [[*row, note] for row, note in zip([case.header, *case.rows], NOTE, strict=True)]


@every_reader
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_every_dialect_reads_the_same(case: Case, encoding: str, tmp_path: Path) -> None:
    respellings: list[Callable[[str], str]] = [str, lambda cell: f" {cell.swapcase()} "]
    dialects = itertools.product(",;\t|", ".,", ("\n", "\r\n", "\r"), respellings)
    for delimiter, decimal, newline, respell in dialects:
        header, *rows = with_note(case)
        rows = [[row[0], *(cell.replace(".", decimal) for cell in row[1:3]), row[3]] for row in rows]
        rows = [[*map(respell, row[:3]), row[3]] for row in [header, *rows]]
        path = write(tmp_path / "table.csv", rows, delimiter, encoding, newline)
        assert case.read(path) == case.expected, (delimiter, decimal, newline)


@every_reader
@pytest.mark.parametrize(
    "name", ["{}.jpg", "{}.JPEG", "{}.png", "{}.tif", "{}.TIFF", "{}.bmp", "{}.webp", "images/{}.jpg"]
)
def test_image_file_names_are_ids(case: Case, name: str, tmp_path: Path) -> None:
    rows = [[name.format(row[0]), *row[1:]] for row in case.rows]
    assert case.read(write(tmp_path / "table.csv", [case.header, *rows])) == case.expected


@every_reader
@pytest.mark.parametrize("column", csv_table.ID_COLUMNS)
def test_id_column_has_any_usual_name_and_place(case: Case, column: str, tmp_path: Path) -> None:
    rows = [[column.upper(), *case.header[1:]], *case.rows]
    assert case.read(write(tmp_path / "table.csv", [row[::-1] for row in rows])) == case.expected


@every_reader
def test_blank_lines_and_empty_cells_at_the_end_are_skipped(case: Case, tmp_path: Path) -> None:
    content = "\n".join(f"{','.join(row)},,\n , ,,\n" for row in [case.header, *case.rows])
    (tmp_path / "table.csv").write_text(f"\n{content}\n\n")
    assert case.read(tmp_path / "table.csv") == case.expected


@every_reader
def test_column_without_name_is_left_out(case: Case, tmp_path: Path) -> None:
    rows = [["", *case.header], *([str(place), *row] for place, row in enumerate(case.rows))]  # as pandas writes
    path = write(tmp_path / "table.csv", rows)
    assert case.read(path) == case.expected
    assert csv_table.read(path).assumptions == ("columns without a name left out",)


@every_reader
def test_delimiter_that_excel_names_in_a_first_line_is_used(case: Case, tmp_path: Path) -> None:
    content = "\n".join(";".join(row) for row in [case.header, *case.rows])
    (tmp_path / "table.csv").write_text(f"sep=;\n{content}\n")
    assert case.read(tmp_path / "table.csv") == case.expected


@two_readers
@pytest.mark.parametrize(("delimiter", "decimal"), [(",", "."), (";", ","), ("\t", ","), ("|", "."), (",", ",")])
def test_file_without_header_reads_the_same(case: Case, delimiter: str, decimal: str, tmp_path: Path) -> None:
    rows = [[row[0], *(cell.replace(".", decimal) for cell in row[1:])] for row in case.rows]
    path = write(tmp_path / "table.csv", rows, delimiter)
    assert case.read(path) == case.expected
    assert "no header" in csv_table.read(path).assumptions


@two_readers
@pytest.mark.parametrize(
    ("one", "zero"), [("TRUE", "FALSE"), ("True", "false"), ("yes", "No"), ("1", "0.0"), ("1,0", "0")]
)
def test_truth_values_are_numbers(case: Case, one: str, zero: str, tmp_path: Path) -> None:
    rows = [["ISIC_1", one, zero], ["ISIC_2", zero, one], ["ISIC_3", zero, zero]]
    found = case.read(write(tmp_path / "table.csv", [HEADER, *rows], ";"))
    assert found in ({"ISIC_1": MELANOMA, "ISIC_2": KERATOSIS, "ISIC_3": NEVUS}, [[0, 1, 0], [0, 0, 1], [1, 0, 0]])


@every_reader
def test_equal_rows_count_once_and_are_logged(case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "melanoma")
    again = [[f"{row[0].lower()}.jpg", row[1].replace(".0", ""), row[2].upper()] for row in case.rows[:2]]
    path = write(tmp_path / "table.csv", [case.header, *case.rows, *again], ";")
    assert case.read(path) == case.expected
    assert caplog.messages == [f"{path}: read with delimiter ;, 2 rows that occur twice"]


@every_reader
@pytest.mark.parametrize("name", ["ISIC_2", "isic_2.jpg", "images\\ISIC_2.PNG"])
def test_different_rows_of_an_image_are_refused_with_both_lines(case: Case, name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "table.csv", [case.header, *case.rows, [name, *case.rows[0][1:]]])
    with pytest.raises(
        InputError, match=r"line 5: (?i:isic_2) is listed twice with different content, first in line 3"
    ):
        case.read(path)


@every_reader
@pytest.mark.parametrize("name", ["", "  ", ".jpg", "images/"])
def test_row_without_id_is_refused_with_its_line(case: Case, name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "table.csv", [case.header, *case.rows, [], [name, *case.rows[0][1:]]])
    with pytest.raises(InputError, match=r"table\.csv, line 6: no image id"):
        case.read(path)


@every_reader
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf \r\n\n", "the file is empty"),
        (b";;;\n", "the file is empty"),
        (b"PK\x03\x04\x14\x00\x06\x00", "not a CSV file; save a spreadsheet as CSV"),
        (b"\x89PNG\r\n\x1a\n\x00", "not a CSV file"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "not a CSV file"),
        (b"\xff\xfei\x00m", "not a CSV file"),
        ("image_id,melanoma".encode("utf-16-le"), "not a CSV file"),
        (b"image_id,sex\n\x81\x8d\n", "not a CSV file"),
        (b'image_id,sex\na,"male\nb,male\n', "line 2: not a readable CSV"),
        (b"image_id,sex\n\na,male,1\n", "line 3: 3 cells, but the first line has 2"),
        (b"image_id,Sex, sex \na,male,male\n", "more than one column is named sex"),
        (b"picture;place\na;b\n", "no column image_id, .*; it has picture, place"),
        (b"<!DOCTYPE html>\n<html>\n", "no column image_id, .*; it has <!doctype html>"),
        (b"x" * 200_000, "line 1: not a readable CSV"),
    ],
)
def test_unreadable_content_is_refused(case: Case, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(InputError, match=rf"table\.csv.*{message}"):
        case.read(tmp_path / "table.csv")


@every_reader
def test_missing_file_and_folder_are_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"table\.csv: no such file"):
        case.read(tmp_path / "table.csv")
    with pytest.raises(InputError, match="a folder; name the CSV file in it"):
        case.read(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be read"):
        case.read(tmp_path / "file" / "table.csv")


@every_reader
def test_only_deviations_are_logged(case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "melanoma")
    case.read(write(tmp_path / "table.csv", with_note(case), encoding="utf-8-sig", newline="\r\n"))
    assert caplog.messages == []
    rows = [[cell.replace(".", ",") for cell in row] for row in with_note(case)]
    path = write(tmp_path / "table.csv", rows, "|", "cp1252")
    case.read(path)
    assert caplog.messages == [f"{path}: read with delimiter |, encoding cp1252, decimal comma"]


def test_line_numbers_count_blank_lines_and_line_breaks_inside_cells(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text('\nimage,note\n\na,"two\nlines"\nb,\n')
    table = csv_table.read(path)
    assert table.columns.index.tolist() == [4, 6]
    assert table.columns["note"].tolist() == ["two\nlines", ""]


def test_truth_of_2016_has_no_header(tmp_path: Path) -> None:
    path = tmp_path / "truth.csv"
    path.write_text("ISIC_0000000,benign\nISIC_0000002,malignant\n")
    table = csv_table.name_columns(csv_table.read(path), ("image_id", "diagnosis"))
    assert table.columns.to_dict("list") == {
        "image_id": ["ISIC_0000000", "ISIC_0000002"],
        "diagnosis": ["benign", "malignant"],
    }
    assert not table.header and csv_table.read(path, header=True).columns.shape == (1, 2)
    with pytest.raises(InputError, match="has 2 columns and no header; expected image_id,melanoma,seb"):
        challenge_2017.read_labels(path)


def test_delimiter_is_the_one_that_separates_the_id_column(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("image_id;age, in years;place, side, distance in cm\nISIC_1;40;back\n")
    assert csv_table.read(path).columns["image_id"].tolist() == ["ISIC_1"]
    path.write_text('"left, on the arm, 3/ISIC_1.png";0,5;1\n')
    assert csv_table.read(path).columns.to_numpy().tolist() == [["left, on the arm, 3/ISIC_1.png", "0,5", "1"]]


@pytest.mark.parametrize(
    ("line", "header"), [("image_id,0,1", True), ("a,b,c", True), ("a,0,1", False), ("a.png,b,c", False)]
)
def test_first_line_with_a_value_is_no_header_unless_it_names_the_ids(line: str, header: bool, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(f"{line}\n")
    assert csv_table.read(tmp_path / "table.csv").header == header


def test_numbers_are_nan_or_refused_with_line_id_and_text_if_strict(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("image,age\na,1\nb,\nc,?\nd,-2.5e1\n")
    table = csv_table.read(path)
    assert np.array_equal(csv_table.numbers(table, "age"), [1, np.nan, np.nan, -25], equal_nan=True)
    with pytest.raises(InputError, match=r"table\.csv, line 4: c has age '\?'; expected a number"):
        csv_table.numbers(table, "age", strict=True)


def test_ids_keep_the_spelling_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "table.csv", [["image"], ["a/Mole.1.JPG"], ["mole"], ["C:\\x\\MOLE 2.png"]])
    assert csv_table.ids(csv_table.read(path), "image").to_dict() == {2: "Mole.1", 3: "mole", 4: "MOLE 2"}


def test_missing_columns_are_named_with_those_that_there_are(tmp_path: Path) -> None:
    table = csv_table.read(write(tmp_path / "table.csv", [["Image", "Dx "], ["a", "mel"]]))
    csv_table.require(table, ["dx"])
    with pytest.raises(InputError, match="no column age, sex; it has image, dx"):
        csv_table.require(table, ["age", "dx", "sex"])
