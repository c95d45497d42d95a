"""The one training loop and the one prediction loop, for both networks and every Keras backend."""

import ctypes
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from melanoma import augment, command, inference
from melanoma.command import log
from melanoma.errors import InputError

import keras
import numpy as np

THREADS = os.cpu_count() or 1  # batches prepared at once; Pillow's warps run outside Python's interpreter lock

WARM_UP = 0.05  # of all steps

BATCHES = 4  # of each model in a block of predictions
IMAGE_AXES = (1, 2)  # of (N, H, W, C)

# glibc's mallopt (man 3 mallopt). TensorFlow on a CPU frees and requests its large arrays at every step; glibc gives
# them back to the system each time, and faulting the pages in again took 40 % of the time. Kept instead, a step of unet
# at 160 pixels took 0.58 s in place of 0.95 to 1.4.
MALLOC = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_ARENA_MAX": (-8, 1)}
if platform.libc_ver()[0] == "glibc":
    for parameter, value in MALLOC.values():
        ctypes.CDLL(None).mallopt(parameter, value)


class Batches(keras.utils.PyDataset):
    """Batches of rows and their targets, in a new random order each epoch when `seed` is given.

    What a row looks like in an epoch depends on seed, epoch, row and, where rows are drawn, its place in the order, not
    on threads or batch size.
    """

    def __init__(
        self,
        inputs: np.ndarray,
        targets: np.ndarray,
        batch_size: int,
        *,
        rows: np.ndarray | None = None,
        seed: int | None = None,
        vary: bool = False,
        target_is_mask: bool = False,
        chances: np.ndarray | None = None,
        loss_weights: np.ndarray | None = None,
    ) -> None:
        """Sets the batches up.

        Args:
            inputs: (N, ...), memory-mapped or not.
            targets: (N, ...).
            batch_size: rows of a batch; the last one may be smaller.
            rows: which to use, int; None: all.
            seed: of order and variants; None keeps the order.
            vary: whether images come as random variants; needs a seed.
            target_is_mask: whether the targets are masks, to be varied through the same geometry.
            chances: float (N,), from 0; an epoch draws as many rows as there are, with replacement, by these chances.
                Needs a seed. None: each row comes once.
            loss_weights: float (N,), what each row's loss counts; None: all the same.
        """
        super().__init__(workers=THREADS if vary else 1, use_multiprocessing=False, max_queue_size=2 * THREADS)
        self.inputs, self.targets, self.batch_size = inputs, targets, batch_size
        self.rows = np.arange(len(inputs)) if rows is None else rows
        self.seed, self.vary, self.target_is_mask = seed, vary, target_is_mask
        self.chances, self.loss_weights = chances, loss_weights
        self.epoch = -1
        self.on_epoch_end()

    def on_epoch_end(self) -> None:
        """Draws the order of the next epoch."""
        self.epoch += 1
        self.order = self.rows.copy()
        if self.seed is None:
            return
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.chances is None:
            rng.shuffle(self.order)
        else:
            chances = self.chances[self.rows]
            self.order = rng.choice(self.rows, len(self.rows), p=chances / chances.sum())

    def __len__(self) -> int:
        """Batches per epoch."""
        return math.ceil(len(self.rows) / self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        """One batch of inputs and targets, and loss weights where there are some."""
        first = index * self.batch_size
        rows = self.order[first : first + self.batch_size]
        inputs, targets = np.array(self.inputs[rows]), np.array(self.targets[rows])
        if self.vary:
            for place, row in enumerate(rows):
                # A row drawn twice in an epoch is to look different; one that comes once, the same at any batch size.
                key = [self.seed, self.epoch, row] + ([] if self.chances is None else [first + place])
                rng = np.random.default_rng(key)
                mask = targets[place] if self.target_is_mask else None
                inputs[place], varied = augment.vary(inputs[place], rng, mask)
                if varied is not None:
                    targets[place] = varied
        return (inputs, targets) if self.loss_weights is None else (inputs, targets, self.loss_weights[rows])


class KeepBest(keras.callbacks.Callback):
    """Saves the weights whenever the monitored value is the highest so far; stops where the loss is no number.

    Notes the seconds that each epoch takes, validation included.
    """

    def __init__(self, monitor: str, start: float, save: Callable[[], Path]) -> None:
        """Takes the key of the monitored value, its value before the first epoch, and what saves the weights."""
        super().__init__()
        self.monitor, self.best, self.save = monitor, start, save
        self.best_epoch = 0
        self.path: Path | None = None
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Looks at the clock."""
        self.started = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Judges the epoch."""
        logs = logs or {}
        self.seconds.append(time.perf_counter() - self.started)
        if not math.isfinite(logs["loss"]):
            raise InputError(
                f"the loss became {logs['loss']} in epoch {epoch + 1}: try a lower --learning-rate; "
                "the weights saved before are kept"
            )
        if logs[self.monitor] > self.best:
            self.best, self.best_epoch = logs[self.monitor], epoch + 1
            self.path = self.save()


@dataclass(frozen=True)
class Training:
    """How a training went."""

    history: dict[str, list[float]]  # of each quantity, its value after each epoch; validation's with the prefix val_
    best_epoch: int  # from 1; 0 where no epoch was better than the start
    best: float  # the monitored value of the best epoch
    seconds: list[float]  # that each epoch took


def schedule(highest: float, steps: int) -> keras.optimizers.schedules.LearningRateSchedule:
    """A learning rate that rises over the first WARM_UP of the steps, and falls to 0 with the last along a cosine."""
    warm_up = max(1, round(WARM_UP * steps))
    return keras.optimizers.schedules.CosineDecay(
        highest / (warm_up + 1), max(1, steps - warm_up), warmup_target=highest, warmup_steps=warm_up
    )


def fit(
    model: keras.Model,
    train: Batches,
    validation: Batches | None,
    *,
    loss: Any,
    metrics: list[Any],
    monitor: str,
    epochs: int,
    learning_rate: float,
    averaging: float,
    patience: int,
    save: Callable[[], Path],
    start: float = -math.inf,
) -> Training:
    """Trains with Adam and the rates of `schedule`; the model ends with its best epoch's weights.

    Args:
        model: uncompiled, so that its weight file holds no optimizer.
        train: training batches.
        validation: what chooses the best epoch; without it the training value does.
        loss: Keras loss.
        metrics: Keras metrics.
        monitor: name of the metric to maximise.
        epochs: at most this many.
        learning_rate: the highest.
        averaging: momentum of the moving average of weights that validation judges and that is kept; 0: the weights
            themselves.
        patience: epochs without a higher value than this training's highest after which it ends.
        save: writes the model's weights and returns where.
        start: the monitored value of the model as it comes; weights that are worse are not kept.

    Raises:
        InputError: the loss became NaN or infinite.
    """
    monitor = f"val_{monitor}" if validation else monitor
    trainer = keras.Model(model.inputs, model.outputs)
    rates = schedule(learning_rate, epochs * len(train))
    optimizer = keras.optimizers.Adam(rates, use_ema=averaging > 0, ema_momentum=averaging or None)
    trainer.compile(optimizer, loss=loss, metrics=metrics)
    average = [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)] if averaging else []
    keeper = KeepBest(monitor, start, save)
    initial = model.get_weights()
    history = trainer.fit(
        train,
        validation_data=validation,
        epochs=epochs,
        shuffle=False,  # Batches draws its own order
        verbose=1 if sys.stdout.isatty() else 2,
        callbacks=[*average, keeper, keras.callbacks.EarlyStopping(monitor, mode="max", patience=patience)],
    ).history
    if keeper.path:
        model.load_weights(keeper.path)
    else:
        model.set_weights(initial)
        save()
    log.info("%s: best %s %.4f, after epoch %d of %d", model.name, monitor, keeper.best, keeper.best_epoch, epochs)
    values = {key: [float(value) for value in values] for key, values in history.items()}
    return Training(values, keeper.best_epoch, float(keeper.best), keeper.seconds)


