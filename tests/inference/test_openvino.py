"""The engine of predictions: OpenVINO computes what Keras computes, and is chosen only where it can be used."""

import gc
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

from melanoma.dataset import decode
from melanoma.inference import openvino, pretrained
from melanoma.inference.predict import predict
from melanoma.models import backbones, classifier, segmentation
from melanoma.models.classifier import Preprocessing

import keras
import numpy as np
import pipeline
import pytest
import toy

ROOT = Path(__file__).parents[2]
SIZE = 32  # pixels
MANY = openvino.MIN_VIEWS
ENGINE = "openvino float32"
needs_openvino = pytest.mark.skipif(bool(openvino.obstacle()), reason=openvino.obstacle())


@pytest.fixture
def float32_restored() -> Iterator[None]:
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture(autouse=True)
def choices_logged_again() -> Iterator[None]:
    """A choice is logged once per process; here, once per test."""
    openvino.log_choice.cache_clear()
    yield
    openvino.log_choice.cache_clear()


def make_images(count: int = 3, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def small_network(batchnorm: bool = False) -> keras.Model:
    """A small random network with dropout, which prediction must switch off."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.AveragePooling2D(8)(keras.layers.Rescaling(1 / 255)(inputs))
    x = keras.layers.BatchNormalization()(x) if batchnorm else x
    x = keras.layers.Dropout(0.6)(keras.layers.Flatten()(x))
    return keras.Model(inputs, keras.layers.Dense(2)(x), name="small")


def update_statistics(model: keras.Model, images: np.ndarray) -> None:
    """Fits batch normalisation to the images; without it, outputs of random networks hardly depend on the image."""
    for layer in backbones.flatten_layers(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.05
    model(images.astype(np.float32), training=True)


# ---------------------------------------------------------------------------------------------- converted networks


def segmenter(network: str, input_size: int, backbone: str = "", size: int = SIZE) -> keras.Model:
    mean, std = ([120.0] * 3, [60.0] * 3) if network == "segnet" else (None, None)
    return segmentation.build(segmentation.Design(network, input_size, backbone, mean=mean, std=std), size)


NETWORKS: dict[str, Callable[[], keras.Model]] = {
    "segnet": lambda: segmenter("segnet", 16),
    "segnet_vgg16": lambda: segmenter("segnet_vgg16", 32, "vgg16", 40),
    "unet-mobilenetv2": lambda: segmenter("unet", 48, "mobilenetv2", 40),
    "unet-xception": lambda: segmenter("unet", 96, "xception", 64),
    "classifier-densenet121": lambda: classifier.build("densenet121", 40, "none", Preprocessing(input_size=32)).model,
    "extractor-vgg16": lambda: classifier.build(
        "vgg16", SIZE, "none", Preprocessing("torch", colour_constancy=True)
    ).extractor(),
}


@needs_openvino
@pytest.mark.parametrize(
    "build",
    [lambda: small_network(batchnorm=True), *(pytest.param(one, marks=pytest.mark.slow) for one in NETWORKS.values())],
    ids=["small", *NETWORKS],
)
def test_converted_network_computes_what_keras_computes(
    build: Callable[[], keras.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmentation, "ENCODER", toy.SEGNET_ENCODER)
    keras.utils.set_random_seed(0)
    model = build()
    images = make_images(3, model.input_shape[1])
    update_statistics(model, images)
    expected, found = model.predict_on_batch(images), openvino.Compiled(model).predict_on_batch(images)
    assert found.shape == expected.shape and found.dtype == np.float32
    assert abs(found - expected).max() < 1e-3 * expected.std(axis=0).mean()


@needs_openvino
def test_every_image_gets_its_own_result() -> None:
    model, images = small_network(), make_images(50)
    expected = model.predict_on_batch(images)
    found = openvino.Compiled(model).predict_on_batch(images)
    assert np.allclose(found, expected, atol=0.01)
    nearest = abs(found[:, None] - expected).sum(axis=2).argmin(axis=1)
    assert (nearest == np.arange(50)).mean() > 0.5


@pytest.mark.slow
def test_pretrained_classifier_in_bfloat16_is_close_to_float32(source: Path, float32_restored: None) -> None:
    records = [record for split in ("val", "test") for record in pipeline.records(source, split)]
    images = np.stack([decode.read_pair(record.image, None, SIZE).image for record in records])

    def build() -> keras.Model:
        return pretrained.load_classifier(SIZE)[0].parts[0].classifiers[0].model

    expected = build().predict_on_batch(images)
    keras.config.set_dtype_policy("mixed_bfloat16")
    if reason := openvino.obstacle():
        pytest.skip(reason)
    model = build()
    policies = [layer.dtype_policy.name for layer in backbones.flatten_layers(model)]
    found = openvino.Compiled(model).predict_on_batch(images)
    assert [layer.dtype_policy.name for layer in backbones.flatten_layers(model)] == policies
    assert "mixed_bfloat16" in policies
    assert 1e-4 < abs(found - expected).mean() < 0.1
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.9


# ------------------------------------------------------------------------------------------------------------ caching


@needs_openvino
@pytest.mark.parametrize("change", ["assigned", "trained", "statistics"])
def test_changed_weights_change_the_predictions(change: str) -> None:
    model, images = small_network(batchnorm=change == "statistics"), make_images(MANY)

    def predicted() -> np.ndarray:
        blocks = predict([model], images, 16, "images")
        values = np.concatenate(list(blocks))
        assert blocks.inference.name == ENGINE
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
        update_statistics(model, images[:16])
    after = predicted()
    assert abs(after - before).max() > 0.05
    assert np.allclose(after, model.predict_on_batch(images), atol=0.05)


@needs_openvino
def test_network_is_compiled_again_only_when_its_weights_change(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, made = openvino.Compiled, []

    def count(model: keras.Model) -> openvino.Compiled:
        made.append(model.name)
        return compiled(model)

    monkeypatch.setattr(openvino, "Compiled", count)
    models, images = [small_network(), small_network()], make_images(MANY)
    for _ in range(2):
        list(predict(models, images, 16, "images"))
    assert len(made) == 2
    models[1].layers[-1].bias.assign([1.0, 1.0])
    list(predict(models, images, 16, "images"))
    assert len(made) == 3


@needs_openvino
def test_compiled_network_is_freed_with_its_model() -> None:
    gc.collect()
    before, model = len(openvino._converted), small_network()
    openvino.converted(model)
    assert len(openvino._converted) == before + 1
    del model
    gc.collect()
    assert len(openvino._converted) == before


# --------------------------------------------------------------------------------------------- the choice of the engine


@needs_openvino
def test_choice_of_openvino_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    models = [small_network()]
    for _ in range(2):
        list(predict(models, make_images(MANY), 16, "images"))
    logged = [line for line in caplog.messages if line.startswith("predictions by")]
    assert logged == [f"predictions by {ENGINE}: there is no GPU"]


@needs_openvino
def test_views_and_out_of_fold_models_count_for_the_choice() -> None:
    models, images = [small_network(), small_network()], make_images(MANY // 8)
    out_of_fold = np.tile([True, False], (len(images), 1))
    options = ((), (8,), (8, out_of_fold))
    chosen = [predict(models, images, 8, "images", *some).inference.name for some in options]
    assert chosen == ["keras float32", ENGINE, "keras float32"]


def reason_for_keras(caplog: pytest.LogCaptureFixture, model: keras.Model, images: np.ndarray) -> str:
    """Checks that Keras predicts; returns the reason in the log."""
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.INFO, "melanoma")  # a failed conversion changes the level; caplog restores it
    blocks = predict([model], images, 16, "images")
    values = np.concatenate(list(blocks))
    assert blocks.inference.name == "keras float32"
    assert np.allclose(values, model.predict_on_batch(images), atol=1e-6)
    (logged,) = [line for line in caplog.messages if line.startswith("predictions by")]
    return logged.removeprefix("predictions by keras float32: ")


def test_keras_predicts_on_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(keras.distribution, "list_devices", lambda: ["gpu:0"])
    assert reason_for_keras(caplog, small_network(), make_images(MANY)) == "there is a GPU"


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("mixed_float16", "OpenVINO does not support --precision mixed_float16"),
        ("mixed_bfloat16", "the processor has no instructions for mixed_bfloat16"),
    ],
)
def test_keras_predicts_in_a_precision_that_openvino_or_the_processor_lacks(
    policy: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = SimpleNamespace(get_property=lambda device, name: ["FP32", "INT8"])
    monkeypatch.setattr(openvino, "core", lambda: core)
    monkeypatch.setattr(openvino, "load_openvino", lambda: sys.modules["openvino"])
    assert not openvino.obstacle()
    monkeypatch.setattr(keras.config, "dtype_policy", lambda: keras.DTypePolicy(policy))
    chosen = openvino.Inference([small_network()], MANY)
    assert (chosen.name, chosen.reason) == (f"keras {policy}", reason)


def test_keras_predicts_on_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    assert "TensorFlow backend only" in openvino.Inference([small_network()], MANY).reason


@needs_openvino
def test_keras_predicts_what_cannot_be_converted(caplog: pytest.LogCaptureFixture) -> None:
    inputs = keras.Input((SIZE, SIZE, 3))
    bits = keras.layers.Lambda(lambda x: keras.ops.cast(keras.ops.view(x, "int32") % 7, "float32"))(inputs)
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(bits), name="bits")
    reason = reason_for_keras(caplog, model, make_images(MANY))
    assert reason == "OpenVINO cannot convert bits: No conversion rule found for operations: Bitcast"


@needs_openvino
def test_keras_predicts_few_images(caplog: pytest.LogCaptureFixture) -> None:
    assert "not worth converting" in reason_for_keras(caplog, small_network(), make_images(MANY - 1))


@needs_openvino
def test_network_converted_before_predicts_few_images_too() -> None:
    model = small_network()
    list(openvino.Inference([model], MANY).networks())
    assert openvino.Inference([model], 1).name.startswith("openvino")
    assert openvino.Inference([model, small_network()], 1).name.startswith("keras")


def test_few_images_are_computed_without_compiling_and_without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = small_network(), make_images(3)
    expected = model.predict_on_batch(images)
    monkeypatch.setattr(type(model), "predict_on_batch", lambda *_: pytest.fail("compiled"))
    found = np.concatenate(list(predict([model], images, 16, "images")))
    assert found == pytest.approx(expected, rel=1e-4)


@needs_openvino
def test_telemetry_of_openvino_is_off() -> None:
    openvino.load_openvino()
    assert sys.modules["openvino_telemetry"] is None
    assert type(sys.modules["openvino.tools.ovc"].telemetry).__module__ == "openvino.tools.ovc.telemetry_stub"


@needs_openvino
def test_network_converted_ahead_also_computes_single_images() -> None:
    network, other = small_network(), small_network()
    openvino.convert([network])
    assert predict([network], make_images(1), 1, "").inference.name == ENGINE
    assert predict([network, other], make_images(1), 1, "").inference.name == "keras float32"


@needs_openvino
@pytest.mark.usefixtures("float32_restored")
def test_network_that_resizes_is_converted_in_bfloat16() -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    network = classifier.build("densenet121", 40, "none", Preprocessing(input_size=32)).model
    found = openvino.Compiled(network).predict_on_batch(np.zeros((1, 40, 40, 3), np.float32))
    assert found.sum() == pytest.approx(1, abs=0.01)


SIGNAL_STACK = """
import ctypes, gc
from melanoma.inference.openvino import Compiled
import keras

class Stack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

def stack():
    found = Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0
    return found.start, found.size

first, second = (Compiled(keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(2, 3)])) for _ in range(2))
before = stack()
del first
gc.collect()
del second
gc.collect()
assert stack() == before, (before, stack())
"""


@needs_openvino
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="structure of Linux")
def test_stack_of_signal_handlers_stays_when_networks_are_freed() -> None:
    """Otherwise the next signal is handled in freed memory, which can crash the process."""
    subprocess.run([sys.executable, "-c", SIGNAL_STACK], cwd=ROOT, check=True)
