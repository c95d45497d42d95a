"""Probabilities of every split by the networks of each fold, and the calibration fitted on them."""

import json
from collections.abc import Sequence
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.dataset.splits import UNLABELLED, base_rows, load_labels
from melanoma.errors import InputError, StageError
from melanoma.inference import calibration
from melanoma.inference.ensemble import Blend, Ensemble
from melanoma.log import log

import numpy as np


def predict_splits(
    store: Store, ensemble: Ensemble, batch_size: int, out_of_fold: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Probabilities by split, see `Ensemble.fold_probabilities`.

    Train is left out unless `out_of_fold` says which networks were not trained on which row; then its rows are only
    those of `splits.base_rows`.
    """
    probabilities, engines = {}, set()
    for split in store.splits():
        images = store.load("roi", split=split)
        if split != "train":
            probabilities[split], engine = ensemble.fold_probabilities(images, batch_size, f"probabilities of {split}")
            engines.add(engine)
        elif out_of_fold is not None:
            count = len(base_rows(store, split))
            label = "out-of-fold probabilities of train"
            probabilities[split], engine = ensemble.fold_probabilities(
                images[:count], batch_size, label, out_of_fold[:count]
            )
            engines.add(engine)
    store.settings["inference"] = ", ".join(sorted(engines))
    return probabilities


def predict_blend(store: Store, blend: Blend, batch_size: int) -> dict[str, np.ndarray]:
    """Probabilities, float32 (N, 3), by split; train is left out."""
    found = {}
    engines = set()
    for split in store.splits():
        if split != "train":
            images = store.load("roi", split=split)
            found[split], engine = blend.probabilities(images, batch_size, f"probabilities of {split}")
            engines.add(engine)
    store.settings["inference"] = ", ".join(sorted(engines))
    return found


def combine(store: Store, names: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The mean of classifiers of the data folder.

    Args:
        store: data folder.
        names: of the classifiers.

    Returns:
        The parts of their settings, see `ensemble.load`; mean probabilities by split, of train if all have some.

    Raises:
        InputError: a classifier is named twice.
        StageError: predictions are missing or stale.
    """
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"--ensemble names {', '.join(twice)} twice: name each classifier once")
    parts, probabilities = [], {}
    for name in names:
        settings = json.loads(store.check("classifier_settings", backbone=name).read_text(encoding="utf-8"))
        parts += settings["parts"]
    for split in store.splits():
        if split == "train" and not all(store.has("probabilities", split=split, backbone=name) for name in names):
            continue
        count = len(base_rows(store, split)) if split == "train" else store.rows(split)
        loaded = [store.load_first("probabilities", count, split=split, backbone=name) for name in names]
        probabilities[split] = np.mean(loaded, axis=0)
    return parts, probabilities


def calibrate(store: Store, probabilities: dict[str, np.ndarray]) -> calibration.Calibration:
    """The calibration fitted on out-of-fold probabilities of train if there are any, else on validation.

    Args:
        store: data folder with labels.
        probabilities: float (N, folds, 3) by split, from `predict_splits`.
    """
    for split in ("train", "val"):
        if split not in probabilities:
            continue
        labels = load_labels(store, split)[: len(probabilities[split])]
        rows = labels != UNLABELLED
        if rows.any():
            found = probabilities[split][rows]
            of_each_fold = np.repeat(labels[rows], found.shape[1])
            fitted = calibration.fit(of_each_fold, found.reshape(len(of_each_fold), -1))
            log.info("calibrated on %s, n = %d: temperature %.2f", split, rows.sum(), fitted.temperature)
            return fitted
    return calibration.IDENTITY


def roi_setting(store: Store) -> str:
    """The --roi with which the regions of interest were made.

    Raises:
        StageError: it differs between splits.
    """
    splits = store.splits()
    for split in splits:
        store.check("roi", split=split)
    used = {store.written_with("roi", split=split)["roi"] for split in splits}
    if len(used) > 1:
        raise StageError(f"splits differ in --roi ({', '.join(sorted(used))}): run {contract.ROI} again")
    return used.pop()
