"""Checks of data sets before any array is written: what they contain, what cannot be used, what should be excluded."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from melanoma.artifacts.atomic import write_text
from melanoma.classes import CLASSES, SPLITS
from melanoma.dataset import duplicates, masks
from melanoma.dataset.cache import Cache
from melanoma.dataset.workers import Workers
from melanoma.errors import InputError, list_first
from melanoma.sources.records import Record, Source

import numpy as np
import pandas as pd

MOST_FREQUENT = 8  # image sizes to name in the report
REJECTS, DUPLICATES, LEFT_OUT, DOUBTS = "rejects.csv", "duplicates.csv", "left_out.csv", "doubts.csv"
# What follows where a split has no labels, lacks a class, or has no masks.
CONSEQUENCES = {
    "train": (
        "the classifier cannot be trained; use step 4 with --pretrained",
        "the classifier cannot be trained; --extra adds images",
        "the segmentation network cannot be trained; use step 2 with --pretrained",
    ),
    "others": ("predicted, but not evaluated", "its AUC is undefined", "masks are predicted, but not evaluated"),
}
# Why images of train are left out.
PUBLISHED = "duplicate according to published lists"
DUPLICATE = "duplicate of another image"
SAME_GROUP = "same lesion or patient as an image of validation or test"


@dataclass(frozen=True)
class Groups:
    """Which images show the same picture, the same lesion or the same patient.

    Attributes:
        records: the images that could be read.
        matches: pairs of them that show the same picture.
        number: the group of every image, also of those that could not be read.
    """

    records: list[Record]
    matches: list[duplicates.Match]
    number: Mapping[Record, int]


@dataclass(frozen=True)
class Duplicate:
    """An image that shows the same picture as another one."""

    record: Record
    split: str
    other: Record
    other_split: str
    score: float  # 1 for identical images; see `duplicates.score`

    @property
    def leaks(self) -> bool:
        """Whether the two are in different splits."""
        return self.split != self.other_split

    @property
    def labels_differ(self) -> bool:
        """Whether the two have different labels."""
        labels = {self.record.label, self.other.label} - {None}
        return len(labels) > 1


@dataclass(frozen=True)
class Report:
    """The result of all checks.

    Attributes:
        sources: the data sets.
        splits: their images.
        problems: why images cannot be used.
        duplicates: pairs of images that show the same picture.
        groups: which images belong together.
        left_out: images of train that are not used, and why.
        conversions: number of images by what was converted.
        doubts: images by what should be looked at, see `decode.Decoded`.
        sizes: number of images by width x height.
    """

    sources: Sequence[Source]
    splits: Mapping[str, list[Record]]
    problems: Mapping[Record, str]
    duplicates: list[Duplicate]
    groups: Groups
    left_out: Mapping[Record, str]
    conversions: Mapping[str, int]
    doubts: Mapping[str, list[Record]]
    sizes: Mapping[str, int]

    @property
    def usable(self) -> dict[str, list[Record]]:
        """The images to use, by split; splits without any are absent."""
        bad = self.left_out.keys() | self.problems.keys()
        kept = {split: [record for record in records if record not in bad] for split, records in self.splits.items()}
        return {split: records for split, records in kept.items() if records}

    @property
    def used(self) -> set[Record]:
        """The images to use."""
        return {record for records in self.usable.values() for record in records}

    def table(self) -> pd.DataFrame:
        """Numbers of images, a column per split; those below "usable" are of the usable images."""
        columns = {}
        for split, records in self.splits.items():
            usable = self.usable.get(split, [])
            labels = Counter(record.label for record in usable)
            groups = {record.group for record in usable if record.group}
            columns[split] = {
                "images": len(records),
                "rejected": sum(record in self.problems for record in records),
                "left out": sum(record in self.left_out for record in records),
                "usable": len(usable),
                "lesion masks": sum(record.mask is not None for record in usable),
                **{name: labels[label] for label, name in enumerate(CLASSES)},
                "no label": labels[None],
                **({"lesions or patients": len(groups)} if any(record.group for record in self.records) else {}),
            }
        return pd.DataFrame(columns)

    @property
    def records(self) -> list[Record]:
        """The images of all splits."""
        return [record for records in self.splits.values() for record in records]

    def warnings(self) -> Iterator[str]:
        """What should be looked at, one line each; --strict stops at any."""
        for source in self.sources:
            yield from source.warnings
        if count := self.conversions.get(masks.GREY_VALUES):
            yield f"{masks.GREY_VALUES}: {count}"
        for doubt, records in self.doubts.items():
            yield f"{doubt}: {len(records)}: {list_first([record.id for record in records])}"
        different = [pair for pair in self.duplicates if pair.labels_differ]
        if different:
            pairs = list_first([f"{pair.record.id} = {pair.other.id}" for pair in different])
            yield f"{len(different)} duplicates have different labels: {pairs}"
        if leaks := [duplicate for duplicate in self.duplicates if duplicate.leaks]:
            pairs = list_first([f"{pair.record.id} = {pair.other.id} ({pair.other_split})" for pair in leaks])
            yield f"{len(leaks)} duplicates across two splits: {pairs}"

    def doubtful_masks(self) -> list[tuple[Record, str]]:
        """Images whose masks should be looked at, and why."""
        kinds = (masks.INVERTED, masks.FOREIGN, masks.FULL, masks.EMPTY)
        return [(record, doubt) for doubt in kinds for record in self.doubts.get(doubt, [])]

    def gaps(self) -> Iterator[str]:
        """What the splits do not contain, and the consequence."""
        for split in SPLITS:
            records = self.splits.get(split)
            if not records:
                yield f"{split}: no images"
                continue
            of_labels, of_class, of_masks = CONSEQUENCES["train" if split == "train" else "others"]
            absent = sorted(set(range(len(CLASSES))) - {record.label for record in records})
            if len(absent) == len(CLASSES):
                yield f"{split}: no labels: {of_labels}"
            elif absent:
                yield f"{split}: no {' and no '.join(CLASSES[label] for label in absent)}: {of_class}"
            if all(record.mask is None for record in records):
                yield f"{split}: no lesion masks: {of_masks}"

    def lines(self) -> Iterator[str]:
        """The full report, line by line."""
        for source in self.sources:
            yield from source_lines(source)
        yield from self.table().to_string().splitlines()
        yield from self.gaps()
        sizes = sorted(self.sizes.items(), key=lambda item: -item[1])
        more = f" and {len(sizes) - MOST_FREQUENT} other sizes" if len(sizes) > MOST_FREQUENT else ""
        yield "image sizes: " + ", ".join(f"{size} ({count})" for size, count in sizes[:MOST_FREQUENT]) + more
        for what, count in sorted(self.conversions.items()):
            if what != masks.GREY_VALUES:
                yield f"converted: {what}: {count}"
        if repeats := [duplicate for duplicate in self.duplicates if not duplicate.leaks]:
            names = list_first([f"{pair.record.id} = {pair.other.id}" for pair in repeats])
            yield f"{len(repeats)} duplicates within one split: {names}"
        for reason, count in Counter(self.left_out.values()).items():
            yield f"{count} images left out of train: {reason} (--keep-duplicates keeps them)"
        for warning in self.warnings():
            yield f"warning: {warning}"

    def write(self, folder: Path) -> None:
        """Writes rejects.csv, duplicates.csv and left_out.csv; with nothing to list, only a header."""
        split_of = {record: split for split, records in self.splits.items() for record in records}
        rejects = [
            (record.id, split, self.problems[record]) for record, split in split_of.items() if record in self.problems
        ]
        table = pd.DataFrame(rejects, columns=["image_id", "split", "reason"])
        write_text(folder / REJECTS, table.to_csv(index=False))
        rows = [
            (pair.record.id, pair.split, pair.other.id, pair.other_split, round(pair.score, 3))
            for pair in self.duplicates
        ]
        published = sorted(record.id for record, reason in self.left_out.items() if reason == PUBLISHED)
        rows += [(name, "train", "published list", "", float("nan")) for name in published]
        table = pd.DataFrame(rows, columns=["image_id", "split", "same_as", "same_as_split", "similarity"])
        table["left_out"] = table["image_id"].isin([record.id for record in self.left_out])
        write_text(folder / DUPLICATES, table.to_csv(index=False))
        left_out = [(one.name, str(source.path), one.reason) for source in self.sources for one in source.left_out]
        source_of = {record: str(source.path) for source in self.sources for record in source.records}
        left_out += [(record.id, source_of[record], reason) for record, reason in self.left_out.items()]
        table = pd.DataFrame(left_out, columns=["image", "source", "reason"])
        write_text(folder / LEFT_OUT, table.to_csv(index=False))
        doubts = [(record.id, split_of[record], doubt) for doubt, found in self.doubts.items() for record in found]
        table = pd.DataFrame(doubts, columns=["image_id", "split", "doubt"])
        write_text(folder / DOUBTS, table.to_csv(index=False))

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
        if empty := self.splits.keys() - self.usable.keys():
            raise InputError(
                f"no usable images are left of {', '.join(sorted(empty))}: see {REJECTS} and {DUPLICATES} in {folder}; "
                "--keep-duplicates keeps duplicates"
            )
        if strict and (warnings := list(self.warnings())):
            raise InputError(f"--strict: {'; '.join(warnings)}")


def source_lines(source: Source) -> Iterator[str]:
    """What was read of a data set, what was left out, and what was assumed."""
    yield f"{source.path}: read as {source.title}, {len(source.records)} images"
    reasons = Counter(one.reason for one in source.left_out)
    if reasons:
        listed = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
        yield f"  left out: {len(source.left_out)}: {listed}; all of them are in {LEFT_OUT}"
    for line in (*source.class_notes, *source.remarks):
        yield f"  {line}"


def find_groups(records: Sequence[Record], cache: Cache, workers: Workers) -> Groups:
    """Finds images that show the same picture, and joins them with the groups that their sources give.

    Args:
        records: images, all read into the cache; of two that show the same picture the first one counts as original.
        cache: cache of the decoded images.
        workers: compare images.
    """
    readable = [record for record in records if record in cache.info]
    matches = duplicates.find(lambda row: cache.thumbnail(readable[row]), len(readable), workers)
    rows = {record: row for row, record in enumerate(readable)}
    for record in records:
        rows.setdefault(record, len(rows))
    first_of_group: dict[str, int] = {}
    links = [(match.first, match.second) for match in matches]
    links += [
        (first_of_group.setdefault(record.group, row), row) for record, row in rows.items() if record.group is not None
    ]
    numbers = duplicates.components(links, len(rows))
    return Groups(readable, matches, {record: int(numbers[row]) for record, row in rows.items()})


def inspect(
    sources: Sequence[Source],
    splits: Mapping[str, list[Record]],
    groups: Groups,
    cache: Cache,
    known: Set[str],
    keep_duplicates: bool,
) -> Report:
    """Checks data sets.

    Args:
        sources: the data sets.
        splits: their images, all read into the cache.
        groups: from `find_groups`.
        cache: cache of the decoded images.
        known: ids of training images to leave out as duplicates, whatever they show.
        keep_duplicates: leave no images of train out.

    Returns:
        The report; nothing is written.
    """
    split_of = {record: split for split, records in splits.items() for record in records}
    infos = {record: info for record, info in cache.info.items() if record in split_of}
    problems = dict(cache.problems)
    for source in sources:
        problems |= source.problems
    doubts: dict[str, list[Record]] = {}
    for record, info in infos.items():
        for doubt in info.doubts:
            doubts.setdefault(doubt, []).append(record)
    return Report(
        sources,
        splits,
        {record: reason for record, reason in problems.items() if record in split_of},
        list(_pairs(groups, split_of)),
        groups,
        {} if keep_duplicates else _left_out(groups, split_of, problems.keys(), known),
        Counter(note for info in infos.values() for note in info.notes),
        doubts,
        Counter("{}x{}".format(*info.size) for info in infos.values()),
    )


def _pairs(groups: Groups, split_of: Mapping[Record, str]) -> Iterator[Duplicate]:
    """Duplicates; in one split the later one, else that of train is the one that repeats the other."""
    order = list(SPLITS)
    for match in groups.matches:
        pair = [groups.records[match.first], groups.records[match.second]]
        if not all(record in split_of for record in pair):
            continue
        first, second = sorted(pair, key=lambda record: order.index(split_of[record]))
        if split_of[first] == split_of[second]:
            first, second = second, first
        yield Duplicate(first, split_of[first], second, split_of[second], match.score)


def _left_out(
    groups: Groups, split_of: Mapping[Record, str], problems: Set[Record], known: Set[str]
) -> dict[Record, str]:
    """Images of train that validation, test or train itself contains too, and why they are left out.

    Of several images of train that show the same picture, one with a label and a mask is kept, if there is one. Images
    that cannot be used count as absent.
    """
    left_out = {record: PUBLISHED for record in split_of if split_of[record] == "train" and record.id in known}
    bad = problems | left_out.keys()
    usable = {record: split for record, split in split_of.items() if record not in bad}
    same_picture: dict[int, list[Record]] = {}
    for record, number in zip(groups.records, same_pictures(groups), strict=True):
        if record in usable:
            same_picture.setdefault(int(number), []).append(record)
    for records in same_picture.values():
        in_train = [record for record in records if usable[record] == "train"]
        in_train.sort(key=lambda record: (record.label is None, record.mask is None))
        left_out |= dict.fromkeys(in_train if len(in_train) < len(records) else in_train[1:], DUPLICATE)
    held_out = {groups.number[record] for record, split in usable.items() if split != "train"}
    same_group = [record for record, split in usable.items() if split == "train" and groups.number[record] in held_out]
    return dict.fromkeys((record for record in same_group if record not in left_out), SAME_GROUP) | left_out


def same_pictures(groups: Groups) -> np.ndarray:
    """Numbers the images of `groups.records` by picture, int (N,): equal for images that show the same one."""
    return duplicates.components([(match.first, match.second) for match in groups.matches], len(groups.records))
