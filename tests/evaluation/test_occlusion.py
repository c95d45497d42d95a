"""Occlusion test and Grad-CAM: what is occluded, what is explained, what evaluate.py makes of them."""

import json
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.classes import CLASSES, TASKS
from melanoma.dataset import roi
from melanoma.evaluation import occlusion, scoring
from melanoma.inference import gradcam
from melanoma.models import classifier

import keras
import numpy as np
import pipeline
import pytest
from PIL import Image

SIZE = 40


def scene() -> tuple[np.ndarray, np.ndarray]:
    """Skin of one colour with a dark square in the middle, and the mask of the square."""
    image, mask = np.full((SIZE, SIZE, 3), 200, np.uint8), np.zeros((SIZE, SIZE, 1), np.uint8)
    mask[15:25, 15:25] = 1
    image[15:25, 15:25] = 50
    return image, mask


def test_occluded_lesion_leaves_only_skin() -> None:
    assert (occlusion.occlude(*scene(), occlusion.OCCLUDED) == 200).all()


def test_lesion_only_keeps_the_lesions_pixels_and_no_others() -> None:
    image, mask = scene()
    image[0, 0] = 0  # a mark on the skin
    found = occlusion.occlude(image, mask, occlusion.LESION_ONLY)
    assert (found[15:25, 15:25] == 50).all()
    assert np.ptp(found[mask[..., 0] == 0]) == 0 and abs(int(found[0, 0, 0]) - 200) <= 1


def test_variant_as_trained_and_unusable_masks_change_nothing() -> None:
    image, mask = scene()
    assert np.array_equal(occlusion.occlude(image, mask, occlusion.AS_TRAINED), image)
    for unusable in (np.zeros_like(mask), np.ones_like(mask)):
        assert all(np.array_equal(occlusion.occlude(image, unusable, variant), image) for variant in occlusion.VARIANTS)


def test_lesion_only_is_left_out_with_a_black_background_where_it_changes_nothing() -> None:
    image, mask = scene()
    seen = {
        name: [
            roi.region_of_interest(occlusion.occlude(image, mask, variant), mask, name)[0]
            for variant in occlusion.VARIANTS
        ]
        for name in roi.ROIS
    }
    assert np.array_equal(seen["mask"][0], seen["mask"][2]) and not np.array_equal(seen["mask"][0], seen["mask"][1])
    assert occlusion.variants("mask") == occlusion.VARIANTS[:2] and occlusion.variants("crop") == occlusion.VARIANTS


def test_notable_cases_are_ordered_by_confidence() -> None:
    probabilities = np.array([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.4, 0.3, 0.3], [0.05, 0, 0.95], [0.3, 0.7, 0]])
    found = occlusion.notable_cases(np.array([0, 0, 0, 2, 1]), probabilities, 2)
    assert {kind: rows.tolist() for kind, rows in found.items()} == {
        "most confident correct": [3, 0],
        "most confident errors": [1],
        "least confident": [2, 4],
    }


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="compares with TensorFlow's gradient")
def test_grad_cam_is_the_gradient_times_the_feature_maps() -> None:
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    network = classifier.build(pipeline.BACKBONE, SIZE, "none")
    backbone, head = network.backbone, network.head
    backbone.trainable = False
    images = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3)).astype(np.uint8)
    classes = np.array([1, 0, 2])
    feature_maps = keras.Model(backbone.input, backbone.layers[-1].input)
    with tf.GradientTape() as tape:
        features = feature_maps(network.preprocess(tf.cast(images, tf.float32)))
        tape.watch(features)
        hidden = head.get_layer("dense")(tf.reduce_mean(features, axis=(1, 2)))
        last = head.get_layer("classes")
        logits = tf.gather(hidden @ last.kernel + last.bias, classes, axis=1, batch_dims=1)
    weights = tf.reduce_mean(tape.gradient(logits, features), axis=(1, 2), keepdims=True)
    expected = np.maximum(np.sum(weights * features, axis=-1), 0)
    assert expected.max() > 0
    expected /= np.maximum(expected.max(axis=(1, 2), keepdims=True), 1e-12)
    assert gradcam.class_activation(network, images, classes, 2) == pytest.approx(expected, abs=1e-3)


def test_script_runs_the_occlusion_test_and_removes_its_figures_next_time(own_chain: Path) -> None:
    pipeline.use_true_masks(own_chain)
    pipeline.run(contract.ROI, own_chain)
    pipeline.classify(own_chain, "--train", "head")
    pipeline.run(contract.EVALUATION, own_chain, "--occlusion")
    graphics = own_chain / "graphics"
    system = json.loads((graphics / "metrics.json").read_text())["systems"][pipeline.BACKBONE]
    assert set(system["occlusion"]) == {"val", "test"}
    for split, variants in system["occlusion"].items():
        assert tuple(variants) == occlusion.VARIANTS
        for index in TASKS:
            metric = f"{CLASSES[index]} auc"
            expected = system["splits"][split]["metrics"][metric]
            assert variants[occlusion.AS_TRAINED]["metrics"][metric] == pytest.approx(expected, abs=0.02)
        for figure in ("occlusion", "gradcam"):
            with Image.open(graphics / f"{figure}_{split}.png") as shown:
                assert np.asarray(shown.convert("L")).std() > 5
    pipeline.run(contract.EVALUATION, own_chain)
    assert not list(graphics.glob("occlusion_*")) + list(graphics.glob("gradcam_*"))


def test_split_without_usable_masks_is_skipped(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(occlusion, "rows_with_lesion", lambda *_: np.zeros(0, int))
    images = scoring.load_images(pipeline.reader(finished))
    assert occlusion.evaluate(pipeline.reader(finished), pipeline.BACKBONE, images, tmp_path, 0) == {}
    assert list(tmp_path.iterdir()) == []


def test_only_images_that_are_evaluated_and_have_a_lesion_are_occluded(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any) -> None:
        given.extend(arguments[-2:])
        raise KeyboardInterrupt

    given: list[np.ndarray] = []
    images = scoring.Images({}, {"val": np.array([1, 2, 5])}, {"val": np.array([0, 1, 2])})
    monkeypatch.setattr(occlusion, "rows_with_lesion", lambda *_: np.array([0, 2, 5]))
    monkeypatch.setattr(occlusion, "predict_variants", stop)
    with pytest.raises(KeyboardInterrupt):
        occlusion.evaluate(pipeline.reader(finished), pipeline.BACKBONE, images, tmp_path, 0)
    rows, labels = given
    assert rows.tolist() == [2, 5] and labels.tolist() == [1, 2]
