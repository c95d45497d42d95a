"""The user's own CSV: image,label[,mask][,split][,group], with paths relative to the CSV.

label: a diagnosis of `melanoma.sources.diagnoses`, or 0, 1, 2 in the order of the classes, or empty. mask: empty where
there is none. split: train, val or test. group: lesion or patient.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from melanoma.errors import InputError
from melanoma.sources import csv_table
from melanoma.sources.files import IMAGE_SUFFIXES, SPLIT_WORD, Files, Pair, key
from melanoma.sources.layouts.layout import Annotation, Entry, Layout, Reading

COLUMNS = ("image", "label", "mask", "split", "group")


def recognise(files: Files) -> bool:
    """Whether there is one CSV with a column image and another one of COLUMNS."""
    return len(_tables(files)) == 1


def _tables(files: Files) -> list[csv_table.Table]:
    return [table for table in files.tables_with("image") if set(COLUMNS[1:]) & set(table.columns.columns)]


def read(files: Files) -> Reading:
    """Reads the one table of this kind below a folder."""
    tables = _tables(files)
    if len(tables) != 1:
        raise InputError(f"{files.root}: expected one CSV with the columns {', '.join(COLUMNS)}, found {len(tables)}")
    return read_table(tables[0])


def read_table(table: csv_table.Table) -> Reading:
    """Reads the images that a table lists.

    Raises:
        InputError: no column image, an image is listed twice, an unknown split, or splits for some rows only; names the
            line.
    """
    csv_table.require(table, ["image"])
    columns = table.columns.reindex(columns=list(COLUMNS), fill_value="")
    repeated = columns.duplicated()
    columns, notes = columns[~repeated], [f"{repeated.sum()} rows that occur twice"] * bool(repeated.any())
    csv_table.log_assumptions(replace(table, assumptions=(*table.assumptions, *notes)))
    for line, name in columns.loc[columns["image"].duplicated(), "image"].items():
        raise InputError(f"{table.path}, line {line}: {name} is listed twice; remove one line")
    if empty := columns.index[columns["image"] == ""].tolist():
        raise InputError(f"{table.path}, line {empty[0]}: no image")
    stems = Counter(key(Path(name).stem) for name in columns["image"])
    entries = []
    for line, row in columns.iterrows():
        path = Path(row["image"])
        unique = stems[key(path.stem)] == 1
        image, problem = _find(table.path.parent, row["image"]), None
        mask = _find(table.path.parent, row["mask"]) if row["mask"] else None
        for found in (image, mask):
            if found and not found.is_file():
                problem = f"{found}: no such file"
        split = _split(table.path, int(str(line)), row["split"])
        one = Pair(path.stem if unique else path.with_suffix("").as_posix(), split, image, mask)
        group = f"{table.path.absolute()}: {row['group']}" if row["group"] else None
        entries.append(Entry(one, Annotation(row["label"], group), problem))
    if len({entry.pair.split is None for entry in entries}) > 1:
        line = columns.index[columns["split"] == ""][0]
        raise InputError(f"{table.path}, line {line}: no split, though other lines have one")
    return Reading(entries)


def _find(folder: Path, name: str) -> Path:
    """The file of a path as written, or else in other letters' case or with an image suffix; else the path itself."""
    path, found = Path(name.replace("\\", "/")), folder
    for part in path.parts:
        if (found / part).exists():
            found = found / part
            continue
        names = sorted(found.iterdir()) if found.is_dir() else []
        same = [other for other in names if key(other.name) == key(part)]
        same += [other for other in names if key(other.stem) == key(part) and other.suffix.lower() in IMAGE_SUFFIXES]
        if not same:
            return folder / path
        found = same[0]
    return found


def _split(path: Path, line: int, word: str) -> str | None:
    if not word:
        return None
    if found := SPLIT_WORD.fullmatch(word.lower()):
        return found[1]
    raise InputError(f"{path}, line {line}: split {word!r}; expected train, val or test")


LAYOUT = Layout("csv", "a CSV of image,label,mask,split,group", recognise, read)
