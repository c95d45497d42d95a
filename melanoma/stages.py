"""The contract between the scripts: every file that passes from one to the next, and the only code that touches them.

`FILES` declares each file. Arrays of a split share their rows: row i of each belongs to row i of `{split}_ids.npy`; a
script run with `--limit` writes fewer rows, always the first ones. `manifest.json`, in the data folder, holds for every
file what wrote it, with which settings and seed, from which inputs (by SHA-256), and with which versions; a file whose
inputs have changed since is stale and is refused.

Save: check against the contract, temporary file in the same folder, fsync, rename, manifest entry.
Load: check against contract and manifest, no pickles, memory-mapped.
"""

import contextlib
import hashlib
import io
import json
import os
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from melanoma.errors import InputError, StageError
from melanoma.isic import SPLITS

import numpy as np

PREPROCESSING = "segmentation_01_preprocessing.py"
SEGNET = "segmentation_02_segnet_train.py"
MASKING = "image_mask_array.py"
CLASSIFIER = "densenet_train.py"
EVALUATION = "evaluate.py"
SCRIPTS = (PREPROCESSING, SEGNET, MASKING, CLASSIFIER, EVALUATION)


@dataclass(frozen=True)
class File:
    """One file of the contract.

    In names {split} is train, val or test, {backbone} the classifier's, {member} nothing, or _fold1, _seed2 and so on.
    In shapes N is the number of images, S their side in pixels, and C the backbone's number of features.
    """

    path: str
    writer: str
    readers: tuple[str, ...]
    dtype: str = ""  # of an array; "" for weights and JSON
    shape: tuple[str | int, ...] = ()
    low: float = -np.inf
    high: float = np.inf


FILES = {
    "ids": File(
        "arrays/{split}_ids.npy", PREPROCESSING, (SEGNET, MASKING, CLASSIFIER, EVALUATION), dtype="str", shape=("N",)
    ),
    "images": File(
        "arrays/{split}_images.npy", PREPROCESSING, (SEGNET, MASKING, EVALUATION), "uint8", ("N", "S", "S", 3), 0, 255
    ),
    "masks": File("arrays/{split}_masks.npy", PREPROCESSING, (SEGNET,), "uint8", ("N", "S", "S", 1), low=0, high=1),
    "labels": File(
        "arrays/{split}_labels.npy",
        PREPROCESSING,
        (SEGNET, MASKING, CLASSIFIER, EVALUATION),
        "int8",
        ("N",),
        low=0,
        high=2,
    ),
    "segnet_weights": File("weights/segnet{member}.weights.h5", SEGNET, ()),
    "segnet_settings": File("weights/segnet.json", SEGNET, ()),
    "predicted": File("arrays/{split}_predicted.npy", SEGNET, (MASKING, EVALUATION), "uint8", ("N", "S", "S", 1), 0, 1),
    "masked": File("arrays/{split}_masked.npy", MASKING, (CLASSIFIER,), "uint8", ("N", "S", "S", 3), 0, 255),
    "features": File("arrays/{split}_{backbone}_features.npy", CLASSIFIER, (CLASSIFIER,), "float32", ("N", "C")),
    "head_weights": File("weights/{backbone}_head{member}.weights.h5", CLASSIFIER, ()),
    "classifier_weights": File("weights/{backbone}{member}.weights.h5", CLASSIFIER, (EVALUATION,)),
    "classifier_settings": File("weights/{backbone}.json", CLASSIFIER, (EVALUATION,)),
    "probabilities": File(
        "arrays/{split}_probabilities.npy", CLASSIFIER, (EVALUATION,), "float32", ("N", 3), low=0, high=1
    ),
    "thresholds": File("weights/thresholds.json", EVALUATION, ()),
}

MEMBER_NAME = re.compile(r"(_fold\d+)?(_seed\d+)?")  # what {member} may be, see `folds.members`

HASH_BLOCK = 1 << 24  # bytes read at a time: hashing needs no more memory than this
ROW_BLOCK = 64  # images read at a time by `Store.blocks`: 12 MB at 256 pixels

PACKAGES = ("tensorflow", "keras", "jax", "torch", "openvino", "numpy", "scikit-image", "scikit-learn", "pillow")


class WeightFile(io.BytesIO):
    """A weight file in memory.

    HDF5 does not write to the disk itself: where that is full, it takes the process down, at the latest as that ends.
    """

    def __str__(self) -> str:
        """A name, by which Keras knows the format."""
        return ".weights.h5"


