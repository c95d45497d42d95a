"""Metrics of lesion masks."""

import numpy as np

JACCARD_THRESHOLD = 0.65  # of the challenge from 2018 on: a mask with a lower Jaccard index counts as 0


def per_image(truth: np.ndarray, predicted: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of each predicted lesion mask.

    Args:
        truth: uint8 (N, H, W, 1), 1 inside the lesion, 0 outside.
        predicted: same shape, dtype and meaning; not modified.

    Returns:
        jaccard, dice, threshold_jaccard, pixel_accuracy, sensitivity, specificity: each float64 (N,) in [0, 1]. 0/0 is
        1: two empty masks score 1.

    Raises:
        ValueError: shapes differ, N is 0, or a value is not 0 or 1.

    Source: Codella et al. 2018, arXiv 1710.05006, part 1; threshold Jaccard: Codella et al. 2019, arXiv 1902.03368.
    """
    if truth.shape != predicted.shape or not len(truth):
        raise ValueError(f"masks of shape {truth.shape} and {predicted.shape}; expected equal shapes and N > 0")
    if max(truth.max(), predicted.max()) > 1:
        raise ValueError("masks must hold only 0 and 1")
    lesion, found = (array.reshape(len(array), -1).astype(bool) for array in (truth, predicted))
    true_positives = (lesion & found).sum(axis=1)
    false_negatives = (lesion & ~found).sum(axis=1)
    false_positives = (~lesion & found).sum(axis=1)
    wrong = false_negatives + false_positives
    true_negatives = lesion.shape[1] - true_positives - wrong
    jaccard = ratio(true_positives, true_positives + wrong)
    return {
        "jaccard": jaccard,
        "dice": ratio(2 * true_positives, 2 * true_positives + wrong),
        "threshold_jaccard": np.where(jaccard < JACCARD_THRESHOLD, 0.0, jaccard),
        "pixel_accuracy": (true_positives + true_negatives) / lesion.shape[1],
        "sensitivity": ratio(true_positives, true_positives + false_negatives),
        "specificity": ratio(true_negatives, true_negatives + false_positives),
    }


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part / whole` of two int (N,); 1 where `whole` is 0."""
    return np.divide(part, whole, out=np.ones(len(part)), where=whole > 0)


def mean_jaccard(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over images of intersection over union of two sets of masks.

    Every image counts once, whatever its lesion's area; pooling pixels would favour large lesions.

    Args:
        truth: uint8 (N, H, W, 1), 1 inside the lesion, 0 outside.
        predicted: same shape, dtype and meaning; not modified.

    Returns:
        Fraction in [0, 1]. Two empty masks score 1.

    Raises:
        ValueError: shapes differ, N is 0, or a value is not 0 or 1.

    Source: Codella et al. 2018, arXiv 1710.05006, part 1.
    """
    return float(per_image(truth, predicted)["jaccard"].mean())
