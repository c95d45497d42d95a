"""Systems to evaluate, their thresholds, and the metrics of each split."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melanoma.artifacts.store import Store
from melanoma.classes import CLASSES, MELANOMA, TASKS
from melanoma.dataset.splits import UNLABELLED, are_original, load_labels, originals_with_mask
from melanoma.errors import InputError, StageError
from melanoma.evaluation import submissions
from melanoma.evaluation.subgroups import subgroups
from melanoma.log import log
from melanoma.metrics import bootstrap, classification, segmentation

import numpy as np
import pandas as pd

DEFAULT_THRESHOLD = 0.5  # the challenge's, used if no labels are available to choose a better one
REPORT_ORDER = ("test", "val", "train")  # most meaningful first

Thresholds = dict[str, dict[str, float]]  # {class: {operating point: probability}}


@dataclass(frozen=True)
class Images:
    """The original images of each split, without augmented copies; where a split has labels, those with a label."""

    all_ids: dict[str, list[str]]  # of all originals of each split, regardless of labels and --limit
    rows: dict[str, np.ndarray]  # int (N,), rows in the arrays of the split, and places in `all_ids`, up to --limit
    labels: dict[str, np.ndarray]  # int (N,), of the splits that have labels

    @property
    def ids(self) -> dict[str, list[str]]:
        """Ids of the rows of each split."""
        return {split: [self.all_ids[split][row] for row in rows] for split, rows in self.rows.items()}


@dataclass(frozen=True)
class System:
    """Predictions of one system, and the thresholds that turn them into decisions."""

    name: str
    probabilities: dict[str, np.ndarray]  # float (N, 3) of each split
    thresholds: Thresholds
    chosen_on: str | None = None  # split that the thresholds were chosen on; None: none of these
    submitted: bool = False  # read from a CSV file, not this pipeline's classifier

    def first_threshold(self, index: int) -> float:
        """The threshold of a class where only one is shown."""
        return next(iter(self.thresholds[CLASSES[index]].values()))


def report_order(splits: Iterable[str]) -> list[str]:
    """Splits in the order in which they are reported."""
    return sorted(splits, key=REPORT_ORDER.index)


# ---------------------------------------------------------------------------------------------------- what is evaluated


def load_images(store: Store) -> Images:
    """Ids and labels of all splits in the data folder."""
    splits = store.splits()
    unlimited = Store(store.data, store.script, {})  # submitted CSV files cover all images
    all_ids, rows, labels = {}, {}, {}
    for split in splits:
        source = unlimited.load("source", split=split)
        all_ids[split] = unlimited.load("ids", split=split)[are_original(source)].tolist()
        rows[split] = np.flatnonzero(are_original(source[: store.rows(split)]))
        found = load_labels(store, split)[rows[split]]
        labelled = found != UNLABELLED
        if labelled.any():
            if without := int((~labelled).sum()):
                log.info("%s: %d of %d images are predicted, but not evaluated: no label", split, without, len(found))
            rows[split], labels[split] = rows[split][labelled], found[labelled]
    return Images(all_ids, rows, labels)


def load_predictions(store: Store, images: Images, split: str) -> tuple[list[str], np.ndarray]:
    """Ids and this pipeline's probabilities, float32 (N, 3), of all originals up to --limit, with or without label."""
    probabilities = np.array(store.load("probabilities", split=split))[: len(images.all_ids[split])]
    return images.all_ids[split][: len(probabilities)], probabilities


def load_submissions(files: Sequence[Path], images: Images) -> list[System]:
    """Systems from CSV files, see `submissions.read`, named after the files; without thresholds.

    Raises:
        InputError: two files have the same name, or a file is invalid.
    """
    systems = {}
    for path in files:
        found = submissions.read(path, images.all_ids)
        probabilities = {split: values[images.rows[split]] for split, values in found.items()}
        systems[path.stem] = System(path.stem, probabilities, {}, submitted=True)
    if len(systems) < len(files):
        raise InputError("two files of predictions have the same name, which is the system's name: rename one")
    return list(systems.values())


