"""What computes predictions: OpenVINO against Keras, and who is chosen when."""

import gc
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from melanoma import backbones, classifier, inference, pretrained, segnet, training

import keras
import numpy as np
import pipeline
import pytest

SIZE = 32
MANY = inference.LEAST_VIEWS
WAY = "openvino float32"
needs_openvino = pytest.mark.skipif(bool(inference.obstacle()), reason=inference.obstacle())


@pytest.fixture
def policies_restored() -> Iterator[None]:
    """Goes back to float32 after a test that sets another policy."""
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture(autouse=True)
def told_anew() -> Iterator[None]:
    """Each test hears of its own choices."""
    inference.tell.cache_clear()
    yield
    inference.tell.cache_clear()


def photographs(count: int = 3, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def colours(normalised: bool = False) -> keras.Model:
    """A small random network with dropout, which must not be at work in prediction."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.AveragePooling2D(8)(keras.layers.Rescaling(1 / 255)(inputs))
    x = keras.layers.BatchNormalization()(x) if normalised else x
    x = keras.layers.Dropout(0.6)(keras.layers.Flatten()(x))
    return keras.Model(inputs, keras.layers.Dense(2)(x), name="colours")


def settle(model: keras.Model, images: np.ndarray) -> None:
    """Takes batch normalisation near these images' statistics: without, random networks hardly see a difference."""
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.05
    model(images.astype(np.float32), training=True)


def outliner(network: str, network_size: int, backbone: str = "", size: int = SIZE) -> keras.Model:
    mean, std = ([120.0] * 3, [60.0] * 3) if network == "segnet" else (None, None)
    return segnet.build(segnet.Design(network, network_size, backbone, mean=mean, std=std), size)


NETWORKS = {
    "segnet": lambda: outliner("segnet", 16),
    "segnet_vgg16": lambda: outliner("segnet_vgg16", 32, "vgg16", 40),
    "unet-mobilenetv2": lambda: outliner("unet", 48, "mobilenetv2", 40),
    "unet-xception": lambda: outliner("unet", 96, "xception", 64),
    "classifier-densenet121": lambda: classifier.build("densenet121", 40, "none", network_size=32).model,
    "extractor-vgg16": lambda: classifier.build("vgg16", SIZE, "none", "torch").extractor(),
}


@needs_openvino
@pytest.mark.parametrize("name", NETWORKS)
def test_converted_network_is_the_same_function(name: str) -> None:
    keras.utils.set_random_seed(0)
    model = NETWORKS[name]()
    images = photographs(3, model.input_shape[1])
    settle(model, images)
    expected, found = model.predict_on_batch(images), inference.Compiled(model).predict_on_batch(images)
    assert found.shape == expected.shape and found.dtype == np.float32
    assert abs(found - expected).max() < 1e-3 * expected.std(axis=0).mean()


@needs_openvino
def test_every_image_is_given_its_own_result() -> None:
    model, images = colours(), photographs(50)
    expected = model.predict_on_batch(images)
    found = inference.Compiled(model).predict_on_batch(images)
    assert np.allclose(found, expected, atol=0.01)
    nearest = abs(found[:, None] - expected).sum(axis=2).argmin(axis=1)
    assert (nearest == np.arange(50)).mean() > 0.5


def test_pretrained_network_answers_in_bfloat16_nearly_as_in_float32(finished: Path, policies_restored: None) -> None:
    store = pipeline.reader(finished)
    images = np.concatenate([store.load("masked", split=split) for split in ("val", "test")])

    def pretrained_one() -> keras.Model:
        return pretrained.load_classifier(pipeline.SIZE)[0].classifiers[0].model

    expected = pretrained_one().predict_on_batch(images)
    keras.config.set_dtype_policy("mixed_bfloat16")
    if reason := inference.obstacle():
        pytest.skip(reason)
    model = pretrained_one()
    before = [layer.dtype_policy.name for layer in backbones.flat(model)]
    found = inference.Compiled(model).predict_on_batch(images)
    assert [layer.dtype_policy.name for layer in backbones.flat(model)] == before and "mixed_bfloat16" in before
    assert 1e-4 < abs(found - expected).mean() < 0.1  # README, "Without a GPU": what bfloat16 costs
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.9


@needs_openvino
@pytest.mark.parametrize("change", ["assigned", "trained", "statistics"])
def test_changed_weights_change_the_predictions(change: str) -> None:
    model, images = colours(normalised=change == "statistics"), photographs(MANY)

    def predicted() -> np.ndarray:
        found = training.predict([model], images, 16, "images")
        values = np.concatenate(list(found))
        assert found.inference.name == WAY
        return values

    before = predicted()
    assert np.array_equal(predicted(), before)
    if change == "trained":
        model.compile("sgd", loss="mse")
        model.fit(images[:16], np.ones((16, 2)), epochs=1, verbose=0)
    elif change == "assigned":
        bias = model.layers[-1].bias
        bias.assign(bias + 1)
    else:
        settle(model, images[:16])
    after = predicted()
    assert abs(after - before).max() > 0.05
    assert np.allclose(after, model.predict_on_batch(images), atol=0.05)


@needs_openvino
def test_network_is_compiled_once_while_its_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    compiled = inference.Compiled

    def count(model: keras.Model) -> inference.Compiled:
        made.append(model.name)
        return compiled(model)

    monkeypatch.setattr(inference, "Compiled", count)
    models, images = [colours(), colours()], photographs(MANY)
    for _ in range(2):
        list(training.predict(models, images, 16, "images"))
    assert len(made) == 2
    models[1].layers[-1].bias.assign([1.0, 1.0])
    list(training.predict(models, images, 16, "images"))
    assert len(made) == 3


@needs_openvino
def test_compiled_network_goes_with_its_model() -> None:
    gc.collect()
    before, model = len(inference._converted), colours()
    inference.converted(model)
    assert len(inference._converted) == before + 1
    del model
    gc.collect()
    assert len(inference._converted) == before


@needs_openvino
def test_choice_falls_on_openvino_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    models = [colours()]
    for _ in range(2):
        list(training.predict(models, photographs(MANY), 16, "images"))
    told = [line for line in caplog.messages if line.startswith("predictions by")]
    assert told == ["predictions by openvino float32: there is no GPU"]


@needs_openvino
def test_turned_views_and_the_shares_of_networks_count() -> None:
    models, images = [colours(), colours()], photographs(MANY // 8)
    own = np.tile([True, False], (len(images), 1))
    chosen = [training.predict(models, images, 8, "images", *how).inference.name for how in ((), (True,), (True, own))]
    assert chosen == ["keras float32", WAY, "keras float32"]


def keras_predicts(caplog: pytest.LogCaptureFixture, model: keras.Model, images: np.ndarray) -> str:
    """Checks that Keras predicts; returns the reason that is told."""
    caplog.set_level(logging.INFO)  # and puts it back: a failed conversion leaves another
    caplog.set_level(logging.INFO, "melanoma")
    found = training.predict([model], images, 16, "images")
    values = np.concatenate(list(found))
    assert found.inference.name == "keras float32"
    assert np.allclose(values, model.predict(images, batch_size=16, verbose=0), atol=1e-6)
    (told,) = [line for line in caplog.messages if line.startswith("predictions by")]
    return told.removeprefix("predictions by keras float32: ")


def test_keras_predicts_where_the_package_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert "not installed" in keras_predicts(caplog, colours(), photographs(MANY))


def test_keras_predicts_on_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(keras.distribution, "list_devices", lambda: ["gpu:0"])
    assert keras_predicts(caplog, colours(), photographs(MANY)) == "there is a GPU"


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("mixed_float16", "OpenVINO has no way for --precision mixed_float16"),
        ("mixed_bfloat16", "the processor has no instructions for mixed_bfloat16"),
    ],
)
def test_keras_predicts_in_a_precision_that_openvino_or_the_processor_lacks(
    policy: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = SimpleNamespace(get_property=lambda device, name: ["FP32", "INT8"])
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=lambda: core, __spec__=object()))
    monkeypatch.setattr(inference, "load_openvino", lambda: sys.modules["openvino"])
    assert not inference.obstacle()
    monkeypatch.setattr(keras.config, "dtype_policy", lambda: keras.DTypePolicy(policy))
    chosen = inference.Inference([colours()], MANY)
    assert (chosen.name, chosen.reason) == (f"keras {policy}", reason)


