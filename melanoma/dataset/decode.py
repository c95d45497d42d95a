"""Reads image and mask files into square arrays.

The EXIF orientation is ignored, for image and mask alike, because the masks were made on the pixels as stored.
"""

import contextlib
import functools
import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from melanoma.dataset import masks
from melanoma.errors import InputError
from melanoma.sources.records import FORMATS

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

# File name extensions by format. Whatever a file claims to be, no other decoder is used.
EXTENSIONS = {extension: name for name, extensions in FORMATS.items() for extension in extensions}
MAX_PIXELS = 89_478_485  # Pillow's limit for files that may be decompression bombs: 256 MiB at 3 bytes per pixel
TOO_LARGE = f"not a readable image, above the limit of {MAX_PIXELS:,} pixels; reduce it"
THUMBNAIL = 128  # pixels; side of the grey image by which duplicates are found
ORIENTATION, PHOTOMETRIC = 0x0112, 0x0106  # EXIF and TIFF tags
WHITE_IS_ZERO = 0  # value of PHOTOMETRIC
SRGB_TOLERANCE = 2  # grey values; a profile that changes no colour more than this is sRGB

# What Pillow's decoders raise on a damaged file.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)

# Notes on what was converted or ignored.
OTHER_FORMAT = "content is of another format than the name says"
FIRST_OF_SEVERAL = "first of several pages or frames used"
BROKEN_EXIF = "broken EXIF block ignored"
PROFILE = "colour profile converted to sRGB"
BROKEN_PROFILE = "broken or unsuitable colour profile ignored"
CONVERTED = {
    "1": "black and white to RGB",
    "L": "greyscale to RGB",
    "I": "greyscale to RGB",
    "F": "greyscale to RGB",
    "P": "palette to RGB",
    "CMYK": "CMYK to RGB",
    "LA": "alpha channel removed",
    "RGBA": "alpha channel removed",
}

# Doubts about images.
MIN_SIDE, MAX_ASPECT = 64, 4
SMALL = f"image below {MIN_SIDE} pixels"
ELONGATED = f"image with an aspect ratio above {MAX_ASPECT}:1"
ONE_COLOUR = "image of one colour"
TWO_COLOURS = "image of two colours, like a mask"
COLOUR_RANGE = 2  # grey values; JPEG changes a single colour by this much at most

catching_warnings = threading.Lock()  # threads of a Dask worker share Python's list of warning filters


@dataclass(frozen=True)
class Decoded:
    """An image and its mask, decoded and resized."""

    image: np.ndarray  # uint8 (S, S, 3), RGB, 0 to 255
    mask: np.ndarray | None  # uint8 (S, S, 1), 1 inside the lesion, 0 outside; None if there is none
    thumbnail: np.ndarray  # uint8 (THUMBNAIL, THUMBNAIL), grey
    size: tuple[int, int]  # width and height of the image file, in pixels
    notes: tuple[str, ...]  # what was converted or ignored
    doubts: tuple[str, ...]  # why image or mask may be wrong


@dataclass(frozen=True)
class Profile:
    """An embedded colour profile."""

    mode: str  # of the images it describes: L, RGB or CMYK
    to_srgb: ImageCms.ImageCmsTransform | None  # None: it is sRGB


def open_image(path: Path) -> tuple[Image.Image, list[str]]:
    """Opens an image or mask without decoding it.

    Returns:
        The opened image; and notes on its file.

    Raises:
        InputError: the file is missing, of none of FORMATS, or has more than MAX_PIXELS.
    """
    try:
        with catching_warnings, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            image = Image.open(path, formats=tuple(FORMATS))
            notes = file_notes(image, path)
    except Image.DecompressionBombError:
        raise InputError(f"{path}: {TOO_LARGE}") from None
    except UnidentifiedImageError:
        reason = f"damaged, or none of {', '.join(FORMATS)}" if path.stat().st_size else "empty file"
        raise InputError(f"{path}: not a readable image ({reason})") from None
    except DAMAGED as error:
        raise InputError(f"{path}: not a readable image ({error})") from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise InputError(f"{path}: {TOO_LARGE}")
    if caught:  # Pillow warns of little else than tags
        notes.append(BROKEN_EXIF)
    return image, list(dict.fromkeys(notes))


def file_notes(image: Image.Image, path: Path) -> list[str]:
    """What is unusual about the file of an opened image."""
    notes = []
    content = "JPEG" if image.format == "MPO" else image.format  # MPO: a JPEG with further images behind it
    if EXTENSIONS.get(path.suffix.lower(), content) != content:
        notes.append(OTHER_FORMAT)
    if getattr(image, "is_animated", False):  # also of pages; n_frames would read all of them
        notes.append(FIRST_OF_SEVERAL)
    try:
        if block := image.info.get("exif"):
            Image.Exif().load(block)  # because opening a JPEG with a broken block leaves an empty one for getexif
        if Image.Image.getexif(image).get(ORIENTATION, 1) != 1:  # the method of PNG images would decode them
            notes.append("EXIF orientation ignored")
    except DAMAGED:
        notes.append(BROKEN_EXIF)
    return notes


