"""The training loop of both networks, on every Keras backend, on one device or several."""

import sys
from dataclasses import dataclass
from typing import Any

from melanoma.cli import hardware
from melanoma.errors import InputError
from melanoma.log import log
from melanoma.training.batches import Batches
from melanoma.training.callbacks import CheckpointCallback, TrainingRun

import keras

hardware.keep_memory()

WARM_UP = 0.05  # fraction of all steps


@dataclass(frozen=True)
class Objective:
    """What training optimises, and what chooses the best epoch."""

    loss: Any  # Keras loss
    metrics: list[Any]  # Keras metrics
    monitor: str  # name of the metric to maximise: on validation where there is any, else on training


@dataclass(frozen=True)
class Hyperparameters:
    """How long and how fast a network is trained."""

    epochs: int  # at most
    learning_rate: float  # peak of `schedule`
    ema: float  # momentum of the weight EMA that is evaluated and kept; 0: no EMA
    patience: int  # epochs without a new best value after which training stops


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of a training run."""

    history: dict[str, list[float]]  # values after each epoch by metric; those of validation with the prefix val_
    best_epoch: int  # from 1; 0 if no epoch was better than the start
    best: float  # the monitored value of the best epoch
    seconds: list[float]  # duration of each epoch


def schedule(peak: float, steps: int) -> keras.optimizers.schedules.LearningRateSchedule:
    """Linear warm-up to the peak learning rate over the first WARM_UP of the steps, then cosine decay to 0."""
    warm_up = max(1, round(WARM_UP * steps))
    return keras.optimizers.schedules.CosineDecay(
        peak / (warm_up + 1), max(1, steps - warm_up), warmup_target=peak, warmup_steps=warm_up
    )


def fit(
    model: keras.Model,
    train: Batches,
    validation: Batches | None,
    objective: Objective,
    hyperparameters: Hyperparameters,
    run: TrainingRun,
) -> TrainingResult:
    """Trains with Adam; the model ends with the weights of its best epoch.

    Interrupted training continues after its last saved epoch and ends with exactly the weights of uninterrupted
    training, on a GPU as far as the device is deterministic.

    Args:
        model: uncompiled, so that its weight file holds no optimizer state.
        train: training batches.
        validation: chooses the best epoch; None: the training metric does.
        objective: loss, metrics and monitored metric.
        hyperparameters: epochs, learning rate, EMA, patience.
        run: checkpoint, plots and devices. Several processes all end with the same weights; only the first saves them.

    Raises:
        InputError: the loss or a weight became NaN or infinite, or the checkpoint belongs to another training run.
    """
    monitor = f"val_{objective.monitor}" if validation else objective.monitor
    callback = CheckpointCallback(model, monitor, hyperparameters.patience, run)
    state = run.checkpoint.load()
    with run.devices.trainer(model, train, validation) as (trainer, device_train, device_validation, copy_back):
        _compile(trainer, objective, hyperparameters, steps=hyperparameters.epochs * len(train))
        callback.set_model(trainer)
        finished = state is not None and state.finished
        if not finished:
            # Otherwise Keras builds it from a batch it draws, and the threads that prepare batches start the epoch.
            trainer._symbolic_build(data_batch=device_train[0])
        if state:
            callback.resume(state)
            train.skip(len(state.seconds))
            what = "already trained, up to" if finished else "resuming after"
            log.info("%s: %s epoch %d, from %s", model.name, what, len(state.seconds), run.checkpoint.path)
        if not finished:
            average = [keras.callbacks.SwapEMAWeights(swap_on_epoch=True)] if hyperparameters.ema else []
            try:
                trainer.fit(
                    device_train,
                    validation_data=device_validation,
                    epochs=hyperparameters.epochs,
                    initial_epoch=len(callback.seconds),
                    shuffle=False,  # Batches has its own order
                    verbose=(1 if sys.stdout.isatty() else 2) if run.devices.leads else 0,
                    callbacks=[*average, *copy_back, callback],
                )
            except (KeyboardInterrupt, InputError):
                callback.save()
                raise
    callback.finish()
    return _result(model.name, monitor, hyperparameters, callback)


def _compile(trainer: keras.Model, objective: Objective, hyperparameters: Hyperparameters, steps: int) -> None:
    optimizer = keras.optimizers.Adam(
        schedule(hyperparameters.learning_rate, steps),
        use_ema=hyperparameters.ema > 0,
        ema_momentum=hyperparameters.ema or None,
    )
    # Metrics must be created here: variables belong to the devices where they are created.
    metrics = [
        type(metric).from_config(metric.get_config()) if hasattr(metric, "get_config") else metric
        for metric in objective.metrics
    ]
    trainer.compile(optimizer, loss=objective.loss, metrics=metrics)


def _result(name: str, monitor: str, hyperparameters: Hyperparameters, callback: CheckpointCallback) -> TrainingResult:
    best_epoch = callback.best_epoch(callback.history)
    best = max(callback.monitored(callback.history)) if best_epoch else callback.run.initial_best
    early = f"; stopped early, no gain in {hyperparameters.patience} epochs"
    log.info(
        "%s: best %s %.4f in epoch %d of %d%s",
        *(name, monitor, best, best_epoch, hyperparameters.epochs),
        early if len(callback.seconds) < hyperparameters.epochs else "",
    )
    return TrainingResult(callback.history, best_epoch, best, callback.seconds)
