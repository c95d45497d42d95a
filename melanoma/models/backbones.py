"""The backbones, most of them of `keras.applications`: by name, with weights, and with their preprocessing."""

import argparse
import contextlib
import inspect
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from melanoma.artifacts.atomic import sha256
from melanoma.cli import hardware
from melanoma.errors import InputError
from melanoma.models import efficientnet_lite
from melanoma.models.fused_batchnorm import fuse_batchnorm

import h5py
import keras
import numpy as np
from keras import layers
from keras.applications import imagenet_utils
from keras.src.utils.naming import to_snake_case

# Keras' 0.99 and MobileNetV2's 0.999 need hundreds of steps to forget the initial statistics; an epoch may have thirty.
BATCHNORM_MOMENTUM = 0.9
IMAGENET, NONE = "imagenet", "none"
BACKBONE = "layers/functional"  # group of the backbone in the weight file of a classifier or U-Net
KERAS_2 = "layer_names"  # attribute of the weight files of Keras 2
WEIGHT_FILES = (".h5", ".hdf5")  # endings of the files that `save_weights` writes in Keras 3, and in Keras 2
WITHOUT_DOWNLOAD = f"use --weights FILE or --weights {NONE}; --pretrained needs none"
SCALINGS = ("caffe", "tf", "torch")  # Keras' names: BGR minus its mean; -1 to 1; standardised RGB


@dataclass(frozen=True)
class Application:
    """A backbone: its constructor, and the preprocessing of RGB in [0, 255]."""

    build: Callable[..., keras.Model]
    preprocess: Callable[[keras.KerasTensor], keras.KerasTensor]


def applications() -> dict[str, Application]:
    """All backbones of `keras.applications` by lower-case name, e.g. mobilenetv2, and those that it lacks."""
    known = {
        name.lower(): Application(build, sys.modules[build.__module__].preprocess_input)
        for name, build in inspect.getmembers(keras.applications, inspect.isfunction)
    }
    mobilenet = Application(partial(keras.applications.MobileNet, alpha=0.75), known["mobilenet"].preprocess)
    lite = {
        f"efficientnetlite{variant}": Application(
            partial(efficientnet_lite.build, variant), efficientnet_lite.preprocess_input
        )
        for variant in efficientnet_lite.WIDTH_AND_DEPTH
    }
    return known | lite | {"mobilenet0.75": mobilenet}


def backbone_name(text: str) -> str:
    """The key in `applications` of a backbone, spelled with or without underscores, hyphens and capitals.

    An argparse type.

    Raises:
        InputError: there is no such backbone.
    """
    name = text.replace("_", "").replace("-", "").lower()
    if name not in applications():
        raise InputError(f"no backbone {text!r}; use one of {', '.join(sorted(applications()))}")
    return name


def load_weights(model: keras.Model, path: Path, group: str = "") -> None:
    """Loads a weight file into a model.

    Only weights are loaded; full saved models are refused because they can contain code.

    Args:
        model: whose weights are replaced.
        path: file written by `save_weights`.
        group: of a larger network in whose file the model's weights may be, e.g. BACKBONE; files without this group are
            of the model itself.

    Raises:
        InputError: the file is missing, is not a weight file of this architecture, is damaged, or holds NaN or
            infinity.
    """
    if not path.is_file():
        raise InputError(f"--weights {path}: no such file; give a file, {IMAGENET} or {NONE}")
    if path.suffix not in WEIGHT_FILES:
        raise InputError(f"{path}: the name of a weight file ends in {' or '.join(WEIGHT_FILES)}")
    try:
        with h5py.File(path) as file:
            if "model_config" in file.attrs:
                raise ValueError("it holds a full model; save only the weights, with Keras' save_weights")
            if KERAS_2 in file.attrs:
                model.load_weights(path)
            else:
                assign_weights(model, file.get(group) or file)
    except Exception as error:  # HDF5 and Keras raise nearly any exception on a damaged file
        if hardware.advice(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} does not fit {model.name}: {reason}") from None
    check_finite(model, str(path))


def assign_weights(model: keras.Model, group: h5py.Group) -> None:
    """Loads what Keras 3 saved of a model, 2.7 times as fast as `keras.Model.load_weights` does.

    Keras looks for further layers in all attributes of each layer; the layers of the backbones contain none.

    Args:
        model: whose weights are replaced.
        group: has a group `layers` with one group per layer, named after its class and numbered among those of it.

    Raises:
        ValueError, KeyError: the weights are of another architecture.
    """
    counts = Counter[str]()
    for layer in model.layers:
        kind = to_snake_case(type(layer).__name__)
        path = f"layers/{kind}_{counts[kind]}" if counts[kind] else f"layers/{kind}"
        counts[kind] += 1
        if isinstance(layer, keras.Model):
            assign_weights(layer, group[path])
        elif layer.weights:
            layer.load_own_variables(group[f"{path}/vars"])


def check_finite(model: keras.Model, source: str) -> None:
    """Refuses weights with which no training could succeed.

    Args:
        model: whose weights to check.
        source: where the weights come from, for the message.

    Raises:
        InputError: a weight is NaN or infinite.
    """
    if not all(np.isfinite(value).all() for value in model.get_weights()):
        raise InputError(f"{source}: weights of {model.name} are NaN or infinite")


