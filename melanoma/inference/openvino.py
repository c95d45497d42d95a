"""The engine that computes predictions: Keras, or on machines without a GPU the same network compiled by OpenVINO.

OpenVINO is used if the processor supports the requested precision and there are enough images. In float32 both engines
agree to about the fifth digit.
"""

import contextlib
import functools
import hashlib
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from melanoma.cli import hardware
from melanoma.log import log
from melanoma.models import backbones

import joblib
import keras
import numpy as np

# Images per network (views of test-time augmentation counted) from which conversion pays. It takes 1.3 s for
# DenseNet121 at 256 pixels and saves 0.01 s an image in float32 on 2 Zen 4 cores. Below the 150 images of validation,
# so that validation and train use the same engine.
MIN_VIEWS = 128

# Keras dtype policy -> OpenVINO precision hint, and the capability that the processor needs.
PRECISIONS = {"float32": ("f32", "FP32"), "mixed_bfloat16": ("bf16", "BF16")}
OPTIONS: dict[str, Any] = {
    # Several images at once, one per core: a tenth faster than all cores on one batch.
    "PERFORMANCE_HINT": "THROUGHPUT",
    "INFERENCE_NUM_THREADS": joblib.cpu_count(),  # respects the limits of a container
}


# Images per network (views counted) up to which TensorFlow need not compile a network, which takes 0.9 s for
# EfficientNet-Lite2; computing its layers one by one takes 0.17 s for a batch of a few images.
MAX_EAGER_VIEWS = 8

OPENVINO = "openvino"
IMAGES = "images"  # name of the input of a traced network


class UnconvertibleError(Exception):
    """OpenVINO cannot convert a network; the message says which and why."""


class Network(Protocol):
    """What prediction needs of a network; every Keras model has it."""

    output_shape: tuple[Any, ...]  # (None, ...)

    def predict_on_batch(self, x: np.ndarray) -> np.ndarray:
        """From (N, S, S, 3) to (N, ...)."""


class Compiled:
    """A Keras model with its current weights, compiled by OpenVINO; images are computed one by one."""

    def __init__(self, model: keras.Model) -> None:
        """Converts and compiles the model, which takes about a second.

        Args:
            model: on the TensorFlow backend.

        Raises:
            UnconvertibleError: OpenVINO does not support one of its operations, or cannot compile it.
        """
        openvino = load_openvino()
        self.output_shape = model.output_shape
        hint, _ = PRECISIONS[keras.config.dtype_policy().name]
        with in_float32(model):
            function = trace(model, 1).get_concrete_function()
        errors = openvino.frontend.OpConversionFailure, openvino.frontend.OpValidationFailure, RuntimeError
        options = OPTIONS | {"INFERENCE_PRECISION_HINT": hint}
        try:
            compiled = core().compile_model(openvino.convert_model(function), "CPU", options)
        except errors as error:
            lines = [line.strip(" -") for line in str(error).splitlines()]
            reason = next((line for line in lines if line.startswith("No conversion rule")), lines[0])
            raise UnconvertibleError(f"{model.name}: {reason}") from None
        self.requests = openvino.AsyncInferQueue(compiled)

    def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
        """From (N, S, S, 3) of any dtype to float32 (N, ...)."""
        found = np.empty((len(images), *self.output_shape[1:]), np.float32)

        def keep(request: Any, row: int) -> None:
            found[row] = request.get_output_tensor().data[0]

        self.requests.set_callback(keep)
        for row, image in enumerate(images):
            self.requests.start_async(image[None].astype(np.float32), row)
        self.requests.wait_all()
        return found


class Eager:
    """A Keras model whose layers are computed one by one, without compiling it; on the TensorFlow backend."""

    def __init__(self, model: keras.Model) -> None:
        """Wraps the model."""
        self.model, self.output_shape = model, model.output_shape

    def predict_on_batch(self, images: np.ndarray) -> np.ndarray:
        """From (N, S, S, 3) of any dtype to float32 (N, ...)."""
        return np.asarray(self.model(images.astype(np.float32), training=False))