def load_classifier(store: Store, images: Images) -> System | None:
    """This pipeline's classifier, named after its backbone; None: it has no predictions.

    Train has predictions only after a cross-validation.

    Raises:
        StageError: its predictions are missing or stale.
    """
    probabilities = {
        split: np.array(store.load("probabilities", split=split))[rows]
        for split, rows in images.rows.items()
        if split != "train" or store.has("probabilities", split=split)
    }
    if not probabilities:
        return None
    made_with = store.written_with("probabilities", split=next(iter(probabilities)))
    name = made_with["backbone"]
    if not made_with["pretrained"]:
        return choose_thresholds(name, probabilities, images.labels)
    settings = json.loads(store.check("classifier_settings", backbone=name).read_text(encoding="utf-8"))
    return System(name, probabilities, settings["thresholds"])


def load_systems(store: Store, images: Images, files: Sequence[Path]) -> list[System]:
    """This pipeline's classifier, if it has predictions, and the submitted systems after it.

    Raises:
        StageError: the classifier's predictions are missing or stale, and there is no other system.
        InputError: two systems have the same name, or a file is invalid.
    """
    systems = [
        choose_thresholds(system.name, system.probabilities, images.labels, submitted=True)
        for system in load_submissions(files, images)
    ]
    if systems and not any(store.has("probabilities", split=split) for split in images.rows):
        return systems
    try:
        classifier = load_classifier(store, images)
    except StageError as error:
        if not systems:
            raise
        log.info("this pipeline's classifier is left out: %s", error)
        return systems
    if classifier and classifier.name in {system.name for system in systems}:
        raise InputError(f"--predictions {classifier.name}.csv has the name of this pipeline's classifier: rename it")
    return [classifier, *systems] if classifier else systems


# ----------------------------------------------------------------------------------------------------------- thresholds


def choose_thresholds(
    name: str, probabilities: dict[str, np.ndarray], labels: dict[str, np.ndarray], submitted: bool = False
) -> System:
    """A system with thresholds chosen on train after a cross-validation, because it is larger, or on validation.

    Args:
        name: name of the system.
        probabilities: {split: float (N, 3)}.
        labels: {split: int (N,)}; without labels of the split, or if all or none of them are of a class, its threshold
            is the challenge's.
        submitted: see `System`.
    """
    thresholds, split = {}, "train" if "train" in probabilities else "val"
    for index in TASKS:
        truth = labels[split] == index if split in probabilities and split in labels else np.zeros(0, bool)
        if 0 < truth.sum() < len(truth):
            thresholds[CLASSES[index]] = classification.operating_points(truth, probabilities[split][:, index])
        else:
            log.info("%s: no labels to choose a threshold for %s, so it is %s", name, CLASSES[index], DEFAULT_THRESHOLD)
            thresholds[CLASSES[index]] = {str(DEFAULT_THRESHOLD): DEFAULT_THRESHOLD}
    return System(name, probabilities, thresholds, split, submitted)


def caveat(split: str, chosen_on: str | None, submitted: bool) -> str:
    """Why the metrics of a split are biased; "" if they are not.

    Args:
        split: split of the metrics.
        chosen_on: see `System`.
        submitted: see `System`; what was chosen for a submitted system, besides thresholds, is unknown.
    """
    chosen = ["best epochs"] if split == "val" and not submitted else []
    if split == chosen_on:
        chosen += ["thresholds"] if submitted else ["calibration", "thresholds"]
    listed = " and ".join(filter(None, [", ".join(chosen[:-1]), *chosen[-1:]]))
    return f"Biased upwards: {listed} were chosen on these images." if chosen else ""


# -------------------------------------------------------------------------------------------------------------- metrics