def in_batches(
    compute: Callable[[np.ndarray], np.ndarray], inputs: np.ndarray, batch_size: int
) -> Iterator[np.ndarray]:
    """What a network gives for batches of rows; the last one is filled up, since a new shape would be compiled anew."""
    for start in range(0, len(inputs), batch_size):
        batch = np.asarray(inputs[start : start + batch_size])
        filled = np.resize(batch, (batch_size, *batch.shape[1:]))
        yield np.asarray(compute(filled))[: len(batch)]


def mean_output(models: Sequence[inference.Network], images: np.ndarray, turns: bool) -> np.ndarray:
    """The mean over models, and over the 8 flips and quarter turns of the images where asked.

    Args:
        models: each from (N, S, S, 3) to the same shape: values (N, C), or maps (N, S, S, C), which are turned back.
        images: uint8 (N, S, S, 3).
        turns: whether to look at turned views; eight times the work.

    Returns:
        float32 (N, C) or (N, S, S, C).
    """
    total = np.zeros((len(images), *models[0].output_shape[1:]), np.float32)
    maps, variants = total.ndim == images.ndim, range(augment.TURNS if turns else 1)
    for variant in variants:
        view = np.ascontiguousarray(augment.turned(images, variant, IMAGE_AXES))
        for model in models:
            found = np.asarray(model.predict_on_batch(view))
            total += augment.turned_back(found, variant, IMAGE_AXES) if maps else found
    return total / (len(models) * len(variants))


@dataclass
class Predictions:
    """Predictions, a block at a time, and what computes them."""

    inference: inference.Inference
    blocks: Iterator[np.ndarray]

    def __iter__(self) -> Iterator[np.ndarray]:
        """The blocks that have not come yet."""
        return self.blocks


def predict(
    models: Sequence[keras.Model],
    images: np.ndarray,
    batch_size: int,
    label: str,
    turns: bool = False,
    own: np.ndarray | None = None,
) -> Predictions:
    """`mean_output` of many images, a block at a time, so that they need not fit in memory together.

    Args:
        models: see `mean_output`.
        images: see there; memory-mapped or not.
        batch_size: images that a network sees at a time.
        label: names the work in its progress.
        turns: see `mean_output`.
        own: bool (N, number of models), whose mean counts for each image; None: all models' for every image.
    """
    views = len(images) * (augment.TURNS if turns else 1) * (1.0 if own is None else float(own.mean()))
    chosen = inference.Inference(models, views)
    return Predictions(chosen, _blocks(chosen, images, batch_size, label, turns, own))


def _blocks(
    chosen: inference.Inference,
    images: np.ndarray,
    batch_size: int,
    label: str,
    turns: bool,
    own: np.ndarray | None,
) -> Iterator[np.ndarray]:
    """What `predict` gives."""
    models = chosen.networks()
    block = BATCHES * batch_size * len(models)
    starts = range(0, len(images), block)
    for start in command.progress(starts, label, len(starts)):
        part = images[start : start + block]
        shares = np.ones((len(part), len(models)), bool) if own is None else own[start : start + block]
        result = np.empty((len(part), *models[0].output_shape[1:]), np.float32)
        for share in np.unique(shares, axis=0):
            rows = np.flatnonzero((shares == share).all(axis=1))
            counting = [model for model, counts in zip(models, share, strict=True) if counts]
            compute = partial(mean_output, counting, turns=turns)
            result[rows] = np.concatenate(list(in_batches(compute, part[rows], batch_size)))
        yield result
