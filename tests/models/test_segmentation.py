"""The segmentation networks."""

from pathlib import Path

from melanoma.errors import InputError
from melanoma.models import backbones, classifier, segmentation
from melanoma.models.segmentation import Design

import keras
import numpy as np
import pytest
import toy
import toy_training

SIZE = 32

toy.register()


def random_images(count: int = 2, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.float32)


def small_segnet(size: int, input_size: int, mean: list[float], std: list[float]) -> keras.Model:
    return segmentation.build(Design("segnet", input_size, mean=mean, std=std), size)


@pytest.mark.parametrize(
    ("design", "size"),
    [
        (Design("segnet", 24, mean=[120.0, 110, 100], std=[40.0, 30, 20]), 24),
        (Design("segnet", 16, mean=[120.0, 110, 100], std=[40.0, 30, 20]), 20),
        (Design("segnet", 32, mean=[120.0, 110, 100], std=[40.0, 30, 20]), 16),
        (Design("unet", 48, "toy"), 40),
        pytest.param(Design("unet", 48, "mobilenetv2"), 40, marks=pytest.mark.slow),
        pytest.param(Design("unet", 48, "efficientnetlite0"), 40, marks=pytest.mark.slow),
        pytest.param(Design("unet", 96, "xception"), 64, marks=pytest.mark.slow),
        pytest.param(Design("unet", 32, "densenet121"), 32, marks=pytest.mark.slow),
    ],
    ids=lambda value: (
        f"{value.network}-{value.backbone}-{value.input_size}" if isinstance(value, Design) else str(value)
    ),
)
def test_network_gives_a_probability_for_every_pixel_of_its_input(design: Design, size: int) -> None:
    model = segmentation.build(design, size)
    probability = model.predict_on_batch(random_images(2, size))
    assert probability.shape == (2, size, size, 1) and probability.dtype == np.float32
    assert probability.min() >= 0 and probability.max() <= 1 and probability.std() > 0


def test_segnet_standardises_inside_the_model() -> None:
    mean, std = [150.0, 120, 100], [40.0, 30, 20]
    inside, plain = small_segnet(16, 16, mean, std), small_segnet(16, 16, [0.0] * 3, [1.0] * 3)
    plain.set_weights(inside.get_weights())
    images = random_images(2, 16)
    expected = plain.predict_on_batch(((images - mean) / std).astype(np.float32))
    assert np.allclose(inside.predict_on_batch(images), expected, atol=1e-5)
    assert not np.allclose(plain.predict_on_batch(images), expected, atol=1e-3)


def test_segnet_takes_integers_and_floats() -> None:
    model, images = small_segnet(16, 16, [120.0] * 3, [40.0] * 3), random_images(2, 16)
    assert np.allclose(model.predict_on_batch(images.astype(np.uint8)), model.predict_on_batch(images), atol=1e-6)


@pytest.mark.parametrize(
    ("network", "input_size", "stride"),
    [("segnet", 20, 8), ("segnet", 4, 8), ("segnet", 201, 8), ("segnet_vgg16", 48, 32)],
)
def test_input_size_must_be_a_multiple_of_the_stride(network: str, input_size: int, stride: int) -> None:
    with pytest.raises(InputError, match=f"{input_size} is not a multiple of {stride}"):
        segmentation.build(Design(network, input_size, mean=[0.0] * 3, std=[1.0] * 3), 24)


def test_max_pooling_with_indices_by_hand() -> None:
    x = np.array([[1, 2, 5, 5], [4, 3, 0, -1]], np.float32).reshape(1, 2, 4, 1)
    maxima, indices = segmentation.MaxPoolingWithIndices()(x)
    assert np.asarray(maxima).ravel().tolist() == [4, 5]
    assert np.asarray(indices).ravel().tolist() == [2, 0]  # the first of equal values


