"""What is written for each image: a line of predictions.csv, a mask, an overlay; and what is written already."""

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melanoma.artifacts.atomic import atomic_write, write_json, write_text
from melanoma.classes import CLASSES
from melanoma.dataset.workers import Workers
from melanoma.deployment.images import Broken, ImageFile
from melanoma.deployment.overlay import Finding, draw
from melanoma.errors import InputError
from melanoma.inference import postprocess
from melanoma.log import log

from PIL import Image

TABLE, SUBMISSION, FAILED, SETTINGS = "predictions.csv", "submission.csv", "failed.csv", "settings.json"
MASK, OVERLAY = "masks/{name}_segmentation.png", "overlays/{name}.png"
IMAGE, FLAGS = "image", "flags"
STATE = "file", "changed"  # see `images.ImageFile.state`
PROBABILITIES = tuple(name.replace(" ", "_") for name in CLASSES)
COMPRESSION = 1  # zlib level of the PNGs: the fastest


def threshold_columns(points: Sequence[str]) -> list[str]:
    """Columns that say whether an image counts as melanoma at each operating point."""
    return ["melanoma_at_" + re.sub(r"[^a-z0-9.]+", "_", point.lower()).strip("_") for point in points]


@dataclass(frozen=True)
class Results:
    """The output folder of predictions."""

    folder: Path
    thresholds: Mapping[str, float]  # of melanoma, by operating point

    @property
    def columns(self) -> list[str]:
        """Header of predictions.csv."""
        return [IMAGE, *PROBABILITIES, *threshold_columns([*self.thresholds]), FLAGS, *STATE]

    def open(self, made_of: Mapping[str, Any], overwrite: bool) -> None:
        """Prepares the folder for a run; keeps the lines of an interrupted one.

        Args:
            made_of: what the results depend on besides the images, as JSON.
            overwrite: whether results of another run may be replaced.

        Raises:
            InputError: the folder has results of a run with other networks or settings, or of other columns.
        """
        table, settings = self.folder / TABLE, self.folder / SETTINGS
        found = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else None
        wanted = json.loads(json.dumps(made_of))
        if overwrite:
            table.unlink(missing_ok=True)
        header = _line(self.columns)
        text = table.read_text(encoding="utf-8") if table.exists() else ""
        if text and (found != wanted or not text.startswith(header)):
            raise InputError(
                f"{table} was made with other networks, settings or code: use another --out, or --overwrite"
            )
        write_json(settings, wanted)
        complete = text[: text.rfind("\n") + 1] or header
        if complete != text:  # no table yet, or its last line was being written
            write_text(table, complete)

    def rows(self) -> Iterator[dict[str, str]]:
        """The lines of predictions.csv."""
        with (self.folder / TABLE).open(encoding="utf-8", newline="") as stream:
            yield from csv.DictReader(stream)

    def without_line(self, found: Sequence[ImageFile]) -> list[ImageFile]:
        """The images that have no line yet.

        Raises:
            InputError: the line under an image's name is of another file, or the file has changed since.
        """
        known = {row[IMAGE]: tuple(row[column] for column in STATE) for row in self.rows()}
        states = {one.name: one.state() for one in found if one.name in known}
        if others := [name for name, state in states.items() if state != known[name]]:
            raise InputError(
                f"{self.folder / TABLE} has results of other or older files under {len(others)} of these names, e.g. "
                f"{others[0]} from {' of '.join(known[others[0]])}: use another --out, or --overwrite to replace all"
            )
        if count := len(known.keys() - states.keys()):
            log.info("%s holds results of %d other images, which stay there and on the page", self.folder, count)
        return [one for one in found if one.name not in known]

    def add(self, findings: Sequence[Finding], workers: Workers) -> None:
        """Writes masks and overlays, and after them the lines of the table, so that a line says that all is written."""
        for _ in workers.map(write_images, ((self.folder, one) for one in findings)):
            pass
        with (self.folder / TABLE).open("a", encoding="utf-8", newline="") as stream:
            for one in findings:
                values = one.probabilities.tolist()
                numbers = [f"{value:.9g}" for value in values]
                stream.write(_line([one.name, *numbers, *one.decisions.values(), one.to_check, *one.state]))
            stream.flush()
            os.fsync(stream.fileno())

    def write_submission(self) -> None:
        """Writes the probabilities alone, as the tools of the challenges want them."""
        with atomic_write(self.folder / SUBMISSION) as stream:
            stream.write(_line([IMAGE, *PROBABILITIES]).encode())
            for row in self.rows():
                stream.write(_line([row[IMAGE], *(row[column] for column in PROBABILITIES)]).encode())

    def write_failed(self, broken: Sequence[Broken]) -> None:
        """Writes the images that could not be read, and why; without any, deletes the file of an earlier run."""
        path = self.folder / FAILED
        path.unlink(missing_ok=True)
        if broken:
            lines = [[IMAGE, "reason", "file"], *([one.file.name, one.reason, one.file.state()[0]] for one in broken)]
            write_text(path, "".join(map(_line, lines)))


def _line(cells: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def write_images(task: tuple[Path, Finding]) -> None:
    """Writes the mask of an image at its own size, single-channel, 0 or 255, and its overlay; for workers.

    Args:
        task: output folder, and what is known of the image; without Grad-CAM there is no overlay.
    """
    folder, finding = task
    mask = 255 * postprocess.enlarge(finding.mask, finding.size)[..., 0]
    _save(Image.fromarray(mask), folder / MASK.format(name=finding.name))
    if finding.heatmap is not None:
        _save(draw(finding), folder / OVERLAY.format(name=finding.name))


def _save(picture: Image.Image, path: Path) -> None:
    with atomic_write(path) as stream:
        picture.save(stream, "PNG", compress_level=COMPRESSION)
