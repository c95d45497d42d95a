"""Occlusion test: the classifier without the lesion and with nothing but the lesion; Grad-CAM of notable cases."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melanoma.artifacts.store import Store
from melanoma.classes import CLASSES
from melanoma.cli import hardware
from melanoma.dataset.roi import region_of_interest
from melanoma.evaluation import figures, plots, scoring
from melanoma.inference import gradcam
from melanoma.inference.ensemble import Blend, load
from melanoma.log import log
from melanoma.models.classifier import Classifier

import numpy as np
from scipy import ndimage

MARGIN = 0.03  # fraction of the image's side by which an occluded lesion is dilated: its rim would reveal it
AS_TRAINED, OCCLUDED, LESION_ONLY = "as trained", "lesion occluded", "lesion only"
VARIANTS = (AS_TRAINED, OCCLUDED, LESION_ONLY)
CASES = 4  # of each kind in the Grad-CAM figure
BATCH_SIZE = 16


@dataclass(frozen=True)
class Predicted:
    """Images as the classifier sees them, with its predictions."""

    images: np.ndarray  # uint8 (N, S, S, 3)
    labels: np.ndarray  # int (N,)
    probabilities: np.ndarray  # float32 (N, 3)


def variants(roi: str) -> tuple[str, ...]:
    """The variants that differ: with a black background (`mask`) the lesion is all there is."""
    return (AS_TRAINED, OCCLUDED) if roi == "mask" else VARIANTS


def occlude(image: np.ndarray, mask: np.ndarray, variant: str) -> np.ndarray:
    """Replaces the lesion, or everything but the lesion, by the mean colour of the skin around it.

    Args:
        image: uint8 (S, S, 3).
        mask: uint8 (S, S, 1), {0, 1}; if it is empty or full, the image is returned unchanged.
        variant: one of VARIANTS.

    Returns:
        uint8 (S, S, 3).
    """
    if variant == AS_TRAINED or not mask.any() or mask.all():
        return image
    iterations = max(1, round(MARGIN * len(image)))
    dilated = ndimage.binary_dilation(mask[..., 0], iterations=iterations)
    skin = image[~dilated].mean(axis=0) if not dilated.all() else image[mask[..., 0] == 0].mean(axis=0)
    occluded = dilated if variant == OCCLUDED else mask[..., 0] == 0
    return np.where(occluded[..., None], skin.round().astype(np.uint8), image)


def rows_with_lesion(store: Store, split: str) -> np.ndarray:
    """Rows whose predicted mask is neither empty nor full, int (K,); the others cannot be occluded."""
    area = np.concatenate([block.mean(axis=(1, 2, 3)) for block in store.blocks("predicted", split=split)])
    return np.flatnonzero((area > 0) & (area < 1))


def occluded_rois(store: Store, split: str, variant: str, roi: str) -> Iterator[np.ndarray]:
    """Occluded images as the classifier sees them, uint8 (B, S, S, 3), one block at a time."""
    side = store.load("roi", split=split).shape[1]
    for block, masks in zip(store.blocks("images", split=split), store.blocks("predicted", split=split), strict=True):
        pairs = zip(block, masks, strict=True)
        yield np.stack([region_of_interest(occlude(image, mask, variant), mask, roi, side)[0] for image, mask in pairs])


def notable_cases(labels: np.ndarray, probabilities: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Rows of the most confident correct and wrong and of the least confident predictions, `count` of each.

    Args:
        labels: int (N,).
        probabilities: float (N, 3).
        count: at most this many rows of each kind.
    """
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    order = np.argsort(-confidence, kind="stable")
    return {
        "most confident correct": order[correct[order]][:count],
        "most confident errors": order[~correct[order]][:count],
        "least confident": order[::-1][:count],
    }


def gradcam_tiles(network: Classifier, predicted: Predicted, kind: str, rows: np.ndarray) -> list[plots.Tile]:
    """Images with the Grad-CAM of their predicted class; titles give kind, truth and prediction."""
    classes = predicted.probabilities.argmax(axis=1)
    heatmaps = gradcam.class_activation(network, predicted.images[rows], classes[rows], BATCH_SIZE)
    return [
        plots.Tile(
            predicted.images[row],
            f"{kind}\ntruth: {CLASSES[predicted.labels[row]]}\n"
            f"predicted: {CLASSES[classes[row]]} ({predicted.probabilities[row].max():.2f})",
            heatmap=heatmap,
        )
        for row, heatmap in zip(rows, heatmaps, strict=True)
    ]


def draw_gradcam(path: Path, network: Classifier, predicted: Predicted, title: str) -> None:
    """Draws the Grad-CAM of the notable cases, one row per kind."""
    cases = notable_cases(predicted.labels, predicted.probabilities, CASES)
    tiles = [gradcam_tiles(network, predicted, kind, rows) for kind, rows in cases.items() if len(rows)]
    plots.image_grid(path, tiles, title)


def predict_variants(
    store: Store, ensemble: Blend, split: str, roi: str, rows: np.ndarray, labels: np.ndarray
) -> tuple[dict[str, Predicted], set[str]]:
    """Predictions of each variant of some images of a split, and what computed them.

    Args:
        store: with images and predicted masks of the split.
        ensemble: the classifier.
        split: val or test.
        roi: region of interest that the classifiers were trained on.
        rows: int (K,), the images.
        labels: int (K,), their labels.
    """
    predicted, inference = {}, set()
    for variant in variants(roi):
        images = np.concatenate(list(occluded_rois(store, split, variant, roi)))[rows]
        probabilities, computed_by = ensemble.probabilities(images, BATCH_SIZE, f"{split}, {variant}")
        predicted[variant] = Predicted(images, labels, probabilities)
        inference.add(computed_by)
    return predicted, inference


def evaluate(
    store: Store, name: str, images: scoring.Images, graphics: Path, seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Runs the occlusion test on validation and test, and draws its AUCs and the Grad-CAM of notable cases.

    Train is left out: all networks but one were trained on each of its images.

    Args:
        store: with images, predicted masks and the classifier.
        name: of the classifier.
        images: rows and labels of the images to use; those without a predicted lesion are left out.
        graphics: folder of the PNGs.
        seed: seed of the bootstrap.

    Returns:
        {split: {variant: {"metrics": ..., "intervals": ...}}}.
    """
    hardware.check()
    ensemble, settings = load(store, name)
    results, inference = {}, set()
    for split in (split for split in images.labels if split != "train"):
        usable = np.isin(images.rows[split], rows_with_lesion(store, split))
        rows, labels = images.rows[split][usable], images.labels[split][usable]
        if not len(rows):
            log.info("%s: no occlusion test, because every predicted mask is empty or full", split)
            continue
        predicted, computed_by = predict_variants(store, ensemble, split, settings["roi"], rows, labels)
        inference |= computed_by
        results[split] = {
            variant: scoring.score_aucs(one.labels, one.probabilities, seed) for variant, one in predicted.items()
        }
        shown = f"{figures.describe(split, labels)}, {name}"
        figures.draw_occlusion(graphics, split, results[split], f"Occlusion test, {shown}")
        path = graphics / figures.GRADCAM.format(split=split)
        title = f"Grad-CAM of the predicted class, {shown}"
        draw_gradcam(path, ensemble.parts[0].classifiers[0], predicted[AS_TRAINED], title)
    store.settings["inference"] = ", ".join(sorted(inference))
    return results
