"""Masks of every split: the threshold chosen on validation, and out-of-fold masks of train."""

from pathlib import Path

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.inference import postprocess, segment
from melanoma.inference.segment import MaskOptions

import keras
import numpy as np
import pytest
from pipeline import save_rows

SIZE = 8  # pixels
OPTIONS = MaskOptions(views=2, clean=False, batch_size=4)


def network(scale: float) -> keras.Model:
    """The red channel, 0 to 255, times a factor is the probability of lesion."""
    inputs = keras.Input((SIZE, SIZE, 3))
    return keras.Model(inputs, keras.layers.Rescaling(scale / 255)(inputs)[..., :1])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Images of a lesion of 100 on skin of 50, i.e. probabilities of 0.39 and 0.2; validation has masks."""
    masks = np.zeros((4, SIZE, SIZE, 1), np.uint8)
    masks[:, 2:6, 2:6] = 1
    for split in ("train", "val"):
        store = Store(tmp_path, contract.PREPROCESSING, {})
        save_rows(tmp_path, split, range(4))
        store.save("images", np.where(masks, 100, 50).repeat(3, axis=3).astype(np.uint8), split=split)
    store.save("masks", masks, split="val")
    store.save("has_mask", np.ones(4, bool), split="val")
    return Store(tmp_path, contract.SEGNET, {})


def test_threshold_with_the_best_masks_of_validation_is_chosen(store: Store) -> None:
    threshold, report = segment.choose_threshold(store, [network(1.0)], OPTIONS)
    assert threshold == pytest.approx(0.2)  # the lowest of THRESHOLDS above 50 / 255
    effects = {
        (row["views"], row["clean"], row["threshold_chosen"]): row["jaccard"] for row in report["effects_on_validation"]
    }
    assert len(effects) == 8
    assert effects[1, False, False] == 0 and effects[1, False, True] == 1
    assert list(report["images_per_second"]) == [1, 2] and min(report["images_per_second"].values()) > 0
    assert store.settings["inference"] == "keras float32"


def test_without_validation_masks_the_default_threshold_is_used(store: Store) -> None:
    store.remove("masks", split="val")
    assert segment.choose_threshold(store, [network(1.0)], OPTIONS) == (postprocess.DEFAULT_THRESHOLD, {})


def test_threshold_is_chosen_on_images_that_have_a_mask(store: Store) -> None:
    """Empty masks of the others would make a threshold the best that finds nothing."""
    step1, has_mask = Store(store.data, contract.PREPROCESSING, {}), np.array([False, True, False, False])
    masks = np.array(step1.load("masks", split="val")) * has_mask[:, None, None, None].astype(np.uint8)
    step1.save("masks", masks, split="val")
    step1.save("has_mask", has_mask, split="val")
    threshold, report = segment.choose_threshold(store, [network(1.0)], OPTIONS)
    assert threshold == pytest.approx(0.2)
    assert max(row["jaccard"] for row in report["effects_on_validation"]) == 1


def test_masks_of_train_are_out_of_fold_and_those_of_other_splits_a_mean(store: Store) -> None:
    """The first network finds the lesion, the second finds nothing, and so does their mean."""
    out_of_fold = np.array([[True, False], [False, True], [True, False], [False, True]])
    segment.write_masks(store, segment.Segmenter([network(1.0), network(0.5)], 0.35, OPTIONS), out_of_fold)
    assert store.load("predicted", split="train").any(axis=(1, 2, 3)).tolist() == [True, False, True, False]
    assert not store.load("predicted", split="val").any()
    assert store.written_with("predicted", split="val")["inference"] == "keras float32"


def test_masks_are_cleaned_up_if_requested(store: Store) -> None:
    images = np.array(store.load("images", split="train"))
    images[:, 0, 0] = 100
    Store(store.data, contract.PREPROCESSING, {}).save("images", images, split="train")
    for clean, area in ((False, 17), (True, 16)):
        segment.write_masks(store, segment.Segmenter([network(1.0)], 0.35, MaskOptions(1, clean, 4)), None)
        assert store.load("predicted", split="train").sum(axis=(1, 2, 3)).tolist() == [area] * 4
