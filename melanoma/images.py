"""From a file to a square array, and from a lesion mask to the region that the classifier sees.

Rule for pictures whose EXIF tag asks for a turn: the tag is ignored, for image and mask alike, since the masks were
drawn on the pixels as stored.
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
from skimage import measure

ROIS = ("mask", "crop", "full")
CROP_MARGIN = 0.15  # of the lesion's longer side, added on each side: keeps the border, where melanoma shows

FORMATS = ("JPEG", "PNG")  # what the challenge uses; no other decoder is reached by a file that only claims to be one
THUMBNAIL = 128  # pixels: side of the grey picture by which copies of a photograph are found
SAMPLING = 3  # points per side and pixel of the result at which a larger mask is looked at
ORIENTATION = 0x0112  # EXIF tag

# What Pillow's decoders raise on a broken file.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)

# Files of too many pixels are refused. Set once for all threads, which share the filters.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

IS_GREY = [0] + [255] * 254 + [0]  # by value
GREY_VALUES = "mask values between 0 and 255 cut at 127"
CONVERTED = {
    "1": "black and white made RGB",
    "L": "greyscale made RGB",
    "I": "greyscale made RGB",
    "P": "palette made RGB",
    "CMYK": "CMYK made RGB",
    "LA": "alpha channel left out",
    "RGBA": "alpha channel left out",
}


@dataclass(frozen=True)
class Pair:
    """A photograph and its mask, decoded and resized, with what was met on the way."""

    image: np.ndarray  # uint8 (S, S, 3), RGB, 0 to 255
    mask: np.ndarray | None  # uint8 (S, S, 1), 1 inside the lesion and 0 outside; None: there is none
    thumbnail: np.ndarray  # uint8 (THUMBNAIL, THUMBNAIL), grey
    size: tuple[int, int]  # width and height of the photograph's file, in pixels
    notes: tuple[str, ...]  # what was converted


def open_picture(path: Path) -> Image.Image:
    """Opens a picture without decoding it.

    Raises:
        InputError: the file is missing, neither JPEG nor PNG, or of more pixels than Pillow takes for genuine (89
            million).
    """
    try:
        return Image.open(path, formats=FORMATS)
    except (*BROKEN, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{path}: not a readable picture ({error})") from None


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Makes what Pillow raises on broken content an InputError that names the file."""
    try:
        yield
    except BROKEN as error:
        raise InputError(f"{path}: cannot be decoded ({error})") from None


def notes(picture: Image.Image) -> list[str]:
    """What has to be converted to make 8-bit RGB of an opened picture, and whether its EXIF turn is ignored."""
    found = []
    mode = picture.mode.split(";")[0]
    if mode in CONVERTED:
        found.append(CONVERTED[mode])
    if mode == "I" or any(";16" in str(tile[3]) for tile in getattr(picture, "tile", [])):
        found.append("16 bits scaled to 8")
    if picture.getexif().get(ORIENTATION, 1) != 1:
        found.append("EXIF turn ignored")
    return found


def decode(picture: Image.Image, mode: str, least: int) -> Image.Image:
    """Decodes an opened picture and converts it to 8 bits.

    Args:
        picture: from `open_picture`.
        mode: "RGB" or "L".
        least: pixels that each side is to keep at least, if it has them: libjpeg decodes at a half, a quarter or an
            eighth directly, which is several times faster.
    """
    picture.draft(mode, (least, least))
    if picture.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip them to white
        picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    picture.load()
    return picture if picture.mode == mode else picture.convert(mode)  # a conversion to itself would copy


def decode_mask(picture: Image.Image, path: Path, least: int) -> Image.Image:
    """`decode` to grey values; a plain grey PNG, as the challenge's masks are, in a fraction of Pillow's time.

    Args:
        picture: from `open_picture`.
        path: its file.
        least: see `decode`.
    """
    if picture.format == "PNG" and [tile[3] for tile in getattr(picture, "tile", [])] == ["L"]:  # grey, 8 bits
        with contextlib.suppress(Exception):  # kornia's errors have no class of their own; Pillow says what is wrong
            return Image.fromarray(kornia_rs.io.read_image_png_u8(str(path), "mono")[..., 0])
    return decode(picture, "L", least)


def shrink(picture: Image.Image, size: int) -> np.ndarray:
    """Resizes a decoded picture to a square with antialiasing; the frame is stretched. uint8 (size, size[, 3])."""
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))


def cut_mask(mask: Image.Image, path: Path, size: int) -> tuple[np.ndarray, list[str]]:
    """A decoded grey mask as uint8 (size, size, 1) of {0, 1}, lesion above 127, and what there is to note.

    A large mask is seen through a grid of SAMPLING points per pixel of the result and side: the outcome is the same
    but for single pixels of the outline, in a third of the time.

    Raises:
        InputError: its values are such that all of it or nothing would be lesion, though it is neither white nor black.
    """
    grid = mask.resize([min(side, SAMPLING * size) for side in mask.size], Image.Resampling.NEAREST)
    cut = (np.asarray(grid.resize((size, size), Image.Resampling.BOX)) > 127).astype(np.uint8)[..., None]
    if cut.min() == cut.max():
        extremes = mask.getextrema()
        if extremes not in ((0, 0), (255, 255), (0, 255)):
            raise InputError(f"{path}: no lesion to tell from skin, its grey values go from %s to %s" % extremes)
    return cut, [GREY_VALUES] if grid.point(IS_GREY).getbbox() else []


def read_pair(image: Path, mask: Path | None, size: int) -> Pair:
    """Reads a photograph, and its lesion mask where it has one.

    Args:
        image: JPEG or PNG.
        mask: grey picture of the same width and height, lesion above 127; or None.
        size: side of the arrays in pixels.

    Raises:
        InputError: a file is missing, no picture, far too large for one, or broken; the mask is not of its photograph's
            width and height, or shows no lesion's outline.
    """
    with open_picture(image) as photograph, open_picture(mask) if mask else contextlib.nullcontext() as outline:
        if outline and outline.size != photograph.size:
            raise InputError(
                f"{mask} is {outline.size}, its photograph {image.name} is {photograph.size} (width, height)"
            )
        frame, lesion = photograph.size, None
        with told(image):
            found = notes(photograph)
            pixels = decode(photograph, "RGB", max(size, THUMBNAIL))
        if mask and outline:
            with told(mask):
                drawn = decode_mask(outline, mask, size)
            lesion, more = cut_mask(drawn, mask, size)
            found += more
        across, down = (max(1, side // max(size, THUMBNAIL)) for side in pixels.size)
        near = pixels.reduce((across, down))  # by whole pixels, faster than in one step and as good
        return Pair(shrink(near, size), lesion, shrink(near.convert("L"), THUMBNAIL), frame, tuple(found))


def read(task: tuple[Path, Path | None, int]) -> Pair | str:
    """`read_pair` for workers: of one argument, and with the error's message in place of an error."""
    try:
        return read_pair(*task)
    except InputError as error:
        return str(error)


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
