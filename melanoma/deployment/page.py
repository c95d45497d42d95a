"""All predicted images on one HTML page, those with the highest probability of melanoma first.

The page contains the overlays reduced, and links to the full ones beside it.
"""

import base64
import heapq
import io
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from melanoma.artifacts.atomic import atomic_write
from melanoma.classes import CLASSES, MELANOMA
from melanoma.dataset.workers import Workers
from melanoma.deployment.results import FLAGS, IMAGE, OVERLAY, PROBABILITIES, TABLE, Results, threshold_columns

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from PIL import Image

PAGE, TEMPLATE, SHARED = "report.html", "predictions.html.jinja", "shared.html.jinja"
MAX_IMAGES = 500  # on the page: about 15 MB
WIDTH, QUALITY = 640, 70  # pixels, JPEG: 30 kB an image


def template(name: str) -> Template:
    """A template of this package."""
    environment = Environment(
        loader=PackageLoader("melanoma.deployment"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def data_url(picture: Image.Image, quality: int) -> str:
    """An RGB image as data URL, a JPEG of this quality."""
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def embedded(path: Path) -> str:
    """An overlay as data URL, reduced; "" if there is none. For workers."""
    if not path.is_file():
        return ""
    with Image.open(path) as picture:
        small = picture.convert("RGB")
    small.thumbnail((WIDTH, WIDTH))
    return data_url(small, QUALITY)


def write(results: Results, description: Mapping[str, Any], workers: Workers) -> Path:
    """Writes the page from what is in the folder.

    Args:
        results: the folder.
        description: lines on networks and data, see the template.
        workers: reduce the overlays.

    Returns:
        The page.
    """
    melanoma = PROBABILITIES[MELANOMA]
    highest = heapq.nlargest(MAX_IMAGES, results.rows(), key=lambda row: float(row[melanoma]))
    paths = [results.folder / OVERLAY.format(name=row[IMAGE]) for row in highest]
    images = (
        {
            "name": row[IMAGE],
            "overlay": overlay,
            "link": OVERLAY.format(name=row[IMAGE]),
            "probabilities": {name: float(row[column]) for name, column in zip(CLASSES, PROBABILITIES, strict=True)},
            "melanoma": float(row[melanoma]),
            "decisions": {
                point: row[column]
                for point, column in zip(results.thresholds, threshold_columns([*results.thresholds]), strict=True)
            },
            "flags": row[FLAGS],
        }
        for row, overlay in zip(highest, workers.map(embedded, paths), strict=True)
    )
    variables = {
        "images": images,
        "shown": len(highest),
        "total": sum(1 for _ in results.rows()),
        "thresholds": results.thresholds,
        "table": TABLE,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **description,
    }
    path = results.folder / PAGE
    with atomic_write(path) as stream:
        for part in template(TEMPLATE).generate(variables):
            stream.write(part.encode(errors="backslashreplace"))
    return path