def evaluate_system(system: System, images: Images, metadata: pd.DataFrame | None, seed: int) -> dict[str, Any]:
    """Metrics of a system on every split that has labels.

    Args:
        system: what to evaluate.
        images: labels and ids.
        metadata: result of `subgroups.read_metadata`; None: no subgroups.
        seed: seed of the bootstrap.

    Returns:
        {"submitted": ..., "thresholds": ..., "chosen_on": ..., "splits": {split: result of `score`}, "subgroups":
        {split: {group: result of `score_subgroup`}}}.
    """
    splits = [split for split in system.probabilities if split in images.labels]
    result: dict[str, Any] = {
        "submitted": system.submitted,
        "thresholds": system.thresholds,
        "chosen_on": system.chosen_on,
        "splits": {},
        "subgroups": {},
    }
    for split in splits:
        labels, probabilities = images.labels[split], system.probabilities[split]
        groups = {} if metadata is None else subgroups(metadata, images.ids[split])
        threshold = system.first_threshold(MELANOMA)
        result["splits"][split] = score(labels, probabilities, system.thresholds, seed)
        result["subgroups"][split] = {
            group: score_subgroup(labels[rows], probabilities[rows], threshold, seed) for group, rows in groups.items()
        }
    return result


def score(labels: np.ndarray, probabilities: np.ndarray, thresholds: Thresholds, seed: int) -> dict[str, Any]:
    """All metrics of a split, with 95 % intervals and counts.

    Args:
        labels: int (N,), index into CLASSES.
        probabilities: float (N, 3).
        thresholds: thresholds of each task.
        seed: seed of the bootstrap.
    """
    truth, probability = labels == MELANOMA, probabilities[:, MELANOMA]
    return {
        "n": len(labels),
        "of_each_class": {name: int((labels == label).sum()) for label, name in enumerate(CLASSES)},
        "metrics": classification.all_metrics(labels, probabilities, thresholds),
        "intervals": bootstrap.classification_intervals(labels, probabilities, thresholds, seed),
        "melanoma_confusion": {
            point: classification.binary_confusion(truth, probability >= threshold).tolist()
            for point, threshold in thresholds[CLASSES[MELANOMA]].items()
        },
        "class_confusion": classification.class_confusion(labels, probabilities).tolist(),
    }


def score_aucs(labels: np.ndarray, probabilities: np.ndarray, seed: int) -> dict[str, Any]:
    """The challenge's AUCs with 95 % intervals; arguments as of `score`."""
    metrics = classification.task_aucs(labels, probabilities)
    return {"metrics": metrics, "intervals": bootstrap.auc_intervals(labels, probabilities, seed)}


def score_subgroup(labels: np.ndarray, probabilities: np.ndarray, threshold: float, seed: int) -> dict[str, Any]:
    """Melanoma metrics of a part of a split, with 95 % intervals and counts.

    Args:
        labels: int (N,), index into CLASSES.
        probabilities: float (N, 3).
        threshold: probability of melanoma from which an image counts as melanoma.
        seed: seed of the bootstrap.
    """
    metrics, intervals = bootstrap.binary_intervals(labels, MELANOMA, probabilities[:, MELANOMA], threshold, seed)
    melanomas = int((labels == MELANOMA).sum())
    return {"n": len(labels), "melanomas": melanomas, "metrics": metrics, "intervals": intervals}


def rows_with_masks(store: Store, split: str, left_out: Sequence[str] = ()) -> np.ndarray:
    """Rows of a split's original images that have a lesion mask, without the ids left out, int (K,)."""
    rows = originals_with_mask(store, split)
    return rows[~np.isin(store.load("ids", split=split)[rows], left_out)]


def score_masks(store: Store, split: str, rows: np.ndarray, seed: int) -> dict[str, Any]:
    """Mean segmentation metrics of some images of a split, with 95 % intervals.

    Args:
        store: with predicted masks of the split, and true ones of some of its images.
        split: train, val or test.
        rows: int (K,), the images to evaluate, K > 0.
        seed: seed of the bootstrap.

    Returns:
        {"n": ..., "metrics": {name: mean}, "intervals": {name: (low, high)}}, names as of `segmentation.per_image`.
    """
    values = segmentation.per_image(store.load("masks", split=split)[rows], store.load("predicted", split=split)[rows])
    return {
        "n": len(rows),
        "metrics": {name: float(column.mean()) for name, column in values.items()},
        "intervals": bootstrap.mean_intervals(values, seed),
    }
