"""The page and the card that tell a run: graphics/report.html and graphics/MODEL_CARD.md, from saved figures alone."""

import base64
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from melanoma import evaluation, stages

from jinja2 import Environment, PackageLoader, StrictUndefined

PAGE, CARD, FIGURES = "report.html", "MODEL_CARD.md", "metrics.json"
TEMPLATES = {PAGE: "report.html.jinja", CARD: "model_card.md.jinja"}

# Settings that say where and how quickly, or what else the last script judged.
SILENT = {"data", "graphics", "source", "jobs", "cluster", "predictions", "compare", "metadata", "probe"}

# What each picture shows, in the order of the page.
OF_SPLIT = {
    "roc": "How many lesions of a class are found (sensitivity) at the price of how many false alarms. At each rate of "
    "false alarms the band holds 95 % of the curves of images drawn anew; the dots are at the thresholds named.",
    "precision_recall": "How many of the alarms are right (precision) when so many of the lesions are found (recall). "
    "It falls with the share of the class among the images, unlike the ROC curve.",
    "reliability": "What comes true of the probabilities. On the dotted line, of 100 lesions with 30 % probability 30 "
    "are of the class. Below it the network is too sure. Bars: 95 % intervals; below, how many images each bin has.",
    "confusion_melanoma": "Melanoma against nevus and keratosis together, at the first of the thresholds.",
    "confusion_classes": "The likeliest of the three classes.",
    "probe": "The same network on photographs whose lesion, as the predicted mask has it, is painted over with the "
    "colour of the skin around; and, unless it never sees more, on nothing but the lesion. What stays above 0.5 "
    "without the lesion comes from its surroundings, or from its place, size and outline.",
    "gradcam": "Bright is where the evidence for the likeliest class lies, for the surest answers that are right, the "
    "surest that are wrong, and the least sure; of several networks, as the first sees it.",
}
OF_RUN = {
    "segnet_overlays": "Predicted lesion masks of validation, worst, median and best, beside the true ones.",
    "segnet_jaccard": "How good the masks are by size and class of the lesion.",
    "masked": "What the classifier gets to see.",
}


def commit() -> str:
    """The commit of the code that runs, "-dirty" where it was changed since; "unknown" outside a Git checkout."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def embedded(path: Path) -> str:
    """A PNG as a data URL."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def pictures(folder: Path, captions: dict[str, str], suffix: str = "") -> Iterator[dict[str, str]]:
    """Those of the named pictures that there are, with what they show."""
    for name, caption in captions.items():
        path = folder / f"{name}{suffix}.png"
        if path.is_file():
            yield {"name": path.name, "source": embedded(path), "caption": caption}


def shown(value: float | None, interval: tuple[float, float] | None) -> str:
    """A figure with its interval, for a table."""
    if value is None:
        return "undefined"
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def content(graphics: Path, report: dict[str, Any], segmentation: dict[str, Any] | None, own: bool) -> dict[str, Any]:
    """What the templates say.

    Args:
        graphics: folder of the pictures.
        report: of metrics.json.
        segmentation: of segmentation.json; None: there is none.
        own: whether the first system is the own network.
    """
    systems = report["systems"]
    name, made = next(iter(systems)), made_with(report)
    splits = systems[name]["splits"]
    return {
        "name": name,
        "own": own,
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "names": evaluation.SPOKEN,
        "caveats": {split: evaluation.caveat(split, systems[name]["chosen_on"], own) for split in splits},
        "judged": splits,
        "main": "test" if "test" in splits else next(iter(splits), None),
        "thresholds": systems[name]["thresholds"],
        "others": {other: system for other, system in systems.items() if other != name},
        "subgroups": systems[name].get("subgroups", {}),
        "segmentation": segmentation,
        "pictures": {split: list(pictures(graphics, OF_SPLIT, f"_{split}")) for split in splits},
        "pictures_of_run": list(pictures(graphics, OF_RUN)),
        "made": made,
        "versions": report["versions"],
    }


def made_with(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of each script of the run, but for those that say where and how quickly."""
    used: dict[str, dict[str, Any]] = {}
    for one in report["inputs"].values():  # the latest come first; files of an earlier run may be behind them
        used.setdefault(one["script"], one["settings"])
    return {
        script: {
            name: Path(value).name if name == "weights" else value  # where it lay is nobody's business
            for name, value in used[script].items()
            if name not in SILENT and value is not None
        }
        for script in stages.SCRIPTS
        if script in used
    }


def write(graphics: Path, report: dict[str, Any], segmentation: dict[str, Any] | None, own: bool) -> None:
    """Writes the page, and the card where the first system is the own network; arguments as of `content`."""
    environment = Environment(
        loader=PackageLoader("melanoma"),
        autoescape=lambda name: name == TEMPLATES[PAGE],
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = lambda figure, scored: shown(scored["figures"][figure], scored["intervals"][figure])
    said = content(graphics, report, segmentation, own)
    for file, template in TEMPLATES.items() if own else [(PAGE, TEMPLATES[PAGE])]:
        stages.write_text(graphics / file, environment.get_template(template).render(said))
