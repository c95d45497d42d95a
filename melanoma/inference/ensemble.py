"""Several classifiers as one: the mean of their probabilities, calibrated."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melanoma.artifacts.store import Store
from melanoma.inference.calibration import IDENTITY, Calibration
from melanoma.inference.predict import predict
from melanoma.models import backbones, classifier

import numpy as np


@dataclass(frozen=True)
class Ensemble:
    """Classifiers whose probabilities are averaged, and how."""

    classifiers: list[classifier.Classifier]
    tta: bool  # whether to average over the 8 flips and quarter turns of each image
    calibration: Calibration = IDENTITY

    def probabilities(
        self, images: np.ndarray, batch_size: int, label: str, out_of_fold: np.ndarray | None = None
    ) -> tuple[np.ndarray, str]:
        """Calibrated probabilities, and the name of what computed them.

        Args:
            images: uint8 (N, S, S, 3), regions of interest.
            batch_size: see `predict`, as are label and out_of_fold.
            label: see there.
            out_of_fold: see there.

        Returns:
            float32 (N, 3), rows sum to 1; name of the inference engine.
        """
        models = [one.model for one in self.classifiers]
        predictions = predict(models, images, batch_size, label, self.tta, out_of_fold)
        return self.calibration.apply(np.concatenate(list(predictions))), predictions.inference.name


def load(store: Store, name: str) -> tuple[Ensemble, dict[str, Any]]:
    """A classifier of the data folder, and the settings saved with its weights.

    Args:
        store: the data folder.
        name: the classifier's backbone, or contract.PRETRAINED.

    Raises:
        StageError: they are missing or stale.
    """
    settings = json.loads(store.check("classifier_settings", backbone=name).read_text(encoding="utf-8"))
    paths = [store.check("classifier_weights", backbone=name, member=member) for member in settings["members"]]
    return restore(settings, paths), settings


def restore(settings: dict[str, Any], paths: Sequence[Path]) -> Ensemble:
    """The classifiers described by saved settings, with the weights of these files.

    Raises:
        InputError: a weight file does not fit or is damaged.
    """
    classifiers = []
    for path in paths:
        one = classifier.build(
            settings["backbone"], settings["size"], backbones.NONE, settings["scaling"], settings["input_size"]
        )
        backbones.load_weights(one.model, path)
        classifiers.append(one)
    return Ensemble(classifiers, settings["tta"], Calibration(**settings["calibration"]))
