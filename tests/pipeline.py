"""Runs the scripts inside the test process."""

import argparse
import importlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from melanoma import command, stages

import keras
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = stages.SCRIPTS
BACKBONE = "mobilenet"
SIZE = 32  # pixels: the least that the backbone takes
COUNTS = {"train": 24, "val": 12, "test": 12}


def module(script: str) -> ModuleType:
    return importlib.import_module(script.removesuffix(".py"))


def parser(script: str) -> argparse.ArgumentParser:
    """The parser that the script hands to `command.run`."""
    code = module(script)
    return code.parser() if hasattr(code, "parser") else command.parser(str(code.__doc__))


def run(script: str, folder: Path, *flags: str) -> None:
    """A script's work on `folder`/data and `folder`/graphics."""
    module(script).main(parser(script).parse_args([*places(folder), *flags]))


def preprocess(source: Path, folder: Path, *flags: str) -> None:
    run(stages.PREPROCESSING, folder, "--source", str(source), "--size", str(SIZE), "--jobs", "1", *flags)


def outline(folder: Path, *flags: str) -> None:
    small = ("--network", "segnet", "--network-size", str(SIZE), "--epochs", "1", "--no-turns")
    run(stages.SEGNET, folder, *small, *flags)


def classify(folder: Path, *flags: str) -> None:
    run(stages.CLASSIFIER, folder, "--backbone", BACKBONE, "--weights", "none", "--epochs", "1", *flags)


def run_all(source: Path, folder: Path, train: str) -> None:
    preprocess(source, folder)
    outline(folder)
    run(stages.MASKING, folder)
    classify(folder, "--train", train)
    run(stages.EVALUATION, folder)


def copy(folder: Path, to: Path) -> Path:
    """A copy of a chain."""
    return shutil.copytree(folder, to, dirs_exist_ok=True)


def enliven(backbone: keras.Model) -> None:
    """Makes a random backbone's features more than next to nothing."""
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.moving_variance.assign(layer.moving_variance * 1e-2)


def stand_in_for_segnet(folder: Path) -> None:
    """Takes the true masks for predicted ones, where a test needs step 3 without training."""
    store = stages.Store(folder / "data", stages.SEGNET, {})
    for split in store.splits():
        store.save("predicted", np.array(store.load("masks", split=split)), split=split)


def exit_code(monkeypatch: pytest.MonkeyPatch, script: str, *flags: str) -> int | str | None:
    """What the script exits with, run as from a shell; 0 where it just ends."""
    monkeypatch.setattr(sys, "argv", [script, *flags])
    try:
        command.run(parser(script), module(script).main)
    except SystemExit as stop:
        return stop.code
    return 0


def places(folder: Path) -> tuple[str, ...]:
    return "--data", str(folder / "data"), "--graphics", str(folder / "graphics")


def reader(folder: Path) -> stages.Store:
    return stages.Store(folder / "data", stages.EVALUATION, {})


def array_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "data" / "arrays").iterdir())}


def hidden(folder: Path) -> list[str]:
    """What a run that ended badly may have forgotten."""
    return [path.name for path in folder.rglob(".*")]


def rewrite_entry(data: Path, path: Path) -> None:
    """Makes the manifest agree with what lies at `path`."""
    manifest = stages.Store(data, stages.EVALUATION, {}).manifest
    status = path.stat()
    manifest[path.relative_to(data).as_posix()] |= {
        "sha256": stages.sha256(path),
        "bytes": status.st_size,
        "modified": status.st_mtime_ns,
    }
    stages.write_json(data / "manifest.json", manifest)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.folder),)
