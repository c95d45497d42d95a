"""Colour constancy."""

from melanoma.models import classifier, colours

import keras
import numpy as np
import pytest
import toy

SIZE = 32
LIGHT = np.array([1.0, 0.8, 0.6], np.float32)  # reddish

toy.register()


def random_images(count: int = 3) -> np.ndarray:
    """Grey on average, at most 200."""
    return np.random.default_rng(0).uniform(50, 200, (count, SIZE, SIZE, 3)).astype(np.float32)


def constant(images: np.ndarray) -> np.ndarray:
    return keras.ops.convert_to_numpy(colours.shades_of_grey(images))


def test_image_in_coloured_light_gets_the_colours_of_white_light() -> None:
    white = random_images()
    found, reference = constant(white * LIGHT), constant(white)
    ratio = found / reference
    assert ratio == pytest.approx(np.broadcast_to(ratio[:, :1, :1, :1], ratio.shape), rel=1e-4)  # as bright as before
    assert reference == pytest.approx(white, rel=0.02)  # almost white light
    assert abs(found.mean((1, 2)) - found.mean((1, 2, 3))[:, None]).max() < 3


def test_power_mean_is_that_of_the_source() -> None:
    image = random_images(1)
    light = np.power(np.power(image.astype(np.float64), 6).mean((1, 2)), 1 / 6)
    expected = image / light * np.sqrt((light**2).mean())
    assert constant(image) == pytest.approx(np.clip(expected, 0, 255), rel=1e-4)


def test_black_background_does_not_count() -> None:
    image = random_images(1) * LIGHT
    larger = np.pad(image, ((0, 0), (8, 8), (8, 8), (0, 0)))
    assert constant(larger)[:, 8:-8, 8:-8] == pytest.approx(constant(image), rel=1e-4)


def test_black_image_stays_black() -> None:
    assert not constant(np.zeros((1, SIZE, SIZE, 3), np.float32)).any()


def test_classifier_does_not_see_the_colour_of_the_light() -> None:
    plain = classifier.build("toy", SIZE, "none")
    network = classifier.build("toy", SIZE, "none", classifier.Preprocessing(colour_constancy=True))
    network.model.set_weights(plain.model.get_weights())
    images = random_images()
    brightness = constant(images)[0, 0, 0, 0] / constant(images * LIGHT)[0, 0, 0, 0]
    first, second = (
        network.extractor().predict_on_batch(light) for light in (images[:1], images[:1] * LIGHT * brightness)
    )
    assert first == pytest.approx(second, abs=1e-4)
    assert first != pytest.approx(plain.extractor().predict_on_batch(images[:1] * LIGHT), abs=1e-3)
