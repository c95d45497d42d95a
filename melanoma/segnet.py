"""The networks that outline the lesion, their losses, and the one function that builds them.

segnet         in the size of 2018: a small encoder and its mirror image, trained from nothing; upsamples by repetition
segnet_vgg16   as published: the encoder of VGG16, max-pooling indices, a mirrored decoder that unpools by them
unet           an encoder-decoder with skip connections on any backbone of `keras.applications`

Source of SegNet: Badrinarayanan et al. 2017, arXiv 1511.00561; of the skip connections: Ronneberger et al. 2015, arXiv
1505.04597.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log2

from melanoma import backbones
from melanoma.errors import InputError
from melanoma.normalisation import BatchNormalization

import keras
from keras import layers, ops

ENCODER = ((16, 2), (32, 2), (64, 3))  # segnet: filters and number of convolutions of each stage
DECODER = (64, 48, 32, 16)  # unet: filters of its stages, from a sixteenth of the side to a half
STRIDES = {"segnet": 2 ** len(ENCODER), "segnet_vgg16": 32, "unet": 1}  # of which the network's side must be a multiple
NETWORKS = tuple(STRIDES)
VGG16 = "vgg16"


@dataclass(frozen=True)
class Design:
    """Everything that tells one network from another but for its weights; kept beside them."""

    network: str  # of NETWORKS
    network_size: int  # side in pixels that it works at
    backbone: str = ""  # key of `backbones.applications`; segnet has none
    scaling: str | None = None  # of colours for the backbone, see `backbones.preprocess`
    mean: Sequence[float] | None = None  # of the training photographs' red, green, blue, 0 to 255; for segnet alone
    std: Sequence[float] | None = None  # their standard deviations


def convolutions(x: keras.KerasTensor, filters: int, count: int, name: str) -> keras.KerasTensor:
    """`count` times 3x3 convolution, batch normalisation, ReLU."""
    for number in range(1, count + 1):
        x = layers.Conv2D(
            filters, 3, padding="same", use_bias=False, kernel_initializer="he_normal", name=f"{name}_conv{number}"
        )(x)
        x = BatchNormalization(momentum=backbones.BATCHNORM_MOMENTUM, name=f"{name}_norm{number}")(x)
        x = layers.ReLU(name=f"{name}_relu{number}")(x)
    return x


def build(design: Design, size: int, weights: str = backbones.NONE) -> keras.Model:
    """A network for square photographs.

    Args:
        design: which.
        size: side of photographs and masks in pixels.
        weights: initial ones of the backbone: "imagenet", "none", or a file; segnet has no backbone.

    Returns:
        Model from (N, size, size, 3), RGB 0 to 255, to (N, size, size, 1), the probability of lesion, float32.

    Raises:
        InputError: network_size is no multiple of the network's stride or too small, or the weights cannot be had.
    """
    stride, side = STRIDES[design.network], design.network_size
    if side % stride:
        raise InputError(f"--network-size {side} is not a multiple of {stride}, as {design.network} needs")
    photographs = keras.Input((size, size, 3), name="photographs")
    x = photographs
    if design.network == "segnet":
        variance = [value**2 for value in design.std or ()]
        x = layers.Normalization(mean=design.mean, variance=variance, name="standardise")(x)
    if side != size:
        x = layers.Resizing(side, side, name="shrink")(x)
    if design.network == "segnet":
        x = small_segnet(x)
    elif design.network == "segnet_vgg16":
        x = vgg16_segnet(x, design, weights)
    else:
        x = unet(x, design, weights)
    x = layers.Conv2D(1, 1, activation="sigmoid", dtype="float32", name="lesion")(x)
    if x.shape[1] != size:
        x = layers.Resizing(size, size, dtype="float32", name="enlarge")(x)
    return keras.Model(photographs, x, name=design.network)


# --------------------------------------------------------------------------------------------------------- the networks


def small_segnet(x: keras.KerasTensor) -> keras.KerasTensor:
    """Filters and depths as in the 2018 repository."""
    for number, (filters, count) in enumerate(ENCODER, start=1):
        x = convolutions(x, filters, count, f"encoder{number}")
        x = layers.MaxPooling2D(name=f"encoder{number}_pool")(x)
    for number, (filters, count) in reversed(list(enumerate(ENCODER, start=1))):
        x = layers.UpSampling2D(name=f"decoder{number}_upsample")(x)
        x = convolutions(x, filters, count, f"decoder{number}")
    return x


@keras.saving.register_keras_serializable("melanoma")
class MaxPoolingWithIndices(layers.Layer):
    """2x2 maxima, and which of the four each came from; of equal ones the first.

    Plain `keras.ops`, so it runs on every backend, compiled by XLA or not; TensorFlow's own operation does neither.

    Example:
        [[1, 2], [4, 3]] gives the maximum 4 and the index 2.
    """

    def call(self, x: keras.KerasTensor) -> tuple[keras.KerasTensor, keras.KerasTensor]:
        """From (N, H, W, C) to maxima and indices 0 to 3, each (N, H/2, W/2, C)."""
        _, height, width, channels = x.shape
        windows = ops.reshape(x, (-1, height // 2, 2, width // 2, 2, channels))
        windows = ops.reshape(ops.transpose(windows, (0, 1, 3, 5, 2, 4)), (-1, height // 2, width // 2, channels, 4))
        maxima = ops.max(windows, axis=-1)
        # Of whole numbers: for floats Keras looks at their bits, which OpenVINO has no operation for.
        return maxima, ops.argmax(ops.cast(windows == maxima[..., None], "int32"), axis=-1)


@keras.saving.register_keras_serializable("melanoma")
class MaxUnpooling(layers.Layer):
    """The inverse: each value at its index among four, 0 at the others."""

    def call(self, x: keras.KerasTensor, indices: keras.KerasTensor) -> keras.KerasTensor:
        """From values and indices, each (N, H, W, C), to (N, 2H, 2W, C)."""
        _, height, width, channels = x.shape
        windows = x[..., None] * ops.one_hot(indices, 4, dtype=x.dtype)
        windows = ops.reshape(windows, (-1, height, width, channels, 2, 2))
        return ops.reshape(ops.transpose(windows, (0, 1, 4, 2, 5, 3)), (-1, 2 * height, 2 * width, channels))


def vgg16_segnet(x: keras.KerasTensor, design: Design, weights: str) -> keras.KerasTensor:
    """VGG16's convolutions with batch normalisation between, and their mirror image."""
    vgg16 = backbones.build(VGG16, design.network_size, weights)
    x = backbones.preprocess(VGG16, x, design.scaling)
    filters: list[list[int]] = [[]]  # of the convolutions between two poolings
    indices = []
    for layer in vgg16.layers[1:]:  # without the input
        if isinstance(layer, layers.MaxPooling2D):
            x, where = MaxPoolingWithIndices(name=layer.name)(x)
            indices.append(where)
            filters.append([])
        else:
            layer.activation = keras.activations.linear  # it comes after the normalisation
            x = BatchNormalization(momentum=backbones.BATCHNORM_MOMENTUM, name=f"{layer.name}_norm")(layer(x))
            x = layers.ReLU(name=f"{layer.name}_relu")(x)
            filters[-1].append(layer.filters)
    for number in reversed(range(len(indices))):
        x = MaxUnpooling(name=f"decoder{number + 1}_unpool")(x, indices[number])
        mirrored = [filters[max(number - 1, 0)][-1], *filters[number][:-1]][::-1]
        for place, count in enumerate(mirrored, start=1):
            x = convolutions(x, count, 1, f"decoder{number + 1}_{place}")
    return x