def test_keras_predicts_on_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    assert "TensorFlow backend alone" in inference.Inference([colours()], MANY).reason


@needs_openvino
def test_keras_predicts_what_cannot_be_converted(caplog: pytest.LogCaptureFixture) -> None:
    inputs = keras.Input((SIZE, SIZE, 3))
    bits = keras.layers.Lambda(lambda x: keras.ops.cast(keras.ops.view(x, "int32") % 7, "float32"))(inputs)
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(bits), name="bits")
    reason = keras_predicts(caplog, model, photographs(MANY))
    assert reason == "OpenVINO cannot convert bits: No conversion rule found for operations: Bitcast"


@needs_openvino
def test_few_images_are_left_to_keras(caplog: pytest.LogCaptureFixture) -> None:
    assert "not worth converting" in keras_predicts(caplog, colours(), photographs(MANY - 1))


@needs_openvino
def test_nothing_is_reported_to_the_makers_of_openvino() -> None:
    inference.load_openvino()
    assert sys.modules["openvino_telemetry"] is None
    assert type(sys.modules["openvino.tools.ovc"].telemetry).__module__ == "openvino.tools.ovc.telemetry_stub"


def test_files_tell_what_computed_them(finished: Path) -> None:
    store = pipeline.reader(finished)
    fields = {"split": "val", "backbone": pipeline.BACKBONE}
    written = ("predicted", "features", "probabilities")
    assert {store.written_with(name, **fields)["inference"] for name in written} == {"keras float32"}
