"""Results of an image that no network has seen, for tests of what is made of them."""

from typing import Any

from melanoma.dataset.workers import Workers
from melanoma.deployment.overlay import Finding
from melanoma.deployment.results import Results

import numpy as np

THRESHOLDS = {"Youden": 0.4, "90 % sensitivity": 0.2}
MADE_OF = {"networks": {"a": "123"}, "views": (1, 2)}


def finding(name: str, melanoma: float = 0.3, **changes: Any) -> Finding:
    mask = np.zeros((16, 16, 1), np.uint8)
    mask[4:12, 4:8] = 1
    values: dict[str, Any] = {
        "name": name,
        "state": (f"/images/{name}.jpg", "2026-11-26T12:00:00+00:00"),
        "preview": np.full((64, 64, 3), 200, np.uint8),
        "size": (50, 30),
        "mask": mask,
        "cropped": True,
        "region": np.full((16, 16, 3), 200, np.uint8),
        "heatmap": np.eye(4),
        "probabilities": np.array([0.9 - melanoma, melanoma, 0.1], np.float32),
        "thresholds": THRESHOLDS,
        "flags": (),
    }
    return Finding(**values | changes)


def add(to: Results, *findings: Finding) -> None:
    with Workers(1) as workers:
        to.add(findings, workers)
