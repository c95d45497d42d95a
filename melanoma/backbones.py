"""The backbones of `keras.applications`, for both networks: by name, with weights, and with their preprocessing."""

import argparse
import contextlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melanoma import hardware, normalisation, stages
from melanoma.errors import InputError

import h5py
import keras
import numpy as np
from keras import layers
from keras.applications import imagenet_utils

# Keras' 0.99 and MobileNetV2's 0.999 need hundreds of steps to forget their start; an epoch here may have thirty.
BATCHNORM_MOMENTUM = 0.9
IMAGENET, NONE = "imagenet", "none"
WEIGHT_FILES = (".h5", ".hdf5")  # what `save_weights` of Keras writes, and wrote before Keras 3
WITHOUT = f"use --weights FILE or --weights {NONE}; --pretrained needs none"
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

    Weights are numbers: of a file that holds a whole model, and so perhaps code, nothing is read.

    Raises:
        InputError: there is no such file, or it is no weight file, of another architecture or corrupt, or holds NaN or
            infinity.
    """
    if not path.is_file():
        raise InputError(f"--weights {path}: no such file; give a file, {IMAGENET} or {NONE}")
    if path.suffix not in WEIGHT_FILES:
        raise InputError(f"{path}: the name of a weight file ends in {' or '.join(WEIGHT_FILES)}")
    try:
        with h5py.File(path) as file:
            if "model_config" in file.attrs:
                raise ValueError("it holds a whole model; save_weights of Keras writes weights alone")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns of every layer before it raises the error that counts
            model.load_weights(path)
    except Exception as error:  # a damaged file makes HDF5 and Keras raise nearly anything
        if hardware.advice(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} does not fit {model.name}: {reason}") from None
    check_finite(model, str(path))


def check_finite(model: keras.Model, source: str) -> None:
    """Refuses weights that no training would mend.

    Raises:
        InputError: one is NaN or infinite.
    """
    if not all(np.isfinite(value).all() for value in model.get_weights()):
        raise InputError(f"{source}: weights of {model.name} are NaN or infinite")


@contextlib.contextmanager
def downloads() -> Iterator[list[Path]]:
    """Tells plainly what goes wrong while Keras fetches weights; gives the files that it took, from its cache or host.

    Raises:
        InputError: a file cannot be had, or its checksum is another than the one that Keras knows, if it knows one.
    """
    module: Any = sys.modules[keras.utils.get_file.__module__]
    taken: list[Path] = []

    def fetch(name: str, origin: str, **options: Any) -> str:
        folder = Path(os.environ.get("KERAS_HOME", "~/.keras"), options["cache_subdir"])
        known = options.get("file_hash") or options.get("md5_hash")
        try:
            taken.append(Path(get_file(name, origin, **options)))
        except Exception as error:  # a bare Exception where the host does not answer
            raise InputError(
                f"{error}. Expected: {origin}, {f'with checksum {known}' if known else 'whose checksum is not known'}, "
                f"in {folder}. Put the file there, or {WITHOUT}"
            ) from None
        return str(taken[-1])

    get_file, module.get_file = module.get_file, fetch
    try:
        yield taken
    finally:
        module.get_file = get_file


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
    with downloads() as taken, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that MobileNets' weights for 224 pixels are taken for another size: good
        try:
            model = application.build(include_top=False, weights=initial, input_shape=(size, size, 3), pooling=pooling)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            if taken:
                raise InputError(
                    f"{taken[-1]}, which Keras fetched, is damaged ({error}): delete it and try again, or {WITHOUT}"
                ) from None
            if isinstance(error, ValueError):
                raise InputError(f"{name} with images of {size} pixels: {error}") from None
            raise
    if initial:
        check_finite(model, f"--weights {IMAGENET}")
    elif weights != NONE:
        load_weights(model, Path(weights))
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            # Pretrained statistics stay: those of small batches are worse, and no better before many epochs.
            layer.trainable = weights == NONE
            layer.momentum = BATCHNORM_MOMENTUM
            normalisation.adopt(layer)
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


def flat(model: keras.Model) -> Iterator[keras.Layer]:
    """The layers of a model and of the models in it."""
    for layer in model.layers:
        yield from flat(layer) if isinstance(layer, keras.Model) else (layer,)


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
