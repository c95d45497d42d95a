"""Losses and the training metric of lesion masks, computed per image.

Keras would pool the pixels of a batch; the challenge's score counts every image once, so each function returns one
value per image. All take (truth, predicted): (N, H, W, 1) of {0, 1}, and probabilities (N, H, W, 1) in [0, 1].
"""

from collections.abc import Callable

import keras
from keras import ops

Loss = Callable[[keras.KerasTensor, keras.KerasTensor], keras.KerasTensor]
PER_IMAGE = (1, 2, 3)  # axes to reduce: height, width, channel
BORDER = 0.02  # fraction of the side: half the width of the strip along the border
BORDER_WEIGHT = 4.0  # of its pixels, in addition to 1
FALSE_NEGATIVE_WEIGHT = 0.7  # Tversky: missed lesion weighs 0.7, skin taken for lesion 0.3
FOCAL_EXPONENT = 0.75  # focal Tversky: below 1, the loss is steeper near a perfect mask
JACCARD_SMOOTHING = 1e-7  # two empty masks score 1


def dice(truth: keras.KerasTensor, predicted: keras.KerasTensor) -> keras.KerasTensor:
    """1 - Dice coefficient with 1 added to numerator and denominator: (N,), in [0, 1]."""
    truth = ops.cast(truth, predicted.dtype)
    overlap = 2 * ops.sum(truth * predicted, axis=PER_IMAGE)
    return 1 - (overlap + 1) / (ops.sum(truth, axis=PER_IMAGE) + ops.sum(predicted, axis=PER_IMAGE) + 1)


def dice_cross_entropy(truth: keras.KerasTensor, predicted: keras.KerasTensor) -> keras.KerasTensor:
    """Dice loss plus mean binary cross-entropy: (N,), 0 or more."""
    entropy = keras.losses.binary_crossentropy(ops.cast(truth, predicted.dtype), predicted)
    return dice(truth, predicted) + ops.mean(entropy, axis=(1, 2))


def dice_border_cross_entropy(truth: keras.KerasTensor, predicted: keras.KerasTensor) -> keras.KerasTensor:
    """Dice loss plus mean binary cross-entropy in which pixels near the border weigh more: (N,), 0 or more."""
    truth = ops.cast(truth, predicted.dtype)
    width = 1 + 2 * round(BORDER * truth.shape[1])  # pixels
    window = {"pool_size": width, "strides": 1, "padding": "same", "data_format": "channels_last"}
    border = ops.max_pool(truth, **window) + ops.max_pool(-truth, **window)  # dilation minus erosion
    weights = 1 + BORDER_WEIGHT * border[..., 0]
    entropy = keras.losses.binary_crossentropy(truth, predicted)
    return dice(truth, predicted) + ops.sum(weights * entropy, axis=(1, 2)) / ops.sum(weights, axis=(1, 2))


def tversky(truth: keras.KerasTensor, predicted: keras.KerasTensor) -> keras.KerasTensor:
    """1 - Tversky index: (N,), in [0, 1].

    Source: Salehi et al. 2017, arXiv 1706.05721.
    """
    truth = ops.cast(truth, predicted.dtype)
    # Keras' alpha weighs the false negatives, beta the false positives.
    return keras.losses.tversky(
        truth, predicted, alpha=FALSE_NEGATIVE_WEIGHT, beta=1 - FALSE_NEGATIVE_WEIGHT, axis=PER_IMAGE
    )


def focal_tversky(truth: keras.KerasTensor, predicted: keras.KerasTensor) -> keras.KerasTensor:
    """`tversky` to the power of FOCAL_EXPONENT: (N,), in [0, 1].

    Source: Abraham and Khan 2019, arXiv 1810.07842.
    """
    return ops.power(ops.maximum(tversky(truth, predicted), keras.config.epsilon()), FOCAL_EXPONENT)


LOSSES: dict[str, Loss] = {
    loss.__name__: loss for loss in (dice_cross_entropy, dice_border_cross_entropy, dice, tversky, focal_tversky)
}


def jaccard(truth: keras.KerasTensor, predicted: keras.KerasTensor) -> keras.KerasTensor:
    """Jaccard index at probability 0.5, a metric for training: (N,), in [0, 1]."""
    inside = ops.cast(predicted > 0.5, predicted.dtype)
    truth = ops.cast(truth, predicted.dtype)
    intersection = ops.sum(truth * inside, axis=PER_IMAGE)
    union = ops.sum(ops.maximum(truth, inside), axis=PER_IMAGE)
    return (intersection + JACCARD_SMOOTHING) / (union + JACCARD_SMOOTHING)
