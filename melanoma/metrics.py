"""The challenge's figures and the field's: of lesion masks, and of probabilities against diagnoses."""

from collections.abc import Callable

from melanoma.isic import CLASSES, KERATOSIS, MELANOMA

import numpy as np
from sklearn import metrics as sklearn_metrics

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

    def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.divide(part, whole, out=np.ones(len(part)), where=whole > 0)

    jaccard = share(hit, hit + missed + false)
    return {
        "jaccard": jaccard,
        "dice": share(2 * hit, 2 * hit + missed + false),
        "threshold_jaccard": np.where(jaccard < JACCARD_THRESHOLD, 0.0, jaccard),
        "pixel_accuracy": (hit + right_outside) / inside.shape[1],
        "sensitivity": share(hit, hit + missed),
        "specificity": share(right_outside, right_outside + false),
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


def roc_curve(truth: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rates of false and of true positives over all thresholds, each float64 in [0, 1]; both sides must occur."""
    return sklearn_metrics.roc_curve(truth, score)[:2]


def binary_confusion(truth: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Counts, int (2, 2): rows truth (rest, class), columns prediction (rest, class).

    Args:
        truth: bool (N,), whether an image is of the class.
        positive: bool (N,), whether it is taken for one.
    """
    return np.bincount(2 * truth.astype(int) + positive, minlength=4).reshape(2, 2)


def class_confusion(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Counts, int (3, 3): rows truth, columns the likeliest class."""
    count = len(CLASSES)
    return np.bincount(count * labels.astype(int) + probabilities.argmax(axis=1), minlength=count**2).reshape(count, -1)


def ratio(part: float, whole: float) -> float | None:
    """A fraction; None, "undefined", where it is of nothing."""
    return float(part / whole) if whole else None


def against_rest(truth: np.ndarray, score: np.ndarray, threshold: float) -> dict[str, float | None]:
    """Figures of one class against the rest.

    Args:
        truth: bool (N,), whether an image is of the class.
        score: float (N,), its probability.
        threshold: positive is a score of it or above; choose it on other images.

    Returns:
        auc, average_precision, sensitivity, specificity, precision, f1 (of the class), weighted_f1 (the mean of both
        sides' F1, weighted by their numbers of images: the "F1" of 2018), accuracy; in [0, 1], None where undefined.
    """
    both = 0 < truth.sum() < len(truth)
    (right_rest, false), (missed, hit) = binary_confusion(truth, score >= threshold)
    f1, rest_f1 = ratio(2 * hit, 2 * hit + missed + false), ratio(2 * right_rest, 2 * right_rest + missed + false)
    return {
        "auc": float(sklearn_metrics.roc_auc_score(truth, score)) if both else None,
        "average_precision": float(sklearn_metrics.average_precision_score(truth, score)) if both else None,
        "sensitivity": ratio(hit, hit + missed),
        "specificity": ratio(right_rest, right_rest + false),
        "precision": ratio(hit, hit + false),
        "f1": f1,
        "weighted_f1": ((f1 or 0) * (hit + missed) + (rest_f1 or 0) * (right_rest + false)) / len(truth),
        "accuracy": (hit + right_rest) / len(truth),
    }


def figures(labels: np.ndarray, probabilities: np.ndarray, thresholds: dict[str, float]) -> dict[str, float | None]:
    """All figures of a split.

    Args:
        labels: int (N,), index into CLASSES.
        probabilities: float (N, 3).
        thresholds: by class name, for melanoma and seborrheic keratosis.

    Returns:
        {"melanoma auc": ..., "seborrheic keratosis auc": ..., ...} as in `against_rest`, and "balanced accuracy", the
        mean over the classes that occur of the share whose likeliest class is right.
    """
    found: dict[str, float | None] = {}
    for index in (MELANOMA, KERATOSIS):
        name = CLASSES[index]
        values = against_rest(labels == index, probabilities[:, index], thresholds[name])
        found |= {f"{name} {figure.replace('_', ' ')}": value for figure, value in values.items()}
    matrix = class_confusion(labels, probabilities)
    totals = matrix.sum(axis=1)
    recalls = np.diag(matrix)[totals > 0] / totals[totals > 0]
    return found | {"balanced accuracy": float(recalls.mean())}


def intervals(
    compute: Callable[[np.ndarray], dict[str, float | None]], groups: np.ndarray, seed: int, draws: int = 1000
) -> dict[str, tuple[float, float] | None]:
    """95 % bootstrap intervals of figures over images.

    Args:
        compute: from drawn rows, int (N,), to figures by name.
        groups: (N,), drawn within equal values so that their numbers stay: the classes.
        seed: of the draws.
        draws: how many.

    Returns:
        2.5th and 97.5th percentile of each figure; None where it is undefined on the images themselves.
    """
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    drawn = [compute(np.concatenate([rng.choice(rows, len(rows)) for rows in members])) for _ in range(draws)]
    bounds: dict[str, tuple[float, float] | None] = {}
    for name, value in compute(np.arange(len(groups))).items():
        values = [float(figure) for one in drawn if (figure := one[name]) is not None]
        bounds[name] = None if value is None else tuple(np.percentile(values, [2.5, 97.5]).tolist())
    return bounds
