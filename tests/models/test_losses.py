"""Losses and the training metric of lesion masks."""

import math

from melanoma.models import losses

import numpy as np
import pytest


@pytest.mark.parametrize("loss", losses.LOSSES.values(), ids=list(losses.LOSSES))
def test_loss_is_computed_per_image(loss: losses.Loss) -> None:
    truth = np.zeros((2, 8, 8, 1), np.float32)
    truth[0, :4], truth[1, :2] = 1, 1
    both, second = np.asarray(loss(truth, truth * 0.8)), np.asarray(loss(truth[1:], truth[1:] * 0.8))
    assert both.shape == (2,)
    assert both[1] == pytest.approx(second[0], abs=1e-6)  # independent of the other image in the batch


@pytest.mark.parametrize("loss", losses.LOSSES.values(), ids=list(losses.LOSSES))
def test_loss_is_zero_for_the_true_mask_and_large_for_its_inverse(loss: losses.Loss) -> None:
    truth = np.zeros((1, 8, 8, 1), np.float32)
    truth[0, :4] = 1
    assert np.asarray(loss(truth, truth)) == pytest.approx([0], abs=1e-4)
    assert np.asarray(loss(truth, 1 - truth)) > 0.9


def test_dice_cross_entropy_by_hand() -> None:
    truth = np.stack([np.ones((2, 2, 1)), np.zeros((2, 2, 1))]).astype(np.uint8)
    predicted = np.full((2, 2, 2, 1), 0.5, np.float32)
    # Smoothed Dice, (2 * 2 + 1) / (4 + 2 + 1) for the full mask, (0 + 1) / (0 + 2 + 1) for the empty one.
    expected = [1 - 5 / 7 + math.log(2), 1 - 1 / 3 + math.log(2)]
    assert np.asarray(losses.dice_cross_entropy(truth, predicted)) == pytest.approx(expected, rel=1e-5)


def test_pixels_at_the_border_weigh_more_by_hand() -> None:
    truth = np.zeros((1, 32, 32, 1), np.float32)  # width of the strip: 1 + 2 * round(0.02 * 32) pixels
    truth[0, :16] = 1
    predicted = np.where(truth, 0.9, 0.2).astype(np.float32)
    predicted[0, 15:17] = 0.5  # the two rows of pixels at the border
    inside, outside, border = 15 * -math.log(0.9), 15 * -math.log(0.8), 2 * math.log(2)
    weighted = (inside + outside + 5 * border) / (30 + 5 * 2)
    overlap, total = 32 * (15 * 0.9 + 0.5), 32 * (16 + 15 * 0.9 + 2 * 0.5 + 15 * 0.2)
    expected = 1 - (2 * overlap + 1) / (total + 1) + weighted
    assert np.asarray(losses.dice_border_cross_entropy(truth, predicted)) == pytest.approx([expected], rel=1e-5)


def test_tversky_by_hand() -> None:
    truth = np.array([1, 1, 1, 1, 0, 0, 0, 0], np.float32).reshape(1, 2, 4, 1)
    predicted = np.array([1, 1, 0, 0, 1, 0, 0, 0], np.float32).reshape(1, 2, 4, 1)
    index = 2 / (2 + 0.7 * 2 + 0.3 * 1)  # 2 true positives, 2 false negatives, 1 false positive
    assert np.asarray(losses.tversky(truth, predicted)) == pytest.approx([1 - index], rel=1e-5)
    assert np.asarray(losses.focal_tversky(truth, predicted)) == pytest.approx([(1 - index) ** 0.75], rel=1e-5)


def test_jaccard_by_hand() -> None:
    truth = np.array([[1, 1, 0, 0], [0, 0, 0, 0]], np.uint8).reshape(2, 2, 2, 1)
    predicted = np.array([[0.9, 0.4, 0.6, 0.1], [0.1, 0.2, 0.3, 0.4]], np.float32).reshape(2, 2, 2, 1)
    assert np.asarray(losses.jaccard(truth, predicted)) == pytest.approx([1 / 3, 1])  # the second: two empty masks
