"""The second script: cross-validation, thresholds, precision, and the pretrained network."""

import json
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.dataset.splits import are_original, assign_folds
from melanoma.inference import postprocess
from melanoma.inference.predict import mean_output
from melanoma.metrics.segmentation import mean_jaccard
from melanoma.models import segmentation

import keras
import numpy as np
import pipeline
import pytest
from pipeline import exit_code, places, reader


def network(folder: Path, member: str = "") -> keras.Model:
    """The network of a finished run."""
    store = reader(folder)
    design = segmentation.Design(**settings(folder)["design"])
    model = segmentation.build(design, pipeline.SIZE)
    model.load_weights(store.path("segnet_weights", member=member))
    return model


def settings(folder: Path) -> dict[str, Any]:
    return json.loads(reader(folder).path("segnet_settings").read_text())


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "graphics" / "segmentation.json").read_text())


def test_masks_of_a_cross_validation_are_out_of_fold_on_train_and_a_mean_elsewhere(own_chain: Path) -> None:
    pipeline.segment(own_chain, "--folds", "2", "--no-clean", "--threshold", "0.5")
    store = reader(own_chain)
    source, groups, labels = (store.load(name, split="train") for name in ("source", "groups", "labels"))
    fold_of_row = assign_folds(source, groups, labels, 2, seed=0)
    models = [network(own_chain, member) for member in ("_fold1", "_fold2")]
    for split in ("train", "val"):
        images = store.load("images", split=split)
        each = np.stack([mean_output([model], images, views=1) for model in models])
        rows = np.arange(len(images))
        expected = each[fold_of_row, rows] if split == "train" else each.mean(axis=0)
        seen = each[1 - fold_of_row, rows] if split == "train" else each[0]
        predicted = store.load("predicted", split=split)
        assert (postprocess.segment(expected, 0.5, False) == predicted).mean() > 0.999
        assert (postprocess.segment(seen, 0.5, False) == predicted).mean() < 0.99
    originals = are_original(source)
    truth, predicted = (store.load(name, split="train")[originals] for name in ("masks", "predicted"))
    scored = report(own_chain)["splits"]["train"]
    assert scored["n"] == pipeline.COUNTS["train"]
    assert scored["metrics"]["jaccard"] == pytest.approx(mean_jaccard(truth, predicted))
    folder = store.path("segnet_weights", member="").parent
    assert {path.name for path in folder.glob("segnet*.h5")} == {f"segnet_fold{k}.weights.h5" for k in (1, 2)}
    curves = {path.name for path in (own_chain / "graphics").glob("segnet*_curves.png")}
    assert curves == {f"segnet_fold{k}_curves.png" for k in (1, 2)}


def test_masks_of_images_that_the_network_was_trained_on_are_not_scored(finished: Path) -> None:
    assert set(report(finished)["splits"]) == {"val", "test"}


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "scaled_trainings"), [("mixed_bfloat16", 0), ("mixed_float16", 3)])
def test_mixed_precision_gives_finite_float32_results(
    precision: str, scaled_trainings: int, own_chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled = []  # trainings with loss scaling, without which float16 gradients vanish
    scale = keras.optimizers.LossScaleOptimizer.scale_loss

    def count(optimizer: keras.optimizers.LossScaleOptimizer, loss: keras.KerasTensor) -> keras.KerasTensor:
        scaled.append(optimizer)
        return scale(optimizer, loss)

    monkeypatch.setattr(keras.optimizers.LossScaleOptimizer, "scale_loss", count)
    flags = ("--precision", precision, "--ema", "0.9")
    try:
        pipeline.segment(own_chain, *flags)
        pipeline.run(contract.ROI, own_chain)
        pipeline.classify(own_chain, *flags)
    finally:
        keras.config.set_dtype_policy("float32")
    assert len({id(optimizer) for optimizer in scaled}) == scaled_trainings
    store = reader(own_chain)
    probabilities = store.load("probabilities", split="val", backbone=pipeline.BACKBONE)
    assert probabilities.dtype == np.float32 and np.isfinite(probabilities).all()
    (part,) = json.loads(store.path("classifier_settings", backbone=pipeline.BACKBONE).read_text())["parts"]
    trainings = [settings(own_chain)["training"][0], *part["members"][""].values()]
    assert len(trainings) == 3
    assert all(np.isfinite(values).all() for training in trainings for values in training["history"].values())


def test_more_folds_than_images_are_refused(
    own_chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logging_restored: None
) -> None:
    flags = ("--network", "segnet", "--input-size", str(pipeline.SIZE), "--folds", "99")
    assert exit_code(monkeypatch, contract.SEGNET, *places(own_chain), *flags) == 2
    assert "--folds 99 is more than the 24 training images" in capsys.readouterr().err


def test_threshold_is_chosen_on_validation_saved_and_used(finished: Path) -> None:
    store = reader(finished)
    probability = mean_output([network(finished)], store.load("images", split="val"), views=1)
    truth = np.array(store.load("masks", split="val"))
    chosen = settings(finished)["threshold"]
    assert chosen == pytest.approx(postprocess.choose_threshold(truth, probability, clean=True))
    expected = postprocess.segment(probability, chosen, clean=True)
    assert (expected == store.load("predicted", split="val")).mean() > 0.999


def test_given_threshold_is_used(own_chain: Path) -> None:
    pipeline.segment(own_chain, "--threshold", "0.99", "--no-clean")
    store = reader(own_chain)
    probability = mean_output([network(own_chain)], store.load("images", split="val"), views=1)
    expected = postprocess.segment(probability, 0.99, clean=False)
    assert (expected == store.load("predicted", split="val")).mean() > 0.999
    assert settings(own_chain)["threshold"] == 0.99


def test_report_has_the_effects_of_all_steps_and_the_cost(finished: Path) -> None:
    found = report(finished)
    assert len(found["effects_on_validation"]) == 4
    assert found["cost"]["weights"] == network(finished).count_params()
    assert found["cost"]["seconds_per_epoch"] > 0 and found["images_per_second"]["1"] > 0


def test_changed_mask_files_do_not_stop_the_script(own_chain: Path, source: Path, tmp_path: Path) -> None:
    moved = pipeline.copy(source, tmp_path / "moved")
    pipeline.preprocess(moved, own_chain)
    next((moved / "ISIC-2017_Validation_Part1_GroundTruth").glob("*.png")).write_bytes(b"no image")
    pipeline.segment(own_chain)
    assert set(report(own_chain)["splits"]) == {"val", "test"}
    assert set(report(own_chain)["own_size"]) == {"test"}
