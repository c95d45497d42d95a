"""Download of the challenges' official archives, with resume, checks and safe unpacking.

At any moment an archive is NAME.part (incomplete), NAME (complete) or deleted, and a folder is absent or complete.
After any interruption, the same command finishes the work.
"""

import errno
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
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from melanoma.errors import InputError
from melanoma.log import log, progress
from melanoma.sources.archives import MD5, Challenge, Part, parts
from melanoma.sources.files import NO_IMAGES

from tqdm import tqdm

TIMEOUT = 60.0  # seconds without a byte before a connection is closed
ATTEMPTS = 5  # in a row without a new byte
PAUSE = 2.0  # seconds before the second attempt; doubles with each further one
TEMPORARY_ERRORS = {408, 425, 429, 500, 502, 503, 504}  # HTTP status codes after which a request is repeated
BLOCK = 1 << 20  # bytes read at a time, at most

EXPANSION = 20  # an archive's content may be at most this many times its size; images are compressed already
ALWAYS_UNPACKED = 2_000_000  # bytes that may be unpacked from an archive of any size; labels compress well

# What zipfile raises on damaged archives. These OSErrors of it do not come from the disk: bad bzip2 data (no errno), a
# negative offset (EINVAL), a repeated name (EEXIST).
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, IndexError, RuntimeError, ValueError)
NOT_THE_DISK = {None, errno.EINVAL, errno.EEXIST}


class TemporaryError(Exception):
    """A request failed for a reason that may be temporary."""


def connect(url: str, headers: dict[str, str], method: str = "GET") -> http.client.HTTPResponse:
    """Sends a request.

    Raises:
        TemporaryError: no answer, or a temporary error.
        InputError: a permanent error.
        HTTPError: 416, the requested range does not exist.
    """
    request = urllib.request.Request(url, headers=headers | {"Accept-Encoding": "identity"}, method=method)
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.code in TEMPORARY_ERRORS:
            raise TemporaryError(f"HTTP {error.code} {error.reason}") from None
        raise InputError(f"{url}: the server answered {error.code} {error.reason}; check --url") from None
    except (OSError, http.client.HTTPException) as error:
        raise TemporaryError(str(getattr(error, "reason", error)) or type(error).__name__) from None


def retry(url: str, attempt: Callable[[], int], received: Callable[[], int]) -> int:
    """Repeats an attempt after temporary errors, with growing pauses.

    Args:
        url: for messages.
        attempt: the request.
        received: bytes received so far.

    Returns:
        The result of the attempt that succeeded.

    Raises:
        InputError: ATTEMPTS attempts in a row received no new byte.
    """
    failures, before = 0, received()
    while True:
        try:
            return attempt()
        except TemporaryError as error:
            failures = 1 if received() > before else failures + 1
            before = max(before, received())
            if failures == ATTEMPTS:
                raise InputError(
                    f"{url}: {error}; gave up after {ATTEMPTS} attempts. The received part is kept: run the command "
                    "again later"
                ) from None
            log.info("%s: %s; trying again", url.rpartition("/")[2], error)
            time.sleep(PAUSE * 2 ** (failures - 1))


def content_length(url: str) -> int:
    """Bytes that the server announces for a file; 0 if it announces none."""

    def request() -> int:
        with connect(url, {}, "HEAD") as response:
            return int(response.headers.get("Content-Length") or 0)

    return retry(url, request, lambda: 0)


def transfer(url: str, part: Part) -> int:
    """Downloads a file, or the missing rest of it, in one request.

    Returns:
        Its size in bytes.

    Raises:
        TemporaryError: the connection ended early; what was received is kept.
        InputError: the server answers with a web page or a permanent error.
    """
    start = part.incomplete.stat().st_size if part.incomplete.is_file() and part.tag.is_file() else 0
    headers = {"Range": f"bytes={start}-", "If-Range": part.tag.read_text()} if start else {}
    try:
        response = connect(url, headers)
    except urllib.error.HTTPError as error:
        if error.headers.get("Content-Range") == f"bytes */{start}":  # it was complete already
            return start
        part.tag.unlink()
        raise TemporaryError("the file on the server has changed") from None
    with response:
        if response.headers.get_content_type() == "text/html":
            raise InputError(f"{url}: the server sent a web page instead of the file; check --url")
        start = check_range(response, part, start, headers.get("If-Range"))
        announced = response.headers.get("Content-Length")
        total = start + int(announced) if announced else None
        part.tag.unlink(missing_ok=True)
        if start == 0:
            part.incomplete.unlink(missing_ok=True)
        version = server_version(response)
        if version and not version.startswith("W/"):  # weak ETags do not promise equal bytes
            part.tag.write_text(version)
        with part.incomplete.open("ab") as stream:
            receive(response, stream, start, total, part.file.name)
            os.fsync(stream.fileno())
    size = part.incomplete.stat().st_size
    if total is not None and size < total:
        raise TemporaryError(f"the connection ended after {size} of {total} bytes")
    return size


