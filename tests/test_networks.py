"""Forms, losses and weights of the two networks."""

import math
from functools import partial
from pathlib import Path

from melanoma import classifier, segnet
from melanoma.errors import InputError

import keras
import numpy as np
import pytest

SIZE = 32
mobilenet = partial(classifier.build_backbone, "mobilenet", SIZE)


def photographs(count: int = 2, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.float32)


def differ(first: np.ndarray, second: np.ndarray) -> float:
    """Largest difference, as a share of the largest value: features of random weights are small."""
    return float(abs(first - second).max() / abs(second).max())


def normalisations(model: keras.Model) -> list[keras.layers.Layer]:
    return [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]


@pytest.fixture(scope="module")
def weight_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a random mobilenet."""
    keras.utils.set_random_seed(1)
    path = tmp_path_factory.mktemp("weights") / "mobilenet.weights.h5"
    mobilenet("none").save_weights(path)
    return path


@pytest.mark.parametrize(("size", "network_size"), [(24, 24), (20, 16), (16, 32)])
def test_segnet_gives_a_probability_for_every_pixel_of_its_input(size: int, network_size: int) -> None:
    model = segnet.build(size, network_size, [120.0, 110, 100], [40.0, 30, 20])
    probability = model.predict_on_batch(photographs(2, size))
    assert probability.shape == (2, size, size, 1)
    assert probability.min() >= 0 and probability.max() <= 1 and probability.std() > 0


def test_segnet_standardises_inside() -> None:
    mean, std = [150.0, 120, 100], [40.0, 30, 20]
    inside, plain = segnet.build(16, 16, mean, std), segnet.build(16, 16, [0.0] * 3, [1.0] * 3)
    plain.set_weights(inside.get_weights())
    images = photographs(2, 16)
    by_hand = plain.predict_on_batch(((images - mean) / std).astype(np.float32))
    assert np.allclose(inside.predict_on_batch(images), by_hand, atol=1e-5)
    assert not np.allclose(plain.predict_on_batch(images), by_hand, atol=1e-3)


def test_segnet_takes_bytes_as_it_takes_floats() -> None:
    model, images = segnet.build(16, 16, [120.0] * 3, [40.0] * 3), photographs(2, 16)
    assert np.allclose(model.predict_on_batch(images.astype(np.uint8)), model.predict_on_batch(images), atol=1e-6)


@pytest.mark.parametrize("network_size", [20, 4, 201])
def test_network_size_must_fit_the_stages(network_size: int) -> None:
    with pytest.raises(ValueError, match=f"{network_size} is not a multiple of 8"):
        segnet.build(24, network_size, [0.0] * 3, [1.0] * 3)


def test_loss_of_each_image_by_hand() -> None:
    truth = np.stack([np.ones((2, 2, 1)), np.zeros((2, 2, 1))]).astype(np.uint8)
    predicted = np.full((2, 2, 2, 1), 0.5, np.float32)
    # Dice (overlap + 1) / (areas + 1): of the lesion (4 + 1) / (6 + 1), of the empty frame (0 + 1) / (2 + 1).
    expected = [1 - 5 / 7 + math.log(2), 1 - 1 / 3 + math.log(2)]
    assert np.asarray(segnet.dice_cross_entropy(truth, predicted)) == pytest.approx(expected, rel=1e-5)


def test_loss_of_a_perfect_mask_is_zero() -> None:
    truth = np.zeros((1, 4, 4, 1), np.float32)
    truth[0, 1:3, 1:3] = 1
    assert np.asarray(segnet.dice_cross_entropy(truth, truth)) == pytest.approx([0], abs=1e-5)


def test_watched_jaccard_is_that_of_each_image() -> None:
    truth = np.array([[1, 1, 0, 0], [0, 0, 0, 0]], np.uint8).reshape(2, 2, 2, 1)
    predicted = np.array([[0.9, 0.4, 0.6, 0.1], [0.1, 0.2, 0.3, 0.4]], np.float32).reshape(2, 2, 2, 1)
    assert np.asarray(segnet.jaccard(truth, predicted)) == pytest.approx([1 / 3, 1])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("mobilenet_v2", "mobilenetv2"),
        ("MobileNetV2", "mobilenetv2"),
        ("densenet121", "densenet121"),
        ("DenseNet-121", "densenet121"),
    ],
)
def test_backbones_go_by_several_spellings(text: str, name: str) -> None:
    assert classifier.backbone_name(text) == name


def test_unknown_backbone_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'mobilenet_v9'.*mobilenetv2"):
        classifier.backbone_name("mobilenet_v9")


@pytest.mark.parametrize("name", ["mobilenet", "densenet121", "vgg16"])  # one of each kind of preprocessing
def test_preprocessing_is_inside_the_model(name: str) -> None:
    module = {"mobilenet": "mobilenet", "densenet121": "densenet", "vgg16": "vgg16"}[name]
    backbone = classifier.build_backbone(name, SIZE, "none")
    images = photographs()
    by_hand = getattr(keras.applications, module).preprocess_input(images.copy())
    expected = backbone.predict_on_batch(by_hand)
    assert differ(classifier.extractor(name, backbone).predict_on_batch(images), expected) < 1e-3
    assert differ(backbone.predict_on_batch(images), expected) > 0.01
    assert np.array_equal(images, photographs())


def test_classifier_is_the_head_on_the_extracted_features() -> None:
    backbone = classifier.build_backbone("vgg16", SIZE, "none")
    head = classifier.build_head(backbone.output_shape[-1])
    images = photographs()
    features = classifier.extractor("vgg16", backbone).predict_on_batch(images)
    probabilities = classifier.assemble("vgg16", backbone, head).predict_on_batch(images)
    assert abs(probabilities - 1 / 3).max() > 1e-4  # the head sees something
    assert probabilities.shape == (2, 3)
    assert probabilities.sum(axis=1) == pytest.approx([1, 1], abs=1e-5)
    assert np.allclose(probabilities, head.predict_on_batch(features), atol=1e-5)


def test_weight_file_gives_the_features_of_the_model_that_it_came_from(weight_file: Path) -> None:
    keras.utils.set_random_seed(1)
    images = photographs() / 255
    expected = mobilenet("none").predict_on_batch(images)
    keras.utils.set_random_seed(2)
    assert differ(mobilenet(str(weight_file)).predict_on_batch(images), expected) < 1e-3
    assert differ(mobilenet("none").predict_on_batch(images), expected) > 0.01


def test_batch_normalisation_is_frozen_with_given_weights_only(weight_file: Path) -> None:
    frozen, free = normalisations(mobilenet(str(weight_file))), normalisations(mobilenet("none"))
    assert len(frozen) == len(free) > 20
    assert not any(layer.trainable for layer in frozen)
    assert all(layer.trainable for layer in free)


@pytest.mark.filterwarnings("ignore:Skipping nested container:UserWarning")
def test_weights_of_another_architecture_are_refused(weight_file: Path) -> None:
    with pytest.raises(InputError, match=r"mobilenet\.weights\.h5 does not fit mobilenetv2"):
        classifier.build_backbone("mobilenetv2", SIZE, str(weight_file))


@pytest.mark.filterwarnings("ignore:Skipping nested container:UserWarning")
def test_weights_of_a_whole_classifier_are_no_backbones(tmp_path: Path) -> None:
    backbone = mobilenet("none")
    path = tmp_path / "whole.weights.h5"
    classifier.assemble("mobilenet", backbone, classifier.build_head(1024)).save_weights(path)
    with pytest.raises(InputError, match="does not fit mobilenet"):
        mobilenet(str(path))


def test_corrupt_weights_are_refused(weight_file: Path, tmp_path: Path) -> None:
    cut, noise = tmp_path / "cut.weights.h5", tmp_path / "noise.weights.h5"
    cut.write_bytes(weight_file.read_bytes()[:200_000])
    noise.write_bytes(bytes(range(256)) * 8)
    for path in (cut, noise):
        with pytest.raises(InputError, match="does not fit mobilenet"):
            mobilenet(str(path))


def test_missing_weights_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; give a file, imagenet or none"):
        mobilenet(str(tmp_path / "none.weights.h5"))


def test_image_too_small_for_the_backbone_is_told() -> None:
    with pytest.raises(InputError, match="mobilenet with images of 16 pixels"):
        classifier.build_backbone("mobilenet", 16, "none")
