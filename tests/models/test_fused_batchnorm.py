"""Batch normalisation by the fused kernel, in single layers and in networks."""

from pathlib import Path
from typing import Any

from melanoma.models import backbones, segmentation
from melanoma.models.fused_batchnorm import BatchNormalization, fuse_batchnorm

import keras
import numpy as np
import pytest
import tensorflow as tf
import toy
from keras import layers

SIZE = 32

toy.register()


def batchnorm_layers(model: keras.Model) -> list[keras.layers.Layer]:
    return [layer for layer in backbones.flatten_layers(model) if isinstance(layer, layers.BatchNormalization)]


def random_images(size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, size, size, 3)).astype(np.float32)


def randomise(model: keras.Model) -> None:
    """Changes every weight, running statistics too, so that none has its initial value."""
    rng = np.random.default_rng(0)
    model.set_weights([value + rng.uniform(0.1, 0.2, value.shape).astype(value.dtype) for value in model.get_weights()])


def composed_network() -> keras.Model:
    """A network of Keras' own layers: a nested model, a frozen layer, a layer with adapted statistics."""
    inputs = keras.Input((SIZE, SIZE, 3), name="images")
    standardise = layers.Normalization(name="standardise")
    standardise.adapt(random_images())
    x = layers.Conv2D(4, 3, name="conv")(standardise(inputs))
    x = layers.BatchNormalization(momentum=0.7, epsilon=0.01, name="norm")(x)
    frozen = layers.BatchNormalization(name="frozen")
    frozen.trainable = False
    x = layers.Dropout(0.5, name="dropout")(frozen(x))
    inner = [layers.Conv2D(5, 1, name="inner"), layers.BatchNormalization(name="inner_norm")]
    nested = keras.Sequential(inner, name="nested")
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(nested(x)), name="composed")
    randomise(model)
    standardise.finalize_state()
    return model


def settings(model: keras.Model) -> list[dict[str, Any]]:
    """Settings of all layers but the input's, whose name Keras makes up."""
    every = [layer.get_config() for layer in backbones.flatten_layers(model)]
    return [config for config in every if "batch_shape" not in config]


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize(("policy", "tolerance"), [("float32", 1e-3), ("mixed_bfloat16", 2e-2)])
def test_fused_layer_trains_and_predicts_as_that_of_keras(policy: str, tolerance: float, trainable: bool) -> None:
    x = np.random.default_rng(0).normal(2, 3, (3, 5, 4, 6)).astype(np.float32)
    target = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    results = []
    for layer_class in (BatchNormalization, layers.BatchNormalization):
        keras.utils.set_random_seed(0)
        inputs = keras.Input(x.shape[1:])
        layer = layer_class(momentum=0.5, dtype=policy)
        convolution = layers.Conv2D(6, 1, name="conv", dtype=policy)
        model = keras.Model(inputs, layer(convolution(inputs)))
        layer.trainable = trainable
        layer.gamma.assign(np.linspace(0.5, 2, 6))
        layer.moving_variance.assign(np.linspace(1, 3, 6))
        model.compile(keras.optimizers.SGD(0.1), loss="mse")
        losses = [model.train_on_batch(x, target) for _ in range(2)]
        results.append([*losses, *model.get_weights(), model.predict_on_batch(x)])
    for fused, composed in zip(*results, strict=True):
        assert np.asarray(fused, np.float32) == pytest.approx(
            np.asarray(composed, np.float32), rel=tolerance, abs=tolerance
        )


def test_networks_compute_with_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: list[str] = []
    kernel = tf.raw_ops.FusedBatchNormV3

    def recorded(**arguments: Any) -> Any:
        dtypes.append(str(arguments["x"].dtype.name))
        return kernel(**arguments)

    monkeypatch.setattr(tf.raw_ops, "FusedBatchNormV3", recorded)
    segnet = segmentation.Design("segnet", SIZE, mean=[120.0] * 3, std=[40.0] * 3)
    unet = segmentation.Design("unet", SIZE, "toy")
    for model in (
        backbones.build("toy", SIZE, "none"),
        segmentation.build(segnet, SIZE),
        segmentation.build(unet, SIZE),
        keras.models.clone_model(segmentation.build(unet, SIZE)),  # as for training on several devices
    ):
        dtypes.clear()
        model(random_images())
        assert dtypes == ["float32"] * len(batchnorm_layers(model)) != []


def fuse(model: keras.Model) -> None:
    fuse_batchnorm(backbones.flatten_layers(model))


def test_fused_layers_have_the_same_settings_and_weights() -> None:
    model = composed_network()
    weights, before, paths = model.get_weights(), settings(model), [weight.path for weight in model.trainable_weights]
    fuse(model)
    assert [type(layer) for layer in batchnorm_layers(model)] == [BatchNormalization] * 3
    assert settings(model) == before
    assert [weight.path for weight in model.trainable_weights] == paths
    for found, expected in zip(model.get_weights(), weights, strict=True):
        assert np.array_equal(found, expected)


def test_fused_network_predicts_as_before() -> None:
    model, images = composed_network(), random_images()
    expected = model.predict_on_batch(images)
    fuse(model)
    assert np.asarray(model(images)) == pytest.approx(expected, rel=1e-4)


def test_weight_file_fits_the_fused_network_and_back(tmp_path: Path) -> None:
    model, images = composed_network(), random_images()
    path, expected = tmp_path / "composed.weights.h5", model.predict_on_batch(images)
    model.save_weights(path)
    fused = composed_network()
    fuse(fused)
    randomise(fused)
    fused.load_weights(path)
    assert np.asarray(fused(images)) == pytest.approx(expected, rel=1e-4)
    fused.save_weights(path)
    randomise(model)
    model.load_weights(path)
    assert np.asarray(model(images)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnexttiny", "densenet121", "efficientnetb0", "mobilenetv2"])
def test_fused_real_backbone_equals_the_original(name: str) -> None:
    model = backbones.applications()[name].build(
        include_top=False, weights=None, input_shape=(64, 64, 3), pooling="avg"
    )
    images, before = random_images(64), settings(model)
    expected = np.asarray(model(images))
    fuse(model)
    assert np.asarray(model(images)) == pytest.approx(expected, rel=1e-3, abs=1e-5 * float(abs(expected).max()))
    assert settings(model) == before