def server_version(response: http.client.HTTPResponse) -> str | None:
    """What identifies the version of a file: its ETag or modification time."""
    return response.headers.get("ETag") or response.headers.get("Last-Modified")


def check_range(response: http.client.HTTPResponse, part: Part, start: int, version: str | None) -> int:
    """Compares an answer with the request.

    Args:
        response: the answer.
        part: what was requested.
        start: first byte that was requested.
        version: the file's version when its beginning was received.

    Returns:
        First byte that the server sends: `start` or 0.

    Raises:
        TemporaryError: it sends another file or range; the next attempt starts from the beginning.
    """
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        return 0
    if server_version(response) != version:
        part.tag.unlink()
        raise TemporaryError("the file on the server has changed")
    if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        part.tag.unlink()
        raise TemporaryError(f"requested bytes from {start}, got {response.headers.get('Content-Range')}")
    return start


def receive(response: http.client.HTTPResponse, stream: BinaryIO, start: int, total: int | None, name: str) -> None:
    """Writes an answer to a file with a progress bar, updated every 30 seconds if there is no terminal."""
    interval = 0.1 if sys.stderr.isatty() else 30.0
    with tqdm(desc=name, total=total, initial=start, unit="B", unit_scale=True, mininterval=interval) as bar:
        while True:
            try:
                block = response.read1(BLOCK)
            except (OSError, http.client.HTTPException) as error:
                raise TemporaryError(str(error) or type(error).__name__) from None
            if not block:
                return
            stream.write(block)
            bar.update(len(block))


def check_md5(path: Path) -> None:
    """Logs the MD5 of a file; a difference from the third-party list is a warning, not an error."""
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "md5").hexdigest()
    expected = MD5.get(path.name)
    if expected and found != expected:
        log.warning("warning: %s has MD5 %s, a third-party list says %s", path.name, found, expected)
    else:
        log.info("%s has MD5 %s%s", path.name, found, ", as in a third-party list" if expected else "")


def check_labels(part: Part, path: Path, received: Path) -> None:
    """Reads a label file that was just received; does nothing for images and masks.

    Args:
        part: what was received.
        path: the CSV, not yet in its place.
        received: the CSV or the archive around it.

    Raises:
        InputError: it is not a label file; `received` is deleted.
    """
    if not part.files.read:
        return
    try:
        part.files.read(path)
    except InputError as error:
        received.unlink()
        raise InputError(f"{error}. The file was deleted: run the command again to download it") from None


def check_members(archive: Path, members: list[zipfile.ZipInfo]) -> None:
    """Refuses an archive that could do harm.

    Raises:
        InputError: a member is a link or has a path outside the folder, or the content is much larger than the archive.
    """
    for member in members:
        name = member.filename
        outside = name.startswith("/") or "\\" in name or ":" in name or ".." in PurePosixPath(name).parts
        if outside or stat.S_ISLNK(member.external_attr >> 16):
            raise InputError(
                f"{archive}: refused, because {name!r} in it is a link or leads outside the folder. Nothing was "
                "unpacked. This is not the challenge's archive: delete it and download it from another server"
            )
    content, size = sum(member.file_size for member in members), archive.stat().st_size
    if content > max(EXPANSION * size, ALWAYS_UNPACKED):
        raise InputError(f"{archive}: refused, because its {size} bytes would unpack to {content}; delete it")


def extract(part: Part) -> Counter[str]:
    """Writes the images, masks or labels of an archive to `part.unpacking`.

    Returns:
        How many files of which kind were skipped.

    Raises:
        InputError: the archive is damaged (it is deleted), could do harm, or contains nothing of its kind.
    """
    skipped: Counter[str] = Counter()
    try:
        with zipfile.ZipFile(part.file) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            check_members(part.file, members)
            for member in progress(members, f"unpacking {part.file.name}", len(members)):
                name = PurePosixPath(member.filename).name
                if NO_IMAGES["superpixel files"].search(PurePosixPath(name).stem.lower()):
                    skipped["superpixel files"] += 1
                elif name.startswith(".") or not name.endswith(part.files.suffix):
                    skipped["other files"] += 1
                else:
                    with archive.open(member) as source, (part.unpacking / name).open("xb") as stream:
                        shutil.copyfileobj(source, stream)
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NOT_THE_DISK:
            raise
        part.file.unlink()
        raise InputError(
            f"{part.file}: damaged and therefore deleted ({error}); run the command again to download it"
        ) from None
    if not any(part.unpacking.iterdir()):
        raise InputError(f"{part.file}: contains no {part.files.kind}; delete it and download it from another server")
    return skipped


