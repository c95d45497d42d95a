"""report.html and MODEL_CARD.md, written from saved metrics and figures."""

import base64
import json
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence, Set
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.atomic import write_text
from melanoma.artifacts.store import Store
from melanoma.classes import SPLIT_NAMES
from melanoma.errors import StageError
from melanoma.evaluation import scoring, tables
from melanoma.log import log

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
HUB_METRICS = {"auc": "roc_auc", "f1": "f1"}  # end of a metric's name here: its type on the Hugging Face Hub
WIDE = 900  # pixels; wider figures take the whole width of the page


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
            png = path.read_bytes()
            source = "data:image/png;base64," + base64.b64encode(png).decode()
            width = int.from_bytes(png[16:20], "big")  # PNG specification, section 11.2.1
            yield {"name": path.name, "source": source, "caption": caption, "wide": width > WIDE}


def current_files(store: Store, graphics: Path) -> set[str]:
    """Names of the files of earlier scripts that were made from the data folder as it is now; the others are logged."""
    names = set()
    for name in (*(f"{figure}.png" for figure in OF_RUN), SEGMENTATION_FILE):
        if (graphics / name).is_file():
            try:
                store.check_graphics(graphics / name)
                names.add(name)
            except StageError as error:
                log.info("not in the report: %s", error)
    return names


