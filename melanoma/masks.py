"""From a network's probabilities to a lesion mask: turned views, threshold, clean-up, each of which can be left out."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product

from melanoma import augment, command, metrics, training

import keras
import numpy as np
from scipy import ndimage

DEFAULT_THRESHOLD = 0.5  # where no validation masks choose a better one
THRESHOLDS = np.linspace(0.1, 0.9, 17)
BATCHES = 4  # in a block of results
IMAGE_AXES = (1, 2)  # of (N, H, W, C)


def probabilities(models: Sequence[keras.Model], images: np.ndarray, turns: bool) -> np.ndarray:
    """The mean over models, and over the 8 flips and quarter turns of the images where asked.

    Args:
        models: each from (N, S, S, 3) to (N, S, S, 1).
        images: uint8 (N, S, S, 3).
        turns: whether to look at turned views; eight times the work.

    Returns:
        float32 (N, S, S, 1), 0 to 1.
    """
    total = np.zeros((*images.shape[:3], 1), np.float32)
    variants = range(augment.TURNS if turns else 1)
    for variant in variants:
        view = np.ascontiguousarray(augment.turned(images, variant, IMAGE_AXES))
        for model in models:
            total += augment.turned_back(np.asarray(model.predict_on_batch(view)), variant, IMAGE_AXES)
    return total / (len(models) * len(variants))


def predict(
    models: Sequence[keras.Model],
    images: np.ndarray,
    batch_size: int,
    turns: bool,
    label: str,
    own: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """`probabilities` of many images, a block at a time, so that they need not fit in memory together.

    Args:
        models: see `probabilities`.
        images: see there; memory-mapped or not.
        batch_size: images that a network sees at a time.
        turns: see `probabilities`.
        label: names the work in its progress.
        own: int (N,), the one model for each image; None: the mean of all models for every image.
    """
    everyone = partial(probabilities, models, turns=turns)
    block = BATCHES * batch_size * len(models)
    starts = range(0, len(images), block)
    for start in command.progress(starts, label, len(starts)):
        part = images[start : start + block]
        if own is None:
            yield np.concatenate(list(training.in_batches(everyone, part, batch_size)))
            continue
        result = np.empty((*part.shape[:3], 1), np.float32)
        for number, model in enumerate(models):
            rows = np.flatnonzero(own[start : start + block] == number)
            if len(rows):
                alone = partial(probabilities, [model], turns=turns)
                result[rows] = np.concatenate(list(training.in_batches(alone, part[rows], batch_size)))
        yield result


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
