"""The 3-class classifier: any ImageNet backbone of Keras, its own preprocessing inside, and the head of 2018."""

import inspect
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

from melanoma.errors import InputError
from melanoma.isic import CLASSES

import keras
from keras import layers

HEAD_UNITS = 1024
HEAD_DROPOUT = 0.6
# Keras' 0.99 and MobileNetV2's 0.999 need hundreds of steps to forget their start; an epoch here may have thirty.
BATCHNORM_MOMENTUM = 0.9
IMAGENET, NONE = "imagenet", "none"


@dataclass(frozen=True)
class Application:
    """A backbone of `keras.applications`: what builds it, and what turns RGB 0 to 255 into what its weights expect."""

    build: Callable[..., keras.Model]
    preprocess: Callable[[keras.KerasTensor], keras.KerasTensor]


def applications() -> dict[str, Application]:
    """Every backbone of `keras.applications` by its lower-case name, e.g. mobilenetv2."""
    return {
        name.lower(): Application(build, sys.modules[build.__module__].preprocess_input)
        for name, build in inspect.getmembers(keras.applications, inspect.isfunction)
    }


def backbone_name(text: str) -> str:
    """An argparse type: the key in `applications` of a backbone named with or without underscores and capitals."""
    name = text.replace("_", "").replace("-", "").lower()
    if name not in applications():
        raise InputError(f"no backbone {text!r} in keras.applications; there are {', '.join(sorted(applications()))}")
    return name


def load_weights(model: keras.Model, path: Path) -> None:
    """Loads a weight file into a model.

    Raises:
        InputError: there is no such file, or it is of another architecture or corrupt.
    """
    if not path.is_file():
        raise InputError(f"--weights {path}: no such file; give a file, {IMAGENET} or {NONE}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns of every layer before it raises the error that counts
            model.load_weights(path)
    except (ValueError, OSError, KeyError, BadZipFile) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--weights {path} does not fit {model.name}: {reason}") from None


def build_backbone(name: str, size: int, weights: str) -> keras.Model:
    """A backbone that ends in global average pooling.

    Args:
        name: key of `applications`.
        size: side of the images in pixels.
        weights: "imagenet" (from Keras' cache or its host), "none" (random), or a weight file's path.

    Returns:
        Model from preprocessed (N, size, size, 3) to features (N, C).

    Raises:
        InputError: the weights cannot be had or do not fit, or the backbone takes no image of this size.
    """
    application = applications()[name]
    initial = IMAGENET if weights == IMAGENET else None
    try:
        model = application.build(include_top=False, weights=initial, input_shape=(size, size, 3), pooling="avg")
    except Exception as error:  # Keras raises a bare Exception where its weight host does not answer
        if initial and "URL fetch failure" in str(error):
            raise InputError(
                f"{error}. Without the network: put the file in Keras' cache (~/.keras/models), or use --weights FILE "
                f"or --weights {NONE}"
            ) from None
        if isinstance(error, ValueError):
            raise InputError(f"{name} with images of {size} pixels: {error}") from None
        raise
    if weights not in (IMAGENET, NONE):
        load_weights(model, Path(weights))
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            # Pretrained statistics stay: those of small batches are worse, and no better before many epochs.
            layer.trainable = weights == NONE
            layer.momentum = BATCHNORM_MOMENTUM
    return model


def build_head(features: int) -> keras.Model:
    """The head of 2018, from features (N, `features`) to probabilities (N, 3) in the order of CLASSES."""
    inputs = keras.Input((features,), name="features")
    x = layers.Dense(HEAD_UNITS, activation="relu", name="dense")(inputs)
    x = layers.Dropout(HEAD_DROPOUT, name="dropout")(x)
    return keras.Model(inputs, layers.Dense(len(CLASSES), activation="softmax", name="classes")(x), name="head")


def extractor(name: str, backbone: keras.Model) -> keras.Model:
    """The backbone behind its own preprocessing: from RGB (N, S, S, 3), 0 to 255, to features (N, C)."""
    photographs = keras.Input(backbone.input_shape[1:], name="photographs")
    return keras.Model(photographs, backbone(applications()[name].preprocess(photographs)), name=f"{name}_features")


def assemble(name: str, backbone: keras.Model, head: keras.Model) -> keras.Model:
    """The whole classifier: from RGB (N, S, S, 3), 0 to 255, to probabilities (N, 3)."""
    photographs = keras.Input(backbone.input_shape[1:], name="photographs")
    probabilities = head(backbone(applications()[name].preprocess(photographs)))
    return keras.Model(photographs, probabilities, name=f"{name}_classifier")
