"""The backbones of `keras.applications`, for both networks: by name, with weights, and with their preprocessing."""

import argparse
import inspect
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

from melanoma import stages
from melanoma.errors import InputError

import keras
from keras import layers
from keras.applications import imagenet_utils

# Keras' 0.99 and MobileNetV2's 0.999 need hundreds of steps to forget their start; an epoch here may have thirty.
BATCHNORM_MOMENTUM = 0.9
IMAGENET, NONE = "imagenet", "none"
SCALINGS = ("caffe", "tf", "torch")  # Keras' names: BGR less its mean; -1 to 1; RGB standardised


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


def name_of(text: str) -> str:
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


def build(name: str, size: int, weights: str, pooling: str | None = None) -> keras.Model:
    """A backbone without its classifier.

    Args:
        name: key of `applications`.
        size: side of the images in pixels.
        weights: "imagenet" (from Keras' cache or its host), "none" (random), or a weight file's path.
        pooling: "avg" ends it in global average pooling; None in feature maps.

    Returns:
        Model from preprocessed (N, size, size, 3) to features, (N, C) or (N, H, W, C).

    Raises:
        InputError: the weights cannot be had or do not fit, or the backbone takes no image of this size.
    """
    application = applications()[name]
    initial = IMAGENET if weights == IMAGENET else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that MobileNets' weights for 224 pixels are taken for another size: good
            model = application.build(include_top=False, weights=initial, input_shape=(size, size, 3), pooling=pooling)
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


def preprocess(name: str, photographs: keras.KerasTensor, scaling: str | None = None) -> keras.KerasTensor:
    """RGB, 0 to 255, as the weights of a backbone expect it.

    Args:
        name: key of `applications`.
        photographs: (N, S, S, 3).
        scaling: one of SCALINGS, where the weights were not trained with Keras' own for this backbone.
    """
    if scaling:
        return imagenet_utils.preprocess_input(photographs, mode=scaling)
    return applications()[name].preprocess(photographs)


def flags(parser: argparse.ArgumentParser, backbone: str, note: str = "") -> None:
    """Adds --backbone, --weights and --scaling."""
    parser.add_argument("--backbone", type=name_of, default=backbone, help=f"any model of keras.applications{note}")
    parser.add_argument("--weights", default=IMAGENET, help=f"of the backbone: {IMAGENET}, {NONE}, or a file")
    parser.add_argument(
        "--scaling",
        choices=SCALINGS,
        help="of colours, where a weight file was not trained with Keras' own for its backbone: "
        "torch for weights that come from torchvision",
    )


def digest(weights: str) -> str:
    """What tells one set of initial weights from another: a file's SHA-256, or the flag itself."""
    return stages.sha256(Path(weights)) if Path(weights).is_file() else weights
