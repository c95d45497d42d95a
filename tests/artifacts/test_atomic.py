"""A file is complete or absent, whatever happens while it is written."""

import errno
import hashlib
from pathlib import Path

from melanoma.artifacts.atomic import atomic_write, sha256, write_json, write_text

import pytest


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


def test_file_appears_at_the_end_in_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.bin"
    with atomic_write(path) as stream:
        stream.write(b"content")
        assert not path.exists()
    assert path.read_bytes() == b"content"
    assert hidden(tmp_path) == []


def test_text_with_bytes_that_are_not_utf8_is_written(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "é\udcff")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "é\\udcff"


def write_half(path: Path, error: BaseException) -> None:
    with atomic_write(path) as stream:
        stream.write(b"half")
        raise error


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt()])
def test_previous_file_stays_after_an_error(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"previous")
    with pytest.raises(type(error)):
        write_half(path, error)
    assert path.read_bytes() == b"previous"
    assert hidden(tmp_path) == []


def test_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, atomic_write(tmp_path / "file.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "file.bin")
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file") as caught:
        write_text(tmp_path / "file" / "text.txt", "")
    assert str(caught.value.filename).startswith(str(tmp_path / "file"))


def test_text_is_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "text.txt", "Größe\n")
    assert (tmp_path / "text.txt").read_bytes() == "Größe\n".encode()


def test_json_is_replaced_completely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": 2, "b": object()})
    assert path.read_text() == '{\n "a": 1\n}\n'
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("size", [0, 1, 1 << 20])
def test_sha256_is_that_of_the_content(size: int, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(bytes(size))
    assert sha256(tmp_path / "file.bin") == hashlib.sha256(bytes(size)).hexdigest()
