"""Decoding and resizing of images and masks."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from melanoma.dataset import decode
from melanoma.errors import InputError

import icc
import numpy as np
import pytest
from PIL import Image, ImageCms


def noise(height: int = 60, width: int = 80) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def write(path: Path, array: np.ndarray, exif: Image.Exif | None = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(array).save(path, quality=95, exif=exif or Image.Exif())
    return path


def write_pair(folder: Path, mask: np.ndarray, exif: Image.Exif | None = None) -> tuple[Path, Path]:
    """Image and mask files of the same size."""
    image = write(folder / "ISIC_1.jpg", noise(*mask.shape[:2]), exif)
    return image, write(folder / "ISIC_1_segmentation.png", mask, exif)


def image_of(path: Path, size: int) -> np.ndarray:
    return decode.read_pair(path, None, size).image


def mask_of(image: Path, mask: Path, size: int) -> np.ndarray:
    array = decode.read_pair(image, mask, size).mask
    assert array is not None
    return array


def test_image_becomes_a_square_rgb_array(tmp_path: Path) -> None:
    array = image_of(write(tmp_path / "a.png", np.full((60, 80, 3), (10, 20, 30), np.uint8)), 32)
    assert array.shape == (32, 32, 3) and array.dtype == np.uint8
    assert (array == (10, 20, 30)).all()


def test_resizing_averages_fine_patterns(tmp_path: Path) -> None:
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    assert abs(image_of(write(tmp_path / "a.png", stripes), 16).astype(int) - 127).max() <= 3


def test_scaled_decoding_agrees_with_full_decoding(tmp_path: Path) -> None:
    smooth = np.linspace(0, 255, 800).astype(np.uint8)
    array = np.stack([np.tile(smooth, (600, 1)), np.tile(smooth[:600, None], (1, 800)), np.full((600, 800), 90)], -1)
    jpeg = image_of(write(tmp_path / "a.jpg", array.astype(np.uint8)), 64)
    png = image_of(write(tmp_path / "a.png", array.astype(np.uint8)), 64)
    assert abs(jpeg.astype(int) - png).max() <= 4


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
def test_other_colour_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (40, 40), (153, 153, 153)).convert(mode).save(path)
    array = image_of(path, 32)
    assert array.shape == (32, 32, 3)
    assert abs(array.astype(int) - 153).max() <= 8


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    ramp = (256 * np.arange(256) + 77).astype(np.uint16)  # a low byte without information
    Image.fromarray(np.tile(ramp, (256, 1))).save(tmp_path / "a.png")
    pair = decode.read_pair(tmp_path / "a.png", None, 256)
    assert "16 bits scaled to 8" in pair.notes
    assert abs(pair.image[7, :, 1].astype(int) - np.arange(256)).max() <= 1


def test_sixteen_bit_mask_is_scaled(tmp_path: Path) -> None:
    image, mask = write_pair(tmp_path, np.zeros((60, 80), np.uint8))
    lesion = np.zeros((60, 80), np.uint16)
    lesion[:30] = 65535
    Image.fromarray(lesion).save(mask)
    assert mask_of(image, mask, 32)[:, 5, 0].tolist() == [1] * 16 + [0] * 16


@pytest.mark.parametrize("transparency", [0, bytes([0, 128, 255])])
def test_transparent_palette_image_keeps_its_colours(transparency: int | bytes, tmp_path: Path) -> None:
    colours = np.array([[153, 20, 90], [20, 90, 153], [90, 153, 20]], np.uint8).repeat(12, axis=0)
    image = Image.fromarray(colours[:, None].repeat(36, axis=1)).convert("P", palette=Image.Palette.ADAPTIVE)
    image.save(tmp_path / "a.png", transparency=transparency)
    assert abs(image_of(tmp_path / "a.png", 36)[::12, 0].astype(int) - colours[::12]).max() <= 8


LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "TIFF": {"compression": "tiff_lzw"},
    "BMP": {},
    "WEBP": {"lossless": True, "exact": True},
}


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".png", ".tif", ".tiff", ".bmp", ".webp"])
def test_content_counts_and_not_the_name(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"ISIC_7{suffix}"
    Image.fromarray(noise(256, 256)).save(path, format=kind, **LOSSLESS[kind])
    pair = decode.read_pair(path, None, 256)
    assert np.array_equal(pair.image, noise(256, 256))
    assert pair.notes == (() if suffix in decode.FORMATS[kind] else (decode.OTHER_FORMAT,))


@pytest.mark.parametrize("kind", ["GIF", "PPM", "ICO", "JPEG2000"])
def test_file_of_a_further_format_is_refused(kind: str, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "ISIC_7.jpg", format=kind)
    with pytest.raises(InputError, match=r"ISIC_7\.jpg: not a readable image"):
        image_of(tmp_path / "ISIC_7.jpg", 32)


@pytest.mark.parametrize("kind", ["JPEG", *LOSSLESS])
def test_limit_of_pixels_holds_for_every_format(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ISIC_7.jpg"
    Image.new("RGB", (40, 40)).save(path, format=kind)
    monkeypatch.setattr(decode, "MAX_PIXELS", 40 * 40)
    assert image_of(path, 32).shape == (32, 32, 3)
    monkeypatch.setattr(decode, "MAX_PIXELS", 40 * 40 - 1)
    with pytest.raises(InputError, match=r"ISIC_7\.jpg: not a readable image, above the limit"):
        image_of(path, 32)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.tif", {}),
        ("a.webp", {"lossless": True}),
        ("a.png", {}),
    ],
)
def test_first_of_several_pages_or_frames_is_used(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (80, 80), colour) for colour in ("red", "blue"))
    first.save(tmp_path / name, save_all=True, append_images=[second], **options)
    pair = decode.read_pair(tmp_path / name, None, 32)
    assert pair.notes == (decode.FIRST_OF_SEVERAL,)
    assert (pair.image == (255, 0, 0)).all()


def tiff(path: Path, values: bytes, bits: int, photometric: int) -> Path:
    """Writes a grey TIFF of 16 x 16 pixels."""
    tags = {256: 16, 257: 16, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: 16}
    tags[279] = len(values)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + values)
    return path


@pytest.mark.parametrize(("photometric", "expected"), [(1, 200), (0, 55)])
def test_sixteen_bit_tiff_is_scaled_and_inverted_if_zero_is_white(
    photometric: int, expected: int, tmp_path: Path
) -> None:
    path = tiff(tmp_path / "a.tif", struct.pack("<H", 200 * 257) * 256, 16, photometric)
    pair = decode.read_pair(path, None, 16)
    assert (pair.image == expected).all() and "16 bits scaled to 8" in pair.notes


def test_twelve_bit_tiff_is_scaled(tmp_path: Path) -> None:
    path = tiff(tmp_path / "a.tif", bytes([0xFF, 0xF8, 0x00]) * 128, 12, 1)  # two pixels: 0xFFF, 0x800
    assert decode.read_pair(path, None, 16).image[3, :2, 0].tolist() == [255, 127]


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_sixteen_bits_per_channel_of_a_colour_tiff_are_scaled(mode: str, tmp_path: Path) -> None:
    pixel = {"RGB": (60000, 30000, 15000), "CMYK": (5535, 35535, 50535, 0)}[mode]
    count = len(pixel)
    tags = {256: 8, 257: 8, 258: (16,) * count, 259: 1, 262: 2 if mode == "RGB" else 5, 277: count, 278: 8}
    values = struct.pack(f"<{count}H", *pixel) * 64
    start = 8 + 2 + 9 * 12 + 4
    entries = {**tags, 258: start, 273: start + 2 * count, 279: len(values)}
    table = b"".join(
        struct.pack("<HHII", tag, 3 if tag == 258 else 4, count if tag == 258 else 1, int(str(entries[tag])))
        for tag in sorted(entries)
    )
    bits = struct.pack(f"<{count}H", *(16,) * count)
    (tmp_path / "a.tif").write_bytes(b"II*\0" + struct.pack("<IH", 8, 9) + table + bytes(4) + bits + values)
    pair = decode.read_pair(tmp_path / "a.tif", None, 8)
    assert abs(pair.image.astype(int) - np.array([60000, 30000, 15000]) / 257).max() <= 1
    assert "16 bits scaled to 8" in pair.notes


def test_floating_point_tiff_from_0_to_1_is_scaled(tmp_path: Path) -> None:
    values = np.tile(np.linspace(0, 1, 256), (256, 1)).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    pair = decode.read_pair(tmp_path / "a.tif", None, 256)
    assert "floating-point values scaled to 8 bits" in pair.notes
    assert abs(pair.image[7, :, 1].astype(int) - np.arange(256)).max() <= 1


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 255]], np.float32),
        np.array([[-0.1, 1]], np.float32),
        np.array([[0, np.nan]], np.float32),
        np.array([[0, 70000]], np.int32),
        -np.array([[5]], np.int32),
    ],
)
def test_values_of_unknown_scale_are_refused(values: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(values.repeat(8, axis=0)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif: cannot be decoded \(its values range from .*; save it with"):
        image_of(tmp_path / "a.tif", 8)


@pytest.mark.parametrize("kind", ["JPEG", *LOSSLESS])
def test_damaged_files_are_images_or_input_errors(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "ISIC_7.jpg"
    exif = Image.Exif()
    exif[decode.ORIENTATION] = 6
    Image.fromarray(noise()).save(path, format=kind, **({} if kind == "BMP" else {"exif": exif}))
    intact = np.frombuffer(path.read_bytes(), np.uint8)
    refused = 0
    for trial in range(400):
        damaged = intact.copy()
        head = rng.integers(0, 2)
        places = rng.integers(0, 400 if head else len(intact), rng.integers(1, 6))
        damaged[places] = rng.integers(0, 256, len(places))
        path.write_bytes(damaged[: rng.integers(1, len(intact)) if trial % 4 == 0 else len(intact)].tobytes())
        found = decode.read((path, path, 32))
        refused += isinstance(found, str)
        assert isinstance(found, str) or found.image.shape == (32, 32, 3)
    assert refused > 100


def test_sampled_large_mask_agrees_with_full_resizing(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:900, :1200]
    lesion = ((rows - 400) ** 2 / 200**2 + (columns - 700) ** 2 / 350**2 < 1).astype(np.uint8) * 255
    image, mask = write_pair(tmp_path, lesion)
    with Image.open(mask) as opened:
        full = np.asarray(opened.resize((64, 64), Image.Resampling.BILINEAR)) > 127
    assert (mask_of(image, mask, 64)[..., 0] != full).mean() < 0.005


def test_black_and_white_masks_are_accepted(tmp_path: Path) -> None:
    for value, expected in ((0, 0), (255, 1)):
        image, mask = write_pair(tmp_path, np.full((60, 80), value, np.uint8))
        assert (mask_of(image, mask, 32) == expected).all()


def test_resized_mask_is_binary(tmp_path: Path) -> None:
    lesion = np.zeros((61, 83), np.uint8)
    lesion[20:41, 30:60] = 255
    image, mask = write_pair(tmp_path, lesion)
    array = mask_of(image, mask, 32)
    assert array.shape == (32, 32, 1) and array.dtype == np.uint8
    assert set(np.unique(array)) == {0, 1}
    assert array.mean() == pytest.approx(21 * 30 / (61 * 83), abs=0.02)


def test_mask_is_thresholded_at_half_grey(tmp_path: Path) -> None:
    image, mask = write_pair(tmp_path, np.repeat(np.array([[100], [127], [128], [255]], np.uint8), 4, axis=1))
    assert mask_of(image, mask, 4)[:, 0, 0].tolist() == [0, 0, 1, 1]


def test_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    image, _ = write_pair(tmp_path, np.zeros((60, 80), np.uint8))
    mask = write(tmp_path / "other.png", np.zeros((60, 81), np.uint8))
    with pytest.raises(InputError, match=r"other\.png is \(81, 60\).*\(80, 60\)"):
        mask_of(image, mask, 32)


def test_exif_orientation_is_ignored_for_image_and_mask(tmp_path: Path) -> None:
    lesion = np.zeros((60, 80), np.uint8)
    lesion[:20, :30] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by 90 degrees
    plain, tagged = write_pair(tmp_path / "plain", lesion), write_pair(tmp_path / "tagged", lesion, exif)
    for path in tagged:
        with Image.open(path) as opened:
            assert opened.getexif()[0x0112] == 6
    assert np.array_equal(image_of(plain[0], 32), image_of(tagged[0], 32))
    mask = mask_of(tagged[0], tagged[1], 32)
    assert np.array_equal(mask_of(plain[0], plain[1], 32), mask)
    assert mask[2, 2] == 1 and mask[2, 28] == 0


BROKEN_BLOCKS = {
    "no header": b"Exif\0\0nonsense",
    "cut off": b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01",
    "values out of reach": b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 271, 2, 500, 9999) + bytes(4),
}


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("block", BROKEN_BLOCKS)
def test_broken_exif_block_is_ignored_and_noted(name: str, block: str, tmp_path: Path) -> None:
    image = Image.fromarray(noise(256, 256))
    image.save(tmp_path / f"plain{name}", quality=90)
    image.save(tmp_path / name, quality=90, exif=BROKEN_BLOCKS[block])
    pair = decode.read_pair(tmp_path / name, None, 64)  # pytest makes every warning an error
    assert pair.notes == (decode.BROKEN_EXIF,)
    assert np.array_equal(pair.image, image_of(tmp_path / f"plain{name}", 64))


# ------------------------------------------------------------------------------------------------------ colour profiles


def read_with_profile(folder: Path, image: Image.Image, profile: bytes | None, name: str = "a.png") -> decode.Decoded:
    image.save(folder / name, icc_profile=profile)
    return decode.read_pair(folder / name, None, 64)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SKIN = Image.new("RGB", (64, 64), (200, 150, 120))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "a.jpg"])
def test_adobe_rgb_becomes_srgb(name: str, tmp_path: Path) -> None:
    pair = read_with_profile(tmp_path, SKIN, icc.ADOBE_RGB, name)
    assert abs(pair.image.astype(int) - (217, 151, 119)).max() <= 6
    assert pair.notes == (decode.PROFILE,)


def test_srgb_profile_changes_nothing(tmp_path: Path) -> None:
    image = Image.fromarray(noise(64, 64))
    pair = read_with_profile(tmp_path, image, SRGB)
    assert np.array_equal(pair.image, noise(64, 64)) and pair.notes == ()


@pytest.mark.parametrize("profile", [b"nonsense", icc.ADOBE_RGB[:300], icc.LINEAR_GREY, icc.GREY_INKS])
def test_broken_or_unsuitable_profile_is_ignored_and_noted(profile: bytes, tmp_path: Path) -> None:
    pair = read_with_profile(tmp_path, SKIN, profile)
    assert (pair.image == (200, 150, 120)).all() and pair.notes == (decode.BROKEN_PROFILE,)


def test_profile_of_a_greyscale_image_is_converted(tmp_path: Path) -> None:
    pair = read_with_profile(tmp_path, Image.new("L", (64, 64), 55), icc.LINEAR_GREY)
    assert abs(pair.image.astype(int) - 128).max() <= 1  # sRGB of 0.216 of white
    assert pair.notes == ("greyscale to RGB", decode.PROFILE)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_rgb_profile_of_another_mode_is_converted(mode: str, tmp_path: Path) -> None:
    image = SKIN.convert(mode)
    pair = read_with_profile(tmp_path, image, icc.ADOBE_RGB)
    expected = read_with_profile(tmp_path, image.convert("RGB"), icc.ADOBE_RGB)
    assert np.array_equal(pair.image, expected.image) and decode.PROFILE in pair.notes


def test_profile_of_a_cmyk_image_is_converted(tmp_path: Path) -> None:
    cyan = Image.new("CMYK", (64, 64), (255, 0, 0, 0))  # an ink without colour in this profile
    assert read_with_profile(tmp_path, cyan, None, "a.tif").image.min() == 0
    pair = read_with_profile(tmp_path, cyan, icc.GREY_INKS, "a.tif")
    assert pair.image.min() >= 250 and pair.notes == ("CMYK to RGB", decode.PROFILE)


# --------------------------------------------------------------------------------------------------------------- doubts


@pytest.mark.parametrize(
    ("size", "doubts"),
    [
        ((64, 64), ()),
        ((64, 63), (decode.SMALL,)),
        ((256, 64), ()),
        ((64, 257), (decode.ELONGATED,)),
        ((200, 40), (decode.SMALL, decode.ELONGATED)),
    ],
)
def test_small_and_elongated_images_are_doubted(size: tuple[int, int], doubts: tuple[str, ...], tmp_path: Path) -> None:
    assert decode.read_pair(write(tmp_path / "a.png", noise(*size)), None, 32).doubts == doubts


@pytest.mark.parametrize("colour", [(0, 0, 0), (200, 150, 120), (255, 255, 255)])
@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_image_of_one_colour_is_doubted(name: str, colour: tuple[int, ...], tmp_path: Path) -> None:
    path = write(tmp_path / name, np.full((80, 80, 3), colour, np.uint8))
    assert decode.read_pair(path, None, 32).doubts == (decode.ONE_COLOUR,)


def test_image_of_two_colours_of_one_brightness_is_not_of_one_colour(tmp_path: Path) -> None:
    colours = np.zeros((80, 80, 3), np.uint8)
    colours[:40], colours[40:] = (100, 0, 0), (0, 51, 0)
    assert decode.read_pair(write(tmp_path / "a.png", colours), None, 32).doubts == (decode.TWO_COLOURS,)


# -------------------------------------------------------------------------------------------------------- damaged files


def truncated_in_the_pixels(path: Path) -> None:
    path.write_bytes(write(path, noise(240, 320)).read_bytes()[:4000])


def truncated_in_the_header(path: Path) -> None:
    path.write_bytes(write(path, noise(240, 320)).read_bytes()[:100])


def web_page(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


def no_file(path: Path) -> None:
    assert not path.exists()


@pytest.mark.parametrize("make", [truncated_in_the_pixels, truncated_in_the_header, web_page, empty_file, no_file])
def test_unreadable_image_is_an_input_error_with_its_name(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "ISIC_7.jpg"
    make(path)
    with pytest.raises(InputError, match=r"ISIC_7\.jpg"):
        image_of(path, 32)


def test_truncated_mask_is_an_input_error_with_its_name(tmp_path: Path) -> None:
    image, mask = write_pair(tmp_path, noise()[..., 0])
    mask.write_bytes(mask.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"ISIC_1_segmentation\.png"):
        mask_of(image, mask, 32)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGB", "I;16"])
def test_masks_of_every_mode_are_decoded_as_by_pillow(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    grey = np.random.default_rng(0).choice([0, 90, 255], (40, 30)).astype(np.uint8)
    if mode == "P":  # 8-bit indices that differ from the grey values
        mask = Image.fromarray(255 - grey)
        mask.putpalette([255 - number // 3 for number in range(768)])
    elif mode == "I;16":
        mask = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        mask = Image.fromarray(grey).convert(mode)
    mask.save(path)
    expected = mask.convert("L") if mode != "I;16" else Image.fromarray(grey)
    opened, _ = decode.open_image(path)
    with opened:
        decoded, _ = decode.decode_mask(opened, path)
    assert np.array_equal(np.asarray(decoded), np.asarray(expected))
