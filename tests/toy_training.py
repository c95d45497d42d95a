"""Networks of a few weights and data they fit in milliseconds, for tests of the training loop."""

import dataclasses
from pathlib import Path
from typing import Any

from melanoma.training import distributed, loop
from melanoma.training.batches import Batches, BatchOptions
from melanoma.training.callbacks import Draw, TrainingRun
from melanoma.training.checkpoints import Checkpoint

import keras
import numpy as np

HYPERPARAMETERS = loop.Hyperparameters(epochs=3, learning_rate=0.1, ema=0.0, patience=5)


class Follower(distributed.Devices):
    """A process of a distributed job that does not lead."""

    process = 1


def dense(seed: int = 0) -> keras.Model:
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((3,))
    return keras.Model(inputs, keras.layers.Dense(2)(inputs), name="dense")


def dropout() -> keras.Model:
    """Has everything a checkpoint must restore: trained weights, running statistics, a random generator."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    x = keras.layers.BatchNormalization()(keras.layers.Dense(8)(inputs))
    return keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Dropout(0.5)(x)), name="dropout")


def regression(batch_size: int, seed: int | None = None) -> Batches:
    """12 rows of 3 inputs and 2 targets, in random order if there is a seed."""
    rng = np.random.default_rng(0)
    inputs, targets = rng.random((12, 3), np.float32), rng.random((12, 2), np.float32)
    return Batches(inputs, targets, batch_size, BatchOptions(seed=seed))


def negative_mse(truth: keras.KerasTensor, predicted: keras.KerasTensor) -> keras.KerasTensor:
    return -keras.ops.mean(keras.ops.square(truth - predicted), axis=-1)


def checkpoint(folder: Path, **made_with: Any) -> Checkpoint:
    return Checkpoint(folder / "state.npz", made_with)


def draw_nothing(*_: Any) -> None:
    pass


def fit(
    model: keras.Model,
    batches: Batches,
    folder: Path,
    *,
    draw: Draw = draw_nothing,
    devices: distributed.Devices = distributed.ONE,
    validation: Batches | None = None,
    **changes: Any,
) -> loop.TrainingResult:
    """Fits a model with HYPERPARAMETERS, except for the changes; the checkpoint is in the folder."""
    hyperparameters = dataclasses.replace(HYPERPARAMETERS, **changes)
    run = TrainingRun(checkpoint(folder, epochs=hyperparameters.epochs), draw, devices)
    objective = loop.Objective("mse", [negative_mse], "negative_mse")
    return loop.fit(model, batches, validation, objective, hyperparameters, run)


def layer_steps(folder: Path, first_rate: float) -> list[float]:
    """The largest change of each of three layers in one step of Adam with a learning rate of 0.1 for the last layer."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    first = keras.Model(inputs, keras.layers.Dense(4)(keras.layers.Dense(4)(inputs)))  # nested, as backbones are
    model = keras.Model(inputs, keras.layers.Dense(2)(first(inputs)), name="nested")
    before = model.get_weights()
    # The first step of the schedule has half of the learning rate.
    fit(model, regression(12), folder, epochs=1, learning_rate=0.2, first_rate=first_rate)
    changes = [abs(after - start).max() for after, start in zip(model.get_weights(), before, strict=True)]
    return [float(max(changes[place : place + 2])) for place in range(0, len(changes), 2)]  # kernels and biases


def same_weights(one: keras.Model, other: keras.Model) -> bool:
    return all(np.array_equal(*pair) for pair in zip(one.get_weights(), other.get_weights(), strict=True))
