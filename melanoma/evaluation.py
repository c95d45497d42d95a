"""Judging systems: thresholds chosen on validation, figures with intervals, curves, subgroups, the probe."""

from collections.abc import Callable
from typing import Any

from melanoma import isic, metrics, plots
from melanoma.command import log

import numpy as np

DEFAULT_THRESHOLD = 0.5  # the challenge's own; where no validation labels choose a better one

System = dict[str, np.ndarray]  # probabilities, float (N, 3), by split
Thresholds = dict[str, dict[str, float]]  # by class and operating point


SPOKEN = {"train": "cross-validation", "val": "validation", "test": "test"}


def chooser(system: System) -> str:
    """The split that chooses a system's thresholds: train after a cross-validation, for it is larger, or validation."""
    return "train" if "train" in system else "val"


def caveat(split: str, chosen_on: str | None, own: bool) -> str:
    """What to know of a split's figures; nothing where the system only answered.

    Args:
        split: of the figures.
        chosen_on: the split that chose the thresholds, and the own network's calibration; None: none of these.
        own: whether it is the own network, whose best epochs validation chose.
    """
    chosen = ["best epochs"] * (own and split == "val")
    chosen += [*["calibration"] * own, "thresholds"] * (split == chosen_on)
    listed = " and ".join(filter(None, (", ".join(chosen[:-1]), *chosen[-1:])))
    return f"{listed} were chosen on these very images, so these figures flatter" if chosen else ""


def choose_thresholds(name: str, system: System, labels: System) -> Thresholds:
    """For each task, the thresholds of the operating points on the `chooser`, or the challenge's where none can."""
    thresholds, split = {}, chooser(system)
    for index in isic.RANKED:
        truth = labels[split] == index if split in system and split in labels else np.zeros(0, bool)
        if 0 < truth.sum() < len(truth):
            thresholds[isic.CLASSES[index]] = metrics.operating_points(truth, system[split][:, index])
        else:
            log.info("%s: no labels choose a threshold for %s: %s", name, isic.CLASSES[index], DEFAULT_THRESHOLD)
            thresholds[isic.CLASSES[index]] = {str(DEFAULT_THRESHOLD): DEFAULT_THRESHOLD}
    return thresholds


def first_threshold(thresholds: Thresholds, index: int) -> float:
    """The one at which a class is shown where there is room for one."""
    return next(iter(thresholds[isic.CLASSES[index]].values()))


def curves(
    split: str, labels: np.ndarray, systems: dict[str, np.ndarray], thresholds: Thresholds, seed: int
) -> tuple[list[plots.Curve], list[plots.Curve]]:
    """ROC and precision-recall curves of both tasks; the first system's with band and operating points."""
    roc, precision_recall = [], []
    for colour, index in enumerate(isic.RANKED):
        name, truth = isic.CLASSES[index], labels == index
        if not 0 < truth.sum() < len(truth):
            log.info("%s: only one side of %s occurs: no curves", split, name)
            continue
        for style, (system, probabilities) in enumerate(systems.items()):
            score = probabilities[:, index]
            label = f"{name}, {system}" if len(systems) > 1 else name
            look: dict[str, Any] = {"colour": colour, "style": style}
            rates, recalls, band = [], [], None
            for threshold in thresholds.get(name, {}).values() if style == 0 else ():
                confusion = metrics.binary_confusion(truth, score >= threshold)
                false, sensitivity = (confusion[:, 1] / confusion.sum(axis=1)).tolist()
                rates.append((false, sensitivity))
                recalls.append((sensitivity, confusion[1, 1] / max(confusion[:, 1].sum(), 1)))
            if style == 0:
                band = metrics.roc_band(truth, score, seed)
            title = f"{label}: AUC {metrics.auc(truth, score):.3f}"
            roc.append(plots.Curve(title, *metrics.roc_curve(truth, score), rates, band, **look))
            title = f"{label}: AP {metrics.average_precision(truth, score):.3f}"
            line = metrics.precision_recall_curve(truth, score)
            precision_recall.append(plots.Curve(title, *line, recalls, **look))
    return roc, precision_recall


def areas(labels: np.ndarray, probabilities: np.ndarray, rows: np.ndarray) -> dict[str, float | None]:
    """`metrics.areas` of some rows."""
    return metrics.areas(labels[rows], probabilities[rows])


def with_intervals(
    compute: Callable[[np.ndarray], dict[str, float | None]], labels: np.ndarray, seed: int
) -> dict[str, Any]:
    """Figures of all rows and their intervals over images drawn within the classes; see `metrics.intervals`."""
    return {"figures": compute(np.arange(len(labels))), "intervals": metrics.intervals(compute, labels, seed)}


def score(labels: np.ndarray, probabilities: np.ndarray, thresholds: Thresholds, seed: int) -> dict[str, Any]:
    """Every figure of a split, with intervals and counts."""

    def compute(rows: np.ndarray) -> dict[str, float | None]:
        return metrics.figures(labels[rows], probabilities[rows], thresholds)

    truth, probability = labels == isic.MELANOMA, probabilities[:, isic.MELANOMA]
    return {
        "n": len(labels),
        "of_each_class": {name: int((labels == label).sum()) for label, name in enumerate(isic.CLASSES)},
        **with_intervals(compute, labels, seed),
        "melanoma_confusion": {
            point: metrics.binary_confusion(truth, probability >= threshold).tolist()
            for point, threshold in thresholds[isic.CLASSES[isic.MELANOMA]].items()
        },
        "class_confusion": metrics.class_confusion(labels, probabilities).tolist(),
    }


def subgroup(labels: np.ndarray, probabilities: np.ndarray, threshold: float, seed: int) -> dict[str, Any]:
    """Melanoma's figures in a part of a split."""
    truth, probability = labels == isic.MELANOMA, probabilities[:, isic.MELANOMA]

    def compute(rows: np.ndarray) -> dict[str, float | None]:
        decided = metrics.at_threshold(truth[rows], probability[rows] >= threshold)
        found = {name: decided[name] for name in ("sensitivity", "specificity")}
        return {"auc": metrics.auc(truth[rows], probability[rows])} | found

    return {"n": len(labels), "melanomas": int(truth.sum())} | with_intervals(compute, labels, seed)
