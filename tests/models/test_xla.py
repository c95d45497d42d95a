"""The networks compiled by XLA, as Keras does on GPUs."""

from collections.abc import Callable
from typing import Any

from melanoma.models import classifier, losses, segmentation
from melanoma.models.segmentation import Design

import keras
import numpy as np
import pytest
import toy

SIZE = 32

toy.register()

pytestmark = pytest.mark.slow

Case = tuple[keras.Model, Any, np.ndarray]  # model, loss, targets of four images


def segmentation_case(design: Design) -> Case:
    masks = np.zeros((4, SIZE, SIZE, 1), np.uint8)
    masks[:, 8:20, 5:25] = 1
    return segmentation.build(design, SIZE), losses.dice_cross_entropy, masks


def classifier_case() -> Case:
    network = classifier.build("toy", SIZE, "none")
    network.head.get_layer("dropout").rate = 0  # XLA generates other random numbers
    return network.model, "categorical_crossentropy", np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]


def training_step(case: Case, compiled: bool) -> tuple[float, np.ndarray]:
    """The loss before a training step, compiled by XLA or executed eagerly, and the change of all weights by it."""
    model, loss, targets = case
    images = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3)).astype(np.float32)
    start = model.get_weights()
    # SGD, because Adam divides gradients by their size and so makes steps out of rounding errors.
    model.compile(keras.optimizers.SGD(1e-2), loss=loss, jit_compile=compiled, run_eagerly=not compiled)
    before = float(model.train_on_batch(images, targets))
    step = np.concatenate([(new - old).ravel() for new, old in zip(model.get_weights(), start, strict=True)])
    model.set_weights(start)
    return before, step


@pytest.mark.parametrize(
    "build",
    [
        lambda: segmentation_case(Design("segnet", SIZE, mean=[120.0] * 3, std=[50.0] * 3)),
        lambda: segmentation_case(Design("unet", SIZE, "mobilenet")),
        lambda: segmentation_case(Design("segnet_vgg16", SIZE, "vgg16")),
        classifier_case,
    ],
    ids=["segnet", "unet", "segnet_vgg16", "classifier"],
)
def test_training_step_compiled_by_xla_equals_the_eager_one(build: Callable[[], Case]) -> None:
    keras.utils.set_random_seed(0)
    case = build()
    eager_loss, eager_step = training_step(case, compiled=False)
    compiled_loss, compiled_step = training_step(case, compiled=True)
    assert compiled_loss == pytest.approx(eager_loss, rel=1e-4)
    # Seen: 4e-4 and less.
    assert np.linalg.norm(compiled_step - eager_step) < 0.01 * np.linalg.norm(eager_step)
