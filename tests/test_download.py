"""The download against a real server on loopback: one that serves, and ones that break off, lie and attack."""

import contextlib
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
from melanoma import download, isic
from melanoma.errors import InputError

import numpy as np
import pipeline
import pytest

ARCHIVE = "ISIC-2017_Validation_Data.zip"
MASKS = "ISIC-2017_Validation_Part1_GroundTruth.zip"
LABELS = "ISIC-2017_Validation_Part3_GroundTruth.csv"
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


def photographs(size: int = 200_000) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    return {f"{FOLDER}/ISIC_000000{number}.jpg": rng.bytes(size) for number in range(3)}


SUPERPIXELS = {f"{FOLDER}/ISIC_000000{number}_superpixels.png": b"labels" for number in range(3)}


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; the next answers for a path may be spoilt in the ways that `spoil` lists for it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.spoil: dict[str, list[str]] = defaultdict(list)
        self.version = "1"
        self.ranges = True
        self.if_range = True  # whether that header is obeyed
        self.requests: list[tuple[str, str, str | None]] = []  # method, file, range
        self.sent = 0
        self.pause = 0.0  # seconds between blocks

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/2017/"

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing where the client went away."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        server, name, wanted = self.server, self.path.removeprefix("/2017/"), self.headers["Range"]
        server.requests.append((self.command, name, wanted))
        content = server.files.get(name)
        way = server.spoil[name].pop(0) if body and server.spoil[name] else ""
        if way.isdigit() or content is None:
            self.send_error(int(way or 404))
            return
        start = 0
        same = not server.if_range or self.headers["If-Range"] == f'"{server.version}"'
        if wanted and server.ranges and same:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start and way == "elsewhere":
            start += 1
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        rest = b"<html>please log in</html>" if way == "page" else content[start:]
        announced = len(rest) + {"too long": 1000, "too short": -1000}.get(way, 0)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Type", "text/html" if way == "page" else "application/octet-stream")
        self.send_header("Content-Length", str(announced))
        self.send_header("ETag", f'"{server.version}"')
        self.end_headers()
        if way.startswith("break"):
            rest = rest[: len(rest) // {"break": 2, "break early": 4}[way]]
        for place in range(0, len(rest) if body else 0, 1 << 15):
            self.wfile.write(rest[place : place + (1 << 15)])
            server.sent += len(rest[place : place + (1 << 15)])
            time.sleep(server.pause)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "PAUSE", 0.01)
    monkeypatch.setattr(download, "TIMEOUT", 2.0)
    with Server() as server:
        server.files = {
            ARCHIVE: archive(photographs() | SUPERPIXELS | {f"{FOLDER}/ATTRIBUTION.txt": b"thanks"}),
            MASKS: archive({f"masks/ISIC_000000{number}_segmentation.png": b"mask" * 100 for number in range(3)}),
            LABELS: b"image_id,melanoma,seborrheic_keratosis\nISIC_0000000,1.0,0.0\n",
        }
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(server: Server, out: Path, *flags: str) -> None:
    download_data.main(download_data.parser().parse_args(["--out", str(out), "--url", server.url, *flags]))


def only_photographs(server: Server, out: Path) -> None:
    download.fetch(out, server.url, ["val", "images"], keep=False)


def check_photographs(out: Path) -> None:
    expected = {Path(name).name: content for name, content in photographs().items()}
    assert {path.name: path.read_bytes() for path in (out / FOLDER).iterdir()} == expected
    assert not [path.name for path in out.iterdir() if path.suffix in {".zip", ".part", ".tag", ".tmp"}]


def ranges(server: Server) -> list[str | None]:
    return [wanted for method, name, wanted in server.requests if (method, name) == ("GET", ARCHIVE)]


def test_split_is_fetched_unpacked_and_counted(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "melanoma")
    run(server, tmp_path, "--only", "val")
    check_photographs(tmp_path)
    assert len(list((tmp_path / MASKS.removesuffix(".zip")).iterdir())) == 3
    assert isic.read_labels(tmp_path / LABELS) == {"ISIC_0000000": isic.MELANOMA}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([FOLDER, MASKS.removesuffix(".zip"), LABELS])
    assert f"{ARCHIVE}: 3 superpixel files left out" in caplog.messages
    assert f"{ARCHIVE}: 1 other files left out" in caplog.messages
    assert f"warning: {tmp_path / FOLDER}: 3 images, the challenge has 150" in caplog.messages
    assert caplog.messages[-1] == f"next: python segmentation_01_preprocessing.py --source {tmp_path} --check"
    assert "GB free" in caplog.text


