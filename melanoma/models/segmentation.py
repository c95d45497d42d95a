"""The networks that segment the lesion.

segnet         the network of 2018: a small encoder and its mirror image; upsamples by repetition
segnet_vgg16   SegNet as published: the encoder of VGG16, a mirrored decoder that unpools by max-pooling indices
unet           an encoder-decoder with skip connections on any backbone of `keras.applications`

Sources: SegNet, Badrinarayanan et al. 2017, arXiv 1511.00561; U-Net, Ronneberger et al. 2015, arXiv 1505.04597.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Any

from melanoma.errors import InputError
from melanoma.models import backbones
from melanoma.models.fused_batchnorm import BatchNormalization

import h5py
import keras
from keras import layers, ops

ENCODER = ((16, 2), (32, 2), (64, 3))  # segnet: filters and number of convolutions of each stage
DECODER = (64, 48, 32, 16)  # unet: filters of each stage, from 1/16 to 1/2 of the input's side
STRIDES = {"segnet": 2 ** len(ENCODER), "segnet_vgg16": 32, "unet": 1}  # the input size must be a multiple of these
NETWORKS = tuple(STRIDES)
VGG16 = "vgg16"


@dataclass(frozen=True)
class Design:
    """Everything that defines a network except its weights; stored next to them."""

    network: str  # one of NETWORKS
    input_size: int  # side in pixels at which the network works
    backbone: str = ""  # key of `backbones.applications`; empty for segnet
    scaling: str | None = None  # of colours for the backbone, see `backbones.preprocess`
    mean: Sequence[float] | None = None  # segnet only: mean red, green, blue of the training images, 0 to 255
    std: Sequence[float] | None = None  # segnet only: their standard deviations


def build(design: Design, size: int, weights: str = backbones.NONE) -> keras.Model:
    """Builds a segmentation network for square images.

    Args:
        design: network, input size, backbone and scaling.
        size: side of images and masks in pixels; they are resized to the input size and back inside the model.
        weights: initial weights of the backbone, see `backbones.build`, or the file of a whole network of this design;
            ignored for segnet.

    Returns:
        Model from RGB (N, size, size, 3) in [0, 255] to the probability of lesion, float32 (N, size, size, 1).

    Raises:
        InputError: the input size is not a multiple of the network's stride, or see `backbones.build`.
    """
    stride, side = STRIDES[design.network], design.input_size
    if side % stride:
        raise InputError(f"--input-size {side} is not a multiple of {stride}, as {design.network} needs")
    images = keras.Input((size, size, 3), name="images")
    x = images
    if design.network == "segnet":
        variance = [value**2 for value in design.std or ()]
        x = layers.Normalization(mean=design.mean, variance=variance, name="standardise")(x)
    if side != size:
        x = layers.Resizing(side, side, name="resize_input")(x)
    if design.network == "segnet":
        x = small_segnet(x)
    elif design.network == "segnet_vgg16":
        x = vgg16_segnet(x, design, weights)
    else:
        x = unet(x, design, weights)
    x = layers.Conv2D(1, 1, activation="sigmoid", dtype="float32", name="lesion")(x)
    if x.shape[1] != size:
        x = layers.Resizing(size, size, dtype="float32", name="resize_output")(x)
    model = keras.Model(images, x, name=design.network)
    if is_of_segmentation(weights):
        backbones.load_weights(model, Path(weights))
    return model


def is_of_segmentation(weights: str) -> bool:
    """Whether initial weights are a file of a whole segmentation network, not of a backbone or classifier."""
    if not Path(weights).is_file() or not h5py.is_hdf5(weights):
        return False
    with h5py.File(weights) as file:
        return backbones.BACKBONE in file and "layers/conv2d" in file  # of the decoder; a classifier has none


def restore(design: Mapping[str, Any], size: int, paths: Sequence[Path]) -> list[keras.Model]:
    """Networks of a saved design with the weights of these files.

    Args:
        design: the fields of `Design`.
        size: side of the images in pixels.
        paths: weight file of each network.

    Raises:
        InputError: a weight file does not fit or is damaged.
    """
    models = [build(Design(**design), size) for _ in paths]
    for model, path in zip(models, paths, strict=True):
        backbones.load_weights(model, path)
    return models


def convolutions(x: keras.KerasTensor, filters: int, count: int, name: str) -> keras.KerasTensor:
    """Appends `count` times 3x3 convolution, batch normalisation and ReLU."""
    for number in range(1, count + 1):
        x = layers.Conv2D(
            filters, 3, padding="same", use_bias=False, kernel_initializer="he_normal", name=f"{name}_conv{number}"
        )(x)
        x = BatchNormalization(momentum=backbones.BATCHNORM_MOMENTUM, name=f"{name}_norm{number}")(x)
        x = layers.ReLU(name=f"{name}_relu{number}")(x)
    return x


def small_segnet(x: keras.KerasTensor) -> keras.KerasTensor:
    """SegNet with the filters and depths of the 2018 repository."""
    for number, (filters, count) in enumerate(ENCODER, start=1):
        x = convolutions(x, filters, count, f"encoder{number}")
        x = layers.MaxPooling2D(name=f"encoder{number}_pool")(x)
    for number, (filters, count) in reversed(list(enumerate(ENCODER, start=1))):
        x = layers.UpSampling2D(name=f"decoder{number}_upsample")(x)
        x = convolutions(x, filters, count, f"decoder{number}")
    return x


@keras.saving.register_keras_serializable("melanoma")
class MaxPoolingWithIndices(layers.Layer):
    """2x2 max pooling that also returns which of the four values was the maximum; of equal values the first.

    Made of `keras.ops`, so that it runs on every backend, with and without XLA; TensorFlow's own operation does not.

    Example:
        [[1, 2], [4, 3]] gives the maximum 4 and the index 2.
    """

    def call(self, x: keras.KerasTensor) -> tuple[keras.KerasTensor, keras.KerasTensor]:
        """From (N, H, W, C) to maxima and indices in 0 to 3, each (N, H/2, W/2, C)."""
        _, height, width, channels = x.shape
        windows = ops.reshape(x, (-1, height // 2, 2, width // 2, 2, channels))
        windows = ops.reshape(ops.transpose(windows, (0, 1, 3, 5, 2, 4)), (-1, height // 2, width // 2, channels, 4))
        maxima = ops.max(windows, axis=-1)
        # argmax of integers: Keras' argmax of floats compares their bits, which OpenVINO cannot convert.
        return maxima, ops.argmax(ops.cast(windows == maxima[..., None], "int32"), axis=-1)


@keras.saving.register_keras_serializable("melanoma")
class MaxUnpooling(layers.Layer):
    """Inverse of `MaxPoolingWithIndices`: each maximum at its index in a 2x2 window, 0 elsewhere."""

    def call(self, x: keras.KerasTensor, indices: keras.KerasTensor) -> keras.KerasTensor:
        """From values and indices, each (N, H, W, C), to (N, 2H, 2W, C)."""
        _, height, width, channels = x.shape
        windows = x[..., None] * ops.one_hot(indices, 4, dtype=x.dtype)
        windows = ops.reshape(windows, (-1, height, width, channels, 2, 2))
        return ops.reshape(ops.transpose(windows, (0, 1, 4, 2, 5, 3)), (-1, 2 * height, 2 * width, channels))


def vgg16_segnet(x: keras.KerasTensor, design: Design, weights: str) -> keras.KerasTensor:
    """SegNet on the convolutions of VGG16, with batch normalisation added after each."""
    vgg16 = backbones.build(VGG16, design.input_size, weights)
    x = backbones.preprocess(VGG16, x, design.scaling)
    stage_filters: list[list[int]] = [[]]  # of the convolutions between two poolings
    stage_indices = []
    for layer in vgg16.layers[1:]:  # without the input layer
        if isinstance(layer, layers.MaxPooling2D):
            x, indices = MaxPoolingWithIndices(name=layer.name)(x)
            stage_indices.append(indices)
            stage_filters.append([])
        else:
            layer.activation = keras.activations.linear  # ReLU follows the normalisation
            x = layer(x)
            x = BatchNormalization(momentum=backbones.BATCHNORM_MOMENTUM, name=f"{layer.name}_norm")(x)
            x = layers.ReLU(name=f"{layer.name}_relu")(x)
            stage_filters[-1].append(layer.filters)
    for stage in reversed(range(len(stage_indices))):
        x = MaxUnpooling(name=f"decoder{stage + 1}_unpool")(x, stage_indices[stage])
        mirrored = [stage_filters[max(stage - 1, 0)][-1], *stage_filters[stage][:-1]][::-1]
        for number, filters in enumerate(mirrored, start=1):
            x = convolutions(x, filters, 1, f"decoder{stage + 1}_{number}")
    return x


def skip_features(backbone: keras.Model) -> list[keras.KerasTensor]:
    """The last feature maps of a backbone at about 1/2, 1/4, 1/8, ... of the input's side, the smallest last.

    Backbones without padding have slightly smaller maps, e.g. 95 and 93 of 192 pixels. Maps that were padded for the
    next convolution are left out because they are shifted.
    """
    found: dict[int, keras.KerasTensor] = {}
    smallest = backbone.output_shape[1]  # smaller maps are gates of one pixel per channel
    for layer in backbone.layers:
        shape: tuple[int, ...] = tuple(getattr(layer.output, "shape", ()))
        if len(shape) == 4 and shape[1] >= smallest and not isinstance(layer, layers.ZeroPadding2D):
            found[round(log2(backbone.input_shape[1] / shape[1]))] = layer.output
    return [found[level] for level in sorted(found) if level > 0]


def unet(x: keras.KerasTensor, design: Design, weights: str) -> keras.KerasTensor:
    """A backbone and a small decoder that ends at half the input's side, enough for the smooth borders of lesions."""
    backbone = backbones.build(design.backbone, design.input_size, weights)
    encoder = keras.Model(backbone.input, skip_features(backbone), name=backbone.name)
    *skips, x = encoder(backbones.preprocess(design.backbone, x, design.scaling))
    for number, filters in enumerate(DECODER, start=1):
        if not skips:
            break
        skip = skips.pop()
        x = layers.Resizing(*skip.shape[1:3], name=f"decoder{number}_upsample")(x)
        narrow = layers.Conv2D(filters, 1, name=f"decoder{number}_skip")(skip)
        x = layers.Concatenate(name=f"decoder{number}_concat")([x, narrow])
        x = convolutions(x, filters, 2, f"decoder{number}")
    return x
