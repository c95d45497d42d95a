"""Step 5 of 5: melanoma against the rest, seborrheic keratosis against the rest, on validation and test.

Reads   data/arrays/{val,test}_{ids,labels}.npy             from step 1
        data/arrays/{val,test}_probabilities.npy            from step 4
Writes  graphics/roc_{val,test}.png                         ROC curves, areas, operating points
        graphics/confusion_melanoma_{val,test}.png          benign (nevus and keratosis) against melanoma
        graphics/confusion_classes_{val,test}.png           the three classes
        graphics/metrics.json                               every figure with its 95 % interval
        graphics/predictions_{val,test}.csv                 a line per image: id and probabilities
        data/weights/thresholds.json                        the thresholds chosen on validation

Run     python evaluate.py
Try     python evaluate.py --limit 30
Expect  README, "Results"
"""

import argparse
from pathlib import Path
from typing import Any

from melanoma import command, isic, metrics, plots, stages
from melanoma.command import log

import numpy as np
import pandas as pd

RANKED = (isic.MELANOMA, isic.KERATOSIS)  # the challenge's two tasks
ROC, BINARY, CLASSES = "roc_{split}.png", "confusion_melanoma_{split}.png", "confusion_classes_{split}.png"
TABLE = "predictions_{split}.csv"
FIGURES = (ROC, BINARY, CLASSES, TABLE)
DEFAULT_THRESHOLD = 0.5  # where no validation labels choose a better one


def choose_thresholds(store: stages.Store) -> dict[str, float]:
    """For each task, the threshold of highest sensitivity + specificity on validation; saved for later use."""
    thresholds = {isic.CLASSES[index]: DEFAULT_THRESHOLD for index in RANKED}
    chosen_on = None
    if store.has("probabilities", split="val") and store.has("labels", split="val"):
        chosen_on = "val"
        labels, probabilities = store.load("labels", split="val"), store.load("probabilities", split="val")
        for index in RANKED:
            truth = labels == index
            if 0 < truth.sum() < len(truth):
                thresholds[isic.CLASSES[index]] = metrics.youden_threshold(truth, probabilities[:, index])
            else:
                log.info("validation has one side only of %s: threshold %.2f", isic.CLASSES[index], DEFAULT_THRESHOLD)
    else:
        log.info("no labelled validation images: thresholds stay at %.2f", DEFAULT_THRESHOLD)
    store.save_json("thresholds", {"chosen_on": chosen_on, "thresholds": thresholds})
    return thresholds


def draw(split: str, labels: np.ndarray, probabilities: np.ndarray, thresholds: dict[str, float], folder: Path) -> None:
    """Draws ROC curves and confusion matrices of a split."""
    about = f"{isic.OFFICIAL_NAMES[split].removesuffix('_v2').lower()}, n = {len(labels)}"
    curves = []
    for index in RANKED:
        name = isic.CLASSES[index]
        truth, score = labels == index, probabilities[:, index]
        if not 0 < truth.sum() < len(truth):
            log.info("%s: only one side of %s occurs: no ROC curve", split, name)
            continue
        confusion = metrics.binary_confusion(truth, score >= thresholds[name])
        point = confusion[:, 1] / confusion.sum(axis=1)
        curves.append(plots.Curve(f"{name} against the rest", metrics.roc_curve(truth, score), point))
    if curves:
        plots.roc(folder / ROC.format(split=split), curves, f"ROC, {about}")
    melanoma = isic.CLASSES[isic.MELANOMA]
    positive = probabilities[:, isic.MELANOMA] >= thresholds[melanoma]
    binary = metrics.binary_confusion(labels == isic.MELANOMA, positive)
    title = f"Melanoma at probability {thresholds[melanoma]:.3f}, {about}"
    plots.confusion(folder / BINARY.format(split=split), binary, ("benign", "melanoma"), title)
    classes = metrics.class_confusion(labels, probabilities)
    plots.confusion(folder / CLASSES.format(split=split), classes, isic.CLASSES, f"Likeliest class, {about}")


def score(labels: np.ndarray, probabilities: np.ndarray, thresholds: dict[str, float], seed: int) -> dict[str, Any]:
    """Every figure of a split, with intervals and counts."""

    def compute(rows: np.ndarray) -> dict[str, float | None]:
        return metrics.figures(labels[rows], probabilities[rows], thresholds)

    melanoma = probabilities[:, isic.MELANOMA] >= thresholds[isic.CLASSES[isic.MELANOMA]]
    return {
        "n": len(labels),
        "of_each_class": {name: int((labels == label).sum()) for label, name in enumerate(isic.CLASSES)},
        "figures": compute(np.arange(len(labels))),
        "intervals": metrics.intervals(compute, labels, seed),
        "melanoma_confusion": metrics.binary_confusion(labels == isic.MELANOMA, melanoma).tolist(),
        "class_confusion": metrics.class_confusion(labels, probabilities).tolist(),
    }


def main(arguments: argparse.Namespace) -> None:
    """Chooses thresholds on validation and judges every split but train."""
    for figure in FIGURES:
        for split in isic.SPLITS:  # none of an earlier run may stay beside other numbers
            (arguments.graphics / figure.format(split=split)).unlink(missing_ok=True)
    store = stages.Store(arguments.data, stages.EVALUATION, vars(arguments))
    splits = [split for split in store.splits() if split != "train"]
    probabilities = {split: np.array(store.load("probabilities", split=split)) for split in splits}
    thresholds = choose_thresholds(store)
    report: dict[str, Any] = {"thresholds": thresholds, "splits": {}}
    for split in splits:
        table = pd.DataFrame(probabilities[split], columns=isic.CLASSES)
        table.insert(0, "image_id", store.load("ids", split=split))
        arguments.graphics.mkdir(parents=True, exist_ok=True)
        table.to_csv(arguments.graphics / TABLE.format(split=split), index=False, float_format="%.6f")
        if not store.has("labels", split=split):
            log.info("\n%s has no labels: predictions only, in predictions_%s.csv; no figures, no plots", split, split)
            continue
        labels = np.array(store.load("labels", split=split))
        draw(split, labels, probabilities[split], thresholds, arguments.graphics)
        scored = report["splits"][split] = score(labels, probabilities[split], thresholds, arguments.seed)
        note = "; thresholds chosen on these very images" if split == "val" else ""
        log.info("\n%s, n = %d, with 95 %% bootstrap intervals%s", split, scored["n"], note)
        for line in command.table(scored["figures"], scored["intervals"]):
            log.info("%s", line)
    if not report["splits"]:
        log.info("\nnothing to judge: neither validation nor test has labels")
    stages.write_json(arguments.graphics / "metrics.json", report | store.provenance())
    log.info("\nfigures in %s", arguments.graphics / "metrics.json")


if __name__ == "__main__":
    command.run(command.parser(__doc__), main)
