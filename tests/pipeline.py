"""Runs the scripts inside the test process, with a toy backbone."""

import argparse
import importlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.atomic import sha256, write_json
from melanoma.artifacts.store import Store
from melanoma.cli import run as cli
from melanoma.sources import reader as source_reader
from melanoma.sources.records import Record

import numpy as np
import pytest
import toy

ROOT = Path(__file__).parent.parent
SCRIPTS = contract.SCRIPTS
BACKBONE, OTHER = toy.NAME, toy.OTHER
SIZE = 32  # pixels
COUNTS = {"train": 24, "val": 12, "test": 12}

toy.register()
toy.shrink_segnet()


def module(script: str) -> ModuleType:
    return importlib.import_module(script.removesuffix(".py"))


def records(source: Path, split: str) -> list[Record]:
    """The images of a split of a source in the layout of ISIC 2017."""
    return source_reader.read(source).splits[split]


def parser(script: str) -> argparse.ArgumentParser:
    return module(script).build_parser()


def run(script: str, folder: Path, *flags: str) -> None:
    """Runs a script on `folder`/data and `folder`/graphics."""
    module(script).main(parser(script).parse_args([*places(folder), *flags]))


def preprocess(source: Path, folder: Path, *flags: str) -> None:
    run(contract.PREPROCESSING, folder, "--source", str(source), "--size", str(SIZE), "--jobs", "1", *flags)


def segment(folder: Path, *flags: str) -> None:
    small = ("--network", "segnet", "--input-size", str(SIZE), "--epochs", "1", "--views", "1")
    run(contract.SEGNET, folder, *small, *flags)


def classify(folder: Path, *flags: str) -> None:
    run(contract.CLASSIFIER, folder, "--backbone", BACKBONE, "--weights", "none", "--epochs", "1", *flags)


def run_all(source: Path, folder: Path, train: str) -> None:
    preprocess(source, folder)
    segment(folder)
    run(contract.ROI, folder)
    classify(folder, "--train", train)
    run(contract.EVALUATION, folder)


def copy(folder: Path, to: Path) -> Path:
    """Copies a chain."""
    return shutil.copytree(folder, to, dirs_exist_ok=True)


def save_rows(folder: Path, split: str, source: Sequence[int], base: int | None = None) -> None:
    """Saves ids, source, groups and origin of images and augmented copies; every image is a group of its own.

    The first `base` images, None: all, are of --source, the others of --extra.
    """
    ids, rows = np.array([f"{split}{row}" for row in source]), np.array(source, np.int64)
    origin = np.array(rows >= (len(rows) if base is None else base), np.int64)
    for name, values in (("ids", ids), ("source", rows), ("groups", rows), ("origin", origin)):
        Store(folder, contract.PREPROCESSING, {}).save(name, values, split=split)


def add_classifier(folder: Path, name: str, splits: Sequence[str] = ("val", "test"), **settings: Any) -> None:
    """Saves random probabilities as those of a classifier that was trained on the regions of interest.

    The settings are those of its JSON file.
    """
    flags = ["--pretrained"] if name == contract.PRETRAINED else ["--backbone", name]
    store = Store(folder / "data", contract.CLASSIFIER, vars(parser(contract.CLASSIFIER).parse_args(flags)))
    rng = np.random.default_rng(list(name.encode()))
    for split in splits:
        store.load("roi", split=split)
    store.save_json("classifier_settings", {"parts": [part(name)]} | settings, backbone=name)
    for split in splits:
        store.save(
            "probabilities", rng.dirichlet((1, 1, 1), store.rows(split)).astype("f4"), split=split, backbone=name
        )


def part(backbone: str, keep: str = "best auc of validation", **members: tuple[int, int]) -> dict[str, Any]:
    """An entry of `parts` in the settings of a classifier.

    Args:
        backbone: its name.
        keep: why the epochs were kept.
        members: the epoch that was kept and the number of epochs, by member; default: 2 of 3 of a single network.
    """
    found = members or {"": (2, 3)}
    return {
        "backbone": backbone,
        "views": 1,
        "members": {
            member: {"full": {"kept_epoch": kept, "reason": keep, "seconds": [1.0] * count}}
            for member, (kept, count) in found.items()
        },
    }


def use_true_masks(folder: Path) -> None:
    """Saves the true masks as predicted ones, for tests that need step 3 without training."""
    store = Store(folder / "data", contract.SEGNET, {})
    for split in store.splits():
        store.save("predicted", np.array(store.load("masks", split=split)), split=split)


def exit_code(monkeypatch: pytest.MonkeyPatch, script: str, *flags: str) -> int | str | None:
    """Exit code of a script that is run as from a shell; 0 if it ends normally."""
    monkeypatch.setattr(sys, "argv", [script, *flags])
    try:
        cli.run(parser(script), module(script).main)
    except SystemExit as stop:
        return stop.code
    return 0


def places(folder: Path) -> tuple[str, ...]:
    return "--data", str(folder / "data"), "--graphics", str(folder / "graphics")


def reader(folder: Path) -> Store:
    return Store(folder / "data", contract.EVALUATION, {})


def array_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "data" / "arrays").iterdir())}


def hidden(folder: Path) -> list[str]:
    """Hidden files, e.g. temporary files that a failed run left behind."""
    return [path.name for path in folder.rglob(".*")]


def rewrite_entry(data: Path, path: Path) -> None:
    """Makes the manifest agree with the file at `path`."""
    manifest = Store(data, contract.EVALUATION, {}).manifest
    status = path.stat()
    manifest[path.relative_to(data).as_posix()] |= {
        "sha256": sha256(path),
        "bytes": status.st_size,
        "modified": status.st_mtime_ns,
    }
    write_json(data / "manifest.json", manifest)


class Trap:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.folder),)
