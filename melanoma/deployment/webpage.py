"""What the page of app.py shows of uploaded images."""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from melanoma.classes import CLASSES
from melanoma.deployment import images, overlay, page
from melanoma.deployment.images import Broken, ImageFile, Read
from melanoma.deployment.pipeline import Pipeline

ANSWER = "answer.html.jinja"
STYLE = Path(__file__).parent / "templates" / "webpage.css"
MAX_IMAGES = 20  # at a time
QUALITY = 85  # of the JPEG: text stays sharp, 100 kB an image


def answer(networks: Pipeline, paths: Sequence[Path]) -> Iterator[str]:
    """HTML on one file after the other: overlay, probabilities and what to check, or why it cannot be read.

    Args:
        networks: whose predictions are shown.
        paths: the files, which are deleted in the end, also if the caller does not wait for it.
    """
    template = page.template(ANSWER)
    names = images.unique_names([PurePosixPath(path.name) for path in paths])
    try:
        if len(paths) > MAX_IMAGES:
            yield template.render(name=f"{len(paths)} files", reason=f"drop at most {MAX_IMAGES} at a time")
            return
        for file in map(ImageFile, paths, names):
            yield template.render(name=file.path.name, **describe(networks, images.read((file, networks.size))))
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def describe(networks: Pipeline, read: Read | Broken) -> dict[str, Any]:
    """What the template shows of a file besides its name."""
    if isinstance(read, Broken):
        path = read.file.path
        if not path.exists():  # Gradio stores equal files once
            return {"reason": "dropped twice, and deleted with the first answer: drop it again"}
        return {"reason": read.reason.replace(str(path), path.name)}
    (finding,) = networks.find([read], explain=True)
    return {
        "overlay": page.data_url(overlay.draw(finding), QUALITY),
        "probabilities": dict(zip(CLASSES, finding.probabilities.tolist(), strict=True)),
        "thresholds": finding.thresholds,
        "decisions": finding.decisions,
        "to_check": finding.to_check,
    }
