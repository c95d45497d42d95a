"""Downloads from a real server on loopback that also interrupts, misreports and sends harmful archives."""

import contextlib
import dataclasses
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
from melanoma.sources import archives, download
from melanoma.sources.archives import CHALLENGES, parts
from melanoma.sources.layouts import challenge_2017

import numpy as np
import pytest

ARCHIVE = "ISIC-2017_Validation_Data.zip"
MASKS = "ISIC-2017_Validation_Part1_GroundTruth.zip"
LABELS = "ISIC-2017_Validation_Part3_GroundTruth.csv"
ISIC_2017 = CHALLENGES["2017"]

ISIC_2018 = CHALLENGES["2018"]
IMAGES_2018 = "ISIC2018_Task3_Training_Input.zip"
LABELS_2018 = "ISIC2018_Task3_Training_GroundTruth.zip"
LESIONS_2018 = "ISIC2018_Task3_Training_LesionGroupings.csv"
ONE_HOT = b"image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\r\nISIC_0024306,0.0,1.0,0.0,0.0,0.0,0.0,0.0\r\n"
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


def labels_2018(content: bytes) -> bytes:
    folder = LABELS_2018.removesuffix(".zip")
    members = {f"{folder}/LICENSE.txt": b"CC-BY-NC", f"{folder}/{folder}.csv": content}
    return archive(members, method=zipfile.ZIP_DEFLATED)


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
            IMAGES_2018: archive({f"{IMAGES_2018[:-4]}/ISIC_0024306.jpg": b"image" * 50_000}),
            LABELS_2018: labels_2018(ONE_HOT),
            LESIONS_2018: b"image,lesion_id,diagnosis_confirm_type\nISIC_0024306,HAM_0000550,histopathology\n",
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
    assert challenge_2017.read_labels(tmp_path / LABELS) == {"ISIC_0000000": MELANOMA}
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


def run_2018(server: Server, out: Path, *only: str) -> None:
    run(server, out, "--challenge", "2018", "--only", "train", *only)


def test_split_of_isic_2018_is_downloaded_unpacked_and_counted(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "melanoma")
    server.faults[IMAGES_2018], server.faults[LABELS_2018] = ["break"], ["break"]
    run_2018(server, tmp_path)
    images, labels, lesions = tmp_path / IMAGES_2018[:-4], tmp_path / LABELS_2018[:-4], tmp_path / LESIONS_2018
    assert sorted(tmp_path.iterdir()) == sorted([images, labels, lesions])
    assert [path.name for path in images.iterdir()] == ["ISIC_0024306.jpg"]
    assert [path.name for path in labels.iterdir()] == [f"{labels.name}.csv"]
    assert (labels / f"{labels.name}.csv").read_bytes() == ONE_HOT
    assert lesions.read_bytes() == server.files[LESIONS_2018]
    assert len([request for request in server.requests if request[2]]) == 2  # two downloads were resumed
    for path, kind in ((images, "images"), (labels, "labels"), (lesions, "labels")):
        assert f"warning: {path}: 1 {kind}, the challenge has 10015" in caplog.messages
    assert f"{LABELS_2018} has MD5 {hashlib.md5(server.files[LABELS_2018]).hexdigest()}" in caplog.messages
    step = f"python segmentation_01_preprocessing.py --source data --extra {tmp_path} --check"
    assert caplog.messages[-1] == f"next, with ISIC 2017 in --source: {step}"


@pytest.mark.parametrize(("challenge", "licence"), [("2017", False), ("2018", True)])
def test_licence_of_ham10000_is_logged(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, challenge: str, licence: bool
) -> None:
    caplog.set_level("INFO", "melanoma")
    server.files[LABELS.replace("Validation", "Training")] = server.files[LABELS]
    run(server, tmp_path, "--challenge", challenge, "--only", "train", "labels")
    assert ("CC-BY-NC" in caplog.text) == licence


