"""From probabilities to masks: threshold, largest component, filled holes."""

from melanoma.inference import postprocess
from melanoma.metrics import segmentation

import numpy as np
import pytest


def square() -> np.ndarray:
    """uint8 (1, 8, 8, 1): a lesion of 16 pixels."""
    truth = np.zeros((1, 8, 8, 1), np.uint8)
    truth[:, 2:6, 2:6] = 1
    return truth


def test_largest_component_stays_and_its_holes_are_filled() -> None:
    mask = np.array(
        [
            [1, 1, 0, 0, 0, 0],
            [0, 0, 0, 1, 1, 1],
            [0, 0, 0, 1, 0, 1],
            [0, 0, 0, 1, 1, 1],
            [0, 0, 0, 0, 0, 0],
            [1, 0, 0, 0, 0, 0],
        ]
    )
    expected = np.zeros_like(mask)
    expected[1:4, 3:6] = 1
    found = postprocess.keep_largest(mask.astype(np.uint8)[..., None])
    assert found.dtype == np.uint8 and np.array_equal(found[..., 0], expected)


def test_background_connected_to_the_edge_is_not_a_hole() -> None:
    mask = np.zeros((4, 4, 1), np.uint8)
    mask[:, 0] = mask[0] = mask[3] = 1
    assert np.array_equal(postprocess.keep_largest(mask), mask)


@pytest.mark.parametrize("value", [0, 1])
def test_empty_and_full_masks_do_not_change(value: int) -> None:
    mask = np.full((5, 5, 1), value, np.uint8)
    assert np.array_equal(postprocess.keep_largest(mask), mask)


@pytest.mark.parametrize("clean", [False, True])  # the two pixels touch at a corner
def test_pixels_at_the_threshold_are_lesion(clean: bool) -> None:
    probability = np.array([0.2, 0.5, 0.8, 0.49], np.float32).reshape(1, 2, 2, 1)
    assert postprocess.segment(probability, 0.5, clean).ravel().tolist() == [0, 1, 1, 0]


def test_chosen_threshold_has_the_highest_jaccard_index() -> None:
    truth = square().repeat(2, axis=0)
    probability = np.where(truth, 0.35, 0.22).astype(np.float32)
    chosen = postprocess.choose_threshold(truth, probability, False)
    assert chosen == pytest.approx(0.25)
    assert segmentation.mean_jaccard(truth, postprocess.segment(probability, chosen, False)) == 1


def test_effects_separate_augmentation_cleanup_and_threshold() -> None:
    truth = square()
    plain = np.where(truth, 0.4, 0.0).astype(np.float32)  # needs a lower threshold
    augmented = plain.copy()
    augmented[0, 0, 0] = 0.9  # needs clean-up
    rows = postprocess.effects(truth, {1: plain, 8: augmented})
    found = {(row["views"], row["clean"], row["threshold_chosen"]): row["jaccard"] for row in rows}
    assert found == {
        (1, False, False): 0,
        (1, False, True): 1,
        (1, True, False): 0,
        (1, True, True): 1,
        (8, False, False): 0,
        (8, False, True): pytest.approx(16 / 17),
        (8, True, False): 0,
        (8, True, True): 1,
    }
    assert all(row["threshold"] == postprocess.DEFAULT_THRESHOLD for row in rows if not row["threshold_chosen"])
