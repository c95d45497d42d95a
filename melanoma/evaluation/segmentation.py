"""Evaluation of the predicted lesion masks of every split."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from melanoma.artifacts.store import Store
from melanoma.evaluation import figures, scoring, tables
from melanoma.log import log

FIGURES = {"segnet_overlays.png": figures.draw_overlays, "segnet_jaccard.png": figures.draw_jaccard}


def evaluate(
    store: Store, out_of_fold: bool, seen: Mapping[str, Sequence[str]], graphics: Path, seed: int
) -> dict[str, dict[str, Any]]:
    """Logs the metrics of the masks of every split, and draws those of validation.

    Args:
        store: with predicted masks, and true masks of some splits.
        out_of_fold: whether the masks of train come from networks that were not trained on them; otherwise train is not
            evaluated.
        seen: ids to leave out of the evaluation, by split.
        graphics: folder of the figures.
        seed: seed of the bootstrap.

    Returns:
        {split: result of `scoring.score_masks`}, of the splits with an image to evaluate.
    """
    scores = {}
    for split in store.splits():
        if split == "train" and not out_of_fold:
            continue
        if not store.has("masks", split=split):
            log.info("%s has no lesion masks: predicted, not evaluated", split)
            continue
        rows = scoring.rows_with_masks(store, split, seen.get(split, ()))
        if not len(rows):
            log.info("%s has no lesion masks to evaluate", split)
            continue
        scores[split] = scoring.score_masks(store, split, rows, seed)
        log.info("\nLesion masks of %s%s, n = %d", split, ", out-of-fold" if split == "train" else "", len(rows))
        for line in tables.mask_lines(scores[split]):
            log.info("%s", line)
    for name, draw in FIGURES.items():
        (graphics / name).unlink(missing_ok=True)  # of an earlier run
        if "val" in scores:
            draw(store, scoring.rows_with_masks(store, "val", seen.get("val", ())), graphics / name)
            store.record_graphics(graphics / name)
    return scores