def trace(model: keras.Model, count: int | None = None) -> Any:
    """A TensorFlow function that computes what the model does, for `count` images; None: for any number.

    Weights are constants, because OpenVINO looks up variables one by one (2.4 s for DenseNet121). `model.export` takes
    twice as long, writes files, and fails for classifiers that resize (Keras 3.15.1).
    """
    import tensorflow

    weights = [
        [variable.numpy() for variable in some] for some in (model.trainable_variables, model.non_trainable_variables)
    ]
    images = tensorflow.TensorSpec((count, *model.input_shape[1:]), "float32", IMAGES)
    return tensorflow.function(lambda x: model.stateless_call(*weights, x, training=False)[0], [images])


@contextlib.contextmanager
def in_float32(model: keras.Model) -> Iterator[None]:
    """Sets the policy of all layers to float32 while tracing: OpenVINO has no mixed policies."""
    policies = [(layer, layer.dtype_policy) for layer in backbones.flatten_layers(model)]
    try:
        for layer, _ in policies:
            layer.dtype_policy = "float32"
        yield
    finally:
        for layer, policy in policies:
            layer.dtype_policy = policy


class Inference:
    """The engine chosen for some predictions, and why.

    After `networks` was called, `name` is the engine in use: if one network cannot be converted, all run in Keras.
    """

    def __init__(self, models: Sequence[keras.Model], views: float) -> None:
        """Chooses the engine.

        Args:
            models: see `predict.mean_output`.
            views: images per model on average, with every view of test-time augmentation counted.
        """
        self.models = models
        self.eager = views <= MAX_EAGER_VIEWS and keras.backend.backend() == "tensorflow"
        if reason := obstacle():
            self._choose_keras(reason)
        elif views < MIN_VIEWS and not all(model in _converted for model in models):
            self._choose_keras(f"fewer than {MIN_VIEWS} images per network, not worth converting")
        else:
            self.name, self.reason = f"{OPENVINO} {keras.config.dtype_policy().name}", "there is no GPU"

    def _choose_keras(self, reason: str) -> None:
        self.name, self.reason = f"keras {keras.config.dtype_policy().name}", reason

    def networks(self) -> Sequence[Network]:
        """The networks with their current weights, converted if OpenVINO was chosen; logs the choice once."""
        found: Sequence[Network] = self.models
        if self.name.startswith(OPENVINO):
            try:
                found = [converted(model) for model in self.models]
            except UnconvertibleError as error:
                self._choose_keras(f"OpenVINO cannot convert {error}")
        elif self.eager:
            found = [Eager(model) for model in self.models]
        log_choice(self.name, self.reason)
        return found


@functools.cache
def log_choice(name: str, reason: str) -> None:
    """Logs a choice the first time it is made."""
    log.info("predictions by %s: %s", name, reason)


def obstacle() -> str:
    """Why OpenVINO cannot be used; empty if it can."""
    policy = keras.config.dtype_policy().name
    if policy not in PRECISIONS:
        return f"OpenVINO does not support --precision {policy}"
    if keras.backend.backend() != "tensorflow":
        return "OpenVINO converts networks of the TensorFlow backend only"
    if not hardware.without_gpu():
        return "there is a GPU"
    if PRECISIONS[policy][1] not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return f"the processor has no instructions for {policy}"
    return ""


def load_openvino() -> ModuleType:
    """The package with its telemetry switched off, which otherwise reports each import and conversion."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: no such module
    import openvino.frontend

    return openvino


@functools.cache
def core() -> Any:
    """OpenVINO's runtime, one per process: after one of several has ended, a signal crashes the process (2026.4)."""
    return load_openvino().Core()


def convert(models: Sequence[keras.Model]) -> None:
    """Converts models, so that OpenVINO also computes the smallest predictions; without effect where it cannot."""
    if not obstacle():
        for model in models:
            with contextlib.suppress(UnconvertibleError):
                converted(model)


_converted: WeakKeyDictionary[keras.Model, tuple[bytes, Compiled]] = WeakKeyDictionary()


def converted(model: keras.Model) -> Compiled:
    """A model compiled with its current weights and precision; cached until these change."""
    digest = hashlib.sha256(keras.config.dtype_policy().name.encode())
    for weight in model.get_weights() if model.trainable else ():  # those of a frozen model stay
        digest.update(weight.tobytes())
    known = _converted.get(model)
    if known is None or known[0] != digest.digest():
        _converted[model] = known = digest.digest(), Compiled(model)
    return known[1]
