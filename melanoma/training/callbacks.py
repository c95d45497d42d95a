"""What happens around every epoch: which weights are kept, early stopping, NaN checks, checkpoints."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from melanoma.cli.run import check_interrupted
from melanoma.errors import InputError
from melanoma.training import distributed
from melanoma.training.checkpoints import Checkpoint, State

import keras
import numpy as np

Draw = Callable[[dict[str, list[float]], list[float], int], None]  # of history, seconds per epoch, kept epoch

LAST, BEST, LOWEST_LOSS = "last", "best", "lowest-loss"
KEEP = (LAST, BEST, LOWEST_LOSS)  # whose weights are kept: of the last epoch, or of that with the best metric or loss

SECONDS_BETWEEN_SAVES = 10  # at least, between two saved states
BATCHES_BETWEEN_CHECKS = 50  # of the loss; reading it waits for the device


@dataclass(frozen=True)
class TrainingRun:
    """Where a training run keeps its state and shows its progress, and which devices it uses."""

    checkpoint: Checkpoint
    draw: Draw  # plots the curves, also while training
    devices: distributed.Devices = distributed.ONE
    callbacks: Sequence[keras.callbacks.Callback] = ()  # that watch the training


@dataclass(frozen=True)
class Selection:
    """Which epoch's weights are kept, and when training stops."""

    keep: str  # of KEEP
    metric: str  # that is better the higher it is
    on_validation: bool  # whether there is validation; otherwise the values of training count
    patience: int  # epochs without a new best value after which training stops; ignored with LAST

    @property
    def monitor(self) -> str:
        """Name in the logs of what decides; with LAST, of what is reported."""
        name = "loss" if self.keep == LOWEST_LOSS else self.metric
        return f"val_{name}" if self.on_validation else name

    def values(self, history: dict[str, list[float]]) -> list[float]:
        """What decides, of each epoch: higher is better, NaN counts as -inf."""
        sign = -1 if self.keep == LOWEST_LOSS else 1
        return [-math.inf if math.isnan(value) else sign * value for value in history.get(self.monitor, [])]

    def epoch(self, history: dict[str, list[float]]) -> int:
        """The epoch whose weights are kept, from 1; 0 before the first."""
        values = self.values(history)
        if self.keep == LAST or not values:
            return len(values)
        return 1 + values.index(max(values))

    def stops(self, history: dict[str, list[float]]) -> bool:
        """Whether training has not improved for too long."""
        return self.keep != LAST and len(self.values(history)) - self.epoch(history) >= self.patience

    def reason(self) -> str:
        """Why that epoch's weights are kept."""
        of = "validation" if self.on_validation else "training"
        return {LAST: "the last one", BEST: f"best {self.metric} of {of}", LOWEST_LOSS: f"lowest loss of {of}"}[
            self.keep
        ]


class CheckpointCallback(keras.callbacks.Callback):
    """Keeps the weights of one epoch, stops training that no longer improves or has failed, saves its state.

    Must come after callbacks that change weights between epochs, because a state is what the next epoch starts from. In
    several processes all make the same decisions, and all resume from what the first one saves.
    """

    def __init__(self, network: keras.Model, selection: Selection, run: TrainingRun) -> None:
        """Sets up the callback.

        Args:
            network: the model that ends with the selected weights.
            selection: of the weights.
            run: checkpoint, plots, devices.
        """
        super().__init__()
        self.network, self.selection, self.run = network, selection, run
        weights = {id(weight) for weight in network.weights}
        self.seeds = [(one, keras.ops.convert_to_numpy(one)) for one in network.variables if id(one) not in weights]
        self.history: dict[str, list[float]] = {}
        self.seconds: list[float] = []
        self.kept: list[np.ndarray] = []
        self.unsaved: State | None = None
        self.last_save = time.monotonic()

    @property
    def variables(self) -> list[keras.Variable]:
        """Everything that changes during training."""
        return [*self.model.variables, *self.model.optimizer.variables]

    def resume(self, state: State) -> None:
        """Restores a saved state.

        Raises:
            InputError: the state has another number of variables, e.g. from other package versions.
        """
        self.history, self.seconds, self.kept = state.history, state.seconds, state.kept
        if state.variables and len(state.variables) != len(self.variables):
            raise InputError(
                f"{self.run.checkpoint.path} does not fit the network of the installed packages: start over with "
                "--restart"
            )
        for variable, value in zip(self.variables if state.variables else (), state.variables, strict=True):
            variable.assign(value)

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Captures the state after the previous epoch, and saves it if the last save is long enough ago."""
        if self.seconds:
            variables = [keras.ops.convert_to_numpy(variable) for variable in self.variables]
            self.unsaved = State(self.history, self.seconds, variables=variables, kept=self.kept)
            if time.monotonic() >= self.last_save + SECONDS_BETWEEN_SAVES:
                self.save()
        self.started = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Ends interrupted training, and from time to time checks the mean loss: a long epoch with NaN stops early."""
        check_interrupted()
        if batch % BATCHES_BETWEEN_CHECKS == 0:
            self.check_loss((logs or {})["loss"])

    def check_loss(self, loss: float) -> None:
        """Raises InputError if the loss is NaN or infinite."""
        if not math.isfinite(loss):
            kept = f"; the state before that epoch is kept in {self.run.checkpoint.path}" if self.seconds else ""
            raise InputError(
                f"the loss became {float(loss)} in epoch {len(self.seconds) + 1}: start over with --restart and a "
                f"lower --learning-rate{kept}"
            )

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Records the epoch, keeps its weights if they are selected, and decides whether to stop."""
        logs = logs or {}
        self.check_loss(logs["loss"])
        weights = self.network.get_weights()
        if not all(np.isfinite(array).all() for array in weights):
            self.check_loss(math.nan)
        # New lists: the captured state holds the old ones.
        self.history = {name: [*self.history.get(name, []), float(value)] for name, value in logs.items()}
        self.seconds = [*self.seconds, time.perf_counter() - self.started]
        if self.selection.epoch(self.history) == len(self.seconds):
            self.kept = weights
        self.model.stop_training = self.selection.stops(self.history)

    def save(self) -> None:
        """Saves the captured state if it is not saved yet, and draws the curves."""
        if self.unsaved and self.run.devices.leads:
            self.run.checkpoint.save(self.unsaved)
            history = self.unsaved.history
            self.run.draw(history, self.unsaved.seconds, self.selection.epoch(history))
        self.unsaved, self.last_save = None, time.monotonic()

    def finish(self) -> None:
        """Gives the network the selected weights, and saves the final state.

        Random generators are reset: what is trained next does not depend on an interruption.
        """
        self.network.set_weights(self.kept)
        for seed, value in self.seeds:
            seed.assign(value)
        self.unsaved = State(self.history, self.seconds, finished=True, kept=self.kept)
        self.save()