def made_with(metrics: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """Settings of each script that led to a system, without local folders and settings that affect only speed.

    Args:
        metrics: content of metrics.json.
        name: of the system.
    """
    used: dict[str, dict[str, Any]] = {}
    for key in metrics["systems"][name]["inputs"]:  # latest first; files of an earlier run may follow
        entry = metrics["inputs"][key]
        used.setdefault(entry["script"], entry["settings"])
    return {script: shown(used[script]) for script in contract.SCRIPTS if script in used}


def shown(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without local folders and those that affect only speed."""
    return {
        name: Path(value).name if name == "weights" else value
        for name, value in settings.items()
        if name not in NOT_SHOWN and value is not None
    }


def classifier_runs(metrics: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Settings of each run of the fourth script that led to a system, earliest first: of an ensemble several."""
    entries = [(key, metrics["inputs"][key]) for key in reversed(metrics["systems"][name]["inputs"])]
    return [one["settings"] for key, one in entries if one["script"] == contract.CLASSIFIER and key.endswith(".json")]


def is_synthetic(made: dict[str, dict[str, Any]]) -> bool:
    """Whether a run used synthetic images, according to the settings of `made_with`."""
    return bool(made.get(contract.PREPROCESSING, {}).get("synthetic"))


def commands(metrics: dict[str, Any]) -> list[str]:
    """The commands that led to the metrics, in the order of the scripts, those of the main classifier first."""
    found: dict[str, None] = {}
    all_made = [made_with(metrics, name) for name in metrics["systems"]]
    for script in contract.SCRIPTS:
        settings = [made[script] for made in all_made if script in made]
        if script == contract.CLASSIFIER:
            settings = [one for name in metrics["systems"] for one in classifier_runs(metrics, name)]
        for one in [metrics["settings"]] if script == contract.EVALUATION else settings:
            found[f"python {script} {one.get('flags', '')}".rstrip()] = None
    return list(found)


def code_fence(lines: Sequence[str]) -> str:
    """A Markdown fence that none of the lines can close."""
    return "`" * max([3, *(1 + len(run) for line in lines for run in re.findall("`+", line))])


def content(graphics: Path, metrics: dict[str, Any], current: Set[str]) -> dict[str, Any]:
    """Variables of the templates.

    Args:
        graphics: folder of the figures and of segmentation.json.
        metrics: content of metrics.json.
        current: names of the files of earlier scripts to show, see `current_files`.
    """
    results = metrics["systems"]
    name, system = next(iter(results.items()))
    made, masks = made_with(metrics, name), dict[str, Any]()
    if SEGMENTATION_FILE in current:
        masks = json.loads((graphics / SEGMENTATION_FILE).read_text(encoding="utf-8"))
    splits = scoring.report_order({split for one in results.values() for split in one["splits"]})
    figures_of_run = {figure: caption for figure, caption in OF_RUN.items() if f"{figure}.png" in current}
    evaluated = [split for split in splits if split in system["splits"]]
    lines = commands(metrics)
    return {
        "name": name,
        "submitted": system["submitted"],
        "networks": system["networks"],
        "synthetic": SYNTHETIC if is_synthetic(made) else "",
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "names": SPLIT_NAMES,
        "splits": splits,
        "counts": {
            split: one["splits"][split]["n"] for one in results.values() for split in splits if split in one["splits"]
        },
        "summaries": {split: tables.summarise(system["splits"][split], system["thresholds"]) for split in evaluated},
        "caveats": {split: scoring.caveat(split, system) for split in evaluated},
        "thresholds": system["thresholds"],
        "subgroups": system["subgroups"],
        "compared": {split: tables.compared(results, split) for split in splits},
        "compared_columns": tables.COMPARED,
        "compared_caveats": {split: tables.compared_caveats(results, split) for split in splits},
        "differences": metrics["differences"],
        "left_out": [scoring.left_out_note(split, counts) for split, counts in metrics["left_out"].items()],
        "segmentation": masks.get("splits", {}),
        "own_size": masks.get("own_size", {}),
        "figures": {split: list(embedded_figures(graphics, OF_SPLIT, f"_{split}")) for split in splits},
        "figures_of_run": list(embedded_figures(graphics, figures_of_run)),
        "made": made,
        "sources": made.get(contract.PREPROCESSING, {}).get("sources", []),
        "commands": lines,
        "fence": code_fence(lines),
        "versions": metrics["versions"],
        "columns": list(tables.COLUMNS),
        "value": tables.value_of,
        "report_order": scoring.report_order,
    }


def front_matter(variables: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """What the Hugging Face Hub reads at the top of a model card.

    Args:
        variables: from `content`.
        results: of the first system, by split.

    Source: https://github.com/huggingface/hub-docs/blob/main/modelcard.md.
    """
    sources = ["synthetic images"] if variables["synthetic"] else [one["layout"] for one in variables["sources"]]
    non_commercial = any("CC-BY-NC" in one["credit"] for one in variables["sources"])
    of_data = {"license": "cc-by-nc-4.0"} if non_commercial else {"license": "other", "license_name": "as-the-data"}
    datasets = [slug(name) for name in sources]
    return of_data | {
        "library_name": "keras",
        "pipeline_tag": "image-classification",
        "tags": ["melanoma", "dermoscopy", "medical"],
        "datasets": datasets,
        "metrics": ["roc_auc", "f1"],
        "model-index": [
            {
                "name": variables["name"],
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": sources[0], "type": datasets[0], "split": SPLIT_NAMES[split]},
                        "metrics": [
                            {"type": kind, "name": name, "value": value}
                            for name, value in results[split]["metrics"].items()
                            if value is not None and (kind := HUB_METRICS.get(name.partition(" at ")[0].split(" ")[-1]))
                        ],
                    }
                    for split in variables["summaries"]
                ],
            }
        ],
    }


def slug(text: str) -> str:
    """A name of letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write(graphics: Path, metrics: dict[str, Any], current: Set[str] = frozenset()) -> None:
    """Writes the page, and the model card if the first system is a classifier of this pipeline; see `content`."""
    environment = Environment(
        loader=PackageLoader("melanoma.evaluation"),
        autoescape=lambda name: name == TEMPLATES[PAGE],
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    variables = content(graphics, metrics, current)
    (first, *_) = metrics["systems"].values()
    variables["front_matter"] = front_matter(variables, first["splits"])
    for file in [PAGE] if variables["submitted"] else [PAGE, CARD]:
        write_text(graphics / file, environment.get_template(TEMPLATES[file]).render(variables))
