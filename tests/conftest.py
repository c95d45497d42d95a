"""The drawn source and the finished chain that several tests look at; who changes one works on a copy."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from melanoma import phantom

import pipeline
import pytest


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the official layout with drawn photographs; read only."""
    folder = tmp_path_factory.mktemp("source")
    phantom.write_sample(folder, pipeline.COUNTS, size=(60, 80))
    return folder


@pytest.fixture(scope="session")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all five scripts have run; read only."""
    folder = tmp_path_factory.mktemp("finished")
    pipeline.run_all(source, folder, "full")
    return folder


@pytest.fixture
def own_source(source: Path, tmp_path: Path) -> Path:
    """A copy of the source that a test may change."""
    return shutil.copytree(source, tmp_path / "source")


@pytest.fixture
def own_chain(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished chain that a test may change."""
    return pipeline.copy(finished, tmp_path / "chain")


@pytest.fixture
def logging_restored() -> Iterator[None]:
    """`command.run` sets up logging to the standard output that a test has; puts the handlers back."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