@contextlib.contextmanager
def decoding_errors(path: Path) -> Iterator[None]:
    """Turns what Pillow raises on damaged content into an InputError that names the file."""
    try:
        yield
    except DAMAGED as error:
        raise InputError(f"{path}: cannot be decoded ({error})") from None


def conversions(image: Image.Image) -> list[str]:
    """What has to be converted to get 8-bit RGB from an opened image."""
    notes = []
    mode = image.mode.split(";")[0]
    if mode in CONVERTED:
        notes.append(CONVERTED[mode])
    if mode == "I" or any(";16" in str(tile[3]) for tile in getattr(image, "tile", [])):
        notes.append("16 bits scaled to 8")
    if mode == "F":
        notes.append("floating-point values scaled to 8 bits")
    return notes


@functools.lru_cache(maxsize=8)  # the images of a source have few different profiles
def read_profile(content: bytes) -> Profile | None:
    """Reads an ICC profile; None if it is broken or is not of grey, RGB or CMYK values."""
    try:
        profile = ImageCms.getOpenProfile(io.BytesIO(content))
        mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}[profile.profile.xcolor_space.strip()]
        to_srgb = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "RGB":
            levels = np.linspace(0, 255, 9).astype(np.uint8)
            colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
            change = np.asarray(to_srgb.apply(Image.fromarray(colours))).astype(int) - colours
            if abs(change).max() <= SRGB_TOLERANCE:
                return Profile(mode, None)
        return Profile(mode, to_srgb)
    except (ImageCms.PyCMSError, KeyError, *DAMAGED):
        return None


def find_profile(image: Image.Image) -> tuple[Profile, list[str]]:
    """The colour profile of an opened image, sRGB if none is embedded or it cannot be used; and notes on it."""
    srgb = Profile("RGB", None)
    if not (content := image.info.get("icc_profile")):
        return srgb, []
    kind = "CMYK" if image.mode == "CMYK" else "L" if image.mode[0] in "1LIF" else "RGB"  # "L" also for LA, "I;16"
    profile = read_profile(content)
    if not profile or (profile.mode != kind and (profile.mode, kind) != ("RGB", "L")):
        return srgb, [BROKEN_PROFILE]
    return profile, [PROFILE] if profile.to_srgb else []


def white_value(image: Image.Image) -> int:
    """The value of white in a grey image of more than 8 bits."""
    return 1 if image.mode == "F" else 65535


def load(image: Image.Image) -> Image.Image:
    """Decodes an opened image; returns grey values of 12 or 16 bits as 16 bits, with white as the highest value."""
    scale = 65535 / 4095 if any(";12" in str(tile[3]) for tile in getattr(image, "tile", [])) else 1
    is_negative = image.mode[0] in "IF" and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO
    image.load()
    if scale != 1:
        image = Image.fromarray((np.asarray(image) * scale).astype(np.uint16))
    if is_negative:  # Pillow inverts such TIFFs of 8 bits only
        image = Image.fromarray(white_value(image) - np.asarray(image))
    return image


def scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Converts a decoded grey image of integers from 0 to 65535, or of floating-point values from 0 to 1, to mode "L".

    Raises:
        ValueError: its values are outside of this range, so their scale is unknown.
    """
    values, white = np.asarray(image), white_value(image)
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= white:  # NaN is not in this range either
        raise ValueError(f"its values range from {low:g} to {high:g}, not 0 to {white}; save it with 8 or 16 bits")
    return Image.fromarray((values * 255 if image.mode == "F" else values // 257).astype(np.uint8))


def decode(image: Image.Image, mode: str, min_side: int) -> Image.Image:
    """Decodes an opened image and converts it to 8 bits.

    Args:
        image: from `open_image`.
        mode: "RGB", "L" or "CMYK".
        min_side: pixels that each side keeps at least, if it has them; libjpeg decodes directly at a half, a quarter or
            an eighth of the size, which is several times faster.

    Returns:
        The decoded image, in `mode`.
    """
    image.draft(mode, (min_side, min_side))
    image = load(image)
    if image.mode[0] in "IF":  # Pillow's own conversion would clip 16 bits to white
        image = scale_to_8_bits(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)  # a conversion to the same mode would copy


def decode_mask(mask: Image.Image, path: Path) -> tuple[Image.Image, list[str]]:
    """Decodes a mask to 8-bit grey values.

    Args:
        mask: from `open_image`.
        path: its file.

    Returns:
        The decoded mask, mode "L"; and notes.

    Raises:
        InputError: it has a single value of more than 8 bits that is neither black nor white.
    """
    if grey := masks.read_grey_png(mask, path):
        return grey, []
    decoded = load(mask)
    if decoded.mode[0] not in "IF":
        return masks.grey_values(decoded)
    low, high = np.asarray(decoded).min(), np.asarray(decoded).max()
    black_and_white = (0, white_value(decoded))
    if low == high and low not in black_and_white:
        raise masks.no_border(path, low, high)
    if (low, high) != black_and_white and (separated := masks.black_and_white(decoded)):
        return separated, [masks.OTHER_VALUES]
    return scale_to_8_bits(decoded), []


def resize(image: Image.Image, size: int) -> np.ndarray:
    """Stretches a decoded image to a square with antialiasing: uint8 (size, size[, 3])."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def image_doubts(image: np.ndarray, thumbnail: np.ndarray, file_size: tuple[int, int]) -> list[str]:
    """Why an image may show no lesion.

    Args:
        image: uint8 (S, S, 3), as resized.
        thumbnail: uint8 (THUMBNAIL, THUMBNAIL), grey.
        file_size: width and height of the file in pixels.

    Returns:
        Any of SMALL, ELONGATED and ONE_COLOUR.
    """
    short, long = sorted(file_size)
    found = {
        SMALL: short < MIN_SIDE,
        ELONGATED: long > MAX_ASPECT * short,
        ONE_COLOUR: all(np.ptp(values) <= COLOUR_RANGE for values in (thumbnail, *np.moveaxis(image, 2, 0))),
    }
    return [doubt for doubt, holds in found.items() if holds]


def read_pair(image_path: Path, mask_path: Path | None, size: int) -> Decoded:
    """Reads an image, and its lesion mask if it has one.

    Args:
        image_path: file of one of FORMATS, of any colours.
        mask_path: the same, of the same width and height, with the lesion brighter; or None.
        size: side of the arrays in pixels.

    Returns:
        The decoded image and mask.

    Raises:
        InputError: a file is missing, not an image, too large or damaged; the mask differs from the image in width or
            height, or has no border between lesion and skin.
    """
    image, notes = open_image(image_path)
    with image:
        file_size = image.size
        lesion, mask_notes = read_mask(mask_path, image_path, file_size, size) if mask_path else (None, [])
        with decoding_errors(image_path):
            profile, profile_notes = find_profile(image)
            notes += conversions(image) + profile_notes
            decoded = decode(image, profile.mode, max(size, THUMBNAIL))
    factors = [max(1, side // max(size, THUMBNAIL)) for side in decoded.size]
    reduced = decoded.reduce((factors[0], factors[1]))  # by whole factors first: faster than in one step, and as good
    if profile.to_srgb:
        reduced = profile.to_srgb.apply(reduced)
    array, thumbnail = resize(reduced, size), resize(reduced.convert("L"), THUMBNAIL)
    found = image_doubts(array, thumbnail, file_size) + ([] if lesion is None else masks.doubts(array, lesion))
    found += [TWO_COLOURS] * (len(decoded.getcolors(2) or ()) == 2)
    return Decoded(array, lesion, thumbnail, file_size, tuple(notes + mask_notes), tuple(found))


def read_mask(path: Path, image_path: Path, image_size: tuple[int, int], size: int) -> tuple[np.ndarray, list[str]]:
    """Reads a mask.

    Args:
        path: its file.
        image_path: file of its image.
        image_size: width and height of its image in pixels.
        size: side of the array in pixels.

    Returns:
        uint8 (size, size, 1), {0, 1}; and notes.

    Raises:
        InputError: see `read_pair`.
    """
    mask, notes = open_image(path)
    with mask:
        if mask.size != image_size:
            raise InputError(f"{path} is {mask.size}, its image {image_path.name} is {image_size} (width, height)")
        with decoding_errors(path):
            grey, decoding_notes = decode_mask(mask, path)
    lesion, value_notes = masks.binarize(grey, path, (size, size))
    return lesion, [f"mask: {note}" for note in notes] + decoding_notes + value_notes


def read_full_size_mask(path: Path) -> np.ndarray:
    """Reads a mask at its own size: uint8 (H, W, 1), {0, 1}.

    Raises:
        InputError: see `read_pair`.
    """
    mask, _ = open_image(path)
    with mask, decoding_errors(path):
        return masks.binarize(decode_mask(mask, path)[0], path, mask.size)[0]


def read(task: tuple[Path, Path | None, int]) -> Decoded | str:
    """`read_pair` for workers: takes one argument, and returns an error's message instead of raising it."""
    try:
        return read_pair(*task)
    except InputError as error:
        return str(error)
