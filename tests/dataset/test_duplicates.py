"""Duplicates are found after resizing, recolouring, cropping and rotation; different images are not."""

import io
import sys
from collections.abc import Callable

from melanoma.dataset import augment, decode, duplicates
from melanoma.dataset.workers import Workers
from melanoma.sources import synthetic

import numpy as np
import pipeline
import pytest
from PIL import Image, ImageOps

Change = Callable[[Image.Image], Image.Image]
COUNT = 12


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    folder = tmp_path_factory.mktemp("images")
    synthetic.write_sample(folder, {"train": COUNT}, size=(300, 400))
    return [Image.open(record.image).convert("RGB") for record in pipeline.records(folder, "train")]


def thumbnail(image: Image.Image) -> np.ndarray:
    return decode.resize(image.convert("L"), decode.THUMBNAIL)


def find(images: list[Image.Image]) -> list[duplicates.Match]:
    thumbnails = [thumbnail(image) for image in images]
    with Workers(1) as workers:
        return duplicates.find(thumbnails.__getitem__, len(thumbnails), workers)


def unchanged(image: Image.Image) -> Image.Image:
    return image


def reencoded(image: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    image.resize((200, 150)).save(stream, "JPEG", quality=60)
    return Image.open(stream)


def recoloured(image: Image.Image) -> Image.Image:
    red, green, blue = image.split()
    return Image.merge("RGB", [red.point(lambda v: 0.8 * v), green.point(lambda v: 0.7 * v + 30), blue])


def darkened(image: Image.Image) -> Image.Image:
    return image.point(lambda v: 255 * (v / 255) ** 1.6)


def cropped(image: Image.Image) -> Image.Image:
    width, height = image.size
    return image.crop((round(0.03 * width), 0, width, round(0.97 * height)))


def stretched(image: Image.Image) -> Image.Image:
    return image.resize((256, 256))


def rotated(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.ROTATE_90)


def mirrored_and_rotated(image: Image.Image) -> Image.Image:
    return ImageOps.mirror(image).transpose(Image.Transpose.ROTATE_270)


@pytest.mark.parametrize(
    "change",
    [unchanged, reencoded, recoloured, darkened, cropped, stretched, rotated, mirrored_and_rotated, ImageOps.flip],
)
def test_only_changed_duplicates_are_found(images: list[Image.Image], change: Change) -> None:
    originals = [2, 5, 11]
    matches = find(images + [change(images[position]) for position in originals])
    assert [(match.first, match.second) for match in matches] == [(2, COUNT), (5, COUNT + 1), (11, COUNT + 2)]
    assert all(duplicates.DUPLICATE_SCORE <= match.score <= 1.001 for match in matches)


def test_equal_images_match_the_first_of_them(images: list[Image.Image]) -> None:
    assert find([images[position] for position in (0, 1, 0, 1, 0)]) == [
        duplicates.Match(0, 2, 1.0),
        duplicates.Match(0, 4, 1.0),
        duplicates.Match(1, 3, 1.0),
    ]


def test_images_without_structure_are_not_duplicates() -> None:
    assert find([Image.new("RGB", (64, 64), (grey, grey, grey)) for grey in (10, 20, 200)]) == []


def test_no_images_have_no_duplicates() -> None:
    assert find([]) == []


@pytest.mark.parametrize("block", [3, 5, 256])
def test_block_size_does_not_matter(block: int, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "BLOCK", block)
    several = [*images[:9], cropped(images[0]), rotated(images[4])]
    assert [(match.first, match.second) for match in find(several)] == [(0, 9), (4, 10)]


@pytest.fixture(scope="module")
def descriptors(images: list[Image.Image]) -> np.ndarray:
    """Of noise, of the images, and of altered copies of both, turned in all ways."""
    rng = np.random.default_rng(0)
    noise = [thumbnail(Image.fromarray(rng.integers(0, 256, (32, 32)).astype(np.uint8))) for _ in range(300)]
    originals = [*noise, *map(thumbnail, images)]
    copies = [augment.flip_rotate(noise[place], place % augment.VIEWS) for place in range(40)]
    altered = [thumbnail(recoloured(image).transpose(Image.Transpose.ROTATE_90)) for image in images]
    return np.stack([duplicates.descriptor(one) for one in [*originals, *copies, *altered]])


def test_index_finds_the_pairs_of_the_full_search(descriptors: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = set(duplicates.find_pairs(descriptors))
    assert len(expected) >= 40 + COUNT
    monkeypatch.setattr(duplicates, "ALL_PAIRS", 0)
    monkeypatch.delattr(duplicates, "similar_pairs")
    assert set(duplicates.find_pairs(descriptors)) == expected


def test_many_images_without_faiss_name_the_requirements(
    descriptors: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = duplicates.find_pairs(descriptors)
    monkeypatch.setattr(duplicates, "ALL_PAIRS", 0)
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert duplicates.find_pairs(descriptors) == expected
    assert "pip install -r requirements/many.txt" in caplog.text


@pytest.mark.parametrize("view", range(augment.VIEWS))
def test_descriptor_of_a_rotated_image_is_the_rotated_descriptor(images: list[Image.Image], view: int) -> None:
    image = thumbnail(images[0])
    found = duplicates.descriptor(augment.flip_rotate(image, view)).astype(int)
    assert abs(found - augment.flip_rotate(duplicates.descriptor(image), view)).max() <= 1


def test_score_is_1_for_the_same_image_and_low_for_its_negative(images: list[Image.Image]) -> None:
    image = thumbnail(images[0])
    assert duplicates.score(image, image) == pytest.approx(1, abs=1e-3)
    assert duplicates.score(image, 255 - image) < duplicates.DUPLICATE_SCORE


def test_components_join_images_linked_through_others() -> None:
    numbers = duplicates.components([(0, 3), (3, 5), (1, 2)], 7)
    assert [np.flatnonzero(numbers == number).tolist() for number in range(4)] == [[0, 3, 5], [1, 2], [4], [6]]
    assert duplicates.components([], 4).tolist() == [0, 1, 2, 3]
