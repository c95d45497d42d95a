"""Forms, losses and weights of the two networks."""

import math
from functools import partial
from pathlib import Path
from typing import Any

from melanoma import backbones, classifier, normalisation, segnet
from melanoma.errors import InputError

import keras
import numpy as np
import pytest
import tensorflow as tf

SIZE = 32
mobilenet = partial(backbones.build, "mobilenet", SIZE, pooling="avg")  # of weights


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


def small(size: int, network_size: int, mean: list[float], std: list[float]) -> keras.Model:
    return segnet.build(segnet.Design("segnet", network_size, mean=mean, std=std), size)


@pytest.mark.parametrize(
    ("network", "size", "network_size"),
    [
        (segnet.Design("segnet", 24, mean=[120.0, 110, 100], std=[40.0, 30, 20]), 24, 24),
        (segnet.Design("segnet", 16, mean=[120.0, 110, 100], std=[40.0, 30, 20]), 20, 16),
        (segnet.Design("segnet", 32, mean=[120.0, 110, 100], std=[40.0, 30, 20]), 16, 32),
        (segnet.Design("segnet_vgg16", 32, "vgg16", "torch"), 40, 32),
        (segnet.Design("unet", 48, "mobilenetv2"), 40, 48),
        (segnet.Design("unet", 96, "xception"), 64, 96),
        (segnet.Design("unet", 32, "densenet121"), 32, 32),
    ],
    ids=lambda value: f"{value.network}-{value.backbone}" if isinstance(value, segnet.Design) else str(value),
)
def test_network_gives_a_probability_for_every_pixel_of_its_input(
    network: segnet.Design, size: int, network_size: int
) -> None:
    model = segnet.build(network, size)
    probability = model.predict_on_batch(photographs(2, size))
    assert probability.shape == (2, size, size, 1) and probability.dtype == np.float32
    assert probability.min() >= 0 and probability.max() <= 1 and probability.std() > 0


def test_segnet_standardises_inside() -> None:
    mean, std = [150.0, 120, 100], [40.0, 30, 20]
    inside, plain = small(16, 16, mean, std), small(16, 16, [0.0] * 3, [1.0] * 3)
    plain.set_weights(inside.get_weights())
    images = photographs(2, 16)
    by_hand = plain.predict_on_batch(((images - mean) / std).astype(np.float32))
    assert np.allclose(inside.predict_on_batch(images), by_hand, atol=1e-5)
    assert not np.allclose(plain.predict_on_batch(images), by_hand, atol=1e-3)


def test_segnet_takes_bytes_as_it_takes_floats() -> None:
    model, images = small(16, 16, [120.0] * 3, [40.0] * 3), photographs(2, 16)
    assert np.allclose(model.predict_on_batch(images.astype(np.uint8)), model.predict_on_batch(images), atol=1e-6)


@pytest.mark.parametrize(
    ("network", "size", "stride"), [("segnet", 20, 8), ("segnet", 4, 8), ("segnet", 201, 8), ("segnet_vgg16", 48, 32)]
)
def test_network_size_must_fit_the_stages(network: str, size: int, stride: int) -> None:
    with pytest.raises(InputError, match=f"{size} is not a multiple of {stride}"):
        segnet.build(segnet.Design(network, size, mean=[0.0] * 3, std=[1.0] * 3), 24)


def test_maxima_and_their_indices_by_hand() -> None:
    x = np.array([[1, 2, 5, 5], [4, 3, 0, -1]], np.float32).reshape(1, 2, 4, 1)
    maxima, indices = segnet.MaxPoolingWithIndices()(x)
    assert np.asarray(maxima).ravel().tolist() == [4, 5]
    assert np.asarray(indices).ravel().tolist() == [2, 0]  # of equal ones the first


def test_unpooling_puts_values_back_where_they_came_from() -> None:
    x = np.random.default_rng(0).random((2, 4, 6, 3), np.float32)
    maxima, indices = segnet.MaxPoolingWithIndices()(x)
    assert np.array_equal(maxima, keras.layers.MaxPooling2D()(x))
    back = np.asarray(segnet.MaxUnpooling()(maxima, indices))
    assert np.count_nonzero(back) == back.size / 4
    assert np.array_equal(back[back > 0], x[back > 0])


