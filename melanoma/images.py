"""From a file to a square array, and from a lesion mask to the region that the classifier sees.

Rule for pictures whose EXIF tag asks for a turn: the tag is ignored, for image and mask alike, since the masks were
drawn on the pixels as stored.
"""

from pathlib import Path

from melanoma.errors import InputError

import numpy as np
from PIL import Image
from skimage import measure

ROIS = ("mask", "crop", "full")
CROP_MARGIN = 0.15  # of the lesion's longer side, added on each side: keeps the border, where melanoma shows


def open_image(path: Path) -> Image.Image:
    """Opens a picture without decoding it.

    Raises:
        InputError: the file is missing, no picture, or far too large for one.
    """
    try:
        return Image.open(path)
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable picture ({error})") from None


def resize(picture: Image.Image, size: int, mode: str) -> np.ndarray:
    """Decodes, converts to `mode` and shrinks to a square with antialiasing; the frame is stretched.

    Raises:
        InputError: the file is cut off or corrupt.
    """
    try:
        if picture.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip them to white
            picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
        # libjpeg decodes at a half, a quarter or an eighth directly; twice the target keeps the antialiasing honest.
        picture.draft(mode, (2 * size, 2 * size))
        return np.asarray(picture.convert(mode).resize((size, size), Image.Resampling.BILINEAR))
    except (OSError, SyntaxError) as error:
        name = getattr(picture, "filename", "picture")
        raise InputError(f"{name}: cannot be decoded ({error})") from None


def read_image(path: Path, size: int) -> np.ndarray:
    """A photograph as uint8 (size, size, 3), RGB, 0 to 255.

    Raises:
        InputError: no picture, or a broken one.
    """
    with open_image(path) as picture:
        return resize(picture, size, "RGB")


def read_mask(path: Path, size: int, image: Path) -> np.ndarray:
    """A lesion mask as uint8 (size, size, 1), 1 inside the lesion and 0 outside.

    Args:
        path: grey picture, lesion above 127.
        size: side in pixels.
        image: the photograph that it belongs to.

    Raises:
        InputError: no picture, a broken one, or not of its photograph's width and height.
    """
    with open_image(path) as mask, open_image(image) as photograph:
        if mask.size != photograph.size:
            raise InputError(f"{path} is {mask.size}, its photograph {image.name} is {photograph.size} (width, height)")
        return (resize(mask, size, "L") > 127).astype(np.uint8)[..., None]


def lesion_box(mask: np.ndarray) -> tuple[int, int, int]:
    """The square around the largest connected part of a lesion, dilated by CROP_MARGIN and moved inside the frame.

    Args:
        mask: (S, S, 1), 1 inside the lesion; at least one pixel is.

    Returns:
        (top, left, side) in pixels.
    """
    parts = measure.label(mask[..., 0])
    largest = np.bincount(parts[parts > 0]).argmax()
    spans = [np.flatnonzero((parts == largest).any(axis=axis))[[0, -1]] for axis in (1, 0)]
    frame = mask.shape[0]
    longer = max(last - first + 1 for first, last in spans)
    side = min(frame, round(longer * (1 + 2 * CROP_MARGIN)))
    top, left = (min(max(0, int(first + last + 1 - side) // 2), frame - side) for first, last in spans)
    return top, left, side


def region_of_interest(image: np.ndarray, mask: np.ndarray, roi: str) -> tuple[np.ndarray, bool]:
    """Takes away what is not lesion.

    Args:
        image: uint8 (S, S, 3).
        mask: uint8 (S, S, 1), {0, 1}.
        roi: "mask" blackens the background, "crop" cuts out the dilated lesion box and resizes it to S, "full" changes
            nothing.

    Returns:
        uint8 (S, S, 3), and whether the mask was of no use (empty, or the whole frame) so that the full image stands.
    """
    useless = not mask.any() or bool(mask.all())
    if roi == "full" or useless:
        return image, useless and roi != "full"
    if roi == "mask":
        return image * mask, False
    top, left, side = lesion_box(mask)
    cut = Image.fromarray(image[top : top + side, left : left + side])
    return np.asarray(cut.resize(image.shape[1::-1], Image.Resampling.BICUBIC)), False
