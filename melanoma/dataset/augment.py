"""Random augmentation of images and their masks; flips and quarter turns for test-time augmentation.

The same function makes the augmented copies that are stored before training and augments the batches during training.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import cv2
import numpy as np

ImageAndMask = tuple[np.ndarray, np.ndarray | None]  # image uint8 (S, S, 3); mask uint8 (S, S, 1) of {0, 1}, or None

ROTATION = 180.0  # degrees, in both directions: lesions have no upright position
SHIFT = 0.05  # fraction of the side, in both directions
TRIM = 0.012  # fraction of the side cut off each edge: many images have a thin frame, which reflection would repeat


@dataclass(frozen=True)
class Ranges:
    """How much random augmentation changes an image; all changes but the zoom are made in both directions."""

    zoom: tuple[float, float]  # factor on the lesion's size
    shear: float  # degrees
    stretch: float  # of the logarithm of the aspect ratio
    brightness: float  # relative
    saturation: float  # relative
    tint: float  # relative, of each colour channel: cameras and lamps differ
    gamma: float  # of the logarithm of the exponent: darker or lighter middle tones


STANDARD = Ranges(zoom=(0.85, 1.15), shear=10.0, stretch=0.0, brightness=0.2, saturation=0.2, tint=0.05, gamma=0.2)
STRONG = Ranges(zoom=(0.7, 1.4), shear=15.0, stretch=0.2, brightness=0.3, saturation=0.4, tint=0.1, gamma=0.35)
RANGES = {"standard": STANDARD, "strong": STRONG}
VIEWS = 8  # flips and quarter turns of a square
VIEW_COUNTS = (1, 2, 4, VIEWS)  # that `some_views` can choose
HALF_PIXEL = np.full(2, 0.5)  # OpenCV puts the origin at the centre of the first pixel

cv2.setNumThreads(1)  # callers run several threads or processes


def random_geometry(rng: np.random.Generator, size: int, ranges: Ranges = STANDARD) -> np.ndarray:
    """Random rotation, shear, zoom, shift and mirroring about the centre of a square image.

    Args:
        rng: source of the random values.
        size: side of the image in pixels.
        ranges: of zoom, shear and stretch.

    Returns:
        float64 (2, 3): maps (x, y, 1) in the result to (x, y) in the image, in pixels.
    """
    angle, shear = np.radians([rng.uniform(-ROTATION, ROTATION), rng.uniform(-ranges.shear, ranges.shear)])
    scale = 1 / rng.uniform(*ranges.zoom)
    mirror = rng.choice([-1.0, 1.0])
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = rotation @ np.array([[1.0, np.tan(shear)], [0.0, 1.0]]) @ np.diag([mirror * scale, scale])
    centre = np.full(2, size / 2)
    shift = rng.uniform(-SHIFT, SHIFT, 2) * size
    if ranges.stretch:
        factor = np.exp(rng.uniform(-ranges.stretch, ranges.stretch) / 2)
        linear = np.diag([factor, 1 / factor]) @ linear
    return np.column_stack([linear, centre + shift - linear @ centre])


def warp(array: np.ndarray, geometry: np.ndarray) -> np.ndarray:
    """Applies an affine geometry; areas outside the frame are filled by reflection.

    Args:
        array: uint8 (S, S, C); channels are interpolated independently.
        geometry: float64 (2, 3) from `random_geometry`.

    Returns:
        uint8, shape of `array`.
    """
    size = array.shape[0]
    trim = round(TRIM * size)
    inner = array[trim : size - trim, trim : size - trim]
    matrix = geometry.copy()
    matrix[:, 2] += geometry[:, :2] @ HALF_PIXEL - HALF_PIXEL - trim
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(inner, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_REFLECT).reshape(array.shape)


def random_colour(image: np.ndarray, rng: np.random.Generator, ranges: Ranges = STANDARD) -> np.ndarray:
    """Changes brightness, saturation, tint and middle tones at random.

    Args:
        image: uint8 (S, S, 3).
        rng: source of the random values.
        ranges: of the changes.

    Returns:
        uint8 (S, S, 3). Black stays black, as in the background of a region of interest.
    """
    brightness, saturation = 1 + rng.uniform(-1, 1, 2) * (ranges.brightness, ranges.saturation)
    gains = brightness * (1 + rng.uniform(-ranges.tint, ranges.tint, 3))
    gamma = np.exp(rng.uniform(-ranges.gamma, ranges.gamma))
    grey = np.full((3, 3), 1 / 3)
    mix = gains[:, None] * (grey + saturation * (np.eye(3) - grey))
    tones = 255 * np.linspace(0, 1, 256) ** gamma
    return cv2.LUT(cv2.transform(image, mix), tones.round().astype(np.uint8))


def augment(
    image: np.ndarray, rng: np.random.Generator, mask: np.ndarray | None = None, ranges: Ranges = STANDARD
) -> ImageAndMask:
    """Augments an image at random, and its mask with the same geometry.

    Args:
        image: uint8 (S, S, 3); not modified.
        rng: source of the random values. The image is augmented the same way with and without a mask.
        mask: uint8 (S, S, 1) of {0, 1}, or None; not modified.
        ranges: of the changes.

    Returns:
        Augmented image and mask, same shapes and dtypes; the mask is None if none was given.
    """
    geometry = random_geometry(rng, image.shape[0], ranges)
    augmented = random_colour(warp(image, geometry), rng, ranges)
    return augmented, None if mask is None else (warp(mask * np.uint8(255), geometry) > 127).astype(np.uint8)


def augment_copy(task: tuple[ImageAndMask, list[int]]) -> ImageAndMask:
    """`augment` with one argument, for workers: image with mask, and the seed of the copy."""
    (image, mask), seed = task
    return augment(image, np.random.default_rng(seed), mask)


def some_views(count: int) -> range:
    """`count` of the VIEWS, the unchanged image first; 2: with its mirror image."""
    return range(0, VIEWS, VIEWS // count)


def flip_rotate(images: Any, view: int, axes: tuple[int, int] = (-2, -1), ops: ModuleType = np) -> Any:
    """One of the VIEWS flips and quarter turns of square images.

    Args:
        images: any shape and dtype.
        view: 0 to VIEWS - 1. From 4 on the images are mirrored; then they are rotated by `view` % 4 quarter turns.
        axes: axes of height and width.
        ops: the module that computes: NumPy, or `keras.ops` for tensors.

    Returns:
        Same shape; of NumPy a view of `images`.
    """
    mirrored = ops.flip(images, axes[1]) if view >= 4 else images
    return ops.rot90(mirrored, view % 4, axes)


def undo_flip_rotate(images: Any, view: int, axes: tuple[int, int] = (-2, -1), ops: ModuleType = np) -> Any:
    """Inverse of `flip_rotate`, with the same arguments."""
    upright = ops.rot90(images, -(view % 4), axes)
    return ops.flip(upright, axes[1]) if view >= 4 else upright
