"""The contract between the scripts: every file that passes from one to the next, with its dtype, shape and range.

The arrays of a split share their rows: row i of each belongs to row i of `{split}_ids.npy`. A script that runs with
`--limit` writes fewer rows, always the first ones. Original images come first, then augmented copies; a copy has the id
of its original.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from melanoma.errors import InputError

import numpy as np

PREPROCESSING = "segmentation_01_preprocessing.py"
SEGNET = "segmentation_02_segnet_train.py"
ROI = "image_mask_array.py"
CLASSIFIER = "densenet_train.py"
EVALUATION = "evaluate.py"
SCRIPTS = (PREPROCESSING, SEGNET, ROI, CLASSIFIER, EVALUATION)


@dataclass(frozen=True)
class File:
    """One file of the contract.

    Attributes:
        path: relative to the data folder. {split} is train, val or test, {backbone} the name of a classifier: its
            backbone, ENSEMBLE or PRETRAINED, {member} empty or a match of MEMBER_NAME.
        writer: the script that writes it.
        readers: the scripts that read it.
        dtype: dtype of an array; empty for weights and JSON.
        shape: shape of an array. N is the number of images, S their side in pixels, C the number of features.
        low: smallest value allowed.
        high: largest value allowed.
    """

    path: str
    writer: str
    readers: tuple[str, ...]
    dtype: str = ""
    shape: tuple[str | int, ...] = ()
    low: float = -np.inf
    high: float = np.inf


IMAGES = ("N", "S", "S", 3)
MASKS = ("N", "S", "S", 1)

FILES = {
    "ids": File("arrays/{split}_ids.npy", PREPROCESSING, (SEGNET, ROI, CLASSIFIER, EVALUATION), "str", ("N",)),
    "images": File("arrays/{split}_images.npy", PREPROCESSING, (SEGNET, ROI, EVALUATION), "uint8", IMAGES, 0, 255),
    # Row of the original image: of an augmented copy another row, of an original its own. Originals come first.
    "source": File("arrays/{split}_source.npy", PREPROCESSING, (SEGNET, CLASSIFIER, EVALUATION), "int64", ("N",), 0),
    # Images of one lesion, one patient, or that show the same picture have the same number.
    "groups": File("arrays/{split}_groups.npy", PREPROCESSING, (SEGNET, CLASSIFIER), "int64", ("N",), 0),
    # 0: image of --source; 1, 2, ...: of the first, second, ... --extra.
    "origin": File("arrays/{split}_origin.npy", PREPROCESSING, (CLASSIFIER, EVALUATION), "int64", ("N",), 0),
    # Written if an image of the split has a mask; masks of images without one are 0.
    "masks": File("arrays/{split}_masks.npy", PREPROCESSING, (SEGNET,), "uint8", MASKS, 0, 1),
    "has_mask": File("arrays/{split}_has_mask.npy", PREPROCESSING, (SEGNET,), "bool", ("N",)),
    # Written if an image of the split has a label; -1: no label.
    "labels": File(
        "arrays/{split}_labels.npy", PREPROCESSING, (SEGNET, ROI, CLASSIFIER, EVALUATION), "int8", ("N",), -1, 2
    ),
    "segnet_weights": File("weights/segnet{member}.weights.h5", SEGNET, ()),
    "segnet_settings": File("weights/segnet.json", SEGNET, ()),
    "predicted": File("arrays/{split}_predicted.npy", SEGNET, (ROI, EVALUATION), "uint8", MASKS, 0, 1),
    "roi": File("arrays/{split}_roi.npy", ROI, (CLASSIFIER, EVALUATION), "uint8", IMAGES, 0, 255),
    "features": File("arrays/{split}_{backbone}_features.npy", CLASSIFIER, (CLASSIFIER,), "float32", ("N", "C")),
    "head_weights": File("weights/{backbone}_head{member}.weights.h5", CLASSIFIER, ()),
    "classifier_weights": File("weights/{backbone}{member}.weights.h5", CLASSIFIER, (EVALUATION,)),
    "classifier_settings": File("weights/{backbone}.json", CLASSIFIER, (EVALUATION,)),
    "probabilities": File(
        "arrays/{split}_{backbone}_probabilities.npy", CLASSIFIER, (EVALUATION,), "float32", ("N", 3), 0, 1
    ),
    "thresholds": File("weights/{backbone}_thresholds.json", EVALUATION, ()),
}

# Names of classifiers that are no backbone: the one in pretrained/, and the mean of several of the user's own.
PRETRAINED, ENSEMBLE = "pretrained", "ensemble"
MAIN = "densenet121"  # the classifier of this project; others are compared with it
MEMBER_NAME = re.compile(r"(_fold\d+)?(_seed\d+)?")  # of an ensemble's networks, see melanoma.dataset.splits


def classifier_order(name: str) -> tuple[bool, bool, bool, str]:
    """Sort key of classifiers: the ensemble first, then the main one, the pretrained one last, the others by name."""
    return name != ENSEMBLE, name != MAIN, name == PRETRAINED, name


def check_shape(path: Path, file: File, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Checks an array's dtype and shape.

    Args:
        path: for the message.
        file: what the contract requires.
        dtype: dtype of the array.
        shape: shape of the array.

    Raises:
        InputError: the contract requires others.
    """
    dtype_fits = dtype.kind == "U" if file.dtype == "str" else dtype == np.dtype(file.dtype)
    sides = {axis: length for axis, length in zip(file.shape, shape, strict=False) if isinstance(axis, str)}
    expected = tuple(sides.get(axis, axis) if isinstance(axis, str) else axis for axis in file.shape)
    if not dtype_fits or shape != expected:
        raise InputError(f"{path}: expected {file.dtype} {file.shape}, found {dtype} {shape}")


def check_values(path: Path, file: File, array: np.ndarray) -> None:
    """Checks the range of an array of numbers.

    Args:
        path: for the message.
        file: what the contract requires.
        array: array of numbers; may be empty.

    Raises:
        InputError: a value is out of range, NaN or infinite.
    """
    if array.size:
        low, high = array.min(), array.max()
        if not (np.isfinite([low, high]).all() and file.low <= low <= high <= file.high):
            raise InputError(f"{path}: expected values from {file.low} to {file.high}, found {low} to {high}")
