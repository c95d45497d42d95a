"""Soft labels of other networks: whose they are, and which networks may give them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.dataset.splits import Member
from melanoma.errors import InputError, StageError
from melanoma.inference.calibration import IDENTITY
from melanoma.training import teacher

import numpy as np
import pipeline
import pytest

# Probability of melanoma that the networks of each fold give to every image, by teacher.
NETWORKS = {"a": {"_fold1": [0.2, 0.4], "_fold2": [0.8]}, "b": {"_fold1": [0.5], "_fold2": [0.6]}}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Three regions of interest, and two classifiers of a cross-validation."""
    pipeline.save_rows(tmp_path, "train", range(3))
    Store(tmp_path, contract.ROI, {}).save("roi", np.zeros((3, 4, 4, 3), np.uint8), split="train")
    classifier = Store(tmp_path, contract.CLASSIFIER, {"folds": 2, "seed": 7})
    for name in NETWORKS:
        classifier.save_json("classifier_settings", {}, backbone=name)
    return Store(tmp_path, contract.CLASSIFIER, {})


def check(store: Store, *teachers: str, folds: int = 2, seed: int = 7) -> None:
    teacher.check(store, teachers, folds, seed, "student")


def test_teachers_of_the_same_folds_are_accepted(store: Store) -> None:
    check(store, "a", "b")
    check(store, "a", folds=1, seed=0)  # nothing is held out


@pytest.mark.parametrize(("folds", "seed"), [(3, 7), (2, 0)])
def test_teacher_of_other_folds_is_refused(folds: int, seed: int, store: Store) -> None:
    with pytest.raises(InputError, match="--teacher a was trained with --folds 2 --seed 7: use the same"):
        check(store, "a", folds=folds, seed=seed)


def test_missing_teacher_and_a_network_as_its_own_teacher_are_refused(store: Store) -> None:
    with pytest.raises(StageError, match=f"c.json is missing: run {contract.CLASSIFIER} first"):
        check(store, "c")
    with pytest.raises(InputError, match="cannot be its own teacher"):
        check(store, "student")


@pytest.mark.parametrize(
    ("teachers", "fold", "expected"),
    [
        (("a",), 0, 0.3),  # the mean of two seeds
        (("a",), 1, 0.8),
        (("a", "b"), 1, 0.7),
        (("a",), -1, (0.3 + 0.8) / 2),
        (("a", "b"), -1, (0.3 + 0.8 + 0.5 + 0.6) / 4),
    ],
)
def test_soft_labels_come_from_networks_that_have_not_seen_the_fold(
    teachers: tuple[str, ...], fold: int, expected: float, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: Store, name: str) -> tuple[Any, None]:
        return SimpleNamespace(parts=[SimpleNamespace(folds=lambda: NETWORKS[name], calibration=IDENTITY)]), None

    def predict(networks: list[float], images: np.ndarray, batch_size: int, label: str) -> list[np.ndarray]:
        melanoma = np.full(len(images), np.mean(networks))
        return [np.stack([1 - melanoma, melanoma, np.zeros(len(images))], axis=1)]

    monkeypatch.setattr(teacher.ensemble, "load", load)
    monkeypatch.setattr(teacher, "predict", predict)
    found = teacher.soft_labels(store, teachers, Member("", fold, 0), 2, batch_size=4)
    assert found == pytest.approx(np.array([[1 - expected, expected, 0]] * 2), abs=1e-6)
