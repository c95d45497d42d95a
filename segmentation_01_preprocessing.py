"""Step 1 of 5: from photographs, masks and labels to arrays; melanoma and seborrheic keratosis in augmented copies.

Reads   --source, the official ISIC 2017 folders and CSVs (README, "Data")
Writes  data/arrays/{train,val,test}_ids.npy      str (N,)
        data/arrays/{train,val,test}_images.npy   uint8 (N, S, S, 3)
        data/arrays/{train,val,test}_masks.npy    uint8 (N, S, S, 1), {0, 1}; where the split has masks
        data/arrays/{train,val,test}_labels.npy   int8 (N,), 0 benign nevus, 1 melanoma, 2 seborrheic keratosis; where
                                                  the split has labels
        graphics/augmentation.png                 copies beside their originals

Run     python segmentation_01_preprocessing.py
Try     python segmentation_01_preprocessing.py --limit 30
Expect  README, "Results"
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

from melanoma import augment, command, images, isic, plots, stages
from melanoma.command import log

import numpy as np

SIZE = 256  # pixels: side of the arrays
COPIES = 3.5  # times as many images of melanoma and of keratosis, as in 2018

Row = tuple[isic.Record, int | None]  # a record, and the number of its augmented copy; None for the original


def parser() -> argparse.ArgumentParser:
    """The script's command line."""
    flags = command.parser(__doc__)
    flags.add_argument("--source", type=Path, default=Path("data"), help="folder of the official ISIC 2017 layout")
    flags.add_argument("--split", choices=("official", "2018"), default="official", help="how images become splits")
    flags.add_argument("--size", type=command.positive_int, default=SIZE, help="side of the arrays in pixels")
    flags.add_argument(
        "--copies", type=command.at_least_one, default=COPIES, help="melanoma and keratosis, times their number"
    )
    return flags


def plan(records: list[isic.Record], split: str, times: float) -> list[Row]:
    """The rows of a split: its records, classes in turns, and for train the augmented copies after them."""
    rows: list[Row] = [(record, None) for record in records]
    if split == "train" and records[0].label is not None:
        labels = np.array([record.label for record in records])
        for number, row in enumerate(augment.copies(labels, (isic.MELANOMA, isic.KERATOSIS), times), start=1):
            rows.append((records[row], number))
    return rows


def pictures(rows: list[Row], size: int, seed: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Image (S, S, 3), and mask (S, S, 1) where there is one, of every row, one at a time."""
    for record, copy in rows:
        image = images.read_image(record.image, size)
        mask = images.read_mask(record.mask, size, record.image) if record.mask else None
        if copy is not None:
            image, mask = augment.vary(image, np.random.default_rng([seed, copy]), mask)
        yield (image,) if mask is None else (image, mask)


def write_split(
    store: stages.Store, files: contextlib.ExitStack, split: str, rows: list[Row], size: int, seed: int
) -> list[str]:
    """Writes the arrays of one split, row by row, and returns their names; they take effect when `files` closes."""
    columns = {"ids": np.array([record.id if copy is None else f"{record.id}_copy{copy}" for record, copy in rows])}
    if rows[0][0].label is not None:
        columns["labels"] = np.array([record.label for record, _ in rows], dtype=np.int8)
    depths = {"images": 3, "masks": 1} if rows[0][0].mask else {"images": 3}
    # Closed in reverse: ids first, so that the manifest lists them among the inputs of the rest.
    pixels = [
        files.enter_context(store.writer(name, len(rows), (size, size, depth), split=split))
        for name, depth in depths.items()
    ]
    for name, column in reversed(columns.items()):
        files.enter_context(store.writer(name, len(rows), (), str(column.dtype), split=split)).append(column)
    for arrays in command.progress(pictures(rows, size, seed), split, len(rows)):
        for file, array in zip(pixels, arrays, strict=True):
            file.append(array[None])
    copied = sum(copy is not None for _, copy in rows)
    labels = columns.get("labels", np.array([]))
    classes = ", ".join(f"{(labels == label).sum()} {name}" for label, name in enumerate(isic.CLASSES))
    log.info("%-5s %d photographs, %d augmented copies", split, len(rows) - copied, copied)
    log.info("%-5s %s", split, classes if len(labels) else "no labels: will be predicted, not judged")
    if "masks" not in depths:
        log.info("%-5s no lesion masks: they will be predicted, not scored", split)
    return [*columns, *depths]


def draw_copies(store: stages.Store, path: Path) -> None:
    """Draws some minority images, each beside its first copies, lesions outlined; nothing without labels and masks."""
    path.unlink(missing_ok=True)
    if not (store.has("labels", split="train") and store.has("masks", split="train")):
        return
    ids, labels = store.load("ids", split="train"), store.load("labels", split="train")
    photographs, masks = store.load("images", split="train"), store.load("masks", split="train")
    tiles = []
    for label in (isic.MELANOMA, isic.KERATOSIS):
        for original in np.flatnonzero(labels == label)[:2]:
            family = [row for row, name in enumerate(ids) if name.split("_copy")[0] == ids[original]][:4]
            titles = [f"{isic.CLASSES[label]}, {ids[original]}", *["copy"] * 3]
            tiles.append(
                [
                    plots.Tile(photographs[row], title, truth=masks[row])
                    for row, title in zip(family, titles, strict=False)
                ]
            )
    if tiles:
        plots.sheet(path, tiles, "Minority classes: photographs (left) and their augmented copies")


def main(arguments: argparse.Namespace) -> None:
    """Writes the arrays of every split that the source has, and takes away those of an earlier run that it has not."""
    splits = isic.read_source(arguments.source)
    skipped = sum(isic.superpixel_files(arguments.source, split) for split in isic.SPLITS)
    if skipped:
        log.info("%d superpixel files skipped: they are neither photographs nor masks", skipped)
    if arguments.split == "2018":
        splits = isic.divide_2018(splits, arguments.seed)
    settings = vars(arguments) | {"source_fingerprint": isic.fingerprint(splits)}
    store = stages.Store(arguments.data, stages.PREPROCESSING, settings)
    written: dict[str, list[str]] = {}
    with contextlib.ExitStack() as files:  # bad input anywhere leaves the arrays of an earlier run as they were
        for split, records in splits.items():
            rows = plan(isic.interleave(records)[: arguments.limit], split, arguments.copies)
            written[split] = write_split(store, files, split, rows, arguments.size, arguments.seed)
    for split in isic.SPLITS:
        if split not in splits:
            log.info("%-5s absent in %s", split, arguments.source)
        for name in {"ids", "images", "masks", "labels"} - set(written.get(split, [])):
            store.remove(name, split=split)
    draw_copies(stages.Store(arguments.data, stages.PREPROCESSING, {}), arguments.graphics / "augmentation.png")


if __name__ == "__main__":
    command.run(parser(), main)
