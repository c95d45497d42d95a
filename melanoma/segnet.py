"""SegNet in the size of 2018: a small encoder and its mirror image, trained from nothing.

Source of the architecture: Badrinarayanan et al. 2017, arXiv 1511.00561; filters and depths as in the 2018 repository,
which upsamples by repetition where the paper unpools by indices.
"""

from collections.abc import Sequence

import keras
from keras import layers, ops

ENCODER = ((16, 2), (32, 2), (64, 3))  # filters and number of convolutions of each stage
STRIDE = 2 ** len(ENCODER)  # the network's side must be a multiple: every stage halves it
# Keras' 0.99 needs hundreds of steps to forget its start; an epoch of 2000 images in 16s has 125.
BATCHNORM_MOMENTUM = 0.9


def convolutions(x: keras.KerasTensor, filters: int, count: int, name: str) -> keras.KerasTensor:
    """`count` times 3x3 convolution, batch normalisation, ReLU."""
    for number in range(1, count + 1):
        x = layers.Conv2D(
            filters, 3, padding="same", use_bias=False, kernel_initializer="he_normal", name=f"{name}_conv{number}"
        )(x)
        x = layers.BatchNormalization(momentum=BATCHNORM_MOMENTUM, name=f"{name}_norm{number}")(x)
        x = layers.ReLU(name=f"{name}_relu{number}")(x)
    return x


def build(size: int, network_size: int, mean: Sequence[float], std: Sequence[float]) -> keras.Model:
    """SegNet for square photographs.

    Args:
        size: side of photographs and masks in pixels.
        network_size: side that the network works at, a multiple of STRIDE.
        mean: of the training photographs' red, green, blue, 0 to 255.
        std: their standard deviations.

    Returns:
        Model from (N, size, size, 3), RGB 0 to 255, to (N, size, size, 1), the probability of lesion.

    Raises:
        ValueError: network_size is no multiple of STRIDE.
    """
    if network_size % STRIDE:
        raise ValueError(f"network size {network_size} is not a multiple of {STRIDE}")
    photographs = keras.Input((size, size, 3), name="photographs")
    x = layers.Normalization(mean=mean, variance=[value**2 for value in std], name="standardise")(photographs)
    if network_size != size:
        x = layers.Resizing(network_size, network_size, name="shrink")(x)
    for number, (filters, count) in enumerate(ENCODER, start=1):
        x = convolutions(x, filters, count, f"encoder{number}")
        x = layers.MaxPooling2D(name=f"encoder{number}_pool")(x)
    for number, (filters, count) in reversed(list(enumerate(ENCODER, start=1))):
        x = layers.UpSampling2D(name=f"decoder{number}_upsample")(x)
        x = convolutions(x, filters, count, f"decoder{number}")
    x = layers.Conv2D(1, 1, activation="sigmoid", name="lesion")(x)
    if network_size != size:
        x = layers.Resizing(size, size, name="enlarge")(x)
    return keras.Model(photographs, x, name="segnet")


def dice_cross_entropy(truth: keras.KerasTensor, predicted: keras.KerasTensor) -> keras.KerasTensor:
    """Dice loss plus binary cross-entropy of each image.

    Each image counts once, as in the challenge's score; Keras' Dice without `axis` would pool the batch.

    Args:
        truth: (N, H, W, 1), {0, 1}.
        predicted: (N, H, W, 1), probabilities.

    Returns:
        (N,), from 0.
    """
    truth = ops.cast(truth, predicted.dtype)
    overlap = 2 * ops.sum(truth * predicted, axis=(1, 2, 3))
    areas = ops.sum(truth, axis=(1, 2, 3)) + ops.sum(predicted, axis=(1, 2, 3))
    dice = (overlap + 1) / (areas + 1)
    return 1 - dice + ops.mean(keras.losses.binary_crossentropy(truth, predicted), axis=(1, 2))


def jaccard(truth: keras.KerasTensor, predicted: keras.KerasTensor) -> keras.KerasTensor:
    """Jaccard index of each image at probability 0.5, to watch while training: (N,), in [0, 1]."""
    inside = ops.cast(predicted > 0.5, predicted.dtype)
    truth = ops.cast(truth, predicted.dtype)
    both = ops.sum(truth * inside, axis=(1, 2, 3))
    either = ops.sum(ops.maximum(truth, inside), axis=(1, 2, 3))
    return (both + 1e-7) / (either + 1e-7)
