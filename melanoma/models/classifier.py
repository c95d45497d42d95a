"""The 3-class classifier: an ImageNet backbone and the classification head of 2018."""

from dataclasses import dataclass
from functools import cached_property

from melanoma.classes import CLASSES
from melanoma.errors import InputError
from melanoma.models import backbones

import keras
from keras import layers

HEAD_UNITS = 1024
HEAD_DROPOUT = 0.6


@dataclass(frozen=True)
class Classifier:
    """A backbone, its preprocessing, and a head."""

    name: str  # key of `backbones.applications`
    size: int  # side of the images in pixels
    backbone: keras.Model  # from preprocessed images to features (N, C)
    head: keras.Model  # from features to probabilities (N, 3)
    scaling: str | None = None  # of colours, see `backbones.preprocess`

    @property
    def input_size(self) -> int:
        """Side in pixels at which the backbone works."""
        return self.backbone.input_shape[1]

    def preprocess(self, images: keras.KerasTensor) -> keras.KerasTensor:
        """Resizes and scales RGB (N, size, size, 3) in [0, 255] for the backbone."""
        if self.input_size != self.size:
            images = layers.Resizing(self.input_size, self.input_size, name="resize_input")(images)
        return backbones.preprocess(self.name, images, self.scaling)

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
    scaling: str | None = None,
    input_size: int | None = None,
    train_batchnorm: bool | None = None,
) -> Classifier:
    """A classifier with a randomly initialised head.

    Args:
        name: key of `backbones.applications`.
        size: side of the images in pixels.
        weights: initial weights of the backbone, see `backbones.build`.
        scaling: scaling of colours, see `backbones.preprocess`.
        input_size: side in pixels at which the backbone works; None: `size`.
        train_batchnorm: see `backbones.build`.

    Raises:
        InputError: see `backbones.build`.
    """
    backbone = backbones.build(name, input_size or size, weights, "avg", train_batchnorm)
    return Classifier(name, size, backbone, build_head(backbone.output_shape[-1]), scaling)


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
