"""The PNGs of each script, drawn from arrays and metrics with the functions of `plots`."""

import re
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from melanoma.artifacts.atomic import write_text
from melanoma.artifacts.contract import MEMBER_NAME
from melanoma.artifacts.store import Store
from melanoma.classes import CLASSES, MELANOMA, SPLIT_NAMES, SPLITS, TASKS
from melanoma.dataset import checks
from melanoma.dataset.cache import Cache
from melanoma.dataset.splits import UNLABELLED, are_original, load_labels
from melanoma.errors import InputError
from melanoma.evaluation import plots
from melanoma.evaluation.scoring import System
from melanoma.log import log
from melanoma.metrics import bootstrap, classification, segmentation
from melanoma.sources.records import Record

import numpy as np
import pandas as pd

PAIRS = 8  # duplicates shown
DOUBTS, DOUBTS_PER_ROW = 12, 4  # doubtful masks shown
ORIGINALS, COPIES = 2, 3  # of each minority class, and of each original, in the figure of augmented copies
MASKS = 4  # worst, median and best masks shown, of each
IMAGES = 2  # of each class in the figure of regions of interest

# Of evaluate.py, by split.
ROC, PRECISION_RECALL, RELIABILITY = "roc_{split}.png", "precision_recall_{split}.png", "reliability_{split}.png"
MELANOMA_CONFUSION, CLASS_CONFUSION = "confusion_melanoma_{split}.png", "confusion_classes_{split}.png"
OCCLUSION, GRADCAM, COMPARISON = "occlusion_{split}.png", "gradcam_{split}.png", "comparison_{split}.png"
OF_SPLIT = (ROC, PRECISION_RECALL, RELIABILITY, MELANOMA_CONFUSION, CLASS_CONFUSION, OCCLUSION, GRADCAM)
ROC_AXES = ("1 - specificity", "sensitivity")
PRECISION_RECALL_AXES = ("recall (sensitivity)", "precision")


def describe(split: str, labels: np.ndarray) -> str:
    """Split and number of images, for a title."""
    return f"{SPLIT_NAMES[split]}, n = {len(labels)}"


