"""The training loop of both networks, on every Keras backend, on one device or several."""

import sys
from dataclasses import dataclass
from typing import Any

from melanoma.cli import hardware
from melanoma.log import log
from melanoma.models import backbones
from melanoma.training.batches import Batches
from melanoma.training.callbacks import BEST, CheckpointCallback, Selection, TrainingRun

import keras

hardware.keep_memory()

PRETRAINING = "pretrain"  # in the names of the training on the images of --extra alone
WARM_UP = 0.05  # fraction of all steps


@dataclass(frozen=True)
class Objective:
    """What training optimises, and what is better."""

    loss: Any  # Keras loss
    metrics: list[Any]  # Keras metrics
    monitor: str  # name of the metric to maximise: on validation where there is any, else on training


@dataclass(frozen=True)
class Hyperparameters:
    """How long and how fast a network is trained."""

    epochs: int  # at most
    learning_rate: float  # peak of `schedule`
    ema: float  # momentum of the weight EMA that is evaluated and kept; 0: no EMA
    patience: int  # epochs without a new best value after which training stops, unless the last epoch is kept
    keep: str = BEST  # of KEEP
    first_rate: float = 1.0  # learning rate of the first layer relative to the last, see `LayerwiseAdam`


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of a training run."""

    history: dict[str, list[float]]  # values after each epoch by metric; those of validation with the prefix val_
    kept_epoch: int  # whose weights are kept, from 1
    reason: str  # why those
    seconds: list[float]  # duration of each epoch


def schedule(peak: float, steps: int) -> keras.optimizers.schedules.LearningRateSchedule:
    """Linear warm-up to the peak learning rate over the first WARM_UP of the steps, then cosine decay to 0."""
    warm_up = max(1, round(WARM_UP * steps))
    return keras.optimizers.schedules.CosineDecay(
        peak / (warm_up + 1), max(1, steps - warm_up), warmup_target=peak, warmup_steps=warm_up
    )


class LayerwiseAdam(keras.optimizers.Adam):
    """Adam with a lower learning rate for the first layers, which need to change least.

    It grows geometrically from layer to layer. Source: Howard and Ruder 2018, arXiv 1801.06146.
    """

    def __init__(self, model: keras.Model, first_rate: float, **options: Any) -> None:
        """Sets up the optimizer.

        Args:
            model: to be trained.
            first_rate: learning rate of its first layer with weights relative to that of the last.
            options: of `keras.optimizers.Adam`.
        """
        super().__init__(**options)
        layers = [layer for layer in backbones.flatten_layers(model) if layer.trainable_variables]
        exponents = [1 - place / max(1, len(layers) - 1) for place in range(len(layers))]
        self.rates = [
            first_rate**exponent
            for layer, exponent in zip(layers, exponents, strict=True)
            for _ in layer.trainable_variables
        ]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """As the base class, with the learning rate of the variable's layer."""
        super().update_step(gradient, variable, learning_rate * self.rates[self._get_variable_index(variable)])


def fit(
    model: keras.Model,
    train: Batches,
    validation: Batches | None,
    objective: Objective,
    hyperparameters: Hyperparameters,
    run: TrainingRun,
) -> TrainingResult:
    """Trains with Adam; the model ends with the weights of the epoch that `hyperparameters.keep` names.

    Interrupted training continues after its last saved epoch and ends with exactly the weights of uninterrupted
    training, on a GPU as far as the device is deterministic.

    Args:
        model: uncompiled, so that its weight file holds no optimizer state.
        train: training batches.
        validation: evaluated after every epoch; None: the metrics of training count instead.
        objective: loss, metrics and monitored metric.
        hyperparameters: epochs, learning rates, EMA, and which epoch's weights are kept.
        run: checkpoint, plots and devices. Several processes all end with the same weights; only the first saves them.

    Raises:
        InputError: the loss or a weight became NaN or infinite, or the checkpoint belongs to another training run.
    """
    selection = Selection(hyperparameters.keep, objective.monitor, validation is not None, hyperparameters.patience)
    callback = CheckpointCallback(model, selection, run)
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
                    callbacks=[*average, *copy_back, *run.callbacks, callback],
                )
            except BaseException:
                callback.save()
                raise
    callback.finish()
    return _result(model.name, selection, hyperparameters, callback)


def _compile(trainer: keras.Model, objective: Objective, hyperparameters: Hyperparameters, steps: int) -> None:
    optimizer = LayerwiseAdam(
        trainer,
        hyperparameters.first_rate,
        learning_rate=schedule(hyperparameters.learning_rate, steps),
        use_ema=hyperparameters.ema > 0,
        ema_momentum=hyperparameters.ema or None,
    )
    # Metrics must be created here: variables belong to the devices where they are created.
    metrics = [
        type(metric).from_config(metric.get_config()) if hasattr(metric, "get_config") else metric
        for metric in objective.metrics
    ]
    trainer.compile(optimizer, loss=objective.loss, metrics=metrics)


def _result(
    name: str, selection: Selection, hyperparameters: Hyperparameters, callback: CheckpointCallback
) -> TrainingResult:
    kept = selection.epoch(callback.history)
    early = f"; stopped early, no gain in {hyperparameters.patience} epochs"
    log.info(
        "%s: kept the weights of epoch %d of %d: %s; %s %.4f%s",
        *(name, kept, hyperparameters.epochs, selection.reason(), selection.monitor),
        callback.history[selection.monitor][kept - 1],
        early if len(callback.seconds) < hyperparameters.epochs else "",
    )
    return TrainingResult(callback.history, kept, selection.reason(), callback.seconds)