def test_unpooling_puts_maxima_back_where_they_were() -> None:
    x = np.random.default_rng(0).random((2, 4, 6, 3), np.float32)
    maxima, indices = segmentation.MaxPoolingWithIndices()(x)
    assert np.array_equal(maxima, keras.layers.MaxPooling2D()(x))
    unpooled = np.asarray(segmentation.MaxUnpooling()(maxima, indices))
    assert np.count_nonzero(unpooled) == unpooled.size / 4
    assert np.array_equal(unpooled[unpooled > 0], x[unpooled > 0])


def test_vgg16_segnet_gives_probabilities_and_its_decoder_mirrors_its_encoder() -> None:
    model = segmentation.build(Design("segnet_vgg16", 32, "vgg16", "torch"), 40)
    probability = model.predict_on_batch(random_images(2, 40))
    assert probability.shape == (2, 40, 40, 1) and probability.std() > 0
    filters = [layer.filters for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    encoder = [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    assert filters == [*encoder, *encoder[-2:0:-1], 64, 64, 1]


def test_skip_features_are_the_last_maps_of_every_level_without_padded_ones_and_gates() -> None:
    inputs = keras.Input((32, 32, 3))
    half = keras.layers.Conv2D(2, 3, strides=2, name="half")(inputs)  # 15 pixels
    half = keras.layers.ReLU(name="last_half")(half)
    padded = keras.layers.ZeroPadding2D()(half)  # 17 pixels
    quarter = keras.layers.Conv2D(4, 3, strides=2, padding="valid", name="quarter")(padded)  # 8 pixels
    gate = keras.layers.GlobalAveragePooling2D(keepdims=True)(quarter)  # 1 pixel
    quarter = keras.layers.Multiply(name="last_quarter")([quarter, gate])
    features = segmentation.skip_features(keras.Model(inputs, quarter))
    assert [tuple(one.shape) for one in features] == [(None, 15, 15, 2), (None, 8, 8, 4)]
    assert features[0] is half and features[1] is quarter


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "sides"),
    [
        ("mobilenetv2", [96, 48, 24, 12, 6]),
        ("xception", [93, 47, 24, 12, 6]),
        ("densenet121", [96, 48, 24, 12, 6]),
        ("efficientnetb0", [96, 48, 24, 12, 6]),
        ("efficientnetlite0", [96, 48, 24, 12, 6]),
    ],
)
def test_real_backbones_have_skip_features_of_five_levels(backbone: str, sides: list[int]) -> None:
    model = backbones.build(backbone, 192, "none")
    assert [features.shape[1] for features in segmentation.skip_features(model)] == sides


def encoder_of(model: keras.Model) -> keras.Model:
    (encoder,) = (layer for layer in model.layers if isinstance(layer, keras.Model))
    return encoder


def test_unet_starts_with_the_weights_of_another_or_with_the_backbone_of_a_classifier(tmp_path: Path) -> None:
    unet, network = segmentation.build(Design("unet", SIZE, "toy"), SIZE), classifier.build("toy", SIZE, "none")
    unet.save_weights(tmp_path / "unet.weights.h5")
    network.model.save_weights(tmp_path / "classifier.weights.h5")
    again, other = (
        segmentation.build(Design("unet", SIZE, "toy"), SIZE, str(tmp_path / f"{name}.weights.h5"))
        for name in ("unet", "classifier")
    )
    assert toy_training.same_weights(again, unet)
    assert toy_training.same_weights(encoder_of(other), network.backbone)
    assert not toy_training.same_weights(other, unet)


def test_unet_starts_with_the_given_backbone_weights(tmp_path: Path) -> None:
    path = tmp_path / "toy.weights.h5"
    backbone = backbones.build("toy", SIZE, "none")
    backbone.save_weights(path)
    model = segmentation.build(Design("unet", SIZE, "toy"), SIZE, str(path))
    (encoder,) = (layer for layer in model.layers if isinstance(layer, keras.Model))
    for found, expected in zip(encoder.get_weights(), backbone.get_weights(), strict=True):
        assert np.array_equal(found, expected)
