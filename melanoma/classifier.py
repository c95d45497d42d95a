"""The 3-class classifier: an ImageNet backbone and the head of 2018."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from melanoma import backbones, stages, training
from melanoma.calibration import IDENTITY, Calibration
from melanoma.isic import CLASSES

import keras
import numpy as np
from keras import layers

HEAD_UNITS = 1024
HEAD_DROPOUT = 0.6


@dataclass(frozen=True)
class Classifier:
    """A backbone, its preprocessing, and the head."""

    name: str  # key of `backbones.applications`
    size: int  # side of the photographs in pixels
    backbone: keras.Model
    head: keras.Model
    scaling: str | None = None  # of colours, see `backbones.preprocess`

    @property
    def network_size(self) -> int:
        """Side in pixels that the backbone works at."""
        return self.backbone.input_shape[1]

    def preprocess(self, photographs: keras.KerasTensor) -> keras.KerasTensor:
        """RGB, 0 to 255, as the backbone expects it."""
        if self.network_size != self.size:
            photographs = layers.Resizing(self.network_size, self.network_size, name="shrink")(photographs)
        return backbones.preprocess(self.name, photographs, self.scaling)

    def extractor(self) -> keras.Model:
        """From RGB (N, S, S, 3), 0 to 255, to the backbone's features (N, C)."""
        photographs = keras.Input((self.size, self.size, 3), name="photographs")
        return keras.Model(photographs, self.backbone(self.preprocess(photographs)), name=f"{self.name}_features")

    @cached_property
    def model(self) -> keras.Model:
        """From RGB (N, S, S, 3), 0 to 255, to probabilities (N, 3)."""
        photographs = keras.Input((self.size, self.size, 3), name="photographs")
        probabilities = self.head(self.backbone(self.preprocess(photographs)))
        return keras.Model(photographs, probabilities, name=f"{self.name}_classifier")


@dataclass(frozen=True)
class Ensemble:
    """Classifiers that answer together, and how they do."""

    classifiers: list[Classifier]
    turns: bool  # whether the 8 flips and quarter turns of a photograph are looked at
    calibration: Calibration = IDENTITY

    def probabilities(
        self, photographs: np.ndarray, batch_size: int, label: str, own: np.ndarray | None = None
    ) -> tuple[np.ndarray, str]:
        """Calibrated probabilities, float32 (N, 3), and what computed them; arguments as of `training.predict`."""
        models = [classifier.model for classifier in self.classifiers]
        found = training.predict(models, photographs, batch_size, label, self.turns, own)
        return self.calibration.apply(np.concatenate(list(found))), found.inference.name


def build(
    name: str, size: int, weights: str, scaling: str | None = None, network_size: int | None = None
) -> Classifier:
    """A classifier with a new head.

    Args:
        name: key of `backbones.applications`.
        size: side of the photographs in pixels.
        weights: see `backbones.build`, as are the errors.
        scaling: see `backbones.preprocess`.
        network_size: side that the backbone works at; None: that of the photographs.
    """
    backbone = backbones.build(name, network_size or size, weights, pooling="avg")
    return Classifier(name, size, backbone, build_head(backbone.output_shape[-1]), scaling)


def load(store: stages.Store, name: str) -> tuple[Ensemble, dict[str, Any]]:
    """The classifiers that were trained last with a backbone, and the settings beside their weights.

    Raises:
        StageError: there are none, or they are stale.
    """
    settings = json.loads(store.check("classifier_settings", backbone=name).read_text(encoding="utf-8"))
    paths = [store.check("classifier_weights", backbone=name, member=member) for member in settings["members"]]
    return restore(settings, paths), settings


def restore(settings: dict[str, Any], paths: Sequence[Path]) -> Ensemble:
    """The classifiers of saved settings, with the weights of these files."""
    classifiers = []
    for path in paths:
        one = build(
            settings["backbone"], settings["size"], backbones.NONE, settings["scaling"], settings["network_size"]
        )
        backbones.load_weights(one.model, path)
        classifiers.append(one)
    return Ensemble(classifiers, settings["turns"], Calibration(**settings["calibration"]))


def build_head(features: int) -> keras.Model:
    """The head of 2018, from features (N, `features`) to probabilities (N, 3) in the order of CLASSES."""
    inputs = keras.Input((features,), name="features")
    x = layers.Dense(HEAD_UNITS, activation="relu", name="dense")(inputs)
    x = layers.Dropout(HEAD_DROPOUT, name="dropout")(x)
    classes = layers.Dense(len(CLASSES), activation="softmax", dtype="float32", name="classes")(x)
    return keras.Model(inputs, classes, name="head")
