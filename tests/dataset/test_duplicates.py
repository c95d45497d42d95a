"""Copies of a photograph are found whatever was done to them, and different photographs are not taken for copies."""

import io
from collections.abc import Callable

from melanoma.dataset import augment, decode, duplicates
from melanoma.dataset.workers import Workers
from melanoma.sources import isic, synthetic

import numpy as np
import pytest
from PIL import Image, ImageOps

Change = Callable[[Image.Image], Image.Image]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    folder = tmp_path_factory.mktemp("photographs")
    synthetic.write_sample(folder, {"train": 16}, size=(300, 400))
    return [Image.open(record.image).convert("RGB") for record in isic.read_split(folder, "train")]


def thumbnail(picture: Image.Image) -> np.ndarray:
    return decode.resize(picture.convert("L"), decode.THUMBNAIL)


def find(pictures: list[Image.Image]) -> list[duplicates.Match]:
    thumbnails = [thumbnail(picture) for picture in pictures]
    with Workers(1) as workers:
        return duplicates.find(thumbnails.__getitem__, len(thumbnails), workers)


def encoded_anew(picture: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    picture.resize((200, 150)).save(stream, "JPEG", quality=60)
    return Image.open(stream)


def recoloured(picture: Image.Image) -> Image.Image:
    red, green, blue = picture.split()
    return Image.merge("RGB", [red.point(lambda v: 0.8 * v), green.point(lambda v: 0.7 * v + 30), blue])


def darkened(picture: Image.Image) -> Image.Image:
    return picture.point(lambda v: 255 * (v / 255) ** 1.6)


def cut(picture: Image.Image) -> Image.Image:
    width, height = picture.size
    return picture.crop((round(0.03 * width), 0, width, round(0.97 * height)))


def stretched(picture: Image.Image) -> Image.Image:
    return picture.resize((256, 256))


def quarter_turn(picture: Image.Image) -> Image.Image:
    return picture.transpose(Image.Transpose.ROTATE_90)


def mirrored_and_turned(picture: Image.Image) -> Image.Image:
    return ImageOps.mirror(picture).transpose(Image.Transpose.ROTATE_270)


def unchanged(picture: Image.Image) -> Image.Image:
    return picture


@pytest.mark.parametrize(
    "change",
    [unchanged, encoded_anew, recoloured, darkened, cut, stretched, quarter_turn, mirrored_and_turned, ImageOps.flip],
)
def test_changed_copies_are_found_and_nothing_else(photographs: list[Image.Image], change: Change) -> None:
    copies = [2, 5, 11]
    matches = find(photographs + [change(photographs[place]) for place in copies])
    assert [(match.first, match.second) for match in matches] == [(2, 16), (5, 17), (11, 18)]
    assert all(duplicates.SAME <= match.score <= 1.001 for match in matches)


def test_equal_pictures_are_reported_with_the_first_of_them(photographs: list[Image.Image]) -> None:
    assert find([photographs[number] for number in (0, 1, 0, 1, 0)]) == [
        duplicates.Match(0, 2, 1.0),
        duplicates.Match(0, 4, 1.0),
        duplicates.Match(1, 3, 1.0),
    ]


def test_pictures_without_structure_are_no_copies_of_each_other() -> None:
    assert find([Image.new("RGB", (64, 64), (grey, grey, grey)) for grey in (10, 20, 200)]) == []


def test_no_pictures_have_no_copies() -> None:
    assert find([]) == []


@pytest.mark.parametrize("block", [3, 5, 256])
def test_block_size_does_not_matter(
    block: int, photographs: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "BLOCK", block)
    pictures = [*photographs[:9], cut(photographs[0]), quarter_turn(photographs[4])]
    assert [(match.first, match.second) for match in find(pictures)] == [(0, 9), (4, 10)]


@pytest.mark.parametrize("variant", range(8))
def test_turn_of_the_description_is_that_of_the_picture(photographs: list[Image.Image], variant: int) -> None:
    picture = thumbnail(photographs[0])
    of_turned = duplicates.descriptor(augment.flip_rotate(picture, variant)).astype(int)
    assert abs(of_turned - augment.flip_rotate(duplicates.descriptor(picture), variant)).max() <= 1


def test_score_of_a_picture_with_itself_and_with_its_negative(photographs: list[Image.Image]) -> None:
    picture = thumbnail(photographs[0])
    assert duplicates.score(picture, picture) == pytest.approx(1, abs=1e-3)
    assert duplicates.score(picture, 255 - picture) < duplicates.SAME


def test_families_join_what_is_linked_through_others() -> None:
    links = [duplicates.Match(0, 3, 1.0), duplicates.Match(3, 5, 0.8), duplicates.Match(1, 2, 0.9)]
    assert sorted(map(sorted, duplicates.groups(links, 7))) == [[0, 3, 5], [1, 2]]
    assert duplicates.groups([], 4) == []
