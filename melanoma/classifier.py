"""The 3-class classifier: an ImageNet backbone and the head of 2018."""

from melanoma import backbones
from melanoma.isic import CLASSES

import keras
from keras import layers

HEAD_UNITS = 1024
HEAD_DROPOUT = 0.6


def build_head(features: int) -> keras.Model:
    """The head of 2018, from features (N, `features`) to probabilities (N, 3) in the order of CLASSES."""
    inputs = keras.Input((features,), name="features")
    x = layers.Dense(HEAD_UNITS, activation="relu", name="dense")(inputs)
    x = layers.Dropout(HEAD_DROPOUT, name="dropout")(x)
    classes = layers.Dense(len(CLASSES), activation="softmax", dtype="float32", name="classes")(x)
    return keras.Model(inputs, classes, name="head")


def extractor(name: str, backbone: keras.Model, scaling: str | None = None) -> keras.Model:
    """The backbone behind its own preprocessing: from RGB (N, S, S, 3), 0 to 255, to features (N, C)."""
    photographs = keras.Input(backbone.input_shape[1:], name="photographs")
    features = backbone(backbones.preprocess(name, photographs, scaling))
    return keras.Model(photographs, features, name=f"{name}_features")


def assemble(name: str, backbone: keras.Model, head: keras.Model, scaling: str | None = None) -> keras.Model:
    """The whole classifier: from RGB (N, S, S, 3), 0 to 255, to probabilities (N, 3)."""
    photographs = keras.Input(backbone.input_shape[1:], name="photographs")
    probabilities = head(backbone(backbones.preprocess(name, photographs, scaling)))
    return keras.Model(photographs, probabilities, name=f"{name}_classifier")
