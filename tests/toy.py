"""Small networks, for tests that are not about the real ones."""

from typing import Any

from melanoma.models import backbones, segmentation

import keras
from keras import layers

NAME, OTHER = "toy", "shifted"
FEATURES = 8
SEGNET_ENCODER = segmentation.ENCODER  # of the real network, whatever `shrink_segnet` does


def toy(
    include_top: bool = False,
    weights: str | None = None,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    pooling: str | None = None,
) -> keras.Model:
    """Has the signature of a model of `keras.applications`."""
    if weights:
        raise ValueError("the toy backbone has no pretrained weights")
    inputs = keras.Input(input_shape)
    x = layers.Conv2D(FEATURES, 3, strides=4, padding="same", use_bias=False, name="conv")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU(name="relu")(x)
    outputs = layers.GlobalAveragePooling2D(name="pool")(x) if pooling else x
    return keras.Model(inputs, outputs, name=NAME)


def preprocess(images: keras.KerasTensor) -> keras.KerasTensor:
    return images / 127.5 - 1.0


def preprocess_other(images: keras.KerasTensor) -> keras.KerasTensor:
    return images / 255.0


def register() -> None:
    """Makes the backbones NAME and OTHER available in this process; they differ in their preprocessing."""
    original = backbones.applications

    def applications() -> dict[str, Any]:
        return original() | {
            NAME: backbones.Application(toy, preprocess),
            OTHER: backbones.Application(toy, preprocess_other),
        }

    backbones.applications = applications


def shrink_segnet() -> None:
    """Makes SegNet small, with its three stages, in this process."""
    segmentation.ENCODER = ((4, 1), (8, 1), (8, 1))
