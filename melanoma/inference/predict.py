"""The prediction loop of both networks: batches, test-time augmentation, ensembles, out-of-fold predictions."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from melanoma.cli import hardware
from melanoma.dataset import augment
from melanoma.inference import openvino
from melanoma.log import progress

import keras
import numpy as np

hardware.keep_memory()

BATCHES_PER_BLOCK = 4  # of each model
IMAGE_AXES = (1, 2)  # height and width of (N, H, W, C)


def views_flag(parser: argparse.ArgumentParser) -> None:
    """Adds the flag of test-time augmentation."""
    parser.add_argument(
        "--views",
        type=int,
        choices=augment.VIEW_COUNTS,
        help="test-time augmentation: mean over this many flips and quarter turns of each image; 1: none; default: "
        f"{augment.VIEWS}, or that of networks trained before",
    )


def in_batches(
    compute: Callable[[np.ndarray], np.ndarray], inputs: np.ndarray, batch_size: int, pad: bool
) -> Iterator[np.ndarray]:
    """Outputs for batches of rows; `pad`: whether the last batch is padded to full size for the computation."""
    for start in range(0, len(inputs), batch_size):
        batch = np.asarray(inputs[start : start + batch_size])
        padded = np.resize(batch, (batch_size, *batch.shape[1:])) if pad else batch
        yield np.asarray(compute(padded))[: len(batch)]


def mean_output(
    models: Sequence[openvino.Network], images: np.ndarray, views: int, batch_size: int = sys.maxsize
) -> np.ndarray:
    """Mean output over models and, for test-time augmentation, over several views of each image.

    Args:
        models: each from (N, S, S, 3) to the same shape: vectors (N, C), or maps (N, S, S, C), whose flips and turns
            are undone before averaging.
        images: uint8 (N, S, S, 3).
        views: number of flips and quarter turns of each image, see `augment.some_views`; 1: the image as it is.
        batch_size: images per network call, views counted, at most.

    Returns:
        float32 (N, C) or (N, S, S, C).
    """
    total = np.zeros((len(images), *models[0].output_shape[1:]), np.float32)
    is_map = total.ndim == images.ndim
    used = augment.some_views(views)
    inputs = np.concatenate([augment.flip_rotate(images, view, IMAGE_AXES) for view in used])
    for model in models:
        output = np.concatenate(list(in_batches(model.predict_on_batch, inputs, batch_size, pad=False)))
        outputs = np.split(output, len(used))
        for view, output in zip(used, outputs, strict=True):
            total += augment.undo_flip_rotate(output, view, IMAGE_AXES) if is_map else output
    return total / (len(models) * len(used))


@dataclass
class Predictions:
    """Predictions, one block at a time, and what computes them."""

    inference: openvino.Inference
    blocks: Iterator[np.ndarray]

    def __iter__(self) -> Iterator[np.ndarray]:
        """The remaining blocks."""
        return self.blocks


def predict(
    models: Sequence[keras.Model],
    images: np.ndarray,
    batch_size: int,
    label: str,
    views: int = 1,
    out_of_fold: np.ndarray | None = None,
) -> Predictions:
    """`mean_output` of many images, one block at a time, so that they need not fit in memory together.

    Args:
        models: see `mean_output`.
        images: uint8 (N, S, S, 3), memory-mapped or not.
        batch_size: images per network call, views counted.
        label: name of the work in progress messages.
        views: see `mean_output`.
        out_of_fold: bool (N, number of models), the models whose mean is taken for each image; None: all models.
    """
    models_per_image = 1.0 if out_of_fold is None else float(out_of_fold.mean())
    inference = openvino.Inference(models, len(images) * views * models_per_image)
    return Predictions(inference, _blocks(inference, images, batch_size, label, views, out_of_fold))


def _blocks(
    inference: openvino.Inference,
    images: np.ndarray,
    batch_size: int,
    label: str,
    views: int,
    out_of_fold: np.ndarray | None,
) -> Iterator[np.ndarray]:
    models = inference.networks()
    pad = isinstance(models[0], keras.Model)  # Keras compiles every new batch shape
    images_per_batch = max(1, batch_size // views)  # all views of an image are computed together
    block = BATCHES_PER_BLOCK * batch_size * len(models)
    starts = range(0, len(images), block)
    for start in progress(starts, label, len(starts)):
        part = images[start : start + block]
        masks = np.ones((len(part), len(models)), bool) if out_of_fold is None else out_of_fold[start : start + block]
        result = np.empty((len(part), *models[0].output_shape[1:]), np.float32)
        for mask in np.unique(masks, axis=0):
            rows = np.flatnonzero((masks == mask).all(axis=1))
            used = [model for model, use in zip(models, mask, strict=True) if use]
            compute = partial(mean_output, used, views=views, batch_size=batch_size)
            result[rows] = np.concatenate(list(in_batches(compute, part[rows], images_per_batch, pad)))
        yield result
