"""Both networks as one, with what lies between them: from images to lesion masks and calibrated probabilities."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.classes import CLASSES, MELANOMA, TASKS
from melanoma.dataset import roi
from melanoma.dataset.splits import list_members
from melanoma.deployment import foreign
from melanoma.deployment.foreign import Detector
from melanoma.deployment.images import Read
from melanoma.deployment.overlay import Finding
from melanoma.errors import StageError
from melanoma.inference import classify, ensemble, gradcam, openvino, pretrained
from melanoma.inference.ensemble import Blend
from melanoma.inference.predict import views_flag
from melanoma.inference.segment import MaskOptions, Segmenter
from melanoma.metrics import classification
from melanoma.models import backbones, segmentation

import keras
import numpy as np

BATCH_SIZE = 16  # images per network call


@dataclass(frozen=True)
class Predicted:
    """What the networks find in N images."""

    masks: np.ndarray  # uint8 (N, S, S, 1), {0, 1}: the lesion
    regions: np.ndarray  # uint8 (N, R, R, 3), what the classifier sees
    probabilities: np.ndarray  # float32 (N, 3), calibrated, in the order of CLASSES
    foreign: np.ndarray  # bool (N,), whether the image is unlike those of training; False if that is unknown


@dataclass(frozen=True)
class Pipeline:
    """Segmentation, region of interest and classification, as in the scripts from the second to the fourth.

    Attributes:
        size: side of the images in pixels.
        segmenter: networks for the lesion mask.
        roi: region of interest, see `dataset.roi`.
        region_size: side of the regions of interest in pixels.
        classifier: networks for the class.
        thresholds: {class: {operating point: probability from which an image counts as of the class}}.
        made_of: what identifies networks and settings, for `results`.
        detector: of images unlike those of training; None: there is none for these networks.
        synthetic: whether the networks were trained on generated images.
    """

    size: int
    segmenter: Segmenter
    roi: str
    region_size: int
    classifier: Blend
    thresholds: Mapping[str, Mapping[str, float]]
    made_of: Mapping[str, Any]
    detector: Detector | None = None
    synthetic: bool = False

    def __post_init__(self) -> None:
        """Freezes the networks, so that OpenVINO need not look for new weights."""
        for model in self.networks():
            model.trainable = False

    def networks(self) -> list[keras.Model]:
        """All networks but that of Grad-CAM."""
        classifiers = [one.model for part in self.classifier.parts for one in part.classifiers]
        return [*self.segmenter.models, *classifiers, *([self.detector.features] if self.detector else [])]

    def predict(self, images: np.ndarray) -> Predicted:
        """Predicts images, uint8 (N, size, size, 3)."""
        lesion = np.concatenate(list(self.segmenter.probabilities(images, "")))
        masks = self.segmenter.segment(lesion)
        regions = self.regions(images, masks)
        probabilities, _ = self.classifier.probabilities(regions, BATCH_SIZE, "")
        unlike = self.detector.flags(images, lesion, masks) if self.detector else np.zeros(len(images), bool)
        return Predicted(masks, regions, probabilities, unlike)

    def regions(self, images: np.ndarray, masks: np.ndarray) -> np.ndarray:
        """What the classifier sees of images, uint8 (N, size, size, 3), with masks, uint8 (N, size, size, 1)."""
        pairs = zip(images, masks, strict=True)
        return np.stack([roi.region_of_interest(image, mask, self.roi, self.region_size)[0] for image, mask in pairs])

    def find(self, images: Sequence[Read], explain: bool) -> list[Finding]:
        """What is known of images that were read; `explain`: whether with Grad-CAM."""
        if not images:
            return []
        predicted = self.predict(np.stack([one.image for one in images]))
        heatmaps = self.explain(predicted) if explain else [None] * len(images)
        columns = zip(
            *(images, predicted.masks, predicted.regions, heatmaps, predicted.probabilities, predicted.foreign),
            strict=True,
        )
        return [
            Finding(
                one.file.name,
                one.state,
                one.preview,
                one.size,
                mask,
                self.roi == "crop",
                region,
                heatmap,
                probabilities,
                self.thresholds[CLASSES[MELANOMA]],
                [*one.flags, foreign.FLAG] if unlike else one.flags,
            )
            for one, mask, region, heatmap, probabilities, unlike in columns
        ]

    def warm_up(self) -> None:
        """Prepares the networks, in seconds, for many predictions of few images each."""
        openvino.convert([*self.networks(), self.classifier.parts[0].classifiers[0].feature_maps])
        self.explain(self.predict(np.zeros((1, self.size, self.size, 3), np.uint8)))

    def describe(self) -> str:
        """The networks, and whether they are of any use on real images."""
        found = [f"{len(part.classifiers)} {part.classifiers[0].name}" for part in self.classifier.parts]
        warning = " Trained on synthetic images: the results say nothing about real lesions." if self.synthetic else ""
        return f"Classifiers: {', '.join(found)}; segmentation networks: {len(self.segmenter.models)}.{warning}"

    def explain(self, predicted: Predicted) -> np.ndarray:
        """Grad-CAM of melanoma in each region, by the first network; see `gradcam.class_activation`."""
        network = self.classifier.parts[0].classifiers[0]
        classes = np.full(len(predicted.regions), MELANOMA)
        return gradcam.class_activation(network, predicted.regions, classes, BATCH_SIZE)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which networks predict; see `load`."""
    networks = parser.add_mutually_exclusive_group()
    networks.add_argument(
        "--pretrained", action="store_true", help="use the networks in pretrained/; the default without --data"
    )
    networks.add_argument("--data", type=Path, help="data folder with networks that the scripts trained")
    parser.add_argument(
        "--backbone", type=backbones.backbone_name, help="use only the classifier of this backbone; default: the best"
    )
    views_flag(parser)


