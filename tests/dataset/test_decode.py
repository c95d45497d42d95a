"""Decoding and resizing of images and masks."""

from collections.abc import Callable
from pathlib import Path

from melanoma.dataset import decode
from melanoma.errors import InputError

import numpy as np
import pytest
from PIL import Image


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


def test_file_of_another_format_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "ISIC_7.jpg", format="TIFF")
    with pytest.raises(InputError, match=r"ISIC_7\.jpg: not a readable image"):
        image_of(tmp_path / "ISIC_7.jpg", 32)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_damaged_files_are_images_or_input_errors(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "ISIC_7.jpg"
    Image.fromarray(noise()).save(path, format=kind)
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
