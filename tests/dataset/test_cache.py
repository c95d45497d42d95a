"""The cache of decoded images."""

import inspect
import shutil
from pathlib import Path
from types import ModuleType

from melanoma.cli import locking
from melanoma.dataset import decode, masks
from melanoma.dataset.cache import NAME, Cache, ReadInfo
from melanoma.dataset.workers import Workers
from melanoma.errors import InputError
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

    with monkeypatch.context() as patch, Cache(data, size) as cache, Workers(1) as workers:
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
        with Cache(tmp_path, 32) as cache, Workers(1) as workers:
            cache.read(records, workers)
            assert masks.EMPTY in cache.info[records[0]].doubts


def test_cache_of_another_size_or_decoder_is_not_used(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_decoded(tmp_path, records, monkeypatch)
    assert count_decoded(tmp_path, records, monkeypatch, size=16) == len(records)
    monkeypatch.setattr("melanoma.dataset.cache.version", lambda _: "0.0")
    assert count_decoded(tmp_path, records, monkeypatch, size=16) == len(records)


@pytest.mark.parametrize("content", [b"not a database" * 100, b""])
def test_file_that_is_not_a_cache_is_replaced(
    content: bytes, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_decoded(tmp_path, records, monkeypatch)
    (tmp_path / NAME).write_bytes(content)
    assert count_decoded(tmp_path, records, monkeypatch) == len(records)


@pytest.mark.parametrize("page", [1, 3, 6, 10])
def test_cache_with_a_damaged_page_is_replaced(
    page: int, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_decoded(tmp_path, records, monkeypatch, size=256)
    with (tmp_path / NAME).open("r+b") as stream:
        stream.seek(page << 16)
        stream.write(b"\xff" * (1 << 16))
    assert count_decoded(tmp_path, records, monkeypatch, size=256) == len(records)


def test_file_that_changes_while_it_is_read_is_decoded_again(
    records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = decode.read

    def changing(task: tuple[Path, Path | None, int]) -> decode.Decoded | str:
        decoded = read(task)
        if task[0] == records[0].image:
            shutil.copyfile(records[1].image, records[0].image)
        return decoded

    with monkeypatch.context() as patch, Cache(tmp_path, 32) as cache, Workers(1) as workers:
        patch.setattr(decode, "read", changing)
        cache.read(records, workers)
        assert cache.pixels(records[0])[0].shape == (32, 32, 3)
    assert count_decoded(tmp_path, records, monkeypatch) == 1


def test_broken_link_is_a_problem(records: list[Record], tmp_path: Path) -> None:
    records[0].image.unlink()
    records[0].image.symlink_to(tmp_path / "nowhere.jpg")
    with Cache(tmp_path, 32) as cache, Workers(1) as workers:
        cache.read(records, workers)
    assert cache.problems == {records[0]: f"{records[0].image}: No such file or directory"}


def test_second_run_in_a_folder_is_refused(tmp_path: Path) -> None:
    with Cache(tmp_path, 32), pytest.raises(InputError, match="another run uses this folder"), Cache(tmp_path, 32):
        pass


def test_drive_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, records: list[Record]
) -> None:
    """SQLite reports such a drive as busy, and so does a file that another connection has locked."""
    monkeypatch.setattr(locking, "supports_locks", lambda _: False)
    with Cache(tmp_path, 32):
        assert count_decoded(tmp_path, records, monkeypatch) == len(records)
    assert caplog.text.count("this drive does not support file locks") == 1


def test_path_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(InputError, match=NAME), Cache(tmp_path, 32):
        pass
