"""CSV tables of labels, predictions and metadata, in the dialects that spreadsheets and other programs write.

Delimiter, encoding, decimal comma and a missing header are recognised; whatever differs from a UTF-8 file with commas
and a header is listed in `Table.assumptions`, for the log. What is ambiguous is refused; the error names the line.
"""

import codecs
import csv
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from melanoma.errors import InputError
from melanoma.log import log
from melanoma.sources.records import IMAGE_SUFFIXES

import pandas as pd

ID_COLUMNS = ("image_id", "image", "image_name", "isic_id")  # the names of the challenges 2016 to 2024 and the archive
DELIMITERS = {"\t": "tab", "|": "|", ";": ";", ",": ","}  # in order of preference: a comma may be a decimal comma
IMAGE_EXTENSION = rf"(?:{'|'.join(map(re.escape, sorted(IMAGE_SUFFIXES)))})$"
DECIMAL_COMMA = r"([+-]?\d*),(\d+(?:e[+-]?\d+)?)"
VALUE = re.compile(rf"[+-]?(?:\d*[.,])?\d+(?:e[+-]?\d+)?|isic_\d+|.+{IMAGE_EXTENSION}")  # never a column's name
EXCEL_HINT = re.compile(r'"?sep=."?\r?\n')  # a first line that Excel writes and reads
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0e-\x1f]")  # that no text file contains
UTF8 = "UTF-8"
HEADER_BYTES, HEADER_LINES = 65536, 3  # enough of a file for its first line, and for a line "sep=;" before it
WORDS = {"true": "1", "yes": "1", "false": "0", "no": "0"}


@dataclass(frozen=True)
class Table:
    """A CSV file's content as text.

    Attributes:
        path: the file.
        columns: str cells without surrounding blanks, "" where empty. Names are lower case; those of a file without
            header are "1", "2" and so on. The index is the line in the file, from 1.
        assumptions: how the file was read where it is not a UTF-8 file with commas and a header.
        header: whether the first line is a header.
    """

    path: Path
    columns: pd.DataFrame
    assumptions: tuple[str, ...] = ()
    header: bool = True


def read(path: Path, header: bool | None = None) -> Table:
    """Reads a CSV file: comma, semicolon, tab or | between cells; UTF-8, UTF-16 with byte order mark, or cp1252.

    Blank lines, columns without a name, and empty cells beyond the last column are left out; missing cells at the end
    of a line are empty.

    Args:
        path: the file.
        header: whether the first line is a header; None: it is, unless a cell is a number or an image's name.

    Raises:
        InputError: the file is missing, empty, not text or not a regular CSV, or two columns have the same name.
    """
    text, encoding = _decode(path, _content(path))
    lines, delimiter = _records(path, text)
    first = next(iter(lines))
    names = [cell.lower() for cell in lines[first]]
    if header is None:
        header = _is_header(names)
    if header:
        del lines[first]
    else:
        names = [str(number) for number in range(1, len(names) + 1)]
    if repeated := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
        raise InputError(f"{path}: more than one column is named {', '.join(repeated)}; rename or remove one")
    columns = _frame(path, names, lines)
    unnamed = columns.columns == ""
    ignored = (columns.loc[:, unnamed] != "").to_numpy().any()
    columns = columns.loc[:, ~unnamed]
    decimal_comma = any(columns[name].str.fullmatch(DECIMAL_COMMA, case=False).any() for name in columns)
    assumptions = {
        f"delimiter {DELIMITERS[delimiter]}": delimiter != ",",
        f"encoding {encoding}": encoding != UTF8,
        "no header": not header,
        "decimal comma": decimal_comma,
        "columns without a name left out": ignored,
    }
    return Table(path, columns, tuple(note for note, true in assumptions.items() if true), header)


def read_text(path: Path) -> str:
    """A file's text, in the encodings of `read`; errors as there."""
    return _decode(path, _content(path))[0]


def header(path: Path) -> set[str]:
    """The cells of the first line, in lower case, of a file that may be a table; none if it cannot be read as one."""
    try:
        with path.open("rb") as stream:
            text, _ = _decode(path, stream.read(HEADER_BYTES))
        lines, _ = _records(path, "\n".join(text.splitlines()[:HEADER_LINES]))
    except (OSError, InputError):
        return set()
    return {cell.lower() for cell in next(iter(lines.values()))}


def name_columns(table: Table, names: Sequence[str]) -> Table:
    """Names the columns of a file without header; a table with a header stays as it is.

    Raises:
        InputError: there is no header, and another number of columns.
    """
    if table.header:
        return table
    if table.columns.shape[1] != len(names):
        raise InputError(
            f"{table.path} has {table.columns.shape[1]} columns and no header; expected {','.join(names)}, or a header"
        )
    return replace(table, columns=table.columns.set_axis(list(names), axis=1))


def require(table: Table, columns: Sequence[str]) -> None:
    """Checks that columns exist.

    Raises:
        InputError: one does not; names those that are missing and those that there are.
    """
    if missing := [name for name in columns if name not in table.columns]:
        raise InputError(f"{table.path}: no column {', '.join(missing)}; it has {', '.join(table.columns.columns)}")


def select(table: Table, columns: Mapping[str, Sequence[str]]) -> Table:
    """Keeps some columns, under standard names.

    Args:
        table: any table.
        columns: {standard name: names that are accepted, the preferred one first}.

    Raises:
        InputError: none of the accepted names of a column exists.
    """
    found = {
        next((other for other in accepted if other in table.columns), name): name for name, accepted in columns.items()
    }
    require(table, list(found))
    return replace(table, columns=table.columns[list(found)].rename(columns=found))


