"""Fixtures of these tests."""

from pathlib import Path

from melanoma.deployment.results import Results

import pytest
from toy_findings import MADE_OF, THRESHOLDS


@pytest.fixture
def opened(tmp_path: Path) -> Results:
    """An output folder without images."""
    found = Results(tmp_path / "out", THRESHOLDS)
    found.open(MADE_OF, overwrite=False)
    return found
