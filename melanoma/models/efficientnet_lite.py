"""EfficientNet-Lite: EfficientNet without squeeze-and-excitation and with ReLU6, which is fast on CPUs.

`keras.applications` does not have it. Source of the architecture: Tan and Le 2019, arXiv 1905.11946, and the published
changes of the Lite variants, in which stem, head and the depth of the first and last stage do not grow.
"""

import math

from melanoma.errors import InputError

import keras
from keras import layers

# Of each stage: blocks, kernel size, stride of the first block, expansion factor, filters.
STAGES = (
    *((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)),
    *((3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
)
STEM_FILTERS, HEAD_FILTERS = 32, 1280
EPSILON = 1e-3
WIDTH_AND_DEPTH = {
    0: (1.0, 1.0),
    1: (1.0, 1.1),
    2: (1.1, 1.2),
    3: (1.2, 1.4),
    4: (1.4, 1.8),
}  # by number of the variant


def preprocess_input(images: keras.KerasTensor) -> keras.KerasTensor:
    """Scales RGB in [0, 255] to about [-1, 1]."""
    return (images - 127.0) / 128.0


def round_filters(filters: int, width: float) -> int:
    """`width` times as many filters, as a multiple of 8 that is at most a tenth smaller."""
    scaled = filters * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


def build(
    variant: int, weights: str | None, include_top: bool, input_shape: tuple[int, int, int], pooling: str | None
) -> keras.Model:
    """EfficientNet-Lite without classifier and with random weights; arguments as in `keras.applications`.

    Args:
        variant: 0 to 4, key of WIDTH_AND_DEPTH.
        weights: None; no weights are published for Keras.
        include_top: False.
        input_shape: (S, S, 3).
        pooling: "avg" appends global average pooling; None returns feature maps.

    Returns:
        Model from preprocessed images (N, S, S, 3) to features, (N, 1280) or (N, ceil(S / 32), ceil(S / 32), 1280).

    Raises:
        InputError: weights are not None.
    """
    if weights:
        raise InputError(f"efficientnet_lite{variant} has no weights to download: use --weights FILE or --weights none")

    def normalised(x: keras.KerasTensor, name: str, activation: bool = True) -> keras.KerasTensor:
        x = layers.BatchNormalization(epsilon=EPSILON, name=f"{name}_bn")(x)
        return layers.ReLU(6.0, name=f"{name}_relu6")(x) if activation else x

    def convolution(x: keras.KerasTensor, filters: int, kernel: int, strides: int, name: str) -> keras.KerasTensor:
        return layers.Conv2D(filters, kernel, strides, padding="same", use_bias=False, name=f"{name}_conv")(x)

    width, depth = WIDTH_AND_DEPTH[variant]
    images = keras.Input(input_shape, name="images")
    x = normalised(convolution(images, STEM_FILTERS, 3, 2, "stem"), "stem")
    number = 0
    for stage, (repeats, kernel, first_stride, expansion, stage_filters) in enumerate(STAGES):
        filters = round_filters(stage_filters, width)
        for place in range(repeats if stage in (0, len(STAGES) - 1) else math.ceil(repeats * depth)):
            name, inputs, strides = f"block{number}", x, 1 if place else first_stride
            if expansion > 1:
                x = normalised(convolution(x, x.shape[-1] * expansion, 1, 1, f"{name}_expand"), f"{name}_expand")
            x = layers.DepthwiseConv2D(kernel, strides, padding="same", use_bias=False, name=f"{name}_dw_conv")(x)
            x = normalised(x, f"{name}_dw")
            x = normalised(convolution(x, filters, 1, 1, f"{name}_project"), f"{name}_project", activation=False)
            x = layers.Add(name=f"{name}_add")([inputs, x]) if x.shape == inputs.shape else x
            number += 1
    x = normalised(convolution(x, HEAD_FILTERS, 1, 1, "head"), "head")
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x) if pooling == "avg" else x
    return keras.Model(images, x, name=f"efficientnet_lite{variant}")
