"""Batches: order, sampling, augmentation and loss weights of the rows."""

import dataclasses
from types import SimpleNamespace
from typing import Any

from melanoma.dataset import augment
from melanoma.training import batches as batches_module
from melanoma.training.batches import Batches, BatchOptions

import numpy as np
import pytest

AUGMENTED_MASKS = BatchOptions(seed=1, augmentation=augment.STANDARD, target_is_mask=True)


def bright_squares(count: int, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Images of bright squares on a dark background, and their masks."""
    rng = np.random.default_rng(0)
    masks = np.zeros((count, size, size, 1), np.uint8)
    for mask in masks:
        top, left = rng.integers(size // 8, size // 2, 2)
        mask[top : top + size // 3, left : left + size // 3] = 1
    return np.where(masks, 220, 50).repeat(3, axis=3).astype(np.uint8), masks


def epoch(batches: Batches) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of an epoch in the order of their rows."""
    parts = [batches[index] for index in range(len(batches))]
    by_row = np.argsort(batches.order)
    return tuple(np.concatenate([part[place] for part in parts])[by_row] for place in (0, 1))  # type: ignore[return-value]


def test_every_row_comes_once_per_epoch_in_a_new_order() -> None:
    batches = Batches(np.arange(10), np.arange(10), 4, BatchOptions(seed=0))
    orders = []
    for _ in range(2):
        parts = [batches[index] for index in range(len(batches))]
        assert [len(inputs) for inputs, _ in parts] == [4, 4, 2]
        assert all(np.array_equal(inputs, targets) for inputs, targets in parts)
        orders.append(np.concatenate([inputs for inputs, _ in parts]).tolist())
        batches.on_epoch_end()
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10))
    assert orders[0] != orders[1] != list(range(10))


def test_without_a_seed_rows_keep_their_order() -> None:
    batches = Batches(np.arange(5), np.arange(5), 2)
    batches.on_epoch_end()
    assert np.concatenate([batches[index][0] for index in range(3)]).tolist() == [0, 1, 2, 3, 4]


def test_only_the_chosen_rows_come() -> None:
    batches = Batches(np.arange(10), np.arange(10), 2, BatchOptions(rows=np.array([7, 1, 4]), seed=0))
    assert len(batches) == 2
    assert sorted(np.concatenate([batches[index][0] for index in range(2)])) == [1, 4, 7]


def test_the_same_seed_and_epoch_give_the_same_batches() -> None:
    first, again, other = (
        Batches(*bright_squares(6), 4, BatchOptions(seed=seed, augmentation=augment.STANDARD, target_is_mask=True))
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first.order, again.order)
    first_epoch = epoch(first)[0]
    assert np.array_equal(first_epoch, epoch(again)[0])
    assert not np.array_equal(first_epoch, epoch(other)[0])
    first.on_epoch_end()
    assert not np.array_equal(epoch(first)[0], first_epoch)


@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_skipped_epochs_equal_epochs_that_ran(epochs: int) -> None:
    ran, skipped = (Batches(*bright_squares(6), 4, AUGMENTED_MASKS) for _ in range(2))
    for _ in range(epochs):
        ran.on_epoch_end()
    skipped.skip(epochs)
    assert np.array_equal(ran.order, skipped.order)
    assert np.array_equal(epoch(ran)[0], epoch(skipped)[0])


def test_augmentation_of_a_row_does_not_depend_on_the_batch_size() -> None:
    epochs = [epoch(Batches(*bright_squares(7), size, AUGMENTED_MASKS)) for size in (1, 3, 7)]
    for inputs, targets in epochs[1:]:
        assert np.array_equal(inputs, epochs[0][0]) and np.array_equal(targets, epochs[0][1])


def test_an_image_and_its_mask_are_augmented_with_the_same_geometry() -> None:
    images, masks = bright_squares(12, size=48)
    augmented, targets = epoch(
        Batches(images, masks, 5, BatchOptions(seed=0, augmentation=augment.STANDARD, target_is_mask=True))
    )
    for image, mask, original in zip(augmented, targets[..., 0].astype(bool), masks[..., 0], strict=True):
        bright = image.mean(axis=2) > 128
        assert (bright & mask).sum() / (bright | mask).sum() > 0.85
        assert not np.array_equal(mask, original)


def test_augmentation_changes_neither_labels_nor_the_arrays_given() -> None:
    images, labels = bright_squares(6)[0], np.eye(6, dtype=np.float32)
    before = images.copy()
    augmented, targets = epoch(Batches(images, labels, 4, BatchOptions(seed=0, augmentation=augment.STANDARD)))
    assert np.array_equal(targets, labels) and np.array_equal(images, before)
    assert not np.array_equal(augmented, images)


