"""Probabilities of every split, and their calibration."""

from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.dataset.splits import UNLABELLED
from melanoma.errors import StageError
from melanoma.inference import calibration, classify

import numpy as np
import pytest
from pipeline import save_rows

SOURCE = {"train": [0, 1, 2, 3, 1, 3], "val": [0, 1, 2], "test": [0, 1]}
LABELS = {"train": [0, 1, 2, 0, 1, 0], "val": [0, 1, 2]}
FOLDS = np.array([0, 1, 0, 1, 1, 1])  # of the rows of train


class FakeEnsemble:
    """The brightness of an image is its probability of melanoma for the first fold; the second says the contrary."""

    def __init__(self) -> None:
        self.out_of_fold: list[np.ndarray | None] = []

    def fold_probabilities(
        self, images: np.ndarray, batch_size: int, label: str, out_of_fold: np.ndarray | None = None
    ) -> tuple[np.ndarray, str]:
        self.out_of_fold.append(out_of_fold)
        melanoma = images[:, 0, 0, 0].astype(np.float32) / 100
        first = np.stack([0.9 - melanoma, melanoma, np.full_like(melanoma, 0.1)], axis=1)
        folds = [first] if out_of_fold is not None else [first, first[:, [1, 0, 2]]]
        return np.stack(folds, axis=1), f"engine {len(images) > 3}"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """The image of row n has brightness 10 (n + 1), except for copies, which are black."""
    for split, source in SOURCE.items():
        step1, step3 = Store(tmp_path, contract.PREPROCESSING, {}), Store(tmp_path, contract.ROI, {"roi": "crop"})
        save_rows(tmp_path, split, source)
        if split in LABELS:
            step1.save("labels", np.array(LABELS[split], np.int8), split=split)
        brightness = [10 * (row + 1) if row == original else 0 for row, original in enumerate(source)]
        images = np.zeros((len(source), 4, 4, 3), np.uint8) + np.array(brightness, np.uint8)[:, None, None, None]
        step3.save("roi", images, split=split)
    return Store(tmp_path, contract.CLASSIFIER, {})


def predict(store: Store, out_of_fold: np.ndarray | None) -> tuple[dict[str, np.ndarray], FakeEnsemble]:
    ensemble: Any = FakeEnsemble()
    return classify.predict_splits(store, ensemble, 2, out_of_fold), ensemble


def test_without_cross_validation_train_is_not_predicted(store: Store) -> None:
    found, _ = predict(store, None)
    assert found.keys() == {"val", "test"}
    assert found["val"][:, 0, 1] == pytest.approx([0.1, 0.2, 0.3])
    assert found["val"][:, 1, 1] == pytest.approx([0.8, 0.7, 0.6])
    assert store.settings["inference"] == "engine False"


@pytest.mark.parametrize("base", [4, 3])
def test_after_a_cross_validation_the_originals_of_the_source_are_predicted_in_train(base: int, store: Store) -> None:
    save_rows(store.data, "train", SOURCE["train"], base)
    out_of_fold = FOLDS[:, None] == np.arange(2)
    found, ensemble = predict(store, out_of_fold)
    assert found["train"][:, 0, 1] == pytest.approx([0.1, 0.2, 0.3, 0.4][:base])
    of_train, *of_others = ensemble.out_of_fold
    assert of_train is not None and np.array_equal(of_train, out_of_fold[:base])
    assert of_others == [None, None]
    assert store.settings["inference"] == ("engine False, engine True" if base == 4 else "engine False")


@pytest.mark.parametrize("split", ["train", "val"])
def test_calibration_is_fitted_on_originals_of_train_if_they_were_predicted_or_else_on_validation(
    split: str, store: Store
) -> None:
    found, _ = predict(store, FOLDS[:, None] == np.arange(2) if split == "train" else None)
    rows = slice(4) if split == "train" else slice(3)
    folds = [found[split][rows, fold] for fold in range(1 if split == "train" else 2)]
    expected = calibration.fit(np.array(LABELS[split][rows] * len(folds)), np.concatenate(folds))
    fitted = classify.calibrate(store, found)
    assert (fitted.temperature, *fitted.bias) == pytest.approx((expected.temperature, *expected.bias), abs=1e-3)
    assert expected != calibration.IDENTITY


@pytest.mark.parametrize("split", ["train", "val"])
def test_calibration_is_fitted_on_labelled_images_only(split: str, store: Store) -> None:
    found, _ = predict(store, FOLDS[:, None] == np.arange(2) if split == "train" else None)
    labels = np.array(LABELS[split], np.int8)
    labels[0] = UNLABELLED
    Store(store.data, contract.PREPROCESSING, {}).save("labels", labels, split=split)
    rows = found[split][slice(1, 4) if split == "train" else slice(1, 3)]
    of_each_fold = np.repeat(labels[1 : 1 + len(rows)], rows.shape[1])
    assert classify.calibrate(store, found) == calibration.fit(of_each_fold, rows.reshape(-1, 3))


def test_without_labels_probabilities_are_not_calibrated(store: Store) -> None:
    found, _ = predict(store, None)
    assert classify.calibrate(store, {"test": found["test"]}) == calibration.IDENTITY


def test_regions_of_interest_of_all_splits_must_be_made_with_the_same_flag(store: Store) -> None:
    assert classify.roi_setting(store) == "crop"
    other = Store(store.data, contract.ROI, {"roi": "mask"})
    other.save("roi", np.array(other.load("roi", split="val")), split="val")
    with pytest.raises(StageError, match=rf"splits differ in --roi \(crop, mask\): run {contract.ROI}"):
        classify.roi_setting(store)