def unpack(part: Part) -> None:
    """Unpacks an archive into its folder, which appears only when it is complete and its labels are valid.

    Raises:
        InputError: see `extract` and `check_labels`.
    """
    part.unpacking.mkdir()
    try:
        skipped = extract(part)
        check_labels(part, part.unpacking / part.csv, part.file)
        os.sync()
        part.unpacking.rename(part.target)
    finally:
        shutil.rmtree(part.unpacking, ignore_errors=True)  # absent after the rename
    for what, count in skipped.items():
        log.info("%s: %d %s skipped", part.file.name, count, what)


def check_space(out: Path, sizes: dict[Part, int], keep: bool) -> None:
    """Compares the disk space that is needed with what is free, before any download.

    Args:
        out: folder to fill.
        sizes: bytes of each part.
        keep: whether archives stay after unpacking.

    Raises:
        InputError: there is not enough space.
    """
    archives = [size for part, size in sizes.items() if part.zipped]
    temporary = sum(archives) if keep else max(archives, default=0)  # of archives beside the unpacked files
    present = sum(path.stat().st_size for part in sizes for path in (part.incomplete, part.file) if path.is_file())
    needed, free = sum(sizes.values()) + temporary - present, shutil.disk_usage(out).free
    if needed > free:
        raise InputError(
            f"{out}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; choose another --out, or download less "
            "with --only"
        )
    missing = sum(sizes.values()) - present
    log.info("%.1f GB to download; %.1f GB of disk needed, %.1f GB free", missing / 1e9, needed / 1e9, free / 1e9)


def check_url(url: str) -> None:
    """Checks that a URL can be requested.

    Raises:
        InputError: it cannot; says why.
    """
    try:
        parsed = urllib.parse.urlsplit(url)
        url.encode("ascii")
        usable = parsed.scheme in ("http", "https") and parsed.hostname and parsed.port != 0
    except ValueError as error:
        raise InputError(f"--url {url}: {error}") from None
    if not usable:
        raise InputError(f"--url {url}: not of the form http://host/folder or https://host/folder")


def obtain(url: str, part: Part) -> None:
    """Downloads one archive or CSV, in as many requests as needed, and checks it.

    Raises:
        InputError: the download fails, or the file is invalid.
    """

    def received() -> int:
        return part.incomplete.stat().st_size if part.incomplete.exists() else 0

    retry(url, lambda: transfer(url, part), received)
    part.tag.unlink(missing_ok=True)
    if not part.zipped:
        check_labels(part, part.incomplete, part.incomplete)
    part.incomplete.replace(part.file)
    check_md5(part.file)


def log_count(part: Part) -> None:
    """Logs how many images, masks or labels there are; a warning if the challenge has another number.

    Raises:
        InputError: the label file is invalid.
    """
    if part.files.read:
        try:
            count = len(part.files.read(part.target / part.csv if part.zipped else part.target))
        except InputError as error:
            raise InputError(f"{error}. Delete {part.target} and run the command again to download it") from None
    else:
        count = sum(path.name.endswith(part.files.suffix) for path in part.target.iterdir())
    if count == part.count:
        log.info("%s: %d %s", part.target, count, part.files.kind)
    else:
        log.warning("warning: %s: %d %s, the challenge has %d", part.target, count, part.files.kind, part.count)


def fetch(challenge: Challenge, out: Path, url: str, only: Sequence[str], keep: bool) -> None:
    """Downloads and unpacks what is missing, and logs what is there.

    Args:
        challenge: one of CHALLENGES.
        out: folder to fill; created if missing. No other download may run there at the same time.
        url: folder of the archives, http or https.
        only: some of SPLITS and KINDS; empty for everything.
        keep: whether archives stay after unpacking.

    Raises:
        InputError: the challenge has no such files, not enough space, no answer, or an invalid file; says what to do.
    """
    check_url(url)
    wanted = parts(challenge, out, only)
    out.mkdir(parents=True, exist_ok=True)
    if challenge.licence:
        log.info(challenge.licence)
    missing = [part for part in wanted if not part.target.exists()]
    urls = {part: f"{url.rstrip('/')}/{part.file.name}" for part in missing}
    for part in missing:
        shutil.rmtree(part.unpacking, ignore_errors=True)  # of an interrupted run
    if missing:
        complete = {part: part.file.stat().st_size for part in missing if part.file.exists()}
        check_space(out, {part: complete.get(part) or content_length(urls[part]) for part in missing}, keep)
    for part in missing:
        if not part.file.exists():
            obtain(urls[part], part)
        if part.zipped:
            unpack(part)
            if not keep:
                part.file.unlink()
    for part in wanted:
        log_count(part)
    log.info(challenge.next_step.format(out=out))
