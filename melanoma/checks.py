"""What a source holds, what of it cannot be used and what should not be: the report before the work."""

from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from melanoma import duplicates, images, isic, plots, stages
from melanoma.isic import Record
from melanoma.parallel import Workers
from melanoma.reading import Cache

import pandas as pd

SIZES = 8  # commonest sizes to name
PAIRS = 8  # to draw


@dataclass(frozen=True)
class Duplicate:
    """One photograph that shows what another one shows."""

    record: Record
    split: str
    other: Record
    other_split: str
    score: float  # 1 for equal pictures; see `duplicates.score`

    @property
    def leaks(self) -> bool:
        """Whether it stands in two splits."""
        return self.split != self.other_split


@dataclass(frozen=True)
class Report:
    """The outcome of all checks of one source."""

    found: dict[str, list[Record]]  # by split
    problems: dict[Record, str]  # why these cannot be used
    duplicates: list[Duplicate]
    left_out: Set[Record]  # of train, since validation, test or train itself shows them too
    recurring: Set[Record]  # of those, the ones known from published lists
    counts: dict[str, int]  # photographs by what was converted
    sizes: dict[str, int]  # photographs by width x height
    superpixels: int
    unused_labels: list[str]

    @property
    def usable(self) -> dict[str, list[Record]]:
        """The records to work with, by split; no empty splits."""
        bad = self.left_out | self.problems.keys()
        kept = {split: [record for record in records if record not in bad] for split, records in self.found.items()}
        return {split: records for split, records in kept.items() if records}

    def table(self) -> pd.DataFrame:
        """Numbers of photographs, a column per split."""
        columns = {}
        for split, records in self.found.items():
            labels = Counter(record.label for record in records)
            columns[split] = {
                "photographs": len(records),
                "lesion masks": sum(record.mask is not None for record in records),
                **{name: labels[label] for label, name in enumerate(isic.CLASSES)},
                "no label": labels[None],
                "rejected": sum(record in self.problems for record in records),
                "left out": sum(record in self.left_out for record in records),
                "to work with": len(self.usable.get(split, [])),
            }
        return pd.DataFrame(columns)

    def warnings(self) -> Iterator[str]:
        """What should be looked at, a line each; --strict stops at any."""
        if self.unused_labels:
            names = isic.first_ids(self.unused_labels)
            yield f"{len(self.unused_labels)} ids in the label files have no photograph and are ignored: {names}"
        if count := self.counts.get(images.GREY_VALUES):
            yield f"{images.GREY_VALUES}: {count}"
        if leaks := [duplicate for duplicate in self.duplicates if duplicate.leaks]:
            pairs = isic.first_ids([f"{pair.record.id} = {pair.other.id} ({pair.other_split})" for pair in leaks])
            yield f"{len(leaks)} times the same picture in two splits: {pairs}"

    def gaps(self) -> Iterator[str]:
        """What the source does not have, and what follows."""
        for split in isic.SPLITS:
            lost = "nothing to train with" if split == "train" else "they will be predicted, not judged"
            records = self.found.get(split)
            if not records:
                yield f"{split}: no photographs"
                continue
            if records[0].label is None:
                yield f"{split}: no labels, {lost}"
            if records[0].mask is None:
                yield f"{split}: no lesion masks, {lost}"

    def lines(self) -> Iterator[str]:
        """The whole report for people."""
        yield from self.table().to_string().splitlines()
        sizes = sorted(self.sizes.items(), key=lambda item: -item[1])
        more = f" and {len(sizes) - SIZES} other sizes" if len(sizes) > SIZES else ""
        yield from self.gaps()
        yield "sizes met: " + ", ".join(f"{size} ({count})" for size, count in sizes[:SIZES]) + more
        for what, count in sorted(self.counts.items()):
            if what != images.GREY_VALUES:
                yield f"converted: {what}: {count}"
        if self.superpixels:
            yield f"{self.superpixels} superpixel files skipped: they are neither photographs nor masks"
        if repeats := [duplicate for duplicate in self.duplicates if not duplicate.leaks]:
            names = isic.first_ids([f"{pair.record.id} = {pair.other.id}" for pair in repeats])
            yield f"{len(repeats)} times the same picture in one split: {names}"
        if self.left_out:
            listed = f", {len(self.recurring)} of them by published lists" if self.recurring else ""
            yield f"{len(self.left_out)} duplicates left out of train{listed} (--keep-duplicates keeps them)"
        for warning in self.warnings():
            yield f"warning: {warning}"

    def write(self, folder: Path) -> None:
        """Writes rejects.csv and duplicates.csv, with a header alone where there is nothing to list."""
        rejects = [
            (record.id, split, self.problems[record])
            for split, records in self.found.items()
            for record in records
            if record in self.problems
        ]
        table = pd.DataFrame(rejects, columns=["image_id", "split", "reason"])
        stages.write_text(folder / "rejects.csv", table.to_csv(index=False))
        rows = [
            (pair.record.id, pair.split, pair.other.id, pair.other_split, round(pair.score, 3))
            for pair in self.duplicates
        ]
        rows += [
            (record.id, "train", "published list", "", float("nan")) for record in sorted(self.recurring, key=by_id)
        ]
        table = pd.DataFrame(rows, columns=["image_id", "split", "same_as", "same_as_split", "similarity"])
        table["left_out"] = table["image_id"].isin([record.id for record in self.left_out])
        stages.write_text(folder / "duplicates.csv", table.to_csv(index=False))