def test_sampling_weights_draw_rare_classes_as_often_as_frequent_ones() -> None:
    labels = np.repeat([0, 1, 2], [900, 60, 40])
    rows, weights = np.arange(0, 1000, 2), (1 / np.bincount(labels))[labels]
    batches = Batches(labels, labels, 50, BatchOptions(rows=rows, seed=0, sampling_weights=weights))
    drawn = np.bincount(epoch(batches)[0], minlength=3)
    assert drawn.sum() == len(rows) and min(drawn) > 130
    assert set(batches.order) <= set(rows)


@pytest.mark.parametrize("length", [7, 30])
def test_epoch_has_the_length_asked_for(length: int) -> None:
    options = BatchOptions(seed=0, sampling_weights=np.ones(12), length=length)
    batches = Batches(np.arange(12), np.arange(12), 5, options)
    for _ in range(2):
        assert [len(batches[index][0]) for index in range(len(batches))] == [5] * (length // 5) + [2] * (length % 5 > 0)
        batches.on_epoch_end()


def test_a_row_drawn_twice_is_augmented_differently_each_time() -> None:
    images = bright_squares(1)[0]
    options = BatchOptions(rows=np.zeros(4, int), seed=0, augmentation=augment.STANDARD, sampling_weights=np.ones(1))
    first, *others = Batches(images, np.zeros(1), 4, options)[0][0]
    assert not any(np.array_equal(first, other) for other in others)


def test_mixup_by_hand() -> None:
    images = np.array([40, 200, 3], np.uint8)[:, None, None, None] + np.zeros((3, 4, 4, 3), np.uint8)
    targets = np.eye(3, dtype=np.float32)
    batches = Batches(images, targets, 3, BatchOptions(rows=np.array([0, 1]), mixup=0.4))
    drawn = []

    def beta(*parameters: float) -> float:
        drawn.append(parameters)
        return 0.25

    rng: Any = SimpleNamespace(integers=lambda count: count - 1, beta=beta)  # the last of the two rows
    image, target = batches.mix(images[0], targets[0], rng)
    assert image.dtype == np.uint8 and (image == 160).all()  # 0.25 * 40 + 0.75 * 200
    assert target.tolist() == [0.25, 0.75, 0] and drawn == [(0.4, 0.4)]


def test_mixed_targets_are_the_weights_of_the_mixed_images() -> None:
    brightness = np.linspace(0, 250, 6, dtype=np.float32)
    images = np.zeros((6, 4, 4, 3), np.uint8) + brightness.astype(np.uint8)[:, None, None, None]
    rows = np.array([0, 2, 3, 5])
    epochs = [
        epoch(Batches(images, np.eye(6, dtype=np.float32), size, BatchOptions(rows=rows, seed=0, mixup=1.0)))
        for size in (1, 4)
    ]
    mixed, targets = epochs[0]
    assert targets.sum(axis=1) == pytest.approx(np.ones(4)) and not targets[:, [1, 4]].any()
    assert (np.count_nonzero(targets, axis=1) == 2).sum() >= 2  # a row may be mixed with itself
    assert np.allclose(mixed[:, 0, 0, 0], targets @ brightness, atol=0.51)
    assert np.array_equal(mixed, epochs[1][0]) and np.array_equal(targets, epochs[1][1])  # whatever the batch size
    assert images[:, 0, 0, 0].tolist() == brightness.tolist()  # the array given stays


def test_images_are_augmented_before_they_are_mixed() -> None:
    images, targets = bright_squares(2)[0], np.zeros((2, 3), np.float32)
    options = BatchOptions(seed=0, augmentation=augment.STRONG, mixup=1.0)
    augmented_only = epoch(Batches(images, targets, 2, dataclasses.replace(options, mixup=0.0)))[0]
    mixed = epoch(Batches(images, targets, 2, options))[0]
    other = epoch(Batches(images, targets, 2, dataclasses.replace(options, augmentation=augment.STANDARD)))[0]
    assert not np.array_equal(mixed, augmented_only) and not np.array_equal(mixed, other)


def test_loss_weights_follow_their_rows() -> None:
    inputs = np.arange(10)
    batches = Batches(inputs, inputs, 4, BatchOptions(seed=0, loss_weights=inputs.astype(np.float32) / 10))
    for number in range(len(batches)):
        rows, _, weights = batches[number]
        assert np.allclose(weights, rows / 10)


def test_images_are_prepared_by_two_threads_or_more_even_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "THREADS", 1)
    images, masks = bright_squares(4)
    assert Batches(images, masks, 2).workers == 2  # with one, tf.data would block the end of an epoch
    assert Batches(np.zeros((4, 3)), masks, 2).workers == 1  # features need no preparation
