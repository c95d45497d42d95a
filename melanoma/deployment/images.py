"""The images to predict: which files, under which names, and how they are read."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from melanoma.dataset import decode
from melanoma.dataset.workers import Workers
from melanoma.errors import InputError
from melanoma.log import log
from melanoma.sources import files

import numpy as np

PREVIEW = 512  # pixels; side of the image that the overlay shows
PER_WORKER = 8  # fewer images for each thread are not worth its start


@dataclass(frozen=True)
class ImageFile:
    """A file to predict."""

    path: Path
    name: str  # under which its results are written: no two are equal, also where upper and lower case are the same

    def state(self) -> tuple[str, str]:
        """Absolute path, what is not UTF-8 escaped; and time of the last change, ISO 8601 in UTC, "" without a file."""
        try:
            changed = datetime.fromtimestamp(self.path.stat().st_mtime, UTC).isoformat()
        except (OSError, ValueError, OverflowError):
            changed = ""
        return escaped(os.path.realpath(self.path)), changed


@dataclass(frozen=True)
class Read:
    """A file that was read."""

    file: ImageFile
    image: np.ndarray  # uint8 (S, S, 3), as the networks see it
    preview: np.ndarray  # uint8 (PREVIEW, PREVIEW, 3), as the overlay shows it
    size: tuple[int, int]  # width and height of the file in pixels
    flags: tuple[str, ...]  # why it may not be an image of a lesion, see `decode.image_doubts`
    state: tuple[str, str]  # of the file when it was read, see `ImageFile.state`


@dataclass(frozen=True)
class Broken:
    """A file that cannot be read."""

    file: ImageFile
    reason: str


def find(paths: Sequence[Path], outputs: Sequence[Path]) -> list[ImageFile]:
    """The images among these files and below these folders; masks of other images there are left out.

    Args:
        paths: files, which are taken whatever their names are, and folders.
        outputs: folders that are not read, because results are written there.

    Returns:
        In the order of `paths`, those of a folder by path.

    Raises:
        InputError: a path does not exist, a folder cannot be read, or there are no images.
    """
    found: dict[Path, PurePosixPath] = {}
    folders = {path: files.scan(path, outputs) for path in paths if path.is_dir()}
    masks = files.find_masks_of_images(folders.values())
    for path in paths:
        if inside := folders.get(path):
            for what, left_out in (
                ("masks of other images", [one for one in inside.images if one in masks]),
                ("images of other formats (save them as JPEG or PNG)", inside.unread),
            ):
                if left_out:
                    log.info("%s: %s are left out: %d, e.g. %s", path, what, len(left_out), left_out[0])
            names = {one: PurePosixPath(inside.relative(one).as_posix()) for one in inside.images if one not in masks}
        elif path.exists():
            names = {path: PurePosixPath(escaped(path.name))}
        else:
            raise InputError(f"{path} does not exist")
        for one, name in names.items():
            found.setdefault(one, name)
    if not found:
        raise InputError(f"no images in {', '.join(map(str, paths))}: see docs/data.md for the formats")
    return list(map(ImageFile, found, unique_names([*found.values()])))


def escaped(text: str) -> str:
    """A file name or path as text that can be written: bytes that are not UTF-8 are escaped."""
    return text.encode(errors="backslashreplace").decode()


def unique_names(paths: Sequence[PurePosixPath]) -> list[str]:
    """The shortest names that differ: without folder and extension, without extension, the path, and then numbered."""
    names = [path.stem for path in paths]
    for longer in (lambda path: str(path.with_suffix("")), str):
        counts = Counter(map(files.key, names))
        names = [
            name if counts[files.key(name)] == 1 else longer(path) for name, path in zip(names, paths, strict=True)
        ]
    used = Counter[str]()
    for place, name in enumerate(names):
        used[files.key(name)] += 1
        if (number := used[files.key(name)]) > 1:
            names[place] = f"{name}_{number}"
    return names


def read(task: tuple[ImageFile, int]) -> Read | Broken:
    """Reads a file for networks that see images of this side in pixels; for workers, so it raises no InputError."""
    file, size = task
    state = file.state()
    try:
        decoded = decode.read_pair(file.path, None, size)
        preview = decode.read_pair(file.path, None, PREVIEW).image
    except InputError as error:
        return Broken(file, str(error).removeprefix(f"{file.path}: "))
    return Read(file, decoded.image, preview, decoded.size, decoded.doubts, state)


def workers_for(count: int, jobs: int | None) -> Workers:
    """Where so many images are read: in threads, because other processes would import Keras."""
    return Workers(1 if count < PER_WORKER else jobs, threads=True)


def read_all(found: Sequence[ImageFile], size: int, workers: Workers) -> Iterator[Read | Broken]:
    """`read` of every file, in this order, some ahead of the consumer."""
    yield from workers.map(read, ((file, size) for file in found))
