"""Reads a data set of any known layout into records."""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from pathlib import Path

from melanoma.classes import NEVUS
from melanoma.errors import InputError, list_first
from melanoma.sources import csv_table, diagnoses
from melanoma.sources.files import ORPHAN, Files, key, scan, unused_folders
from melanoma.sources.layouts import (
    challenge_2016,
    challenge_2017,
    challenge_2020,
    challenge_one_hot,
    ham10000,
    image_folder,
    isic_archive,
    own_csv,
    ph2,
)
from melanoma.sources.layouts.layout import Entry, Layout
from melanoma.sources.records import LeftOut, Record, Source, Splits

LAYOUTS = {  # by name; the first that is recognised is used
    layout.name: layout
    for layout in (
        challenge_2017.LAYOUT,
        challenge_2016.LAYOUT,
        *challenge_one_hot.LAYOUTS,
        challenge_2020.LAYOUT,
        ham10000.LAYOUT,
        isic_archive.LAYOUT,
        ph2.LAYOUT,
        own_csv.LAYOUT,
        image_folder.LAYOUT,
    )
}
LOOK_ALIKE = re.compile(r"is(ic|bi)[-_ ]?201[67]")  # in the name of a folder that is not one of the challenge's
NO_CLASS = "no class"  # start of the reason for leaving out an image whose diagnosis has no class


def read(path: Path, layout: str | None = None, keep_others: bool = False, outputs: Sequence[Path] = ()) -> Source:
    """Reads a data set.

    Args:
        path: folder, or CSV of the user's own.
        layout: key of LAYOUTS; None: recognised.
        keep_others: whether images whose diagnosis has no class count as benign nevus instead of being left out.
        outputs: folders that are not read, see `files.scan`.

    Raises:
        InputError: there are no images, the layout is not recognised, or a table is faulty.
    """
    if path.is_file():
        if layout not in (None, own_csv.LAYOUT.name):
            raise InputError(f"--layout {layout}: {path} is a file, which can only be a CSV of your own; name a folder")
        chosen, files, reading = own_csv.LAYOUT, Files(path.parent), own_csv.read_table(csv_table.read(path))
    elif path.is_dir():
        files = scan(path, outputs)
        chosen = LAYOUTS[layout] if layout else _recognise(files)
        reading = chosen.read(files)
    else:
        raise InputError(f"{path}: no such folder or CSV. To download the images: python download_data.py --out {path}")
    splits, problems, left_out = _classify(reading.entries, keep_others)
    left_out += reading.left_out
    if not splits:
        raise InputError(f"{path}: read as {chosen.title}, but no image can be used: {_reasons(left_out)}")
    warnings, remarks = list(_unused_rows(reading.unused_rows)), [*reading.remarks, *_skipped(files)]
    for folder, count in unused_folders(left_out).items():
        lines = warnings if LOOK_ALIKE.search(folder.lower()) else remarks
        lines.append(f"folder not used: {folder} ({count} images)")
    if chosen is own_csv.LAYOUT:
        warnings += _unknown_labels(reading.entries)
    if orphans := sum(one.reason == ORPHAN for one in left_out):
        warnings.append(f"{orphans} masks belong to no image")
    if tables := files.unused_tables(reading.tables):
        unlabelled = any(all(record.label is None for record in records) for records in splits.values())
        named = list_first([str(table) for table in tables])
        if unlabelled:
            warnings.append(f"there are images without labels, and tables that are not used: {named}")
        else:
            remarks.append(f"tables not used: {named}")
    return Source(
        path,
        chosen.title,
        splits,
        chosen.credit,
        problems,
        left_out,
        warnings,
        remarks,
        class_notes=[*_broad_diagnoses(reading.entries), *(_kept_diagnoses(reading.entries) if keep_others else ())],
        known_duplicates=chosen.known_duplicates,
    )


def _recognise(files: Files) -> Layout:
    found = next((layout for layout in LAYOUTS.values() if layout.recognise(files)), None)
    if found:
        return found
    unread = f"; there are {len(files.unread)} images of formats that are not read" if files.unread else ""
    raise InputError(
        f"{files.root}: no images found{unread}. To download them: python download_data.py --out {files.root}"
    )