def test_expected_number_of_labels_is_no_warning(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    challenge = dataclasses.replace(ISIC_2018, counts=dict.fromkeys(ISIC_2018.counts, 1))
    download.fetch(challenge, tmp_path, server.url, ["train"], keep=False)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []


def test_every_official_file_of_isic_2018_task_3_is_downloaded(tmp_path: Path) -> None:
    found = parts(ISIC_2018, tmp_path, [])
    assert {(part.file.name, part.count) for part in found} == {
        (IMAGES_2018, 10015),
        (LABELS_2018, 10015),
        (LESIONS_2018, 10015),
        ("ISIC2018_Task3_Validation_Input.zip", 193),
        ("ISIC2018_Task3_Validation_GroundTruth.zip", 193),
        ("ISIC2018_Task3_Test_Input.zip", 1512),
        ("ISIC2018_Task3_Test_GroundTruth.zip", 1512),
    }
    assert len(found) == 7


def test_isic_2017_is_downloaded_into_the_layout_that_is_read(tmp_path: Path) -> None:
    read = [
        place(tmp_path, "test")
        for place in (challenge_2017.image_folder, challenge_2017.mask_folder, challenge_2017.label_file)
    ]
    assert [part.target for part in parts(ISIC_2017, tmp_path, ["test"])] == read


@pytest.mark.parametrize("challenge", ["2017", "2018"])
def test_default_url_depends_on_the_challenge(challenge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    urls: list[str] = []
    monkeypatch.setattr(download, "fetch", lambda challenge, out, url, only, keep: urls.append(url))
    download_data.main(download_data.build_parser().parse_args(["--challenge", challenge]))
    assert urls == [f"https://isic-challenge-data.s3.amazonaws.com/{challenge}/"]


def test_both_challenges_fit_in_one_folder(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        server.requests.clear()
        run(server, tmp_path, "--only", "val")
        run_2018(server, tmp_path)
    assert server.requests == []  # the second time
    check_images(tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("only", [["masks"], ["images", "masks"]])
def test_masks_of_isic_2018_are_refused(server: Server, tmp_path: Path, only: list[str]) -> None:
    with pytest.raises(InputError, match="--only masks: ISIC 2018 task 3 has no masks; it has images, labels"):
        run_2018(server, tmp_path / "out", *only)
    assert not (tmp_path / "out").exists() and server.requests == []


@pytest.mark.parametrize(
    ("name", "content", "column"),
    [
        (LABELS_2018, labels_2018(ONE_HOT.replace(b"NV", b"nevus")), "nv"),
        (LABELS_2018, labels_2018(b"<html>"), "image, mel, nv, bcc, bkl, df, vasc, akiec"),
        (LESIONS_2018, b"image,lesion\nISIC_0024306,HAM_0000550\n", "lesion_id, diagnosis_confirm_type"),
    ],
)
def test_csv_of_isic_2018_without_its_columns_is_deleted(
    server: Server, tmp_path: Path, name: str, content: bytes, column: str
) -> None:
    kept, server.files[name] = server.files[name], content
    with pytest.raises(
        InputError, match=rf"no column {column}; it has .*\. The file was deleted: run the command again"
    ):
        run_2018(server, tmp_path, "labels")
    assert [path for path in tmp_path.iterdir() if path.name.startswith((name, name[:-4], "."))] == []
    server.files[name] = kept
    run_2018(server, tmp_path, "labels")


def test_label_archive_without_its_csv_is_deleted(server: Server, tmp_path: Path) -> None:
    server.files[LABELS_2018] = archive({"other.csv": ONE_HOT})
    with pytest.raises(InputError, match=r"no such file.* was deleted"):
        run_2018(server, tmp_path, "labels")
    assert list(tmp_path.iterdir()) == []


def test_harmful_label_archive_is_refused(server: Server, tmp_path: Path) -> None:
    server.files[LABELS_2018] = archive({f"../{LABELS_2018[:-4]}.csv": ONE_HOT})
    with pytest.raises(InputError, match=r"leads outside the folder\. Nothing was unpacked"):
        run_2018(server, tmp_path / "out", "labels")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [LABELS_2018]


def test_labels_that_compress_well_are_unpacked(server: Server, tmp_path: Path) -> None:
    header, row = ONE_HOT.splitlines(keepends=True)
    content = header + row * 10_015
    server.files[LABELS_2018] = labels_2018(content)
    assert len(content) > download.EXPANSION * len(server.files[LABELS_2018])
    run_2018(server, tmp_path, "labels")
    assert (tmp_path / LABELS_2018[:-4] / f"{LABELS_2018[:-4]}.csv").read_bytes() == content


def test_label_file_that_was_damaged_later_is_reported(server: Server, tmp_path: Path) -> None:
    run_2018(server, tmp_path, "labels")
    folder = tmp_path / LABELS_2018[:-4]
    (folder / f"{folder.name}.csv").unlink()
    with pytest.raises(InputError, match=f"no such file.*Delete {folder} and run the command again"):
        run_2018(server, tmp_path, "labels")


def test_archive_of_labels_needs_space_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dict(zip(parts(ISIC_2018, tmp_path, ["train", "labels"]), (50, 10), strict=True))
    for free in (109, 110):
        usage = shutil._ntuple_diskusage(10**12, 0, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        with contextlib.nullcontext() if free == 110 else pytest.raises(InputError):
            download.check_space(tmp_path, sizes, keep=True)
