"""Random variants of an image, with its mask through the same geometry; the copies that balance the classes.

The same function makes the copies that are stored before training and the variants that are drawn during it.
"""

import cv2
import numpy as np

Pair = tuple[np.ndarray, np.ndarray | None]  # image uint8 (S, S, 3); mask uint8 (S, S, 1) of {0, 1}, or None

ROTATION = 180.0  # degrees either way: a lesion has no upright
SHEAR = 10.0  # degrees either way
ZOOM = (0.85, 1.15)  # factor on the lesion's size
TRIM = 0.012  # of the side, off each edge before it is mirrored: many photographs have a thin frame of another colour
SHIFT = 0.05  # of the side, either way
BRIGHTNESS = SATURATION = 0.2  # relative change, either way
GAMMA = 0.2  # of the exponent's logarithm, either way: darker or lighter middle tones
TURNS = 8  # flips and quarter turns of a square
TINT = 0.05  # relative change of one colour channel, either way: cameras and lamps differ

HALF_PIXEL = np.full(2, 0.5)  # OpenCV counts from the middle of the first pixel
COPY = "_copy"  # between the id of a photograph and the number of its copy


cv2.setNumThreads(1)  # those who call have threads or processes of their own


def original(row_id: str) -> str:
    """The id of the photograph that a row shows, be it a copy or not."""
    return row_id.partition(COPY)[0]


def random_geometry(rng: np.random.Generator, size: int) -> np.ndarray:
    """A random rotation, shear, zoom, shift and mirroring about the centre of a square image.

    Returns:
        float64 (2, 3): maps (x, y, 1) of the result to (x, y) of the image, in pixels.
    """
    turn, shear = np.radians([rng.uniform(-ROTATION, ROTATION), rng.uniform(-SHEAR, SHEAR)])
    scale = 1 / rng.uniform(*ZOOM)
    mirror = rng.choice([-1.0, 1.0])
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    linear = rotation @ np.array([[1.0, np.tan(shear)], [0.0, 1.0]]) @ np.diag([mirror * scale, scale])
    centre = np.full(2, size / 2)
    shift = rng.uniform(-SHIFT, SHIFT, 2) * size
    return np.column_stack([linear, centre + shift - linear @ centre])


def warp(array: np.ndarray, geometry: np.ndarray) -> np.ndarray:
    """Applies a geometry; what comes from outside the frame is its reflection.

    Args:
        array: uint8 (S, S, C), each channel interpolated by itself.
        geometry: (2, 3) from `random_geometry`.

    Returns:
        uint8, of the array's shape.
    """
    size = array.shape[0]
    trim = round(TRIM * size)
    inner = array[trim : size - trim, trim : size - trim]
    offset = geometry.copy()
    offset[:, 2] += geometry[:, :2] @ HALF_PIXEL - HALF_PIXEL - trim
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(inner, offset, (size, size), flags=how, borderMode=cv2.BORDER_REFLECT).reshape(array.shape)


def random_colour(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Changes brightness, saturation, tint and middle tones at random.

    Args:
        image: uint8 (S, S, 3).
        rng: decides the changes.

    Returns:
        uint8 (S, S, 3). Black, as in a masked background, stays black.
    """
    brightness, saturation = 1 + rng.uniform(-1, 1, 2) * (BRIGHTNESS, SATURATION)
    gains = brightness * (1 + rng.uniform(-TINT, TINT, 3))
    gamma = np.exp(rng.uniform(-GAMMA, GAMMA))
    grey = np.full((3, 3), 1 / 3)
    mix = gains[:, None] * (grey + saturation * (np.eye(3) - grey))
    tones = 255 * np.linspace(0, 1, 256) ** gamma
    return cv2.LUT(cv2.transform(image, mix), tones.round().astype(np.uint8))


def vary(image: np.ndarray, rng: np.random.Generator, mask: np.ndarray | None = None) -> Pair:
    """A random variant of an image, and its mask through the same geometry.

    Args:
        image: uint8 (S, S, 3).
        rng: decides the variant.
        mask: uint8 (S, S, 1) of {0, 1}, or None.

    Returns:
        Image and mask of the same shapes and dtypes; None for the mask where none was given.
    """
    geometry = random_geometry(rng, image.shape[0])
    varied = random_colour(warp(image, geometry), rng)
    return varied, None if mask is None else (warp(mask * np.uint8(255), geometry) > 127).astype(np.uint8)


def turned(pictures: np.ndarray, variant: int, axes: tuple[int, int] = (-2, -1)) -> np.ndarray:
    """One of the TURNS flips and quarter turns.

    Args:
        pictures: of any shape.
        variant: 0 changes nothing; from 4 up the picture is mirrored; then it is turned by `variant` % 4 quarters.
        axes: of height and width.
    """
    mirrored = np.flip(pictures, axes[1]) if variant >= 4 else pictures
    return np.rot90(mirrored, variant % 4, axes)


def turned_back(pictures: np.ndarray, variant: int, axes: tuple[int, int] = (-2, -1)) -> np.ndarray:
    """Undoes `turned`."""
    upright = np.rot90(pictures, -(variant % 4), axes)
    return np.flip(upright, axes[1]) if variant >= 4 else upright


def make_copy(task: tuple[Pair, list[int]]) -> Pair:
    """`vary` for workers: of one argument, an image with its mask, and a seed."""
    (image, mask), seed = task
    return vary(image, np.random.default_rng(seed), mask)


def copies(labels: np.ndarray, minorities: tuple[int, ...], times: float) -> list[int]:
    """Which rows to copy so that each minority class has `times` as many images.

    Args:
        labels: int (N,).
        minorities: the classes to enlarge.
        times: 1 or more; round(times * n) images of a class of n come out, originals included.

    Returns:
        Row of the original for every copy to make; the originals of a class take turns.
    """
    rows: list[int] = []
    for label in minorities:
        originals = np.flatnonzero(labels == label)
        wanted = round(times * len(originals)) - len(originals)
        rows += [int(originals[turn % len(originals)]) for turn in range(wanted)]
    return rows
