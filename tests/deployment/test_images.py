"""Which files are predicted, and under which names."""

from pathlib import Path, PurePosixPath

from melanoma.deployment import images
from melanoma.errors import InputError

import numpy as np
import pytest
from PIL import Image


def save(path: Path, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)).save(path)
    return path


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a.jpg", "b.png"], ["a", "b"]),
        (["x/a.jpg", "b.png"], ["a", "b"]),
        (["x/a.jpg", "y/a.jpg", "b.png"], ["x/a", "y/a", "b"]),
        (["a.jpg", "a.png"], ["a.jpg", "a.png"]),
        (["a.jpg", "A.jpg"], ["a.jpg", "A.jpg_2"]),
        (["a.jpg", "a.jpg", "a.jpg"], ["a.jpg", "a.jpg_2", "a.jpg_3"]),
    ],
)
def test_names_are_short_and_differ_regardless_of_case(paths: list[str], names: list[str]) -> None:
    assert images.unique_names([PurePosixPath(path) for path in paths]) == names


def test_folders_are_searched_and_masks_and_outputs_left_out(tmp_path: Path) -> None:
    for name in ("b.jpg", "deep/er/a.png", "masks/b.png", "b_segmentation.png", "out/overlays/b.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    found = images.find([tmp_path], [tmp_path / "out"])
    assert {one.name: one.path for one in found} == {"b": tmp_path / "b.jpg", "a": tmp_path / "deep/er/a.png"}


def test_images_with_names_like_masks_are_images(tmp_path: Path) -> None:
    paths = [save(tmp_path / name) for name in ("a.jpg", "b_mask.jpg", "segmentation study/c.jpg")]
    assert [one.path for one in images.find([tmp_path], [])] == paths


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/a.jpg", "masks/a.png"),
        ("images/A.jpg", "more/a_segmentation.png"),
        ("images/\u00e4.jpg", "masks/a\u0308.png"),
        ("images/a_mask.jpg", "truth/a_mask_segmentation.png"),
    ],
)
def test_masks_in_another_folder_are_left_out(image: str, mask: str, tmp_path: Path) -> None:
    paths = [save(tmp_path / name) for name in (image, mask)]
    assert [one.path for one in images.find([tmp_path], [])] == paths[:1]
    if "segmentation" in mask:
        assert [one.path for one in images.find([path.parent for path in paths], [])] == paths[:1]


def test_state_of_files_that_cannot_be_read(tmp_path: Path) -> None:
    loop = tmp_path / "loop.jpg"
    loop.symlink_to(loop)
    assert images.ImageFile(loop, "a").state()[1] == ""
    assert images.ImageFile(tmp_path / "\udcff.jpg", "a").state() == (f"{tmp_path}/\\udcff.jpg", "")


def test_a_file_is_taken_whatever_its_name_and_only_once(tmp_path: Path) -> None:
    odd = tmp_path / "lesion_segmentation"
    save(tmp_path / "x.png").rename(odd)
    assert [one.path for one in images.find([odd, tmp_path, odd], [])] == [odd]


@pytest.mark.parametrize(("name", "message"), [("missing.jpg", "does not exist"), (".", "no images")])
def test_nothing_to_predict_is_an_error(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        images.find([tmp_path / name], [])


def test_reads_an_image_at_the_size_of_the_networks_and_reports_a_broken_one(tmp_path: Path) -> None:
    file = images.ImageFile(save(tmp_path / "a.png", (90, 70)), "a")
    read = images.read((file, 32))
    assert isinstance(read, images.Read)
    assert (read.image.shape, read.preview.shape, read.size) == (
        (32, 32, 3),
        (images.PREVIEW, images.PREVIEW, 3),
        (90, 70),
    )
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    broken = images.read((file, 32))
    assert isinstance(broken, images.Broken)
    assert broken.reason and str(file.path) not in broken.reason


def test_doubts_about_a_file_become_flags(tmp_path: Path) -> None:
    Image.new("RGB", (300, 20), "blue").save(tmp_path / "a.png")
    read = images.read((images.ImageFile(tmp_path / "a.png", "a"), 32))
    assert isinstance(read, images.Read)
    assert len(read.flags) == 3  # small, elongated, of one colour
