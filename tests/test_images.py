"""Decoding, resizing, and the region that the classifier sees."""

from collections.abc import Callable
from pathlib import Path

from melanoma import images
from melanoma.errors import InputError

import numpy as np
import pytest
from PIL import Image

Box = tuple[int, int, int]


def noise(height: int = 60, width: int = 80) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def rectangle(size: int, rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((size, size, 1), np.uint8)
    mask[rows, columns] = 1
    return mask


def write(path: Path, array: np.ndarray, exif: Image.Exif | None = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(array).save(path, quality=95, exif=exif or Image.Exif())
    return path


def write_pair(folder: Path, mask: np.ndarray, exif: Image.Exif | None = None) -> tuple[Path, Path]:
    """Photograph and mask files of the same frame."""
    photograph = write(folder / "ISIC_1.jpg", noise(*mask.shape[:2]), exif)
    return photograph, write(folder / "ISIC_1_segmentation.png", mask, exif)


def image_of(path: Path, size: int) -> np.ndarray:
    return images.read_pair(path, None, size).image


def mask_of(photograph: Path, mask: Path, size: int) -> np.ndarray:
    lesion = images.read_pair(photograph, mask, size).mask
    assert lesion is not None
    return lesion


def test_photograph_comes_as_a_square_of_rgb(tmp_path: Path) -> None:
    array = image_of(write(tmp_path / "a.png", np.full((60, 80, 3), (10, 20, 30), np.uint8)), 32)
    assert array.shape == (32, 32, 3) and array.dtype == np.uint8
    assert (array == (10, 20, 30)).all()


def test_shrinking_averages_fine_patterns(tmp_path: Path) -> None:
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


def test_sixteen_bits_are_scaled_and_do_not_wrap(tmp_path: Path) -> None:
    ramp = (256 * np.arange(256) + 77).astype(np.uint16)  # a low byte that tells nothing
    Image.fromarray(np.tile(ramp, (256, 1))).save(tmp_path / "a.png")
    pair = images.read_pair(tmp_path / "a.png", None, 256)
    assert "16 bits scaled to 8" in pair.notes
    assert abs(pair.image[7, :, 1].astype(int) - np.arange(256)).max() <= 1


def test_sixteen_bit_mask_is_scaled_too(tmp_path: Path) -> None:
    photograph, mask = write_pair(tmp_path, np.zeros((60, 80), np.uint8))
    lesion = np.zeros((60, 80), np.uint16)
    lesion[:30] = 65535
    Image.fromarray(lesion).save(mask)
    assert mask_of(photograph, mask, 32)[:, 5, 0].tolist() == [1] * 16 + [0] * 16


@pytest.mark.parametrize("transparency", [0, bytes([0, 128, 255])])
def test_transparent_palette_picture_loses_its_transparency_alone(transparency: int | bytes, tmp_path: Path) -> None:
    colours = np.array([[153, 20, 90], [20, 90, 153], [90, 153, 20]], np.uint8).repeat(12, axis=0)
    picture = Image.fromarray(colours[:, None].repeat(36, axis=1)).convert("P", palette=Image.Palette.ADAPTIVE)
    picture.save(tmp_path / "a.png", transparency=transparency)
    assert abs(image_of(tmp_path / "a.png", 36)[::12, 0].astype(int) - colours[::12]).max() <= 8


def test_file_of_another_kind_is_not_opened(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "ISIC_7.jpg", format="TIFF")
    with pytest.raises(InputError, match=r"ISIC_7\.jpg: not a readable picture"):
        image_of(tmp_path / "ISIC_7.jpg", 32)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_spoilt_files_are_input_errors_or_pictures_and_nothing_else(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "ISIC_7.jpg"
    Image.fromarray(noise()).save(path, format=kind)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    refused = 0
    for trial in range(400):
        spoilt = whole.copy()
        head = rng.integers(0, 2)
        places = rng.integers(0, 400 if head else len(whole), rng.integers(1, 6))
        spoilt[places] = rng.integers(0, 256, len(places))
        path.write_bytes(spoilt[: rng.integers(1, len(whole)) if trial % 4 == 0 else len(whole)].tobytes())
        found = images.read((path, path, 32))
        refused += isinstance(found, str)
        assert isinstance(found, str) or found.image.shape == (32, 32, 3)
    assert refused > 100


def test_large_mask_agrees_with_one_looked_at_in_full(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:900, :1200]
    lesion = ((rows - 400) ** 2 / 200**2 + (columns - 700) ** 2 / 350**2 < 1).astype(np.uint8) * 255
    photograph, mask = write_pair(tmp_path, lesion)
    with Image.open(mask) as outline:
        full = np.asarray(outline.resize((64, 64), Image.Resampling.BILINEAR)) > 127
    assert (mask_of(photograph, mask, 64)[..., 0] != full).mean() < 0.005


def test_mask_of_one_colour_is_a_mask(tmp_path: Path) -> None:
    for value, expected in ((0, 0), (255, 1)):
        photograph, mask = write_pair(tmp_path, np.full((60, 80), value, np.uint8))
        assert (mask_of(photograph, mask, 32) == expected).all()


def test_mask_stays_binary_when_resized(tmp_path: Path) -> None:
    lesion = np.zeros((61, 83), np.uint8)
    lesion[20:41, 30:60] = 255
    photograph, mask = write_pair(tmp_path, lesion)
    array = mask_of(photograph, mask, 32)
    assert array.shape == (32, 32, 1) and array.dtype == np.uint8
    assert set(np.unique(array)) == {0, 1}
    assert array.mean() == pytest.approx(21 * 30 / (61 * 83), abs=0.02)


def test_mask_is_cut_at_half_grey(tmp_path: Path) -> None:
    photograph, mask = write_pair(tmp_path, np.repeat(np.array([[100], [127], [128], [255]], np.uint8), 4, axis=1))
    assert mask_of(photograph, mask, 4)[:, 0, 0].tolist() == [0, 0, 1, 1]


def test_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    photograph, _ = write_pair(tmp_path, np.zeros((60, 80), np.uint8))
    mask = write(tmp_path / "other.png", np.zeros((60, 81), np.uint8))
    with pytest.raises(InputError, match=r"other\.png is \(81, 60\).*\(80, 60\)"):
        mask_of(photograph, mask, 32)


def test_exif_turn_is_ignored_for_photograph_and_mask_alike(tmp_path: Path) -> None:
    lesion = np.zeros((60, 80), np.uint8)
    lesion[:20, :30] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    plain, turned = write_pair(tmp_path / "plain", lesion), write_pair(tmp_path / "turned", lesion, exif)
    for path in turned:
        with Image.open(path) as picture:
            assert picture.getexif()[0x0112] == 6
    assert np.array_equal(image_of(plain[0], 32), image_of(turned[0], 32))
    mask = mask_of(turned[0], turned[1], 32)
    assert np.array_equal(mask_of(plain[0], plain[1], 32), mask)
    assert mask[2, 2] == 1 and mask[2, 28] == 0


def cut_off_in_the_pixels(path: Path) -> None:
    path.write_bytes(write(path, noise(240, 320)).read_bytes()[:4000])


def cut_off_in_the_header(path: Path) -> None:
    path.write_bytes(write(path, noise(240, 320)).read_bytes()[:100])


def web_page(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")


def empty_file(path: Path) -> None:
    path.write_bytes(b"")


def no_file(path: Path) -> None:
    assert not path.exists()


@pytest.mark.parametrize("make", [cut_off_in_the_pixels, cut_off_in_the_header, web_page, empty_file, no_file])
def test_unreadable_picture_is_an_input_error_with_its_name(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "ISIC_7.jpg"
    make(path)
    with pytest.raises(InputError, match=r"ISIC_7\.jpg"):
        image_of(path, 32)


def test_cut_off_mask_is_an_input_error_with_its_name(tmp_path: Path) -> None:
    photograph, mask = write_pair(tmp_path, noise()[..., 0])
    mask.write_bytes(mask.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"ISIC_1_segmentation\.png"):
        mask_of(photograph, mask, 32)


@pytest.mark.parametrize(
    ("lesion", "expected"),
    [
        ((slice(40, 60), slice(30, 50)), (37, 27, 26)),  # 20 pixels and 3 on each side
        ((slice(40, 60), slice(35, 45)), (37, 27, 26)),  # the longer side counts
        ((slice(0, 20), slice(90, 100)), (0, 74, 26)),  # moved inside the frame
        ((slice(5, 95), slice(5, 95)), (0, 0, 100)),  # no larger than the frame
        ((slice(50, 51), slice(50, 51)), (50, 50, 1)),
    ],
)
def test_lesion_box_by_hand(lesion: tuple[slice, slice], expected: Box) -> None:
    assert images.lesion_box(rectangle(100, *lesion)) == expected


def test_lesion_box_lies_in_the_frame_and_holds_the_lesion() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        top, left = rng.integers(0, 50, 2)
        height, width = rng.integers(1, 51 - top), rng.integers(1, 51 - left)
        box_top, box_left, side = images.lesion_box(rectangle(50, slice(top, top + height), slice(left, left + width)))
        assert 0 <= box_top <= top and top + height <= box_top + side <= 50
        assert 0 <= box_left <= left and left + width <= box_left + side <= 50


def test_lesion_box_is_that_of_the_largest_part() -> None:
    mask = rectangle(100, slice(40, 60), slice(30, 50)) | rectangle(100, slice(0, 5), slice(0, 5))
    mask |= rectangle(100, slice(90, 100), slice(80, 100))
    assert images.lesion_box(mask) == (37, 27, 26)


def test_mask_region_blackens_the_background_only() -> None:
    image, mask = noise(100, 100), rectangle(100, slice(40, 60), slice(30, 50))
    seen, fell_back = images.region_of_interest(image, mask, "mask")
    assert not fell_back and seen.dtype == np.uint8
    assert np.array_equal(seen[40:60, 30:50], image[40:60, 30:50])
    seen = seen.copy()
    seen[40:60, 30:50] = 0
    assert not seen.any()


def test_crop_region_shows_the_box_at_full_size() -> None:
    image, mask = np.zeros((100, 100, 3), np.uint8), rectangle(100, slice(40, 60), slice(30, 50))
    image[37:63, 27:53] = (0, 100, 200)  # the lesion's box
    seen, fell_back = images.region_of_interest(image, mask, "crop")
    assert not fell_back and seen.shape == (100, 100, 3) and seen.dtype == np.uint8
    assert (seen == (0, 100, 200)).all()


def test_full_region_is_the_photograph() -> None:
    image, mask = noise(100, 100), rectangle(100, slice(40, 60), slice(30, 50))
    seen, fell_back = images.region_of_interest(image, mask, "full")
    assert np.array_equal(seen, image) and not fell_back


@pytest.mark.parametrize("roi", images.ROIS)
@pytest.mark.parametrize("value", [0, 1])
def test_empty_or_full_mask_falls_back_to_the_photograph(roi: str, value: int) -> None:
    image = noise(50, 50)
    seen, fell_back = images.region_of_interest(image, np.full((50, 50, 1), value, np.uint8), roi)
    assert np.array_equal(seen, image)
    assert fell_back == (roi != "full")


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGB", "I;16"])
def test_masks_of_every_kind_are_decoded_as_by_pillow(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    grey = np.random.default_rng(0).choice([0, 90, 255], (40, 30)).astype(np.uint8)
    if mode == "P":  # numbers that are not its grey values, of 8 bits
        picture = Image.fromarray(255 - grey)
        picture.putpalette([255 - number // 3 for number in range(768)])
    elif mode == "I;16":
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(grey).convert(mode)
    picture.save(path)
    expected = picture.convert("L") if mode != "I;16" else Image.fromarray(grey)
    with images.open_picture(path) as opened:
        assert np.array_equal(np.asarray(images.decode_mask(opened, path, 16)), np.asarray(expected))
