"""Step 1 of 5: from photographs, masks and labels to arrays; melanoma and seborrheic keratosis in augmented copies.

Reads   --source, the official ISIC 2017 folders and CSVs (README, "Data")
Writes  data/arrays/{train,val,test}_ids.npy      str (N,)
        data/arrays/{train,val,test}_images.npy   uint8 (N, S, S, 3)
        data/arrays/{train,val,test}_masks.npy    uint8 (N, S, S, 1), {0, 1}; where the split has masks
        data/arrays/{train,val,test}_labels.npy   int8 (N,), 0 benign nevus, 1 melanoma, 2 seborrheic keratosis; where
                                                  the split has labels
        data/cache.sqlite                         what was read so far, until the arrays are written
        graphics/rejects.csv                      photographs that cannot be used, and why
        graphics/duplicates.csv                   photographs that show the same picture
        graphics/augmentation.png                 copies beside their originals
        graphics/duplicates.png                   some of them side by side

Run     python segmentation_01_preprocessing.py
Try     python segmentation_01_preprocessing.py --limit 30
Expect  README, "Data"
"""

import argparse
import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

from melanoma import augment, checks, command, isic, parallel, plots, stages
from melanoma.command import log
from melanoma.errors import InputError
from melanoma.reading import Cache

import numpy as np

SIZE = 256  # pixels: side of the arrays
COPIES = 3.5  # times as many images of melanoma and of keratosis, as in 2018

Row = tuple[isic.Record, int | None]  # a record, and the number of its augmented copy; None for the original


def parser() -> argparse.ArgumentParser:
    """The script's command line."""
    flags = command.parser(__doc__)
    flags.add_argument("--source", type=Path, default=Path("data"), help="folder of the official ISIC 2017 layout")
    flags.add_argument(
        "--split", choices=(isic.OFFICIAL, "2018"), default=isic.OFFICIAL, help="how images become splits"
    )
    flags.add_argument("--size", type=command.positive_int, default=SIZE, help="side of the arrays in pixels")
    flags.add_argument(
        "--copies", type=command.at_least_one, default=COPIES, help="melanoma and keratosis, times their number"
    )
    flags.add_argument("--check", action="store_true", help="read and report only; what was read is kept for the run")
    flags.add_argument("--skip-bad", action="store_true", help="leave out photographs that cannot be used")
    flags.add_argument("--keep-duplicates", action="store_true", help="leave nothing out of train")
    flags.add_argument("--strict", action="store_true", help="stop at warnings too")
    places = flags.add_mutually_exclusive_group()
    places.add_argument("--jobs", type=command.positive_int, help="processes on this machine; None: one per core")
    places.add_argument("--cluster", metavar="URL", help="Dask scheduler, tcp://host:port, whose workers do the work")
    return flags


def plan(records: list[isic.Record], split: str, times: float) -> list[Row]:
    """The rows of a split: its records, classes in turns, and for train the augmented copies after them."""
    rows: list[Row] = [(record, None) for record in records]
    if split == "train" and records[0].label is not None:
        labels = np.array([record.label for record in records])
        for number, row in enumerate(augment.copies(labels, isic.RANKED, times), start=1):
            rows.append((records[row], number))
    return rows


def pictures(rows: list[Row], cache: Cache, seed: int, workers: parallel.Workers) -> Iterator[augment.Pair]:
    """Image (S, S, 3), and mask (S, S, 1) or None, of every row, one at a time."""
    originals = [record for record, copy in rows if copy is None]
    for record in originals:
        yield cache.pixels(record)
    copies = ((cache.pixels(record), [seed, copy]) for record, copy in rows[len(originals) :] if copy is not None)
    yield from workers.map(augment.make_copy, copies, block=64)


def write_split(
    store: stages.Store, files: contextlib.ExitStack, split: str, rows: list[Row], pixels: Iterator[augment.Pair]
) -> list[str]:
    """Writes the arrays of one split, row by row, and returns their names; they take effect when `files` closes."""
    columns = {
        "ids": np.array([record.id if copy is None else f"{record.id}{augment.COPY}{copy}" for record, copy in rows])
    }
    if rows[0][0].label is not None:
        columns["labels"] = np.array([record.label for record, _ in rows], dtype=np.int8)
    size = int(store.settings["size"] or 0)
    depths = {"images": 3, "masks": 1} if rows[0][0].mask else {"images": 3}
    # Closed in reverse: ids first, so that the manifest lists them among the inputs of the rest.
    outputs = [
        files.enter_context(store.writer(name, len(rows), (size, size, depth), split=split))
        for name, depth in depths.items()
    ]
    for name, column in reversed(columns.items()):
        files.enter_context(store.writer(name, len(rows), (), str(column.dtype), split=split)).append(column)
    for pair in command.progress(pixels, split, len(rows)):
        for output, array in zip(outputs, pair, strict=False):
            if array is not None:
                output.append(array[None])
    copied = sum(copy is not None for _, copy in rows)
    log.info("%-5s %d photographs, %d augmented copies", split, len(rows) - copied, copied)
    return [*columns, *depths]


