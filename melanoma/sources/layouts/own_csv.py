"""The user's own CSV: image,label[,mask][,split][,group], with paths relative to the CSV.

label: a diagnosis of `melanoma.sources.diagnoses`, or 0, 1, 2 in the order of the classes, or empty. mask: empty where
there is none. split: train, val or test. group: lesion or patient.
"""

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

from melanoma.classes import CLASSES
from melanoma.errors import InputError
from melanoma.sources import csv_table
from melanoma.sources.diagnoses import NO_DIAGNOSIS, class_of
from melanoma.sources.files import SPLIT_WORD, Files, Pair, key
from melanoma.sources.layouts.layout import Annotation, Entry, Layout, Reading
from melanoma.sources.records import IMAGE_SUFFIXES

import pandas as pd

COLUMNS = {  # names that are accepted, the documented one first
    "image": ("image", "image_path", "path", "file", "filename"),
    "label": ("label", "diagnosis", "class"),
    "mask": ("mask",),
    "split": ("split",),
    "group": ("group", "patient", "patient_id", "lesion", "lesion_id"),
}


NUMBERS = ", ".join(f"{number} {name}" for number, name in enumerate(CLASSES))


def recognise(files: Files) -> bool:
    """Whether there is a CSV with a column of images and another one of COLUMNS."""
    return bool(_paths(files))


def _paths(files: Files) -> list[Path]:
    others = {name for column, names in COLUMNS.items() if column != "image" for name in names}
    return [path for path, header in files.headers.items() if header & set(COLUMNS["image"]) and header & others]


def read(files: Files) -> Reading:
    """Reads the one table of this kind below a folder.

    Raises:
        InputError: there is none, or several.
    """
    paths = _paths(files)
    if len(paths) != 1:
        found = f"found {', '.join(map(str, paths))}; name one as --source" if paths else "found none"
        raise InputError(f"{files.root}: expected one CSV with the columns {', '.join(COLUMNS)}, {found}")
    return read_table(csv_table.read(paths[0]))


def read_table(table: csv_table.Table) -> Reading:
    """Reads the images that a table lists.

    Raises:
        InputError: no column of images, an image is listed twice, two images have one id, an unknown split, or splits
            for some rows only; names the line.
    """
    columns, unused = _columns(table)
    entries, lines = [], dict[str, int]()
    stems = Counter(key(Path(name).stem) for name in columns["image"])
    for number, row in columns.iterrows():
        line, image = int(str(number)), Path(row["image"])
        parts = [image.stem] if stems[key(image.stem)] == 1 else image.with_suffix("").parts
        name = "_".join(part for part in parts if part not in (image.anchor, ".."))
        if first := lines.get(key(name)):
            raise InputError(f"{table.path}, line {line}: {image} has the id {name}, as line {first}; rename one")
        lines[key(name)] = line
        entries.append(_entry(table.path, line, name, row))
    if len({entry.pair.split is None for entry in entries}) > 1:
        line = columns.index[columns["split"] == ""][0]
        raise InputError(f"{table.path}, line {line}: no split, though other lines have one")
    remarks = [*unused, *_unlisted(table.path, entries), *_numbers(entries)]
    return Reading(entries, tables=[table.path], remarks=remarks)


def _columns(table: csv_table.Table) -> tuple[pd.DataFrame, list[str]]:
    """The columns under their documented names, without equal rows; and a line about columns that are not used."""
    used = {
        next(name for name in names if name in table.columns): column
        for column, names in COLUMNS.items()
        if set(names) & set(table.columns)
    }
    if "image" not in used.values():
        csv_table.require(table, ["image"])
    columns = table.columns.rename(columns=used).reindex(columns=list(COLUMNS), fill_value="")
    columns["image"] = [Path(name.replace("\\", "/")).as_posix() if name else "" for name in columns["image"]]
    repeated = columns.duplicated()
    notes = [f"{repeated.sum()} rows that occur twice"] * bool(repeated.any())
    csv_table.log_assumptions(replace(table, assumptions=(*table.assumptions, *notes)))
    columns = columns[~repeated]
    for line in columns.index[columns["image"] == ""][:1]:
        raise InputError(f"{table.path}, line {line}: no image")
    for line, name in columns.loc[columns["image"].duplicated(), "image"].items():
        raise InputError(f"{table.path}, line {line}: {name} is listed twice; remove one line")
    unused = [str(name) for name in table.columns if name not in used]
    return columns, [f"{table.path.name}: columns not used: {', '.join(unused)}"] * bool(unused)


def _entry(table: Path, line: int, name: str, row: pd.Series) -> Entry:
    image = find(table.parent, row["image"])
    mask = find(table.parent, row["mask"]) if row["mask"] else None
    missing = [str(path) for path in (image, mask) if path and not path.is_file()]
    group = f"{table.absolute()}: {row['group']}" if row["group"] else None
    one = Pair(name, _split(table, line, row["split"]), image, mask)
    label = "" if row["label"].casefold() in NO_DIAGNOSIS else row["label"]
    if label.isdecimal() and class_of(label) is None:
        raise InputError(f"{table}, line {line}: label {label}; numbers are {NUMBERS}")
    return Entry(one, Annotation(label, group), f"{missing[0]}: no such file" if missing else None)


def find(folder: Path, name: str) -> Path:
    """The file at a path, regardless of upper and lower case and of a missing image suffix; else the path itself."""
    path, found = Path(name.replace("\\", "/")), folder
    for part in path.parts:
        if (found / part).exists():
            found = found / part
        elif other := _listing(found).get(key(part)):
            found = found / other
        else:
            return folder / path
    return found


@cache
def _listing(folder: Path) -> dict[str, str]:
    """Names in a folder by their `key`, and those of images also by that of their stem; exact names first."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    stems = {key(Path(name).stem): name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES}
    return stems | {key(name): name for name in names}


def _unlisted(table: Path, entries: list[Entry]) -> list[str]:
    """A line about images in the same folders that the table does not list."""
    listed = {path for entry in entries for path in (entry.pair.image, entry.pair.mask) if path}
    folders = {entry.pair.image.parent for entry in entries if entry.pair.image.is_file()}
    others = [
        path
        for folder in folders
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and path not in listed
    ]
    return [f"{len(others)} images in the same folders are not listed in {table.name}"] * bool(others)


def _numbers(entries: list[Entry]) -> list[str]:
    """A line about the meaning of labels that are numbers."""
    return [f"labels are {NUMBERS}"] * any(entry.annotation.diagnosis.isdecimal() for entry in entries)


def _split(path: Path, line: int, word: str) -> str | None:
    if not word:
        return None
    if found := SPLIT_WORD.fullmatch(word.lower()):
        return found[1]
    raise InputError(f"{path}, line {line}: split {word!r}; expected train, val or test")


LAYOUT = Layout("csv", "a CSV of image,label,mask,split,group", recognise, read)
