"""Prediction: batches and blocks, ensembles, test-time augmentation, out-of-fold predictions."""

from melanoma.dataset import augment
from melanoma.inference import openvino
from melanoma.inference.predict import IMAGE_AXES, in_batches, mean_output, predict

import keras
import numpy as np
import pytest

SIZE = 8  # pixels


@pytest.fixture(autouse=True)
def only_keras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "obstacle", lambda: "these tests are about Keras")


class Red(keras.layers.Layer):
    """Returns the red channel, 0 to 255, as a probability."""

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        return keras.ops.cast(x[..., :1], "float32") / 255


class LeftHalf(keras.layers.Layer):
    """Predicts lesion in the left half of every image."""

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        left = keras.ops.cast(keras.ops.arange(SIZE) < SIZE // 2, "float32")
        return keras.ops.zeros_like(x[..., :1], dtype="float32") + left[None, None, :, None]


class Constant(keras.layers.Layer):
    """Predicts the same probability everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        return keras.ops.zeros_like(x[..., :1], dtype="float32") + self.value


def network(layer: keras.layers.Layer) -> keras.Model:
    inputs = keras.Input((SIZE, SIZE, 3))
    return keras.Model(inputs, layer(inputs))


def classifier() -> keras.Model:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((SIZE, SIZE, 3))
    flat = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs))
    return keras.Model(inputs, keras.layers.Dense(2)(flat))


def make_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3)).astype(np.uint8)


@pytest.mark.parametrize("views", augment.VIEW_COUNTS)
def test_map_that_follows_the_image_is_the_same_with_test_time_augmentation(views: int) -> None:
    images = make_images(3)
    assert np.allclose(mean_output([network(Red())], images, views), images[..., :1] / 255, atol=1e-6)


def test_maps_of_all_views_are_averaged() -> None:
    found = mean_output([network(LeftHalf())], make_images(1), 8)
    assert np.allclose(found, 0.5)  # each pixel is on the left in four of the eight views


@pytest.mark.parametrize(("count", "places"), [(1, [0]), (2, [0, 4]), (4, [0, 2, 4, 6]), (8, list(range(8)))])
def test_vectors_of_the_views_are_averaged(count: int, places: list[int]) -> None:
    model, images = classifier(), make_images(10)
    views = [model.predict_on_batch(augment.flip_rotate(images, view, IMAGE_AXES)) for view in places]
    (found,) = predict([model], images, 10, "images", views=count)
    assert np.allclose(found, np.mean(views, axis=0), atol=1e-6)


def test_models_are_averaged() -> None:
    models = [network(Constant(0.2)), network(Constant(0.6))]
    assert np.allclose(mean_output(models, make_images(1), 1), 0.4)


@pytest.mark.parametrize(("count", "blocks"), [(1, [1]), (8, [8]), (19, [8, 8, 3])])
def test_blocks_of_padded_batches_equal_the_prediction_of_all_images(count: int, blocks: list[int]) -> None:
    model, images = classifier(), make_images(count)
    found = list(predict([model], images, 2, "images"))
    assert [len(block) for block in found] == blocks
    assert np.allclose(np.concatenate(found), model.predict_on_batch(images), atol=1e-6)


@pytest.mark.parametrize(("pad", "sizes"), [(False, [4, 4, 2]), (True, [4, 4, 4])])
def test_only_padded_batches_all_have_the_same_size(pad: bool, sizes: list[int]) -> None:
    seen, inputs = [], np.arange(10)

    def compute(batch: np.ndarray) -> np.ndarray:
        seen.append(len(batch))
        return batch + 1

    found = np.concatenate(list(in_batches(compute, inputs, 4, pad)))
    assert found.tolist() == list(range(1, 11)) and seen == sizes


def test_out_of_fold_prediction_of_an_image_uses_only_its_models() -> None:
    values = np.array([0.1, 0.5, 0.9])
    out_of_fold = np.random.default_rng(1).integers(0, 2, (41, 3)).astype(bool)
    out_of_fold[~out_of_fold.any(axis=1), 0] = True
    models = [network(Constant(value)) for value in values]
    found = np.concatenate(list(predict(models, make_images(41), 2, "images", True, out_of_fold)))
    expected = (out_of_fold * values).sum(axis=1) / out_of_fold.sum(axis=1)
    assert found.shape == (41, SIZE, SIZE, 1)
    assert np.allclose(found, expected[:, None, None, None])
