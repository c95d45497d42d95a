"""The official ISIC 2017 archives: fetched with resume, checked, unpacked safely.

At any moment an archive is NAME.part (growing), NAME (whole) or gone, and a folder is not there or complete: whatever
ends a run, the same command finishes the work.
"""

import contextlib
import errno
import fcntl
import hashlib
import http.client
import lzma
import os
import shutil
import stat
import struct
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from melanoma import command, isic
from melanoma.command import log
from melanoma.errors import InputError

from tqdm import tqdm

URL = "https://isic-challenge-data.s3.amazonaws.com/2017/"
KINDS = ("images", "masks", "labels")
ENDINGS = {"images": ".jpg", "masks": "_segmentation.png"}  # of the files to unpack

# Not the challenge's own: from one third-party download script.
MD5 = {
    "ISIC-2017_Training_Data.zip": "a14a7e622c67a358797ae59abb8a0b0c",
    "ISIC-2017_Training_Part1_GroundTruth.zip": "77fdbeb6fbec4139937224416b250f4c",
    "ISIC-2017_Validation_Data.zip": "8d6419d942112f709894c0d82f6c9038",
    "ISIC-2017_Validation_Part1_GroundTruth.zip": "64d3e68fa2deeb8a5e89aa8dec2efd44",
    "ISIC-2017_Test_v2_Data.zip": "5f6a0b5e1f2972bd1f5ea02680489f09",
    "ISIC-2017_Test_v2_Part1_GroundTruth.zip": "b1742de6bd257faca3b2b21a4aa3b781",
}

TIMEOUT = 60.0  # seconds without a byte before the connection is given up
ATTEMPTS = 5  # in a row without a new byte
PAUSE = 2.0  # seconds before the second attempt; doubles with each
PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP answers after which another attempt makes sense
BLOCK = 1 << 20  # bytes read at a time, at most

EXPANSION = 20  # times an archive's size that its content may have: photographs hardly shrink

# What zipfile raises on damaged archives, and the OSErrors among it: bad bzip2 data, a place before the start, one name
# twice.
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, IndexError, RuntimeError, ValueError)
NOT_THE_DISK = {None, errno.EINVAL, errno.EEXIST}


@dataclass(frozen=True)
class Part:
    """One archive or CSV of the challenge, and the folder or file that it becomes."""

    split: str
    kind: str
    target: Path

    @property
    def file(self) -> Path:
        """Where it is downloaded to."""
        return self.target if self.kind == "labels" else self.target.with_name(self.target.name + ".zip")

    @property
    def growing(self) -> Path:
        """Its beginning, while it comes."""
        return self.file.with_name(self.file.name + ".part")

    @property
    def unpacking(self) -> Path:
        """Its folder, while it is filled."""
        return self.target.with_name(f".{self.target.name}.tmp")

    @property
    def tag(self) -> Path:
        """The server's word for the version that the beginning is of."""
        return self.file.with_name(self.file.name + ".part.tag")


class BrokenOff(Exception):
    """The connection failed in a way that may pass."""


def parts(out: Path, only: Sequence[str]) -> list[Part]:
    """What to fetch: everything, or of `only`'s splits and kinds."""
    splits = [split for split in isic.SPLITS if split in only] or isic.SPLITS
    kinds = [kind for kind in KINDS if kind in only] or KINDS
    places: dict[str, Callable[[Path, str], Path]] = {
        "images": isic.image_folder,
        "masks": isic.mask_folder,
        "labels": isic.label_file,
    }
    return [Part(split, kind, places[kind](out, split)) for split in splits for kind in kinds]


def connect(url: str, headers: dict[str, str], method: str = "GET") -> http.client.HTTPResponse:
    """Sends a request.

    Raises:
        BrokenOff: no answer, or one that may pass.
        InputError: an answer that will not; 416, the range asked for is not there, comes as HTTPError.
    """
    request = urllib.request.Request(url, headers=headers | {"Accept-Encoding": "identity"}, method=method)
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.code in PASSING:
            raise BrokenOff(f"HTTP {error.code} {error.reason}") from None
        raise InputError(f"{url}: the server answers {error.code} {error.reason}; is --url right?") from None
    except (OSError, http.client.HTTPException) as error:
        raise BrokenOff(str(getattr(error, "reason", error)) or type(error).__name__) from None


def patiently(url: str, attempt: Callable[[], int], done: Callable[[], int]) -> int:
    """Repeats an attempt that breaks off, with growing pauses, until ATTEMPTS in a row bring no new byte.

    Raises:
        InputError: they did not.
    """
    failures, before = 0, done()
    while True:
        try:
            return attempt()
        except BrokenOff as error:
            failures = 1 if done() > before else failures + 1
            before = max(before, done())
            if failures == ATTEMPTS:
                raise InputError(f"{url}: {error}; {ATTEMPTS} attempts. What came is kept: run again later") from None
            log.info("%s: %s; trying again", url.rpartition("/")[2], error)
            time.sleep(PAUSE * 2 ** (failures - 1))


