"""What all layouts have in common: how they are recognised and read."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from melanoma.errors import InputError
from melanoma.sources import csv_table
from melanoma.sources.diagnoses import agree
from melanoma.sources.files import Files, Pair, SplitOf, key, pair
from melanoma.sources.records import LeftOut

import pandas as pd


@dataclass(frozen=True)
class Annotation:
    """What a table says about an image."""

    diagnosis: str = ""  # "": unknown
    group: str | None = None  # lesion or patient


@dataclass(frozen=True)
class Entry:
    """An image of a source, before its diagnosis becomes a class."""

    pair: Pair
    annotation: Annotation
    problem: str | None = None  # why it cannot be used


@dataclass(frozen=True)
class Reading:
    """What a layout's reader found."""

    entries: Sequence[Entry]
    left_out: Sequence[LeftOut] = ()
    unused_rows: Sequence[str] = ()  # ids in tables that have no image
    tables: Sequence[Path] = ()  # that were read
    remarks: Sequence[str] = ()  # what should be known


@dataclass(frozen=True)
class Layout:
    """A layout of a data set.

    Attributes:
        name: value of --layout.
        title: for the log.
        recognise: whether files have this layout.
        read: reads them.
        credit: whom to cite, and the licence; "": unknown.
        known_duplicates: see `records.Source`.
    """

    name: str
    title: str
    recognise: Callable[[Files], bool]
    read: Callable[[Files], Reading]
    credit: str = ""
    known_duplicates: Set[str] = frozenset()


@dataclass
class Annotations:
    """Annotations by id, from the tables of a source or of one of its splits."""

    by_id: dict[str, Annotation] = field(default_factory=dict)  # by `files.key`
    names: dict[str, str] = field(default_factory=dict)  # by the same: the id as the table spells it
    tables: list[csv_table.Table] = field(default_factory=list)

    def add(
        self,
        table: csv_table.Table,
        ids: Sequence[str],
        diagnoses: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
    ) -> None:
        """Adds the rows of a table and logs how it was read; what an earlier table said and this one does not is kept.

        Args:
            table: the table.
            ids: of the images.
            diagnoses: of every image, "" where it is unknown; None: the table has none.
            groups: lesion or patient of every image, "" where it is unknown; None: the table has none.

        Raises:
            InputError: an earlier table gives an image another diagnosis.
        """
        csv_table.log_assumptions(table)
        self.tables.append(table)
        unknown = [""] * len(ids)
        for name, diagnosis, group in zip(ids, diagnoses or unknown, groups or unknown, strict=True):
            known = self.by_id.get(key(name), Annotation())
            agreed = (
                agree(diagnosis, known.diagnosis) if diagnosis and known.diagnosis else diagnosis or known.diagnosis
            )
            if agreed is None:
                others = ", ".join(str(other.path) for other in self.tables[:-1])
                raise InputError(f"{table.path}: {name} is {diagnosis}, but {known.diagnosis} in {others}; remove one")
            self.by_id[key(name)] = Annotation(agreed, group or known.group)
            self.names[key(name)] = name


def column(table: csv_table.Table, *names: str) -> list[str] | None:
    """The first of these columns that is not empty, row by row; None if the table has none of them."""
    columns = [table.columns[name] for name in names if name in table.columns]
    return ["".join(list(filter(None, cells))[:1]) for cells in zip(*columns, strict=True)] if columns else None


def indicated(table: csv_table.Table, columns: Sequence[str]) -> list[str]:
    """The column of every row that is 1; "" where all are 0.

    Raises:
        InputError: a value is not 0 or 1, or a row has two columns of 1; names the line.
    """
    values = pd.DataFrame({name: csv_table.numbers(table, name) for name in columns})
    invalid = ~values.isin([0, 1]).all(axis=1) | (values.sum(axis=1) > 1)
    for line in table.columns.index[invalid][:1]:
        name, found = table.columns.loc[line].iloc[0], table.columns.loc[line, list(columns)].tolist()
        raise InputError(
            f"{table.path}, line {line}: {name} has {found} in {', '.join(columns)}; expected 0 or 1, and at most one 1"
        )
    return [str(name) if value else "" for name, value in zip(values.idxmax(axis=1), values.max(axis=1), strict=True)]


def read_annotated(
    files: Files,
    split_of: SplitOf,
    annotations: Annotations | Mapping[str | None, Annotations],
    mask_expected: bool = False,
) -> Reading:
    """Reads a layout whose tables annotate images by id.

    An image without annotation is a problem if other images of its split have one, or if its split has a table.

    Args:
        files: the files of the source.
        split_of: which split a file belongs to.
        annotations: from the tables; by split where every split has its own.
        mask_expected: whether an image without a mask is a problem if other images of its split have one.
    """
    pairs, left_out = pair(files, split_of)
    splits = {one.split for one in pairs}
    by_split = dict.fromkeys(splits, annotations) if isinstance(annotations, Annotations) else annotations
    labelled = {
        split
        for split in splits & by_split.keys()
        if annotations is by_split or any(key(one.id) in by_split[split].by_id for one in pairs if one.split == split)
    }
    masked = {one.split for one in pairs if one.mask}
    entries = []
    for one in pairs:
        known = by_split[one.split].by_id.get(key(one.id)) if one.split in by_split else None
        problem = None
        if one.split in labelled and not known:
            problem = f"no label in {', '.join(table.path.name for table in by_split[one.split].tables)}"
        elif mask_expected and one.split in masked and not one.mask:
            problem = "no lesion mask, though other images of its split have one"
        entries.append(Entry(one, known or Annotation(), problem))
    ids = {key(one.id) for one in pairs}
    tables = {id(one): one for one in by_split.values()}.values()
    unused = [one.names[name] for one in tables for name in one.by_id if name not in ids]
    return Reading(entries, left_out, unused, [table.path for one in tables for table in one.tables])
