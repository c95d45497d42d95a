"""Formats of networks other than Keras' own: how a model is written, loaded and run in each.

The packages are imported where they are used: they are optional (requirements/export.txt).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melanoma.inference.openvino import IMAGES, core, load_openvino, trace

import keras
import numpy as np

Compute = Callable[[np.ndarray], np.ndarray]  # from float32 (N, S, S, 3) to float32 (N, ...)

OPSET = 18  # of ONNX, from 2022: the newest that tf2onnx 1.17 writes


def as_module(model: keras.Model) -> Any:
    """A TensorFlow module whose function `serve` computes what the model does; see `trace`."""
    import tensorflow as tf

    module = tf.Module()
    module.serve = trace(model)
    return module


def write_onnx(model: keras.Model, path: Path, half: bool) -> None:
    """Writes ONNX."""
    import onnx
    import tf2onnx

    function = trace(model)
    converted, _ = tf2onnx.convert.from_function(function, function.input_signature, OPSET)
    if half:
        halve_weights(converted.graph)
    onnx.save(converted, path)


def halve_weights(graph: Any) -> None:
    """Stores the kernels of an ONNX graph as float16; the runtime converts them to float32 once, when it loads them."""
    from onnx import TensorProto, helper, numpy_helper

    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1:  # kernels
            name, stored = tensor.name, f"{tensor.name}_float16"
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), stored))
            graph.node.insert(0, helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT))


def read_onnx(path: Path) -> Compute:
    """Loads ONNX."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {IMAGES: images})[0]


def write_openvino(model: keras.Model, path: Path, half: bool) -> None:
    """Writes OpenVINO's XML, and the weights beside it."""
    openvino = load_openvino()
    function = trace(model).get_concrete_function()
    openvino.save_model(openvino.convert_model(function), path, compress_to_fp16=half)


def read_openvino(path: Path) -> Compute:
    """Loads OpenVINO's XML."""
    compiled = core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: compiled(images)[0]


def write_litert(model: keras.Model, path: Path, half: bool) -> None:
    """Writes LiteRT, also known as TensorFlow Lite."""
    import tensorflow as tf

    module = as_module(model)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([module.serve.get_concrete_function()], module)
    if half:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.target_spec.supported_types = [tf.float16]
    path.write_bytes(converter.convert())


def read_litert(path: Path) -> Compute:
    """Loads LiteRT."""
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(str(path)).get_signature_runner()
    return lambda images: next(iter(run(**{IMAGES: images}).values()))


def write_saved_model(model: keras.Model, path: Path, half: bool) -> None:
    """Writes TensorFlow's SavedModel, a folder; `half` must be False."""
    import tensorflow as tf

    module = as_module(model)
    tf.saved_model.save(module, path, module.serve)


def read_saved_model(path: Path) -> Compute:
    """Loads a SavedModel."""
    import tensorflow as tf

    loaded = tf.saved_model.load(path)
    return lambda images: loaded.serve(images).numpy()


@dataclass(frozen=True)
class Format:
    """A format of models."""

    packages: tuple[str, ...]  # as imported; optional ones that write and read it
    suffix: str  # of the file's name
    write: Callable[[keras.Model, Path, bool], None]  # the last: whether weights are stored as float16
    read: Callable[[Path], Compute]
    halves: bool = True  # whether it can store weights as float16


FORMATS = {
    "onnx": Format(("tf2onnx", "onnx", "onnxruntime"), ".onnx", write_onnx, read_onnx),
    "openvino": Format(("openvino",), ".xml", write_openvino, read_openvino),
    "litert": Format(("ai_edge_litert",), ".tflite", write_litert, read_litert),
    "saved_model": Format((), "_saved_model", write_saved_model, read_saved_model, halves=False),
}
