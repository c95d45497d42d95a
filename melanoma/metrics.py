"""The challenge's figures and the field's: of lesion masks, and of probabilities against diagnoses."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from melanoma.isic import CLASSES, RANKED

import numpy as np
from scipy import stats
from sklearn import metrics as sklearn_metrics

JACCARD_THRESHOLD = 0.65  # of the challenge from 2018 on: a mask below it counts as failed, with 0
SENSITIVITY = 0.9  # of the operating point that misses few melanomas
YOUDEN, SENSITIVE = "Youden", f"{SENSITIVITY:.0%} sensitivity".replace("%", " %")  # names of the operating points
BINS = 10  # of probabilities, of equal width, for calibration
DRAWS = 2000  # of a bootstrap


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


def sensitive_threshold(truth: np.ndarray, score: np.ndarray) -> float:
    """The highest threshold with a sensitivity of SENSITIVITY or more; arguments as of `youden_threshold`."""
    positive = np.sort(score[truth.astype(bool)])
    return float(positive[len(positive) - int(np.ceil(SENSITIVITY * len(positive)))])


def operating_points(truth: np.ndarray, score: np.ndarray) -> dict[str, float]:
    """Thresholds by the name of the operating point; arguments as of `youden_threshold`."""
    return {YOUDEN: youden_threshold(truth, score), SENSITIVE: sensitive_threshold(truth, score)}


def roc_curve(truth: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rates of false and of true positives over all thresholds, each float64 in [0, 1]; both sides must occur."""
    return sklearn_metrics.roc_curve(truth, score)[:2]


def sensitivity_at(truth: np.ndarray, score: np.ndarray, false: np.ndarray) -> np.ndarray:
    """The sensitivity of `roc_curve` at given rates of false positives, the highest where it rises there."""
    order = np.argsort(-score)
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)  # of each run of equal scores
    hits = np.append(0, np.cumsum(truth[order])[last])
    alarms = np.append(0, last + 1) - hits
    return np.interp(false, alarms / alarms[-1], hits / hits[-1])