def load(data: Path | None, views: int | None, backbone: str | None) -> Pipeline:
    """The networks in a data folder, see `from_data`; None: see `from_pretrained`."""
    return from_data(data, views, backbone) if data else from_pretrained(views, backbone)


def from_pretrained(views: int | None = None, backbone: str | None = None) -> Pipeline:
    """The networks in `pretrained/`.

    Args:
        views: of each image whose mean is taken, by all networks; None: as packed.
        backbone: whose classifiers alone are used; None: all.

    Raises:
        InputError: see `pretrained.load_classifier`.
    """
    classifier, description = pretrained.load_classifier(None, views, backbone)
    size = description["size"]
    models, masks = pretrained.load_segnet(size)
    options = MaskOptions(views or masks["views"], True, BATCH_SIZE)
    detector, checksum = foreign.load(models[0], masks)
    checksums = {**masks["sha256"], **description["sha256"], foreign.FILE: checksum}
    return Pipeline(
        size,
        Segmenter(models, masks["threshold"], options),
        description["roi"],
        size,
        classifier,
        description["thresholds"] or default_thresholds(),
        {"networks": checksums, "backbone": backbone, "views": views},
        detector,
    )


def from_data(data: Path, views: int | None = None, backbone: str | None = None) -> Pipeline:
    """The networks that the scripts trained in a data folder.

    Args:
        data: the folder.
        views: see `from_pretrained`.
        backbone: name of the classifier; None: the first of `Store.classifiers`.

    Raises:
        StageError: networks are missing or stale.
    """
    store = Store(data, contract.EVALUATION, {})
    name = backbone or next(iter(store.classifiers()), None)
    if name is None:
        raise StageError(f"{data} contains no classifier: run {contract.CLASSIFIER} first")
    region = classify.roi_setting(store)
    classifier, settings = ensemble.load(store, name, views)
    size = store.load("images", split=store.splits()[0]).shape[1]
    segmenter = load_segmenter(store, size, views)
    made_with = store.written_with("images", split=store.splits()[0])
    return Pipeline(
        size,
        segmenter,
        region,
        settings["size"],
        classifier,
        load_thresholds(store, name, settings),
        {"networks": store.inputs, "backbone": name, "views": views},
        synthetic=bool(made_with.get("synthetic")) and name != contract.PRETRAINED,
    )


def load_segmenter(store: Store, size: int, views: int | None) -> Segmenter:
    """The segmentation networks with which the masks of a data folder were predicted."""
    used = store.written_with("predicted", split=store.splits()[0])
    if used["pretrained"]:
        models, settings = pretrained.load_segnet(size)
    else:
        settings = json.loads(store.check("segnet_settings").read_text(encoding="utf-8"))
        members = list_members(used["folds"], used["seeds"], used["seed"])
        models = segmentation.restore(
            settings["design"], size, [store.check("segnet_weights", member=member.name) for member in members]
        )
    threshold = used["threshold"] or settings["threshold"]
    return Segmenter(
        models, threshold, MaskOptions(views or used["views"] or settings["views"], used["clean"], BATCH_SIZE)
    )


def load_thresholds(store: Store, name: str, settings: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The thresholds that `evaluate.py` chose for a classifier, or those that the pretrained networks bring."""
    if settings.get("thresholds"):
        return settings["thresholds"]
    if not store.has("thresholds", backbone=name):
        return default_thresholds()
    return json.loads(store.check("thresholds", backbone=name).read_text(encoding="utf-8"))


def default_thresholds() -> dict[str, dict[str, float]]:
    """The thresholds of classifiers for which none were chosen."""
    return {CLASSES[index]: classification.default_points() for index in TASKS}
