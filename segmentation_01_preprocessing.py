"""Step 1 of 5: converts images, masks and labels to arrays; adds augmented copies of melanoma and seborrheic keratosis.

Reads   --source, a folder in the official ISIC 2017 layout
Writes  data/arrays/{train,val,test}_ids.npy      str (N,); an augmented copy has the id of its original
        data/arrays/{train,val,test}_source.npy   int64 (N,), row of the original
        data/arrays/{train,val,test}_groups.npy   int64 (N,), equal for images that stay in one fold
        data/arrays/{train,val,test}_images.npy   uint8 (N, S, S, 3)
        data/arrays/{train,val,test}_masks.npy    uint8 (N, S, S, 1), {0, 1}; if any image of the split has a mask
        data/arrays/{train,val,test}_has_mask.npy bool (N,); with the masks
        data/arrays/{train,val,test}_labels.npy   int8 (N,), 0 benign nevus, 1 melanoma, 2 seborrheic keratosis, -1 no
                                                  label; if any image of the split has a label
        data/cache.sqlite                         decoded images, until the arrays are written
        graphics/rejects.csv                      images that cannot be used, and why
        graphics/duplicates.csv                   images that show the same picture
        graphics/duplicates.png                   some of these, side by side
        graphics/augmentation.png                 images beside their augmented copies

Run     python segmentation_01_preprocessing.py
Try     python segmentation_01_preprocessing.py --limit 30
Expect  a report of the checks, then the arrays; speed: docs/data.md
"""

import argparse
import contextlib
import dataclasses
import itertools
from pathlib import Path

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.cli import flags, run
from melanoma.dataset import arrays, checks
from melanoma.dataset.cache import Cache
from melanoma.dataset.splits import divide_2018, interleave
from melanoma.dataset.workers import Workers
from melanoma.evaluation import figures
from melanoma.log import log
from melanoma.sources import isic

SIZE = 256  # pixels: side of the arrays
COPIES = 3.5  # times as many images of melanoma and of keratosis, as in 2018


def build_parser() -> argparse.ArgumentParser:
    """The script's command line."""
    parser = flags.base_parser(__doc__)
    parser.add_argument("--source", type=Path, default=Path("data"), help="folder in the official ISIC 2017 layout")
    parser.add_argument(
        "--split",
        choices=(isic.OFFICIAL, "2018"),
        default=isic.OFFICIAL,
        help="official: the challenge's own splits; 2018: all labelled images divided as in 2018",
    )
    parser.add_argument("--size", type=flags.positive_int, default=SIZE, help="side of the arrays in pixels")
    parser.add_argument(
        "--copies",
        type=flags.at_least_one,
        default=COPIES,
        help="enlarge melanoma and keratosis in train to this many times their number; 1: no augmented copies",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only read and check, write no arrays; the next run reuses the decoded images",
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be used")
    parser.add_argument("--keep-duplicates", action="store_true", help="keep duplicates in train")
    parser.add_argument("--strict", action="store_true", help="treat warnings as errors")
    places = parser.add_mutually_exclusive_group()
    places.add_argument(
        "--jobs", type=flags.positive_int, help="processes on this machine; default: one per core, on Windows 1"
    )
    places.add_argument("--cluster", metavar="URL", help="Dask scheduler, tcp://host:port, whose workers do the work")
    return parser


def read_source(arguments: argparse.Namespace) -> isic.SourceContents:
    """The source, with its images divided into splits as the command line asks."""
    source = isic.read_source(arguments.source)
    records = source.records if arguments.split == isic.OFFICIAL else divide_2018(source.records, arguments.seed)
    first = {split: interleave(found)[: arguments.limit] for split, found in records.items()}
    return dataclasses.replace(source, records=first)


def check(source: isic.SourceContents, cache: Cache, workers: Workers, arguments: argparse.Namespace) -> checks.Report:
    """Checks the source and reports the result; stops if something has to be repaired."""
    known = isic.KNOWN_DUPLICATES if arguments.split == isic.OFFICIAL else frozenset()
    report = checks.inspect(source, cache, workers, known, arguments.keep_duplicates)
    for line in report.lines():
        log.info(line)
    report.write(arguments.graphics)
    figures.draw_duplicates(arguments.graphics / "duplicates.png", report.duplicates, cache)
    report.raise_problems(arguments.graphics, arguments.skip_bad, arguments.strict)
    return report


def main(arguments: argparse.Namespace) -> None:
    """Reads and checks the source, and writes the arrays of its splits."""
    source = read_source(arguments)
    workers = Workers(arguments.jobs, arguments.cluster)
    with Cache(arguments.data, arguments.size) as cache, workers, contextlib.ExitStack() as files:
        cache.read(list(itertools.chain.from_iterable(source.records.values())), workers)
        report = check(source, cache, workers, arguments)
        if arguments.check:
            return
        facts = {
            "source_fingerprint": isic.fingerprint(report.usable),
            "synthetic": isic.is_synthetic(arguments.source),
        }
        store = Store(arguments.data, contract.PREPROCESSING, vars(arguments) | facts)
        group_of = {record: number for number, record in enumerate(itertools.chain(*report.usable.values()))}
        written = {}
        for split, records in report.usable.items():  # after an error the arrays of an earlier run stay
            rows = arrays.plan_rows(records, split, arguments.copies)
            pixels = arrays.read_rows(rows, cache, arguments.seed, workers)
            written[split] = arrays.write_split(store, files, split, rows, pixels, group_of)
    cache.remove()
    arrays.remove_others(store, written)
    figures.draw_copies(Store(arguments.data, contract.PREPROCESSING, {}), arguments.graphics / "augmentation.png")


if __name__ == "__main__":
    run.run(build_parser(), main)
