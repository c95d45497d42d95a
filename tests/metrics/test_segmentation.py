"""Metrics of lesion masks against fractions counted by hand."""

from melanoma.metrics import segmentation

import numpy as np
import pytest


def mask(*rows: str) -> np.ndarray:
    """A mask (1, H, W, 1) from rows of 0 and 1."""
    return np.array([[int(pixel) for pixel in row] for row in rows], np.uint8)[None, ..., None]


def test_metrics_are_the_fractions_counted_by_hand() -> None:
    truth, predicted = mask("110", "110", "000"), mask("010", "011", "000")  # TP 2, FN 2, FP 1, TN 4
    expected = {
        "jaccard": 2 / 5,
        "dice": 4 / 7,
        "threshold_jaccard": 0.0,
        "pixel_accuracy": 6 / 9,
        "sensitivity": 2 / 4,
        "specificity": 4 / 5,
    }
    assert {name: value.item() for name, value in segmentation.per_image(truth, predicted).items()} == expected


def test_threshold_jaccard_keeps_a_jaccard_index_at_the_threshold_and_zeroes_one_below() -> None:
    truth = mask("11111", "11111", "11111", "11111")
    at, below = mask("11111", "11111", "11100", "00000"), mask("11111", "11111", "11000", "00000")
    found = segmentation.per_image(np.concatenate([truth, truth]), np.concatenate([at, below]))
    assert found["jaccard"].tolist() == [13 / 20, 12 / 20]
    assert found["threshold_jaccard"].tolist() == [13 / 20, 0]


def test_each_image_has_metrics_of_its_own() -> None:
    truth = np.concatenate([mask("110", "110", "000"), mask("000", "000", "001")])
    predicted = np.concatenate([mask("110", "110", "000"), mask("100", "000", "000")])
    assert segmentation.per_image(truth, predicted)["jaccard"].tolist() == [1, 0]


def test_mean_jaccard_counts_images_not_pixels() -> None:
    truth = np.concatenate([mask("1111", "1111"), mask("1000", "0000")])
    predicted = np.concatenate([mask("1111", "1111"), mask("1100", "0000")])
    assert segmentation.mean_jaccard(truth, predicted) == (1 + 1 / 2) / 2


def test_two_empty_masks_score_1() -> None:
    empty = mask("000", "000", "000")
    assert all(value.item() == 1 for value in segmentation.per_image(empty, empty).values())
    assert segmentation.mean_jaccard(empty, empty) == 1


def test_empty_prediction_of_a_lesion_scores_0() -> None:
    found = segmentation.per_image(mask("100", "000", "000"), mask("000", "000", "000"))
    assert [found[name].item() for name in ("jaccard", "dice", "sensitivity", "specificity")] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("truth", "predicted"),
    [
        (mask("11"), mask("11", "11")),
        (mask("11")[:0], mask("11")[:0]),
        (mask("11") * 255, mask("11")),
        (mask("11"), mask("11") * 255),
    ],
    ids=["shapes differ", "no image", "truth of 255", "prediction of 255"],
)
def test_invalid_masks_are_refused(truth: np.ndarray, predicted: np.ndarray) -> None:
    with pytest.raises(ValueError, match="mask"):
        segmentation.mean_jaccard(truth, predicted)
