"""Photographs without their lesion or nothing but it, Grad-CAM, and what evaluate.py makes of them."""

import json
from pathlib import Path

from melanoma import classifier, images, isic, probe, stages

import keras
import numpy as np
import pipeline
import pytest
from PIL import Image

SIZE = 40


def scene() -> tuple[np.ndarray, np.ndarray]:
    """Skin of one colour with a dark square in its middle."""
    image, mask = np.full((SIZE, SIZE, 3), 200, np.uint8), np.zeros((SIZE, SIZE, 1), np.uint8)
    mask[15:25, 15:25] = 1
    image[15:25, 15:25] = 50
    return image, mask


def test_blanked_lesion_leaves_skin_alone() -> None:
    assert (probe.alter(*scene(), probe.BLANKED) == 200).all()


def test_lesion_alone_keeps_its_pixels_and_no_others() -> None:
    image, mask = scene()
    image[0, 0] = 0  # a mark on the skin
    found = probe.alter(image, mask, probe.ALONE)
    assert (found[15:25, 15:25] == 50).all()
    assert np.ptp(found[mask[..., 0] == 0]) == 0 and abs(int(found[0, 0, 0]) - 200) <= 1


def test_variant_as_trained_and_useless_masks_change_nothing() -> None:
    image, mask = scene()
    assert np.array_equal(probe.alter(image, mask, probe.AS_TRAINED), image)
    for useless in (np.zeros_like(mask), np.ones_like(mask)):
        assert all(np.array_equal(probe.alter(image, useless, variant), image) for variant in probe.VARIANTS)


def test_masked_classifier_is_not_asked_about_the_lesion_alone() -> None:
    image, mask = scene()
    seen = {
        roi: [images.region_of_interest(probe.alter(image, mask, variant), mask, roi)[0] for variant in probe.VARIANTS]
        for roi in images.ROIS
    }
    assert np.array_equal(seen["mask"][0], seen["mask"][2]) and not np.array_equal(seen["mask"][0], seen["mask"][1])
    assert probe.variants("mask") == probe.VARIANTS[:2] and probe.variants("crop") == probe.VARIANTS


def test_cases_worth_a_look_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.4, 0.3, 0.3], [0.05, 0, 0.95], [0.3, 0.7, 0]])
    found = probe.telling_cases(np.array([0, 0, 0, 2, 1]), probabilities, 2)
    assert {kind: rows.tolist() for kind, rows in found.items()} == {
        "surest right": [3, 0],
        "surest wrong": [1],
        "least sure": [2, 4],
    }


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the gradient to compare with is TensorFlow's")
def test_evidence_is_the_gradient_times_the_feature_maps() -> None:
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    network = classifier.build("mobilenet", 64, "none")
    backbone, head = network.backbone, network.head
    pipeline.enliven(backbone)
    backbone.trainable = False
    photographs = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
    classes = np.array([1, 0, 2])
    maps = keras.Model(backbone.input, backbone.layers[-1].input)
    with tf.GradientTape() as tape:
        features = maps(network.preprocess(tf.cast(photographs, tf.float32)))
        tape.watch(features)
        hidden = head.get_layer("dense")(tf.reduce_mean(features, axis=(1, 2)))
        last = head.get_layer("classes")
        logits = tf.gather(hidden @ last.kernel + last.bias, classes, axis=1, batch_dims=1)
    weights = tf.reduce_mean(tape.gradient(logits, features), axis=(1, 2), keepdims=True)
    expected = np.maximum(np.sum(weights * features, axis=-1), 0)
    assert expected.max() > 0
    expected /= np.maximum(expected.max(axis=(1, 2), keepdims=True), 1e-12)
    assert probe.class_activation(network, photographs, classes) == pytest.approx(expected, abs=1e-3)


def test_probe_judges_the_classifier_and_draws_until_the_next_evaluation(own_chain: Path) -> None:
    pipeline.run(stages.EVALUATION, own_chain, "--probe")
    graphics = own_chain / "graphics"
    system = json.loads((graphics / "metrics.json").read_text())["systems"][pipeline.BACKBONE]
    assert set(system["probe"]) == {"val", "test"}
    for split, variants in system["probe"].items():
        assert tuple(variants) == probe.VARIANTS
        for name in isic.RANKED:
            figure = f"{isic.CLASSES[name]} auc"
            expected = system["splits"][split]["figures"][figure]
            assert variants[probe.AS_TRAINED]["figures"][figure] == pytest.approx(expected, abs=0.02)
        for picture in ("probe", "gradcam"):
            with Image.open(graphics / f"{picture}_{split}.png") as shown:
                assert np.asarray(shown.convert("L")).std() > 5
    pipeline.run(stages.EVALUATION, own_chain)
    assert not list(graphics.glob("probe_*")) + list(graphics.glob("gradcam_*"))  # they would be of another run
