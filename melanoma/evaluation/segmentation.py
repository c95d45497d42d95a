"""Evaluation of the predicted lesion masks of every split."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from melanoma.artifacts.store import Store
from melanoma.dataset import decode
from melanoma.errors import InputError
from melanoma.evaluation import figures, scoring, tables
from melanoma.inference import postprocess
from melanoma.log import log, progress
from melanoma.metrics.segmentation import per_image
from melanoma.sources import reader

import numpy as np

OWN_SIZE = ("val", "test")  # splits evaluated at the images' own size too
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


def evaluate_at_own_size(store: Store, seen: Mapping[str, Sequence[str]], seed: int) -> dict[str, dict[str, Any]]:
    """Metrics of the masks of OWN_SIZE at the size of the mask files, as the challenge computes them.

    Args:
        store: with predicted masks; the source of its images has to be where it was.
        seen: ids to leave out of the evaluation, by split.
        seed: seed of the bootstrap.

    Returns:
        As `evaluate`; splits without mask files, or whose files have changed, are left out.
    """
    used = store.written_with("ids", split=store.splits()[0])
    source = Path(used["source"])
    splits = [split for split in store.splits() if split in OWN_SIZE and store.has("masks", split=split)]
    if not splits:
        return {}
    try:
        records = reader.read(source, used["layout"], used["other"] is not None, [store.data]).records
    except InputError as error:
        log.info("masks are not evaluated at the images' own size: %s", error)
        return {}
    files, scores = {record.id: record.mask for record in records}, {}
    for split in splits:
        rows = scoring.rows_with_masks(store, split, seen.get(split, ()))
        ids = store.load("ids", split=split)[rows].tolist()
        paths = [path for image_id in ids if (path := files.get(image_id))]
        if not len(rows) or len(paths) < len(rows):
            log.info(
                "masks of %s are not evaluated at the images' own size: %s has not all of their files", split, source
            )
            continue
        pairs = zip(paths, store.load("predicted", split=split)[rows], strict=True)
        try:
            found = [score_file(path, mask) for path, mask in progress(pairs, f"full-size masks of {split}", len(rows))]
        except InputError as error:  # changed since step 1; what was trained has to be reported all the same
            log.info("masks of %s are not evaluated at the images' own size: %s", split, error)
            continue
        scores[split] = scoring.summarise_masks(found, seed)
        log.info("\nLesion masks of %s at the images' own size, n = %d", split, len(rows))
        for line in tables.mask_lines(scores[split]):
            log.info("%s", line)
    return scores


def score_file(path: Path, predicted: np.ndarray) -> dict[str, np.ndarray]:
    """`per_image` metrics of a predicted mask, uint8 (S, S, 1), {0, 1}, against a mask file of any size."""
    truth = decode.read_full_size_mask(path)
    return per_image(truth[None], postprocess.enlarge(predicted, (truth.shape[1], truth.shape[0]))[None])
