"""Downloads from a real server on loopback that also interrupts, misreports and sends harmful archives."""

import contextlib
import hashlib
import http.server
import io
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import download_data
from melanoma.classes import MELANOMA
from melanoma.cli import locking
from melanoma.cli import run as cli
from melanoma.errors import InputError
from melanoma.sources import archives, download, isic
from melanoma.sources.archives import CHALLENGES, parts

import numpy as np
import pytest

ARCHIVE = "ISIC-2017_Validation_Data.zip"
MASKS = "ISIC-2017_Validation_Part1_GroundTruth.zip"
LABELS = "ISIC-2017_Validation_Part3_GroundTruth.csv"
ISIC_2017 = CHALLENGES["2017"]
FOLDER = "ISIC-2017_Validation_Data"


def archive(members: dict[str, bytes], links: tuple[str, ...] = (), method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as out:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            info.external_attr = (stat.S_IFLNK if name in links else stat.S_IFREG | 0o644) << 16
            out.writestr(info, content)
    return stream.getvalue()


def images(size: int = 200_000) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    return {f"{FOLDER}/ISIC_000000{number}.jpg": rng.bytes(size) for number in range(3)}


SUPERPIXELS = {f"{FOLDER}/ISIC_000000{number}_superpixels.png": b"labels" for number in range(3)}


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `faults` lists, by file, what is wrong with the next answers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.version = "1"
        self.ranges = True
        self.if_range = True  # whether the header If-Range is respected
        self.requests: list[tuple[str, str, str | None]] = []  # method, file, range
        self.sent = 0
        self.pause = 0.0  # seconds between blocks

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/2017/"

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignores clients that disconnect."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        """Logs nothing."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        server, name, requested = self.server, self.path.removeprefix("/2017/"), self.headers["Range"]
        server.requests.append((self.command, name, requested))
        content = server.files.get(name)
        fault = server.faults[name].pop(0) if body and server.faults[name] else ""
        if fault.isdigit() or content is None:
            self.send_error(int(fault or 404))
            return
        start = 0
        same = not server.if_range or self.headers["If-Range"] == f'"{server.version}"'
        if requested and server.ranges and same:
            start = int(requested.removeprefix("bytes=").removesuffix("-"))
        if start and fault == "other range":
            start += 1
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        rest = b"<html>please log in</html>" if fault == "web page" else content[start:]
        announced = len(rest) + {"too long": 1000, "too short": -1000}.get(fault, 0)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Type", "text/html" if fault == "web page" else "application/octet-stream")
        self.send_header("Content-Length", str(announced))
        self.send_header("ETag", f'"{server.version}"')
        self.end_headers()
        if fault.startswith("break"):
            rest = rest[: len(rest) // {"break": 2, "break early": 4}[fault]]
        for first in range(0, len(rest) if body else 0, 1 << 15):
            self.wfile.write(rest[first : first + (1 << 15)])
            server.sent += len(rest[first : first + (1 << 15)])
            time.sleep(server.pause)


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing all disks would take most of the time."""
    monkeypatch.setattr(os, "sync", lambda: None)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "PAUSE", 0.01)
    monkeypatch.setattr(download, "TIMEOUT", 2.0)
    with Server() as server:
        server.files = {
            ARCHIVE: archive(images() | SUPERPIXELS | {f"{FOLDER}/ATTRIBUTION.txt": b"thanks"}),
            MASKS: archive({f"masks/ISIC_000000{number}_segmentation.png": b"mask" * 100 for number in range(3)}),
            LABELS: b"image_id,melanoma,seborrheic_keratosis\nISIC_0000000,1.0,0.0\n",
        }
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(server: Server, out: Path, *flags: str) -> None:
    download_data.main(download_data.build_parser().parse_args(["--out", str(out), "--url", server.url, *flags]))


def only_images(server: Server, out: Path) -> None:
    download.fetch(ISIC_2017, out, server.url, ["val", "images"], keep=False)


def check_images(out: Path) -> None:
    expected = {Path(name).name: content for name, content in images().items()}
    assert {path.name: path.read_bytes() for path in (out / FOLDER).iterdir()} == expected
    assert not [path.name for path in out.iterdir() if path.suffix in {".zip", ".part", ".tag", ".tmp"}]


def ranges(server: Server) -> list[str | None]:
    return [requested for method, name, requested in server.requests if (method, name) == ("GET", ARCHIVE)]


def test_split_is_downloaded_unpacked_and_counted(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "melanoma")
    run(server, tmp_path, "--only", "val")
    check_images(tmp_path)
    assert len(list((tmp_path / MASKS.removesuffix(".zip")).iterdir())) == 3
    assert isic.read_labels(tmp_path / LABELS) == {"ISIC_0000000": MELANOMA}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([FOLDER, MASKS.removesuffix(".zip"), LABELS])
    assert f"{ARCHIVE}: 3 superpixel files skipped" in caplog.messages
    assert f"{ARCHIVE}: 1 other files skipped" in caplog.messages
    assert f"warning: {tmp_path / FOLDER}: 3 images, the challenge has 150" in caplog.messages
    assert caplog.messages[-1] == f"next: python segmentation_01_preprocessing.py --source {tmp_path} --check"
    assert "GB free" in caplog.text


def test_second_run_requests_nothing(server: Server, tmp_path: Path) -> None:
    run(server, tmp_path, "--only", "val")
    server.requests.clear()
    run(server, tmp_path, "--only", "val")
    assert server.requests == []


@pytest.mark.parametrize(
    ("only", "names"),
    [
        ([], {"images": 3, "masks": 3, "labels": 3}),
        (["val", "test"], {"images": 2, "masks": 2, "labels": 2}),
        (["labels"], {"labels": 3}),
        (["train", "masks", "labels"], {"masks": 1, "labels": 1}),
    ],
)
def test_only_accepts_splits_and_kinds(only: list[str], names: dict[str, int], tmp_path: Path) -> None:
    kinds = [part.files.kind for part in parts(ISIC_2017, tmp_path, only)]
    assert {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)} == names


def test_every_official_file_is_downloaded(tmp_path: Path) -> None:
    names = {part.file.name for part in parts(ISIC_2017, tmp_path, [])}
    assert set(archives.MD5) == {name for name in names if name.endswith(".zip")}
    assert len(names) == 9


def test_keep_zips_keeps_archives_and_the_next_run_uses_them(server: Server, tmp_path: Path) -> None:
    run(server, tmp_path, "--only", "val", "images", "--keep-zips")
    assert (tmp_path / ARCHIVE).read_bytes() == server.files[ARCHIVE]
    shutil.rmtree(tmp_path / FOLDER)
    server.requests.clear()
    run(server, tmp_path, "--only", "val", "images")
    check_images(tmp_path)
    assert server.requests == []


def test_wrong_range_is_not_used(server: Server, tmp_path: Path) -> None:
    server.faults[ARCHIVE] = ["break", "other range"]
    only_images(server, tmp_path)
    check_images(tmp_path)
    assert ranges(server) == [None, f"bytes={len(server.files[ARCHIVE]) // 2}-", None]


def test_interrupted_download_resumes(server: Server, tmp_path: Path) -> None:
    server.faults[ARCHIVE] = ["break", "break"]
    only_images(server, tmp_path)
    check_images(tmp_path)
    size = len(server.files[ARCHIVE])
    assert ranges(server) == [None, f"bytes={size // 2}-", f"bytes={size // 2 + (size - size // 2) // 2}-"]
    assert server.sent == size


def test_stalled_server_stops_the_run_and_the_next_run_succeeds(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    server.pause, server.ranges = 0.3, False
    with pytest.raises(InputError, match="timed out; gave up after 5 attempts"):
        only_images(server, tmp_path)
    server.pause = 0
    only_images(server, tmp_path)
    check_images(tmp_path)


def test_interruptions_do_not_stop_a_download_that_progresses(server: Server, tmp_path: Path) -> None:
    server.faults[ARCHIVE] = ["break"] * (2 * download.ATTEMPTS)
    only_images(server, tmp_path)
    check_images(tmp_path)


def test_server_without_ranges_sends_everything_again(server: Server, tmp_path: Path) -> None:
    server.faults[ARCHIVE], server.ranges = ["break"], False
    only_images(server, tmp_path)
    check_images(tmp_path)


def test_file_that_changed_is_downloaded_from_the_start(server: Server, tmp_path: Path) -> None:
    server.faults[ARCHIVE] = ["break", "404"]
    with pytest.raises(InputError, match="404"):
        only_images(server, tmp_path)
    server.version = "2"
    server.files[ARCHIVE] = archive(dict(reversed(images().items())))
    only_images(server, tmp_path)
    check_images(tmp_path)
    assert ranges(server)[-1] is not None


def test_changed_file_is_noticed_although_the_server_ignores_if_range(server: Server, tmp_path: Path) -> None:
    server.faults[LABELS], server.if_range = ["break", "404"], False
    server.files[LABELS] = b"image_id,melanoma,seborrheic_keratosis\n" + b"ISIC_0000000,0.0,0.0\n"
    with pytest.raises(InputError, match="404"):
        run(server, tmp_path, "--only", "val", "labels")
    server.version = "2"
    server.files[LABELS] = b"image_id,seborrheic_keratosis,melanoma\n" + b"ISIC_0000000,0.0,1.0\n"
    run(server, tmp_path, "--only", "val", "labels")
    assert (tmp_path / LABELS).read_bytes() == server.files[LABELS]


def test_interruptions_by_a_server_without_ranges_stop_the_run(server: Server, tmp_path: Path) -> None:
    server.faults[ARCHIVE], server.ranges = ["break", "break early"] * 10, False
    with pytest.raises(InputError, match="gave up after 5 attempts"):
        only_images(server, tmp_path)
    assert len(ranges(server)) == download.ATTEMPTS


def test_file_that_shrank_is_downloaded_from_the_start(server: Server, tmp_path: Path) -> None:
    for name, content in ((f"{ARCHIVE}.part", b"x" * 10**6), (f"{ARCHIVE}.part.tag", b'"1"')):
        (tmp_path / name).write_bytes(content)
    only_images(server, tmp_path)
    check_images(tmp_path)


def test_complete_download_that_was_not_renamed_is_used(server: Server, tmp_path: Path) -> None:
    for name, content in ((f"{ARCHIVE}.part", server.files[ARCHIVE]), (f"{ARCHIVE}.part.tag", b'"1"')):
        (tmp_path / name).write_bytes(content)
    only_images(server, tmp_path)
    check_images(tmp_path)
    assert server.sent == 0


def test_announced_length_that_is_too_long_is_an_incomplete_download(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.faults[ARCHIVE] = ["too long"] * download.ATTEMPTS
    with pytest.raises(InputError, match=r"ended after \d+ of \d+ bytes; gave up after 5 attempts"):
        only_images(server, tmp_path)
    assert not (tmp_path / FOLDER).exists()


def test_announced_length_that_is_too_short_is_a_damaged_archive(server: Server, tmp_path: Path) -> None:
    server.faults[ARCHIVE] = ["too short"]
    with pytest.raises(InputError, match=rf"{ARCHIVE}: damaged and therefore deleted"):
        only_images(server, tmp_path)
    assert list(tmp_path.iterdir()) == []
    only_images(server, tmp_path)
    check_images(tmp_path)


@pytest.mark.parametrize(("fault", "message"), [("404", "answered 404 Not Found"), ("web page", "a web page")])
def test_error_page_names_the_file_and_the_flag(server: Server, tmp_path: Path, fault: str, message: str) -> None:
    server.faults[ARCHIVE] = [fault]
    with pytest.raises(InputError, match=rf"{ARCHIVE}.*{message}.*--url"):
        only_images(server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_temporary_errors_are_retried(server: Server, tmp_path: Path) -> None:
    server.faults[ARCHIVE] = ["503", "500", "429"]
    only_images(server, tmp_path)
    check_images(tmp_path)


def test_repeated_temporary_errors_stop_the_run(server: Server, tmp_path: Path) -> None:
    server.faults[ARCHIVE] = ["503"] * download.ATTEMPTS
    with pytest.raises(InputError, match="HTTP 503 Service Unavailable; gave up after 5 attempts"):
        only_images(server, tmp_path)


def test_missing_server_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSE", 0.001)
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:9/.*5 attempts"):
        download.fetch(ISIC_2017, tmp_path, "http://127.0.0.1:9/", ["val", "labels"], keep=False)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc",
        "ftp://x/",
        "/tmp",
        "http:///2017/",
        "http://[x/",
        "http://x/ü/",
        "http://x:abc/",
        "http://x:99999/",
    ],
)
def test_unusable_url_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--url {re.escape(url)}"):
        download.fetch(ISIC_2017, tmp_path, url, [], keep=False)


@pytest.mark.usefixtures("logging_restored")
def test_second_download_into_a_folder_is_refused(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["download_data.py", "--out", str(tmp_path), "--url", server.url])
    with locking.exclusive_lock(tmp_path), pytest.raises(SystemExit, match="2"):
        cli.run(download_data.build_parser(), download_data.main, writes=("out",))
    assert f"{tmp_path}: another run uses this folder" in capsys.readouterr().err
    assert server.requests == []


@pytest.mark.parametrize("name", ["../evil.jpg", "a/../../evil.jpg", "/tmp/evil.jpg", "..\\evil.jpg", "C:evil.jpg"])
def test_archive_with_paths_outside_is_refused(server: Server, tmp_path: Path, name: str) -> None:
    server.files[ARCHIVE] = archive(images(100) | {name: b"evil"})
    out = tmp_path / "in" / "here"
    with pytest.raises(InputError, match=r"leads outside the folder\. Nothing was unpacked"):
        only_images(server, out)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [ARCHIVE]


def test_archive_with_a_link_is_refused(server: Server, tmp_path: Path) -> None:
    link = f"{FOLDER}/ISIC_0000009.jpg"
    server.files[ARCHIVE] = archive(images(100) | {link: b"/etc/passwd"}, links=(link,))
    with pytest.raises(InputError, match=r"ISIC_0000009.*is a link"):
        only_images(server, tmp_path)
    assert not (tmp_path / FOLDER).exists()


def test_archive_that_expands_too_much_is_refused(server: Server, tmp_path: Path) -> None:
    server.files[ARCHIVE] = archive({f"{FOLDER}/ISIC_0000009.jpg": bytes(10**7)}, method=zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="would unpack to 10000000"):
        only_images(server, tmp_path)
    assert not (tmp_path / FOLDER).exists()


def test_archive_with_a_wrong_checksum_is_deleted(server: Server, tmp_path: Path) -> None:
    content = server.files[ARCHIVE]
    place = content.index(images()[f"{FOLDER}/ISIC_0000001.jpg"])
    server.files[ARCHIVE] = content[:place] + b"x" + content[place + 1 :]
    with pytest.raises(InputError, match=r"damaged and therefore deleted \(Bad CRC-32"):
        only_images(server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_archive_without_images_is_refused(server: Server, tmp_path: Path) -> None:
    server.files[ARCHIVE] = archive({"thesis.pdf": b"words"})
    with pytest.raises(InputError, match=f"{ARCHIVE}: contains no images"):
        only_images(server, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [ARCHIVE]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_random_damage_is_an_input_error_or_harmless(method: int, tmp_path: Path) -> None:
    (part,) = parts(ISIC_2017, tmp_path, ["val", "images"])
    intact = archive(images(20), method=method)
    rng, damaged = np.random.default_rng(method), 0
    for _ in range(400):
        content = bytearray(intact)
        for place in rng.integers(0, len(content), rng.integers(1, 5)):
            content[place] = rng.integers(0, 256)
        part.file.write_bytes(content)
        try:
            download.unpack(part)
            shutil.rmtree(part.target)
        except InputError:
            damaged += 1
        assert not part.unpacking.exists()
    assert damaged > 170


def test_invalid_label_file_is_deleted(server: Server, tmp_path: Path) -> None:
    server.files[LABELS] = b"<Error>no such key</Error>"
    with pytest.raises(InputError, match=r"no column.*deleted: run the command again"):
        download.fetch(ISIC_2017, tmp_path, server.url, ["val", "labels"], keep=False)
    assert list(tmp_path.iterdir()) == []


def test_unknown_md5_is_a_warning(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_images(server, tmp_path)
    (warning,) = [text for text in caplog.messages if "MD5" in text]
    assert "a third-party list says 8d6419d942112f709894c0d82f6c9038" in warning
    shutil.rmtree(tmp_path / FOLDER)
    caplog.clear()
    monkeypatch.setitem(archives.MD5, ARCHIVE, hashlib.md5(server.files[ARCHIVE]).hexdigest())
    only_images(server, tmp_path)
    assert not [record for record in caplog.records if "MD5" in record.message and record.levelname == "WARNING"]


@pytest.mark.parametrize("keep", [False, True])
def test_too_little_space_is_reported_before_the_download(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    needed = 2 * len(server.files[ARCHIVE])  # archive and content
    for free, fits in ((needed - 1, False), (needed, True)):
        usage = shutil._ntuple_diskusage(10**12, 0, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        with contextlib.nullcontext() if fits else pytest.raises(InputError, match="GB needed"):
            download.fetch(ISIC_2017, tmp_path, server.url, ["val", "images"], keep)
        assert bool(server.sent) == fits


def test_remains_of_a_killed_run_are_deleted_before_space_is_checked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (part,) = parts(ISIC_2017, tmp_path, ["val", "images"])
    part.unpacking.mkdir()
    usage = shutil._ntuple_diskusage(10**12, 0, 10**9)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: pytest.fail("not deleted") if part.unpacking.exists() else usage
    )
    only_images(server, tmp_path)
    check_images(tmp_path)


def test_kept_archives_need_more_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dict(zip(parts(ISIC_2017, tmp_path, ["images"]), (50, 10, 40), strict=True))
    for keep, needed in ((True, 200), (False, 150)):
        for free in (needed - 1, needed):
            usage = shutil._ntuple_diskusage(10**12, 0, free)
            monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
            with contextlib.nullcontext() if free == needed else pytest.raises(InputError):
                download.check_space(tmp_path, sizes, keep)


@pytest.mark.parametrize("moment", ["incomplete", "unpacking"])
def test_killed_download_is_finished_by_the_same_command(server: Server, tmp_path: Path, moment: str) -> None:
    if moment == "unpacking":
        many = {f"{FOLDER}/ISIC_{number:07d}.jpg": os.urandom(100) for number in range(2_000)}
        server.files[ARCHIVE] = archive(many)
    else:
        server.pause = 0.05
    flags = ["--url", server.url, "--out", str(tmp_path), "--only", "val", "images"]
    command = [sys.executable, download_data.__file__, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    part, temporary = tmp_path / f"{ARCHIVE}.part", tmp_path / f".{FOLDER}.tmp"
    while not (part.exists() and part.stat().st_size if moment == "incomplete" else temporary.exists()):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / FOLDER).exists()
    kept = part.stat().st_size if part.exists() else 0
    server.pause = 0.0
    server.requests.clear()
    subprocess.run(command, check=True, capture_output=True)
    if moment == "incomplete":
        check_images(tmp_path)
        assert ranges(server) == [f"bytes={kept}-"]
    else:
        assert len(list((tmp_path / FOLDER).iterdir())) == len(many)
        assert ranges(server) == []
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]
