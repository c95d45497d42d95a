"""Step 3 of 5: take the noise away, by the predicted lesion masks.

Reads   data/arrays/{train,val,test}_{ids,images,labels}.npy   from step 1
        data/arrays/{train,val,test}_predicted.npy             from step 2
Writes  data/arrays/{train,val,test}_masked.npy                uint8 (N, S, S, 3)
        graphics/masked.png                                    photograph, mask and result, for some of each class

Run     python image_mask_array.py
Try     python image_mask_array.py --roi mask --limit 30
Expect  README, "Results"
"""

import argparse
from pathlib import Path

from melanoma import command, images, isic, plots, stages
from melanoma.command import log

import numpy as np

ROI = "crop"  # better than "mask", the 2018 way, by cross-validation (README)
SHOWN = 2  # cases of each class on the contact sheet


def parser() -> argparse.ArgumentParser:
    """The script's command line."""
    flags = command.parser(__doc__)
    flags.add_argument(
        "--roi",
        choices=images.ROIS,
        default=ROI,
        help="mask: background black; crop: dilated box around the lesion; full: the whole photograph",
    )
    return flags


def mask_split(store: stages.Store, split: str, roi: str) -> None:
    """Writes the masked images of one split, a block at a time."""
    photographs = store.load("images", split=split)
    total, shape = len(photographs), photographs.shape[1:]
    blocks = zip(store.blocks("images", split=split), store.blocks("predicted", split=split), strict=True)
    fallbacks = 0
    with store.writer("masked", total, shape, split=split) as file:
        for block, masks in command.progress(blocks, split, -(-total // stages.ROW_BLOCK)):
            results = [images.region_of_interest(*pair, roi) for pair in zip(block, masks, strict=True)]
            fallbacks += sum(fell_back for _, fell_back in results)
            file.append(np.stack([image for image, _ in results]))
    log.info("%-5s %d images, %d with an empty or full mask left whole", split, total, fallbacks)


def draw_sheet(store: stages.Store, split: str, roi: str, path: Path) -> None:
    """Draws photograph, predicted mask and result for the first cases of each class, where labels tell them apart."""
    ids, photographs = store.load("ids", split=split), store.load("images", split=split)
    predicted, masked = store.load("predicted", split=split), store.load("masked", split=split)
    groups = {"unlabelled": np.arange(len(ids))}
    if store.has("labels", split=split):
        labels = store.load("labels", split=split)
        groups = {name: np.flatnonzero(labels == label) for label, name in enumerate(isic.CLASSES)}
    tiles = [
        [
            tile
            for row in rows[:SHOWN]
            for tile in (
                plots.Tile(photographs[row], f"{name}\n{ids[row]}"),
                plots.Tile(predicted[row], "predicted mask"),
                plots.Tile(masked[row], f"--roi {roi}"),
            )
        ]
        for name, rows in groups.items()
    ]
    plots.sheet(path, [row for row in tiles if row], f"What the classifier sees, first images of {split}")


def main(arguments: argparse.Namespace) -> None:
    """Masks every split and draws some of validation, or of the first split where that is absent."""
    store = stages.Store(arguments.data, stages.MASKING, vars(arguments))
    splits = store.splits()
    for split in splits:
        mask_split(store, split, arguments.roi)
    shown = "val" if "val" in splits else splits[0]
    draw_sheet(store, shown, arguments.roi, arguments.graphics / "masked.png")


if __name__ == "__main__":
    command.run(parser(), main)
