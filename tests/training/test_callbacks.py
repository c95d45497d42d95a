"""What happens around every epoch: NaN checks, saved states, and trainings that continue after an interruption."""

import gc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from melanoma.errors import InputError
from melanoma.training import callbacks
from melanoma.training.batches import Batches
from melanoma.training.callbacks import CheckpointCallback, Selection

import keras
import numpy as np
import pytest
import toy_training
from toy_training import dense, dropout, regression


@pytest.fixture(autouse=True)
def iterators_freed() -> Iterator[None]:
    """Frees what interrupted trainings leave behind: the longer tf.data ran, the longer freeing its iterator takes."""
    yield
    gc.collect()


# ----------------------------------------------------------------------------------------------- whose weights are kept

HISTORY = {
    "loss": [0.9, 0.6, 0.4, 0.3],
    "auc": [0.5, 0.8, 0.7, 0.6],
    "val_loss": [0.9, 0.5, 0.6, 0.5],
    "val_auc": [0.6, math.nan, 0.8, 0.8],
}


@pytest.mark.parametrize(
    ("keep", "on_validation", "monitor", "epoch", "reason"),
    [
        ("last", True, "val_auc", 4, "the last one"),
        ("best", True, "val_auc", 3, "best auc of validation"),  # the first of equal values
        ("lowest-loss", True, "val_loss", 2, "lowest loss of validation"),
        ("last", False, "auc", 4, "the last one"),
        ("best", False, "auc", 2, "best auc of training"),
        ("lowest-loss", False, "loss", 4, "lowest loss of training"),
    ],
)
def test_epoch_is_selected_by_hand(keep: str, on_validation: bool, monitor: str, epoch: int, reason: str) -> None:
    selection = Selection(keep, "auc", on_validation, patience=2)
    assert (selection.monitor, selection.epoch(HISTORY), selection.reason()) == (monitor, epoch, reason)
    assert selection.stops(HISTORY) == (epoch == 2)
    assert Selection(keep, "auc", on_validation, patience=3).stops(HISTORY) is False


def test_before_the_first_epoch_nothing_is_selected_and_training_goes_on() -> None:
    for keep in callbacks.KEEP:
        selection = Selection(keep, "auc", True, patience=1)
        assert selection.epoch({}) == 0 and not selection.stops({})


def test_nan_is_worse_than_every_number() -> None:
    selection = Selection("best", "auc", True, patience=9)
    assert selection.epoch({"val_auc": [math.nan, -5.0, math.nan]}) == 2
    assert selection.epoch({"val_auc": [math.nan, math.nan]}) == 1


# ----------------------------------------------------------------------------------------------------- NaN and infinity


class CountingBatches(Batches):
    """Counts the batches that are read, and gives NaN targets from an epoch on."""

    reads = 0
    first_bad_epoch = math.inf  # training starts with 1: Keras ends an epoch before the first one

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        self.reads += 1
        inputs, targets = super().__getitem__(index)
        return inputs, targets * np.float32(math.nan) if self.epoch >= self.first_bad_epoch else targets


def counting(batches: Batches, first_bad_epoch: float = math.inf) -> CountingBatches:
    counted = CountingBatches(batches.inputs, batches.targets, batches.batch_size, batches.options)
    counted.first_bad_epoch = first_bad_epoch
    return counted


def test_nan_loss_stops_training_and_the_last_good_state_is_kept(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nan in epoch 2: .*lower --learning-rate; the state .*state\.npz"):
        toy_training.fit(dense(), counting(regression(4, seed=0), first_bad_epoch=2), tmp_path)
    state = toy_training.checkpoint(tmp_path, epochs=3).load()
    assert state and len(state.seconds) == 1 and not state.finished
    assert all(np.isfinite(value).all() for value in (*state.variables, *state.kept))


def test_nan_loss_is_noticed_within_a_long_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "BATCHES_BETWEEN_CHECKS", 2)
    batches = counting(regression(1), first_bad_epoch=0)
    with pytest.raises(InputError, match="nan in epoch 1"):
        toy_training.fit(dense(), batches, tmp_path)
    assert batches.reads < len(batches)


def test_nan_weight_stops_training_even_if_the_loss_is_finite(tmp_path: Path) -> None:
    class Broken(keras.layers.Layer):
        """Its weight becomes NaN and does not affect the output."""

        def build(self, shape: tuple[int, ...]) -> None:
            self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
            self.count.assign(math.nan)
            return x

    inputs = keras.Input((3,))
    model = keras.Model(inputs, Broken()(keras.layers.Dense(2)(inputs)))
    with pytest.raises(InputError, match="nan in epoch 1"):
        toy_training.fit(model, regression(4), tmp_path)


# ----------------------------------------------------------------------------------------------- interrupted trainings


