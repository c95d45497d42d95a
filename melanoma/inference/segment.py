"""Lesion masks of every split: the threshold chosen on validation, and the prediction of all images."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from melanoma.artifacts.store import Store
from melanoma.dataset.splits import originals_with_mask
from melanoma.inference import postprocess
from melanoma.inference.predict import Predictions, predict
from melanoma.log import log

import keras
import numpy as np


@dataclass(frozen=True)
class MaskOptions:
    """How predicted probabilities become masks."""

    views: int  # of each image whose mean is taken, see `predict.mean_output`
    clean: bool  # keep the largest component only, with its holes filled
    batch_size: int


@dataclass(frozen=True)
class Segmenter:
    """Segmentation networks, and how their probabilities become masks."""

    models: Sequence[keras.Model]  # whose mean probability counts
    threshold: float  # see `postprocess.segment`
    options: MaskOptions

    def probabilities(self, images: np.ndarray, label: str, out_of_fold: np.ndarray | None = None) -> Predictions:
        """Probabilities of lesion, float32 (N, S, S, 1), one block at a time; see `predict`."""
        return predict(self.models, images, self.options.batch_size, label, self.options.views, out_of_fold)

    def segment(self, probability: np.ndarray) -> np.ndarray:
        """Masks, uint8 (N, S, S, 1), {0, 1}, from probabilities."""
        return postprocess.segment(probability, self.threshold, self.options.clean)

    def masks(self, images: np.ndarray, label: str, out_of_fold: np.ndarray | None = None) -> Predictions:
        """Predicted masks, one block at a time; see `probabilities` and `segment`."""
        found = self.probabilities(images, label, out_of_fold)
        return Predictions(found.inference, map(self.segment, found))


def choose_threshold(store: Store, models: Sequence[keras.Model], options: MaskOptions) -> tuple[float, dict[str, Any]]:
    """The threshold with the best masks on validation, of its images that have a mask.

    Returns:
        The threshold, and for the report: mean Jaccard index with and without test-time augmentation, clean-up and a
        chosen threshold, and images per second by number of views. The default threshold and no report where validation
        has no masks.
    """
    rows = originals_with_mask(store, "val")
    if not len(rows):
        return postprocess.DEFAULT_THRESHOLD, {}
    images, truth = store.load("images", split="val")[rows], store.load("masks", split="val")[rows]
    probabilities, rates = {}, {}
    list(predict(models, images[:1], options.batch_size, "warm-up"))  # Keras compiles
    for views in sorted({1, options.views}):
        label = f"validation, {'without test-time augmentation' if views == 1 else f'{views} views'}"
        blocks = predict(models, images, options.batch_size, label, views)
        blocks.inference.networks()  # converts the networks, so that the rate is of predicting only
        store.settings["inference"] = blocks.inference.name
        start = time.perf_counter()
        probabilities[views] = np.concatenate(list(blocks))
        rates[views] = len(images) / (time.perf_counter() - start)
    effects = postprocess.effects(truth, probabilities)
    log.info("\nMean Jaccard index on validation with and without test-time augmentation, clean-up, chosen threshold:")
    for row in effects:
        steps = [
            "no test-time augmentation" if row["views"] == 1 else f"{row['views']} views",
            *(["clean-up"] if row["clean"] else []),
        ]
        log.info("  %-56s%.4f", ", ".join([*steps, f"threshold {row['threshold']:.2f}"]), row["jaccard"])
    wanted = {"views": options.views, "clean": options.clean, "threshold_chosen": True}
    threshold = next(float(row["threshold"]) for row in effects if row.items() >= wanted.items())
    return threshold, {
        "effects_on_validation": effects,
        "images_per_second": rates,
    }


def write_masks(store: Store, segmenter: Segmenter, out_of_fold: np.ndarray | None) -> None:
    """Writes the predicted masks of every split.

    Args:
        store: data folder.
        segmenter: the networks.
        out_of_fold: for the rows of train, see `predict`.
    """
    for split in store.splits():
        images = store.load("images", split=split)
        blocks = segmenter.masks(images, f"masks of {split}", out_of_fold if split == "train" else None)
        with store.writer("predicted", len(images), (*images.shape[1:3], 1), split=split) as file:
            for block in blocks:
                file.append(block)
            store.settings["inference"] = blocks.inference.name
