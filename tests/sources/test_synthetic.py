"""Synthetic images: reproducible, valid, and with classes that differ but overlap."""

import csv
from collections.abc import Callable
from itertools import chain
from pathlib import Path

from melanoma.classes import CLASSES, KERATOSIS, MELANOMA
from melanoma.sources import synthetic
from melanoma.sources.layouts import challenge_2017
from melanoma.sources.records import is_synthetic

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

Pairs = list[tuple[np.ndarray, np.ndarray]]  # image, mask
SIZE = (120, 160)  # half the default, for speed


@pytest.fixture(scope="module")
def sample() -> list[Pairs]:
    """40 images with their masks of each class."""
    return [
        [synthetic.generate(label, SIZE, np.random.default_rng([5, label, number])) for number in range(40)]
        for label in range(len(CLASSES))
    ]


def test_image_depends_on_the_seed_only() -> None:
    first, again, other = (synthetic.generate(1, SIZE, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0]) and not np.array_equal(first[1], other[1])


@pytest.mark.parametrize("size", [(32, 32), (64, 200), (120, 160), (256, 256)])
def test_image_and_mask_have_the_requested_size_and_range(size: tuple[int, int]) -> None:
    for label in range(len(CLASSES)):
        image, mask = synthetic.generate(label, size, np.random.default_rng(label))
        assert image.shape == (*size, 3) and image.dtype == np.uint8
        assert mask.shape == size and mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 1}


def test_unknown_label_and_small_size_are_refused() -> None:
    rng = np.random.default_rng(0)
    for label in (-1, 3):
        with pytest.raises(ValueError, match="label"):
            synthetic.generate(label, SIZE, rng)
    with pytest.raises(ValueError, match="size"):
        synthetic.generate(0, (31, 100), rng)


def test_mask_is_one_component_of_plausible_size(sample: list[Pairs]) -> None:
    areas = []
    for _, mask in chain(*sample):
        assert ndimage.label(mask)[1] == 1
        assert np.array_equal(ndimage.binary_fill_holes(mask), mask)
        areas.append(mask.mean())
    assert min(areas) > 0.02 and max(areas) < 0.65
    assert 0.12 < np.mean(areas) < 0.28


