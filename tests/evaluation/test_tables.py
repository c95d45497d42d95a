"""Compact tables of metrics: every metric appears, columns are aligned, nothing is wider than 100 columns."""

from typing import Any

from melanoma.classes import CLASSES, TASKS
from melanoma.evaluation import scoring, tables

import numpy as np
import pytest


@pytest.fixture(scope="module")
def system() -> dict[str, Any]:
    """Metrics of random predictions for 60 validation images, no two metrics alike by construction of the names."""
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 3, 60), rng.dirichlet((1, 1, 1), 60)
    images = scoring.Images({"val": [str(row) for row in range(60)]}, {"val": np.arange(60)}, {"val": labels})
    system = scoring.System("random", {"val": probabilities}, epochs_chosen_on="val", calibrated=True)
    chosen = scoring.choose_thresholds(system, images.labels)
    return scoring.evaluate_system(chosen, images, None, 0)


@pytest.fixture(scope="module")
def lines(system: dict[str, Any]) -> list[str]:
    return list(tables.terminal_lines("random", "val", system))


def test_terminal_shows_every_metric_and_interval(system: dict[str, Any], lines: list[str]) -> None:
    shown, scored = "\n".join(lines), system["splits"]["val"]
    for name, value in scored["metrics"].items():
        low, high = scored["intervals"][name]
        assert f"{value:.3f}" in shown, name
        assert f"{low:.3f}-{high:.3f}" in shown or f"({low:.3f} to {high:.3f})" in shown, name


def test_terminal_lines_are_at_most_100_columns_wide(lines: list[str]) -> None:
    assert max(map(len, lines)) <= 100
    assert [line for line in lines if line != line.rstrip()] == []


def test_values_and_intervals_end_below_their_column(system: dict[str, Any], lines: list[str]) -> None:
    header = next(place for place, line in enumerate(lines) if line.startswith("melanoma "))
    metric = system["splits"]["val"]["metrics"]["melanoma specificity at Youden"]
    end = lines[header].index("specificity") + len("specificity")
    assert lines[header + 1].startswith("Youden ") and lines[header + 1][:end].endswith(f" {metric:.3f}")
    assert lines[header + 2].startswith("  p >= ") and lines[header + 2][end] == " " != lines[header + 2][end - 1]


def test_first_lines_name_split_system_and_bias(lines: list[str]) -> None:
    assert lines[0] == "Validation, n = 60: random"
    assert all(name in lines[1] for name in CLASSES)
    assert lines[2].startswith("Biased upwards: epochs, calibration and thresholds")


def test_undefined_metrics_have_no_interval() -> None:
    assert str(tables.Value(None)) == tables.Value(None).number == "undefined"
    assert tables.Value(None).bounds == ""
    assert str(tables.Value(0.8, (0.75, 0.8456))) == "0.800 (0.750 to 0.846)"


def test_summary_has_one_row_per_operating_point(system: dict[str, Any]) -> None:
    summary = tables.summarise(system["splits"]["val"], system["thresholds"])
    assert [task.name for task in summary.tasks] == [CLASSES[index] for index in TASKS]
    for task in summary.tasks:
        assert {row.point: row.threshold for row in task.rows} == system["thresholds"][task.name]
        for row in task.rows:
            expected = [f"{task.name} {metric} at {row.point}" for metric in tables.COLUMNS.values()]
            assert [one.value for one in row.values] == [system["splits"]["val"]["metrics"][name] for name in expected]


def test_every_metric_of_the_masks_has_a_line_with_its_interval() -> None:
    scored = {
        "metrics": {"jaccard": 0.5, "pixel_accuracy": 1.0},
        "intervals": {"jaccard": (0.25, 0.75), "pixel_accuracy": (1.0, 1.0)},
    }
    assert list(tables.mask_lines(scored)) == [
        "  jaccard             0.500 (0.250 to 0.750)",
        "  pixel accuracy      1.000 (1.000 to 1.000)",
    ]
