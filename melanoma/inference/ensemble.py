"""Several networks as one classifier: the mean of their calibrated probabilities."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.cli import flags
from melanoma.inference.calibration import IDENTITY, Calibration
from melanoma.inference.predict import predict
from melanoma.models import backbones, classifier

import keras
import numpy as np


@dataclass(frozen=True)
class Ensemble:
    """Networks of one backbone, of one or more cross-validation folds, and how their probabilities are combined.

    The probabilities of all networks of a fold (one per seed) are averaged and calibrated; then the folds are averaged.
    So the calibration is applied to what it is fitted on: out-of-fold predictions come from the networks of one fold.
    """

    classifiers: list[classifier.Classifier]
    members: Sequence[str]  # name of each classifier, see `splits.Member`
    views: int  # of each image whose mean is taken, see `predict.mean_output`
    calibration: Calibration = IDENTITY

    def folds(self) -> dict[str, list[keras.Model]]:
        """The networks of each fold, by the part of the members' names that says which; "" without cross-validation."""
        found: dict[str, list[keras.Model]] = {}
        for member, one in zip(self.members, self.classifiers, strict=True):
            name = contract.MEMBER_NAME.fullmatch(member)
            found.setdefault((name and name[1]) or "", []).append(one.model)
        return found

    def fold_probabilities(
        self, images: np.ndarray, batch_size: int, label: str, out_of_fold: np.ndarray | None = None
    ) -> tuple[np.ndarray, str]:
        """Mean probabilities of the networks of each fold, not calibrated, and the name of what computed them.

        Args:
            images: uint8 (N, S, S, 3), regions of interest.
            batch_size: see `predict`.
            label: see `predict`; the fold is added.
            out_of_fold: bool (N, classifiers), the classifiers to use for each image, all of one fold; None: all.

        Returns:
            float32 (N, folds, 3), with `out_of_fold` (N, 1, 3), rows sum to 1; name of the inference engine.
        """
        if out_of_fold is not None:
            models = [one.model for one in self.classifiers]
            calls = [predict(models, images, batch_size, label, self.views, out_of_fold)]
        else:
            calls = [
                predict(models, images, batch_size, label and label + fold.replace("_fold", ", fold "), self.views)
                for fold, models in self.folds().items()
            ]
        found = np.stack([np.concatenate(list(call)) for call in calls], axis=1)
        return found, ", ".join(sorted({call.inference.name for call in calls}))

    def combine(self, probabilities: np.ndarray) -> np.ndarray:
        """Calibrates the probabilities of each fold and averages them: float32 (N, folds, 3) to (N, 3)."""
        return self.calibration.apply(probabilities).mean(axis=1)

    def probabilities(self, images: np.ndarray, batch_size: int, label: str) -> tuple[np.ndarray, str]:
        """Calibrated probabilities, float32 (N, 3), and the name of what computed them; see `fold_probabilities`."""
        found, engine = self.fold_probabilities(images, batch_size, label)
        return self.combine(found), engine


@dataclass(frozen=True)
class Blend:
    """The mean of ensembles of different backbones."""

    parts: list[Ensemble]

    def probabilities(self, images: np.ndarray, batch_size: int, label: str) -> tuple[np.ndarray, str]:
        """As `Ensemble.probabilities`."""
        found, engines = zip(*(part.probabilities(images, batch_size, label) for part in self.parts), strict=True)
        return np.mean(found, axis=0), ", ".join(sorted(set(engines)))


def load(store: Store, name: str, views: int | None = None) -> tuple[Blend, dict[str, Any]]:
    """A classifier of the data folder, and the settings saved with its weights.

    Args:
        store: the data folder.
        name: the classifier's backbone, contract.ENSEMBLE or contract.PRETRAINED.
        views: of each image whose mean is taken, see `predict.mean_output`; None: as saved.

    Raises:
        StageError: they are missing or stale.
    """
    settings = json.loads(store.check("classifier_settings", backbone=name).read_text(encoding="utf-8"))
    parts = []
    for part in settings["parts"]:
        found = [
            store.check("classifier_weights", backbone=part["weights"], member=member) for member in part["members"]
        ]
        parts.append(restore(part | {"views": views or part["views"]}, settings["size"], found))
    return Blend(parts), settings


def restore(part: dict[str, Any], size: int, paths: Sequence[Path]) -> Ensemble:
    """The networks described by an entry of `parts` in saved settings, with the weights of these files.

    Args:
        part: backbone, members, views, calibration, and what Preprocessing lists.
        size: side of the images in pixels.
        paths: one weight file for each member.

    Raises:
        InputError: a weight file does not fit or is damaged.
    """
    classifiers = []
    preprocessing = flags.to_dataclass(classifier.Preprocessing, {"colour_constancy": False} | part)
    for path in paths:
        one = classifier.build(part["backbone"], size, backbones.NONE, preprocessing)
        backbones.load_weights(one.model, path)
        classifiers.append(one)
    return Ensemble(classifiers, list(part["members"]), part["views"], Calibration(**part["calibration"]))
