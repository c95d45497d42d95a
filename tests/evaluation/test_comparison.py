"""Comparison of two systems: the difference on common images, written without touching other results."""

import json
from pathlib import Path

from melanoma.artifacts import contract
from melanoma.errors import InputError
from melanoma.evaluation import comparison
from melanoma.evaluation.scoring import System

import numpy as np
import pipeline
import pytest
from pipeline import BACKBONE

LABELS = np.tile([0, 1, 2], 10)
PERFECT = np.eye(3)[LABELS]


def test_difference_is_the_second_system_minus_the_first(tmp_path: Path) -> None:
    wrong = System("wrong", {"test": 1 - PERFECT, "val": PERFECT}, {})
    found = comparison.compare([wrong, System("right", {"test": PERFECT}, {})], {"test": LABELS}, tmp_path, seed=0)
    assert (found["first"], found["second"], list(found["splits"])) == ("wrong", "right", ["test"])
    for difference in found["splits"]["test"].values():
        assert (difference["first"], difference["second"], difference["difference"]) == (0, 1, 1)
        assert list(difference["interval"]) == [1, 1]
    assert (tmp_path / "comparison_test.png").is_file()
    lines = list(comparison.lines(found, {"test": LABELS}))
    assert lines[1:3] == ["test, n = 30", "right minus wrong, 95 % interval of the difference, p-value"]
    assert sum("1.000 - 0.000 = +1.000  (+1.000 to +1.000), p = 0." in line for line in lines) == 3


def test_systems_without_a_common_split_are_refused(tmp_path: Path) -> None:
    systems = [System("a", {"val": PERFECT}, {}), System("b", {"test": PERFECT}, {})]
    for labels in ({"val": LABELS, "test": LABELS}, {}):
        with pytest.raises(InputError, match="a and b have no labelled split in common"):
            comparison.compare(systems, labels, tmp_path, seed=0)


def test_script_compares_and_leaves_other_results_unchanged(own_chain: Path, tmp_path: Path) -> None:
    graphics = own_chain / "graphics"
    before, submitted = (graphics / "metrics.json").read_bytes(), graphics / "predictions_test.csv"
    reversed_values = tmp_path / "reversed.csv"
    ids, values = zip(*(line.split(",", 1) for line in submitted.read_text().splitlines()[1:]), strict=True)
    reversed_values.write_text("\n".join(map(",".join, zip(ids, reversed(values), strict=True))))
    pipeline.run(contract.EVALUATION, own_chain, "--compare", str(submitted), str(reversed_values))
    assert (graphics / "metrics.json").read_bytes() == before
    found = json.loads((graphics / "comparison.json").read_text())
    aucs = json.loads(before)["systems"][BACKBONE]["splits"]["test"]["metrics"]
    assert (found["first"], found["second"]) == ("predictions_test", "reversed")
    assert found["splits"]["test"]["melanoma auc"]["first"] == pytest.approx(aucs["melanoma auc"])
    assert (graphics / "comparison_test.png").is_file() and set(found["splits"]) == {"test"}


def test_new_comparison_replaces_the_figures_of_the_last_one(tmp_path: Path) -> None:
    both = {"val": PERFECT, "test": PERFECT}
    for probabilities in (both, {"val": PERFECT}):
        systems = [System("a", probabilities, {}), System("b", probabilities, {})]
        comparison.compare(systems, {"val": LABELS, "test": LABELS}, tmp_path, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["comparison_val.png"]
