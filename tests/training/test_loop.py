"""The training loop: what is learnt, which weights are kept, how the learning rate changes."""

import platform
import resource
from collections.abc import Callable
from pathlib import Path

from melanoma.models import losses, segmentation
from melanoma.training import loop
from melanoma.training.batches import Batches, BatchOptions
from melanoma.training.callbacks import KEEP, TrainingRun

import keras
import numpy as np
import pytest
import toy
import toy_training
from toy_training import dense, regression

SIZE = 16  # pixels


def convolution() -> keras.Model:
    inputs = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Rescaling(1 / 60, -80 / 60)(inputs)
    return keras.Model(inputs, keras.layers.Conv2D(1, 3, padding="same", activation="sigmoid")(x), name="convolution")


def segnet() -> keras.Model:
    return segmentation.build(segmentation.Design("segnet", SIZE, mean=[80.0] * 3, std=[60.0] * 3), SIZE)


@pytest.mark.parametrize("build", [convolution, pytest.param(segnet, marks=pytest.mark.slow)])
def test_loss_falls_on_eight_images(
    build: Callable[[], keras.Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmentation, "ENCODER", toy.SEGNET_ENCODER)
    keras.utils.set_random_seed(0)
    masks = np.zeros((8, SIZE, SIZE, 1), np.uint8)
    for mask, (top, left) in zip(masks, np.random.default_rng(0).integers(2, 8, (8, 2)), strict=True):
        mask[top : top + 5, left : left + 5] = 1
    images = np.where(masks, 220, 50).repeat(3, axis=3).astype(np.uint8)
    result = loop.fit(
        build(),
        Batches(images, masks, 4, BatchOptions(seed=0)),
        Batches(images, masks, 4),
        loop.Objective(losses.dice_cross_entropy, [losses.jaccard], "jaccard"),
        loop.Hyperparameters(epochs=10, learning_rate=5e-3 if build is segnet else 0.1, ema=0.0, patience=10),
        TrainingRun(toy_training.checkpoint(tmp_path), toy_training.draw_nothing),
    )
    assert result.history["loss"][-1] < 0.75 * result.history["loss"][0]
    assert result.kept_epoch == 1 + int(np.argmax(result.history["val_jaccard"]))
    assert result.reason == "best jaccard of validation"


def test_model_ends_with_the_weights_of_its_best_epoch(tmp_path: Path) -> None:
    batches, model = regression(12), dense()
    result = toy_training.fit(model, batches, tmp_path, learning_rate=3.0)
    found = -np.mean((model.predict_on_batch(batches.inputs) - batches.targets) ** 2)
    values = result.history["negative_mse"]
    assert 1 <= result.kept_epoch < len(values)
    # An epoch is one step here, and its metric is that before the step.
    assert found == pytest.approx(values[result.kept_epoch], rel=1e-4)


@pytest.mark.parametrize("keep", KEEP)
def test_model_ends_with_the_weights_that_are_asked_for(keep: str, tmp_path: Path) -> None:
    validation, model = regression(12), dense()
    result = toy_training.fit(
        model, regression(4), tmp_path, validation=validation, keep=keep, learning_rate=3.0, epochs=5, patience=1
    )
    found = np.mean((model.predict_on_batch(validation.inputs) - validation.targets) ** 2)
    losses_of_epochs = result.history["val_loss"]
    assert found == pytest.approx(losses_of_epochs[result.kept_epoch - 1], rel=1e-4)
    if keep == "last":
        assert result.kept_epoch == len(losses_of_epochs) == 5  # patience ends no training of which the last is kept
    else:
        assert result.kept_epoch == 1 + int(np.argmin(losses_of_epochs))


def test_weight_file_holds_no_optimizer_state(tmp_path: Path) -> None:
    model, path = dense(), tmp_path / "a.weights.h5"
    toy_training.fit(model, regression(4), tmp_path)
    model.save_weights(path)
    fresh = dense(seed=1)
    fresh.load_weights(path)
    assert toy_training.same_weights(fresh, model)
    assert not hasattr(fresh, "optimizer") or fresh.optimizer is None
    assert path.stat().st_size < 40_000


def test_weight_ema_is_kept_if_requested(tmp_path: Path) -> None:
    plain, averaged = dense(), dense()
    for model, ema in ((plain, 0.0), (averaged, 0.9)):
        toy_training.fit(model, regression(4, seed=0), tmp_path / str(ema), ema=ema)
    initial = dense().get_weights()[0]
    moved, moved_on_average = (abs(model.get_weights()[0] - initial).mean() for model in (plain, averaged))
    assert 0 < moved_on_average < 0.9 * moved


@pytest.mark.parametrize(("first_rate", "expected"), [(1.0, [0.1, 0.1, 0.1]), (0.01, [0.001, 0.01, 0.1])])
def test_learning_rate_grows_geometrically_from_the_first_to_the_last_layer(
    first_rate: float, expected: list[float], tmp_path: Path
) -> None:
    assert toy_training.layer_steps(tmp_path, first_rate) == pytest.approx(expected, rel=1e-3)


def test_frozen_layers_have_no_learning_rate() -> None:
    inputs = keras.Input((3,))
    x = keras.layers.Dense(2)(keras.layers.Dense(2, trainable=False)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    assert loop.LayerwiseAdam(model, 0.1).rates == [0.1, 0.1, 1.0, 1.0]  # kernels and biases


def test_learning_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    schedule = loop.schedule(0.5, steps=40)
    values = [float(schedule(step)) for step in range(41)]
    assert 0 < values[0] < 0.3 and max(values) == pytest.approx(0.5)
    assert int(np.argmax(values)) == 2 and values[-1] == pytest.approx(0, abs=1e-6)
    assert all(np.diff(values[2:]) < 0)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_reused_in_the_next_step() -> None:
    def activations() -> int:
        return len(b"x" * (1 << 26))

    activations()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert sum(activations() for _ in range(4)) == 1 << 28
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000  # of 65,536 pages
