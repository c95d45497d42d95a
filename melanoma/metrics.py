"""The challenge's figures and the field's: of lesion masks, and of probabilities against diagnoses."""

from typing import Any

import numpy as np
from sklearn import metrics as sklearn_metrics

from melanoma.isic import CLASSES, KERATOSIS, MELANOMA

JACCARD_THRESHOLD = 0.65  # of the challenge from 2018 on: a mask below it counts as failed, with 0


def per_image(truth: np.ndarray, predicted: np.ndarray) -> dict[str, np.ndarray]:
    """Figures of each predicted lesion mask.

    Args:
        truth: uint8 (N, H, W, 1), 1 inside the lesion, 0 outside.
        predicted: same shape and meaning.

    Returns:
        jaccard, dice, threshold_jaccard, pixel_accuracy, sensitivity, specificity: each float64 (N,) in [0, 1]. A ratio
        of nothing to nothing (two empty masks, say) is 1.

    Raises:
        ValueError: shapes differ, N is 0, or a value is not 0 or 1.

    Source: Codella et al. 2018, arXiv 1710.05006, part 1; threshold Jaccard: Codella et al. 2019, arXiv 1902.03368.
    """
    if truth.shape != predicted.shape or not len(truth):
        raise ValueError(f"masks of shape {truth.shape} and {predicted.shape}; expected equal shapes and an image")
    if max(truth.max(), predicted.max()) > 1:
        raise ValueError("masks must hold only 0 and 1")
    inside, found = (array.reshape(len(array), -1).astype(bool) for array in (truth, predicted))
    hit = (inside & found).sum(axis=1)
    missed = (inside & ~found).sum(axis=1)
    false = (~inside & found).sum(axis=1)
    right_outside = inside.shape[1] - hit - missed - false

    def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.divide(part, whole, out=np.ones(len(part)), where=whole > 0)

    jaccard = ratio(hit, hit + missed + false)
    return {
        "jaccard": jaccard,
        "dice": ratio(2 * hit, 2 * hit + missed + false),
        "threshold_jaccard": np.where(jaccard < JACCARD_THRESHOLD, 0.0, jaccard),
        "pixel_accuracy": (hit + right_outside) / inside.shape[1],
        "sensitivity": ratio(hit, hit + missed),
        "specificity": ratio(right_outside, right_outside + false),
    }


def youden_threshold(truth: np.ndarray, score: np.ndarray) -> float:
    """The threshold with the highest sensitivity + specificity - 1; positive is a score of it or above.

    Args:
        truth: bool or {0, 1} (N,), with both values present.
        score: float (N,).

    Source: Youden 1950, doi 10.1002/1097-0142(1950)3:1<32::AID-CNCR2820030106>3.0.CO;2-3.
    """
    false_positive_rate, true_positive_rate, thresholds = sklearn_metrics.roc_curve(truth, score)
    return float(thresholds[1:][np.argmax((true_positive_rate - false_positive_rate)[1:])])


def ranking(truth: np.ndarray, score: np.ndarray) -> dict[str, Any]:
    """Figures of one class against the rest that need no threshold, and the ROC curve.

    Args:
        truth: bool (N,), whether an image is of the class.
        score: float (N,), its probability.

    Returns:
        n, positives, auc, average_precision, false_positive_rate, true_positive_rate; auc and average_precision are None
        ("undefined") and the rates empty where only one of the two sides occurs.
    """
    counts = {"n": len(truth), "positives": int(truth.sum())}
    if not 0 < counts["positives"] < counts["n"]:
        empty: dict[str, Any] = {"false_positive_rate": [], "true_positive_rate": []}
        return counts | {"auc": None, "average_precision": None} | empty
    false_positive_rate, true_positive_rate, _ = sklearn_metrics.roc_curve(truth, score)
    return counts | {
        "auc": float(sklearn_metrics.roc_auc_score(truth, score)),
        "average_precision": float(sklearn_metrics.average_precision_score(truth, score)),
        "false_positive_rate": false_positive_rate.tolist(),
        "true_positive_rate": true_positive_rate.tolist(),
    }


def decisions(truth: np.ndarray, score: np.ndarray, threshold: float) -> dict[str, Any]:
    """Figures of one class against the rest at a threshold.

    Args:
        truth: bool (N,).
        score: float (N,); positive is a score of the threshold or above.
        threshold: from validation.

    Returns:
        confusion, int (2, 2) as lists, rows truth (rest, class), columns prediction; sensitivity, specificity,
        precision, f1 (of the class), weighted_f1 (mean of both sides' F1, weighted by their counts, the figure of 2018),
        accuracy: in [0, 1], None where the ratio is of nothing.
    """
    matrix = sklearn_metrics.confusion_matrix(truth, score >= threshold, labels=[False, True])
    (right_rest, false), (missed, hit) = matrix.tolist()

    def ratio(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    return {
        "threshold": threshold,
        "confusion": matrix.tolist(),
        "sensitivity": ratio(hit, hit + missed),
        "specificity": ratio(right_rest, right_rest + false),
        "precision": ratio(hit, hit + false),
        "f1": ratio(2 * hit, 2 * hit + missed + false),
        "weighted_f1": float(
            sklearn_metrics.f1_score(truth, score >= threshold, average="weighted", zero_division=0.0)
        ),
        "accuracy": (hit + right_rest) / len(truth),
    }


def evaluate(labels: np.ndarray, probabilities: np.ndarray, thresholds: dict[str, float]) -> dict[str, Any]:
    """All figures of one split.

    Args:
        labels: int (N,), index into CLASSES.
        probabilities: float (N, 3).
        thresholds: by class name, for melanoma and seborrheic keratosis.

    Returns:
        {class name: `ranking` and `decisions` against the rest}, confusion (3, 3) of the likeliest class, and
        balanced_accuracy, the mean over the classes that occur of their sensitivity.
    """
    against_rest = {}
    for index in (MELANOMA, KERATOSIS):
        truth, score = labels == index, probabilities[:, index]
        against_rest[CLASSES[index]] = ranking(truth, score) | decisions(truth, score, thresholds[CLASSES[index]])
    matrix = sklearn_metrics.confusion_matrix(labels, probabilities.argmax(axis=1), labels=range(len(CLASSES)))
    totals = matrix.sum(axis=1)
    recalls = np.diag(matrix)[totals > 0] / totals[totals > 0]
    return against_rest | {"confusion": matrix.tolist(), "balanced_accuracy": float(recalls.mean())}


def interval(
    figure: Any, labels: np.ndarray, values: np.ndarray, seed: int, draws: int = 1000
) -> tuple[float, float] | None:
    """A 95 % bootstrap interval, drawn within each class so that their numbers stay.

    Args:
        figure: function of (labels, values) giving a number or None.
        labels: (N,).
        values: (N, ...), drawn together with the labels.
        seed: of the draws.
        draws: how many.

    Returns:
        2.5th and 97.5th percentile; None where the figure is undefined.
    """
    if figure(labels, values) is None:
        return None
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    drawn = []
    for _ in range(draws):
        rows = np.concatenate([rng.choice(group, len(group)) for group in groups])
        drawn.append(figure(labels[rows], values[rows]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
