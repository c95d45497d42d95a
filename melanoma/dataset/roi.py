"""The region of interest: what the classifier sees of an image, given the lesion mask."""

import numpy as np
from PIL import Image
from skimage import measure

ROIS = ("mask", "crop", "full")
CROP_MARGIN = 0.15  # of the lesion's longer side, added on each side: the border is where melanoma shows


def lesion_box(mask: np.ndarray) -> tuple[int, int, int]:
    """The square around the largest component of a lesion, enlarged by CROP_MARGIN and moved inside the image.

    Args:
        mask: (S, S, 1), 1 inside the lesion; at least one pixel is.

    Returns:
        (top, left, side) in pixels.
    """
    components = measure.label(mask[..., 0])
    largest = np.bincount(components[components > 0]).argmax()
    spans = [np.flatnonzero((components == largest).any(axis=axis))[[0, -1]] for axis in (1, 0)]
    size = mask.shape[0]
    longer = max(last - first + 1 for first, last in spans)
    side = min(size, round(longer * (1 + 2 * CROP_MARGIN)))
    top, left = (min(max(0, int(first + last + 1 - side) // 2), size - side) for first, last in spans)
    return top, left, side


def region_of_interest(
    image: np.ndarray, mask: np.ndarray, roi: str, size: int | None = None
) -> tuple[np.ndarray, bool]:
    """Removes what is not lesion from an image.

    Args:
        image: uint8 (S, S, 3).
        mask: uint8 (S, S, 1), {0, 1}.
        roi: "mask" makes the background black, "crop" cuts out the enlarged lesion box, "full" keeps the image.
        size: side of the result in pixels; None: S.

    Returns:
        uint8 (size, size, 3), and whether the full image is shown because the mask is empty or covers all of it.
    """
    side = size or len(image)
    unusable = not mask.any() or bool(mask.all())
    if roi == "full" or unusable:
        return resize(image, side), unusable and roi != "full"
    if roi == "mask":
        return resize(image * mask, side), False
    top, left, box = lesion_box(mask)
    return resize(image[top : top + box, left : left + box], side), False


def resize(image: np.ndarray, side: int) -> np.ndarray:
    """Resizes a square image with antialiasing: uint8 (side, side, 3)."""
    if len(image) == side:
        return image
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))
