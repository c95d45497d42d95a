"""report.html and MODEL_CARD.md, written from saved metrics and figures."""

import base64
import json
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.atomic import write_text
from melanoma.classes import SPLIT_NAMES
from melanoma.evaluation import scoring, tables

from jinja2 import Environment, PackageLoader, StrictUndefined

PAGE, CARD, METRICS_FILE, SEGMENTATION_FILE = "report.html", "MODEL_CARD.md", "metrics.json", "segmentation.json"
TEMPLATES = {PAGE: "report.html.jinja", CARD: "model_card.md.jinja"}
SYNTHETIC = "Synthetic images: these numbers show that the pipeline works; they say nothing about real lesions."

# Settings that name local folders, or affect only speed or the evaluation itself.
NOT_SHOWN = {"data", "graphics", "source", "jobs", "cluster", "predictions", "compare", "metadata", "occlusion"}

# Figures of a split and their captions, in the order of the page.
OF_SPLIT = {
    "roc": "ROC curves: sensitivity against false positive rate (1 - specificity), each class against the rest. Dots: "
    "the operating points of the tables. Band: 95 % bootstrap interval of the sensitivity at each false positive rate.",
    "precision_recall": "Precision against recall, each class against the rest. Unlike the ROC curve it depends on how "
    "frequent the class is among the images.",
    "confusion_melanoma": "Melanoma against nevus and keratosis together, at the first operating point.",
    "confusion_classes": "The three classes; predicted is the class with the highest probability.",
    "reliability": "Calibration: observed frequency of a class against its predicted probability, in ten bins. On the "
    "dotted line, 30 of 100 images with probability 0.3 are of the class; below it the probabilities are too high. "
    "Bars: 95 % Wilson intervals. Bottom: number of images in each bin.",
    "occlusion": "Occlusion test: the classifier on unchanged images, on images whose lesion (predicted mask) is "
    "replaced by the mean colour of the skin around it, and, except with --roi mask, on images that show nothing but "
    "the lesion. An AUC above 0.5 without the lesion comes from its surroundings, or from its position, size and "
    "shape.",
    "gradcam": "Grad-CAM: bright regions raise the probability of the predicted class. Rows: most confident correct "
    "predictions, most confident errors, least confident predictions. For an ensemble, those of its first network.",
}
OF_RUN = {
    "segnet_overlays": "The worst, median and best predicted masks of validation (yellow) and the true ones (cyan).",
    "segnet_jaccard": "Jaccard index of the predicted masks by size and class of the lesion.",
    "roi": "Image, predicted mask and what the classifier sees.",
}
WIDE = ("occlusion", "gradcam", "segnet_overlays", "segnet_jaccard", "roi")


def commit() -> str:
    """Commit of the running code, with "-dirty" if it was changed since; "unknown" outside a Git checkout."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def embedded_figures(folder: Path, captions: dict[str, str], suffix: str = "") -> Iterator[dict[str, Any]]:
    """File name, data URL, caption and width of those figures that exist."""
    for name, caption in captions.items():
        path = folder / f"{name}{suffix}.png"
        if path.is_file():
            source = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
            yield {"name": path.name, "source": source, "caption": caption, "wide": name in WIDE}


def made_with(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings of each script of the run, without local folders and settings that affect only speed.

    Args:
        metrics: content of metrics.json.
    """
    used: dict[str, dict[str, Any]] = {}
    for entry in metrics["inputs"].values():  # latest first; files of an earlier run may follow
        used.setdefault(entry["script"], entry["settings"])
    return {
        script: {
            name: Path(value).name if name == "weights" else value
            for name, value in used[script].items()
            if name not in NOT_SHOWN and value is not None
        }
        for script in contract.SCRIPTS
        if script in used
    }


def is_synthetic(made: dict[str, dict[str, Any]]) -> bool:
    """Whether a run used synthetic images, according to the settings of `made_with`."""
    return bool(made.get(contract.PREPROCESSING, {}).get("synthetic"))


def content(graphics: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """Variables of the templates.

    Args:
        graphics: folder of the figures and of segmentation.json.
        metrics: content of metrics.json.
    """
    name, system = next(iter(metrics["systems"].items()))
    masks, made = graphics / SEGMENTATION_FILE, made_with(metrics)
    splits = scoring.report_order(system["splits"])
    return {
        "name": name,
        "submitted": system["submitted"],
        "synthetic": SYNTHETIC if is_synthetic(made) else "",
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "names": SPLIT_NAMES,
        "summaries": {split: tables.summarise(system["splits"][split], system["thresholds"]) for split in splits},
        "caveats": {split: scoring.caveat(split, system["chosen_on"], system["submitted"]) for split in splits},
        "thresholds": system["thresholds"],
        "subgroups": system["subgroups"],
        "others": {other: system for other, system in metrics["systems"].items() if other != name},
        "segmentation": json.loads(masks.read_text(encoding="utf-8"))["splits"] if masks.is_file() else {},
        "figures": {split: list(embedded_figures(graphics, OF_SPLIT, f"_{split}")) for split in splits},
        "figures_of_run": list(embedded_figures(graphics, OF_RUN)),
        "made": made,
        "commands": [
            f"python {script} {settings.get('flags', '')}".rstrip()
            for script, settings in (made | {contract.EVALUATION: metrics["settings"]}).items()
        ],
        "versions": metrics["versions"],
        "columns": list(tables.COLUMNS),
        "value": tables.value_of,
        "report_order": scoring.report_order,
    }


def write(graphics: Path, metrics: dict[str, Any]) -> None:
    """Writes the page, and the model card if the first system is this pipeline's classifier; see `content`."""
    environment = Environment(
        loader=PackageLoader("melanoma.evaluation"),
        autoescape=lambda name: name == TEMPLATES[PAGE],
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    variables = content(graphics, metrics)
    for file in [PAGE] if variables["submitted"] else [PAGE, CARD]:
        write_text(graphics / file, environment.get_template(TEMPLATES[file]).render(variables))