def length(url: str) -> int:
    """Bytes that the server announces; 0 where it does not."""

    def ask() -> int:
        with connect(url, {}, "HEAD") as response:
            return int(response.headers.get("Content-Length") or 0)

    return patiently(url, ask, lambda: 0)


def transfer(url: str, part: Part) -> int:
    """Fetches a file, or what is missing of it, in one request; returns its size in bytes.

    Raises:
        BrokenOff: the connection ended early; what came is kept.
        InputError: it is a web page, or the server will not give it.
    """
    start = part.growing.stat().st_size if part.growing.is_file() and part.tag.is_file() else 0
    headers = {"Range": f"bytes={start}-", "If-Range": part.tag.read_text()} if start else {}
    try:
        response = connect(url, headers)
    except urllib.error.HTTPError as error:
        if error.headers.get("Content-Range") == f"bytes */{start}":  # it was whole already
            return start
        part.tag.unlink()
        raise BrokenOff("the file is another one now") from None
    with response:
        if response.headers.get_content_type() == "text/html":
            raise InputError(f"{url}: a web page comes in place of the file; is --url right?")
        version = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            start = 0
        elif version != headers.get("If-Range"):
            part.tag.unlink()
            raise BrokenOff("the file is another one now")
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.tag.unlink()
            raise BrokenOff(f"asked for bytes from {start}, got {response.headers.get('Content-Range')}")
        announced = response.headers.get("Content-Length")
        total = start + int(announced) if announced else None
        part.tag.unlink(missing_ok=True)
        if start == 0:
            part.growing.unlink(missing_ok=True)
        if version and not version.startswith("W/"):
            part.tag.write_text(version)
        with part.growing.open("ab") as stream:
            receive(response, stream, start, total, part.file.name)
            os.fsync(stream.fileno())
    size = part.growing.stat().st_size
    if total is not None and size < total:
        raise BrokenOff(f"ended after {size} of {total} bytes")
    return size


def receive(response: http.client.HTTPResponse, stream: BinaryIO, start: int, total: int | None, name: str) -> None:
    """Copies what comes, with a bar that tells speed and time left; now and then a line where there is no terminal."""
    interval = 0.1 if sys.stderr.isatty() else 30.0
    with tqdm(desc=name, total=total, initial=start, unit="B", unit_scale=True, mininterval=interval) as bar:
        while True:
            try:
                block = response.read1(BLOCK)
            except (OSError, http.client.HTTPException) as error:
                raise BrokenOff(str(error) or type(error).__name__) from None
            if not block:
                return
            stream.write(block)
            bar.update(len(block))


def check_md5(path: Path) -> None:
    """Compares with the third-party MD5, where there is one; a difference is told and no error."""
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "md5").hexdigest()
    expected = MD5.get(path.name)
    if expected and found != expected:
        log.warning("warning: %s has MD5 %s, a third-party list says %s", path.name, found, expected)
    else:
        log.info("%s has MD5 %s%s", path.name, found, ", as a third-party list says" if expected else "")


def check_labels(path: Path) -> None:
    """Reads a label file that just came.

    Raises:
        InputError: it is none; it is deleted then.
    """
    try:
        isic.read_labels(path)
    except InputError as error:
        path.unlink()
        raise InputError(f"{error}; deleted, run again to fetch it anew") from None


def check_members(archive: Path, members: list[zipfile.ZipInfo]) -> None:
    """Refuses an archive that could harm.

    Raises:
        InputError: a member has a path outside, or is a link; or the content is many times as large as the archive.
    """
    for member in members:
        name = member.filename
        outside = name.startswith("/") or "\\" in name or ":" in name or ".." in PurePosixPath(name).parts
        if outside or stat.S_ISLNK(member.external_attr >> 16):
            raise InputError(
                f"{archive}: refused, {name!r} in it is a link or leads outside. Nothing was unpacked; this is not the "
                "challenge's archive: delete it, and fetch it from another place"
            )
    content, size = sum(member.file_size for member in members), archive.stat().st_size
    if content > EXPANSION * size:
        raise InputError(f"{archive}: refused, {size} bytes that would unpack to {content}; delete it")


