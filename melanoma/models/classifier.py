"""The 3-class classifier: an ImageNet backbone and the classification head of 2018."""

import argparse
from dataclasses import dataclass, replace
from functools import cached_property

from melanoma.classes import CLASSES
from melanoma.cli import flags
from melanoma.errors import InputError
from melanoma.models import backbones, colours

import keras
from keras import layers

HEAD_UNITS = 1024
HEAD_DROPOUT = 0.6


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before the backbone; saved next to the weights."""

    scaling: str | None = None  # of colours, see `backbones.preprocess`
    input_size: int | None = None  # side in pixels at which the backbone works; None: that of the images
    colour_constancy: bool = False  # see `colours.shades_of_grey`


AS_IS = Preprocessing()


@dataclass(frozen=True)
class Classifier:
    """A backbone, its preprocessing, and a head."""

    name: str  # key of `backbones.applications`
    size: int  # side of the images in pixels
    backbone: keras.Model  # from preprocessed images to features (N, C)
    head: keras.Model  # from features to probabilities (N, 3)
    preprocessing: Preprocessing

    def preprocess(self, images: keras.KerasTensor) -> keras.KerasTensor:
        """Prepares RGB (N, size, size, 3) in [0, 255] for the backbone."""
        if self.preprocessing.colour_constancy:
            images = colours.shades_of_grey(images)
        side = self.preprocessing.input_size
        if side != self.size:
            images = layers.Resizing(side, side, dtype="float32", name="resize_input")(images)
        return backbones.preprocess(self.name, images, self.preprocessing.scaling)

    def extractor(self) -> keras.Model:
        """Model from RGB (N, size, size, 3) in [0, 255] to the backbone's features (N, C)."""
        images = keras.Input((self.size, self.size, 3), name="images")
        return keras.Model(images, self.backbone(self.preprocess(images)), name=f"{self.name}_features")

    @cached_property
    def feature_maps(self) -> keras.Model:
        """Model from RGB (N, size, size, 3) in [0, 255] to the feature maps (N, H, W, C) whose mean the head sees.

        Raises:
            InputError: the backbone does not end in average pooling.
        """
        if not isinstance(self.backbone.layers[-1], layers.GlobalAveragePooling2D):
            raise InputError(f"no Grad-CAM of {self.name}, because it does not end in average pooling")
        maps = keras.Model(self.backbone.input, self.backbone.layers[-1].input)  # before the pooling
        images = keras.Input((self.size, self.size, 3), name="images")
        return keras.Model(images, maps(self.preprocess(images)), name=f"{self.name}_feature_maps")

    @cached_property
    def model(self) -> keras.Model:
        """Model from RGB (N, size, size, 3) in [0, 255] to probabilities (N, 3) in the order of CLASSES."""
        images = keras.Input((self.size, self.size, 3), name="images")
        probabilities = self.head(self.backbone(self.preprocess(images)))
        return keras.Model(images, probabilities, name=f"{self.name}_classifier")


def build(
    name: str,
    size: int,
    weights: str,
    preprocessing: Preprocessing = AS_IS,
    train_batchnorm: bool | None = None,
) -> Classifier:
    """A classifier with a randomly initialised head.

    Args:
        name: key of `backbones.applications`.
        size: side of the images in pixels.
        weights: initial weights of the backbone, see `backbones.build`.
        preprocessing: before the backbone.
        train_batchnorm: see `backbones.build`.

    Raises:
        InputError: see `backbones.build`.
    """
    side = preprocessing.input_size or size
    backbone = backbones.build(name, side, weights, "avg", train_batchnorm)
    head = build_head(backbone.output_shape[-1])
    return Classifier(name, size, backbone, head, replace(preprocessing, input_size=side))


def build_head(features: int) -> keras.Model:
    """The classification head of 2018.

    Args:
        features: number of features C.

    Returns:
        Model from features (N, C) to probabilities, float32 (N, 3), in the order of CLASSES.
    """
    inputs = keras.Input((features,), name="features")
    x = layers.Dense(HEAD_UNITS, activation="relu", name="dense")(inputs)
    x = layers.Dropout(HEAD_DROPOUT, name="dropout")(x)
    classes = layers.Dense(len(CLASSES), activation="softmax", dtype="float32", name="classes")(x)
    return keras.Model(inputs, classes, name="head")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --input-size and --colour-constancy to a parser."""
    parser.add_argument(
        "--input-size",
        type=flags.positive_int,
        help="side of the backbone's input in pixels; default: that of the arrays",
    )
    parser.add_argument(
        "--colour-constancy",
        action="store_true",
        help="divide the colours of each region of interest by that of the light (shades of grey)",
    )
