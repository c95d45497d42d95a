"""The data folder as one run of a script sees it: checked reads and writes, recorded in a manifest.

`manifest.json` holds for every file the script that wrote it, its settings, its inputs with their SHA-256, and package
versions. A file whose inputs have changed since is stale and is refused.

Save: check against the contract, write a temporary file, fsync, rename, add the manifest entry.
Load: check against contract and manifest; memory-mapped, never unpickled.
"""

import contextlib
import hashlib
import io
import json
import platform
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from melanoma.artifacts import contract
from melanoma.artifacts.atomic import atomic_write, sha256, write_json
from melanoma.classes import SPLITS
from melanoma.errors import InputError, StageError

import numpy as np

ROW_BLOCK = 64  # rows per block of `Store.blocks`: 12 MB of images of 256 pixels
PACKAGES = ("tensorflow", "keras", "jax", "torch", "openvino", "numpy", "scikit-image", "scikit-learn", "pillow")
GRAPHICS = "graphics/"  # start of the manifest's keys of files in the graphics folder, wherever that is


class WeightFile(io.BytesIO):
    """A weight file in memory, because HDF5 crashes the process when it meets a full disk."""

    def __str__(self) -> str:
        """A name, from which Keras infers the format."""
        return ".weights.h5"


class SavesWeights(Protocol):
    """The part of a Keras model that `Store.save_weights` uses."""

    def save_weights(self, filepath: WeightFile) -> None:
        """Writes the weights."""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results, without importing them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def to_json(setting: Any) -> Any:
    """Converts a setting to a value that JSON can hold: paths become text, tuples lists."""
    if isinstance(setting, list | tuple):
        return [to_json(item) for item in setting]
    return str(setting) if isinstance(setting, Path) else setting


