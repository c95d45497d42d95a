"""The networks in `pretrained/`, for segmentation and classification without training."""

import json
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.atomic import sha256
from melanoma.artifacts.store import Store
from melanoma.dataset.splits import OFFICIAL
from melanoma.errors import InputError
from melanoma.inference.ensemble import Ensemble, restore
from melanoma.models import backbones, segmentation

import keras

FOLDER = Path(__file__).parents[2] / "pretrained"
SEGNET, CLASSIFIER = "segnet", "classifier"
ADVICE = "restore it from the repository, or train without --pretrained"


def read(network: str) -> tuple[dict[str, Any], list[Path]]:
    """The description of a pretrained network and its weight files.

    Args:
        network: SEGNET or CLASSIFIER.

    Raises:
        InputError: a file is missing, or its checksum is wrong.
    """
    description = FOLDER / f"{network}.json"
    if not description.is_file():
        raise InputError(f"--pretrained: {description} is missing; {ADVICE}")
    settings = json.loads(description.read_text(encoding="utf-8"))
    for name, expected in settings["sha256"].items():
        path = FOLDER / name
        if not path.is_file():
            raise InputError(f"--pretrained: {path} is missing; {ADVICE}")
        if (found := sha256(path)) != expected:
            raise InputError(f"--pretrained: {path} has SHA-256 {found}, expected {expected}; {ADVICE}")
    return settings, [FOLDER / name for name in settings["sha256"]]


def refuse_other_split(store: Store, split: str) -> None:
    """Makes sure that no network is evaluated on images it was trained on.

    Raises:
        InputError: the images are not split as in the challenge.
    """
    if (division := store.written_with("ids", split=split)["split"]) != OFFICIAL:
        raise InputError(
            f"--pretrained: the networks were trained on the train images of the {OFFICIAL} split, some of which "
            f"--split {division} uses for evaluation: run {contract.PREPROCESSING} with --split {OFFICIAL}"
        )


def load_segnet(size: int) -> tuple[keras.Model, dict[str, Any]]:
    """The segmentation network for images of `size` pixels a side, and its description; see `read`."""
    settings, (weights,) = read(SEGNET)
    model = segmentation.build(segmentation.Design(**settings["design"]), size)
    backbones.load_weights(model, weights)
    return model, settings


def load_classifier(size: int) -> tuple[Ensemble, dict[str, Any]]:
    """The classifiers for images of `size` pixels a side, and their description; see `read`."""
    settings, weights = read(CLASSIFIER)
    return restore(settings | {"size": size}, weights), settings
