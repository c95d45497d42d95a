"""The training loop, its batches, and prediction."""

import math
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from melanoma import augment, segnet, training
from melanoma.checkpoints import Checkpoint, State
from melanoma.errors import InputError

import keras
import numpy as np
import pipeline
import pytest

SIZE = 16


def lesions(count: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Bright squares on dark ground and their masks."""
    rng = np.random.default_rng(0)
    masks = np.zeros((count, size, size, 1), np.uint8)
    for mask in masks:
        top, left = rng.integers(size // 8, size // 2, 2)
        mask[top : top + size // 3, left : left + size // 3] = 1
    return np.where(masks, 220, 50).repeat(3, axis=3).astype(np.uint8), masks


def epoch(batches: training.Batches) -> tuple[np.ndarray, np.ndarray]:
    """All inputs and targets of the epoch, in the order of the rows."""
    parts = [batches[index] for index in range(len(batches))]
    back = np.argsort(batches.order)
    return np.concatenate([part[0] for part in parts])[back], np.concatenate([part[1] for part in parts])[back]


def dense(seed: int = 0) -> keras.Model:
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((3,))
    return keras.Model(inputs, keras.layers.Dense(2)(inputs), name="dense")


def closeness(truth: keras.KerasTensor, predicted: keras.KerasTensor) -> keras.KerasTensor:
    return -keras.ops.mean(keras.ops.square(truth - predicted), axis=-1)


def kept_in(folder: Path, **settings: Any) -> Checkpoint:
    return Checkpoint(folder / "state.npz", settings)


def draw_nothing(*_: Any) -> None:
    pass


def fit_dense(
    model: keras.Model,
    batches: training.Batches,
    folder: Path,
    *,
    epochs: int = 3,
    learning_rate: float = 0.1,
    averaging: float = 0.0,
    start: float = -math.inf,
    patience: int = 5,
    draw: training.Draw = draw_nothing,
) -> training.Training:
    """Fits to the batches' targets and keeps its state in a folder."""
    return training.fit(
        model,
        batches,
        None,
        loss="mse",
        metrics=[closeness],
        monitor="closeness",
        epochs=epochs,
        learning_rate=learning_rate,
        averaging=averaging,
        patience=patience,
        checkpoint=kept_in(folder, epochs=epochs),
        draw=draw,
        start=start,
    )


def regression(seed: int | None = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random((12, 3), np.float32), rng.random((12, 2), np.float32)


FIRST_EPOCH = 1  # Keras takes the building of the model for an epoch


class Counted(training.Batches):
    """Counts the batches that are asked for."""

    batches = 0

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        self.batches += 1
        return super().__getitem__(index)


class BrokenFromEpoch2(training.Batches):
    """Gives targets of NaN after the first epoch."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        inputs, targets = super().__getitem__(index)
        return inputs, targets if self.epoch <= FIRST_EPOCH else targets * np.float32(np.nan)


def test_every_row_comes_once_per_epoch_in_a_new_order() -> None:
    batches = training.Batches(np.arange(10), np.arange(10), 4, seed=0)
    orders = []
    for _ in range(2):
        parts = [batches[index] for index in range(len(batches))]
        assert [len(inputs) for inputs, _ in parts] == [4, 4, 2]
        assert all(np.array_equal(inputs, targets) for inputs, targets in parts)
        orders.append(np.concatenate([inputs for inputs, _ in parts]).tolist())
        batches.on_epoch_end()
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10))
    assert orders[0] != orders[1] != list(range(10))


def test_order_is_kept_without_a_seed() -> None:
    batches = training.Batches(np.arange(5), np.arange(5), 2)
    batches.on_epoch_end()
    assert np.concatenate([batches[index][0] for index in range(3)]).tolist() == [0, 1, 2, 3, 4]


def test_same_seed_and_epoch_give_the_same_batches() -> None:
    first, again, other = (
        training.Batches(*lesions(6), 4, seed=seed, vary=True, target_is_mask=True) for seed in (1, 1, 2)
    )
    assert np.array_equal(first.order, again.order)
    assert np.array_equal(epoch(first)[0], epoch(again)[0])
    assert not np.array_equal(epoch(first)[0], epoch(other)[0])
    earlier = epoch(first)[0]
    first.on_epoch_end()
    assert not np.array_equal(epoch(first)[0], earlier)


def test_variant_of_a_row_does_not_depend_on_the_batch_size() -> None:
    epochs = [epoch(training.Batches(*lesions(7), size, seed=1, vary=True, target_is_mask=True)) for size in (1, 3, 7)]
    for inputs, targets in epochs[1:]:
        assert np.array_equal(inputs, epochs[0][0]) and np.array_equal(targets, epochs[0][1])


def test_image_and_mask_are_varied_together() -> None:
    images, masks = lesions(12, size=48)
    varied, targets = epoch(training.Batches(images, masks, 5, seed=0, vary=True, target_is_mask=True))
    for image, mask, original in zip(varied, targets, masks, strict=True):
        bright = image.mean(axis=2) > 128
        assert (bright & mask[..., 0].astype(bool)).sum() / (bright | mask[..., 0].astype(bool)).sum() > 0.85
        assert not np.array_equal(mask, original)


def test_labels_are_left_alone_and_so_are_the_arrays_given() -> None:
    images, labels = lesions(6)[0], np.eye(6, dtype=np.float32)
    before = images.copy()
    varied, targets = epoch(training.Batches(images, labels, 4, seed=0, vary=True))
    assert np.array_equal(targets, labels) and np.array_equal(images, before)
    assert not np.array_equal(varied, images)


def test_fit_lowers_the_loss_of_segnet_on_eight_images(tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    images, masks = lesions(8)
    model = segnet.build(segnet.Design("segnet", SIZE, mean=[80.0] * 3, std=[60.0] * 3), SIZE)
    result = training.fit(
        model,
        training.Batches(images, masks, 4, seed=0),
        training.Batches(images, masks, 4),
        loss=segnet.dice_cross_entropy,
        metrics=[segnet.jaccard],
        monitor="jaccard",
        epochs=10,
        learning_rate=5e-3,
        averaging=0.0,
        patience=10,
        checkpoint=kept_in(tmp_path),
        draw=draw_nothing,
    )
    assert result.history["loss"][-1] < 0.75 * result.history["loss"][0]
    assert result.best == pytest.approx(max(result.history["val_jaccard"]))
    assert result.best_epoch == 1 + int(np.argmax(result.history["val_jaccard"]))


def test_model_ends_with_the_weights_of_its_best_epoch(tmp_path: Path) -> None:
    inputs, targets = regression()
    model = dense()
    result = fit_dense(model, training.Batches(inputs, targets, 12), tmp_path, learning_rate=3.0)
    best = -np.mean((model.predict(inputs, verbose=0) - targets) ** 2)
    after_best = result.history["closeness"][result.best_epoch :]
    assert result.best_epoch >= 1
    # One batch an epoch: what an epoch reports is the closeness before its only step.
    assert not after_best or best == pytest.approx(after_best[0], rel=1e-4)


def test_weights_that_are_worse_than_the_start_are_not_kept(tmp_path: Path) -> None:
    model = dense()
    before = [value.copy() for value in model.get_weights()]
    result = fit_dense(model, training.Batches(*regression(), 4), tmp_path, start=0.0)
    assert result.best_epoch == 0 and result.best == 0.0
    assert all(np.array_equal(*pair) for pair in zip(before, model.get_weights(), strict=True))


def test_weight_file_holds_no_optimizer(tmp_path: Path) -> None:
    model, path = dense(), tmp_path / "a.weights.h5"
    fit_dense(model, training.Batches(*regression(), 4), tmp_path)
    model.save_weights(path)
    fresh = dense(seed=1)
    fresh.load_weights(path)
    assert not hasattr(fresh, "optimizer") or fresh.optimizer is None
    assert path.stat().st_size < 40_000


def test_loss_of_nan_stops_the_run_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nan in epoch 2: .*lower --learning-rate; the state .*state\.npz"):
        fit_dense(dense(), BrokenFromEpoch2(*regression(), 4, seed=0), tmp_path)
    state = kept_in(tmp_path, epochs=3).load()
    assert state and len(state.seconds) == 1 and not state.finished
    assert all(np.isfinite(value).all() for value in (*state.variables, *state.best))


def test_loss_of_nan_is_seen_within_a_long_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "BATCHES_BETWEEN_LOOKS", 2)
    inputs, targets = regression()
    with pytest.raises(InputError, match="nan in epoch 1"):
        fit_dense(dense(), seen := Counted(inputs, targets * np.float32(np.nan), 1), tmp_path)
    assert seen.batches < len(seen)


def test_weight_of_nan_stops_the_run_though_the_loss_is_a_number(tmp_path: Path) -> None:
    class Broken(keras.layers.Layer):
        """Has a weight that becomes NaN and that the loss does not feel."""

        def build(self, shape: tuple[int, ...]) -> None:
            self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
            self.count.assign(math.nan)
            return x

    inputs = keras.Input((3,))
    model = keras.Model(inputs, Broken()(keras.layers.Dense(2)(inputs)))
    with pytest.raises(InputError, match="nan in epoch 1"):
        fit_dense(model, training.Batches(*regression(), 4), tmp_path)


# ------------------------------------------------------------------------------------------------ interrupted trainings


def fit_interrupted(in_epoch: int, *arguments: Any, **more: Any) -> None:
    """Fits until the second batch of an epoch, where Ctrl-C is pressed."""

    def stop(keeper: training.Keeper, batch: int, logs: dict[str, float] | None = None) -> None:
        if len(keeper.seconds) == in_epoch - 1 and batch == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Keeper, "on_train_batch_end", stop)
        with pytest.raises(KeyboardInterrupt):
            fit_dense(*arguments, **more)


def dropping() -> keras.Model:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    x = keras.layers.BatchNormalization()(keras.layers.Dense(8)(inputs))
    return keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Dropout(0.5)(x)), name="dropping")


def test_interruption_between_two_epochs_loses_none_that_was_whole(tmp_path: Path) -> None:
    data, judge = regression(), training.Keeper.on_epoch_end
    model = dropping()
    whole = fit_dense(model, training.Batches(*data, 4, seed=3), tmp_path / "whole", epochs=4)

    def stop(keeper: training.Keeper, epoch: int, logs: dict[str, float] | None = None) -> None:
        judge(keeper, epoch, logs)
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Keeper, "on_epoch_end", stop)
        with pytest.raises(KeyboardInterrupt):
            fit_dense(dropping(), training.Batches(*data, 4, seed=3), tmp_path, epochs=4)
    state = kept_in(tmp_path, epochs=4).load()
    assert state and len(state.seconds) == len(state.history["loss"]) == 2
    again = dropping()
    result = fit_dense(again, training.Batches(*data, 4, seed=3), tmp_path, epochs=4)
    assert result.history == whole.history
    assert all(np.array_equal(*pair) for pair in zip(model.get_weights(), again.get_weights(), strict=True))


def test_training_that_follows_an_interrupted_one_is_the_same(tmp_path: Path) -> None:
    data, found = regression(), list[list[np.ndarray]]()
    for _ in range(2):  # the second time the first of two trainings was finished before
        model = dropping()
        fit_dense(model, training.Batches(*data, 4, seed=3), tmp_path / "first")
        fit_dense(model, training.Batches(*data, 4, seed=4), tmp_path / f"second{len(found)}")
        found.append(model.get_weights())
    assert all(np.array_equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("averaging", [0.0, 0.9])
def test_interrupted_training_ends_with_the_weights_of_an_uninterrupted_one(averaging: float, tmp_path: Path) -> None:
    data = regression()
    model, folder = dropping(), tmp_path / "whole"
    whole = fit_dense(model, training.Batches(*data, 4, seed=3), folder, epochs=6, averaging=averaging)
    for in_epoch in (1, 4):
        folder = tmp_path / str(in_epoch)
        fit_interrupted(in_epoch, dropping(), training.Batches(*data, 4, seed=3), folder, epochs=6, averaging=averaging)
        again = dropping()
        result = fit_dense(again, training.Batches(*data, 4, seed=3), folder, epochs=6, averaging=averaging)
        assert result.history == whole.history and result.best_epoch == whole.best_epoch
        assert len(result.seconds) == 6
        assert all(np.array_equal(*pair) for pair in zip(model.get_weights(), again.get_weights(), strict=True))


def test_finished_training_is_not_done_again(tmp_path: Path) -> None:
    model = dropping()
    first = fit_dense(model, training.Batches(*regression(), 4, seed=3), tmp_path)
    again = dropping()
    second = fit_dense(again, batches := Counted(*regression(), 4, seed=3), tmp_path)
    assert second == first and batches.batches == 0
    assert all(np.array_equal(*pair) for pair in zip(model.get_weights(), again.get_weights(), strict=True))


def test_training_of_other_settings_is_refused(tmp_path: Path) -> None:
    fit_dense(dense(), training.Batches(*regression(), 4), tmp_path)
    with pytest.raises(InputError, match=r"epochs 3 then, 4 now.*--restart"):
        fit_dense(dense(), training.Batches(*regression(), 4), tmp_path, epochs=4)


def test_patience_outlives_an_interruption(tmp_path: Path) -> None:
    """Ever higher rates let the loss rise from epoch to epoch."""
    data = regression()
    choices: dict[str, Any] = {"epochs": 100, "learning_rate": 100.0, "patience": 3}
    whole = fit_dense(dense(), training.Batches(*data, 2, seed=0), tmp_path / "whole", **choices)
    assert 4 <= len(whole.seconds) < 9
    fit_interrupted(len(whole.seconds), dense(), training.Batches(*data, 2, seed=0), tmp_path, **choices)
    result = fit_dense(dense(), training.Batches(*data, 2, seed=0), tmp_path, **choices)
    assert result.history == whole.history


def test_states_and_curves_come_while_it_trains_but_not_all_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def draw(history: dict[str, list[float]], seconds: list[float], best_epoch: int) -> None:
        drawn.append(len(seconds))

    monkeypatch.setattr(training, "SECONDS_BETWEEN_LOOKS", 3600)
    fit_dense(dense(), training.Batches(*regression(), 4), tmp_path / "a", epochs=4, draw=draw)
    assert drawn == [4]
    monkeypatch.setattr(training, "SECONDS_BETWEEN_LOOKS", 0)
    fit_dense(dense(), training.Batches(*regression(), 4), tmp_path / "b", epochs=4, draw=draw)
    assert drawn == [4, 1, 2, 3, 4]


@pytest.mark.parametrize("bytes_left", [0, -200])
def test_damaged_state_is_refused(bytes_left: int, tmp_path: Path) -> None:
    checkpoint = kept_in(tmp_path)
    checkpoint.save(State({}, [], variables=[np.zeros(1000)]))
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:bytes_left])
    with pytest.raises(InputError, match=r"damaged.*--restart"):
        checkpoint.load()


def test_state_of_another_version_is_refused(tmp_path: Path) -> None:
    state = State({}, [])
    object.__setattr__(state, "momentum", 0.5)
    kept_in(tmp_path).save(state)
    with pytest.raises(InputError, match=r"momentum.*--restart"):
        kept_in(tmp_path).load()


def test_state_with_other_variables_is_refused(tmp_path: Path) -> None:
    checkpoint = kept_in(tmp_path, epochs=3)
    checkpoint.save(State({"loss": [1.0], "closeness": [0.0]}, [1.0], variables=[np.zeros(3)]))
    with pytest.raises(InputError, match=r"does not fit.*--restart"):
        fit_dense(dense(), training.Batches(*regression(), 4), tmp_path)


def test_history_has_a_line_for_each_epoch(tmp_path: Path) -> None:
    history = {"loss": [0.5, 0.25], "val_loss": [0.75, 0.5]}
    for epochs in (1, 2):
        shown = {name: values[:epochs] for name, values in history.items()}
        training.record(tmp_path / "net", {"loss": "loss"}, "net", shown, [3.0, 2.0][:epochs], 1)
    assert (tmp_path / "net_history.csv").read_text() == "epoch,seconds,loss,val_loss\n1,3.0,0.5,0.75\n2,2.0,0.25,0.5\n"
    assert (tmp_path / "net_curves.png").stat().st_size > 1000


SAVE_FOR_EVER = """
import sys
from pathlib import Path
import numpy as np
from melanoma.checkpoints import Checkpoint, State
checkpoint = Checkpoint(Path(sys.argv[1]), {"seed": 0})
for count in range(int(sys.argv[2]), 10**9):
    checkpoint.save(State({"loss": [0.0]}, [float(count)], variables=[np.full((300, 300), count)] * 5))
    print(count, flush=True)
"""


def test_kill_while_saving_leaves_the_old_or_the_new_state(tmp_path: Path) -> None:
    path, rng = tmp_path / "state.npz", np.random.default_rng(0)
    kills, count = 50, 0
    for _ in range(kills):
        words = [sys.executable, "-c", SAVE_FOR_EVER, str(path), str(count)]
        with subprocess.Popen(words, cwd=pipeline.ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
            said = [count, *map(int, process.stdout.read().split())]
        state = Checkpoint(path, {"seed": 0}).load()
        assert state and {int(value) for array in state.variables for value in np.unique(array)} == {state.seconds[0]}
        count = int(state.seconds[0])
        assert max(said) <= count <= max(said) + 1
    assert count > kills


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    def activations() -> int:
        return len(b"x" * (1 << 26))

    activations()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert sum(activations() for _ in range(4)) == 1 << 28
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000  # of 65,536 pages


def test_average_of_the_weights_is_kept_where_asked(tmp_path: Path) -> None:
    plain, averaged = dense(), dense()
    for model, averaging in ((plain, 0.0), (averaged, 0.9)):
        fit_dense(model, training.Batches(*regression(), 4, seed=0), tmp_path / str(averaging), averaging=averaging)
    start = dense().get_weights()[0]
    moved = [abs(model.get_weights()[0] - start).mean() for model in (plain, averaged)]
    assert 0 < moved[1] < 0.9 * moved[0]  # an average lags behind


def test_learning_rate_rises_and_falls() -> None:
    schedule = training.schedule(0.5, steps=40)
    values = [float(schedule(step)) for step in range(41)]
    assert 0 < values[0] < 0.3 and max(values) == pytest.approx(0.5)
    assert int(np.argmax(values)) == 2 and values[-1] == pytest.approx(0, abs=1e-6)
    assert all(np.diff(values[2:]) < 0)


def colours() -> tuple[keras.Model, np.ndarray]:
    """A random network that sees images, and some."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4, 4, 3))
    outputs = keras.layers.Dense(2)(keras.layers.Flatten()(inputs))
    return keras.Model(inputs, outputs), np.random.default_rng(0).random((10, 4, 4, 3)).astype(np.float32)


@pytest.mark.parametrize(("count", "blocks"), [(10, [8, 2]), (3, [3])])
def test_prediction_in_blocks_and_filled_batches_equals_keras_prediction(count: int, blocks: list[int]) -> None:
    model, images = colours()
    found = list(training.predict([model], images[:count], 2, "images"))
    assert [len(block) for block in found] == blocks
    assert np.allclose(np.concatenate(found), model.predict(images[:count], verbose=0), atol=1e-6)


def test_values_of_turned_views_are_averaged() -> None:
    model, images = colours()
    views = [model.predict(augment.turned(images, view, (1, 2)), verbose=0) for view in range(augment.TURNS)]
    (found,) = training.predict([model], images, 10, "images", turns=True)
    assert np.allclose(found, np.mean(views, axis=0), atol=1e-6)


def test_all_classes_are_drawn_equally_often_where_asked() -> None:
    labels = np.repeat([0, 1, 2], [900, 60, 40])
    chances = (1 / np.bincount(labels))[labels]
    rows = np.arange(0, 1000, 2)
    batches = training.Batches(labels, labels, 50, rows=rows, seed=0, chances=chances)
    drawn = np.bincount(epoch(batches)[0], minlength=3)
    assert drawn.sum() == len(rows) and min(drawn) > 130
    assert set(batches.order) <= set(rows)


def test_row_drawn_twice_looks_different() -> None:
    images = lesions(1)[0]
    batches = training.Batches(images, np.zeros(1), 4, rows=np.zeros(4, int), seed=0, vary=True, chances=np.ones(1))
    first, *others = batches[0][0]
    assert not any(np.array_equal(first, other) for other in others)


def test_loss_weights_go_with_their_rows() -> None:
    inputs = np.arange(10)
    batches = training.Batches(inputs, inputs, 4, seed=0, loss_weights=inputs.astype(np.float32) / 10)
    for number in range(len(batches)):
        rows, _, weights = batches[number]
        assert np.allclose(weights, rows / 10)