def draw_copies(store: stages.Store, path: Path) -> None:
    """Draws some minority images, each beside its first copies, lesions outlined; nothing without labels and masks."""
    path.unlink(missing_ok=True)
    if not (store.has("labels", split="train") and store.has("masks", split="train")):
        return
    ids, labels = store.load("ids", split="train"), store.load("labels", split="train")
    photographs, masks = store.load("images", split="train"), store.load("masks", split="train")
    tiles = []
    for label in isic.RANKED:
        for original in np.flatnonzero(labels == label)[:2]:
            family = [row for row, name in enumerate(ids) if augment.original(name) == ids[original]][:4]
            titles = [f"{isic.CLASSES[label]}, {ids[original]}", *["copy"] * 3]
            tiles.append(
                [
                    plots.Tile(photographs[row], title, truth=masks[row])
                    for row, title in zip(family, titles, strict=False)
                ]
            )
    if tiles:
        plots.sheet(path, tiles, "Minority classes: photographs (left) and their augmented copies")


def stop_at_faults(report: checks.Report, arguments: argparse.Namespace) -> None:
    """Ends the run where there is something to mend.

    Raises:
        InputError: a photograph cannot be used, all of a split's, or --strict meets a warning.
    """
    rejects = arguments.graphics / "rejects.csv"
    if report.problems and not arguments.skip_bad:
        names = isic.first_ids([record.id for record in report.problems])
        reason = next(iter(report.problems.values()))
        raise InputError(
            f"{len(report.problems)} photographs cannot be used: {names}. The first: {reason}. All: {rejects}; "
            "mend them, or leave them out with --skip-bad"
        )
    if empty := report.found.keys() - report.usable.keys():
        raise InputError(
            f"no photograph of {', '.join(sorted(empty))} is left: see rejects.csv and duplicates.csv in "
            f"{arguments.graphics}; --keep-duplicates keeps the latter"
        )
    if arguments.strict and (warnings := list(report.warnings())):
        raise InputError("; ".join(warnings))


def main(arguments: argparse.Namespace) -> None:
    """Reads and checks the source; writes the arrays of its splits and takes away those of splits that it has not."""
    found = isic.read_source(arguments.source)
    unused, superpixels = isic.unused_labels(arguments.source, found), isic.superpixel_files(arguments.source)
    known = isic.RECURRING if arguments.split == isic.OFFICIAL else frozenset()
    if arguments.split == "2018":
        found = isic.divide_2018(found, arguments.seed)
    found = {split: isic.interleave(records)[: arguments.limit] for split, records in found.items()}
    workers = parallel.Workers(arguments.jobs, arguments.cluster)
    with Cache(arguments.data, arguments.size) as cache, workers, contextlib.ExitStack() as files:
        cache.read(list(itertools.chain.from_iterable(found.values())), workers)
        keep = arguments.keep_duplicates
        report = checks.inspect(found, cache, workers, known, keep, unused, superpixels)
        for line in report.lines():
            log.info(line)
        report.write(arguments.graphics)
        checks.draw_duplicates(arguments.graphics / "duplicates.png", report.duplicates, cache)
        stop_at_faults(report, arguments)
        if arguments.check:
            return
        settings = vars(arguments) | {"source_fingerprint": isic.fingerprint(report.usable)}
        store = stages.Store(arguments.data, stages.PREPROCESSING, settings)
        written = {}
        for split, records in report.usable.items():  # an error leaves the arrays of an earlier run as they were
            rows = plan(records, split, arguments.copies)
            written[split] = write_split(store, files, split, rows, pictures(rows, cache, arguments.seed, workers))
    cache.remove()
    for split in isic.SPLITS:
        for name in {"ids", "images", "masks", "labels"} - set(written.get(split, [])):
            store.remove(name, split=split)
    draw_copies(stages.Store(arguments.data, stages.PREPROCESSING, {}), arguments.graphics / "augmentation.png")


if __name__ == "__main__":
    command.run(parser(), main)
