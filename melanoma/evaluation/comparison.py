"""Paired comparison of two systems on the same images."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from melanoma.errors import InputError
from melanoma.evaluation import figures
from melanoma.evaluation.scoring import System
from melanoma.metrics import bootstrap

import numpy as np

FILE = "comparison.json"


def common_splits(first: System, second: System, labels: dict[str, np.ndarray]) -> list[str]:
    """Splits with labels for which both systems have predictions.

    Raises:
        InputError: there is none.
    """
    splits = [split for split in first.probabilities if split in second.probabilities and split in labels]
    if not splits:
        raise InputError(f"--compare: {first.name} and {second.name} have no labelled split in common")
    return splits


def differences(first: System, second: System, split: str, labels: np.ndarray, seed: int) -> dict[str, Any]:
    """Differences of two systems' AUCs on the same images, see `bootstrap.paired_differences`, as JSON values.

    Args:
        first: the system to compare with.
        second: the other system.
        split: one that both have predictions for.
        labels: int (N,), of that split.
        seed: seed of the bootstrap.

    Returns:
        {metric: {"first": ..., "second": ..., "difference": ..., "interval": ..., "p_value": ...}}.
    """
    found = bootstrap.paired_differences(labels, first.probabilities[split], second.probabilities[split], seed)
    return {metric: asdict(difference) for metric, difference in found.items()}


def compare(systems: Sequence[System], labels: dict[str, np.ndarray], graphics: Path, seed: int) -> dict[str, Any]:
    """Compares the second of two systems with the first, and draws their ROC curves.

    Args:
        systems: the two systems.
        labels: {split: int (N,)}.
        graphics: folder of the PNGs; figures of an earlier comparison are removed.
        seed: seed of the bootstrap.

    Returns:
        Content of comparison.json: {"first": name, "second": name, "splits": {split: {metric: difference}}}.

    Raises:
        InputError: the systems have no labelled split in common.
    """
    first, second = systems
    splits = common_splits(first, second, labels)
    figures.remove(graphics, (figures.COMPARISON, FILE))
    results = {}
    for split in splits:
        results[split] = differences(first, second, split, labels[split], seed)
        figures.draw_comparison(graphics, split, labels[split], systems, seed)
    return {"first": first.name, "second": second.name, "splits": results}


def lines(compared: dict[str, Any], labels: dict[str, np.ndarray]) -> Iterator[str]:
    """The result of `compare` for a terminal."""
    for split, found in compared["splits"].items():
        yield ""
        yield f"{split}, n = {len(labels[split])}"
        yield from difference_lines(compared["first"], compared["second"], found)


def difference_lines(first: str, second: str, found: dict[str, Any]) -> Iterator[str]:
    """The result of `differences` for a terminal; `first` and `second` are the names of the systems."""
    yield f"{second} minus {first}, 95 % interval of the difference, p-value"
    for metric, one in found.items():
        low, high = one["interval"]
        yield (
            f"  {metric:28}{one['second']:.3f} - {one['first']:.3f} = {one['difference']:+.3f}  "
            f"({low:+.3f} to {high:+.3f}), p = {one['p_value']:.4f}"
        )
