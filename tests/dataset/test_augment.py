"""Random augmentation keeps image and mask aligned; flips and quarter turns can be undone."""

import dataclasses
from collections.abc import Callable

from melanoma.dataset import augment

import numpy as np
import pytest

SIZE = 64
DARK, BRIGHT, BETWEEN = 40, 230, 120  # no change of colour moves background or marker across BETWEEN
IDENTITY = np.array([[1.0, 0, 0], [0, 1, 0]])
MIRROR = np.array([[-1.0, 0, SIZE], [0, 1, 0]])
QUARTER_TURN = np.array([[0.0, 1, 0], [-1, 0, SIZE]])  # result (x, y) comes from image (y, SIZE - x)
INNER = np.s_[2:-2, 2:-2]  # without the trimmed edge


def rng(seed: int | list[int]) -> np.random.Generator:
    return np.random.default_rng(seed)


def marker() -> tuple[np.ndarray, np.ndarray]:
    """A bright L off the centre, and its mask."""
    mask = np.zeros((SIZE, SIZE, 1), np.uint8)
    mask[14:40, 20:30] = 1
    mask[32:40, 20:50] = 1
    return np.where(mask, BRIGHT, DARK).repeat(3, axis=2).astype(np.uint8), mask


def augmented_marker(seed: int) -> tuple[np.ndarray, np.ndarray]:
    image, mask = augment.augment(marker()[0], rng(seed), marker()[1])
    assert mask is not None
    return image, mask


@pytest.mark.parametrize("seed", range(60))
def test_image_and_mask_stay_aligned(seed: int) -> None:
    image, mask = augmented_marker(seed)
    bright, inside = image.mean(axis=2) > BETWEEN, mask[..., 0] == 1
    assert (bright & inside).sum() / (bright | inside).sum() > 0.9
    assert 150 < mask.sum() < 1500  # 420 pixels, zoomed, partly reflected at the edge


def test_augmentation_keeps_shapes_dtypes_and_binary_masks() -> None:
    for seed in range(20):
        image, mask = augmented_marker(seed)
        assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
        assert mask.shape == (SIZE, SIZE, 1) and mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 1}


def test_augmented_images_differ_in_geometry_and_colour() -> None:
    results = [augmented_marker(seed) for seed in range(20)]
    geometries = {mask.tobytes() for _, mask in results}
    colours = {tuple(np.median(image.reshape(-1, 3), axis=0)) for image, _ in results}
    assert len(geometries) == 20 and len(colours) > 15


def test_augmentation_depends_on_the_generator_only() -> None:
    image, mask = marker()
    first, again, other = (augment.augment(image, rng([7, copy]), mask) for copy in (1, 1, 2))
    assert first[1] is not None and again[1] is not None
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


def test_augmented_copy_depends_on_its_seed() -> None:
    image, mask = marker()
    found, expected = augment.augment_copy(((image, mask), [7, 1])), augment.augment(image, rng([7, 1]), mask)
    assert found[1] is not None and expected[1] is not None
    assert np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])


def test_image_is_augmented_equally_without_a_mask() -> None:
    image, mask = marker()
    augmented, no_mask = augment.augment(image, rng(5))
    assert no_mask is None
    assert np.array_equal(augmented, augment.augment(image, rng(5), mask)[0])


def test_inputs_are_not_modified() -> None:
    image, mask = marker()
    augment.augment(image, rng(0), mask)
    assert np.array_equal(image, marker()[0]) and np.array_equal(mask, marker()[1])


def test_black_stays_black() -> None:
    image, mask = marker()
    image = image * mask
    for seed in range(50):
        assert not augment.random_colour(image, rng(seed))[mask[..., 0] == 0].any()


def test_brightness_stays_within_its_range() -> None:
    grey = np.full((4, 4, 3), 128, np.uint8)
    means = [augment.random_colour(grey, rng(seed)).mean() for seed in range(200)]
    assert 70 < min(means) < 105 and 150 < max(means) < 190


@pytest.mark.parametrize(
    ("geometry", "expected"),
    [(IDENTITY, lambda array: array), (MIRROR, np.fliplr), (QUARTER_TURN, lambda array: np.rot90(array, -1))],
    ids=["identity", "mirror", "quarter turn"],
)
def test_warp_by_a_known_geometry_is_exact(geometry: np.ndarray, expected: Callable[[np.ndarray], np.ndarray]) -> None:
    for channels in (1, 3, 4):
        image = rng(0).integers(0, 256, (SIZE, SIZE, channels), np.uint8)
        assert np.array_equal(augment.warp(image, geometry)[INNER], expected(image)[INNER])


def test_areas_outside_the_frame_are_filled_by_reflection() -> None:
    image = np.full((SIZE, SIZE, 3), 200, np.uint8)
    for seed in range(30):
        assert (augment.warp(image, augment.random_geometry(rng(seed), SIZE)) == 200).all()


def random_transforms(ranges: augment.Ranges) -> list[np.ndarray]:
    """The linear parts of random geometries, (2, 2)."""
    return [augment.random_geometry(rng(seed), SIZE, ranges)[:, :2] for seed in range(200)]


@pytest.mark.parametrize("name", augment.RANGES)
def test_zoom_stays_within_its_range(name: str) -> None:
    low, high = (1 / zoom**2 for zoom in reversed(augment.RANGES[name].zoom))  # of the area shown
    areas = [abs(np.linalg.det(transform)) for transform in random_transforms(augment.RANGES[name])]
    assert low <= min(areas) < 1.1 * low and 0.9 * high < max(areas) <= high


@pytest.mark.parametrize(("name", "stretch"), [("standard", 0.0), ("strong", 0.2)])
def test_strong_augmentation_stretches_in_one_direction_and_shrinks_in_the_other(name: str, stretch: float) -> None:
    ranges = dataclasses.replace(augment.RANGES[name], zoom=(1.0, 1.0), shear=0.0)
    sides = np.array([np.linalg.svd(transform, compute_uv=False) for transform in random_transforms(ranges)])
    assert sides.prod(axis=1) == pytest.approx(np.ones(200))  # the area stays
    ratios = np.log(sides[:, 0] / sides[:, 1])
    assert 0.95 * stretch <= ratios.max() <= stretch + 1e-9


def test_strong_augmentation_changes_colours_more() -> None:
    grey = np.full((4, 4, 3), 128, np.uint8)
    spread = {
        name: np.std([augment.augment(grey, rng(seed), ranges=ranges)[0].mean() for seed in range(100)])
        for name, ranges in augment.RANGES.items()
    }
    assert spread["strong"] > 1.3 * spread["standard"]


@pytest.mark.parametrize("view", range(augment.VIEWS))
@pytest.mark.parametrize(("shape", "axes"), [((2, 8, 8, 3), (1, 2)), ((2, 8, 8), (-2, -1))])
def test_flips_and_quarter_turns_are_undone(shape: tuple[int, ...], axes: tuple[int, int], view: int) -> None:
    images = rng(0).integers(0, 256, shape, np.uint8)
    rotated = augment.flip_rotate(images, view, axes)
    assert np.array_equal(augment.undo_flip_rotate(rotated, view, axes), images)


def test_flips_and_quarter_turns_are_all_different_and_the_first_is_the_image() -> None:
    image = rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    views = [augment.flip_rotate(image, view, (0, 1)) for view in range(augment.VIEWS)]
    assert len({view.tobytes() for view in views}) == 8
    assert np.array_equal(views[0], image)
