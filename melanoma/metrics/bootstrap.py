"""95 % bootstrap intervals: images resampled with replacement, within each class, so that its number stays.

Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile intervals).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from melanoma.metrics import weighted

import numpy as np

DRAWS = 2000  # sets of resampled images; read at each call
BLOCK = 2**16  # image counts held at a time, so that they stay in the processor's cache whatever the number of images
BOUNDS = (2.5, 97.5)  # percentiles of a 95 % interval

Compute = Callable[[np.ndarray], dict[str, np.ndarray]]  # from weights (D, N) to metrics (D,), NaN where undefined
Intervals = dict[str, tuple[float, float] | None]  # by metric: 2.5th and 97.5th percentile; None where undefined


def resample_counts(groups: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """How many times each image is in each of DRAWS resampled sets of N images.

    Args:
        groups: (N,); images are resampled within equal values, so that their numbers stay: the classes.
        seed: seed of the random numbers.

    Yields:
        Blocks of D draws, DRAWS in all: int32 (D, N), each row with the sum N.
    """
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    size = max(1, BLOCK // len(groups))
    for start in range(0, DRAWS, size):
        counts = np.zeros((min(size, DRAWS - start), len(groups)), np.int32)
        for draw in counts:
            for rows in members:
                draw[rows] = np.bincount(rng.integers(len(rows), size=len(rows)), minlength=len(rows))
        yield counts


def resampled(compute: Compute, groups: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Each metric of each draw, float64 (DRAWS,); arguments as of `intervals`."""
    blocks = [compute(weights) for weights in resample_counts(groups, seed)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def intervals(compute: Compute, groups: np.ndarray, seed: int) -> Intervals:
    """95 % intervals of metrics of resampled images.

    Args:
        compute: from weights, int (D, N), to metrics by name, each float64 (D,), NaN where undefined: see `weighted`.
        groups: (N,), see `resample_counts`; N > 0.
        seed: seed of the random numbers.

    Returns:
        Percentiles over the draws in which a metric is defined; None if it is undefined on the data themselves or in
        every draw.
    """
    on_data, draws = weighted.on_data(compute, len(groups)), resampled(compute, groups, seed)
    bounds: Intervals = {}
    for name, values in draws.items():
        defined = values[~np.isnan(values)]
        bounds[name] = percentiles(defined) if len(defined) and on_data[name] is not None else None
    return bounds


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """2.5th and 97.5th percentile."""
    low, high = np.percentile(values, BOUNDS)
    return float(low), float(high)


def classification_intervals(
    labels: np.ndarray, probabilities: np.ndarray, thresholds: dict[str, dict[str, float]], seed: int
) -> Intervals:
    """Intervals of `classification.all_metrics`, whose arguments these are; images resampled within the classes."""
    return intervals(partial(weighted.all_metrics, labels, probabilities, thresholds), labels, seed)


def auc_intervals(labels: np.ndarray, probabilities: np.ndarray, seed: int) -> Intervals:
    """Intervals of `classification.task_aucs`, whose arguments these are; images resampled within the classes."""
    return intervals(partial(weighted.task_aucs, labels, probabilities), labels, seed)


def binary_intervals(
    labels: np.ndarray, index: int, score: np.ndarray, threshold: float, seed: int
) -> tuple[dict[str, float | None], Intervals]:
    """Metrics of one class against the rest, with intervals.

    Args:
        labels: int (N,), index into CLASSES; images are resampled within all the classes. N > 0.
        index: index of the class.
        score: float (N,), probability of the class.
        threshold: positive is a score of it or above.
        seed: seed of the random numbers.

    Returns:
        auc, sensitivity and specificity, None where undefined, and their intervals.
    """
    compute = partial(weighted.binary_metrics, labels == index, score, threshold)
    return weighted.on_data(compute, len(labels)), intervals(compute, labels, seed)


def mean_intervals(values: dict[str, np.ndarray], seed: int) -> Intervals:
    """Intervals of means over images.

    Args:
        values: by metric, float (N,) of the same N > 0 images, such as of `segmentation.per_image`.
        seed: seed of the random numbers.
    """
    columns = np.stack(list(values.values()), axis=1)

    def means(weights: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(values, (weights.astype(float) @ columns).T / len(columns), strict=True))

    return intervals(means, np.zeros(len(columns)), seed)


def roc_band(truth: np.ndarray, score: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pointwise 95 % band of a ROC curve: of the sensitivity at each false positive rate.

    Args:
        truth: bool (N,), with both values present; images are resampled within each.
        score: float (N,).
        seed: seed of the random numbers.

    Returns:
        False positive rates 0, 0.01 ... 1, and 2.5th and 97.5th percentile of the sensitivity there, the highest where
        a curve rises vertically: each float64 (101,).
    """
    rates = np.linspace(0, 1, 101)
    curves: list[np.ndarray] = []
    for weights in resample_counts(truth, seed):
        false_positive_rates, sensitivities = weighted.roc_curve(weighted.rank(truth, score, weights))
        curves += [np.interp(rates, *curve) for curve in zip(false_positive_rates, sensitivities, strict=True)]
    low, high = np.percentile(curves, BOUNDS, axis=0)
    return rates, low, high


@dataclass(frozen=True)
class Difference:
    """One metric of two systems on the same images."""

    first: float
    second: float
    difference: float  # second - first
    interval: tuple[float, float]  # 95 %, of the difference
    p_value: float  # two-sided, of no difference


def paired_differences(labels: np.ndarray, first: np.ndarray, second: np.ndarray, seed: int) -> dict[str, Difference]:
    """Paired bootstrap of two systems' `classification.task_aucs`: both are evaluated on the same draws.

    Args:
        labels: int (N,), index into CLASSES; images are resampled within the classes.
        first: float (N, 3), the probabilities of one system.
        second: those of the other.
        seed: seed of the random numbers.

    Returns:
        By metric, for those that are defined. The p-value is twice the smaller fraction of draws on either side of 0,
        one draw added to each; so it is at least 2 / (DRAWS + 1).

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 13 and 15.
    """

    def difference(weights: np.ndarray) -> dict[str, np.ndarray]:
        one, other = (weighted.task_aucs(labels, probabilities, weights) for probabilities in (first, second))
        return {name: other[name] - one[name] for name in one}

    one, other = (
        weighted.on_data(partial(weighted.task_aucs, labels, probabilities), len(labels))
        for probabilities in (first, second)
    )
    found: dict[str, Difference] = {}
    for name, draws in resampled(difference, labels, seed).items():
        before, after = one[name], other[name]
        if before is None or after is None:
            continue
        tail = int(min((draws <= 0).sum(), (draws >= 0).sum()))
        p_value = min(1.0, 2 * (tail + 1) / (len(draws) + 1))
        found[name] = Difference(before, after, after - before, percentiles(draws), p_value)
    return found
