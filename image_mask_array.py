"""Step 3 of 5: reduces each image to its region of interest, using the predicted lesion mask.

Reads   data/arrays/{train,val,test}_{ids,images,labels}.npy   from step 1
        data/arrays/{train,val,test}_predicted.npy             from step 2
Writes  data/arrays/{train,val,test}_roi.npy                   uint8 (N, S, S, 3)
        graphics/roi.png                                       image, mask and result, some of each class

Run     python image_mask_array.py
Try     python image_mask_array.py --roi mask --limit 30
Expect  a few seconds; what each --roi is worth: docs/results.md
"""

import argparse

from melanoma.artifacts import contract
from melanoma.artifacts.store import ROW_BLOCK, Store
from melanoma.cli import flags, run
from melanoma.dataset import roi
from melanoma.evaluation import figures
from melanoma.log import log, progress

import numpy as np

ROI = "crop"  # better than "mask", the choice of 2018, in cross-validation (docs/results.md)


def build_parser() -> argparse.ArgumentParser:
    """The script's command line."""
    parser = flags.base_parser(__doc__)
    parser.add_argument(
        "--roi",
        choices=roi.ROIS,
        default=ROI,
        help="mask: black background; crop: enlarged box around the lesion; full: unchanged image",
    )
    parser.add_argument(
        "--size", type=flags.positive_int, help="side of the regions of interest in pixels; default: that of the arrays"
    )
    return parser


def write_regions(store: Store, split: str, kind: str, size: int | None) -> None:
    """Writes the regions of interest of one split, a block at a time."""
    images = store.load("images", split=split)
    side = size or images.shape[1]
    total, shape = len(images), (side, side, 3)
    blocks = zip(store.blocks("images", split=split), store.blocks("predicted", split=split), strict=True)
    fallbacks = 0
    with store.writer("roi", total, shape, split=split) as output:
        for block, masks in progress(blocks, split, -(-total // ROW_BLOCK)):
            results = [roi.region_of_interest(*pair, kind, side) for pair in zip(block, masks, strict=True)]
            fallbacks += sum(fell_back for _, fell_back in results)
            output.append(np.stack([region for region, _ in results]))
    log.info("%-5s %d images; %d kept in full because their mask is empty or full", split, total, fallbacks)


def main(arguments: argparse.Namespace) -> None:
    """Writes the regions of interest of every split, and draws some of validation or else the first split."""
    store = Store(arguments.data, contract.ROI, vars(arguments))
    splits = store.splits()
    for split in splits:
        write_regions(store, split, arguments.roi, arguments.size)
    shown = "val" if "val" in splits else splits[0]
    path = arguments.graphics / "roi.png"
    figures.draw_roi(store, shown, arguments.roi, path)
    store.record_graphics(path)


if __name__ == "__main__":
    run.run(build_parser(), main)
