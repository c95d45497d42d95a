"""Checks of a source before any array is written: what it contains, what cannot be used and what should be excluded."""

from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from melanoma.artifacts.atomic import write_text
from melanoma.classes import CLASSES, SPLITS
from melanoma.dataset import duplicates, masks
from melanoma.dataset.cache import Cache
from melanoma.dataset.workers import Workers
from melanoma.errors import InputError, list_first
from melanoma.sources import isic

import pandas as pd

MOST_FREQUENT = 8  # image sizes to name in the report
REJECTS, DUPLICATES = "rejects.csv", "duplicates.csv"


@dataclass(frozen=True)
class Duplicate:
    """An image that shows the same picture as another one."""

    record: isic.Record
    split: str
    other: isic.Record
    other_split: str
    score: float  # 1 for identical images; see `duplicates.score`

    @property
    def leaks(self) -> bool:
        """Whether the two are in different splits."""
        return self.split != self.other_split


@dataclass(frozen=True)
class Report:
    """The result of all checks of one source."""

    source: isic.SourceContents
    problems: dict[isic.Record, str]  # why a record cannot be used
    duplicates: list[Duplicate]
    left_out: Set[isic.Record]  # of train, because validation, test or train itself contains the same image
    published: Set[isic.Record]  # of those, the ones known from published lists
    conversions: dict[str, int]  # number of images by what was converted
    sizes: dict[str, int]  # number of images by width x height

    @property
    def usable(self) -> dict[str, list[isic.Record]]:
        """The records to use, by split; splits without any are absent."""
        bad = self.left_out | self.problems.keys()
        kept = {
            split: [record for record in records if record not in bad] for split, records in self.source.records.items()
        }
        return {split: records for split, records in kept.items() if records}

    def table(self) -> pd.DataFrame:
        """Numbers of images, a column per split."""
        columns = {}
        for split, records in self.source.records.items():
            labels = Counter(record.label for record in records)
            columns[split] = {
                "images": len(records),
                "lesion masks": sum(record.mask is not None for record in records),
                **{name: labels[label] for label, name in enumerate(CLASSES)},
                "no label": labels[None],
                "rejected": sum(record in self.problems for record in records),
                "left out": sum(record in self.left_out for record in records),
                "usable": len(self.usable.get(split, [])),
            }
        return pd.DataFrame(columns)

    def warnings(self) -> Iterator[str]:
        """What should be looked at, one line each; --strict stops at any."""
        if self.source.unused_labels:
            names = list_first(self.source.unused_labels)
            yield f"{len(self.source.unused_labels)} ids in the label files have no image and are ignored: {names}"
        if count := self.conversions.get(masks.GREY_VALUES):
            yield f"{masks.GREY_VALUES}: {count}"
        if leaks := [duplicate for duplicate in self.duplicates if duplicate.leaks]:
            pairs = list_first([f"{pair.record.id} = {pair.other.id} ({pair.other_split})" for pair in leaks])
            yield f"{len(leaks)} duplicates across two splits: {pairs}"

    def gaps(self) -> Iterator[str]:
        """What the source does not contain, and the consequence."""
        for split in SPLITS:
            consequence = "cannot be used for training" if split == "train" else "predicted, but not evaluated"
            records = self.source.records.get(split)
            if not records:
                yield f"{split}: no images"
                continue
            if records[0].label is None:
                yield f"{split}: no labels, {consequence}"
            if records[0].mask is None:
                yield f"{split}: no lesion masks, {consequence}"

    def lines(self) -> Iterator[str]:
        """The full report, line by line."""
        yield from self.table().to_string().splitlines()
        yield from self.gaps()
        sizes = sorted(self.sizes.items(), key=lambda item: -item[1])
        more = f" and {len(sizes) - MOST_FREQUENT} other sizes" if len(sizes) > MOST_FREQUENT else ""
        yield "image sizes: " + ", ".join(f"{size} ({count})" for size, count in sizes[:MOST_FREQUENT]) + more
        for what, count in sorted(self.conversions.items()):
            if what != masks.GREY_VALUES:
                yield f"converted: {what}: {count}"
        if self.source.superpixels:
            yield f"{self.source.superpixels} superpixel files skipped"
        if repeats := [duplicate for duplicate in self.duplicates if not duplicate.leaks]:
            names = list_first([f"{pair.record.id} = {pair.other.id}" for pair in repeats])
            yield f"{len(repeats)} duplicates within one split: {names}"
        if self.left_out:
            listed = f", {len(self.published)} of them from published lists" if self.published else ""
            yield f"{len(self.left_out)} duplicates left out of train{listed} (--keep-duplicates keeps them)"
        for warning in self.warnings():
            yield f"warning: {warning}"

    def write(self, folder: Path) -> None:
        """Writes rejects.csv and duplicates.csv, with a header only if there is nothing to list."""
        rejects = [
            (record.id, split, self.problems[record])
            for split, records in self.source.records.items()
            for record in records
            if record in self.problems
        ]
        table = pd.DataFrame(rejects, columns=["image_id", "split", "reason"])
        write_text(folder / REJECTS, table.to_csv(index=False))
        rows = [
            (pair.record.id, pair.split, pair.other.id, pair.other_split, round(pair.score, 3))
            for pair in self.duplicates
        ]
        rows += [
            (record.id, "train", "published list", "", float("nan")) for record in sorted(self.published, key=by_id)
        ]
        table = pd.DataFrame(rows, columns=["image_id", "split", "same_as", "same_as_split", "similarity"])
        table["left_out"] = table["image_id"].isin([record.id for record in self.left_out])
        write_text(folder / DUPLICATES, table.to_csv(index=False))

    def raise_problems(self, folder: Path, skip_bad: bool, strict: bool) -> None:
        """Stops a run whose source has problems.

        Args:
            folder: where `write` has listed them, for messages.
            skip_bad: accept images that cannot be used, as long as some of each split can.
            strict: accept no warnings.

        Raises:
            InputError: there is a problem that is not accepted.
        """
        if self.problems and not skip_bad:
            names = list_first([record.id for record in self.problems])
            reason = next(iter(self.problems.values()))
            raise InputError(
                f"{len(self.problems)} images cannot be used: {names}. The first: {reason}. All reasons are in "
                f"{folder / REJECTS}; repair these images or leave them out with --skip-bad"
            )
        if empty := self.source.records.keys() - self.usable.keys():
            raise InputError(
                f"no usable images are left of {', '.join(sorted(empty))}: see {REJECTS} and {DUPLICATES} in {folder}; "
                "--keep-duplicates keeps duplicates"
            )
        if strict and (warnings := list(self.warnings())):
            raise InputError(f"--strict: {'; '.join(warnings)}")