@contextlib.contextmanager
def downloads() -> Iterator[list[Path]]:
    """Inside this context, a failed download of Keras weights becomes an error message that says what to do.

    `keras.applications` has no hook for it, so `keras.utils.get_file` is replaced for the duration of the context.

    Yields:
        Paths of the weight files that Keras has taken so far, from its cache or from the network.

    Raises:
        InputError: a file cannot be downloaded, or its checksum differs from the one that Keras knows.
    """
    module: Any = sys.modules[keras.utils.get_file.__module__]
    taken: list[Path] = []

    def get_file_or_explain(name: str, origin: str, **options: Any) -> str:
        folder = Path(os.environ.get("KERAS_HOME", "~/.keras"), options["cache_subdir"])
        checksum = options.get("file_hash") or options.get("md5_hash")
        expected = f"with checksum {checksum}" if checksum else "whose checksum is not known"
        try:
            taken.append(Path(get_file(name, origin, **options)))
        except Exception as error:  # Keras raises a bare Exception if the host does not answer
            raise InputError(
                f"{error}. Expected: {origin}, {expected}, in {folder}. Put the file there, or {WITHOUT_DOWNLOAD}"
            ) from None
        return str(taken[-1])

    get_file, module.get_file = module.get_file, get_file_or_explain
    try:
        yield taken
    finally:
        module.get_file = get_file


def build(
    name: str, size: int, weights: str, pooling: str | None = None, train_batchnorm: bool | None = None
) -> keras.Model:
    """A backbone without its classifier.

    Args:
        name: key of `applications`.
        size: side of the images in pixels.
        weights: "imagenet" (from Keras' cache, or downloaded), "none" (random), or the path of a weight file: of the
            backbone, or of a classifier or segmentation network of this project that contains it.
        pooling: "avg" appends global average pooling; None returns feature maps.
        train_batchnorm: whether its batch normalisation is trained; None: only if the weights are random, because
            statistics of small batches are worse than the pretrained ones.

    Returns:
        Model from preprocessed images (N, size, size, 3) to features, (N, C) or (N, H, W, C).

    Raises:
        InputError: the weights are not available or do not fit, or the images are too small for the backbone.
    """
    model = _build_application(name, size, weights == IMAGENET, pooling)
    fuse_batchnorm(flatten_layers(model))
    if weights == IMAGENET:
        check_finite(model, f"--weights {IMAGENET}")
    elif weights != NONE:
        load_weights(model, Path(weights), BACKBONE)
    set_batchnorm(model, weights == NONE if train_batchnorm is None else train_batchnorm)
    return model


def set_batchnorm(model: keras.Model, trained: bool) -> None:
    """Sets whether the batch normalisation of a backbone is trained, and its momentum."""
    for layer in flatten_layers(model):
        if isinstance(layer, layers.BatchNormalization):
            layer.trainable = trained
            layer.momentum = BATCHNORM_MOMENTUM


def _build_application(name: str, size: int, imagenet: bool, pooling: str | None) -> keras.Model:
    """The model as Keras builds it; arguments and errors as for `build`."""
    with downloads() as taken, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MobileNet warns that its weights are from 224 pixels, which is intended
        try:
            return applications()[name].build(
                include_top=False,
                weights=IMAGENET if imagenet else None,
                input_shape=(size, size, 3),
                pooling=pooling,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            if taken:
                raise InputError(
                    f"{taken[-1]}, which Keras downloaded, is damaged ({error}): delete it and try again, or "
                    f"{WITHOUT_DOWNLOAD}"
                ) from None
            if isinstance(error, ValueError):
                raise InputError(f"{name} with images of {size} pixels: {error}") from None
            raise


def preprocess(name: str, images: keras.KerasTensor, scaling: str | None = None) -> keras.KerasTensor:
    """Scales RGB in [0, 255] to what the weights of a backbone expect.

    Args:
        name: key of `applications`.
        images: (N, S, S, 3).
        scaling: one of SCALINGS, for weights that were not trained with Keras' scaling for this backbone; None: Keras'.
    """
    if scaling:
        return imagenet_utils.preprocess_input(images, mode=scaling)
    return applications()[name].preprocess(images)


def flatten_layers(model: keras.Model) -> Iterator[keras.Layer]:
    """The layers of a model, and of the models nested in it."""
    for layer in model.layers:
        yield from flatten_layers(layer) if isinstance(layer, keras.Model) else (layer,)


def weights_fingerprint(weights: str) -> str:
    """Identifies initial weights: the SHA-256 of the file if `weights` is one, otherwise `weights` itself."""
    return sha256(Path(weights)) if Path(weights).is_file() else weights


def add_flags(parser: argparse.ArgumentParser, backbone: str | None, note: str = "") -> None:
    """Adds --backbone, --weights and --scaling to a parser.

    Args:
        parser: to extend.
        backbone: default of --backbone.
        note: added to the help of --backbone.
    """
    parser.add_argument(
        "--backbone",
        type=backbone_name,
        default=backbone,
        help=f"any model of keras.applications, mobilenet_0.75 or efficientnet_lite0 to 4{note}",
    )
    parser.add_argument(
        "--weights",
        default=IMAGENET,
        help=f"initial weights of the backbone: {IMAGENET}, {NONE}, or a file, "
        "also of a classifier or U-Net trained here",
    )
    parser.add_argument(
        "--scaling",
        choices=SCALINGS,
        help="scaling of colours, for weight files that were not trained with Keras' scaling; torch for those of "
        "torchvision",
    )
