"""Step 1 on sources with faults: what stops it; what is left out, converted, skipped or warned of; the report."""

import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from melanoma import images, isic, stages

import numpy as np
import pandas as pd
import pipeline
import pytest
from PIL import Image
from pipeline import array_bytes, exit_code, places, reader

pytestmark = pytest.mark.usefixtures("logging_restored")

Script = Callable[..., int | str | None]
Change = Callable[[isic.Record], None]


@pytest.fixture
def preprocess(own_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Runs step 1 on `own_source` as from a shell and gives its exit code."""
    flags = (*places(tmp_path), "--source", str(own_source), "--size", str(pipeline.SIZE), "--jobs", "1")
    return lambda *more: exit_code(monkeypatch, stages.PREPROCESSING, *flags, *more)


@pytest.fixture
def record(own_source: Path) -> isic.Record:
    """One of `own_source`'s train."""
    return isic.read_split(own_source, "train")[5]


def rejects(folder: Path) -> dict[str, str]:
    table = pd.read_csv(folder / "graphics" / "rejects.csv")
    assert table.columns.tolist() == ["image_id", "split", "reason"]
    return dict(zip(table["image_id"], table["reason"], strict=True))


def ids(folder: Path, split: str) -> list[str]:
    return reader(folder).load("ids", split=split).tolist()


def table_lines(out: str) -> list[str]:
    return [" ".join(line.split()) for line in out.splitlines()]


def save_as(path: Path, picture: Image.Image, kind: str = "PNG") -> None:
    """Whatever the file is called, its content is of this kind."""
    picture.save(path, format=kind)


def photograph(record: isic.Record) -> Image.Image:
    with Image.open(record.image) as picture:
        return picture.convert("RGB")


def cut_off(record: isic.Record) -> None:
    record.image.write_bytes(record.image.read_bytes()[:1500])


def web_page(record: isic.Record) -> None:
    record.image.write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")


def empty_file(record: isic.Record) -> None:
    record.image.write_bytes(b"")


def bomb(record: isic.Record) -> None:
    save_as(record.image, Image.new("1", (9500, 9500)))  # 90 megapixels


def mask_of_another_size(record: isic.Record) -> None:
    assert record.mask
    save_as(record.mask, Image.new("L", (81, 60), 255))


def grey_mask(record: isic.Record) -> None:
    assert record.mask
    save_as(record.mask, Image.new("L", (80, 60), 90))


def cut_off_mask(record: isic.Record) -> None:
    assert record.mask
    record.mask.write_bytes(record.mask.read_bytes()[:60])


FAULTS: dict[Change, str] = {
    cut_off: "cannot be decoded",
    web_page: "not a readable picture",
    empty_file: "not a readable picture",
    bomb: "not a readable picture.*limit",
    mask_of_another_size: r"is \(81, 60\), its photograph .* is \(80, 60\)",
    grey_mask: "no lesion to tell from skin",
    cut_off_mask: "_segmentation.png",
}


@pytest.mark.parametrize("spoil", FAULTS)
def test_photograph_that_cannot_be_used_stops_the_run_or_is_left_out(
    spoil: Change,
    record: isic.Record,
    preprocess: Script,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert preprocess("--copies", "1") == 0
    before, whole = array_bytes(tmp_path), ids(tmp_path, "train")
    spoil(record)
    assert preprocess("--copies", "1") == 2
    error = capsys.readouterr().err
    assert f"1 photographs cannot be used: {record.id}." in error and "--skip-bad" in error
    assert list(rejects(tmp_path)) == [record.id]
    assert pd.Series(rejects(tmp_path).values()).str.contains(FAULTS[spoil], regex=True).all()
    assert array_bytes(tmp_path) == before
    assert preprocess("--copies", "1", "--skip-bad") == 0
    assert ids(tmp_path, "train") == [name for name in whole if name != record.id]
    rows = [row for row, name in enumerate(whole) if name != record.id]
    old = np.load(io.BytesIO(before["train_images.npy"]))
    assert np.array_equal(reader(tmp_path).load("images", split="train"), old[rows])
    assert list(rejects(tmp_path)) == [record.id]
    assert "rejected 1 0 0" in table_lines(capsys.readouterr().out)


def test_mended_photograph_is_no_longer_rejected(
    record: isic.Record, preprocess: Script, tmp_path: Path, finished: Path
) -> None:
    content = record.image.read_bytes()
    cut_off(record)
    assert preprocess() == 2
    record.image.write_bytes(content)
    assert preprocess() == 0
    assert rejects(tmp_path) == {}
    expected = array_bytes(finished)
    assert all(expected[name] == found for name, found in array_bytes(tmp_path).items())


def test_split_without_a_usable_photograph_stops_the_run(
    own_source: Path, preprocess: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    for record in isic.read_split(own_source, "val"):
        cut_off(record)
    assert preprocess("--skip-bad") == 2
    assert "no photograph of val is left: see rejects.csv" in capsys.readouterr().err


def test_bomb_is_refused_before_it_is_decoded(record: isic.Record, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb(record)

    def never(*_: object) -> None:
        pytest.fail("decoded")

    monkeypatch.setattr(Image.Image, "load", never)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    assert isinstance(images.read((record.image, None, 32)), str)


def test_bomb_is_refused_by_the_script_itself(record: isic.Record, own_source: Path, tmp_path: Path) -> None:
    bomb(record)  # these tests make every warning an error; a shell does not
    script = str(pipeline.ROOT / stages.PREPROCESSING)
    words = [sys.executable, script, *places(tmp_path), "--source", str(own_source), "--check"]
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 2 and "not a readable picture" in run.stderr


def cmyk(record: isic.Record) -> None:
    save_as(record.image, photograph(record).convert("CMYK"), "JPEG")


def alpha(record: isic.Record) -> None:
    save_as(record.image, photograph(record).convert("RGBA"))


def palette(record: isic.Record) -> None:
    save_as(record.image, photograph(record).convert("P", palette=Image.Palette.ADAPTIVE))


def transparent_palette(record: isic.Record) -> None:
    photograph(record).convert("P", palette=Image.Palette.ADAPTIVE).save(record.image, format="PNG", transparency=3)


def greyscale(record: isic.Record) -> None:
    save_as(record.image, photograph(record).convert("L"), "JPEG")


def sixteen_bits(record: isic.Record) -> None:
    grey = np.asarray(photograph(record).convert("L")).astype(np.uint16) * 257
    save_as(record.image, Image.fromarray(grey))


def turned(record: isic.Record) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph(record).save(record.image, format="JPEG", exif=exif)


CONVERSIONS: dict[Change, str] = {
    cmyk: "CMYK made RGB",
    alpha: "alpha channel left out",
    palette: "palette made RGB",
    transparent_palette: "palette made RGB",
    greyscale: "greyscale made RGB",
    sixteen_bits: "16 bits scaled to 8",
    turned: "EXIF turn ignored",
}


@pytest.mark.parametrize("change", CONVERSIONS)
def test_other_kinds_of_picture_are_converted_and_counted(
    change: Change,
    own_source: Path,
    preprocess: Script,
    tmp_path: Path,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    records = isic.read_split(own_source, "val")[:2]
    for record in records:
        change(record)
    assert preprocess("--copies", "1") == 0
    assert f"converted: {CONVERSIONS[change]}: 2" in capsys.readouterr().out.splitlines()
    row = ids(tmp_path, "val").index(records[0].id)
    found, expected = (reader(folder).load("images", split="val")[row].astype(int) for folder in (tmp_path, finished))
    if change in (greyscale, sixteen_bits):
        assert (found == found[..., :1]).all()
        expected = expected @ [[0.299], [0.587], [0.114]]
    assert abs(found - expected).mean() < 4  # JPEG and palettes lose a little


def test_superpixels_among_photographs_and_masks_are_counted_and_skipped(
    own_source: Path, record: isic.Record, preprocess: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (isic.image_folder(own_source, "train"), isic.mask_folder(own_source, "test")):
        shutil.copy(record.image, folder / f"{record.id}_superpixels.png")
    assert preprocess("--copies", "1") == 0
    assert "2 superpixel files skipped" in capsys.readouterr().out
    assert len(ids(tmp_path, "train")) == pipeline.COUNTS["train"]


def test_missing_mask_stops_the_run(
    record: isic.Record, preprocess: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    assert record.mask
    record.mask.unlink()
    assert preprocess("--skip-bad") == 2
    assert f"no mask for {record.id}" in capsys.readouterr().err


@pytest.mark.parametrize("values", [(0, 130, 255), (90, 255, 255)])
def test_mask_of_grey_values_is_cut_and_warned_of(
    values: tuple[int, ...],
    record: isic.Record,
    preprocess: Script,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert record.mask
    grey = np.repeat(np.array(values, np.uint8), 20)[:, None].repeat(80, axis=1)
    save_as(record.mask, Image.fromarray(grey))
    assert preprocess("--strict") == 2
    assert images.GREY_VALUES in capsys.readouterr().err
    assert preprocess() == 0
    assert f"warning: {images.GREY_VALUES}: 1" in capsys.readouterr().out.splitlines()
    mask = reader(tmp_path).load("masks", split="train")[ids(tmp_path, "train").index(record.id)]
    assert mask[[2, 15, 30], 3, 0].tolist() == [value > 127 for value in values]


def test_missing_labels_stop_the_run(
    own_source: Path, record: isic.Record, preprocess: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    path = isic.label_file(own_source, "train")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith(record.id)))
    assert preprocess("--skip-bad") == 2
    assert f"no label for {record.id}" in capsys.readouterr().err


def test_labels_without_a_photograph_are_warned_of_and_ignored(
    own_source: Path, preprocess: Script, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with isic.label_file(own_source, "val").open("a") as stream:
        stream.write("ISIC_9999991,0.0,0.0\nISIC_9999992,1.0,0.0\n")
    assert preprocess("--strict") == 2
    warning = "2 ids in the label files have no photograph and are ignored: ISIC_9999991, ISIC_9999992"
    assert warning in capsys.readouterr().err
    assert preprocess() == 0
    assert f"warning: {warning}" in capsys.readouterr().out.splitlines()
    assert ids(tmp_path, "val") == ids(finished, "val")


@pytest.mark.parametrize("row", ["{id},1.0,0.0", "ISIC_9,1.0,1.0", "ISIC_9,nan,0.0"])
def test_bad_label_stops_the_run_with_its_line(
    row: str, own_source: Path, record: isic.Record, preprocess: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    with isic.label_file(own_source, "train").open("a") as stream:
        stream.write(row.format(id=record.id) + "\n")
    assert preprocess() == 2
    assert f"line {pipeline.COUNTS['train'] + 2}" in capsys.readouterr().err


def plant(record: isic.Record, folder: Path, name: str) -> None:
    """The photograph once more, under another id, scaled and encoded anew; its mask and label too."""
    picture = photograph(record)
    assert record.mask
    with Image.open(record.mask) as mask:
        mask.resize((96, 72), Image.Resampling.NEAREST).save(
            isic.mask_folder(folder, "train") / f"{name}_segmentation.png"
        )
    picture.resize((96, 72)).save(isic.image_folder(folder, "train") / f"{name}.jpg", quality=60)
    with isic.label_file(folder, "train").open("a") as stream:
        stream.write(f"{name},0.0,0.0\n")


@pytest.mark.parametrize("split", ["val", "test", "train"])
def test_duplicate_is_left_out_of_train(
    split: str, own_source: Path, preprocess: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = isic.read_split(own_source, split)[4]
    plant(original, own_source, "ISIC_9999999")
    assert preprocess("--copies", "1", "--strict") == (0 if split == "train" else 2)
    assert preprocess("--copies", "1") == 0
    out = capsys.readouterr().out
    assert "ISIC_9999999 = " + original.id in out and "1 duplicates left out of train" in out
    assert f"warning: 1 times the same picture in two splits: ISIC_9999999 = {original.id} ({split})" in out or (
        split == "train"
    )
    assert "ISIC_9999999" not in ids(tmp_path, "train")
    assert original.id in ids(tmp_path, split)
    (row,) = pd.read_csv(tmp_path / "graphics" / "duplicates.csv").to_dict("records")
    assert (row["image_id"], row["same_as"], row["same_as_split"], row["left_out"]) == (
        "ISIC_9999999",
        original.id,
        split,
        True,
    )
    with Image.open(tmp_path / "graphics" / "duplicates.png") as picture:
        assert min(picture.size) > 200
    assert preprocess("--copies", "1", "--keep-duplicates") == 0
    assert "ISIC_9999999" in ids(tmp_path, "train")
    assert not pd.read_csv(tmp_path / "graphics" / "duplicates.csv")["left_out"].any()


def test_labels_of_photographs_beyond_the_limit_are_not_warned_of(preprocess: Script) -> None:
    assert preprocess("--limit", "3", "--strict") == 0


def test_train_of_duplicates_alone_is_told(
    own_source: Path, preprocess: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = (isic.read_split(own_source, split) for split in ("train", "val"))
    for record, other in zip(train, val + val, strict=True):
        shutil.copyfile(other.image, record.image)
    assert preprocess("--copies", "1") == 2
    assert "no photograph of train is left: see rejects.csv and duplicates.csv" in capsys.readouterr().err


def test_photographs_of_published_lists_are_left_out_of_the_official_train_split(
    own_source: Path, preprocess: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = min(isic.RECURRING)
    record = isic.read_split(own_source, "train")[0]
    assert record.mask
    record.image.rename(record.image.with_stem(name))
    record.mask.rename(record.mask.with_stem(f"{name}_segmentation"))
    table = isic.label_file(own_source, "train")
    table.write_text(table.read_text().replace(record.id, name))
    for flags, expected in (((), False), (("--split", "2018"), True), (("--keep-duplicates",), True)):
        assert preprocess("--copies", "1", *flags) == 0
        assert any(name in ids(tmp_path, split) for split in isic.SPLITS) == expected
    assert "1 duplicates left out of train, 1 of them by published lists" in capsys.readouterr().out


def test_check_reports_and_leaves_the_arrays_alone(
    preprocess: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preprocess("--check") == 0
    table = capsys.readouterr().out
    assert not (tmp_path / "data" / "arrays").exists()
    for line in ("photographs 24 12 12", "lesion masks 24 12 12", "rejected 0 0 0", "to work with 24 12 12"):
        assert line in table_lines(table)
    assert "sizes met: 80x60 (48)" in table
    monkeypatch.setattr(images, "read", lambda *_: pytest.fail("read again"))
    assert preprocess() == 0
    assert "48 photographs were read before" in capsys.readouterr().out
    assert not list((tmp_path / "data").glob("cache*"))


def test_source_without_photographs_names_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        flags = (*places(tmp_path), "--source", str(folder))
        assert exit_code(monkeypatch, stages.PREPROCESSING, *flags) == 2
        error = capsys.readouterr().err
        assert f"{folder}: no photographs here" in error and f"python download_data.py --out {folder}" in error


def test_what_the_source_lacks_is_said(
    own_source: Path, preprocess: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(isic.image_folder(own_source, "test"))
    shutil.rmtree(isic.mask_folder(own_source, "train"))
    isic.label_file(own_source, "val").unlink()
    assert preprocess("--check") == 0
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if line.startswith(("train:", "val:", "test:"))] == [
        "train: no lesion masks, nothing to train with",
        "val: no labels, they will be predicted, not judged",
        "test: no photographs",
    ]


def test_too_little_memory_is_told(
    preprocess: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preprocess("--size", str(10**8), "--limit", "1") == 2
    assert "not enough memory for these settings" in capsys.readouterr().err
