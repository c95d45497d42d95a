"""The 3-class classifier: an ImageNet backbone and the head of 2018."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from melanoma import backbones, stages
from melanoma.isic import CLASSES

import keras
from keras import layers

HEAD_UNITS = 1024
HEAD_DROPOUT = 0.6


@dataclass(frozen=True)
class Classifier:
    """A backbone, its preprocessing, and the head."""

    name: str  # key of `backbones.applications`
    backbone: keras.Model
    head: keras.Model
    scaling: str | None = None  # of colours, see `backbones.preprocess`

    def preprocess(self, photographs: keras.KerasTensor) -> keras.KerasTensor:
        """RGB, 0 to 255, as the backbone expects it."""
        return backbones.preprocess(self.name, photographs, self.scaling)

    def extractor(self) -> keras.Model:
        """From RGB (N, S, S, 3), 0 to 255, to the backbone's features (N, C)."""
        photographs = keras.Input(self.backbone.input_shape[1:], name="photographs")
        return keras.Model(photographs, self.backbone(self.preprocess(photographs)), name=f"{self.name}_features")

    @cached_property
    def model(self) -> keras.Model:
        """From RGB (N, S, S, 3), 0 to 255, to probabilities (N, 3)."""
        photographs = keras.Input(self.backbone.input_shape[1:], name="photographs")
        probabilities = self.head(self.backbone(self.preprocess(photographs)))
        return keras.Model(photographs, probabilities, name=f"{self.name}_classifier")


def build(name: str, size: int, weights: str, scaling: str | None = None) -> Classifier:
    """A classifier with a new head; arguments and errors as of `backbones.build`."""
    backbone = backbones.build(name, size, weights, pooling="avg")
    return Classifier(name, backbone, build_head(backbone.output_shape[-1]), scaling)


def load(store: stages.Store, name: str) -> tuple[Classifier, dict[str, Any]]:
    """The classifier that was trained last with a backbone, and the settings beside its weights.

    Raises:
        StageError: there is none, or it is stale.
    """
    settings = json.loads(store.check("classifier_settings", backbone=name).read_text(encoding="utf-8"))
    found = build(name, settings["size"], backbones.NONE, settings["scaling"])
    backbones.load_weights(found.model, store.check("classifier_weights", backbone=name))
    return found, settings


def build_head(features: int) -> keras.Model:
    """The head of 2018, from features (N, `features`) to probabilities (N, 3) in the order of CLASSES."""
    inputs = keras.Input((features,), name="features")
    x = layers.Dense(HEAD_UNITS, activation="relu", name="dense")(inputs)
    x = layers.Dropout(HEAD_DROPOUT, name="dropout")(x)
    classes = layers.Dense(len(CLASSES), activation="softmax", dtype="float32", name="classes")(x)
    return keras.Model(inputs, classes, name="head")
