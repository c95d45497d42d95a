"""Calibration: a distortion of known size is undone, and nothing else happens."""

from melanoma import calibration, metrics
from melanoma.calibration import Calibration

import numpy as np
import pytest
from scipy import special


def simulated(count: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and labels drawn by them."""
    rng = np.random.default_rng(0)
    probabilities = special.softmax(rng.normal(0, 1.5, (count, 3)), axis=1)
    labels = (rng.random((count, 1)) > probabilities.cumsum(axis=1)).sum(axis=1)
    return labels, probabilities


def test_worked_case() -> None:
    found = Calibration(2.0, (0.0, np.log(2), 0.0)).apply(np.array([[0.64, 0.16, 0.2]]))
    roots = np.array([0.8, 2 * 0.4, np.sqrt(0.2)])
    assert found == pytest.approx((roots / roots.sum())[None], abs=1e-6)
    assert found.dtype == np.float32


def test_identity_changes_nothing() -> None:
    _, probabilities = simulated(100)
    assert calibration.IDENTITY.apply(probabilities) == pytest.approx(probabilities, abs=1e-6)


def test_temperature_and_bias_are_found() -> None:
    labels, honest = simulated()
    distorted = special.softmax(2.5 * (np.log(honest) - np.array([0, 0.7, -0.4])), axis=1)
    found = calibration.fit(labels, distorted)
    assert found.temperature == pytest.approx(2.5, rel=0.05)
    assert found.bias == pytest.approx((0, 0.7, -0.4), abs=0.06)
    assert abs(found.apply(distorted) - honest).mean() < 0.01


def test_calibrated_probabilities_promise_as_often_as_classes_come() -> None:
    labels, honest = simulated()
    balanced = honest / honest.mean(axis=0)[None] * [1, 5, 5]
    balanced /= balanced.sum(axis=1, keepdims=True)
    found = calibration.fit(labels, balanced).apply(balanced)
    assert abs(balanced.mean(axis=0) - np.bincount(labels) / len(labels)).max() > 0.1
    assert found.mean(axis=0) == pytest.approx(np.bincount(labels) / len(labels), abs=0.002)


@pytest.mark.parametrize("sure", [0.0, 1.0])
def test_answers_without_any_doubt_can_be_calibrated(sure: float) -> None:
    labels = np.array([0, 1, 2, 0, 1, 2])
    probabilities = np.eye(3)[(labels + np.array([0, 0, 0, 0, 0, 1])) % 3] * sure + (1 - sure) / 3
    found = calibration.fit(labels, probabilities)
    assert np.isfinite(found.apply(probabilities)).all() and np.isfinite(found.temperature)


def test_ranks_survive_answers_that_tell_nothing() -> None:
    labels, honest = simulated(600)
    answers = np.asarray(honest, np.float32)
    for seed in range(10):
        unrelated = np.random.default_rng(seed).permutation(labels)[:100]
        found = calibration.fit(unrelated, answers[:100]).apply(answers)
        before, after = metrics.areas(labels, answers), metrics.areas(labels, found)
        assert after["melanoma auc"] == pytest.approx(before["melanoma auc"], abs=0.1)
        assert len(np.unique(found[:, 1])) > 500
