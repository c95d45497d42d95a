"""Reads image and mask files into square arrays.

The EXIF orientation is ignored, for image and mask alike, because the masks were made on the pixels as stored.
"""

import contextlib
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from melanoma.errors import InputError

import kornia_rs
import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG")  # those of the challenge; whatever a file claims to be, no other decoder is used
THUMBNAIL = 128  # pixels; side of the grey image by which duplicates are found
SAMPLING = 3  # points of a larger mask, per pixel of the result and side
THRESHOLD = 127  # grey value above which a mask pixel is lesion
ORIENTATION = 0x0112  # EXIF tag

# What Pillow's decoders raise on a damaged file.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)

# Refuse images of too many pixels. Set once at import, because threads share the filters.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

IS_GREY = [0] + [255] * 254 + [0]  # lookup table by grey value
GREY_VALUES = f"mask values between 0 and 255, thresholded at {THRESHOLD}"
CONVERTED = {
    "1": "black and white to RGB",
    "L": "greyscale to RGB",
    "I": "greyscale to RGB",
    "P": "palette to RGB",
    "CMYK": "CMYK to RGB",
    "LA": "alpha channel removed",
    "RGBA": "alpha channel removed",
}


@dataclass(frozen=True)
class Decoded:
    """An image and its mask, decoded and resized."""

    image: np.ndarray  # uint8 (S, S, 3), RGB, 0 to 255
    mask: np.ndarray | None  # uint8 (S, S, 1), 1 inside the lesion, 0 outside; None if there is none
    thumbnail: np.ndarray  # uint8 (THUMBNAIL, THUMBNAIL), grey
    size: tuple[int, int]  # width and height of the image file, in pixels
    notes: tuple[str, ...]  # what was converted


def open_image(path: Path) -> Image.Image:
    """Opens an image or mask without decoding it.

    Raises:
        InputError: the file is missing, neither JPEG nor PNG, or has more pixels than Pillow's limit (89 million).
    """
    try:
        return Image.open(path, formats=FORMATS)
    except (*DAMAGED, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{path}: not a readable image ({error})") from None


@contextlib.contextmanager
def decoding_errors(path: Path) -> Iterator[None]:
    """Turns what Pillow raises on damaged content into an InputError that names the file."""
    try:
        yield
    except DAMAGED as error:
        raise InputError(f"{path}: cannot be decoded ({error})") from None


def conversions(image: Image.Image) -> list[str]:
    """What has to be converted to get 8-bit RGB from an opened image, and whether its EXIF orientation is ignored."""
    notes = []
    mode = image.mode.split(";")[0]
    if mode in CONVERTED:
        notes.append(CONVERTED[mode])
    if mode == "I" or any(";16" in str(tile[3]) for tile in getattr(image, "tile", [])):
        notes.append("16 bits scaled to 8")
    if image.getexif().get(ORIENTATION, 1) != 1:
        notes.append("EXIF orientation ignored")
    return notes


def decode(image: Image.Image, mode: str, min_side: int) -> Image.Image:
    """Decodes an opened image and converts it to 8 bits.

    Args:
        image: from `open_image`.
        mode: "RGB" or "L".
        min_side: pixels that each side keeps at least, if it has them; libjpeg decodes directly at a half, a quarter or
            an eighth of the size, which is several times faster.

    Returns:
        The decoded image, in `mode`.
    """
    image.draft(mode, (min_side, min_side))
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip them to white
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    image.load()
    return image if image.mode == mode else image.convert(mode)  # a conversion to the same mode would copy


def decode_mask(mask: Image.Image, path: Path, min_side: int) -> Image.Image:
    """Decodes a mask to 8-bit grey values.

    Args:
        mask: from `open_image`.
        path: its file.
        min_side: see `decode`.

    Returns:
        The decoded mask, mode "L".
    """
    if mask.format == "PNG" and [tile[3] for tile in getattr(mask, "tile", [])] == ["L"]:
        # The challenge's masks are 8-bit grey PNGs; kornia-rs decodes these much faster. Its errors have no class of
        # their own: after any of them Pillow decodes the file or reports what is wrong.
        with contextlib.suppress(Exception):
            return Image.fromarray(kornia_rs.io.read_image_png_u8(str(path), "mono")[..., 0])
    return decode(mask, "L", min_side)


def resize(image: Image.Image, size: int) -> np.ndarray:
    """Stretches a decoded image to a square with antialiasing: uint8 (size, size[, 3])."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def binarize_mask(mask: Image.Image, path: Path, size: int) -> tuple[np.ndarray, list[str]]:
    """Resizes and thresholds a decoded mask.

    A large mask is sampled at SAMPLING points per pixel of the result and side: in a third of the time, the result
    differs in single pixels of the border only.

    Args:
        mask: mode "L".
        path: its file.
        size: side of the result in pixels.

    Returns:
        uint8 (size, size, 1), 1 where the mask is above THRESHOLD, else 0; and notes on its values.

    Raises:
        InputError: the mask is neither black nor white, but no border between lesion and skin remains.
    """
    grid = mask.resize([min(side, SAMPLING * size) for side in mask.size], Image.Resampling.NEAREST)
    lesion = (np.asarray(grid.resize((size, size), Image.Resampling.BOX)) > THRESHOLD).astype(np.uint8)[..., None]
    if lesion.min() == lesion.max():
        extremes = mask.getextrema()
        if extremes not in ((0, 0), (255, 255), (0, 255)):
            raise InputError(f"{path}: no lesion to separate from skin, its grey values range from %s to %s" % extremes)
    return lesion, [GREY_VALUES] if grid.point(IS_GREY).getbbox() else []


def read_pair(image_path: Path, mask_path: Path | None, size: int) -> Decoded:
    """Reads an image, and its lesion mask if it has one.

    Args:
        image_path: JPEG or PNG.
        mask_path: grey image of the same width and height, lesion above THRESHOLD; or None.
        size: side of the arrays in pixels.

    Returns:
        The decoded image and mask.

    Raises:
        InputError: a file is missing, not an image, too large or damaged; the mask differs from the image in width or
            height, or has no border between lesion and skin.
    """
    with open_image(image_path) as image, open_image(mask_path) if mask_path else contextlib.nullcontext() as mask:
        if mask and mask.size != image.size:
            raise InputError(f"{mask_path} is {mask.size}, its image {image_path.name} is {image.size} (width, height)")
        file_size, lesion = image.size, None
        with decoding_errors(image_path):
            notes = conversions(image)
            rgb = decode(image, "RGB", max(size, THUMBNAIL))
        if mask_path and mask:
            with decoding_errors(mask_path):
                grey = decode_mask(mask, mask_path, size)
            lesion, mask_notes = binarize_mask(grey, mask_path, size)
            notes += mask_notes
    factors = [max(1, side // max(size, THUMBNAIL)) for side in rgb.size]
    reduced = rgb.reduce((factors[0], factors[1]))  # by whole factors first: faster than in one step, and as good
    return Decoded(resize(reduced, size), lesion, resize(reduced.convert("L"), THUMBNAIL), file_size, tuple(notes))


def read(task: tuple[Path, Path | None, int]) -> Decoded | str:
    """`read_pair` for workers: takes one argument, and returns an error's message instead of raising it."""
    try:
        return read_pair(*task)
    except InputError as error:
        return str(error)
