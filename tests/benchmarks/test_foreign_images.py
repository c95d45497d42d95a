"""The images that are not dermoscopic."""

from benchmarks import foreign_images

import numpy as np
import pytest


@pytest.mark.parametrize("kind", foreign_images.DRAWINGS)
def test_drawings_differ_and_are_drawn_again(kind: str) -> None:
    images = foreign_images.draw(kind)
    assert images.shape == (foreign_images.DRAWN, foreign_images.SIZE, foreign_images.SIZE, 3)
    assert images.dtype == np.uint8
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)
    assert np.array_equal(images, foreign_images.draw(kind))


def test_skin_lies_beside_the_lesion() -> None:
    image = np.full((256, 256, 3), 200, np.uint8)
    mask = np.zeros((256, 256, 1), np.uint8)
    mask[:, :100] = 1
    image[:, : 100 + foreign_images.SKIN_MARGIN - 2] = 0
    found = foreign_images.skin(image, mask)
    assert found is not None and found.shape == image.shape and (found == 200).all()
    mask[:, : 256 - foreign_images.SKIN_SIDE] = 1
    assert foreign_images.skin(image, mask) is None