def inspect(
    found: dict[str, list[Record]],
    cache: Cache,
    workers: Workers,
    known: Set[str],
    keep: bool,
    unused_labels: list[str],
    superpixels: int,
) -> Report:
    """Checks what was read.

    Args:
        found: records by split, all of them read into the cache.
        cache: what they show.
        workers: who compares pictures.
        known: ids of train photographs to leave out whatever they show.
        keep: leave no duplicates out.
        unused_labels: of the source, to report.
        superpixels: the same.

    Returns:
        The report; nothing is written yet.
    """
    rows = [(record, split) for split in found for record in sorted(found[split], key=by_id) if record in cache.facts]
    matches = duplicates.find(lambda place: cache.thumbnail(rows[place][0]), len(rows), workers)
    pairs = []
    for match in matches:
        first, second = match.first, match.second
        if rows[first][1] == rows[second][1]:  # the later one is the copy; across splits, train's is
            first, second = second, first
        pairs.append(Duplicate(*rows[first], *rows[second], match.score))
    recurring = {record for record in found.get("train", []) if record.id in known and not keep}
    left_out = set(recurring)
    for family in [] if keep else duplicates.families(matches, len(rows)):
        in_train = [rows[place][0] for place in family if rows[place][1] == "train"]
        left_out.update(in_train if len(in_train) < len(family) else in_train[1:])
    counts = Counter(note for facts in cache.facts.values() for note in facts.notes)
    sizes = Counter("{}x{}".format(*facts.size) for facts in cache.facts.values())
    return Report(found, cache.problems, pairs, left_out, recurring, counts, sizes, superpixels, unused_labels)


def by_id(record: Record) -> str:
    """Sort key."""
    return record.id


def draw_duplicates(path: Path, pairs: list[Duplicate], cache: Cache) -> None:
    """Draws the first pairs side by side, those across splits before the others; nothing where there are none."""
    path.unlink(missing_ok=True)
    shown = sorted(pairs, key=lambda pair: not pair.leaks)[:PAIRS]
    tiles = [
        plots.Tile(cache.pixels(record)[0], f"{record.id}, {split}")
        for pair in shown
        for record, split in ((pair.record, pair.split), (pair.other, pair.other_split))
    ]
    if tiles:
        title = f"{len(shown)} of {len(pairs)} pairs that show the same picture"
        plots.sheet(path, [tiles[start : start + 4] for start in range(0, len(tiles), 4)], title)