class SavesWeights(Protocol):
    """What `Store.save_weights` needs of a Keras model."""

    def save_weights(self, filepath: WeightFile) -> None:
        """Writes the weights."""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result, without importing them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the path, and the place of an older one there, once it is complete; else it is gone.

    Raises:
        OSError: it cannot be written; the path is its filename, also where the disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # where nothing can be written nothing is there
            temporary.unlink()


def write_text(path: Path, content: str) -> None:
    """Writes text, whole or not at all."""
    with whole(path) as stream:
        stream.write(content.encode())


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def plain(setting: Any) -> Any:
    """A setting as JSON can hold it: paths as text."""
    if isinstance(setting, list):
        return [plain(one) for one in setting]
    return str(setting) if isinstance(setting, Path) else setting


class Store:
    """The files of one data folder, as one run of one script sees them.

    What the run loads or saves becomes an input, in the manifest, of what it saves afterwards.
    """

    def __init__(self, data: Path, script: str, settings: dict[str, Any]) -> None:
        """Opens the folder for a script.

        Args:
            data: folder of arrays, weights and manifest; created on the first save.
            script: file name of the running script.
            settings: its command line, recorded with every file that it writes; `limit` caps the rows that `load`
                gives.
        """
        self.data = data
        self.script = script
        self.settings = {name: plain(value) for name, value in settings.items()}
        self.limit: int | None = settings.get("limit")
        self.inputs: dict[str, str] = {}
        self.manifest_path = data / "manifest.json"
        self._trusted: set[str] = set()

    @property
    def manifest(self) -> dict[str, Any]:
        """Entries by path relative to the data folder.

        Raises:
            StageError: it is no JSON.
        """
        try:
            return json.loads(self.manifest_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise StageError(
                f"{self.manifest_path} is damaged ({error}): delete it and run {PREPROCESSING} again"
            ) from None

    def path(self, name: str, **fields: str) -> Path:
        """Where a file of the contract lies."""
        return self.data / FILES[name].path.format(**fields)

    def splits(self) -> list[str]:
        """The splits that the data folder has.

        Raises:
            StageError: it has none.
        """
        present = [split for split in SPLITS if self.has("ids", split=split)]
        if not present:
            raise StageError(f"{self.data / 'arrays'} holds no images: run {PREPROCESSING} first")
        return present

    def has(self, name: str, **fields: str) -> bool:
        """Whether a file is there, according to the manifest."""
        return self._key(self.path(name, **fields)) in self.manifest

    def _key(self, path: Path) -> str:
        return path.relative_to(self.data).as_posix()

    # ------------------------------------------------------------------ load

    def _verify(self, name: str, path: Path) -> dict[str, Any]:
        """The manifest entry of a file, once file, entry and inputs are seen to agree."""
        key, manifest = self._key(path), self.manifest
        script = FILES[name].writer
        if key not in manifest or not path.is_file():
            raise StageError(f"{path} is missing: run {script} first")
        entry = manifest[key]
        if key not in self._trusted:
            status = path.stat()
            untouched = (status.st_size, status.st_mtime_ns) == (entry["bytes"], entry["modified"])
            if not untouched and (status.st_size != entry["bytes"] or sha256(path) != entry["sha256"]):
                raise StageError(f"{path} is cut off or changed since {script} wrote it: run {script} again")
            self._check_inputs(path, key, manifest, set())
            self._trusted.add(key)
        self.inputs[key] = entry["sha256"]
        return entry

    def _check_inputs(self, path: Path, key: str, manifest: dict[str, Any], seen: set[str]) -> None:
        if key in seen or key not in manifest:
            return
        seen.add(key)
        entry = manifest[key]
        for source in entry["inputs"]:  # first, so that the earliest stale stage is named
            self._check_inputs(path, source, manifest, seen)
        for source, digest in entry["inputs"].items():
            if manifest.get(source, {}).get("sha256") != digest:
                raise StageError(
                    f"{path} is stale: {key} was made from another {source} than there is now: "
                    f"run {entry['script']} again"
                )

    def check(self, name: str, **fields: str) -> Path:
        """Where a file of the contract lies, once it is seen to be whole and up to date.

        Raises:
            StageError: it is not.
        """
        path = self.path(name, **fields)
        self._verify(name, path)
        return path

    def rows(self, split: str) -> int:
        """How many images of a split this run works on: all, or the first `limit`."""
        count = len(self._map("ids", split=split))
        return min(self.limit or count, count)

    def _map(self, name: str, **fields: str) -> np.ndarray:
        file, path = FILES[name], self.path(name, **fields)
        entry = self._verify(name, path)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise StageError(f"{path} is no plain array ({error}): run {file.writer} again") from None
        try:
            check_shape(path, file, array.dtype, array.shape)
        except InputError as error:
            raise StageError(f"{error}: run {file.writer} again") from None
        if list(array.shape) != entry["shape"]:
            raise StageError(f"{path} has shape {array.shape}, the manifest {entry['shape']}: run {file.writer} again")
        return array

    def load(self, name: str, **fields: str) -> np.ndarray:
        """An array of the contract, memory-mapped, read-only, cut to this run's rows.

        Args:
            name: key of FILES.
            fields: what its path needs: split, backbone.

        Raises:
            StageError: it is missing, changed, stale, of another shape than the contract's, or shorter than the run
                needs; the message names the script to run.
            InputError: it holds values outside the contract, of which NaN and infinity are; of arrays of floats alone,
                for the others cannot hold these and are large.
        """
        array = self._map(name, **fields)
        if array.dtype.kind == "f":
            try:
                check_values(self.path(name, **fields), FILES[name], array)
            except InputError as error:
                raise InputError(f"{error}: delete it and run {FILES[name].writer} again") from None
        wanted = self.rows(fields["split"])
        if len(array) < wanted:
            raise StageError(
                f"{self.path(name, **fields)} has {len(array)} rows of {wanted}: run {FILES[name].writer} "
                f"without --limit, or this script with --limit {len(array)}"
            )
        return array[:wanted]

    def reusable(self, name: str, made_with: dict[str, Any], **fields: str) -> bool:
        """Whether an array is there, whole, up to date, and was made with the given settings."""
        if not self.has(name, **fields):
            return False
        try:
            self.load(name, **fields)
        except StageError:
            return False
        used = self.written_with(name, **fields)
        return all(used.get(setting) == value for setting, value in made_with.items())

    def written_with(self, name: str, **fields: str) -> dict[str, Any]:
        """The settings that a file was written with, from the manifest."""
        return self.manifest[self._key(self.path(name, **fields))]["settings"]

    def blocks(self, name: str, **fields: str) -> Iterator[np.ndarray]:
        """The rows that `load` gives, a block at a time, each from a mapping of its own: memory stays small."""
        total = len(self.load(name, **fields))
        for start in range(0, total, ROW_BLOCK):
            yield self.load(name, **fields)[start : start + ROW_BLOCK]

    # ------------------------------------------------------------------ save

    @contextlib.contextmanager
    def writer(
        self, name: str, rows: int, shape: tuple[int, ...], dtype: str = "", **fields: str
    ) -> Iterator["ArrayWriter"]:
        """Opens an array of the contract for writing, block by block; on an error the old file stays.

        Args:
            name: key of FILES.
            rows: how many there will be.
            shape: of one row.
            dtype: only for strings, with their length.
            fields: what its path needs.

        Raises:
            InputError: dtype or shape is outside the contract, or more or fewer rows came.
        """
        file, path = FILES[name], self.path(name, **fields)
        kind = np.dtype(dtype or file.dtype)
        check_shape(path, file, kind, (rows, *shape))
        with whole(path) as stream:
            out = ArrayWriter(stream, path, file, kind, (rows, *shape))
            yield out
            if out.done != rows:
                raise InputError(f"{path}: {rows} rows announced, {out.done} written")
        self._record(path, out.digest.hexdigest(), {"dtype": str(kind), "shape": (rows, *shape)})

    def save(self, name: str, array: np.ndarray, **fields: str) -> None:
        """Writes a whole array of the contract.

        Raises:
            InputError: dtype, shape or a value is outside the contract.
        """
        with self.writer(name, len(array), array.shape[1:], str(array.dtype), **fields) as out:
            out.append(array)

    def save_weights(self, name: str, model: SavesWeights, **fields: str) -> Path:
        """Writes a model's weights and returns where."""
        path, content = self.path(name, **fields), WeightFile()
        model.save_weights(content)
        with whole(path) as stream:
            stream.write(content.getbuffer())
        self._record(path, hashlib.sha256(content.getbuffer()).hexdigest(), {})
        return path

    def save_json(self, name: str, content: dict[str, Any], **fields: str) -> None:
        """Writes a JSON file of the contract."""
        path = self.path(name, **fields)
        write_json(path, content)
        self._record(path, sha256(path), {})

    def remove(self, name: str, **fields: str) -> None:
        """Takes a file of an earlier run away, where there is one."""
        path = self.path(name, **fields)
        manifest = self.manifest
        if manifest.pop(self._key(path), None) is not None:
            write_json(self.manifest_path, manifest)
        path.unlink(missing_ok=True)

    def keep_members(self, name: str, members: Sequence[str], **fields: str) -> list[str]:
        """Takes the files of an earlier run away whose {member} is none of these, and returns of which they were."""
        before, _, after = self.path(name, member="*", **fields).name.partition("*")
        found = [path.name for path in self.path(name, member="", **fields).parent.glob(f"{before}*{after}")]
        there = [file.removeprefix(before).removesuffix(after) for file in found]
        gone = [member for member in there if MEMBER_NAME.fullmatch(member) and member not in members]
        for member in gone:
            self.remove(name, member=member, **fields)
        return gone

    def provenance(self) -> dict[str, Any]:
        """What this run's results rest on: its settings, versions, and of every file behind them what made it."""
        manifest, ahead = self.manifest, list(self.inputs)
        found: dict[str, Any] = {}
        while ahead:
            key = ahead.pop()
            if key in manifest and key not in found:
                found[key] = {fact: manifest[key][fact] for fact in ("sha256", "script", "settings")}
                ahead += manifest[key]["inputs"]
        return {"settings": self.settings, "inputs": found, "versions": versions()}

    def _record(self, path: Path, digest: str, facts: dict[str, Any]) -> None:
        key, status, manifest = self._key(path), path.stat(), self.manifest
        manifest[key] = facts | {
            "sha256": digest,
            "bytes": status.st_size,
            "modified": status.st_mtime_ns,
            "script": self.script,
            "settings": self.settings,
            "inputs": {source: value for source, value in self.inputs.items() if source != key},
            "versions": versions(),
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_json(self.manifest_path, manifest)
        self.inputs[key] = digest


def check_shape(path: Path, file: File, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Checks dtype and shape against the contract.

    Raises:
        InputError: they differ; says expected and found.
    """
    kind_fits = dtype.kind == "U" if file.dtype == "str" else dtype == np.dtype(file.dtype)
    sides = {axis: length for axis, length in zip(file.shape, shape, strict=False) if isinstance(axis, str)}
    expected = tuple(sides.get(axis, axis) if isinstance(axis, str) else axis for axis in file.shape)
    if not kind_fits or shape != expected:
        raise InputError(f"{path}: expected {file.dtype} {file.shape}, found {dtype} {shape}")


def check_values(path: Path, file: File, array: np.ndarray) -> None:
    """Checks numbers against the contract.

    Raises:
        InputError: one is out of range, NaN or infinite.
    """
    if array.size:
        low, high = array.min(), array.max()
        if not (np.isfinite([low, high]).all() and file.low <= low <= high <= file.high):
            raise InputError(f"{path}: values {file.low} to {file.high} expected, found {low} to {high}")


class ArrayWriter:
    """Writes the rows of a `.npy` file front to back, checks them and hashes them on the way; of `Store.writer`.

    Plain writes, not a memory map: mapped pages would count as this process's memory.
    """

    def __init__(self, stream: BinaryIO, path: Path, file: File, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        """Writes the header."""
        self.stream, self.path, self.file, self.dtype, self.shape = stream, path, file, dtype, shape
        self.done = 0
        self.digest = hashlib.sha256()
        header = io.BytesIO()
        facts = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, facts)
        self._write(header.getvalue())

    def _write(self, content: bytes) -> None:
        self.stream.write(content)
        self.stream.flush()  # a full disk is met here, and not when other files of the same run are in place already
        self.digest.update(content)

    def append(self, block: np.ndarray) -> None:
        """Writes the next rows.

        Raises:
            InputError: dtype, shape or a value is outside the contract; NaN and infinity are.
        """
        if block.dtype != self.dtype or block.shape[1:] != self.shape[1:]:
            raise InputError(
                f"{self.path}: rows of {self.dtype} {self.shape[1:]} expected, {block.dtype} {block.shape}"
            )
        if block.dtype.kind != "U":
            check_values(self.path, self.file, block)
        self._write(np.ascontiguousarray(block).tobytes())
        self.done += len(block)
