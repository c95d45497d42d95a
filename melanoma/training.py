"""The one training loop and the one prediction loop, for both networks and every Keras backend."""

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from melanoma import augment, command, distribution, hardware, inference, plots, stages
from melanoma.checkpoints import Checkpoint, State
from melanoma.command import log
from melanoma.errors import InputError

import joblib
import keras
import numpy as np
import pandas as pd

Draw = Callable[[dict[str, list[float]], list[float], int], None]  # of history, seconds of each epoch, best epoch

THREADS = joblib.cpu_count()  # that prepare batches; OpenCV works outside Python's interpreter lock
BACKGROUND = 10  # niceness of these threads, at least

WARM_UP = 0.05  # of all steps

SECONDS_BETWEEN_LOOKS = 10  # at least, between two saved states of a training, and two drawings of its curves
BATCHES_BETWEEN_LOOKS = 50  # at the loss, which the device has to be waited for

BATCHES = 4  # of each model in a block of predictions
IMAGE_AXES = (1, 2)  # of (N, H, W, C)

hardware.keep_memory()


def step_back() -> None:
    """Lets the device's threads go before the calling one, where the system can: on a CPU a step waits for its slowest.

    Varying photographs takes what the steps leave idle then, not a core from under them. Not for the main thread.
    """
    if sys.platform == "linux" and threading.current_thread() is not threading.main_thread():
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(BACKGROUND, os.getpriority(os.PRIO_PROCESS, thread)))


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

    def skip(self, epochs: int) -> None:
        """Goes on with a later epoch's order and variants."""
        if epochs:
            self.epoch += epochs - 1
            self.on_epoch_end()

    def __len__(self) -> int:
        """Batches per epoch."""
        return math.ceil(len(self.rows) / self.batch_size)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        """One batch of inputs and targets, and loss weights where there are some."""
        first = index * self.batch_size
        return self.part(first, min(first + self.batch_size, len(self.order)))

    def part(self, first: int, end: int) -> tuple[np.ndarray, ...]:
        """The same of the rows from place `first` to before `end` in the epoch's order."""
        rows = self.order[first:end]
        inputs, targets = np.array(self.inputs[rows]), np.array(self.targets[rows])
        if self.vary:
            step_back()
            for place, row in enumerate(rows):
                # A row drawn twice in an epoch is to look different; one that comes once, the same at any batch size.
                key = [self.seed, self.epoch, row] + ([] if self.chances is None else [first + place])
                rng = np.random.default_rng(key)
                mask = targets[place] if self.target_is_mask else None
                inputs[place], varied = augment.vary(inputs[place], rng, mask)
                if varied is not None:
                    targets[place] = varied
        return (inputs, targets) if self.loss_weights is None else (inputs, targets, self.loss_weights[rows])


@dataclass(frozen=True)
class Training:
    """How a training went."""

    history: dict[str, list[float]]  # of each quantity, its value after each epoch; validation's with the prefix val_
    best_epoch: int  # from 1; 0 where no epoch was better than the start
    best: float  # the monitored value of the best epoch
    seconds: list[float]  # that each epoch took