def ids(table: Table, column: str) -> pd.Series:
    """Image ids as the file spells them, without folder and image extension, indexed by line.

    Raises:
        InputError: an id is empty; names the line.
    """
    names = table.columns[column].str.replace(r"^.*[/\\]", "", regex=True)
    names = names.str.replace(IMAGE_EXTENSION, "", case=False, regex=True).str.strip()
    for line in names.index[names == ""][:1]:
        raise InputError(f"{table.path}, line {line}: no image id in column {column}")
    return names


def numbers(table: Table, column: str, strict: bool = False) -> pd.Series:
    """A column's numbers, float, NaN where there is none, indexed by line.

    A comma is a decimal comma; true and yes are 1, false and no are 0.

    Args:
        table: any table.
        column: its name.
        strict: refuse a cell that is neither empty nor a number.

    Raises:
        InputError: such a cell, with `strict`; names line, id and text.
    """
    texts = table.columns[column]
    values = _to_numbers(texts)
    invalid = values.index[values.isna() & (texts != "")]
    if strict and len(invalid):
        line = invalid[0]
        names = [name for name in ID_COLUMNS if name in table.columns] or table.columns.columns.tolist()
        image = table.columns[names[0]][line]
        raise InputError(f"{table.path}, line {line}: {image} has {column} {texts[line]!r}; expected a number")
    return values


def drop_equal_rows(table: Table, column: str) -> Table:
    """Drops rows that repeat an earlier one, and counts them in the assumptions.

    Args:
        table: any table.
        column: the image ids, compared without regard to case, folder and extension. In the other columns 0, 0.0 and
            FALSE are equal.

    Raises:
        InputError: an id has two rows of different content; names both lines.
    """
    names = ids(table, column)
    others = table.columns.drop(columns=column)
    content = others.apply(lambda texts: _to_numbers(texts).astype(object).fillna(texts.str.casefold()))
    content.insert(0, column, names.str.casefold())
    repeated = content.duplicated()
    different = content[column][~repeated].duplicated()
    for line in different.index[different][:1]:
        first = content.index[content[column] == content.at[line, column]][0]
        raise InputError(
            f"{table.path}, line {line}: {names[line]} is listed twice with different content, first in line {first}; "
            "remove one"
        )
    if not (count := int(repeated.sum())):
        return table
    note = f"{count} rows that occur twice" if count > 1 else "1 row that occurs twice"
    return replace(table, columns=table.columns[~repeated], assumptions=(*table.assumptions, note))


def log_assumptions(table: Table) -> None:
    """Logs one line if the file is not a UTF-8 file with commas and a header."""
    if table.assumptions:
        path = os.fsencode(table.path).decode(errors="backslashreplace")  # a name need not be valid UTF-8
        log.info("%s: read with %s", path, ", ".join(table.assumptions))


def _content(path: Path) -> bytes:
    """The file's content; errors as of `read`."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder; name the CSV file in it") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _decode(path: Path, content: bytes) -> tuple[str, str]:
    """The text of a file's content and its encoding; errors as of `read`."""
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    content = content.removeprefix(codecs.BOM_UTF8)
    for encoding in ("UTF-16",) if utf16 else (UTF8, "cp1252"):
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if CONTROL_CHARACTERS.search(text):
            break
        if not text.strip():
            raise InputError(f"{path}: the file is empty")
        return text, encoding
    raise InputError(f"{path}: not a CSV file; save a spreadsheet as CSV")


def _records(path: Path, text: str) -> tuple[dict[int, list[str]], str]:
    """Cells without surrounding blanks by line, blank lines left out, and the delimiter; errors as of `read`."""
    records = {}
    line = 1
    try:
        delimiter = _delimiter(text)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        for cells in reader:
            stripped = [cell.strip() for cell in cells]
            if any(stripped) and not (line == 1 and EXCEL_HINT.match(text)):
                records[line] = stripped
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: not a readable CSV file ({error})") from None
    if not records:
        raise InputError(f"{path}: the file is empty")
    return records, delimiter


def _frame(path: Path, names: Sequence[str], lines: Mapping[int, list[str]]) -> pd.DataFrame:
    """Cells under these names; errors as of `read`."""
    for line, cells in lines.items():
        if any(cells[len(names) :]):
            raise InputError(
                f"{path}, line {line}: {len(cells)} cells, but the first line has {len(names)}; "
                "put a cell that contains the delimiter in double quotes"
            )
    rows = [(cells + [""] * len(names))[: len(names)] for cells in lines.values()]
    return pd.DataFrame(rows, index=pd.Index(lines, name="line", dtype=int), columns=list(names), dtype=str)


def _delimiter(text: str) -> str:
    """The delimiter that gives a first line with an id column, or else the most cells."""
    first = next(line for line in text.splitlines() if line.strip())

    def quality(delimiter: str) -> tuple[bool, int]:
        cells = next(csv.reader([first], delimiter=delimiter, skipinitialspace=True))
        return any(cell.strip().lower() in ID_COLUMNS for cell in cells), len(cells)

    found = max(DELIMITERS, key=quality)
    return found if quality(found)[1] > 1 else ","


def _is_header(names: Sequence[str]) -> bool:
    """Whether a first line, in lower case, is a header: a column of ids, or no cell that can only be a value."""
    return any(name in ID_COLUMNS for name in names) or not any(VALUE.fullmatch(name) for name in names)


def _to_numbers(texts: pd.Series) -> pd.Series:
    """Floats, NaN where a text is not a number."""
    plain = texts.str.casefold().replace(WORDS).str.replace(f"^{DECIMAL_COMMA}$", r"\1.\2", regex=True)
    return pd.to_numeric(plain, errors="coerce").astype(float)
