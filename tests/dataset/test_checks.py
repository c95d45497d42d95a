"""The checks of a source: what cannot be used, what is left out, converted, skipped or warned of."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Set
from functools import partial
from pathlib import Path

from melanoma.classes import KERATOSIS, MELANOMA
from melanoma.dataset import checks, decode, masks
from melanoma.dataset.cache import Cache
from melanoma.dataset.splits import OFFICIAL, Division
from melanoma.dataset.workers import Workers
from melanoma.errors import InputError
from melanoma.sources import reader
from melanoma.sources.layouts import challenge_2017
from melanoma.sources.records import Record

import numpy as np
import pandas as pd
import pipeline
import pytest
import toy_sources
from PIL import Image

SIZE = 32  # pixels
DUPLICATE = "ISIC_9999999"

Change = Callable[[Record], None]
Inspect = Callable[..., checks.Report]


def inspect_source(
    source: Path, data: Path, known: Set[str] = frozenset(), keep_duplicates: bool = False
) -> checks.Report:
    return inspect_all([source], data, Division(OFFICIAL, None, 0), known, keep_duplicates)


def inspect_all(
    paths: list[Path], data: Path, division: Division, known: Set[str] = frozenset(), keep_duplicates: bool = False
) -> checks.Report:
    """Checks the first of several sources and what the others add to its train split."""
    sources = reader.read_all(paths[0], paths[1:], None, False)
    cache = Cache(data, SIZE)
    with Workers(1) as workers:
        images = division.images_to_read(sources)
        cache.read(images, workers)
        groups = checks.find_groups(images, cache, workers)
        divided = division.divide(sources, groups.number)
        return checks.inspect(sources, divided, groups, cache, known, keep_duplicates)


@pytest.fixture
def inspect(own_source: Path, tmp_path: Path) -> Inspect:
    """Checks `own_source`."""
    return partial(inspect_source, own_source, tmp_path / "data")


@pytest.fixture
def record(own_source: Path) -> Record:
    """A training image of `own_source`."""
    return pipeline.records(own_source, "train")[5]


def rejects(report: checks.Report, folder: Path) -> pd.DataFrame:
    report.write(folder)
    return pd.read_csv(folder / "rejects.csv")


def duplicates(report: checks.Report, folder: Path) -> pd.DataFrame:
    report.write(folder)
    return pd.read_csv(folder / "duplicates.csv")


def table_lines(report: checks.Report) -> list[str]:
    return [" ".join(line.split()) for line in report.lines()]


def save_as(path: Path, image: Image.Image, kind: str = "PNG") -> None:
    """Saves content of this format, whatever the file is called."""
    image.save(path, format=kind)


def image_of(record: Record) -> Image.Image:
    with Image.open(record.image) as image:
        return image.convert("RGB")


# ------------------------------------------------------------------------------------------------------ unusable images


def truncated(record: Record) -> None:
    record.image.write_bytes(record.image.read_bytes()[:1500])


def web_page(record: Record) -> None:
    record.image.write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")


def empty_file(record: Record) -> None:
    record.image.write_bytes(b"")


def bomb(record: Record) -> None:
    save_as(record.image, Image.new("1", (9500, 9500)))  # 90 megapixels


def mask_of_another_size(record: Record) -> None:
    assert record.mask
    save_as(record.mask, Image.new("L", (89, 66), 255))


def grey_mask(record: Record) -> None:
    assert record.mask
    save_as(record.mask, Image.new("L", (88, 66), 90))


def truncated_mask(record: Record) -> None:
    assert record.mask
    record.mask.write_bytes(record.mask.read_bytes()[:60])


FAULTS: dict[Change, str] = {
    truncated: "cannot be decoded",
    web_page: "not a readable image",
    empty_file: "not a readable image",
    bomb: "not a readable image.*limit",
    mask_of_another_size: r"is \(89, 66\), its image .* is \(88, 66\)",
    grey_mask: "no lesion to separate from skin",
    truncated_mask: "_segmentation.png",
}


@pytest.mark.parametrize("damage", FAULTS)
def test_image_that_cannot_be_used_is_rejected_with_its_reason(
    damage: Change, record: Record, inspect: Inspect, tmp_path: Path
) -> None:
    damage(record)
    report = inspect()
    (row,) = rejects(report, tmp_path).to_dict("records")
    assert (row["image_id"], row["split"]) == (record.id, "train")
    assert re.search(FAULTS[damage], row["reason"])
    assert "rejected 1 0 0" in table_lines(report)
    assert report.usable == {
        split: [one for one in records if one != record] for split, records in report.splits.items()
    }


def test_image_that_cannot_be_used_stops_the_run_or_is_skipped(
    record: Record, inspect: Inspect, tmp_path: Path
) -> None:
    truncated(record)
    report = inspect()
    message = rf"1 images cannot be used: {record.id}\. The first: .*rejects\.csv; .* --skip-bad"
    with pytest.raises(InputError, match=message):
        report.raise_problems(tmp_path, skip_bad=False, strict=False)
    report.raise_problems(tmp_path, skip_bad=True, strict=False)


def test_repaired_image_is_no_longer_rejected(record: Record, inspect: Inspect, tmp_path: Path) -> None:
    content = record.image.read_bytes()
    truncated(record)
    assert len(rejects(inspect(), tmp_path)) == 1
    record.image.write_bytes(content)
    assert rejects(inspect(), tmp_path).empty


def test_split_without_a_usable_image_stops_the_run(own_source: Path, inspect: Inspect, tmp_path: Path) -> None:
    for record in pipeline.records(own_source, "val"):
        truncated(record)
    with pytest.raises(InputError, match=r"no usable images are left of val: see rejects\.csv"):
        inspect().raise_problems(tmp_path, skip_bad=True, strict=False)


def test_bomb_is_refused_before_it_is_decoded(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb(record)

    def never(*_: object) -> None:
        pytest.fail("decoded")

    monkeypatch.setattr(Image.Image, "load", never)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    assert isinstance(decode.read((record.image, None, 32)), str)


def test_bomb_is_refused_outside_of_pytest(record: Record) -> None:  # which makes every warning an error
    bomb(record)
    code = f"from melanoma.dataset import decode; decode.read_pair(decode.Path({str(record.image)!r}), None, 32)"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 1 and "InputError" in run.stderr and "not a readable image" in run.stderr


# ------------------------------------------------------------------------------------------------ conversions, warnings


def cmyk(record: Record) -> None:
    save_as(record.image, image_of(record).convert("CMYK"), "JPEG")


def alpha(record: Record) -> None:
    save_as(record.image, image_of(record).convert("RGBA"))


def palette(record: Record) -> None:
    save_as(record.image, image_of(record).convert("P", palette=Image.Palette.ADAPTIVE))


def transparent_palette(record: Record) -> None:
    image_of(record).convert("P", palette=Image.Palette.ADAPTIVE).save(record.image, format="PNG", transparency=3)


def greyscale(record: Record) -> None:
    save_as(record.image, image_of(record).convert("L"), "JPEG")


def sixteen_bits(record: Record) -> None:
    grey = np.asarray(image_of(record).convert("L")).astype(np.uint16) * 257
    save_as(record.image, Image.fromarray(grey))


def rotated_by_exif(record: Record) -> None:
    exif = Image.Exif()
    exif[decode.ORIENTATION] = 6
    image_of(record).save(record.image, format="JPEG", exif=exif)


CONVERSIONS: dict[Change, str] = {
    cmyk: "CMYK to RGB",
    alpha: "alpha channel removed",
    palette: "palette to RGB",
    transparent_palette: "palette to RGB",
    greyscale: "greyscale to RGB",
    sixteen_bits: "16 bits scaled to 8",
    rotated_by_exif: "EXIF orientation ignored",
}


@pytest.mark.parametrize("change", CONVERSIONS)
def test_other_colour_modes_are_converted_and_counted(change: Change, own_source: Path, inspect: Inspect) -> None:
    records = pipeline.records(own_source, "val")[:2]
    expected = decode.read_pair(records[0].image, None, SIZE).image.astype(int)
    for record in records:
        change(record)
    assert f"converted: {CONVERSIONS[change]}: 2" in inspect().lines()
    found = decode.read_pair(records[0].image, None, SIZE).image.astype(int)
    if change in (greyscale, sixteen_bits):
        assert (found == found[..., :1]).all()
        expected = expected @ [[0.299], [0.587], [0.114]]
    assert abs(found - expected).mean() < 4  # JPEG and palettes are lossy


def test_superpixels_among_images_and_masks_are_counted_and_skipped(
    own_source: Path, record: Record, inspect: Inspect
) -> None:
    before = inspect().usable
    for folder in (challenge_2017.image_folder(own_source, "train"), challenge_2017.mask_folder(own_source, "test")):
        shutil.copy(record.image, folder / f"{record.id}_superpixels.png")
    report = inspect()
    assert "  2 superpixel files skipped" in report.lines()
    assert report.usable == before


@pytest.mark.parametrize("values", [(0, 130, 255), (90, 200, 255)])
def test_mask_of_grey_values_is_thresholded_with_a_warning(
    values: tuple[int, ...], record: Record, inspect: Inspect, tmp_path: Path
) -> None:
    assert record.mask
    grey = np.repeat(np.array(values, np.uint8), 22)[:, None].repeat(88, axis=1)
    save_as(record.mask, Image.fromarray(grey))
    report = inspect()
    assert f"warning: {masks.GREY_VALUES}: 1" in report.lines()
    report.raise_problems(tmp_path, skip_bad=False, strict=False)
    with pytest.raises(InputError, match=f"--strict: {masks.GREY_VALUES}: 1"):
        report.raise_problems(tmp_path, skip_bad=False, strict=True)
    mask = decode.read_pair(record.image, record.mask, SIZE).mask
    assert mask is not None
    assert mask[[2, 15, 30], 3, 0].tolist() == [value > 127 for value in values]


def test_labels_without_an_image_are_ignored_with_a_warning(own_source: Path, inspect: Inspect, tmp_path: Path) -> None:
    before = inspect().usable
    with challenge_2017.label_file(own_source, "val").open("a") as stream:
        stream.write("ISIC_9999991,0.0,0.0\nISIC_9999992,1.0,0.0\n")
    report = inspect()
    warning = "2 ids in the tables have no image and are ignored: ISIC_9999991, ISIC_9999992"
    assert f"warning: {warning}" in report.lines()
    assert report.usable == before
    with pytest.raises(InputError, match=warning):
        report.raise_problems(tmp_path, skip_bad=False, strict=True)


def test_missing_parts_of_the_source_are_reported(own_source: Path, inspect: Inspect) -> None:
    shutil.rmtree(challenge_2017.image_folder(own_source, "test"))
    shutil.rmtree(challenge_2017.mask_folder(own_source, "train"))
    challenge_2017.label_file(own_source, "val").unlink()
    assert list(inspect().gaps()) == [
        "train: no lesion masks: the segmentation network cannot be trained; use step 2 with --pretrained",
        "val: no labels: predicted, but not evaluated",
        "test: no images",
    ]


# ----------------------------------------------------------------------------------------------------------- duplicates


def add_duplicate(record: Record, folder: Path) -> None:
    """Adds the image to train, resized and encoded again, under another id, with mask and label."""
    assert record.mask
    with Image.open(record.mask) as mask:
        smaller = mask.resize((96, 72), Image.Resampling.NEAREST)
        smaller.save(challenge_2017.mask_folder(folder, "train") / f"{DUPLICATE}_segmentation.png")
    image_of(record).resize((96, 72)).save(
        challenge_2017.image_folder(folder, "train") / f"{DUPLICATE}.jpg", quality=60
    )
    with challenge_2017.label_file(folder, "train").open("a") as stream:
        label = record.label
        stream.write(f"{DUPLICATE},{float(label == MELANOMA)},{float(label == KERATOSIS)}\n")


@pytest.mark.parametrize("split", ["val", "test", "train"])
def test_duplicate_is_left_out_of_train(split: str, own_source: Path, inspect: Inspect, tmp_path: Path) -> None:
    before, original = inspect().usable, pipeline.records(own_source, split)[4]
    add_duplicate(original, own_source)
    report = inspect()
    assert report.usable == before
    lines = "\n".join(report.lines())
    assert "1 images left out of train: duplicate of another image (--keep-duplicates keeps them)" in lines
    (row,) = duplicates(report, tmp_path).to_dict("records")
    assert (row["image_id"], row["split"], row["left_out"]) == (DUPLICATE, "train", True)
    assert (row["same_as"], row["same_as_split"]) == (original.id, split)
    if split == "train":
        assert f"1 duplicates within one split: {DUPLICATE} = {original.id}" in lines
        report.raise_problems(tmp_path, skip_bad=False, strict=True)
    else:
        assert f"warning: 1 duplicates across two splits: {DUPLICATE} = {original.id} ({split})" in lines
        with pytest.raises(InputError, match="1 duplicates across two splits"):
            report.raise_problems(tmp_path, skip_bad=False, strict=True)


def test_duplicates_are_kept_on_request(own_source: Path, inspect: Inspect, tmp_path: Path) -> None:
    add_duplicate(pipeline.records(own_source, "val")[4], own_source)
    report = inspect(keep_duplicates=True)
    assert report.usable == report.splits
    assert not duplicates(report, tmp_path)["left_out"].any()


def test_train_split_of_duplicates_only_stops_the_run(own_source: Path, inspect: Inspect, tmp_path: Path) -> None:
    train, val = (pipeline.records(own_source, split) for split in ("train", "val"))
    for record, other in zip(train, val + val, strict=True):
        shutil.copyfile(other.image, record.image)
    with pytest.raises(InputError, match=r"no usable images are left of train: see rejects\.csv and duplicates\.csv"):
        inspect().raise_problems(tmp_path, skip_bad=False, strict=False)


def test_known_duplicates_are_left_out_of_train(record: Record, inspect: Inspect, tmp_path: Path) -> None:
    report = inspect(known={record.id})
    assert report.left_out == {record: checks.PUBLISHED}
    assert f"1 images left out of train: {checks.PUBLISHED} (--keep-duplicates keeps them)" in list(report.lines())
    (row,) = duplicates(report, tmp_path).to_dict("records")
    assert (row["image_id"], row["same_as"], row["left_out"]) == (record.id, "published list", True)
    assert not inspect(known={record.id}, keep_duplicates=True).left_out


def test_of_two_equal_images_of_train_the_labelled_one_is_kept(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b", "c")):
        toy_sources.image(tmp_path / f"{name}.png", number)
    shutil.copy(tmp_path / "a.png", tmp_path / "d.png")
    table = toy_sources.text(
        tmp_path / "my.csv", ["image,label", "a.png,", "b.png,nevus", "c.png,sk", "d.png,melanoma"]
    )
    report = inspect_all([table], tmp_path / "data", Division("train", None, 0))
    assert [record.id for record in report.left_out] == ["a"]


def test_image_that_cannot_be_used_leaves_no_other_one_out(own_source: Path, inspect: Inspect) -> None:
    duplicate, original = (pipeline.records(own_source, split)[0] for split in ("train", "val"))
    shutil.copyfile(original.image, duplicate.image)
    assert duplicate in inspect().left_out
    assert original.mask
    original.mask.unlink()
    assert duplicate not in inspect().left_out


def test_duplicates_of_different_labels_are_a_warning(own_source: Path, inspect: Inspect) -> None:
    train = pipeline.records(own_source, "train")
    first, second = train[0], next(record for record in train if record.label != train[0].label)
    shutil.copyfile(first.image, second.image)
    assert f"1 duplicates have different labels: {second.id} = {first.id}" in list(inspect().warnings())


@pytest.mark.parametrize(
    ("split", "consequence"),
    [("train", "the classifier cannot be trained; --extra adds images"), ("test", "its AUC is undefined")],
)
def test_class_that_a_split_lacks_is_reported(split: str, consequence: str, own_source: Path, inspect: Inspect) -> None:
    table = challenge_2017.label_file(own_source, split)
    table.write_text(table.read_text().replace(",0.0,1.0", ",0.0,0.0"))
    assert f"{split}: no seborrheic keratosis: {consequence}" in list(inspect().gaps())


def test_doubts_are_listed(own_source: Path, inspect: Inspect, tmp_path: Path) -> None:
    record = pipeline.records(own_source, "val")[0]
    assert record.mask
    save_as(record.mask, Image.new("L", (88, 66)))
    report = inspect()
    report.write(tmp_path)
    table = pd.read_csv(tmp_path / "doubts.csv")
    assert table.to_numpy().tolist() == [[record.id, "val", "mask empty"]]
    assert report.doubtful_masks() == [(record, "mask empty")]


def test_published_duplicates_belong_to_their_own_layout(own_source: Path, tmp_path: Path) -> None:
    assert reader.read(own_source).known_duplicates == challenge_2017.KNOWN_DUPLICATES
    assert not reader.read(toy_sources.ham10000(tmp_path / "ham")).known_duplicates