class Store:
    """The files of a data folder, for one run of one script.

    Whatever the run loads or saves is recorded as an input of what it saves afterwards.

    Attributes:
        settings: recorded with every file that is saved from now on; the script may add to them.
        inputs: SHA-256 of the files loaded or saved so far, by path relative to the data folder.
    """

    def __init__(self, data: Path, script: str, settings: dict[str, Any]) -> None:
        """Opens the folder for a script.

        Args:
            data: folder of arrays, weights and manifest; created by the first save.
            script: file name of the running script.
            settings: its command line. `limit` is the maximum number of rows that `load` returns.
        """
        self.data = data
        self.script = script
        self.settings = {name: to_json(value) for name, value in settings.items()}
        self.limit: int | None = settings.get("limit")
        self.inputs: dict[str, str] = {}
        self.manifest_path = data / "manifest.json"
        self._trusted: set[str] = set()

    @property
    def manifest(self) -> dict[str, Any]:
        """Entries by path relative to the data folder.

        Raises:
            StageError: the manifest is not valid JSON.
        """
        try:
            return json.loads(self.manifest_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise StageError(
                f"{self.manifest_path} is damaged ({error}): delete it and run {contract.PREPROCESSING} again"
            ) from None

    def branch(self) -> "Store":
        """A store of the same run, with the inputs so far; its further inputs do not become inputs of this one."""
        store = Store(self.data, self.script, self.settings)
        store.inputs |= self.inputs
        return store

    def path(self, name: str, **fields: str) -> Path:
        """Path of a file of the contract."""
        return self.data / contract.FILES[name].path.format(**fields)

    def splits(self) -> list[str]:
        """The splits in the data folder, in the order of SPLITS.

        Raises:
            StageError: there are none.
        """
        present = [split for split in SPLITS if self.has("ids", split=split)]
        if not present:
            raise StageError(f"{self.data / 'arrays'} contains no images: run {contract.PREPROCESSING} first")
        return present

    def has(self, name: str, **fields: str) -> bool:
        """Whether the manifest lists a file."""
        return self._key(self.path(name, **fields)) in self.manifest

    def classifiers(self) -> list[str]:
        """Names of the classifiers of which the manifest lists probabilities of any split, see `classifier_order`."""
        fields = {"split": f"({'|'.join(SPLITS)})", "backbone": "([a-z0-9.]+)"}
        pattern = re.compile(contract.FILES["probabilities"].path.format(**fields))
        found = {match[2] for key in self.manifest if (match := pattern.fullmatch(key))}
        return sorted(found, key=contract.classifier_order)

    def _key(self, path: Path) -> str:
        return path.relative_to(self.data).as_posix()

    # ------------------------------------------------------------------ load

    def _verify(self, name: str, path: Path) -> dict[str, Any]:
        """Checks that a file, its manifest entry and its inputs agree, and returns the entry."""
        key, manifest = self._key(path), self.manifest
        script = contract.FILES[name].writer
        if key not in manifest or not path.is_file():
            raise StageError(f"{path} is missing: run {script} first")
        entry = manifest[key]
        if key not in self._trusted:
            status = path.stat()
            untouched = (status.st_size, status.st_mtime_ns) == (entry["bytes"], entry["modified"])
            if not untouched and (status.st_size != entry["bytes"] or sha256(path) != entry["sha256"]):
                raise StageError(f"{path} is truncated or was changed after {script} wrote it: run {script} again")
            self._check_inputs(path, key, manifest, set())
            self._trusted.add(key)
        self.inputs[key] = entry["sha256"]
        return entry

    def _check_inputs(self, path: Path, key: str, manifest: dict[str, Any], seen: set[str]) -> None:
        if key in seen or key not in manifest:
            return
        seen.add(key)
        entry = manifest[key]
        for source in entry["inputs"]:  # first, so that the message names the earliest stale stage
            self._check_inputs(path, source, manifest, seen)
        for source, digest in entry["inputs"].items():
            if manifest.get(source, {}).get("sha256") != digest:
                raise StageError(
                    f"{path} is stale: {source} has changed since {key} was made from it: run {entry['script']} again"
                )

    def check_graphics(self, path: Path) -> None:
        """Checks that a file in the graphics folder was made from the current files of this data folder.

        Raises:
            StageError: it is missing, was not made from this data folder, was changed, or is stale.
        """
        key, manifest = GRAPHICS + path.name, self.manifest
        if not path.is_file():
            raise StageError(f"{path} is missing")
        if key not in manifest or sha256(path) != manifest[key]["sha256"]:
            raise StageError(f"{path} was not made from {self.data}, or was changed")
        self._check_inputs(path, key, manifest, set())

    def check(self, name: str, **fields: str) -> Path:
        """Checks that a file is complete and up to date, and returns its path.

        Raises:
            StageError: it is missing, changed or stale.
        """
        path = self.path(name, **fields)
        self._verify(name, path)
        return path

    def rows(self, split: str) -> int:
        """Number of rows of a split that this run works on: all, or the first `limit`."""
        count = len(self._map("ids", split=split))
        return min(self.limit or count, count)

    def _map(self, name: str, **fields: str) -> np.ndarray:
        file, path = contract.FILES[name], self.path(name, **fields)
        entry = self._verify(name, path)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise StageError(f"{path} is not a plain array ({error}): run {file.writer} again") from None
        try:
            contract.check_shape(path, file, array.dtype, array.shape)
        except InputError as error:
            raise StageError(f"{error}: run {file.writer} again") from None
        if list(array.shape) != entry["shape"]:
            raise StageError(
                f"{path} has shape {array.shape}, but {entry['shape']} in the manifest: run {file.writer} again"
            )
        return array

    def load(self, name: str, **fields: str) -> np.ndarray:
        """Opens an array of the contract.

        Only arrays of floats are checked for their range, NaN and infinity; the others are large.

        Args:
            name: key of FILES.
            fields: values for its path: split, backbone.

        Returns:
            Memory-mapped and read-only, dtype and shape as in FILES, with N = `rows(split)`.

        Raises:
            StageError: the array is missing, changed, stale, of another shape than the contract's, or has too few rows;
                the message names the script to run.
            InputError: a value is outside the contract.
        """
        return self.load_first(name, self.rows(fields["split"]), **fields)

    def load_first(self, name: str, wanted: int, **fields: str) -> np.ndarray:
        """As `load`, with N = `wanted` rows, always the first ones."""
        array = self._map(name, **fields)
        if array.dtype.kind == "f":
            try:
                contract.check_values(self.path(name, **fields), contract.FILES[name], array)
            except InputError as error:
                raise InputError(f"{error}: delete it and run {contract.FILES[name].writer} again") from None
        if len(array) < wanted:
            raise StageError(
                f"{self.path(name, **fields)} has {len(array)} rows, but {wanted} are needed: run "
                f"{contract.FILES[name].writer} without --limit, or this script with --limit {len(array)}"
            )
        return array[:wanted]

    def reusable(self, name: str, made_with: dict[str, Any], wanted: int, **fields: str) -> bool:
        """Whether an array has `wanted` rows, is up to date, and was made with the given settings."""
        if not self.has(name, **fields):
            return False
        try:
            self.load_first(name, wanted, **fields)
        except StageError:
            return False
        settings = self.written_with(name, **fields)
        return all(settings.get(setting) == value for setting, value in made_with.items())

    def written_with(self, name: str, **fields: str) -> dict[str, Any]:
        """The settings of the run that wrote a file, from the manifest."""
        return self.manifest[self._key(self.path(name, **fields))]["settings"]

    def blocks(self, name: str, **fields: str) -> Iterator[np.ndarray]:
        """Yields the rows of `load` in blocks, each mapped separately so that memory is released."""
        total = len(self.load(name, **fields))
        for start in range(0, total, ROW_BLOCK):
            yield self.load(name, **fields)[start : start + ROW_BLOCK]

    # ------------------------------------------------------------------ save

    @contextlib.contextmanager
    def writer(
        self, name: str, rows: int, shape: tuple[int, ...], dtype: str = "", **fields: str
    ) -> Iterator["ArrayWriter"]:
        """Opens an array of the contract for writing in blocks; on an error the previous file stays.

        Args:
            name: key of FILES.
            rows: N, the number of rows.
            shape: shape of one row, such as (S, S, 3).
            dtype: needed only for strings, whose length the contract leaves open.
            fields: values for its path: split, backbone.

        Raises:
            InputError: dtype, shape or a value is outside the contract, or the number of rows is not `rows`.
        """
        file, path = contract.FILES[name], self.path(name, **fields)
        array_dtype = np.dtype(dtype or file.dtype)
        contract.check_shape(path, file, array_dtype, (rows, *shape))
        with atomic_write(path) as stream:
            out = ArrayWriter(stream, path, file, array_dtype, (rows, *shape))
            yield out
            if out.rows_written != rows:
                raise InputError(f"{path}: expected {rows} rows, {out.rows_written} were written")
        self._record_saved(path, out.digest.hexdigest(), {"dtype": str(array_dtype), "shape": (rows, *shape)})

    def save(self, name: str, array: np.ndarray, **fields: str) -> None:
        """Writes an array of the contract at once.

        Raises:
            InputError: dtype, shape or a value is outside the contract.
        """
        with self.writer(name, len(array), array.shape[1:], str(array.dtype), **fields) as out:
            out.append(array)

    def save_weights(self, name: str, model: SavesWeights, **fields: str) -> Path:
        """Writes a model's weights and returns the path."""
        path, content = self.path(name, **fields), WeightFile()
        model.save_weights(content)
        with atomic_write(path) as stream:
            stream.write(content.getbuffer())
        self._record_saved(path, hashlib.sha256(content.getbuffer()).hexdigest(), {})
        return path

    def save_json(self, name: str, content: dict[str, Any], **fields: str) -> None:
        """Writes a JSON file of the contract."""
        path = self.path(name, **fields)
        write_json(path, content)
        self._record_saved(path, sha256(path), {})

    def record_graphics(self, path: Path) -> None:
        """Records a file that this run wrote into the graphics folder, for `check_graphics`."""
        self._record(GRAPHICS + path.name, path, sha256(path), {})

    def forget(self, name: str, **fields: str) -> None:
        """Takes a loaded file out of the inputs of what is saved afterwards."""
        self.inputs.pop(self._key(self.path(name, **fields)), None)

    def remove(self, name: str, **fields: str) -> None:
        """Deletes a file of an earlier run, if it exists."""
        path = self.path(name, **fields)
        manifest = self.manifest
        if manifest.pop(self._key(path), None) is not None:
            write_json(self.manifest_path, manifest)
        path.unlink(missing_ok=True)

    def keep_members(self, name: str, members: Sequence[str], **fields: str) -> list[str]:
        """Deletes the files of an earlier run whose {member} is not one of these, and returns the members deleted."""
        before, _, after = self.path(name, member="*", **fields).name.partition("*")
        paths = self.path(name, member="", **fields).parent.glob(f"{before}*{after}")
        existing = [path.name.removeprefix(before).removesuffix(after) for path in paths]
        deleted = [member for member in existing if contract.MEMBER_NAME.fullmatch(member) and member not in members]
        for member in deleted:
            self.remove(name, member=member, **fields)
        return deleted

    def provenance(self) -> dict[str, Any]:
        """Settings and versions of this run, and hash, script and settings of every file that it depends on."""
        manifest, pending = self.manifest, list(self.inputs)
        files: dict[str, Any] = {}
        while pending:
            key = pending.pop()
            if key in manifest and key not in files:
                files[key] = {field: manifest[key][field] for field in ("sha256", "script", "settings")}
                pending += manifest[key]["inputs"]
        return {"settings": self.settings, "inputs": files, "versions": versions()}

    def _record_saved(self, path: Path, digest: str, facts: dict[str, Any]) -> None:
        key = self._key(path)
        self._record(key, path, digest, facts)
        self.inputs[key] = digest

    def _record(self, key: str, path: Path, digest: str, facts: dict[str, Any]) -> None:
        status, manifest = path.stat(), self.manifest
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


class ArrayWriter:
    """Writes the rows of a `.npy` file in order, and checks and hashes them; made by `Store.writer`.

    It does not map the file, because mapped pages would count as this process's memory.
    """

    def __init__(
        self, stream: BinaryIO, path: Path, file: contract.File, dtype: np.dtype, shape: tuple[int, ...]
    ) -> None:
        """Writes the header."""
        self.stream, self.path, self.file, self.dtype, self.shape = stream, path, file, dtype, shape
        self.rows_written = 0
        self.digest = hashlib.sha256()
        header = io.BytesIO()
        description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, description)
        self._write(header.getvalue())

    def _write(self, content: bytes) -> None:
        self.stream.write(content)
        self.stream.flush()  # a full disk fails here, before other files of this run are renamed
        self.digest.update(content)

    def append(self, block: np.ndarray) -> None:
        """Writes the next rows.

        Raises:
            InputError: dtype, shape or a value is outside the contract.
        """
        if block.dtype != self.dtype or block.shape[1:] != self.shape[1:]:
            raise InputError(
                f"{self.path}: expected rows of {self.dtype} {self.shape[1:]}, found {block.dtype} {block.shape[1:]}"
            )
        if block.dtype.kind != "U":
            contract.check_values(self.path, self.file, block)
        self._write(np.ascontiguousarray(block).tobytes())
        self.rows_written += len(block)
