"""Values of mask files, and whether a mask fits its image.

A mask has two values, whatever they are: the brighter one is the lesion. Other masks are thresholded at THRESHOLD.
"""

import contextlib
from pathlib import Path
from typing import Any

from melanoma.errors import InputError

import cv2
import kornia_rs
import numpy as np
from PIL import Image

SAMPLING = 3  # points of a larger mask, per pixel of the result and side
THRESHOLD = 127  # grey value above which a mask pixel is lesion
IS_GREY = [0] + [255] * 254 + [0]  # lookup table by grey value

# Notes.
GREY_VALUES = f"mask values between 0 and 255, thresholded at {THRESHOLD}"
OTHER_VALUES = "mask of two values other than 0 and 255"
ALPHA_CHANNEL = "mask taken from the alpha channel"

# Doubts.
EMPTY = "mask empty"
FULL = "mask covers the whole image"
INVERTED = "mask may be inverted"
FOREIGN = "mask may belong to another image"

# A mask is compared with its image at REDUCED x REDUCED pixels, by the colours in two rings of RING pixels inside and
# outside of its border. Rates of both rules: see `doubts`.
REDUCED, RING = 32, 2
FRAME_COVER = 0.5  # fraction of the image's frame; an inverted mask covers more, and its inner ring is brighter
MIN_CONTRAST = 0.48  # Mahalanobis distance between the rings' colours; that of another image's mask may be smaller
NOISE_VARIANCE = 4  # grey values squared; added to each channel's variance, so that uniform colours can be compared
MIN_PIXELS = 4  # of a ring
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
DISC = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * RING + 1, 2 * RING + 1))


def read_grey_png(mask: Image.Image, path: Path) -> Image.Image | None:
    """Decodes an 8-bit grey PNG, as the challenge's masks are, with kornia-rs, which is much faster than Pillow.

    Args:
        mask: opened, not decoded.
        path: its file.

    Returns:
        The decoded mask, mode "L"; None if it is of another kind or damaged, which Pillow decodes or reports.
    """
    if mask.format == "PNG" and [tile[3] for tile in getattr(mask, "tile", [])] == ["L"]:
        with contextlib.suppress(Exception):  # its errors have no class of their own
            return Image.fromarray(kornia_rs.io.read_image_png_u8(str(path), "mono")[..., 0])
    return None


def has_two_values(mask: Image.Image) -> bool:
    """Whether a mask of mode "L" has exactly two values."""
    return sum(count > 0 for count in mask.histogram()) == 2


def two_colours(mask: Image.Image) -> Image.Image | None:
    """A decoded mask of two colours, not just black and white, as 0 and 255, the brighter one; None for other masks.

    Equal grey values, such as those of black and of a very dark blue, are distinguished.
    """
    found: list[Any] = [] if mask.mode not in ("P", "RGB") else mask.getcolors(2) or []
    if len(found) != 2 or {value for _, value in found} == {BLACK, WHITE}:
        return None
    palette = mask.getpalette() or []

    def brightness(value: Any) -> tuple[float, Any]:
        return float(np.dot(LUMA, palette[3 * value : 3 * value + 3] if mask.mode == "P" else value)), value

    brighter = max((value for _, value in found), key=brightness)
    same = np.asarray(mask) == np.asarray(brighter)
    return Image.fromarray((same.all(axis=-1) if mask.mode == "RGB" else same) * np.uint8(255))


def grey_values(mask: Image.Image) -> tuple[Image.Image, list[str]]:
    """Grey values of a decoded mask, or its alpha channel if only that has two values.

    Args:
        mask: decoded, of any mode with 8 bits or less per channel.

    Returns:
        The mask, mode "L"; and notes.
    """
    if not mask.has_transparency_data:
        separated = two_colours(mask)
        return (separated, [OTHER_VALUES]) if separated else (mask.convert("L"), [])
    channels = mask.convert("RGBA")
    alpha, grey = channels.getchannel("A"), channels.convert("RGB").convert("L")
    if not has_two_values(grey) and has_two_values(alpha):
        return alpha, [ALPHA_CHANNEL]
    return grey, []


def black_and_white(mask: Image.Image) -> Image.Image | None:
    """A decoded grey mask with its two values replaced by 0 and 255; None if it has more or fewer values.

    Args:
        mask: decoded, of any mode with one channel.

    Returns:
        The mask, mode "L".
    """
    if mask.mode == "L":  # by counts and a lookup table, because a large mask has many millions of pixels
        brighter = mask.getextrema()[1]
        return mask.point([255 * (value == brighter) for value in range(256)]) if has_two_values(mask) else None
    values = np.asarray(mask)
    low, high = values.min(), values.max()
    two = low < high and bool(np.isin(values, (low, high)).all())
    return Image.fromarray(np.where(values == high, 255, 0).astype(np.uint8)) if two else None