def inspect(
    source: isic.SourceContents, cache: Cache, workers: Workers, known: Set[str], keep_duplicates: bool
) -> Report:
    """Checks a source.

    Args:
        source: its contents, all records read into the cache.
        cache: cache of the decoded images.
        workers: compare images.
        known: ids of training images to leave out as duplicates, whatever they show.
        keep_duplicates: leave no duplicates out.

    Returns:
        The report; nothing is written.
    """
    rows = [
        (record, split)
        for split, records in source.records.items()
        for record in sorted(records, key=by_id)
        if record in cache.info
    ]
    matches = duplicates.find(lambda row: cache.thumbnail(rows[row][0]), len(rows), workers)
    pairs = []
    for match in matches:
        first, second = match.first, match.second
        if rows[first][1] == rows[second][1]:  # in one split the later id is the duplicate; else that of train
            first, second = second, first
        pairs.append(Duplicate(*rows[first], *rows[second], match.score))
    published: set[isic.Record] = set()
    left_out: set[isic.Record] = set()
    if not keep_duplicates:
        published = {record for record in source.records.get("train", []) if record.id in known}
        left_out |= published
        for group in duplicates.groups(matches, len(rows)):
            in_train = [rows[row][0] for row in group if rows[row][1] == "train"]
            left_out.update(in_train if len(in_train) < len(group) else in_train[1:])
    conversions = Counter(note for info in cache.info.values() for note in info.notes)
    sizes = Counter("{}x{}".format(*info.size) for info in cache.info.values())
    return Report(source, cache.problems, pairs, left_out, published, conversions, sizes)


def by_id(record: isic.Record) -> str:
    """Sort key."""
    return record.id