def test_second_run_asks_for_nothing(server: Server, tmp_path: Path) -> None:
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
def test_only_takes_splits_and_kinds(only: list[str], names: dict[str, int], tmp_path: Path) -> None:
    kinds = [part.kind for part in download.parts(tmp_path, only)]
    assert {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)} == names


def test_every_official_file_is_asked_for(tmp_path: Path) -> None:
    names = {part.file.name for part in download.parts(tmp_path, [])}
    assert set(download.MD5) == {name for name in names if name.endswith(".zip")}
    assert len(names) == 9


def test_archives_are_kept_where_asked(server: Server, tmp_path: Path) -> None:
    run(server, tmp_path, "--only", "val", "images", "--keep-zips")
    assert (tmp_path / ARCHIVE).read_bytes() == server.files[ARCHIVE]
    shutil.rmtree(tmp_path / FOLDER)
    server.requests.clear()
    run(server, tmp_path, "--only", "val", "images")
    check_photographs(tmp_path)
    assert server.requests == []


def test_other_range_than_asked_for_is_not_taken(server: Server, tmp_path: Path) -> None:
    server.spoil[ARCHIVE] = ["break", "elsewhere"]
    only_photographs(server, tmp_path)
    check_photographs(tmp_path)
    assert ranges(server) == [None, f"bytes={len(server.files[ARCHIVE]) // 2}-", None]


def test_broken_download_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    server.spoil[ARCHIVE] = ["break", "break"]
    only_photographs(server, tmp_path)
    check_photographs(tmp_path)
    size = len(server.files[ARCHIVE])
    assert ranges(server) == [None, f"bytes={size // 2}-", f"bytes={size // 2 + (size - size // 2) // 2}-"]
    assert server.sent == size


def test_stalled_server_is_given_up_and_asked_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.pause, server.ranges = 0.5, False
    with pytest.raises(InputError, match="timed out; 5 attempts"):
        only_photographs(server, tmp_path)
    server.pause = 0
    only_photographs(server, tmp_path)
    check_photographs(tmp_path)


def test_many_breaks_do_not_end_a_download_that_gets_on(server: Server, tmp_path: Path) -> None:
    server.spoil[ARCHIVE] = ["break"] * (2 * download.ATTEMPTS)
    only_photographs(server, tmp_path)
    check_photographs(tmp_path)


def test_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.spoil[ARCHIVE], server.ranges = ["break"], False
    only_photographs(server, tmp_path)
    check_photographs(tmp_path)


def test_file_that_changed_between_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    server.spoil[ARCHIVE] = ["break", "404"]
    with pytest.raises(InputError, match="404"):
        only_photographs(server, tmp_path)
    server.version = "2"
    server.files[ARCHIVE] = archive(dict(reversed(photographs().items())))
    only_photographs(server, tmp_path)
    check_photographs(tmp_path)
    assert len(ranges(server)[-1] or "") > 0


def test_file_that_changed_is_noticed_where_the_server_does_not_say_so(server: Server, tmp_path: Path) -> None:
    server.spoil[LABELS], server.if_range = ["break", "404"], False
    server.files[LABELS] = b"image_id,melanoma,seborrheic_keratosis\n" + b"ISIC_0000000,0.0,0.0\n"
    with pytest.raises(InputError, match="404"):
        run(server, tmp_path, "--only", "val", "labels")
    server.version = "2"
    server.files[LABELS] = b"image_id,seborrheic_keratosis,melanoma\n" + b"ISIC_0000000,0.0,1.0\n"
    run(server, tmp_path, "--only", "val", "labels")
    assert (tmp_path / LABELS).read_bytes() == server.files[LABELS]


def test_breaks_of_a_server_without_ranges_end_the_run(server: Server, tmp_path: Path) -> None:
    server.spoil[ARCHIVE], server.ranges = ["break", "break early"] * 10, False
    with pytest.raises(InputError, match="5 attempts"):
        only_photographs(server, tmp_path)
    assert len(ranges(server)) == download.ATTEMPTS


def test_file_that_shrank_between_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    for name, content in ((f"{ARCHIVE}.part", b"x" * 10**6), (f"{ARCHIVE}.part.tag", b'"1"')):
        (tmp_path / name).write_bytes(content)
    only_photographs(server, tmp_path)
    check_photographs(tmp_path)


