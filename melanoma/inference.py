"""What computes predictions: Keras, or without a GPU the same network compiled by OpenVINO.

OpenVINO (requirements-cpu.txt) is taken wherever it is installed, the processor has instructions for the precision that
was asked for, and there is enough to predict. In float32 both give the same to the fifth digit.
"""

import contextlib
import functools
import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from melanoma import backbones, hardware
from melanoma.command import log

import joblib
import keras
import numpy as np

# Views for each network from which it is converted. That takes 1.3 s for DenseNet121 at 256 pixels and saves 0.01 s a
# view in float32, so pays from 100 to 140 on 2 Zen 4 cores; for the small ones in pretrained/ 0.6 s, from 350 views.
# Fewer than the 150 photographs of validation, so that these are computed as those of train are.
LEAST_VIEWS = 128

# What OpenVINO computes in for a dtype policy of Keras: its hint, and the capability that the processor needs.
PRECISIONS = {"float32": ("f32", "FP32"), "mixed_bfloat16": ("bf16", "BF16")}
OPTIONS: dict[str, Any] = {
    # Several images at once, each on a core of its own: a tenth faster than all cores on one batch.
    "PERFORMANCE_HINT": "THROUGHPUT",
    "INFERENCE_NUM_THREADS": joblib.cpu_count(),  # heeds a container's limits too
}


OPENVINO = "openvino"


class UnconvertibleError(Exception):
    """OpenVINO cannot convert a network; says which and why."""


class Network(Protocol):
    """What predicting needs of a network; every Keras model has it."""

    output_shape: tuple[Any, ...]  # None, and what an image has

    def predict_on_batch(self, x: np.ndarray) -> np.ndarray:
        """From (N, S, S, 3) to (N, ...)."""


class Compiled:
    """A Keras model with the weights of this moment, compiled by OpenVINO; images are computed one by one."""

    def __init__(self, model: keras.Model) -> None:
        """Converts and compiles: seconds.

        Args:
            model: on the TensorFlow backend.

        Raises:
            UnconvertibleError: OpenVINO does not know one of its operations, or cannot compile it.
        """
        import tensorflow

        openvino = load_openvino()
        self.output_shape = model.output_shape
        hint, _ = PRECISIONS[keras.config.dtype_policy().name]
        image = tensorflow.TensorSpec((1, *model.input_shape[1:]), "float32")
        # Not `model.export`: it takes twice the time, writes files, and fails for resizing classifiers (Keras 3.15.1).
        # Weights as constants: OpenVINO looks variables up one by one, 2.4 s for DenseNet121.
        weights = [
            [variable.numpy() for variable in some]
            for some in (model.trainable_variables, model.non_trainable_variables)
        ]
        with in_float32(model):
            traced = tensorflow.function(lambda x: model.stateless_call(*weights, x, training=False)[0])
            function = traced.get_concrete_function(image)
        errors = openvino.frontend.OpConversionFailure, openvino.frontend.OpValidationFailure, RuntimeError
        options = OPTIONS | {"INFERENCE_PRECISION_HINT": hint}
        try:
            compiled = openvino.Core().compile_model(openvino.convert_model(function), "CPU", options)
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


@contextlib.contextmanager
def in_float32(model: keras.Model) -> Iterator[None]:
    """Lets a model be traced in float32, whatever its policy: OpenVINO rounds by itself, and knows no mixed ones."""
    policies = [(layer, layer.dtype_policy) for layer in backbones.flat(model)]
    try:
        for layer, _ in policies:
            layer.dtype_policy = "float32"
        yield
    finally:
        for layer, policy in policies:
            layer.dtype_policy = policy


class Inference:
    """What computes some predictions of networks, and why.

    `name` is what is chosen, and once `networks` was called what it has come to be: a network that cannot be converted
    leaves all of them to Keras.
    """

    def __init__(self, models: Sequence[keras.Model], views: float) -> None:
        """Chooses.

        Args:
            models: see `training.mean_output`.
            views: how many images each of them will see, turned ones counted, on average.
        """
        self.models = models
        if reason := obstacle():
            self._choose_keras(reason)
        elif views < LEAST_VIEWS:
            self._choose_keras(f"for fewer than {LEAST_VIEWS} views a network is not worth converting")
        else:
            self.name, self.reason = f"{OPENVINO} {keras.config.dtype_policy().name}", "there is no GPU"

    def _choose_keras(self, reason: str) -> None:
        self.name, self.reason = f"keras {keras.config.dtype_policy().name}", reason

    def networks(self) -> Sequence[Network]:
        """The networks with their weights of this moment, converted where that was chosen; tells the choice once."""
        found: Sequence[Network] = self.models
        if self.name.startswith(OPENVINO):
            try:
                found = [converted(model) for model in self.models]
            except UnconvertibleError as error:
                self._choose_keras(f"OpenVINO cannot convert {error}")
        tell(self.name, self.reason)
        return found


@functools.cache
def tell(name: str, reason: str) -> None:
    """Logs a choice, the first time that it is made."""
    log.info("predictions by %s: %s", name, reason)


def obstacle() -> str:
    """Why OpenVINO is out of the question; nothing where it is not."""
    policy = keras.config.dtype_policy().name
    if policy not in PRECISIONS:
        return f"OpenVINO has no way for --precision {policy}"
    if keras.backend.backend() != "tensorflow":
        return "OpenVINO converts networks of the TensorFlow backend alone"
    if not hardware.without_gpu():
        return "there is a GPU"
    if importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed (requirements-cpu.txt)"
    if PRECISIONS[policy][1] not in load_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return f"the processor has no instructions for {policy}"
    return ""


def load_openvino() -> ModuleType:
    """The package, kept from reporting each import and conversion to its makers, which it does without asking."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # a module that is not there
    import openvino.frontend

    return openvino


_converted: WeakKeyDictionary[keras.Model, tuple[bytes, Compiled]] = WeakKeyDictionary()


def converted(model: keras.Model) -> Compiled:
    """A model compiled with the weights and in the precision of now; the last one is kept until these change."""
    digest = hashlib.sha256(keras.config.dtype_policy().name.encode())
    for weight in model.get_weights():
        digest.update(weight.tobytes())
    known = _converted.get(model)
    if known is None or known[0] != digest.digest():
        _converted[model] = known = digest.digest(), Compiled(model)
    return known[1]
