"""Values of masks, and doubts about masks."""

from pathlib import Path
from typing import Any

from melanoma.dataset import decode, masks
from melanoma.errors import InputError

import numpy as np
import pytest
from PIL import Image, ImageFile

LESION = np.zeros((60, 80), bool)
LESION[20:41, 30:60] = True


def read(folder: Path, mask: Image.Image, name: str = "mask.png", **options: Any) -> decode.Decoded:
    """Reads a mask of the size of LESION with an image."""
    image = Image.fromarray(np.where(LESION, 90, 200).astype(np.uint8)).convert("RGB")
    image.putpixel((0, 0), (201, 200, 200))  # a third colour: no image has two only
    image.save(folder / "image.png")
    mask.save(folder / name, **options)
    return decode.read_pair(folder / "image.png", folder / name, 32)


def lesion_of(decoded: decode.Decoded) -> np.ndarray:
    assert decoded.mask is not None
    return decoded.mask


def grey(inside: int, outside: int, kind: type = np.uint8) -> Image.Image:
    return Image.fromarray(np.where(LESION, inside, outside).astype(kind))


def coloured(inside: tuple[int, ...], outside: tuple[int, ...]) -> Image.Image:
    return Image.fromarray(np.where(LESION[..., None], inside, outside).astype(np.uint8))


def one_bit() -> Image.Image:
    return grey(255, 0).convert("1")


def palette() -> Image.Image:
    mask = grey(0, 1)  # indices: the lesion has the lower one and the brighter colour
    mask.putpalette([250, 250, 240, 10, 20, 30])
    return mask


@pytest.fixture
def expected(tmp_path: Path) -> np.ndarray:
    mask = lesion_of(read(tmp_path, grey(255, 0)))
    assert 0 < mask.sum() < mask.size
    return mask


def dark_palette() -> Image.Image:
    mask = grey(1, 0)  # colours that have the same grey value
    mask.putpalette([0, 0, 0, 0, 0, 1])
    return mask


def equal_palette() -> Image.Image:
    mask = grey(1, 0)
    mask.putpalette([0, 0, 0, 0, 0, 0])
    return mask


STANDARD = {
    "8 bits": grey(255, 0),
    "1 bit": one_bit(),
    "RGB": coloured((255, 255, 255), (0, 0, 0)),
    "opaque alpha": coloured((255, 255, 255, 255), (0, 0, 0, 255)),
    "16 bits": grey(65535, 0, np.uint16),
}
UNUSUAL = {
    "1 and 0": grey(1, 0),
    "255 and 254": grey(255, 254),
    "200 and 90": grey(200, 90),
    "128 and 127": grey(128, 127),
    "palette": palette(),
    "palette of dark colours": dark_palette(),
    "palette of equal colours": equal_palette(),
    "dark blue on black": coloured((0, 0, 1), (0, 0, 0)),
    "red on black": coloured((255, 0, 0), (0, 0, 0)),
    "yellow on blue": coloured((255, 255, 0), (0, 0, 255)),
    "16 bits, 1 and 0": grey(1, 0, np.uint16),
    "16 bits, 4095 and 7": grey(4095, 7, np.uint16),
}


@pytest.mark.parametrize("name", STANDARD)
def test_black_and_white_mask_needs_no_note(name: str, expected: np.ndarray, tmp_path: Path) -> None:
    decoded = read(tmp_path, STANDARD[name])
    assert np.array_equal(lesion_of(decoded), expected) and decoded.notes == ()


@pytest.mark.parametrize("name", UNUSUAL)
def test_brighter_of_two_values_is_the_lesion(name: str, expected: np.ndarray, tmp_path: Path) -> None:
    decoded = read(tmp_path, UNUSUAL[name])
    assert np.array_equal(lesion_of(decoded), expected) and decoded.notes == (masks.OTHER_VALUES,)


@pytest.mark.parametrize(
    ("name", "options"),
    [("mask.tif", {"compression": "tiff_lzw"}), ("mask.bmp", {}), ("mask.webp", {"lossless": True}), ("mask.png", {})],
)
@pytest.mark.parametrize("values", [(255, 0), (1, 0)])
def test_mask_of_any_lossless_format_is_read(
    name: str, options: dict[str, Any], values: tuple[int, int], expected: np.ndarray, tmp_path: Path
) -> None:
    assert np.array_equal(lesion_of(read(tmp_path, grey(*values), name, **options)), expected)


def test_jpeg_mask_is_thresholded(expected: np.ndarray, tmp_path: Path) -> None:
    decoded = read(tmp_path, grey(255, 0), "mask.jpg", quality=60)
    assert (lesion_of(decoded) != expected).mean() < 0.01
    assert decoded.notes == (masks.GREY_VALUES,)


@pytest.mark.parametrize("values", [(1, 0), (0.5, -3)])
def test_floating_point_mask_of_two_values_is_read(
    values: tuple[float, float], expected: np.ndarray, tmp_path: Path
) -> None:
    mask = Image.fromarray(np.where(LESION, *values).astype(np.float32))
    assert np.array_equal(lesion_of(read(tmp_path, mask, "mask.tif")), expected)