def test_download_that_was_whole_but_not_renamed_is_taken(server: Server, tmp_path: Path) -> None:
    for name, content in ((f"{ARCHIVE}.part", server.files[ARCHIVE]), (f"{ARCHIVE}.part.tag", b'"1"')):
        (tmp_path / name).write_bytes(content)
    only_photographs(server, tmp_path)
    check_photographs(tmp_path)
    assert server.sent == 0


def test_too_long_a_length_is_a_broken_download(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.spoil[ARCHIVE] = ["too long"] * download.ATTEMPTS
    with pytest.raises(InputError, match=r"ended after \d+ of \d+ bytes; 5 attempts"):
        only_photographs(server, tmp_path)
    assert not (tmp_path / FOLDER).exists()


def test_too_short_a_length_is_a_damaged_archive(server: Server, tmp_path: Path) -> None:
    server.spoil[ARCHIVE] = ["too short"]
    with pytest.raises(InputError, match=rf"{ARCHIVE}: damaged, and deleted"):
        only_photographs(server, tmp_path)
    assert list(tmp_path.iterdir()) == []
    only_photographs(server, tmp_path)
    check_photographs(tmp_path)


@pytest.mark.parametrize(("way", "message"), [("404", "answers 404 Not Found"), ("page", "a web page comes")])
def test_error_page_is_told(server: Server, tmp_path: Path, way: str, message: str) -> None:
    server.spoil[ARCHIVE] = [way]
    with pytest.raises(InputError, match=rf"{ARCHIVE}.*{message}.*--url"):
        only_photographs(server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_passing_errors_are_waited_for(server: Server, tmp_path: Path) -> None:
    server.spoil[ARCHIVE] = ["503", "500", "429"]
    only_photographs(server, tmp_path)
    check_photographs(tmp_path)


def test_lasting_errors_end_the_run(server: Server, tmp_path: Path) -> None:
    server.spoil[ARCHIVE] = ["503"] * download.ATTEMPTS
    with pytest.raises(InputError, match="HTTP 503 Service Unavailable; 5 attempts"):
        only_photographs(server, tmp_path)


def test_no_server_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSE", 0.001)
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:9/.*5 attempts"):
        download.fetch(tmp_path, "http://127.0.0.1:9/", ["val", "labels"], keep=False)


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
def test_what_is_no_address_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--url {re.escape(url)}"):
        download.fetch(tmp_path, url, [], keep=False)


def test_second_download_into_a_folder_is_refused(server: Server, tmp_path: Path) -> None:
    with download.alone(tmp_path), pytest.raises(InputError, match=f"{tmp_path}: another download is at work"):
        only_photographs(server, tmp_path)
    assert server.requests == []
    only_photographs(server, tmp_path)
    check_photographs(tmp_path)


@pytest.mark.parametrize("name", ["../evil.jpg", "a/../../evil.jpg", "/tmp/evil.jpg", "..\\evil.jpg", "C:evil.jpg"])
def test_archive_that_leads_outside_is_refused(server: Server, tmp_path: Path, name: str) -> None:
    server.files[ARCHIVE] = archive(photographs(100) | {name: b"evil"})
    out = tmp_path / "in" / "here"
    with pytest.raises(InputError, match=r"leads outside\. Nothing was unpacked"):
        only_photographs(server, out)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [ARCHIVE]


def test_archive_with_a_link_is_refused(server: Server, tmp_path: Path) -> None:
    link = f"{FOLDER}/ISIC_0000009.jpg"
    server.files[ARCHIVE] = archive(photographs(100) | {link: b"/etc/passwd"}, links=(link,))
    with pytest.raises(InputError, match=r"ISIC_0000009.*is a link"):
        only_photographs(server, tmp_path)
    assert not (tmp_path / FOLDER).exists()


def test_archive_that_blows_up_is_refused(server: Server, tmp_path: Path) -> None:
    server.files[ARCHIVE] = archive({f"{FOLDER}/ISIC_0000009.jpg": bytes(10**7)}, method=zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="that would unpack to 10000000"):
        only_photographs(server, tmp_path)
    assert not (tmp_path / FOLDER).exists()


def test_wrong_check_sum_in_an_archive_is_damage(server: Server, tmp_path: Path) -> None:
    content = server.files[ARCHIVE]
    place = content.index(photographs()[f"{FOLDER}/ISIC_0000001.jpg"])
    server.files[ARCHIVE] = content[:place] + b"x" + content[place + 1 :]
    with pytest.raises(InputError, match=r"damaged, and deleted \(Bad CRC-32"):
        only_photographs(server, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_archive_of_something_else_is_told(server: Server, tmp_path: Path) -> None:
    server.files[ARCHIVE] = archive({"thesis.pdf": b"words"})
    with pytest.raises(InputError, match=f"{ARCHIVE}: no images in it"):
        only_photographs(server, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [ARCHIVE]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_no_damage_escapes(method: int, tmp_path: Path) -> None:
    (part,) = download.parts(tmp_path, ["val", "images"])
    whole = archive(photographs(20), method=method)
    rng, damaged = np.random.default_rng(method), 0
    for _ in range(700):
        content = bytearray(whole)
        for place in rng.integers(0, len(content), rng.integers(1, 5)):
            content[place] = rng.integers(0, 256)
        part.file.write_bytes(content)
        try:
            download.unpack(part)
            shutil.rmtree(part.target)
        except InputError:
            damaged += 1
        assert not part.unpacking.exists()
    assert damaged > 300


def test_label_file_that_is_none_is_deleted(server: Server, tmp_path: Path) -> None:
    server.files[LABELS] = b"<Error>no such key</Error>"
    with pytest.raises(InputError, match=r"no column.*deleted, run again"):
        download.fetch(tmp_path, server.url, ["val", "labels"], keep=False)
    assert list(tmp_path.iterdir()) == []


def test_md5_of_another_is_told_and_no_error(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_photographs(server, tmp_path)
    (warning,) = [text for text in caplog.messages if "MD5" in text]
    assert "a third-party list says 8d6419d942112f709894c0d82f6c9038" in warning
    shutil.rmtree(tmp_path / FOLDER)
    caplog.clear()
    found = re.search(r"has MD5 (\w{32})", warning)
    assert found
    monkeypatch.setitem(download.MD5, ARCHIVE, found[1])
    only_photographs(server, tmp_path)
    assert not [record for record in caplog.records if "MD5" in record.message and record.levelname == "WARNING"]


@pytest.mark.parametrize(("keep", "times"), [(False, 2), (True, 2)])
def test_full_disk_is_told_before_anything_is_fetched(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool, times: int
) -> None:
    needed = times * len(server.files[ARCHIVE])
    for free, fits in ((needed - 1, False), (needed, True)):
        usage = shutil._ntuple_diskusage(10**12, 0, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        with contextlib.nullcontext() if fits else pytest.raises(InputError, match="GB needed"):
            download.fetch(tmp_path, server.url, ["val", "images"], keep)
        assert bool(server.sent) == fits


def test_leftovers_of_a_killed_run_are_gone_before_space_is_counted(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (part,) = download.parts(tmp_path, ["val", "images"])
    part.unpacking.mkdir()
    usage = shutil._ntuple_diskusage(10**12, 0, 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: pytest.fail("left") if part.unpacking.exists() else usage)
    only_photographs(server, tmp_path)
    check_photographs(tmp_path)


def test_archives_beside_each_other_need_more_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dict(zip(download.parts(tmp_path, ["images"]), (50, 10, 40), strict=True))
    for keep, needed in ((True, 200), (False, 150)):
        for free in (needed - 1, needed):
            usage = shutil._ntuple_diskusage(10**12, 0, free)
            monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
            with contextlib.nullcontext() if free == needed else pytest.raises(InputError):
                download.check_space(tmp_path, sizes, keep)


@pytest.mark.parametrize("moment", ["growing", "unpacking"])
def test_killed_download_is_finished_by_the_same_command(server: Server, tmp_path: Path, moment: str) -> None:
    if moment == "unpacking":
        many = {f"{FOLDER}/ISIC_{number:07d}.jpg": os.urandom(100) for number in range(5_000)}
        server.files[ARCHIVE] = archive(many)
    else:
        server.pause = 0.05
    script = str(pipeline.ROOT / "download_data.py")
    words = [sys.executable, script, "--url", server.url, "--out", str(tmp_path), "--only", "val", "images"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    part, temporary = tmp_path / f"{ARCHIVE}.part", tmp_path / f".{FOLDER}.tmp"
    while not (part.exists() and part.stat().st_size if moment == "growing" else temporary.exists()):
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / FOLDER).exists()
    kept = part.stat().st_size if part.exists() else 0
    server.pause = 0.0
    server.requests.clear()
    subprocess.run(words, check=True, capture_output=True)
    if moment == "growing":
        check_photographs(tmp_path)
        assert ranges(server) == [f"bytes={kept}-"]
    else:
        assert len(list((tmp_path / FOLDER).iterdir())) == len(many)
        assert ranges(server) == []
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]