def _classify(entries: Sequence[Entry], keep_others: bool) -> tuple[Splits, dict[Record, str], list[LeftOut]]:
    """Records by split, problems of some, and the images whose diagnosis has no class."""
    splits: Splits = defaultdict(list)
    problems, left_out, used = {}, [], set[str]()
    for entry in entries:
        one, diagnosis = entry.pair, entry.annotation.diagnosis
        label = diagnoses.class_of(diagnosis) if diagnosis else None
        if diagnosis and label is None:
            if not keep_others:
                left_out.append(LeftOut(one.id, f"{NO_CLASS}: {diagnosis}"))
                continue
            label = NEVUS
        name = f"{one.split}_{one.id}" if key(one.id) in used else one.id  # the id of another split's image, too
        used.add(key(name))
        record = Record(name, one.image, one.mask, label, entry.annotation.group)
        splits[one.split].append(record)
        if entry.problem:
            problems[record] = entry.problem
    return dict(splits), problems, left_out


def _reasons(left_out: Sequence[LeftOut]) -> str:
    counts = Counter(one.reason for one in left_out)
    return list_first([f"{count} {reason}" for reason, count in counts.most_common()]) or "there is none"


def _unused_rows(names: Sequence[str]) -> Iterator[str]:
    if names:
        yield f"{len(names)} ids in the tables have no image and are ignored: {list_first(names)}"


def _broad_diagnoses(entries: Sequence[Entry]) -> Iterator[str]:
    """Lines about diagnoses that are broader than their class."""
    counts = Counter(entry.annotation.diagnosis for entry in entries)
    for diagnosis, count in counts.items():
        if note := diagnoses.remark(diagnosis):
            yield f"{count} images: {note}"


def _kept_diagnoses(entries: Sequence[Entry]) -> Iterator[str]:
    """Lines about diagnoses without a class whose images are kept."""
    counts = Counter(entry.annotation.diagnosis for entry in entries if entry.annotation.diagnosis)
    for diagnosis, count in counts.items():
        if diagnoses.class_of(diagnosis) is None:
            yield f"{count} images: {diagnosis} is none of the three classes; it counts as benign nevus"


def _unknown_labels(entries: Sequence[Entry]) -> Iterator[str]:
    """A line about labels of the user's own that are no known diagnosis, and may be misspelled."""
    words = [entry.annotation.diagnosis for entry in entries if entry.annotation.diagnosis]
    unknown = Counter(
        word for word in words if diagnoses.class_of(word) is None and diagnoses.normalise(word) not in diagnoses.OTHERS
    )
    if unknown:
        named = list_first([f"{word} ({count})" for word, count in unknown.items()])
        yield f"labels that are no known diagnosis: {named}; known ones: {', '.join(diagnoses.CLASS_OF)}, or 0, 1, 2"


def _skipped(files: Files) -> Iterator[str]:
    """Lines about files that are not images."""
    for what, count in files.skipped.items():
        if count:
            yield f"{count} {what} skipped"


def read_all(
    path: Path, extra: Sequence[Path], layout: str | None, keep_others: bool, outputs: Sequence[Path] = ()
) -> list[Source]:
    """Reads a data set and others that add images to its train split.

    An id of an extra data set that occurs before is preceded by the name of its folder or CSV.

    Args:
        path: see `read`.
        extra: folders or CSVs.
        layout: of the first, see `read`.
        keep_others: see `read`.
        outputs: see `read`.

    Raises:
        InputError: see `read`; or a data set is given twice.
    """
    places = [path.resolve()]
    for other in extra:
        if other.resolve() in places:
            what = "this is --source itself" if other.resolve() == places[0] else "given twice"
            raise InputError(f"--extra {other}: {what}; leave it out")
        places.append(other.resolve())
    sources = [read(path, layout, keep_others, outputs)]
    known = {key(record.id) for record in sources[0].records}
    for other in extra:
        sources.append(_rename(read(other, None, keep_others, outputs), known))
        known |= {key(record.id) for record in sources[-1].records}
    return sources


def _rename(source: Source, known: Set[str]) -> Source:
    """The data set with ids that are not among the known ones."""
    used, renamed = set(known), {}
    for record in source.records:
        candidates = (f"{source.path.stem}{number}_{record.id}" for number in itertools.chain([""], itertools.count(2)))
        name = next(one for one in itertools.chain([record.id], candidates) if key(one) not in used)
        used.add(key(name))
        renamed[record] = replace(record, id=name)
    splits = {split: [renamed[record] for record in records] for split, records in source.splits.items()}
    return replace(source, splits=splits, problems={renamed[one]: reason for one, reason in source.problems.items()})
