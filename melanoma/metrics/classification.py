"""Metrics of probabilities against labels: curves, operating points, every metric of a split.

The metrics themselves are computed in `weighted`, here with each image counted once.
"""

from functools import partial

from melanoma.classes import CLASSES
from melanoma.metrics import weighted

import numpy as np
from sklearn import metrics as sklearn_metrics

TARGET_SENSITIVITY = 0.9  # of the operating point that misses few melanomas
DEFAULT_THRESHOLD = 0.5  # the challenge's
YOUDEN, HIGH_SENSITIVITY = "Youden", f"{100 * TARGET_SENSITIVITY:.0f} % sensitivity"  # names of the operating points


def youden_threshold(truth: np.ndarray, score: np.ndarray) -> float:
    """The threshold with the highest sensitivity + specificity - 1; positive is a score of it or above.

    Args:
        truth: bool or {0, 1} (N,), with both values present.
        score: float (N,).

    Returns:
        One of the scores; of equally good ones the highest.

    Source: Youden 1950, doi 10.1002/1097-0142(1950)3:1<32::AID-CNCR2820030106>3.0.CO;2-3.
    """
    false_positive_rate, true_positive_rate, thresholds = sklearn_metrics.roc_curve(truth, score)
    return float(thresholds[1:][np.argmax((true_positive_rate - false_positive_rate)[1:])])


def high_sensitivity_threshold(truth: np.ndarray, score: np.ndarray) -> float:
    """The highest threshold with a sensitivity of TARGET_SENSITIVITY or more.

    Args:
        truth: bool or {0, 1} (N,), with a positive.
        score: float (N,).

    Returns:
        One of the scores of the positives.
    """
    positive = np.sort(score[truth.astype(bool)])
    return float(positive[len(positive) - int(np.ceil(TARGET_SENSITIVITY * len(positive)))])


def operating_points(truth: np.ndarray, score: np.ndarray) -> dict[str, float]:
    """Thresholds by the name of the operating point; arguments as of `youden_threshold`."""
    return {YOUDEN: youden_threshold(truth, score), HIGH_SENSITIVITY: high_sensitivity_threshold(truth, score)}


def default_points() -> dict[str, float]:
    """The operating point without labels to choose a better one."""
    return {str(DEFAULT_THRESHOLD): DEFAULT_THRESHOLD}


def roc_curve(truth: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates over all thresholds, each float64 in [0, 1].

    Args:
        truth: bool or {0, 1} (N,), with both values present.
        score: float (N,).
    """
    false_positive_rate, true_positive_rate, _ = sklearn_metrics.roc_curve(truth, score)
    return false_positive_rate, true_positive_rate


def precision_recall_curve(truth: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision over all thresholds, each float64 in [0, 1].

    Args:
        truth: bool or {0, 1} (N,), with a positive.
        score: float (N,).
    """
    precision, recall, _ = sklearn_metrics.precision_recall_curve(truth, score)
    return recall, precision


def calibration_bins(truth: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted probability and observed frequency in bins of equal width; empty bins are left out.

    Hand-written because scikit-learn's `calibration_curve` returns no numbers of images.

    Args:
        truth: bool (N,).
        score: float (N,), in [0, 1].

    Returns:
        Mean probability (float64), observed frequency of the class (float64) and number of images (int) of each bin.
    """
    place = weighted.calibration_bin(score)
    counts = np.bincount(place, minlength=weighted.BINS)
    filled = counts > 0
    probability, frequency = (np.bincount(place, values, weighted.BINS)[filled] for values in (score, truth))
    return probability / counts[filled], frequency / counts[filled], counts[filled]


def calibration_error(truth: np.ndarray, score: np.ndarray) -> float:
    """Expected calibration error: mean over images of their bin's |mean probability - observed frequency|.

    Args:
        truth: bool (N,), N > 0.
        score: float (N,), in [0, 1].

    Source: Guo et al. 2017, arXiv 1706.04599.
    """
    return float(weighted.calibration_error(truth, score, np.ones((1, len(truth)), int))[0])


def auc(truth: np.ndarray, score: np.ndarray) -> float | None:
    """Area under the ROC curve: the fraction of positive-negative pairs in the right order, ties counted half.

    Args:
        truth: bool (N,).
        score: float (N,).

    Returns:
        Fraction in [0, 1]; None if there is no positive or no negative.
    """
    ranking = weighted.rank(truth, score, np.ones((1, len(truth)), int))
    return weighted.or_none(weighted.auc(ranking)[0])


def average_precision(truth: np.ndarray, score: np.ndarray) -> float | None:
    """Mean over the positives of the precision at each one's score as threshold.

    Args:
        truth: bool (N,).
        score: float (N,).

    Returns:
        Fraction in [0, 1]; None if there is no positive.
    """
    ranking = weighted.rank(truth, score, np.ones((1, len(truth)), int))
    return weighted.or_none(weighted.average_precision(ranking)[0])


def binary_confusion(truth: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Counts, int (2, 2): rows truth (rest, class), columns prediction (rest, class).

    Args:
        truth: bool (N,), whether an image is of the class.
        positive: bool (N,), whether it is predicted to be.
    """
    return sklearn_metrics.confusion_matrix(truth.astype(int), positive.astype(int), labels=[0, 1])


def class_confusion(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Counts, int (3, 3): rows truth, columns the predicted class.

    Args:
        labels: int (N,), index into CLASSES.
        probabilities: float (N, 3).
    """
    return sklearn_metrics.confusion_matrix(labels, probabilities.argmax(axis=1), labels=range(len(CLASSES)))


def threshold_metrics(truth: np.ndarray, positive: np.ndarray) -> dict[str, float | None]:
    """Metrics of a decision for or against one class.

    Args:
        truth: bool (N,), whether an image is of the class.
        positive: bool (N,), whether it is predicted to be.

    Returns:
        sensitivity, specificity, precision, f1 (of the class), weighted f1 (the mean of both sides' F1, weighted by
        their numbers of images: the "F1" of 2018), accuracy; in [0, 1], None where undefined (0/0).
    """
    return weighted.on_data(partial(weighted.threshold_metrics, truth, positive), len(truth))


def task_aucs(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
    """The challenge's scores: AUC of each of TASKS against the rest, and their mean.

    Args:
        labels: int (N,), index into CLASSES.
        probabilities: float (N, 3).

    Returns:
        {"melanoma auc": ..., "seborrheic keratosis auc": ..., "mean auc": ...}, each in [0, 1]; None where undefined.
    """
    return weighted.on_data(partial(weighted.task_aucs, labels, probabilities), len(labels))


def all_metrics(
    labels: np.ndarray, probabilities: np.ndarray, thresholds: dict[str, dict[str, float]]
) -> dict[str, float | None]:
    """All metrics of a split.

    Args:
        labels: int (N,), index into CLASSES; N > 0.
        probabilities: float (N, 3).
        thresholds: by class and operating point, for the classes of TASKS; positive is a probability of it or above.
            Choose them on other images.

    Returns:
        {"melanoma auc": ..., "mean auc": ..., "melanoma sensitivity at Youden": ...}: `task_aucs`; of each class of
        TASKS "average precision", "calibration error", and `threshold_metrics` at each operating point; and "balanced
        accuracy", the mean over the classes that occur of the fraction of their images whose predicted class is right.
        Each in [0, 1]; None where undefined (0/0).
    """
    return weighted.on_data(partial(weighted.all_metrics, labels, probabilities, thresholds), len(labels))