@pytest.mark.parametrize("colour", [0, 255, "noise"])
def test_alpha_channel_is_the_mask_if_only_it_has_two_values(
    colour: int | str, expected: np.ndarray, tmp_path: Path
) -> None:
    channels = np.zeros((60, 80, 4), np.uint8)
    channels[..., :3] = np.random.default_rng(0).integers(0, 256, (60, 80, 3)) if colour == "noise" else colour
    channels[..., 3] = np.where(LESION, 255, 0)
    decoded = read(tmp_path, Image.fromarray(channels))
    assert np.array_equal(lesion_of(decoded), expected) and decoded.notes == (masks.ALPHA_CHANNEL,)


def test_colours_are_the_mask_if_they_have_two_values(expected: np.ndarray, tmp_path: Path) -> None:
    decoded = read(tmp_path, coloured((255, 255, 255, 0), (0, 0, 0, 255)))
    assert np.array_equal(lesion_of(decoded), expected)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("value", [1, 90, 254])
def test_mask_of_a_single_grey_value_is_refused(value: int, kind: type, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mask\.png: no lesion to separate from skin"):
        read(tmp_path, grey(value, value, kind))


def test_grey_png_is_not_decoded_by_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey(255, 0).save(tmp_path / "mask.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded by Pillow"))
    opened, _ = decode.open_image(tmp_path / "mask.png")
    with opened:
        assert decode.decode_mask(opened, tmp_path / "mask.png")[0].getextrema() == (0, 255)


# --------------------------------------------------------------------------------------------------------------- doubts


def scene(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Skin with a dark lesion and noise, and its mask."""
    rows, columns = np.mgrid[:64, :64]
    lesion = ((rows - 30) ** 2 + (columns - 34) ** 2 < 14**2)[..., None]
    image = np.where(lesion, (110, 70, 60), (220, 170, 150)) + np.random.default_rng(seed).normal(0, 12, (64, 64, 3))
    return image.clip(0, 255).astype(np.uint8), lesion.astype(np.uint8)


def test_right_mask_raises_no_doubt() -> None:
    image, mask = scene()
    assert masks.doubts(image, mask) == []


def test_mask_without_or_of_nothing_but_lesion_is_doubted() -> None:
    image, mask = scene()
    assert masks.doubts(image, np.zeros_like(mask)) == [masks.EMPTY]
    assert masks.doubts(image, np.ones_like(mask)) == [masks.FULL]


@pytest.mark.parametrize("seed", range(3))
def test_inverted_mask_is_doubted(seed: int) -> None:
    image, mask = scene(seed)
    assert masks.doubts(image, 1 - mask) == [masks.INVERTED]


def test_mask_of_a_light_lesion_is_not_taken_as_inverted() -> None:
    image, mask = scene()
    assert masks.doubts(255 - image, mask) == []


def test_mask_of_a_dark_lesion_that_covers_the_frame_is_not_taken_as_inverted() -> None:
    image, mask = scene()
    assert masks.doubts(255 - image, 1 - mask) == []


@pytest.mark.parametrize("seed", range(3))
def test_mask_on_mere_skin_is_doubted(seed: int) -> None:
    image, mask = scene(seed)
    mask[:] = 0
    mask[48:60, 4:16] = 1
    assert masks.doubts(image, mask) == [masks.FOREIGN]


@pytest.mark.parametrize("size", [16, 64, 300])
def test_doubts_do_not_depend_on_the_size_of_the_arrays(size: int) -> None:
    image, mask = (np.asarray(Image.fromarray(array.squeeze()).resize((size, size), 0)) for array in scene())
    mask = mask[..., None]
    assert masks.doubts(image, mask) == []
    assert masks.doubts(image, 1 - mask) == [masks.INVERTED]


def test_mask_too_small_to_compare_is_not_doubted() -> None:
    image, mask = scene()
    mask[:] = 0
    mask[30, 30] = 1
    assert masks.doubts(image, mask) == []


def test_doubt_about_a_mask_is_part_of_what_is_decoded(tmp_path: Path) -> None:
    assert read(tmp_path, grey(0, 255)).doubts == (decode.SMALL, masks.INVERTED)
    assert read(tmp_path, Image.new("L", (80, 60))).doubts == (decode.SMALL, masks.EMPTY)


@pytest.mark.parametrize("mask", [grey(255, 0), coloured((255, 0, 0), (0, 0, 0)), palette()])
def test_mask_in_place_of_an_image_is_doubted(mask: Image.Image, tmp_path: Path) -> None:
    mask.save(tmp_path / "image.png")
    assert decode.TWO_COLOURS in decode.read_pair(tmp_path / "image.png", None, 32).doubts
    assert decode.TWO_COLOURS not in read(tmp_path, grey(255, 0)).doubts
