"""The cache of decoded images."""

import inspect
import shutil
from pathlib import Path
from types import ModuleType

from melanoma.dataset import decode, masks
from melanoma.dataset.cache import JOURNAL, ROWS, Cache, ReadInfo
from melanoma.dataset.workers import Workers
from melanoma.sources.records import Record

import numpy as np
import pipeline
import pytest
from PIL import Image


@pytest.fixture
def records(own_source: Path) -> list[Record]:
    return pipeline.records(own_source, "val")


def count_decoded(data: Path, records: list[Record], monkeypatch: pytest.MonkeyPatch, size: int = 32) -> int:
    """Counts the images that a run decodes; checks that the cache returns what decoding returns."""
    count, read = 0, decode.read

    def counting(task: tuple[Path, Path | None, int]) -> decode.Decoded | str:
        nonlocal count
        count += 1
        return read(task)

    cache = Cache(data, size)
    with monkeypatch.context() as patch, Workers(1) as workers:
        patch.setattr(decode, "read", counting)
        cache.read(records, workers)
        for record in records:
            decoded = decode.read_pair(record.image, record.mask, size)
            image, mask = cache.pixels(record)
            assert np.array_equal(image, decoded.image)
            if decoded.mask is None or mask is None:
                assert decoded.mask is mask
            else:
                assert np.array_equal(mask, decoded.mask)
            assert np.array_equal(cache.thumbnail(record), decoded.thumbnail)
            assert cache.info[record] == ReadInfo(decoded.size, decoded.notes, decoded.doubts)
    return count


def test_image_is_decoded_again_only_if_its_file_changed(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert count_decoded(tmp_path, records, monkeypatch) == len(records)
    assert count_decoded(tmp_path, records, monkeypatch) == 0
    shutil.copyfile(records[1].image, records[0].image)
    assert count_decoded(tmp_path, records, monkeypatch) == 1
    without_mask = Record(records[2].id, records[2].image, None, None)
    assert count_decoded(tmp_path, [without_mask], monkeypatch) == 1


@pytest.mark.parametrize("module", [decode, masks])
def test_cache_of_other_code_is_not_used(
    module: ModuleType, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_decoded(tmp_path, records, monkeypatch)
    source = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda one: source(one) + "changed" * (one is module))
    assert count_decoded(tmp_path, records, monkeypatch) == len(records)


def test_cache_keeps_doubts(records: list[Record], tmp_path: Path) -> None:
    mask = records[0].mask
    assert mask
    with Image.open(mask) as opened:
        empty = Image.new("L", opened.size)
    empty.save(mask)
    for _ in range(2):
        cache = Cache(tmp_path, 32)
        with Workers(1) as workers:
            cache.read(records, workers)
            assert masks.EMPTY in cache.info[records[0]].doubts


def test_cache_of_another_size_or_decoder_is_not_used(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_decoded(tmp_path, records, monkeypatch)
    assert count_decoded(tmp_path, records, monkeypatch, size=16) == len(records)
    monkeypatch.setattr("melanoma.dataset.cache.version", lambda _: "0.0")
    assert count_decoded(tmp_path, records, monkeypatch, size=16) == len(records)


@pytest.mark.parametrize("name", [ROWS, JOURNAL])
@pytest.mark.parametrize("content", [b"other" * 100, b""])
def test_file_that_is_not_of_a_cache_is_replaced(
    name: str, content: bytes, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_decoded(tmp_path, records, monkeypatch)
    (tmp_path / name).write_bytes(content)
    assert count_decoded(tmp_path, records, monkeypatch) == len(records)
    assert count_decoded(tmp_path, records, monkeypatch) == 0


@pytest.mark.parametrize("name", [ROWS, JOURNAL])
def test_rows_from_a_damaged_one_on_are_decoded_again(
    name: str, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_decoded(tmp_path, records, monkeypatch)
    content = bytearray((tmp_path / name).read_bytes())
    content[-1 - len(content) // len(records)] ^= 1  # in the last row but one
    (tmp_path / name).write_bytes(content)
    assert count_decoded(tmp_path, records, monkeypatch) == 2
    assert count_decoded(tmp_path, records, monkeypatch) == 0


def test_records_of_the_same_files_have_rows_of_their_own(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = [records[0], Record("copy", records[0].image, records[0].mask, None), *records[1:]]
    assert count_decoded(tmp_path, twice, monkeypatch) == len(twice)
    assert count_decoded(tmp_path, twice, monkeypatch) == 0
    shutil.copyfile(records[1].image, records[2].image)
    assert count_decoded(tmp_path, twice, monkeypatch) == 1


@pytest.mark.parametrize(("rows", "lines"), [(-1, 0), (5, 0), (0, -1), (0, 5), (-1, -1), (1000, -1)])
def test_run_that_was_killed_while_it_wrote_is_continued(
    rows: int, lines: int, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are cut by some bytes, or some bytes of the next row or line are there already."""
    count_decoded(tmp_path, records, monkeypatch)
    for name, change in ((ROWS, rows), (JOURNAL, lines)):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:change] if change < 0 else content + bytes(change))
    assert count_decoded(tmp_path, records, monkeypatch) == (min(rows, lines) < 0)
    assert count_decoded(tmp_path, records, monkeypatch) == 0


def test_file_that_changes_while_it_is_read_is_decoded_again(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = decode.read

    def changing(task: tuple[Path, Path | None, int]) -> decode.Decoded | str:
        decoded = read(task)
        if task[0] == records[0].image:
            shutil.copyfile(records[1].image, records[0].image)
        return decoded

    cache = Cache(tmp_path, 32)
    with monkeypatch.context() as patch, Workers(1) as workers:
        patch.setattr(decode, "read", changing)
        cache.read(records, workers)
        assert cache.pixels(records[0])[0].shape == (32, 32, 3)
    assert count_decoded(tmp_path, records, monkeypatch) == 1


def test_broken_link_is_a_problem(records: list[Record], tmp_path: Path) -> None:
    records[0].image.unlink()
    records[0].image.symlink_to(tmp_path / "nowhere.jpg")
    cache = Cache(tmp_path, 32)
    with Workers(1) as workers:
        cache.read(records, workers)
    assert cache.problems == {records[0]: f"{records[0].image}: No such file or directory"}
