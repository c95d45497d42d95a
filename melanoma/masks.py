"""From a network's probabilities to a lesion mask: threshold and clean-up, each of which can be left out."""

from itertools import product

from melanoma import metrics

import numpy as np
from scipy import ndimage

DEFAULT_THRESHOLD = 0.5  # where no validation masks choose a better one
THRESHOLDS = np.linspace(0.1, 0.9, 17)


def clean(mask: np.ndarray) -> np.ndarray:
    """The largest connected part, its holes filled: a photograph shows one lesion.

    Args:
        mask: uint8 (S, S, 1), {0, 1}; parts that touch at a corner are connected.

    Returns:
        The same shape and dtype; an empty mask stays empty.
    """
    parts, count = ndimage.label(mask[..., 0], structure=np.ones((3, 3)))
    if not count:
        return mask
    largest = 1 + np.argmax(np.bincount(parts.ravel())[1:])
    return ndimage.binary_fill_holes(parts == largest).astype(np.uint8)[..., None]


def outline(probability: np.ndarray, threshold: float, cleaned: bool) -> np.ndarray:
    """Masks, uint8 (N, S, S, 1) of {0, 1}, of probabilities of the same shape: lesion from the threshold up."""
    found = (probability >= threshold).astype(np.uint8)
    return np.stack([clean(mask) for mask in found]) if cleaned else found


def mean_jaccard(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean of the Jaccard index over images; see `metrics.per_image`."""
    return float(metrics.per_image(truth, predicted)["jaccard"].mean())


def choose_threshold(truth: np.ndarray, probability: np.ndarray, cleaned: bool) -> float:
    """The one of THRESHOLDS with the highest mean Jaccard index; of equal ones the lowest.

    Args:
        truth: uint8 (N, S, S, 1), {0, 1}; validation's.
        probability: float (N, S, S, 1).
        cleaned: whether masks will be cleaned up.
    """
    scores = [mean_jaccard(truth, outline(probability, threshold, cleaned)) for threshold in THRESHOLDS]
    return float(THRESHOLDS[int(np.argmax(scores))])


def effects(truth: np.ndarray, plain: np.ndarray, turned: np.ndarray) -> list[dict[str, float | bool]]:
    """What turned views, threshold and clean-up are worth, with and without each.

    Args:
        truth: uint8 (N, S, S, 1), {0, 1}.
        plain: probabilities of the images as they are, (N, S, S, 1).
        turned: those of turned views too.

    Returns:
        For each of the eight combinations: turns, cleaned, threshold, threshold_chosen, jaccard.
    """
    rows: list[dict[str, float | bool]] = []
    for turns, cleaned, chosen in product((False, True), repeat=3):
        probability = turned if turns else plain
        threshold = choose_threshold(truth, probability, cleaned) if chosen else DEFAULT_THRESHOLD
        jaccard = mean_jaccard(truth, outline(probability, threshold, cleaned))
        rows.append(
            {
                "turns": turns,
                "cleaned": cleaned,
                "threshold_chosen": chosen,
                "threshold": threshold,
                "jaccard": jaccard,
            }
        )
    return rows