def skips(backbone: keras.Model) -> list[keras.KerasTensor]:
    """The last feature maps of about a half, a quarter, ... of the side, the smallest last.

    About: some backbones do not pad, so their maps have 95 and 93 pixels of 192. Maps that were padded for the next
    convolution are passed over, for they are shifted.
    """
    found: dict[int, keras.KerasTensor] = {}
    smallest = backbone.output_shape[1]  # gates of a pixel for each channel are smaller, and no feature maps
    for layer in backbone.layers:
        shape: tuple[int, ...] = tuple(getattr(layer.output, "shape", ()))
        if len(shape) == 4 and shape[1] >= smallest and not isinstance(layer, layers.ZeroPadding2D):
            found[round(log2(backbone.input_shape[1] / shape[1]))] = layer.output
    return [found[level] for level in sorted(found) if level > 0]


def unet(x: keras.KerasTensor, design: Design, weights: str) -> keras.KerasTensor:
    """Backbone, and a slender decoder that ends at half the side: outlines of lesions are smooth."""
    backbone = backbones.build(design.backbone, design.network_size, weights)
    encoder = keras.Model(backbone.input, skips(backbone), name=backbone.name)
    features = encoder(backbones.preprocess(design.backbone, x, design.scaling))
    x, sides = features[-1], features[:-1]
    for number, filters in enumerate(DECODER, start=1):
        if not sides:
            break
        side = sides.pop()
        x = layers.Resizing(*side.shape[1:3], name=f"decoder{number}_upsample")(x)
        narrow = layers.Conv2D(filters, 1, name=f"decoder{number}_skip")(side)
        x = layers.Concatenate(name=f"decoder{number}_concat")([x, narrow])
        x = convolutions(x, filters, 2, f"decoder{number}")
    return x


