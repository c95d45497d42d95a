"""The classifier: backbone, preprocessing and head."""

from melanoma.models import classifier

import numpy as np
import pytest
import toy

SIZE = 32

toy.register()


def random_images(count: int = 2, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.float32)


def test_preprocessing_is_inside_the_model() -> None:
    network = classifier.build("toy", SIZE, "none")
    images = random_images()
    expected = network.backbone.predict_on_batch(toy.preprocess(images))
    assert network.extractor().predict_on_batch(images) == pytest.approx(expected, rel=1e-5)
    assert network.backbone.predict_on_batch(images) != pytest.approx(expected, rel=0.1)


def test_images_are_resized_to_the_input_size_inside_the_model() -> None:
    network = classifier.build("toy", 40, "none", classifier.Preprocessing(input_size=SIZE))
    assert network.preprocessing.input_size == SIZE and network.backbone.input_shape[1] == SIZE
    assert network.model.input_shape == (None, 40, 40, 3) and network.extractor().input_shape == (None, 40, 40, 3)
    assert network.model.predict_on_batch(random_images(2, 40)).shape == (2, 3)


def test_probabilities_are_the_head_on_the_extracted_features() -> None:
    network = classifier.build("toy", SIZE, "none")
    images = random_images()
    probabilities = network.model.predict_on_batch(images)
    expected = network.head.predict_on_batch(network.extractor().predict_on_batch(images))
    assert probabilities.shape == (2, 3) and probabilities.dtype == np.float32
    assert probabilities.sum(axis=1) == pytest.approx([1, 1], abs=1e-5)
    assert np.allclose(probabilities, expected, atol=1e-5)
    assert abs(probabilities - 1 / 3).max() > 1e-4  # the head does not ignore its input


def test_batch_normalisation_of_the_backbone_is_frozen_on_request() -> None:
    for trained in (None, True, False):
        network = classifier.build("toy", SIZE, "none", train_batchnorm=trained)
        assert network.backbone.get_layer("norm").trainable == (trained is not False)


def test_head_of_2018_has_1024_units_and_dropout() -> None:
    head = classifier.build_head(7)
    assert [layer.name for layer in head.layers] == ["features", "dense", "dropout", "classes"]
    assert head.get_layer("dense").units == 1024 and head.get_layer("dropout").rate == 0.6