class Keeper(keras.callbacks.Callback):
    """Judges every epoch: keeps the best weights, ends a training that gains no more or went wrong, saves its state.

    Comes after what changes weights between epochs: a state is what the next epoch starts from. In several processes
    each judges alike; what the first one saves, all go on from.
    """

    def __init__(
        self,
        network: keras.Model,
        monitor: str,
        start: float,
        patience: int,
        checkpoint: Checkpoint,
        draw: Draw,
        writes: bool,
    ) -> None:
        """Arguments as of `fit`, with `monitor` as an epoch's logs call it; `writes`: whether to touch files."""
        super().__init__()
        self.network, self.monitor, self.start, self.patience = network, monitor, start, patience
        self.checkpoint, self.draw, self.writes = checkpoint, draw, writes
        self.initial = network.get_weights()
        weights = {id(weight) for weight in network.weights}
        self.seeds = [(one, keras.ops.convert_to_numpy(one)) for one in network.variables if id(one) not in weights]
        self.history: dict[str, list[float]] = {}
        self.seconds: list[float] = []
        self.best: list[np.ndarray] = []
        self.unsaved: State | None = None
        self.last_look = time.monotonic()

    @property
    def variables(self) -> list[keras.Variable]:
        """All that changes while the trainer learns."""
        return [*self.model.variables, *self.model.optimizer.variables]

    def gains(self, history: dict[str, list[float]]) -> list[float]:
        """The monitored value of each epoch; lowest where it is no number."""
        return [-math.inf if math.isnan(value) else value for value in history.get(self.monitor, [])]

    def best_epoch(self, history: dict[str, list[float]]) -> int:
        """The epoch with the highest monitored value, from 1; 0 where none is higher than the start."""
        gains = self.gains(history)
        highest = max(gains, default=-math.inf)
        return 1 + gains.index(highest) if highest > self.start else 0

    def resume(self, state: State) -> None:
        """Takes up a training where it was.

        Raises:
            InputError: the state has another number of variables, as of other versions of the packages.
        """
        self.history, self.seconds, self.best = state.history, state.seconds, state.best
        if state.variables and len(state.variables) != len(self.variables):
            raise InputError(
                f"{self.checkpoint.path} does not fit the network of these packages: --restart trains anew"
            )
        for variable, value in zip(self.variables if state.variables else (), state.variables, strict=True):
            variable.assign(value)

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Notes what the epoch before has led to; looks at the clock."""
        if self.seconds:
            variables = [keras.ops.convert_to_numpy(variable) for variable in self.variables]
            self.unsaved = State(self.history, self.seconds, variables=variables, best=self.best)
            if time.monotonic() >= self.last_look + SECONDS_BETWEEN_LOOKS:
                self.save()
        self.started = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Looks now and then whether the mean loss is still a number, so as not to waste the rest of a long epoch."""
        if batch % BATCHES_BETWEEN_LOOKS == 0:
            self.check_loss((logs or {})["loss"])

    def check_loss(self, loss: float) -> None:
        """Raises InputError where it is no number."""
        if not math.isfinite(loss):
            kept = f"; the state before that epoch stays in {self.checkpoint.path}" if self.seconds else ""
            raise InputError(
                f"the loss became {float(loss)} in epoch {len(self.seconds) + 1}: train anew with --restart and a "
                f"lower --learning-rate{kept}"
            )

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Judges the epoch."""
        logs = logs or {}
        self.check_loss(logs["loss"])
        weights = self.network.get_weights()
        if not all(np.isfinite(array).all() for array in weights):
            self.check_loss(math.nan)
        # New lists: the state that is kept holds the old ones.
        self.history = {name: [*self.history.get(name, []), float(value)] for name, value in logs.items()}
        self.seconds = [*self.seconds, time.perf_counter() - self.started]
        if self.best_epoch(self.history) == len(self.seconds):
            self.best = weights
        gains = self.gains(self.history)
        self.model.stop_training = len(gains) - 1 - gains.index(max(gains)) >= self.patience

    def save(self) -> None:
        """Writes the state of the last whole epoch, where it is not there yet, and draws the curves."""
        if self.unsaved and self.writes:
            self.checkpoint.save(self.unsaved)
            history = self.unsaved.history
            self.draw(history, self.unsaved.seconds, self.best_epoch(history))
        self.unsaved, self.last_look = None, time.monotonic()

    def finish(self) -> None:
        """Gives the network its best epoch's weights, or back those that it came with; nothing else is left to keep.

        Its random generators are as before: what is trained next does not depend on an interruption.
        """
        self.network.set_weights(self.best or self.initial)
        for seed, value in self.seeds:
            seed.assign(value)
        self.unsaved = State(self.history, self.seconds, finished=True, best=self.best)
        self.save()


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
    checkpoint: Checkpoint,
    draw: Draw,
    start: float = -math.inf,
    devices: distribution.Devices = distribution.ONE,
) -> Training:
    """Trains with Adam and the rates of `schedule`; the model ends with its best epoch's weights.

    A training that was interrupted goes on after its last saved epoch and ends with the very weights that it would have
    had; on a GPU as far as the device repeats itself.

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
        checkpoint: where the state is kept meanwhile.
        draw: shows how it goes, see `record`; while it trains too.
        start: the monitored value of the model as it comes; weights that are worse are not kept.
        devices: that train; where they are those of several processes, all end with the same weights, and the first
            alone saves them.

    Raises:
        InputError: the loss or a weight became NaN or infinite, or the checkpoint is not of this training.
    """
    monitor = f"val_{monitor}" if validation else monitor
    rates = schedule(learning_rate, epochs * len(train))
    keeper = Keeper(model, monitor, start, patience, checkpoint, draw, writes=devices.leads)
    state = checkpoint.load()
    with devices.trainer(model, train, validation) as (trainer, own_train, own_validation, bring_back):
        optimizer = keras.optimizers.Adam(rates, use_ema=averaging > 0, ema_momentum=averaging or None)
        # Variables belong to the devices where they are made: those of metrics are made anew.
        made_here = [type(one).from_config(one.get_config()) if hasattr(one, "get_config") else one for one in metrics]
        trainer.compile(optimizer, loss=loss, metrics=made_here)
        average = [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)] if averaging else []
        keeper.set_model(trainer)
        if unfinished := not (state and state.finished):
            # Before Keras does it from a batch that it draws: what its threads prepare meanwhile would open the epoch.
            trainer._symbolic_build(data_batch=own_train[0])
        if state:
            keeper.resume(state)
            train.skip(len(state.seconds))
            how = "goes on after" if unfinished else "was trained already, up to"
            log.info("%s: %s epoch %d, from %s", model.name, how, len(state.seconds), checkpoint.path)
        if unfinished:
            try:
                trainer.fit(
                    own_train,
                    validation_data=own_validation,
                    epochs=epochs,
                    initial_epoch=len(keeper.seconds),
                    shuffle=False,  # Batches draws its own order
                    verbose=(1 if sys.stdout.isatty() else 2) if devices.leads else 0,
                    callbacks=[*average, *bring_back, keeper],
                )
            except (KeyboardInterrupt, InputError):
                keeper.save()
                raise
    keeper.finish()
    best_epoch = keeper.best_epoch(keeper.history)
    best = max(keeper.gains(keeper.history)) if best_epoch else start
    ended = f"; ended after {patience} epochs without a gain" if len(keeper.seconds) < epochs else ""
    log.info("%s: best %s %.4f, after epoch %d of %d%s", model.name, monitor, best, best_epoch, epochs, ended)
    return Training(keeper.history, best_epoch, best, keeper.seconds)


def record(
    stem: Path,
    names: dict[str, str],
    title: str,
    history: dict[str, list[float]],
    seconds: list[float],
    best_epoch: int,
) -> None:
    """Writes {stem}_history.csv, a line for each epoch, and {stem}_curves.png; see `plots.training_curves`."""
    table = pd.DataFrame({"epoch": range(1, len(seconds) + 1), "seconds": seconds, **history})
    stages.write_text(stem.with_name(f"{stem.name}_history.csv"), table.to_csv(index=False))
    plots.training_curves(stem.with_name(f"{stem.name}_curves.png"), names, title, history, best_epoch)


def in_batches(
    compute: Callable[[np.ndarray], np.ndarray], inputs: np.ndarray, batch_size: int, fill: bool
) -> Iterator[np.ndarray]:
    """What a network gives for batches of rows; `fill`: whether the last one is filled up, and cut after."""
    for start in range(0, len(inputs), batch_size):
        batch = np.asarray(inputs[start : start + batch_size])
        filled = np.resize(batch, (batch_size, *batch.shape[1:])) if fill else batch
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
    fill = isinstance(models[0], keras.Model)  # which compiles each new shape of a batch anew
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
            result[rows] = np.concatenate(list(in_batches(compute, part[rows], batch_size, fill)))
        yield result
