"""The networks in `pretrained/`, for segmentation and classification without training."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

from melanoma.artifacts.atomic import sha256
from melanoma.artifacts.store import Store
from melanoma.classes import SPLIT_NAMES
from melanoma.dataset.splits import are_original
from melanoma.errors import InputError
from melanoma.inference.ensemble import Blend, restore
from melanoma.log import log
from melanoma.models import segmentation
from melanoma.sources.records import IMAGE_SUFFIXES

import keras

FOLDER = Path(__file__).parents[2] / "pretrained"
SEGNET, CLASSIFIER = "segnet", "classifier"
ADVICE = "restore it from the repository, or train without --pretrained"
HASH_DIGITS = 16  # hexadecimal: two of a million ids share a hash with a probability of 3e-8
DOWNSAMPLED = "_DOWNSAMPLED"  # suffix of the ids of some ISIC 2019 images; the image is that of the id without it
ARCHIVE_ID = re.compile(r"(?:^|_)(ISIC_\d{7})$")  # the name of a data set may precede it


def hash_id(image_id: str) -> str:
    """Identifies an image across the ISIC challenges.

    Args:
        image_id: id or file name; case, the extension, DOWNSAMPLED, and what precedes an ARCHIVE_ID make no difference.

    Returns:
        The first HASH_DIGITS hexadecimal digits of the id's SHA-256.
    """
    path = PurePath(image_id)
    stem = path.stem if path.suffix.lower() in IMAGE_SUFFIXES else image_id
    normalised = stem.upper().removesuffix(DOWNSAMPLED)
    if found := ARCHIVE_ID.search(normalised):
        normalised = found[1]
    return hashlib.sha256(normalised.encode(errors="surrogateescape")).hexdigest()[:HASH_DIGITS]


def hash_training_ids(store: Store, extra: bool) -> list[str]:
    """Sorted hashes of the ids of train, of --source or of --extra, augmented copies not counted."""
    ids, source, origin = (store.load(name, split="train") for name in ("ids", "source", "origin"))
    return sorted(hash_id(image_id) for image_id in ids[are_original(source) & ((origin > 0) == extra)].tolist())


def original_ids(store: Store, split: str) -> list[str]:
    """Ids of a split's images without augmented copies."""
    return store.load("ids", split=split)[are_original(store.load("source", split=split))].tolist()


def find_seen(store: Store, training_ids: Iterable[str]) -> dict[str, list[str]]:
    """The images of each split other than train that pretrained networks were trained on; logs how many.

    Args:
        store: data folder.
        training_ids: hashes of the ids, see `hash_id`.

    Returns:
        Their ids by split; splits without such images are absent.
    """
    hashes, seen = set(training_ids), {}
    for split in (split for split in store.splits() if split != "train"):
        ids = original_ids(store, split)
        if found := [image_id for image_id in ids if hash_id(image_id) in hashes]:
            seen[split] = found
            log.info(
                "%d of %d images of %s were used to train the pretrained networks: predicted, left out of the "
                "evaluation",
                *(len(found), len(ids), SPLIT_NAMES[split]),
            )
    return seen


def read(network: str) -> tuple[dict[str, Any], list[Path]]:
    """The description of a pretrained network and its weight files.

    Args:
        network: SEGNET or CLASSIFIER.

    Raises:
        InputError: a file is missing, its checksum is wrong, or the training images are not listed.
    """
    description = FOLDER / f"{network}.json"
    if not description.is_file():
        raise InputError(f"--pretrained: {description} is missing; {ADVICE}")
    settings = json.loads(description.read_text(encoding="utf-8"))
    if "training_ids" not in settings:
        raise InputError(f"--pretrained: {description} does not list the training images; {ADVICE}")
    for name, expected in settings["sha256"].items():
        path = FOLDER / name
        if not path.is_file():
            raise InputError(f"--pretrained: {path} is missing; {ADVICE}")
        if (found := sha256(path)) != expected:
            raise InputError(f"--pretrained: {path} has SHA-256 {found}, expected {expected}; {ADVICE}")
    return settings, [FOLDER / name for name in settings["sha256"]]


def load_segnet(size: int) -> tuple[list[keras.Model], dict[str, Any]]:
    """The segmentation networks for images of `size` pixels a side, and their description; see `read`."""
    settings, weights = read(SEGNET)
    return segmentation.restore(settings["design"], size, weights), settings


def load_classifier(
    size: int | None = None, views: int | None = None, backbone: str | None = None
) -> tuple[Blend, dict[str, Any]]:
    """The classifiers for images of `size` pixels a side, and their description.

    It has no thresholds if other views or fewer networks are used than they were chosen for.

    Args:
        size: side of the images in pixels; None: as described.
        views: of each image whose mean is taken, see `predict.mean_output`; None: as described.
        backbone: whose networks alone are used; None: all.

    Raises:
        InputError: there are none of this backbone, or see `read`.
    """
    settings, weights = read(CLASSIFIER)
    described = settings["parts"]
    used = [part for part in described if backbone in (None, part["backbone"])]
    if not used:
        present = ", ".join(part["backbone"] for part in described)
        raise InputError(f"--pretrained: there are no networks of {backbone}, but of {present}")
    settings["parts"] = [part | {"views": views or part["views"]} for part in used]
    if settings["parts"] != described:
        settings["thresholds"] = {}
    extra = settings.pop("extra_training_ids")
    settings["training_ids"] += extra if any(part["extra"] for part in used) else []
    by_name = {path.name: path for path in weights}
    parts = [
        restore(
            part,
            size or settings["size"],
            [by_name[weight_file(part["backbone"], member)] for member in part["members"]],
        )
        for part in settings["parts"]
    ]
    return Blend(parts), settings


def training_data(backbone: str | None = None) -> dict[str, str]:
    """The training images of the networks, with their licences; by network, SEGNET and CLASSIFIER.

    Args:
        backbone: whose classifiers alone are used; None: all.
    """
    segnet, classifier = read(SEGNET)[0], read(CLASSIFIER)[0]
    extra = any(part["extra"] for part in classifier["parts"] if backbone in (None, part["backbone"]))
    return {
        SEGNET: segnet["data"],
        CLASSIFIER: classifier["data"] if extra else classifier["data"].partition(", with ")[0],
    }


def weight_file(backbone: str, member: str) -> str:
    """Name of the weight file of a classifier's network in FOLDER."""
    return f"{CLASSIFIER}_{backbone}{member}.weights.h5"
