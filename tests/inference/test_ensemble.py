"""Ensembles: mean of the classifiers' probabilities, calibration, saving and loading."""

import json
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.errors import InputError, StageError
from melanoma.inference import ensemble
from melanoma.inference.calibration import Calibration
from melanoma.inference.ensemble import Ensemble
from melanoma.models import backbones, classifier

import keras
import numpy as np
import pytest
from pipeline import BACKBONE

SIZE = 16  # pixels
MEMBERS = ("_fold1", "_fold2")
CALIBRATION = Calibration(2.0, (0.0, 0.5, -0.5))


def build(seed: int) -> classifier.Classifier:
    keras.utils.set_random_seed(seed)
    return classifier.build(BACKBONE, SIZE, backbones.NONE, None, input_size=8)


def make_images(count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def two() -> Ensemble:
    return Ensemble([build(seed) for seed in (0, 1)], tta=False, calibration=CALIBRATION)


@pytest.fixture(scope="module")
def outputs(two: Ensemble) -> list[np.ndarray]:
    """Probabilities of each classifier for `make_images`."""
    return [one.model.predict_on_batch(make_images()) for one in two.classifiers]


def test_the_mean_of_the_classifiers_is_calibrated(two: Ensemble, outputs: list[np.ndarray]) -> None:
    found, engine = two.probabilities(make_images(), 4, "images")
    assert np.allclose(found, CALIBRATION.apply(np.mean(outputs, axis=0)), atol=1e-6)
    assert np.allclose(found.sum(axis=1), 1, atol=1e-6) and found.dtype == np.float32
    assert abs(outputs[0] - outputs[1]).max() > 1e-3
    assert engine == "keras float32"


def test_out_of_fold_probabilities_come_from_the_classifier_of_the_row(
    two: Ensemble, outputs: list[np.ndarray]
) -> None:
    fold = np.array([0, 1, 1, 0, 1])
    found, _ = two.probabilities(make_images(), 4, "images", fold[:, None] == np.arange(2))
    expected = [CALIBRATION.apply(outputs[number][row, None])[0] for row, number in enumerate(fold)]
    assert np.allclose(found, expected, atol=1e-6)


def settings(**changes: Any) -> dict[str, Any]:
    saved = {"backbone": BACKBONE, "size": SIZE, "scaling": None, "input_size": 8, "tta": False}
    return saved | {"calibration": vars(CALIBRATION), "members": dict.fromkeys(MEMBERS)} | changes


@pytest.fixture
def saved(two: Ensemble, tmp_path: Path) -> Store:
    """A data folder with the weights and settings of the ensemble."""
    store = Store(tmp_path, contract.CLASSIFIER, {})
    for member, one in zip(MEMBERS, two.classifiers, strict=True):
        store.save_weights("classifier_weights", one.model, backbone=BACKBONE, member=member)
    store.save_json("classifier_settings", settings(), backbone=BACKBONE)
    return Store(tmp_path, contract.EVALUATION, {})


def test_loaded_ensemble_gives_the_probabilities_of_the_saved_one(two: Ensemble, saved: Store) -> None:
    loaded, description = ensemble.load(saved, BACKBONE)
    assert (loaded.tta, loaded.calibration.temperature) == (False, 2.0)
    assert description == json.loads(json.dumps(settings()))
    expected, _ = two.probabilities(make_images(), 4, "images")
    assert np.array_equal(loaded.probabilities(make_images(), 4, "images")[0], expected)


def test_missing_weights_name_the_script_that_writes_them(saved: Store) -> None:
    saved.path("classifier_weights", backbone=BACKBONE, member=MEMBERS[1]).unlink()
    with pytest.raises(StageError, match=rf"{BACKBONE}_fold2\.weights\.h5.*{contract.CLASSIFIER}"):
        ensemble.load(saved, BACKBONE)


def test_weights_of_another_network_are_refused(saved: Store) -> None:
    path = saved.path("head_weights", backbone=BACKBONE, member="")
    build(0).head.save_weights(path)
    with pytest.raises(InputError, match=f"{path.name} does not fit {BACKBONE}_classifier"):
        ensemble.restore(settings(), [path])