def no_border(path: Path, low: float, high: float) -> InputError:
    """The error of a mask whose values, from `low` to `high`, do not separate a lesion from skin."""
    return InputError(f"{path}: no lesion to separate from skin, its grey values range from {low:g} to {high:g}")


def binarize(mask: Image.Image, path: Path, size: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    """Resizes and thresholds a decoded mask.

    A large mask is sampled at SAMPLING points per pixel of the result and side: in a third of the time, the result
    differs in single pixels of the border only.

    Args:
        mask: mode "L".
        path: its file.
        size: width and height of the result in pixels.

    Returns:
        uint8 (height, width, 1), 1 inside the lesion, else 0; and notes on the mask's values.

    Raises:
        InputError: the mask is neither black nor white, but no border between lesion and skin remains.
    """
    points = [min(side, SAMPLING * wanted) for side, wanted in zip(mask.size, size, strict=True)]
    grid = mask.resize(points, Image.Resampling.NEAREST)
    lesion = (np.asarray(grid.resize(size, Image.Resampling.BOX)) > THRESHOLD).astype(np.uint8)[..., None]
    has_grey, is_constant = grid.point(IS_GREY).getbbox() is not None, lesion.min() == lesion.max()
    if has_grey or is_constant:  # else the values are 0 and 255
        extremes = mask.getextrema()
        if extremes != (0, 255) and (separated := black_and_white(mask)):
            return binarize(separated, path, size)[0], [OTHER_VALUES]
        if is_constant and extremes not in ((0, 0), (255, 255), (0, 255)):
            raise no_border(path, *extremes)
    return lesion, [GREY_VALUES] if has_grey else []


def doubts(image: np.ndarray, lesion: np.ndarray) -> list[str]:
    """Why a mask may be wrong for its image; takes about 0.2 ms.

    An inverted mask covers more than FRAME_COVER of the image's frame, and is brighter inside of its border than
    outside. The border of another image's mask often lies on uniform skin: the colours on both sides of it differ by
    less than MIN_CONTRAST. Fractions of masks that are flagged, measured on real pairs, on the same pairs with
    inverted masks, and with masks of other images taken at random:

    | pairs                              | real: INVERTED, FOREIGN | inverted: INVERTED | of another image: FOREIGN |
    |------------------------------------|-------------------------|--------------------|---------------------------|
    | ISIC 2017, 2150 at 256 pixels      | 0.05 %, 0.23 %          | 98.0 %             | 28 %                      |
    | HAM10000, 4786 at 256 pixels       | 0.17 %, 0.44 %          | 96.8 %             | 29 %                      |
    | ISIC 2017 with the masks of 2018,  | 0.05 %, 0.47 %          | 96.3 %             | 39 %                      |
    | 1921 at 512 pixels                 |                         |                    |                           |

    So masks that are all assigned to the wrong images are noticed, but a single swapped mask in only one case of three.

    Args:
        image: uint8 (S, S, 3), RGB.
        lesion: uint8 (S, S, 1), {0, 1}.

    Returns:
        At most one of EMPTY, FULL, INVERTED and FOREIGN.
    """
    if not lesion.any():
        return [EMPTY]
    if lesion.all():
        return [FULL]
    colours = cv2.resize(image, (REDUCED, REDUCED), interpolation=cv2.INTER_AREA).astype(np.float64)
    inside = (cv2.resize(255 * lesion, (REDUCED, REDUCED), interpolation=cv2.INTER_AREA) > THRESHOLD).astype(np.uint8)
    inner = colours[inside > cv2.erode(inside, DISC)]
    outer = colours[inside < cv2.dilate(inside, DISC)]
    if min(len(inner), len(outer)) < MIN_PIXELS:
        return []
    inner_mean, outer_mean = inner.mean(axis=0), outer.mean(axis=0)
    difference = inner_mean - outer_mean
    frame = np.concatenate([inside[0], inside[-1], inside[:, 0], inside[:, -1]])
    if frame.mean() > FRAME_COVER and difference @ LUMA > 0:
        return [INVERTED]
    deviations = [(ring - mean) / np.sqrt(len(ring)) for ring, mean in ((inner, inner_mean), (outer, outer_mean))]
    covariance = sum(one.T @ one for one in deviations) / 2 + NOISE_VARIANCE * np.eye(3)
    contrast = np.sqrt(difference @ np.linalg.solve(covariance, difference))
    return [FOREIGN] if contrast < MIN_CONTRAST else []