def test_lesion_is_darker_than_the_skin_around_its_mask(sample: list[Pairs]) -> None:
    darker_than_ring = darker_than_shifted = 0
    for image, mask in chain(*sample):
        ring = ndimage.binary_dilation(mask, iterations=8) & ~ndimage.binary_dilation(mask, iterations=2)
        core = ndimage.binary_erosion(mask, iterations=4)
        grey = image.mean(axis=2)
        darker_than_ring += grey[core].mean() < grey[ring].mean() - 8
        shifted = np.roll(mask, mask.shape[1] // 2, axis=1) > 0
        darker_than_shifted += grey[mask > 0].mean() < grey[shifted & (mask == 0)].mean()
    total = sum(map(len, sample))
    assert darker_than_ring > 0.85 * total
    assert darker_than_shifted > 0.80 * total


def colour_variety(image: np.ndarray, mask: np.ndarray) -> float:
    """Standard deviation of hue within the lesion, independent of brightness."""
    logarithm = np.log1p(image[mask > 0].astype(float))
    return float((logarithm[:, 2] - logarithm[:, 0]).std())


def raggedness(image: np.ndarray, mask: np.ndarray) -> float:
    border = mask.sum() - ndimage.binary_erosion(mask).sum()
    return float(border**2 / mask.sum())


def waxiness(image: np.ndarray, mask: np.ndarray) -> float:
    """How much less red the lesion is than its skin: a grey-brown film absorbs red."""
    red, green, _ = np.log1p(image.astype(float)).transpose(2, 0, 1)
    return float((green - red)[mask > 0].mean() - (green - red)[mask == 0].mean())


def auc(high: list[float], low: list[float]) -> float:
    """Fraction of pairs in which the first value is higher."""
    return float(np.mean(np.array(high)[:, None] > np.array(low)[None, :]))


@pytest.mark.parametrize(
    ("feature", "label", "least"),
    [
        (colour_variety, MELANOMA, 0.65),
        (raggedness, MELANOMA, 0.70),
        (waxiness, KERATOSIS, 0.65),
    ],
)
def test_classes_differ_but_overlap(
    sample: list[Pairs], feature: Callable[..., float], label: int, least: float
) -> None:
    values = [[feature(*pair) for pair in pairs] for pairs in sample]
    rest = list(chain(*(values[other] for other in range(len(values)) if other != label)))
    assert least < auc(values[label], rest) < 0.97


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_sample_has_the_official_layout(tmp_path: Path) -> None:
    counts = {"train": 10, "val": 3, "test": 1}
    synthetic.write_sample(tmp_path, counts, seed=2, size=(64, 80))
    assert is_synthetic([tmp_path])
    ids = []
    for split, count in counts.items():
        images, masks = challenge_2017.image_folder(tmp_path, split), challenge_2017.mask_folder(tmp_path, split)
        with challenge_2017.label_file(tmp_path, split).open(newline="") as stream:
            rows = list(csv.reader(stream))
        assert rows.pop(0) == ["image_id", "melanoma", "seborrheic_keratosis"]
        assert len(rows) == count
        assert {cell for row in rows for cell in row[1:]} <= {"0.0", "1.0"}
        names = [row[0] for row in rows]
        assert sorted(path.name for path in images.iterdir()) == [f"{name}.jpg" for name in names]
        assert sorted(path.name for path in masks.iterdir()) == [f"{name}_segmentation.png" for name in names]
        for name in names:
            mask = pixels(masks / f"{name}_segmentation.png")
            assert mask.shape == (64, 80) and set(np.unique(mask)) == {0, 255}
            assert pixels(images / f"{name}.jpg").shape == (64, 80, 3)
        ids += names
    assert ids == [f"ISIC_{9_000_000 + number}" for number in range(14)]


def test_label_file_names_the_generated_classes(tmp_path: Path) -> None:
    synthetic.write_sample(tmp_path, {"val": 10}, seed=4, size=(64, 80))
    labels = []
    with challenge_2017.label_file(tmp_path, "val").open(newline="") as stream:
        for number, row in enumerate(csv.DictReader(stream)):
            labels.append(int(2 * float(row["seborrheic_keratosis"]) + float(row["melanoma"])))
            mask = synthetic.generate(labels[-1], (64, 80), np.random.default_rng([4, number]))[1]
            written = pixels(challenge_2017.mask_folder(tmp_path, "val") / f"{row['image_id']}_segmentation.png")
            assert np.array_equal(written, mask * 255)
    assert sorted(labels) == [0] * 6 + [1] * 2 + [2] * 2


@pytest.mark.parametrize(("count", "expected"), [(0, [0, 0, 0]), (1, [1, 0, 0]), (3, [1, 1, 1]), (50, [30, 11, 9])])
def test_classes_have_their_fractions(count: int, expected: list[int]) -> None:
    labels = synthetic.class_order(count, np.random.default_rng(0))
    assert np.bincount(labels, minlength=3).tolist() == expected


def test_class_order_is_shuffled() -> None:
    orders = [synthetic.class_order(50, np.random.default_rng(seed)).tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_sample_is_reproduced_byte_by_byte(tmp_path: Path) -> None:
    def content(name: str, seed: int) -> dict[str, bytes]:
        synthetic.write_sample(tmp_path / name, {"train": 3}, seed, size=(64, 64))
        paths = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in paths}

    first, again, other = content("first", 1), content("again", 1), content("other", 2)
    assert first == again
    assert first.keys() == other.keys()
    assert not any(first[name] == other[name] for name in first if name.endswith((".jpg", ".png")))


def test_unknown_split_and_negative_count_are_refused(tmp_path: Path) -> None:
    for counts in ({"training": 3}, {"train": -1}):
        with pytest.raises(ValueError, match="counts"):
            synthetic.write_sample(tmp_path / "none", counts)
    assert not (tmp_path / "none").exists()


def test_command_writes_the_sample_and_refuses_wrong_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "sample"
    synthetic.main(["--out", str(out), "--train", "1", "--val", "0", "--test", "2"])
    assert capsys.readouterr().out == f"Wrote 3 synthetic images with masks and labels to {out}\n"
    assert len(list(out.rglob("*.jpg"))) == 3
    for wrong in (["--out", str(out), "--train", "-1"], ["--out", str(out), "--tra", "1"], []):
        with pytest.raises(SystemExit) as stop:
            synthetic.main(wrong)
        assert stop.value.code == 2


def test_command_reports_a_path_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit) as stop:
        synthetic.main(["--out", str(tmp_path / "taken"), "--train", "1"])
    assert stop.value.code == 2
    assert "taken" in capsys.readouterr().err
