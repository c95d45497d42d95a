"""Step 1 of 5: converts images, masks and labels to arrays; adds augmented copies of melanoma and seborrheic keratosis.

Reads   --source, a folder in a known layout or your own CSV; --extra, more of them, for train only
Writes  data/arrays/{train,val,test}_ids.npy      str (N,); an augmented copy has the id of its original
        data/arrays/{train,val,test}_source.npy   int64 (N,), row of the original
        data/arrays/{train,val,test}_groups.npy   int64 (N,), equal for images that stay in one fold
        data/arrays/{train,val,test}_origin.npy   int64 (N,), 0 image of --source, 1 of the first --extra, ...
        data/arrays/{train,val,test}_images.npy   uint8 (N, S, S, 3)
        data/arrays/{train,val,test}_masks.npy    uint8 (N, S, S, 1), {0, 1}; if any image of the split has a mask
        data/arrays/{train,val,test}_has_mask.npy bool (N,); with the masks
        data/arrays/{train,val,test}_labels.npy   int8 (N,), 0 benign nevus, 1 melanoma, 2 seborrheic keratosis, -1 no
                                                  label; if any image of the split has a label
        data/decoded.{bin,jsonl}                  decoded images, until the arrays are written
        graphics/rejects.csv                      images that cannot be used, and why
        graphics/left_out.csv                     images and files that are not used, and why
        graphics/duplicates.csv                   images that show the same picture
        graphics/duplicates.png                   some of these, side by side
        graphics/doubts.csv                       images and masks that should be looked at, and why
        graphics/doubtful_masks.png               such masks
        graphics/augmentation.png                 images beside their augmented copies

Run     python segmentation_01_preprocessing.py
Try     python segmentation_01_preprocessing.py --limit 30
Expect  a report of the checks, then the arrays; layouts and speed: docs/data.md
"""

import argparse
import contextlib
from pathlib import Path

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.cli import flags, run
from melanoma.dataset import arrays, checks, splits
from melanoma.dataset.cache import Cache
from melanoma.dataset.workers import Workers
from melanoma.evaluation import figures
from melanoma.log import log
from melanoma.sources import reader, records
from melanoma.sources.records import Source

SIZE = 256  # pixels: side of the arrays
COPIES = 3.5  # times as many images of melanoma and of keratosis, as in 2018


def build_parser() -> argparse.ArgumentParser:
    """The script's command line."""
    parser = flags.base_parser(__doc__)
    parser.add_argument(
        "--source", type=Path, default=Path("data"), help="folder of a known layout, or CSV of your own (docs/data.md)"
    )
    parser.add_argument("--layout", choices=reader.LAYOUTS, help="layout of --source; default: detected")
    parser.add_argument(
        "--extra",
        type=Path,
        action="append",
        default=[],
        metavar="SOURCE",
        help="another folder or CSV, whose images are added to train; may be given several times",
    )
    parser.add_argument(
        "--other",
        choices=("benign",),
        help="count diagnoses that are none of the three classes as benign nevus; default: leave these images out",
    )
    parser.add_argument(
        "--split",
        choices=splits.DIVISIONS,
        default=splits.OFFICIAL,
        help="official: the source's own splits; if it has none, as divide, or without labels as test; divide: 70 %% "
        "train, 10 %% validation, 20 %% test of each class; 2018: all labelled images divided as in 2018; train, val, "
        "test: all images for this split",
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


def check(
    sources: list[Source], division: splits.Division, cache: Cache, workers: Workers, arguments: argparse.Namespace
) -> checks.Report:
    """Reads the images, divides them into splits and reports the checks; stops if something has to be repaired."""
    images = division.images_to_read(sources)
    cache.read(images, workers)
    groups = checks.find_groups(images, cache, workers)
    known = sources[0].known_duplicates if arguments.split == splits.OFFICIAL else frozenset()
    divided = division.divide(sources, groups.number)
    log.info("splits: %s", division.describe(sources))
    report = checks.inspect(sources, divided, groups, cache, known, arguments.keep_duplicates)
    for line in report.lines():
        log.info(line)
    report.write(arguments.graphics)
    figures.draw_duplicates(arguments.graphics / "duplicates.png", report.duplicates, cache)
    figures.draw_doubtful_masks(arguments.graphics / "doubtful_masks.png", report.doubtful_masks(), cache)
    report.raise_problems(arguments.graphics, arguments.skip_bad, arguments.strict)
    return report


def main(arguments: argparse.Namespace) -> None:
    """Reads and checks the sources, and writes the arrays of their splits."""
    keep_others, outputs = arguments.other is not None, (arguments.data, arguments.graphics)
    sources = reader.read_all(arguments.source, arguments.extra, arguments.layout, keep_others, outputs)
    division = splits.Division(arguments.split, arguments.limit, arguments.seed)
    cache = Cache(arguments.data, arguments.size)
    with Workers(arguments.jobs, arguments.cluster) as workers, contextlib.ExitStack() as files:
        report = check(sources, division, cache, workers, arguments)
        if arguments.check:
            log.info("the decoded images stay in %s for the next run, %.1f GB", cache.path, cache.gigabytes())
            return
        facts = {
            "source_fingerprint": records.fingerprint(report.usable),
            "synthetic": records.is_synthetic([arguments.source, *arguments.extra]),
            "division": division.describe(sources),
            "sources": [records.describe(source, report.used) for source in sources],
        }
        store = Store(arguments.data, contract.PREPROCESSING, vars(arguments) | facts)
        numbers, written = {"groups": report.groups.number, "origin": records.origins(sources)}, {}
        for split, found in report.usable.items():  # after an error the arrays of an earlier run stay
            rows = arrays.plan_rows(found, split, arguments.copies)
            pixels = arrays.read_rows(rows, cache, arguments.seed, workers)
            written[split] = arrays.write_split(store, files, split, rows, pixels, numbers)
    cache.remove()
    arrays.remove_others(store, written)
    figures.draw_copies(Store(arguments.data, contract.PREPROCESSING, {}), arguments.graphics / "augmentation.png")


if __name__ == "__main__":
    run.run(build_parser(), main)
