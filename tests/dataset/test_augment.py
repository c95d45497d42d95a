"""Random variants: image and mask stay together, and the copies are counted."""

from collections.abc import Callable

from melanoma.dataset import augment
from melanoma.dataset.splits import rows_to_copy

import numpy as np
import pytest

SIZE = 64
DARK, BRIGHT, BETWEEN = 40, 230, 120  # marker and ground stay on their sides of BETWEEN under every change of colour
IDENTITY = np.array([[1.0, 0, 0], [0, 1, 0]])
MIRROR = np.array([[-1.0, 0, SIZE], [0, 1, 0]])
QUARTER_TURN = np.array([[0.0, 1, 0], [-1, 0, SIZE]])  # result (x, y) comes from image (y, SIZE - x)
INNER = np.s_[2:-2, 2:-2]  # without the trimmed edge


def marker() -> tuple[np.ndarray, np.ndarray]:
    """A bright L off the centre, and its mask."""
    mask = np.zeros((SIZE, SIZE, 1), np.uint8)
    mask[14:40, 20:30] = 1
    mask[32:40, 20:50] = 1
    return np.where(mask, BRIGHT, DARK).repeat(3, axis=2).astype(np.uint8), mask


def overlap(image: np.ndarray, mask: np.ndarray) -> float:
    bright, inside = image.mean(axis=2) > BETWEEN, mask[..., 0] == 1
    return float((bright & inside).sum() / (bright | inside).sum())


@pytest.mark.parametrize("seed", range(60))
def test_marker_and_mask_stay_aligned(seed: int) -> None:
    image, mask = augment.augment(marker()[0], np.random.default_rng(seed), marker()[1])
    assert mask is not None
    assert overlap(image, mask) > 0.9
    assert 150 < mask.sum() < 1500  # 420 pixels, zoomed, in part mirrored at the edge


def test_variant_keeps_shape_dtype_and_binary_mask() -> None:
    for seed in range(20):
        image, mask = augment.augment(marker()[0], np.random.default_rng(seed), marker()[1])
        assert mask is not None
        assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
        assert mask.shape == (SIZE, SIZE, 1) and mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 1}


def test_variants_differ_in_place_and_in_colour() -> None:
    image, mask = marker()
    variants = [augment.augment(image, np.random.default_rng(seed), mask) for seed in range(20)]
    places = {variant.tobytes() for _, variant in variants if variant is not None}
    colours = {tuple(np.median(variant.reshape(-1, 3), axis=0)) for variant, _ in variants}
    assert len(places) == 20 and len(colours) > 15


def test_same_generator_gives_the_same_variant() -> None:
    image, mask = marker()
    first, again, other = (augment.augment(image, np.random.default_rng([7, copy]), mask) for copy in (1, 1, 2))
    assert first[1] is not None and again[1] is not None
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


def test_mask_or_none_makes_no_difference_to_the_image() -> None:
    image, mask = marker()
    alone, none = augment.augment(image, np.random.default_rng(5))
    assert none is None
    assert np.array_equal(alone, augment.augment(image, np.random.default_rng(5), mask)[0])


def test_originals_are_not_modified() -> None:
    image, mask = marker()
    augment.augment(image, np.random.default_rng(0), mask)
    assert np.array_equal(image, marker()[0]) and np.array_equal(mask, marker()[1])


def test_black_stays_black() -> None:
    image, mask = marker()
    image = image * mask
    for seed in range(50):
        assert not augment.random_colour(image, np.random.default_rng(seed))[mask[..., 0] == 0].any()


def test_colour_changes_stay_within_their_range() -> None:
    grey = np.full((4, 4, 3), 128, np.uint8)
    means = [augment.random_colour(grey, np.random.default_rng(seed)).mean() for seed in range(200)]
    assert 70 < min(means) < 105 and 150 < max(means) < 190


@pytest.mark.parametrize(
    ("geometry", "expected"),
    [(IDENTITY, lambda array: array), (MIRROR, np.fliplr), (QUARTER_TURN, lambda array: np.rot90(array, -1))],
    ids=["identity", "mirror", "quarter turn"],
)
def test_warp_by_a_known_geometry_is_exact(geometry: np.ndarray, expected: Callable[[np.ndarray], np.ndarray]) -> None:
    for channels in (1, 3, 4):
        image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, channels), np.uint8)
        assert np.array_equal(augment.warp(image, geometry)[INNER], expected(image)[INNER])


def test_what_comes_from_outside_the_frame_is_reflected() -> None:
    image = np.full((SIZE, SIZE, 3), 200, np.uint8)
    for seed in range(30):
        warped = augment.warp(image, augment.random_geometry(np.random.default_rng(seed), SIZE))
        assert (warped == 200).all()


def test_zoom_stays_within_its_range() -> None:
    areas = [
        abs(np.linalg.det(augment.random_geometry(np.random.default_rng(seed), SIZE)[:, :2])) for seed in range(200)
    ]
    assert 1 / 1.15**2 <= min(areas) < 0.85 and 1.25 < max(areas) <= 1 / 0.85**2


@pytest.mark.parametrize(("count", "expected"), [(1, 4), (2, 7), (3, 10), (10, 35), (254, 889), (374, 1309)])
def test_minorities_come_out_three_and_a_half_times_as_many(count: int, expected: int) -> None:
    labels = np.repeat([0, 1, 2], [50, count, 2])
    rows = rows_to_copy(labels, (1,), 3.5)
    assert count + len(rows) == expected
    assert set(labels[rows]) == {1}


def test_originals_take_turns_in_being_copied() -> None:
    labels = np.array([0, 1, 2, 1, 0])
    rows = rows_to_copy(labels, (1, 2), 3.5)
    assert np.bincount(rows, minlength=5).tolist() == [0, 3, 3, 2, 0]


def test_no_copies_at_factor_one_or_of_an_absent_class() -> None:
    assert rows_to_copy(np.array([0, 1, 2]), (1, 2), 1.0) == []
    assert rows_to_copy(np.array([0, 0]), (1, 2), 3.5) == []
