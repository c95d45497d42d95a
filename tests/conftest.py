"""Fixtures that several folders of tests share: the synthetic source, the finished chain."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from melanoma.metrics import bootstrap
from melanoma.sources import synthetic

import pipeline
import pytest

bootstrap.DRAWS = 50  # intervals need not be precise in tests


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of synthetic images in the official layout; read only."""
    folder = tmp_path_factory.mktemp("source")
    synthetic.write_sample(folder, pipeline.COUNTS, size=(66, 88))
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
    """Restores the handlers that `cli.run.run` replaces, which write to the standard output of one test."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