def test_vgg16_decoder_mirrors_its_encoder() -> None:
    model = segnet.build(segnet.Design("segnet_vgg16", 32, "vgg16"), 32)
    filters = [layer.filters for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    encoder = [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    assert filters == [*encoder, *encoder[-2:0:-1], 64, 64, 1]


@pytest.mark.parametrize(
    ("backbone", "sides"),
    [
        ("mobilenetv2", [96, 48, 24, 12, 6]),
        ("xception", [93, 47, 24, 12, 6]),
        ("densenet121", [96, 48, 24, 12, 6]),
        ("efficientnetb0", [96, 48, 24, 12, 6]),
    ],
)
def test_skip_connections_leave_from_every_level(backbone: str, sides: list[int]) -> None:
    assert [skip.shape[1] for skip in segnet.skips(backbones.build(backbone, 192, "none"))] == sides


def test_backbone_of_the_unet_starts_with_the_weights_given(weight_file: Path) -> None:
    model = segnet.build(segnet.Design("unet", SIZE, "mobilenet"), SIZE, str(weight_file))
    (encoder,) = (layer for layer in model.layers if isinstance(layer, keras.Model))
    expected = mobilenet(str(weight_file)).get_layer("conv1").get_weights()[0]
    assert np.array_equal(encoder.get_layer("conv1").get_weights()[0], expected)


@pytest.mark.parametrize("loss", segnet.LOSSES.values(), ids=list(segnet.LOSSES))
def test_losses_are_of_each_image_and_near_zero_for_its_mask(loss: segnet.Loss) -> None:
    truth = np.zeros((2, 8, 8, 1), np.float32)
    truth[0, :4], truth[1, :2] = 1, 1
    assert np.asarray(loss(truth, truth)).shape == (2,)
    assert np.asarray(loss(truth, truth)) == pytest.approx([0, 0], abs=1e-4)
    assert (np.asarray(loss(truth, 1 - truth)) > 0.9).all()
    both, alone = np.asarray(loss(truth, truth * 0.8)), np.asarray(loss(truth[1:], truth[1:] * 0.8))
    assert both[1] == pytest.approx(alone[0], abs=1e-6)  # the other image of the batch does not matter


def test_tversky_by_hand() -> None:
    truth = np.array([1, 1, 1, 1, 0, 0, 0, 0], np.float32).reshape(1, 2, 4, 1)
    predicted = np.array([1, 1, 0, 0, 1, 0, 0, 0], np.float32).reshape(1, 2, 4, 1)
    index = 2 / (2 + 0.7 * 2 + 0.3 * 1)  # 2 hits, 2 missed, 1 false
    assert np.asarray(segnet.tversky(truth, predicted)) == pytest.approx([1 - index], rel=1e-5)
    assert np.asarray(segnet.focal_tversky(truth, predicted)) == pytest.approx([(1 - index) ** 0.75], rel=1e-5)


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


def one_step(model: keras.Model, loss: Any, targets: np.ndarray, compiled: bool) -> tuple[float, np.ndarray]:
    """The loss before a training step, compiled by XLA or not at all, and what it adds to the weights."""
    start = model.get_weights()
    # Plain descent: Adam divides gradients by their size, and so turns rounding into steps.
    model.compile(keras.optimizers.SGD(1e-2), loss=loss, jit_compile=compiled, run_eagerly=not compiled)
    before = float(model.train_on_batch(photographs(4), targets))
    step = np.concatenate([(new - old).ravel() for new, old in zip(model.get_weights(), start, strict=True)])
    model.set_weights(start)
    return before, step


@pytest.mark.parametrize(
    "design",
    [
        segnet.Design("segnet", SIZE, mean=[120.0] * 3, std=[50.0] * 3),
        segnet.Design("unet", SIZE, "mobilenet"),
        segnet.Design("segnet_vgg16", SIZE, "vgg16"),
        None,
    ],
    ids=["segnet", "unet", "segnet_vgg16", "classifier"],
)
def test_training_compiled_by_xla_equals_training_step_by_step(design: segnet.Design | None) -> None:
    # On a CPU Keras compiles with XLA only where it is told to, on a GPU wherever it can.
    keras.utils.set_random_seed(0)
    model: keras.Model
    loss: Any
    targets: np.ndarray
    if design:
        model, loss = segnet.build(design, SIZE), segnet.dice_cross_entropy
        targets = np.zeros((4, SIZE, SIZE, 1), np.uint8)
        targets[:, 8:20, 5:25] = 1
    else:
        network = classifier.build("mobilenet", SIZE, "none")
        network.head.get_layer("dropout").rate = 0  # XLA draws other numbers
        model, loss = network.model, "categorical_crossentropy"
        targets = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    (expected, step), (found, compiled_step) = (one_step(model, loss, targets, compiled) for compiled in (False, True))
    assert found == pytest.approx(expected, rel=1e-4)
    assert np.linalg.norm(compiled_step - step) < 0.01 * np.linalg.norm(step)  # 4e-4 and less were seen


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
    assert backbones.name_of(text) == name


def test_unknown_backbone_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'mobilenet_v9'.*mobilenetv2"):
        backbones.name_of("mobilenet_v9")


@pytest.mark.parametrize("name", ["mobilenet", "densenet121", "vgg16"])  # one of each kind of preprocessing
def test_preprocessing_is_inside_the_model(name: str) -> None:
    module = {"mobilenet": "mobilenet", "densenet121": "densenet", "vgg16": "vgg16"}[name]
    network = classifier.build(name, SIZE, "none")
    backbone = network.backbone
    images = photographs()
    by_hand = getattr(keras.applications, module).preprocess_input(images.copy())
    expected = backbone.predict_on_batch(by_hand)
    assert differ(network.extractor().predict_on_batch(images), expected) < 1e-3
    assert differ(backbone.predict_on_batch(images), expected) > 0.01
    assert np.array_equal(images, photographs())


def test_classifier_is_the_head_on_the_extracted_features() -> None:
    network = classifier.build("vgg16", SIZE, "none")
    images = photographs()
    features = network.extractor().predict_on_batch(images)
    probabilities = network.model.predict_on_batch(images)
    assert abs(probabilities - 1 / 3).max() > 1e-4  # the head sees something
    assert probabilities.shape == (2, 3)
    assert probabilities.sum(axis=1) == pytest.approx([1, 1], abs=1e-5)
    assert np.allclose(probabilities, network.head.predict_on_batch(features), atol=1e-5)


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
        backbones.build("mobilenetv2", SIZE, str(weight_file))


@pytest.mark.filterwarnings("ignore:Skipping nested container:UserWarning")
def test_weights_of_a_whole_classifier_are_no_backbones(tmp_path: Path) -> None:
    path = tmp_path / "whole.weights.h5"
    classifier.build("mobilenet", SIZE, "none").model.save_weights(path)
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
        backbones.build("mobilenet", 16, "none")


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize(("policy", "tolerance"), [("float32", 1e-3), ("mixed_bfloat16", 2e-2)])
def test_fused_normalisation_equals_that_of_keras(policy: str, tolerance: float, learns: bool) -> None:
    x = np.random.default_rng(0).normal(2, 3, (3, 5, 4, 6)).astype(np.float32)
    target = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    found = []
    for make in (normalisation.BatchNormalization, keras.layers.BatchNormalization):
        keras.utils.set_random_seed(0)
        inputs = keras.Input(x.shape[1:])
        layer = make(momentum=0.5, dtype=policy)
        before = keras.layers.Conv2D(6, 1, name="before", dtype=policy)
        model = keras.Model(inputs, layer(before(inputs)))
        layer.trainable = learns
        layer.gamma.assign(np.linspace(0.5, 2, 6))
        layer.moving_variance.assign(np.linspace(1, 3, 6))
        model.compile(keras.optimizers.SGD(0.1), loss="mse")
        losses = [model.train_on_batch(x, target) for _ in range(2)]
        found.append([*losses, *model.get_weights(), model.predict_on_batch(x)])
    for fused, composed in zip(*found, strict=True):
        assert np.asarray(fused, np.float32) == pytest.approx(
            np.asarray(composed, np.float32), rel=tolerance, abs=tolerance
        )


def test_networks_are_normalised_by_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    kernel = tf.raw_ops.FusedBatchNormV3

    def watch(**given: Any) -> Any:
        used.append(str(given["x"].dtype.name))
        return kernel(**given)

    monkeypatch.setattr(tf.raw_ops, "FusedBatchNormV3", watch)
    for model in (mobilenet("none"), small(16, 16, [120.0] * 3, [40.0] * 3)):
        used.clear()
        model(photographs(1, model.input_shape[1]))
        assert used == ["float32"] * len(normalisations(model))
