"""The files below a source folder: images, lesion masks and tables, whatever the layout."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from melanoma.errors import InputError
from melanoma.sources import csv_table
from melanoma.sources.records import IMAGE_SUFFIXES, LeftOut

UNREAD_SUFFIXES = {
    *(".gif", ".heic", ".heif", ".avif", ".dcm", ".jp2", ".j2k", ".psd", ".cr2", ".nef", ".dng", ".svg"),
    *(".ppm", ".pgm", ".pbm", ".tga", ".ico"),
}
TABLE_SUFFIXES = {".csv", ".tsv", ".tab", ".txt", ""}
OTHER_TABLE_SUFFIXES = {".xlsx", ".xls", ".ods", ".json"}  # that are not read
NO_TABLE = re.compile(r"licen[cs]e|attribution|readme|synthetic|manifest|notice")  # in the name of a text
# First bytes of images whose names have no usual suffix: JPEG, PNG, TIFF, BMP, WebP.
SIGNATURE = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n|II\*\0|MM\0\*|BM....\0\0|RIFF....WEBP", re.DOTALL)
SIGNATURE_BYTES = 12

# A mask has the name of its image with one of these endings, or the name itself in a folder of masks.
MASK_ENDING = re.compile(r"[-_ ](segmentation|mask|seg|gt|groundtruth|binary|lesion)(?:[-_ ]?v?\d)?$")
MASK_FOLDER = re.compile(r"(?<![a-z])masks?(?![a-z])|segmentation|ground[ _-]?truth|^imd\d+_lesion$")
IMAGE_FOLDER = re.compile(r"(?<![a-z])(images?|photos?|pictures?|jpe?g|input|data)(?![a-z])")
# Files of the challenges and of PH2 that look like images or masks, by the end of their names.
NO_IMAGES = {
    "superpixel files": re.compile(r"_superpixels$"),
    "masks of dermoscopic attributes": re.compile(r"_attribute_\w+$"),
    "masks of colour regions": re.compile(r"_r\d+_label\d+$"),
}
HIDDEN_FOLDERS = {"__macosx"}
SPLIT_WORD = re.compile(r"(?<![a-z])(train|val|test)(?:ing|id|idation)?(?![a-z])")

TWIN = "same name and content as another file"
ORPHAN = "mask without an image"
NOT_IN_LAYOUT = "not in a folder of this layout"
NOT_USED = "not used"  # in place of a split: the file belongs to no part of the layout

SplitOf = Callable[[Path], str | None]  # from the path of a file, relative to the source, to its split or NOT_USED


@dataclass(frozen=True)
class Pair:
    """An image and its mask."""

    id: str
    split: str | None
    image: Path
    mask: Path | None


@dataclass
class Files:
    """The files below a folder.

    Attributes:
        root: the folder.
        images: images and masks.
        table_paths: files that may be tables.
        skipped: number of files that are neither, by what they are.
        unread: image files whose format is not read.
        other_tables: tables whose format is not read.
    """

    root: Path
    images: list[Path] = field(default_factory=list)
    table_paths: list[Path] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    unread: list[Path] = field(default_factory=list)
    other_tables: list[Path] = field(default_factory=list)

    def relative(self, path: Path) -> Path:
        """Path relative to the folder."""
        return path.relative_to(self.root)

    @cached_property
    def headers(self) -> dict[Path, set[str]]:
        """Cells of the first line of every file that may be a table, in lower case."""
        return {path: csv_table.header(path) for path in self.table_paths if path.suffix.lower() != ".txt"}

    def table_paths_with(self, *columns: str) -> list[Path]:
        """The tables that have all these columns."""
        return [path for path, header in self.headers.items() if set(columns) <= header]

    def require_tables(self, *columns: str) -> list[csv_table.Table]:
        """Reads the tables that have all these columns.

        Raises:
            InputError: there is none, or one cannot be read or has no rows.
        """
        paths = self.table_paths_with(*columns)
        if not paths:
            raise InputError(f"{self.root}: no table with the columns {', '.join(columns)}")
        tables = [csv_table.read(path) for path in paths]
        for table in tables:
            if table.columns.empty:
                raise InputError(f"{table.path}: no lines below the header")
        return tables

    @cached_property
    def folders(self) -> set[str]:
        """Names of the folders above any image."""
        return {folder for path in self.images for folder in self.relative(path).parent.parts}

    def named(self, pattern: re.Pattern[str]) -> bool:
        """Whether a folder above any image matches a pattern, in lower case."""
        return any(pattern.fullmatch(folder.lower()) for folder in self.folders)

    def unused_tables(self, used: Sequence[Path]) -> list[Path]:
        """Files that may be tables and are not among the used ones."""
        candidates = [path for path in self.table_paths if path.suffix] + self.other_tables
        names = [path for path in candidates if not NO_TABLE.search(path.name.lower())]
        return [self.relative(path) for path in names if path not in used]


def scan(root: Path, outputs: Sequence[Path] = ()) -> Files:
    """Lists the files below a folder; hidden files and folders are skipped and counted.

    Args:
        root: the folder.
        outputs: folders below it that are not read, because a run writes its arrays and figures there.

    Raises:
        InputError: a folder cannot be read, or a file name is not valid text.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: this folder cannot be read ({error.strerror})")

    files, visited = Files(root), {os.path.realpath(folder) for folder in outputs} - {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:
            folders.clear()
            continue
        visited.add(real)
        hidden = [name for name in folders if name.startswith(".") or name.lower() in HIDDEN_FOLDERS]
        files.skipped["hidden folders"] += len(hidden)
        folders[:] = sorted(set(folders) - set(hidden))
        for name in sorted(names):
            _sort_in(files, Path(folder, name))
    return files


def _sort_in(files: Files, path: Path) -> None:
    """Adds a file to the list of its kind."""
    if path.name.startswith("."):
        files.skipped["hidden files"] += 1
        return
    suffix = path.suffix.lower()
    if suffix in OTHER_TABLE_SUFFIXES:
        files.other_tables.append(path)
        return
    known = suffix in UNREAD_SUFFIXES | TABLE_SUFFIXES
    is_image = suffix in IMAGE_SUFFIXES or ((not known or not suffix) and _begins_as_image(path))
    if not is_image and not known:
        return
    try:
        str(files.relative(path)).encode()
    except UnicodeEncodeError:
        raise InputError(f"{str(path)!a}: this file name is not valid UTF-8; rename the file") from None
    for what, pattern in NO_IMAGES.items():
        if pattern.search(path.stem.lower()):
            files.skipped[what] += 1
            return
    kind = files.images if is_image else files.unread if suffix in UNREAD_SUFFIXES else files.table_paths
    kind.append(path)


def _begins_as_image(path: Path) -> bool:
    """Whether a file without a usual suffix begins as an image does."""
    try:
        with path.open("rb") as stream:
            return bool(SIGNATURE.match(stream.read(SIGNATURE_BYTES)))
    except OSError:
        return False


def key(name: str) -> str:
    """An id for comparison, regardless of upper and lower case and of how accents are encoded."""
    return unicodedata.normalize("NFC", name).casefold()


def split_by_folder(relative: Path) -> str | None:
    """The split that the name of a folder above a file contains: train, val or test; None if there is none."""
    for folder in relative.parent.parts:
        if found := SPLIT_WORD.search(folder.lower()):
            return found[1]
    return None


def no_split(relative: Path) -> str | None:
    """For layouts without splits."""
    return None


def pair(files: Files, split_of: SplitOf) -> tuple[list[Pair], list[LeftOut]]:
    """Matches images with their masks by name.

    Args:
        files: the files of the source.
        split_of: which split a file belongs to.

    Returns:
        Images sorted by split and id; and masks without an image, second copies, and files that belong to no split.

    Raises:
        InputError: two images, or two masks, of one split have the same id.
    """
    relative = {path: files.relative(path) for path in files.images}
    masks = find_masks(files)
    left_out = [LeftOut(str(files.relative(path)), "format is not read") for path in files.unread]
    used: dict[bool, dict[tuple[str | None, str], Path]] = {False: {}, True: {}}
    for path in files.images:
        split, of_mask = split_of(relative[path]), path in masks
        if split == NOT_USED:
            left_out.append(LeftOut(str(relative[path]), NOT_IN_LAYOUT))
            continue
        name = MASK_ENDING.sub("", path.stem.lower()) if of_mask else path.stem
        first = used[of_mask].setdefault((split, key(name)), path)
        if first != path:
            _refuse_twins(first, path)
            left_out.append(LeftOut(f"{relative[path]} = {relative[first]}", TWIN))
    masks_by_id = used[True]
    pairs = [
        Pair(path.stem, split, path, masks_by_id.pop((split, name), None) or masks_by_id.pop((None, name), None))
        for (split, name), path in used[False].items()
    ]
    left_out += [LeftOut(str(relative[path]), ORPHAN) for path in masks_by_id.values()]
    return sorted(pairs, key=lambda one: (one.split or "", one.id)), left_out


def find_masks(files: Files) -> set[Path]:
    """The files that are masks by the name of their folder or their own name."""
    in_folder = {path for path in files.images if _is_below_masks(files.relative(path))}
    if len(in_folder) == len(files.images):  # a folder of images with a name like that of a mask folder
        in_folder = set()
    stems = {path.stem.lower() for path in files.images}
    by_name = {
        path
        for path in files.images
        if (found := MASK_ENDING.search(stem := path.stem.lower()))
        and (found[1] != "lesion" or stem[: found.start()] in stems)
    }  # "lesion" alone may also name an image
    return in_folder | by_name


def find_masks_of_images(folders: Collection[Files]) -> set[Path]:
    """The masks in folders whose image is in one of these too: a single image may have a name like that of a mask."""
    masks = {mask for files in folders for mask in find_masks(files)}
    paths = [path for files in folders for path in files.images]
    names, names_of_images = ({key(path.stem) for path in some} for some in (paths, {*paths} - masks))
    stems = {mask: (name := key(mask.stem), MASK_ENDING.sub("", name)) for mask in masks}
    return {mask for mask, (name, base) in stems.items() if base in (names_of_images if base == name else names)}


def _is_below_masks(relative: Path) -> bool:
    """Whether the nearest folder whose name says what it contains is one of masks."""
    for folder in reversed(relative.parent.parts):
        if MASK_FOLDER.search(folder.lower()):
            return True
        if IMAGE_FOLDER.search(folder.lower()):
            return False
    return False


def _refuse_twins(first: Path, second: Path) -> None:
    """Accepts a file of the same name and content in another folder only."""
    if first.name != second.name or first.read_bytes() != second.read_bytes():
        raise InputError(
            f"two files have the same id: {first} and {second}; remove or rename one, or put a mask into a folder "
            "named masks"
        )


def unused_folders(left_out: Sequence[LeftOut]) -> dict[str, int]:
    """The folders whose images belong to no part of the layout, and how many these are."""
    folders = Counter(str(Path(one.name).parent) for one in left_out if one.reason == NOT_IN_LAYOUT)
    return dict(sorted(folders.items()))
