"""Probabilities of every split by the networks of each fold, and the calibration fitted on them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.dataset.splits import UNLABELLED, base_rows, list_members, load_folds, load_labels, out_of_fold_mask
from melanoma.errors import InputError, StageError
from melanoma.inference import calibration, ensemble
from melanoma.inference.ensemble import Blend, Ensemble
from melanoma.log import log

import numpy as np


def predict_splits(
    store: Store, classifier: Ensemble, batch_size: int, out_of_fold: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Probabilities by split, see `Ensemble.fold_probabilities`.

    Train is left out unless `out_of_fold` says which networks were not trained on which row; then its rows are only
    those of `splits.base_rows`.
    """
    probabilities, engines = {}, set()
    for split in store.splits():
        images = store.load("roi", split=split)
        if split != "train":
            probabilities[split], engine = classifier.fold_probabilities(
                images, batch_size, f"probabilities of {split}"
            )
            engines.add(engine)
        elif out_of_fold is not None:
            count = len(base_rows(store, split))
            label = "out-of-fold probabilities of train"
            probabilities[split], engine = classifier.fold_probabilities(
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


def combine(
    store: Store, names: Sequence[str], views: int | None, batch_size: int
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The mean of classifiers of the data folder.

    Args:
        store: data folder.
        names: of the classifiers.
        views: predict and calibrate again with so many views, see `predict.mean_output`; None: use what is saved.
        batch_size: images per network call.

    Returns:
        The parts of their settings, see `ensemble.load`; mean probabilities by split, of train if all have some.

    Raises:
        InputError: a classifier is named twice, or see `predict_again`.
        StageError: predictions are missing or stale.
    """
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"--ensemble names {', '.join(twice)} twice: name each classifier once")
    results = [saved_part(store, name) for name in names]  # before hours of prediction, so that none is missing then
    if views:
        engines = []
        for place, name in enumerate(names):
            results[place] = predict_again(store, name, results[place][0], views, batch_size)
            engines.append(store.settings["inference"])
        store.settings["inference"] = ", ".join(sorted(set(engines)))
    parts, found = zip(*results, strict=True)
    common = [split for split in store.splits() if all(split in one for one in found)]
    return list(parts), {split: np.mean([one[split] for one in found], axis=0) for split in common}


def saved_part(store: Store, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A classifier's part of the saved settings, and its probabilities, float32 (N, 3), by split.

    Raises:
        StageError: they are missing or stale.
    """
    settings = json.loads(store.check("classifier_settings", backbone=name).read_text(encoding="utf-8"))
    probabilities = {}
    for split in store.splits():
        count = len(base_rows(store, split)) if split == "train" else store.rows(split)
        if split != "train" or store.has("probabilities", split=split, backbone=name):
            probabilities[split] = store.load_first("probabilities", count, split=split, backbone=name)
    return settings["parts"][0], probabilities


def predict_again(
    store: Store, name: str, part: dict[str, Any], views: int, batch_size: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """As `saved_part`, with another number of views and the calibration fitted to them.

    Args:
        store: data folder.
        name: of the classifier.
        part: from `saved_part`.
        views: see `predict.mean_output`.
        batch_size: images per network call.

    Raises:
        InputError: the classifier was trained on part of the images, or only part of them is to be predicted.
    """
    used = store.written_with("classifier_settings", backbone=name)
    if used["limit"] or store.limit:
        raise InputError("--views with --ensemble predicts all images again: leave out --limit, in training too")
    blend, _ = ensemble.load(store, name)
    members = list_members(used["folds"], used["seeds"], used["seed"])
    out_of_fold = out_of_fold_mask(members, load_folds(store, used["folds"], used["seed"]))
    networks = replace(blend.parts[0], views=views)
    raw = predict_splits(store, networks, batch_size, out_of_fold)
    networks = replace(networks, calibration=calibrate(store, raw))
    part = part | {"views": views, "calibration": asdict(networks.calibration)}
    return part, {split: networks.combine(values) for split, values in raw.items()}


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