def roc_band(truth: np.ndarray, score: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """95 % bootstrap band of a ROC curve, at each rate of false positives by itself.

    Returns:
        Rates of false positives, and 2.5th and 97.5th percentile of the sensitivity there: each float64 (101,).
    """
    grid = np.linspace(0, 1, 101)
    drawn = [sensitivity_at(truth[rows], score[rows], grid) for rows in resamples(truth, seed)]
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return grid, low, high


def precision_recall_curve(truth: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision over all thresholds, each float64 in [0, 1]; the class must occur."""
    precision, recall, _ = sklearn_metrics.precision_recall_curve(truth, score)
    return recall, precision


def calibration(truth: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What probabilities promise and what comes true, in BINS of equal width; empty ones are left out.

    Args:
        truth: bool (N,).
        score: float (N,), in [0, 1].

    Returns:
        Mean probability, share of the class, and number of images of each bin.
    """
    place = np.minimum((score * BINS).astype(int), BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    some = counts > 0
    promised = np.bincount(place, score, BINS)[some] / counts[some]
    return promised, np.bincount(place, truth, BINS)[some] / counts[some], counts[some]


def calibration_error(truth: np.ndarray, score: np.ndarray) -> float:
    """Expected calibration error: mean over images of their bin's |mean probability - share of the class|.

    Source: Guo et al. 2017, arXiv 1706.04599.
    """
    promised, found, counts = calibration(truth, score)
    return float(np.abs(promised - found) @ counts / counts.sum())


def auc(truth: np.ndarray, score: np.ndarray) -> float | None:
    """Area under the ROC curve: the share of pairs that are in order, half for ties; None where a side is absent."""
    positives = int(truth.sum())
    pairs = positives * (len(truth) - positives)
    return ratio(stats.rankdata(score)[truth].sum() - positives * (positives + 1) / 2, pairs)


def average_precision(truth: np.ndarray, score: np.ndarray) -> float | None:
    """Mean of precision over the positives, at the threshold that reaches each; None where there is none."""
    order = np.argsort(-score)
    hits = np.cumsum(truth[order])
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)  # of each run of equal scores
    return ratio((np.diff(hits[last], prepend=0) * hits[last] / (last + 1)).sum(), hits[-1])


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


def at_threshold(truth: np.ndarray, positive: np.ndarray) -> dict[str, float | None]:
    """Figures of a decision for or against one class.

    Args:
        truth: bool (N,), whether an image is of the class.
        positive: bool (N,), whether it is taken for one.

    Returns:
        sensitivity, specificity, precision, f1 (of the class), weighted f1 (the mean of both sides' F1, weighted by
        their numbers of images: the "F1" of 2018), accuracy; in [0, 1], None where undefined.
    """
    (right_rest, false), (missed, hit) = binary_confusion(truth, positive)
    f1, rest_f1 = ratio(2 * hit, 2 * hit + missed + false), ratio(2 * right_rest, 2 * right_rest + missed + false)
    return {
        "sensitivity": ratio(hit, hit + missed),
        "specificity": ratio(right_rest, right_rest + false),
        "precision": ratio(hit, hit + false),
        "f1": f1,
        "weighted f1": ((f1 or 0) * (hit + missed) + (rest_f1 or 0) * (right_rest + false)) / len(truth),
        "accuracy": (hit + right_rest) / len(truth),
    }


def areas(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
    """The challenge's scores: AUC of each class of RANKED against the rest, and their mean; None where undefined."""
    found = {f"{CLASSES[index]} auc": auc(labels == index, probabilities[:, index]) for index in RANKED}
    known = [value for value in found.values() if value is not None]
    return found | {"mean auc": float(np.mean(known)) if len(known) == len(RANKED) else None}


def figures(
    labels: np.ndarray, probabilities: np.ndarray, thresholds: dict[str, dict[str, float]]
) -> dict[str, float | None]:
    """All figures of a split.

    Args:
        labels: int (N,), index into CLASSES.
        probabilities: float (N, 3).
        thresholds: by class and operating point, for the classes of RANKED; positive is a probability of it or above.
            Choose them on other images.

    Returns:
        {"melanoma auc": ..., "mean auc": ..., "melanoma sensitivity at Youden": ...}: `areas`; of each class of RANKED
        average precision, calibration error, and at each operating point `at_threshold`; and "balanced accuracy", the
        mean over the classes that occur of the share whose likeliest class is right.
    """
    found = areas(labels, probabilities)
    for index in RANKED:
        name, truth, score = CLASSES[index], labels == index, probabilities[:, index]
        found[f"{name} average precision"] = average_precision(truth, score)
        found[f"{name} calibration error"] = calibration_error(truth, score)
        for point, threshold in thresholds[name].items():
            values = at_threshold(truth, score >= threshold)
            found |= {f"{name} {figure} at {point}": value for figure, value in values.items()}
    matrix = class_confusion(labels, probabilities)
    totals = matrix.sum(axis=1)
    recalls = np.diag(matrix)[totals > 0] / totals[totals > 0]
    return found | {"balanced accuracy": float(recalls.mean())}


def resamples(groups: np.ndarray, seed: int, draws: int = DRAWS) -> Iterator[np.ndarray]:
    """Rows drawn with replacement, int (N,), `draws` times.

    Args:
        groups: (N,), drawn within equal values so that their numbers stay: the classes.
        seed: of the draws.
        draws: how many.
    """
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    for _ in range(draws):
        yield np.concatenate([rng.choice(rows, len(rows)) for rows in members])


def intervals(
    compute: Callable[[np.ndarray], dict[str, float | None]], groups: np.ndarray, seed: int, draws: int = DRAWS
) -> dict[str, tuple[float, float] | None]:
    """95 % bootstrap intervals of figures over images.

    Args:
        compute: from drawn rows, int (N,), to figures by name.
        groups: see `resamples`, as are seed and draws.
        seed: see there.
        draws: see there.

    Returns:
        2.5th and 97.5th percentile of each figure; None where it is undefined on the images themselves.
    """
    drawn = [compute(rows) for rows in resamples(groups, seed, draws)]
    bounds: dict[str, tuple[float, float] | None] = {}
    for name, value in compute(np.arange(len(groups))).items():
        values = [float(figure) for one in drawn if (figure := one[name]) is not None]
        bounds[name] = None if value is None else tuple(np.percentile(values, [2.5, 97.5]).tolist())
    return bounds


@dataclass(frozen=True)
class Difference:
    """How far a second system's figure is above a first one's on the same images."""

    first: float
    second: float
    difference: float
    interval: tuple[float, float]  # 95 %, of the difference
    p_value: float  # two-sided, of no difference


def compare(
    labels: np.ndarray, first: np.ndarray, second: np.ndarray, seed: int, draws: int = DRAWS
) -> dict[str, Difference]:
    """Paired bootstrap of two systems' `areas`: both are judged on the same draws of images.

    Args:
        labels: int (N,).
        first: float (N, 3), the probabilities of one system.
        second: those of the other.
        seed: of the draws.
        draws: how many.

    Returns:
        A difference for each figure that is defined. The p-value is twice the smaller share of draws on either side of
        0, one draw added to each; so it is not below 2 / (draws + 1).

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 13 and 15.
    """
    names = [name for name, value in areas(labels, first).items() if value is not None]

    def values(probabilities: np.ndarray, rows: np.ndarray) -> np.ndarray:
        found = areas(labels[rows], probabilities[rows])
        return np.array([found[name] for name in names], float)

    everyone = np.arange(len(labels))
    drawn = [values(second, rows) - values(first, rows) for rows in resamples(labels, seed, draws)]
    found = {}
    for name, one, other, column in zip(
        names, values(first, everyone), values(second, everyone), np.transpose(drawn), strict=True
    ):
        tail = min((column <= 0).sum(), (column >= 0).sum())
        low, high = np.percentile(column, [2.5, 97.5]).tolist()
        p_value = min(1.0, 2 * float(tail + 1) / (draws + 1))
        found[name] = Difference(float(one), float(other), float(other - one), (low, high), p_value)
    return found
