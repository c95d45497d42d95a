"""From lesion probabilities to a mask: threshold, largest component, filled holes."""

from collections.abc import Mapping
from itertools import product

from melanoma.metrics.segmentation import mean_jaccard

import numpy as np
from PIL import Image
from scipy import ndimage

DEFAULT_THRESHOLD = 0.5  # where no validation masks choose a better one
HALF = 127  # of 255
THRESHOLDS = np.linspace(0.1, 0.9, 17)


def keep_largest(mask: np.ndarray) -> np.ndarray:
    """The largest connected component with its holes filled, because an image shows one lesion.

    Args:
        mask: uint8 (S, S, 1), {0, 1}; pixels that touch at a corner are connected.

    Returns:
        Same shape and dtype; an empty mask stays empty.
    """
    components, count = ndimage.label(mask[..., 0], structure=np.ones((3, 3)))
    if not count:
        return mask
    largest = 1 + np.argmax(np.bincount(components.ravel())[1:])
    return ndimage.binary_fill_holes(components == largest).astype(np.uint8)[..., None]


def segment(probability: np.ndarray, threshold: float, clean: bool) -> np.ndarray:
    """Lesion masks from probabilities.

    Args:
        probability: float (N, S, S, 1), in [0, 1].
        threshold: pixels of this probability or more are lesion.
        clean: whether to keep the largest component only and fill its holes.

    Returns:
        uint8 (N, S, S, 1), {0, 1}.
    """
    masks = (probability >= threshold).astype(np.uint8)
    return np.stack([keep_largest(mask) for mask in masks]) if clean else masks


def enlarge(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask at the size of its image, with smooth borders.

    Args:
        mask: uint8 (S, S, 1), {0, 1}.
        size: width and height in pixels.

    Returns:
        uint8 (height, width, 1), {0, 1}.
    """
    large = Image.fromarray(mask[..., 0] * 255).resize(size, Image.Resampling.BILINEAR)
    return (np.asarray(large) > HALF).astype(np.uint8)[..., None]


def choose_threshold(truth: np.ndarray, probability: np.ndarray, clean: bool) -> float:
    """The lowest of THRESHOLDS with the highest mean Jaccard index.

    Args:
        truth: uint8 (N, S, S, 1), {0, 1}, of the validation split.
        probability: float (N, S, S, 1).
        clean: whether masks will be cleaned up, see `segment`.
    """
    scores = [mean_jaccard(truth, segment(probability, threshold, clean)) for threshold in THRESHOLDS]
    return float(THRESHOLDS[int(np.argmax(scores))])


def effects(truth: np.ndarray, probabilities: Mapping[int, np.ndarray]) -> list[dict[str, float | bool]]:
    """Mean Jaccard index with and without test-time augmentation, clean-up and a chosen threshold.

    Args:
        truth: uint8 (N, S, S, 1), {0, 1}.
        probabilities: float (N, S, S, 1), by number of views of test-time augmentation.

    Returns:
        A row for each combination: views, clean, threshold_chosen, threshold, jaccard.
    """
    rows: list[dict[str, float | bool]] = []
    for (views, probability), clean, chosen in product(probabilities.items(), (False, True), (False, True)):
        threshold = choose_threshold(truth, probability, clean) if chosen else DEFAULT_THRESHOLD
        jaccard = mean_jaccard(truth, segment(probability, threshold, clean))
        rows.append(
            {"views": views, "clean": clean, "threshold_chosen": chosen, "threshold": threshold, "jaccard": jaccard}
        )
    return rows
