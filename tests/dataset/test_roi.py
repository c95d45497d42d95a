"""The region of interest that the classifier sees."""

from melanoma.dataset import roi

import numpy as np
import pytest

Box = tuple[int, int, int]  # top, left, side


def noise(size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)


def rectangle(size: int, rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((size, size, 1), np.uint8)
    mask[rows, columns] = 1
    return mask


@pytest.mark.parametrize(
    ("lesion", "expected"),
    [
        ((slice(40, 60), slice(30, 50)), (37, 27, 26)),  # 20 pixels and 3 on each side
        ((slice(40, 60), slice(35, 45)), (37, 27, 26)),  # the longer side counts
        ((slice(0, 20), slice(90, 100)), (0, 74, 26)),  # moved inside the image
        ((slice(5, 95), slice(5, 95)), (0, 0, 100)),  # not larger than the image
        ((slice(50, 51), slice(50, 51)), (50, 50, 1)),
    ],
)
def test_lesion_box_computed_by_hand(lesion: tuple[slice, slice], expected: Box) -> None:
    assert roi.lesion_box(rectangle(100, *lesion)) == expected


def test_lesion_box_is_inside_the_image_and_contains_the_lesion() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        top, left = rng.integers(0, 50, 2)
        height, width = rng.integers(1, 51 - top), rng.integers(1, 51 - left)
        box_top, box_left, side = roi.lesion_box(rectangle(50, slice(top, top + height), slice(left, left + width)))
        assert 0 <= box_top <= top and top + height <= box_top + side <= 50
        assert 0 <= box_left <= left and left + width <= box_left + side <= 50


def test_lesion_box_is_that_of_the_largest_component() -> None:
    mask = rectangle(100, slice(40, 60), slice(30, 50)) | rectangle(100, slice(0, 5), slice(0, 5))
    mask |= rectangle(100, slice(90, 100), slice(80, 100))
    assert roi.lesion_box(mask) == (37, 27, 26)


def test_mask_makes_only_the_background_black() -> None:
    image, mask = noise(100), rectangle(100, slice(40, 60), slice(30, 50))
    region, fell_back = roi.region_of_interest(image, mask, "mask")
    assert not fell_back and region.dtype == np.uint8
    assert np.array_equal(region[40:60, 30:50], image[40:60, 30:50])
    region = region.copy()
    region[40:60, 30:50] = 0
    assert not region.any()


def test_crop_is_the_box_at_full_size() -> None:
    image, mask = np.zeros((100, 100, 3), np.uint8), rectangle(100, slice(40, 60), slice(30, 50))
    image[37:63, 27:53] = (0, 100, 200)  # the lesion's box
    region, fell_back = roi.region_of_interest(image, mask, "crop")
    assert not fell_back and region.shape == (100, 100, 3) and region.dtype == np.uint8
    assert (region == (0, 100, 200)).all()


def test_full_is_the_image() -> None:
    image, mask = noise(100), rectangle(100, slice(40, 60), slice(30, 50))
    region, fell_back = roi.region_of_interest(image, mask, "full")
    assert np.array_equal(region, image) and not fell_back


@pytest.mark.parametrize("kind", roi.ROIS)
@pytest.mark.parametrize("value", [0, 1])
def test_empty_or_full_mask_falls_back_to_the_image(kind: str, value: int) -> None:
    image = noise(50)
    region, fell_back = roi.region_of_interest(image, np.full((50, 50, 1), value, np.uint8), kind)
    assert np.array_equal(region, image)
    assert fell_back == (kind != "full")


@pytest.mark.parametrize("kind", roi.ROIS)
def test_region_has_the_wanted_size_and_is_reduced_with_antialiasing(kind: str) -> None:
    image, mask = np.zeros((128, 128, 3), np.uint8), rectangle(128, slice(32, 96), slice(32, 96))
    image[:, ::2] = 200  # stripes of one pixel, which reduction without antialiasing would keep or lose
    region, _ = roi.region_of_interest(image, mask, kind, 16)
    assert region.shape == (16, 16, 3)
    assert abs(region[6:10, 6:10].astype(int) - 100).max() < 30