def unpack(part: Part) -> None:
    """Unpacks the photographs or masks of an archive into their folder, which appears only when it is complete.

    Raises:
        InputError: the archive is damaged (it is deleted then), could harm, or holds none of them.
    """
    part.unpacking.mkdir()
    left_out: Counter[str] = Counter()
    try:
        with zipfile.ZipFile(part.file) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            check_members(part.file, members)
            for member in command.progress(members, f"unpacking {part.file.name}", len(members)):
                name = PurePosixPath(member.filename).name
                if isic.SUPERPIXELS in name:
                    left_out["superpixel files"] += 1
                elif name.startswith(".") or not name.endswith(ENDINGS[part.kind]):
                    left_out["other files"] += 1
                else:
                    with archive.open(member) as source, (part.unpacking / name).open("xb") as stream:
                        shutil.copyfileobj(source, stream)
        if not any(part.unpacking.iterdir()):
            raise InputError(f"{part.file}: no {part.kind} in it; delete it, and fetch it from another place")
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NOT_THE_DISK:
            raise
        part.file.unlink()
        raise InputError(f"{part.file}: damaged, and deleted ({error}); run again to fetch it anew") from None
    finally:
        if sys.exc_info()[0]:
            shutil.rmtree(part.unpacking, ignore_errors=True)
    os.sync()
    part.unpacking.rename(part.target)
    for what, count in left_out.items():
        log.info("%s: %d %s left out", part.file.name, count, what)


def check_space(out: Path, sizes: dict[Part, int], keep: bool) -> None:
    """Compares what is needed with what is free, before anything is fetched.

    Raises:
        InputError: it would not fit.
    """
    archives = [size for part, size in sizes.items() if part.kind != "labels"]
    besides = sum(archives) if keep else max(archives, default=0)  # archives that lie there beside all the photographs
    have = sum(path.stat().st_size for part in sizes for path in (part.growing, part.file) if path.is_file())
    needed, free = sum(sizes.values()) + besides - have, shutil.disk_usage(out).free
    if needed > free:
        raise InputError(
            f"{out}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; another --out, or less: --only"
        )
    fetched = sum(sizes.values()) - have
    log.info("%.1f GB to fetch; %.1f GB of disk needed, %.1f GB free", fetched / 1e9, needed / 1e9, free / 1e9)


def check_url(url: str) -> None:
    """Refuses what no request can be sent to.

    Raises:
        InputError: says why.
    """
    try:
        parsed = urllib.parse.urlsplit(url)
        url.encode("ascii")
        usable = parsed.scheme in ("http", "https") and parsed.hostname and parsed.port != 0
    except ValueError as error:
        raise InputError(f"--url {url}: {error}") from None
    if not usable:
        raise InputError(f"--url {url}: not of the form http://host/folder or https://host/folder")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps a second download out of a folder.

    Raises:
        InputError: one is at work there.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another download is at work in this folder") from None
        yield
    finally:
        os.close(handle)


def obtain(url: str, part: Part) -> None:
    """Fetches one archive or CSV, over as many requests as it takes, and checks it.

    Raises:
        InputError: it cannot be had, or is not what it should be.
    """

    def received() -> int:
        return part.growing.stat().st_size if part.growing.exists() else 0

    patiently(url, lambda: transfer(url, part), received)
    part.tag.unlink(missing_ok=True)
    if part.kind == "labels":
        check_labels(part.growing)
    part.growing.replace(part.file)
    check_md5(part.file)


def report(part: Part) -> None:
    """Tells how many photographs, masks or labels are there."""
    expected = isic.OFFICIAL_COUNTS[part.split]
    if part.kind == "labels":
        count = len(isic.read_labels(part.target))
    else:
        count = sum(path.name.endswith(ENDINGS[part.kind]) for path in part.target.iterdir())
    if count == expected:
        log.info("%s: %d %s", part.target, count, part.kind)
    else:
        log.warning("warning: %s: %d %s, the challenge has %d", part.target, count, part.kind, expected)


def fetch(out: Path, url: str, only: Sequence[str], keep: bool) -> None:
    """Fetches and unpacks what is not there yet, and reports what is.

    Args:
        out: folder to fill; made where needed.
        url: folder of the archives, http or https.
        only: some of `isic.SPLITS` and KINDS, or nothing for everything.
        keep: whether archives stay after unpacking.

    Raises:
        InputError: not enough space, no answer, a file that is not what it should be; says what to do.
    """
    check_url(url)
    out.mkdir(parents=True, exist_ok=True)
    wanted = parts(out, only)
    with alone(out):
        missing = [part for part in wanted if not part.target.exists()]
        places = {part: f"{url.rstrip('/')}/{part.file.name}" for part in missing}
        for part in missing:
            shutil.rmtree(part.unpacking, ignore_errors=True)
        if missing:
            there = {part: part.file.stat().st_size for part in missing if part.file.exists()}
            check_space(out, {part: there.get(part) or length(places[part]) for part in missing}, keep)
        for part in missing:
            if not part.file.exists():
                obtain(places[part], part)
            if part.kind != "labels":
                unpack(part)
                if not keep:
                    part.file.unlink()
        for part in wanted:
            report(part)
    log.info("next: python segmentation_01_preprocessing.py --source %s --check", out)
