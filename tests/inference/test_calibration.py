"""Calibration: a known distortion of probabilities is undone."""

from melanoma.inference import calibration
from melanoma.metrics import classification

import numpy as np
import pytest
from scipy import special


def simulate(count: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and the probabilities with which they were drawn."""
    rng = np.random.default_rng(0)
    probabilities = special.softmax(rng.normal(0, 1.5, (count, 3)), axis=1)
    labels = (rng.random((count, 1)) > probabilities.cumsum(axis=1)).sum(axis=1)
    return labels, probabilities


def test_temperature_and_bias_by_hand() -> None:
    found = calibration.Calibration(2.0, (0.0, np.log(2), 0.0)).apply(np.array([[0.64, 0.16, 0.2]]))
    roots = np.array([0.8, 2 * 0.4, np.sqrt(0.2)])
    assert found == pytest.approx((roots / roots.sum())[None], abs=1e-6)
    assert found.dtype == np.float32


def test_probabilities_of_several_folds_are_calibrated_one_by_one() -> None:
    _, probabilities = simulate(6)
    one = calibration.Calibration(2.0, (0.0, 0.5, -0.5))
    folds = probabilities.reshape(3, 2, 3)
    assert one.apply(folds) == pytest.approx(one.apply(probabilities).reshape(3, 2, 3), abs=1e-6)


def test_identity_changes_nothing() -> None:
    _, probabilities = simulate(100)
    assert calibration.IDENTITY.apply(probabilities) == pytest.approx(probabilities, abs=1e-6)


def test_fit_recovers_a_known_temperature_and_bias() -> None:
    labels, calibrated = simulate()
    distorted = special.softmax(2.5 * (np.log(calibrated) - np.array([0, 0.7, -0.4])), axis=1)
    found = calibration.fit(labels, distorted)
    assert found.temperature == pytest.approx(2.5, rel=0.05)
    assert found.bias == pytest.approx((0, 0.7, -0.4), abs=0.06)
    assert abs(found.apply(distorted) - calibrated).mean() < 0.01


def test_mean_calibrated_probability_of_a_class_equals_its_frequency() -> None:
    labels, calibrated = simulate()
    balanced = calibrated / calibrated.mean(axis=0)[None] * [1, 5, 5]
    balanced /= balanced.sum(axis=1, keepdims=True)
    frequencies = np.bincount(labels) / len(labels)
    assert abs(balanced.mean(axis=0) - frequencies).max() > 0.1
    assert calibration.fit(labels, balanced).apply(balanced).mean(axis=0) == pytest.approx(frequencies, abs=0.002)


@pytest.mark.parametrize("confidence", [0.0, 1.0])
def test_constant_and_certain_probabilities_can_be_calibrated(confidence: float) -> None:
    labels = np.array([0, 1, 2, 0, 1, 2])
    predicted = (labels + np.array([0, 0, 0, 0, 0, 1])) % 3
    probabilities = np.eye(3)[predicted] * confidence + (1 - confidence) / 3
    found = calibration.fit(labels, probabilities)
    assert np.isfinite(found.apply(probabilities)).all() and np.isfinite(found.temperature)


def test_ranking_survives_a_fit_to_unrelated_labels() -> None:
    labels, probabilities = simulate(600)
    predicted = np.asarray(probabilities, np.float32)
    for seed in range(10):
        unrelated = np.random.default_rng(seed).permutation(labels)[:100]
        found = calibration.fit(unrelated, predicted[:100]).apply(predicted)
        before, after = classification.task_aucs(labels, predicted), classification.task_aucs(labels, found)
        assert after["melanoma auc"] == pytest.approx(before["melanoma auc"], abs=0.1)
        assert len(np.unique(found[:, 1])) > 500
