"""Ensembles: mean of the networks' probabilities, calibration, mean of several backbones, saving and loading."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.errors import InputError, StageError
from melanoma.inference import ensemble, openvino, predict
from melanoma.inference.calibration import Calibration
from melanoma.inference.ensemble import Blend, Ensemble
from melanoma.models import backbones, classifier
from melanoma.models.classifier import Preprocessing

import keras
import numpy as np
import pytest
from pipeline import BACKBONE, OTHER

SIZE = 16  # pixels
MEMBERS = ("_fold1", "_fold2")
CALIBRATION = Calibration(0.1, (0.0, 0.5, -0.5))


def build(seed: int, backbone: str = BACKBONE, input_size: int = 8) -> classifier.Classifier:
    keras.utils.set_random_seed(seed)
    return classifier.build(backbone, SIZE, backbones.NONE, Preprocessing(input_size=input_size))


def make_images(count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def two() -> Ensemble:
    return Ensemble([build(seed) for seed in (0, 1)], MEMBERS, views=1, calibration=CALIBRATION)


@pytest.fixture(scope="module")
def blend(two: Ensemble) -> Blend:
    """The two, and a network of another backbone."""
    return Blend([two, Ensemble([build(2, OTHER, SIZE)], [""], views=8)])


@pytest.fixture(scope="module")
def outputs(two: Ensemble) -> list[np.ndarray]:
    """Probabilities of each classifier for `make_images`."""
    return [one.model.predict_on_batch(make_images()) for one in two.classifiers]


def test_each_fold_is_calibrated_and_then_the_folds_are_averaged(two: Ensemble, outputs: list[np.ndarray]) -> None:
    found, engine = two.probabilities(make_images(), 4, "images")
    assert found == pytest.approx(np.mean([CALIBRATION.apply(each) for each in outputs], axis=0), abs=1e-6)
    assert abs(found - CALIBRATION.apply(np.mean(outputs, axis=0))).max() > 1e-5  # of the mean it differs
    assert np.allclose(found.sum(axis=1), 1, atol=1e-6) and found.dtype == np.float32
    assert abs(outputs[0] - outputs[1]).max() > 1e-3
    assert engine == "keras float32"


@pytest.mark.parametrize("members", [("_seed0", "_seed1"), ("_fold1_seed0", "_fold1_seed1")])
def test_networks_of_one_fold_are_averaged_before_calibration(
    members: tuple[str, ...], two: Ensemble, outputs: list[np.ndarray]
) -> None:
    found, _ = dataclasses.replace(two, members=members).probabilities(make_images(), 4, "images")
    assert found == pytest.approx(CALIBRATION.apply(np.mean(outputs, axis=0)), abs=1e-6)


def test_probabilities_of_each_fold_are_the_mean_of_its_seeds(two: Ensemble, outputs: list[np.ndarray]) -> None:
    first, second = two.classifiers
    members = ("_fold1_seed0", "_fold1_seed1", "_fold2_seed0", "_fold2_seed1")
    four = Ensemble([first, second, first, first], members, views=1, calibration=CALIBRATION)
    assert [len(models) for models in four.folds().values()] == [2, 2]
    found, _ = four.fold_probabilities(make_images(), 4, "images")
    assert found.shape == (5, 2, 3)
    assert found[:, 0] == pytest.approx(np.mean(outputs, axis=0), abs=1e-6)
    assert found[:, 1] == pytest.approx(outputs[0], abs=1e-6)


def test_out_of_fold_probabilities_come_from_the_classifier_of_the_row(
    two: Ensemble, outputs: list[np.ndarray]
) -> None:
    fold = np.array([0, 1, 1, 0, 1])
    found, _ = two.fold_probabilities(make_images(), 4, "images", fold[:, None] == np.arange(2))
    assert found.shape == (5, 1, 3)
    assert found[:, 0] == pytest.approx(np.stack([outputs[number][row] for row, number in enumerate(fold)]), abs=1e-6)
    expected = [CALIBRATION.apply(outputs[number][row, None])[0] for row, number in enumerate(fold)]
    assert two.combine(found) == pytest.approx(np.stack(expected), abs=1e-6)


class Constant:
    """An ensemble that gives every image the same probabilities."""

    def __init__(self, probabilities: tuple[float, ...], engine: str) -> None:
        self.values, self.engine = np.array(probabilities, np.float32), engine

    def probabilities(self, images: np.ndarray, batch_size: int, label: str) -> tuple[np.ndarray, str]:
        return np.tile(self.values, (len(images), 1)), self.engine


def test_every_backbone_counts_equally_however_many_networks_it_has() -> None:
    parts: list[Any] = [Constant((0.5, 0.25, 0.25), "b"), Constant((0, 1, 0), "a"), Constant((0.25, 0.25, 0.5), "b")]
    found, engines = Blend(parts).probabilities(make_images(2), 4, "images")
    assert found.tolist() == [[0.25, 0.5, 0.25]] * 2 and found.dtype == np.float32
    assert engines == "a, b"


def test_every_network_is_called_once_for_every_batch(two: Ensemble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "MAX_EAGER_VIEWS", 0)
    calls = {}
    for one in two.classifiers:
        calls[one.model] = 0
        compute = one.model.predict_on_batch

        def count(batch: np.ndarray, model: Any = one.model, compute: Any = compute) -> np.ndarray:
            calls[model] += 1
            return compute(batch)

        monkeypatch.setattr(one.model, "predict_on_batch", count)
    two.probabilities(make_images(), 2, "images")
    assert list(calls.values()) == [3, 3]


def test_progress_names_the_fold(two: Ensemble, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = []

    def record(items: range, label: str, total: int) -> range:
        labels.append(label)
        return items

    monkeypatch.setattr(predict, "progress", record)
    two.probabilities(make_images(), 4, "images")
    dataclasses.replace(two, members=("_seed0", "_seed1")).probabilities(make_images(), 4, "images")
    assert labels == ["images, fold 1", "images, fold 2", "images"]


FIRST: dict[str, Any] = {"backbone": BACKBONE, "weights": BACKBONE, "scaling": None, "input_size": 8, "views": 1}
FIRST |= {"calibration": vars(CALIBRATION), "members": dict.fromkeys(MEMBERS)}
SECOND: dict[str, Any] = {"backbone": OTHER, "weights": f"my_{OTHER}", "scaling": None, "input_size": SIZE, "views": 8}
SECOND |= {"calibration": {}, "members": {"": None}}


@pytest.fixture
def saved(blend: Blend, tmp_path: Path) -> Store:
    """A data folder with the weights and settings of the two, and of both backbones as `contract.ENSEMBLE`."""
    store = Store(tmp_path, contract.CLASSIFIER, {})
    for part, one in zip((FIRST, SECOND), blend.parts, strict=True):
        for member, network in zip(one.members, one.classifiers, strict=True):
            store.save_weights("classifier_weights", network.model, backbone=part["weights"], member=member)
    store.save_json("classifier_settings", {"size": SIZE, "parts": [FIRST]}, backbone=BACKBONE)
    store.save_json("classifier_settings", {"size": SIZE, "parts": [FIRST, SECOND]}, backbone=contract.ENSEMBLE)
    return Store(tmp_path, contract.EVALUATION, {})


def test_loaded_ensemble_gives_the_probabilities_of_the_saved_one(two: Ensemble, saved: Store) -> None:
    loaded, description = ensemble.load(saved, BACKBONE)
    (part,) = loaded.parts
    assert (part.views, part.calibration.temperature) == (1, 0.1)
    assert list(part.folds()) == list(MEMBERS)
    assert description == json.loads(json.dumps({"size": SIZE, "parts": [FIRST]}))
    expected, _ = two.probabilities(make_images(), 4, "images")
    assert np.array_equal(loaded.probabilities(make_images(), 4, "images")[0], expected)


def test_loaded_blend_gives_the_probabilities_of_the_saved_one(blend: Blend, saved: Store) -> None:
    loaded, _ = ensemble.load(saved, contract.ENSEMBLE)
    assert [(part.members, part.views) for part in loaded.parts] == [(list(MEMBERS), 1), ([""], 8)]
    each = [part.probabilities(make_images(), 4, "images")[0] for part in blend.parts]
    found, _ = loaded.probabilities(make_images(), 4, "images")
    assert found == pytest.approx(np.mean(each, axis=0), abs=1e-6)
    assert abs(each[0] - each[1]).max() > 1e-3


def test_missing_weights_name_the_script_that_writes_them(saved: Store) -> None:
    saved.path("classifier_weights", backbone=BACKBONE, member=MEMBERS[1]).unlink()
    with pytest.raises(StageError, match=rf"{BACKBONE}_fold2\.weights\.h5.*{contract.CLASSIFIER}"):
        ensemble.load(saved, contract.ENSEMBLE)


def test_weights_of_another_network_are_refused(saved: Store) -> None:
    path = saved.path("head_weights", backbone=BACKBONE, member="")
    build(0).head.save_weights(path)
    with pytest.raises(InputError, match=f"{path.name} does not fit {BACKBONE}_classifier"):
        ensemble.restore(FIRST, SIZE, [path])
