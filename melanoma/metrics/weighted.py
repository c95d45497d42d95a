"""Classification metrics under many sets of image weights at once, so that one pass computes many bootstrap draws.

Hand-written because scikit-learn takes one set of weights a call, which is more than ten times slower.

In all functions:
    truth: bool (N,), whether an image is of the class.
    score: float (N,), higher where the class is more probable; finite.
    weights: int (D, N), how many times each of N images counts in each of D draws. All ones: the data themselves.
Each metric is float64 (D,), NaN where it is 0/0.
"""

from collections.abc import Callable
from dataclasses import dataclass

from melanoma.classes import CLASSES, TASKS

import numpy as np

BINS = 10  # of probabilities, of equal width, for calibration

Metrics = dict[str, np.ndarray]  # by name, each float64 (D,)


def on_data(compute: Callable[[np.ndarray], Metrics], count: int) -> dict[str, float | None]:
    """Metrics of the data themselves, each image counted once.

    Args:
        compute: from weights to metrics.
        count: N, the number of images.

    Returns:
        The metrics; None where undefined (0/0).
    """
    return {name: or_none(value[0]) for name, value in compute(np.ones((1, count), int)).items()}


def or_none(value: float) -> float | None:
    """The value as a plain float; None for NaN."""
    return None if np.isnan(value) else float(value)


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part / whole` of equal shapes, NaN where `whole` is 0."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)


@dataclass(frozen=True)
class Ranking:
    """Counts at each distinct score of a positive as threshold, from the highest down: int (D, K) of K thresholds.

    From one threshold to the next only false positives are added, so these counts hold all of the ROC curve.
    """

    true_positives: np.ndarray
    false_positives: np.ndarray
    false_positives_above: np.ndarray  # of a score above the threshold: without ties
    positives: np.ndarray  # int (D, 1), in all
    negatives: np.ndarray  # int (D, 1), in all


def rank(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> Ranking:
    """Counts positives and negatives from the highest score down."""
    positives, negatives = np.flatnonzero(truth), np.flatnonzero(~truth)
    thresholds = np.unique(score[positives])[::-1]

    def cumulative(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ranked = rows[np.argsort(-score[rows])]
        counts = np.zeros((len(weights), len(rows) + 1), weights.dtype)
        np.cumsum(np.take(weights, ranked, axis=1), axis=1, dtype=counts.dtype, out=counts[:, 1:])
        return -score[ranked], counts

    positive_scores, true_positives = cumulative(positives)
    negative_scores, false_positives = cumulative(negatives)
    return Ranking(
        np.take(true_positives, np.searchsorted(positive_scores, -thresholds, "right"), axis=1),
        np.take(false_positives, np.searchsorted(negative_scores, -thresholds, "right"), axis=1),
        np.take(false_positives, np.searchsorted(negative_scores, -thresholds, "left"), axis=1),
        true_positives[:, -1:],
        false_positives[:, -1:],
    )


def roc_curve(ranking: Ranking) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the ROC curves, from (0, 0) to (1, 1); positives and negatives must be in every draw.

    Returns:
        False positive rates and sensitivities, each float64 (D, 2 K + 2), not decreasing along the last axis.
    """
    start = np.zeros_like(ranking.positives)
    steps = np.stack([ranking.false_positives_above, ranking.false_positives], axis=2).reshape(len(start), -1)
    false_positives = np.hstack([start, steps, ranking.negatives])
    true_positives = np.hstack([start, start, np.repeat(ranking.true_positives, 2, axis=1)])
    return false_positives / ranking.negatives, true_positives / ranking.positives


def auc(ranking: Ranking) -> np.ndarray:
    """Area under the ROC curve: the fraction of positive-negative pairs in the right order, ties counted half."""
    added = np.diff(ranking.true_positives, prepend=0).astype(float)
    wrong = (added * (ranking.false_positives + ranking.false_positives_above)).sum(axis=1) / 2
    pairs = (ranking.positives.astype(float) * ranking.negatives)[:, 0]
    return ratio(pairs - wrong, pairs)


def average_precision(ranking: Ranking) -> np.ndarray:
    """Mean over the positives of the precision at each one's score as threshold."""
    found = ranking.true_positives + ranking.false_positives
    precision = ranking.true_positives / np.maximum(found, 1)
    return ratio((np.diff(ranking.true_positives, prepend=0) * precision).sum(axis=1), ranking.positives[:, 0])


def calibration_bin(score: np.ndarray) -> np.ndarray:
    """Index of each score's bin, int (N,) in [0, BINS); scores in [0, 1]."""
    return np.minimum((score * BINS).astype(int), BINS - 1)


def calibration_error(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Expected calibration error: mean over images of their bin's |mean probability - observed frequency|.

    Source: Guo et al. 2017, arXiv 1706.04599.
    """
    excess = np.zeros((len(score), BINS))
    excess[np.arange(len(score)), calibration_bin(score)] = score - truth.astype(float)  # float64, whatever score is
    return ratio(np.abs(weights.astype(float) @ excess).sum(axis=1), weights.sum(axis=1))


def threshold_metrics(truth: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> Metrics:
    """Metrics of a decision for or against one class; see `classification.threshold_metrics`.

    Args:
        truth: see the module.
        positive: bool (N,), whether the image is predicted to be of the class.
        weights: see the module.
    """
    cells = np.eye(4)[2 * truth + positive]
    true_negatives, false_positives, false_negatives, true_positives = (weights.astype(float) @ cells).T
    wrong = false_positives + false_negatives
    of_class, of_rest = true_positives + false_negatives, true_negatives + false_positives
    f1 = ratio(2 * true_positives, 2 * true_positives + wrong)
    rest_f1 = ratio(2 * true_negatives, 2 * true_negatives + wrong)
    return {
        "sensitivity": ratio(true_positives, of_class),
        "specificity": ratio(true_negatives, of_rest),
        "precision": ratio(true_positives, true_positives + false_positives),
        "f1": f1,
        "weighted f1": ratio(np.nan_to_num(f1) * of_class + np.nan_to_num(rest_f1) * of_rest, of_class + of_rest),
        "accuracy": ratio(true_positives + true_negatives, of_class + of_rest),
    }


def binary_metrics(truth: np.ndarray, score: np.ndarray, threshold: float, weights: np.ndarray) -> Metrics:
    """auc, sensitivity and specificity of one class; positive is a score of the threshold or above."""
    decision = threshold_metrics(truth, score >= threshold, weights)
    return {"auc": auc(rank(truth, score, weights))} | {name: decision[name] for name in ("sensitivity", "specificity")}


def rank_tasks(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> dict[int, Ranking]:
    """Counts by score of each of TASKS: the class against the rest."""
    return {index: rank(labels == index, probabilities[:, index], weights) for index in TASKS}


def aucs(rankings: dict[int, Ranking]) -> Metrics:
    """AUC of each of TASKS and their mean."""
    found = {f"{CLASSES[index]} auc": auc(ranking) for index, ranking in rankings.items()}
    return found | {"mean auc": np.mean(list(found.values()), axis=0)}


def task_aucs(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> Metrics:
    """AUC of each of TASKS and their mean; see `classification.task_aucs`."""
    return aucs(rank_tasks(labels, probabilities, weights))


def balanced_accuracy(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean over the classes that occur of the fraction of their images whose predicted class is right."""
    of_class = np.eye(len(CLASSES))[labels.astype(int)]
    correct = (probabilities.argmax(axis=1) == labels)[:, None]
    counts = weights.astype(float)
    return np.nanmean(ratio(counts @ (of_class * correct), counts @ of_class), axis=1)


def all_metrics(
    labels: np.ndarray, probabilities: np.ndarray, thresholds: dict[str, dict[str, float]], weights: np.ndarray
) -> Metrics:
    """All metrics of a split; see `classification.all_metrics`."""
    rankings = rank_tasks(labels, probabilities, weights)
    found = aucs(rankings)
    for index in TASKS:
        name, truth, score = CLASSES[index], labels == index, probabilities[:, index]
        found[f"{name} average precision"] = average_precision(rankings[index])
        found[f"{name} calibration error"] = calibration_error(truth, score, weights)
        for point, threshold in thresholds[name].items():
            decision = threshold_metrics(truth, score >= threshold, weights)
            found |= {f"{name} {metric} at {point}": value for metric, value in decision.items()}
    return found | {"balanced accuracy": balanced_accuracy(labels, probabilities, weights)}