def by_class(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Which images belong to each class that occurs, and which have no label: {name: bool (N,)}."""
    names = {**dict(enumerate(CLASSES)), UNLABELLED: "no label"}
    return {name: labels == label for label, name in names.items() if (labels == label).any()}


def remove(folder: Path, names: Sequence[str], keep: Sequence[Path] = ()) -> None:
    """Removes files of an earlier run, so that none is left beside new results.

    Args:
        folder: folder of the files.
        names: file names, {split} standing for every split.
        keep: files that this run reads.

    Raises:
        InputError: one of `keep` is among the files to remove; nothing is removed then.
    """
    paths = {(folder / name.format(split=split)).resolve() for name in names for split in SPLITS}
    if conflicts := [str(path) for path in keep if path.resolve() in paths]:
        raise InputError(f"{conflicts[0]} is a file that this run replaces: pass a copy with another name")
    for path in paths:
        path.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------- preprocessing


def draw_duplicates(path: Path, pairs: Sequence[checks.Duplicate], cache: Cache) -> None:
    """Draws the first pairs of duplicates, those across splits first; removes an old figure if there are none."""
    path.unlink(missing_ok=True)
    shown = sorted(pairs, key=lambda pair: not pair.leaks)[:PAIRS]
    tiles = [
        plots.Tile(cache.pixels(record)[0], f"{record.id}, {split}")
        for pair in shown
        for record, split in ((pair.record, pair.split), (pair.other, pair.other_split))
    ]
    if tiles:
        title = f"Duplicates, {len(shown)} of {len(pairs)} pairs"
        plots.image_grid(path, [tiles[start : start + 4] for start in range(0, len(tiles), 4)], title)


def draw_doubtful_masks(path: Path, records: Sequence[tuple[Record, str]], cache: Cache) -> None:
    """Draws the first images with doubtful masks, darkened outside of these; removes an old figure if there are none.

    Args:
        path: PNG to write.
        records: records with masks, and the doubt about each.
        cache: cache into which the records were read.
    """
    path.unlink(missing_ok=True)
    tiles = []
    for record, doubt in records[:DOUBTS]:
        image, mask = cache.pixels(record)
        shown = image if mask is None else image // (2 - mask)
        tiles.append(plots.Tile(shown, f"{record.id}\n{doubt}", truth=mask))
    if tiles:
        rows = [tiles[start : start + DOUBTS_PER_ROW] for start in range(0, len(tiles), DOUBTS_PER_ROW)]
        plots.image_grid(path, rows, f"Doubtful masks, {len(tiles)} of {len(records)}; outside darkened")


def draw_copies(store: Store, path: Path) -> None:
    """Draws images of the minority classes beside their first augmented copies, with the contours of their masks.

    Removes an old figure if train has no labels or no masks.
    """
    path.unlink(missing_ok=True)
    if not (store.has("labels", split="train") and store.has("masks", split="train")):
        return
    ids, labels, source, images, masks, has_mask = (
        store.load(name, split="train") for name in ("ids", "labels", "source", "images", "masks", "has_mask")
    )
    tiles = []
    for label in TASKS:
        for original in np.flatnonzero(are_original(source) & (labels == label))[:ORIGINALS]:
            rows = np.flatnonzero(source == original)[: 1 + COPIES]
            titles = [f"{CLASSES[label]}, {ids[original]}", *["copy"] * COPIES]
            tiles.append(
                [
                    plots.Tile(images[row], title, truth=masks[row] if has_mask[row] else None)
                    for row, title in zip(rows, titles, strict=False)
                ]
            )
    if tiles:
        plots.image_grid(path, tiles, "Minority classes: originals (left) and their augmented copies")


# ------------------------------------------------------------------------------------------------------------- training


def draw_training(
    stem: Path,
    names: dict[str, str],
    title: str,
    history: dict[str, list[float]],
    seconds: Sequence[float],
    kept_epoch: int,
) -> None:
    """Writes {stem}_history.csv, one line per epoch, and {stem}_curves.png.

    Args:
        stem: folder and start of the file names.
        names: {quantity: axis label} of the curves, see `plots.training_curves`.
        title: title of the figure.
        history: {quantity: value of each epoch}; validation values have the prefix val_.
        seconds: duration of each epoch.
        kept_epoch: the epoch whose weights were kept, counted from 1; 0 if none was.
    """
    table = pd.DataFrame({"epoch": range(1, len(seconds) + 1), "seconds": seconds, **history})
    write_text(stem.with_name(f"{stem.name}_history.csv"), table.to_csv(index=False))
    plots.training_curves(stem.with_name(f"{stem.name}_curves.png"), names, title, history, kept_epoch)


def remove_curves(graphics: Path, network: str, kept: Set[str] = frozenset()) -> None:
    """Removes the training curves and histories of a network, of all phases and members, except those of kept stems."""
    pattern = re.compile(
        rf"({re.escape(network)}(_(head|full|pretrain){MEMBER_NAME.pattern})?)_(curves\.png|history\.csv)"
    )
    for path in graphics.glob(f"{network}*"):
        if (match := pattern.fullmatch(path.name)) and match[1] not in kept:
            path.unlink()


# ------------------------------------------------------------------------------------------------------ masks and crops


def draw_overlays(store: Store, shown: np.ndarray, path: Path) -> None:
    """Draws the worst, median and best predicted masks of validation over their images.

    Args:
        store: with images, true and predicted masks.
        shown: int (K,), rows of the images to choose from.
        path: PNG.
    """
    images = store.load("images", split="val")  # memory-mapped: only those drawn are read
    ids, truth, predicted = (store.load(name, split="val")[shown] for name in ("ids", "masks", "predicted"))
    jaccard = segmentation.per_image(truth, predicted)["jaccard"]
    order, count = np.argsort(jaccard), min(MASKS, len(jaccard))
    middle = max(0, (len(order) - count) // 2)
    groups = {"worst": order[:count], "median": order[middle : middle + count], "best": order[::-1][:count]}
    tiles = [
        [
            plots.Tile(images[shown[row]], f"{name}: {ids[row]}, {jaccard[row]:.2f}", truth[row], predicted[row])
            for row in rows
        ]
        for name, rows in groups.items()
    ]
    plots.image_grid(path, tiles, "Lesion masks, validation: truth cyan, prediction yellow, Jaccard index")


def draw_jaccard(store: Store, shown: np.ndarray, path: Path) -> None:
    """Draws the Jaccard index of the predicted masks of validation by lesion size and class; see `draw_overlays`."""
    truth, predicted = (store.load(name, split="val")[shown] for name in ("masks", "predicted"))
    groups = by_class(load_labels(store, "val")[shown])
    jaccard = segmentation.per_image(truth, predicted)["jaccard"]
    title = f"Lesion masks, {describe('val', truth)}"
    plots.jaccard(path, truth.mean(axis=(1, 2, 3)), jaccard, groups, title)


def draw_roi(store: Store, split: str, roi: str, path: Path) -> None:
    """Draws image, predicted mask and region of interest for the first images of each class.

    Args:
        store: data folder with the arrays of the split.
        split: train, val or test.
        roi: value of --roi, for the titles.
        path: PNG to write.
    """
    ids, images = store.load("ids", split=split), store.load("images", split=split)
    predicted, regions = store.load("predicted", split=split), store.load("roi", split=split)
    tiles = [
        [
            tile
            for row in np.flatnonzero(members)[:IMAGES]
            for tile in (
                plots.Tile(images[row], f"{name}\n{ids[row]}"),
                plots.Tile(predicted[row], "predicted mask"),
                plots.Tile(regions[row], f"--roi {roi}"),
            )
        ]
        for name, members in by_class(load_labels(store, split)).items()
    ]
    plots.image_grid(path, tiles, f"What the classifier sees, first images of {split}")


# ----------------------------------------------------------------------------------------------------------- evaluation


def draw_evaluation(folder: Path, split: str, labels: np.ndarray, systems: Sequence[System], seed: int) -> None:
    """Draws a split's curves of the systems that predict it, and calibration and confusion matrices of the first one.

    Args:
        folder: folder of the PNGs.
        split: split of the images.
        labels: int (N,), index into CLASSES.
        systems: all systems; if the first has no predictions for this split, only curves of the others are drawn.
        seed: seed of the bootstrap.
    """
    images, main = describe(split, labels), systems[0]
    predicted = [system for system in systems if split in system.probabilities]
    roc, precision_recall = curves(split, labels, predicted, seed)
    if roc:
        title = f"Each class against the rest, {images}"
        points = dict.fromkeys(point for thresholds in predicted[0].thresholds.values() for point in thresholds)
        legend = [f"threshold: {point}" for point in points]
        plots.plot_curves(folder / ROC.format(split=split), roc, title, ROC_AXES, "chance", legend)
        path = folder / PRECISION_RECALL.format(split=split)
        plots.plot_curves(path, precision_recall, title, PRECISION_RECALL_AXES, points=legend)
    if split not in main.probabilities:
        return
    if len(systems) > 1:
        images += f"\n{main.name}"
    probabilities = main.probabilities[split]
    bins = {
        CLASSES[index]: classification.calibration_bins(labels == index, probabilities[:, index]) for index in TASKS
    }
    plots.reliability(folder / RELIABILITY.format(split=split), bins, f"Calibration, {images}")
    melanoma, threshold = CLASSES[MELANOMA], main.first_threshold(MELANOMA)
    matrix = classification.binary_confusion(labels == MELANOMA, probabilities[:, MELANOMA] >= threshold)
    title = f"Melanoma at probability {threshold:.3f}, {images}"
    plots.confusion(folder / MELANOMA_CONFUSION.format(split=split), matrix, ("benign", melanoma), title)
    matrix = classification.class_confusion(labels, probabilities)
    plots.confusion(folder / CLASS_CONFUSION.format(split=split), matrix, CLASSES, f"Predicted class, {images}")


def curves(
    split: str, labels: np.ndarray, systems: Sequence[System], seed: int
) -> tuple[list[plots.Curve], list[plots.Curve]]:
    """ROC and precision-recall curves of both tasks; the first system's with band and operating points.

    Those of one system are in one panel; those of several in a panel for each task.

    Args:
        split: split of the images.
        labels: int (N,), index into CLASSES.
        systems: systems with predictions for this split.
        seed: seed of the bootstrap.

    Returns:
        No curves of a task if all images are of its class, or none is.
    """
    roc, precision_recall = [], []
    for colour, index in enumerate(TASKS):
        name, truth = CLASSES[index], labels == index
        if not 0 < truth.sum() < len(truth):
            log.info("%s: no curves of %s, because the images are either all or none of this class", split, name)
            continue
        for style, system in enumerate(systems):
            score = system.probabilities[split][:, index]
            alone = len(systems) == 1
            look: dict[str, Any] = {"colour": colour if alone else style, "style": style}
            panel, label = ("", name) if alone else (name, system.name)
            thresholds = system.thresholds.get(name, {}) if style == 0 else {}
            roc_points, recall_points = points_at(truth, score, list(thresholds.values()))
            band = bootstrap.roc_band(truth, score, seed) if style == 0 else None
            title = f"{label}: AUC {classification.auc(truth, score):.3f}"
            roc.append(plots.Curve(panel, title, *classification.roc_curve(truth, score), roc_points, band, **look))
            title = f"{label}: AP {classification.average_precision(truth, score):.3f}"
            line = classification.precision_recall_curve(truth, score)
            precision_recall.append(plots.Curve(panel, title, *line, recall_points, **look))
    return roc, precision_recall


def points_at(
    truth: np.ndarray, score: np.ndarray, thresholds: Sequence[float]
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Points of the ROC and of the precision-recall curve at given thresholds; both classes must occur in `truth`."""
    roc, precision_recall = [], []
    for threshold in thresholds:
        confusion = classification.binary_confusion(truth, score >= threshold)
        false_positive_rate, sensitivity = (confusion[:, 1] / confusion.sum(axis=1)).tolist()
        roc.append((false_positive_rate, sensitivity))
        precision_recall.append((sensitivity, confusion[1, 1] / max(confusion[:, 1].sum(), 1)))
    return roc, precision_recall


def draw_comparison(folder: Path, split: str, labels: np.ndarray, systems: Sequence[System], seed: int) -> None:
    """Draws the ROC curves of two systems; arguments as of `draw_evaluation`."""
    roc, _ = curves(split, labels, systems, seed)
    if roc:
        title = f"{' and '.join(system.name for system in systems)}, {describe(split, labels)}"
        plots.plot_curves(folder / COMPARISON.format(split=split), roc, title, ROC_AXES, "chance")


def draw_occlusion(folder: Path, split: str, variants: dict[str, dict[str, Any]], title: str) -> None:
    """Draws the AUCs of the occlusion test; nothing if none is defined.

    Args:
        folder: folder of the PNG.
        split: split of the images.
        variants: {variant: {"metrics": {name: value}, "intervals": {name: interval}}}.
        title: title of the figure.
    """
    names = [name for name, value in next(iter(variants.values()))["metrics"].items() if value is not None]
    groups = {
        name.removesuffix(" auc"): {
            variant: (scored["metrics"][name], scored["intervals"][name]) for variant, scored in variants.items()
        }
        for name in names
    }
    if groups:
        plots.forest_plot(folder / OCCLUSION.format(split=split), groups, "AUC", 0.5, title)