def fit_until_interrupted(epoch: int, *arguments: Any, **changes: Any) -> None:
    """Fits until Ctrl-C in the second batch of an epoch, counted from 1."""

    def interrupt(callback: CheckpointCallback, batch: int, logs: dict[str, float] | None = None) -> None:
        if len(callback.seconds) == epoch - 1 and batch == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointCallback, "on_train_batch_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            toy_training.fit(*arguments, **changes)
    gc.collect()  # see `iterators_freed`


@pytest.mark.parametrize(
    ("changes", "epochs"),
    [({}, (3,)), ({"ema": 0.9}, (1, 3)), ({"first_rate": 0.1, "keep": "last"}, (3,)), ({"keep": "lowest-loss"}, (3,))],
)
def test_resumed_training_ends_with_exactly_the_weights_of_an_uninterrupted_one(
    changes: dict[str, Any], epochs: tuple[int, ...], tmp_path: Path
) -> None:
    model = dropout()
    settings: dict[str, Any] = {"epochs": 4} | changes
    uninterrupted = toy_training.fit(model, regression(4, seed=3), tmp_path / "uninterrupted", **settings)
    for epoch in epochs:
        folder = tmp_path / str(epoch)
        fit_until_interrupted(epoch, dropout(), regression(4, seed=3), folder, **settings)
        resumed_model = dropout()
        resumed = toy_training.fit(resumed_model, regression(4, seed=3), folder, **settings)
        assert resumed.history == uninterrupted.history and resumed.kept_epoch == uninterrupted.kept_epoch
        assert len(resumed.seconds) == 4
        assert toy_training.same_weights(resumed_model, model)


def test_interruption_between_epochs_repeats_only_the_epoch_that_was_not_captured(tmp_path: Path) -> None:
    on_epoch_end = CheckpointCallback.on_epoch_end

    def interrupt(callback: CheckpointCallback, epoch: int, logs: dict[str, float] | None = None) -> None:
        on_epoch_end(callback, epoch, logs)
        if epoch == 2:
            raise KeyboardInterrupt

    model, resumed_model = dropout(), dropout()
    uninterrupted = toy_training.fit(model, regression(4, seed=3), tmp_path / "uninterrupted", epochs=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointCallback, "on_epoch_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            toy_training.fit(dropout(), regression(4, seed=3), tmp_path, epochs=4)
    state = toy_training.checkpoint(tmp_path, epochs=4).load()
    assert state and len(state.seconds) == len(state.history["loss"]) == 2
    resumed = toy_training.fit(resumed_model, regression(4, seed=3), tmp_path, epochs=4)
    assert resumed.history == uninterrupted.history
    assert toy_training.same_weights(resumed_model, model)


def test_patience_counts_the_epochs_before_an_interruption(tmp_path: Path) -> None:
    """The loss rises in every epoch: the learning rate is far too high."""
    settings: dict[str, Any] = {"epochs": 100, "learning_rate": 100.0, "patience": 3}
    uninterrupted = toy_training.fit(dense(), regression(2, seed=0), tmp_path / "uninterrupted", **settings)
    assert 4 <= len(uninterrupted.seconds) < 9
    fit_until_interrupted(len(uninterrupted.seconds), dense(), regression(2, seed=0), tmp_path, **settings)
    resumed = toy_training.fit(dense(), regression(2, seed=0), tmp_path, **settings)
    assert resumed.history == uninterrupted.history


def test_finished_training_is_not_repeated(tmp_path: Path) -> None:
    first_model, second_model = dropout(), dropout()
    first = toy_training.fit(first_model, regression(4, seed=3), tmp_path)
    batches = counting(regression(4, seed=3))
    second = toy_training.fit(second_model, batches, tmp_path)
    assert second == first and batches.reads == 0
    assert toy_training.same_weights(first_model, second_model)


def test_next_training_does_not_depend_on_whether_the_first_was_resumed(tmp_path: Path) -> None:
    models = []
    for run in range(2):  # in the second run, the first of two trainings is already finished
        models.append(dropout())
        toy_training.fit(models[run], regression(4, seed=3), tmp_path / "first")
        toy_training.fit(models[run], regression(4, seed=4), tmp_path / f"second{run}")
    assert toy_training.same_weights(*models)


def test_states_are_saved_and_curves_drawn_during_training_but_not_every_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def draw(history: dict[str, list[float]], seconds: list[float], kept_epoch: int) -> None:
        drawn.append(len(seconds))

    monkeypatch.setattr(callbacks, "SECONDS_BETWEEN_SAVES", 3600)
    toy_training.fit(dense(), regression(4), tmp_path / "seldom", draw=draw)
    assert drawn == [3]
    monkeypatch.setattr(callbacks, "SECONDS_BETWEEN_SAVES", 0)
    toy_training.fit(dense(), regression(4), tmp_path / "often", draw=draw)
    assert drawn == [3, 1, 2, 3]