# ----------------------------------------------------------------------------------------------------------- the losses

Loss = Callable[[keras.KerasTensor, keras.KerasTensor], keras.KerasTensor]
EACH = (1, 2, 3)  # axes: each image counts once, as in the challenge's score; Keras would pool the batch
MISSED = 0.7  # Tversky: weight of lesion that is missed, against 1 - MISSED of skin that is taken for it
FOCUS = 0.75  # focal Tversky: exponent; below 1 it steepens the loss near a perfect mask


def dice(truth: keras.KerasTensor, predicted: keras.KerasTensor) -> keras.KerasTensor:
    """1 - Dice coefficient of each image, 1 added to numerator and denominator: (N,), 0 to 1."""
    truth = ops.cast(truth, predicted.dtype)
    overlap = 2 * ops.sum(truth * predicted, axis=EACH)
    return 1 - (overlap + 1) / (ops.sum(truth, axis=EACH) + ops.sum(predicted, axis=EACH) + 1)


def dice_cross_entropy(truth: keras.KerasTensor, predicted: keras.KerasTensor) -> keras.KerasTensor:
    """Dice loss plus binary cross-entropy of each image.

    Args:
        truth: (N, H, W, 1), {0, 1}.
        predicted: (N, H, W, 1), probabilities.

    Returns:
        (N,), from 0.
    """
    entropy = keras.losses.binary_crossentropy(ops.cast(truth, predicted.dtype), predicted)
    return dice(truth, predicted) + ops.mean(entropy, axis=(1, 2))


def tversky(truth: keras.KerasTensor, predicted: keras.KerasTensor) -> keras.KerasTensor:
    """1 - Tversky index of each image: (N,), 0 to 1.

    Source: Salehi et al. 2017, arXiv 1706.05721. Keras' `alpha` weighs what is missed.
    """
    truth = ops.cast(truth, predicted.dtype)
    return keras.losses.tversky(truth, predicted, alpha=MISSED, beta=1 - MISSED, axis=EACH)


def focal_tversky(truth: keras.KerasTensor, predicted: keras.KerasTensor) -> keras.KerasTensor:
    """`tversky` to the power of FOCUS. Source: Abraham and Khan 2019, arXiv 1810.07842."""
    return ops.power(ops.maximum(tversky(truth, predicted), keras.config.epsilon()), FOCUS)


LOSSES: dict[str, Loss] = {loss.__name__: loss for loss in (dice_cross_entropy, dice, tversky, focal_tversky)}


def jaccard(truth: keras.KerasTensor, predicted: keras.KerasTensor) -> keras.KerasTensor:
    """Jaccard index of each image at probability 0.5, to watch while training: (N,), in [0, 1]."""
    inside = ops.cast(predicted > 0.5, predicted.dtype)
    truth = ops.cast(truth, predicted.dtype)
    both = ops.sum(truth * inside, axis=EACH)
    either = ops.sum(ops.maximum(truth, inside), axis=EACH)
    return (both + 1e-7) / (either + 1e-7)
