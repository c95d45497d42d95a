"""The networks in the formats of other frameworks: two models that need neither Keras nor this package.

The first maps images to lesion probabilities, the second maps regions of interest to class probabilities. The scaling
of colours, test-time augmentation, calibration and the means over networks are inside. Between them lies what
`description.json` says.
"""

import importlib.util
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from melanoma.artifacts.atomic import sha256, write_json
from melanoma.artifacts.store import versions
from melanoma.classes import CLASSES, NEVUS
from melanoma.dataset import augment, roi
from melanoma.deployment.formats import FORMATS, IMAGES, Compute
from melanoma.deployment.pipeline import BATCH_SIZE, Pipeline
from melanoma.errors import DifferenceError, InputError
from melanoma.inference import postprocess
from melanoma.inference.calibration import EPSILON, Calibration
from melanoma.inference.predict import IMAGE_AXES, in_batches
from melanoma.log import log
from melanoma.sources import synthetic

import keras
import numpy as np
from keras import ops

SEGMENTATION, CLASSIFIER = "segmentation", "classifier"
DESCRIPTION = "description.json"
TOLERANCE = 1e-4  # largest difference of probabilities from Keras' that is accepted in float32


# ----------------------------------------------------------------------------------------------- the two networks


def build(networks: Pipeline) -> dict[str, keras.Model]:
    """The networks of a pipeline as two models.

    Returns:
        SEGMENTATION: from RGB (N, size, size, 3) in [0, 255] to the probability of lesion, (N, size, size, 1).
        CLASSIFIER: from regions of interest (N, region_size, region_size, 3) in [0, 255] to calibrated probabilities
        (N, 3), in the order of CLASSES.
    """
    segmenter = networks.segmenter
    images = keras.Input((networks.size, networks.size, 3), name=IMAGES)
    lesion = mean_output(segmenter.models, images, segmenter.options.views)
    regions = keras.Input((networks.region_size, networks.region_size, 3), name=IMAGES)
    parts = [
        mean([calibrate(mean_output(fold, regions, part.views), part.calibration) for fold in part.folds().values()])
        for part in networks.classifier.parts
    ]
    return {
        SEGMENTATION: keras.Model(images, lesion, name=SEGMENTATION),
        CLASSIFIER: keras.Model(regions, mean(parts), name=CLASSIFIER),
    }


def mean(tensors: Sequence[keras.KerasTensor]) -> keras.KerasTensor:
    """The mean of tensors of the same shape."""
    return ops.mean(ops.stack(tensors), axis=0)


def mean_output(models: Sequence[keras.Model], images: keras.KerasTensor, views: int) -> keras.KerasTensor:
    """As `predict.mean_output`; the views are one batch, so that the weights of each network are stored once."""
    some = augment.some_views(views)
    batch = ops.concatenate([augment.flip_rotate(images, view, IMAGE_AXES, ops) for view in some])
    # Wrapped, because Keras wants different names inside a model.
    outputs = mean([keras.Model(model.input, model.output)(batch) for model in models])
    by_view = ops.reshape(outputs, (views, -1, *outputs.shape[1:]))
    if len(outputs.shape) < len(images.shape):
        return ops.mean(by_view, axis=0)
    return mean([augment.undo_flip_rotate(by_view[row], view, IMAGE_AXES, ops) for row, view in enumerate(some)])


def calibrate(probabilities: keras.KerasTensor, calibration: Calibration) -> keras.KerasTensor:
    """As `Calibration.apply`."""
    logits = ops.log(ops.maximum(probabilities, EPSILON)) / calibration.temperature
    return ops.softmax(logits + np.array(calibration.bias or 0, np.float32), axis=-1)


# ------------------------------------------------------------------------------------------------------- the files


@dataclass(frozen=True)
class Target:
    """What is written, and where."""

    format: str  # key of FORMATS
    half: bool  # whether weights are stored as float16
    folder: Path

    def path(self, name: str) -> Path:
        """The file, or folder, of a model."""
        return self.folder / f"{name}{FORMATS[self.format].suffix}"

    def require(self) -> None:
        """Checks what conversion needs.

        Raises:
            InputError: a package is missing, Keras uses another backend than TensorFlow, or there is no float16.
        """
        if self.half and not FORMATS[self.format].halves:
            raise InputError(f"--precision float16 has no effect on {self.format}: leave it out")
        missing = [name for name in FORMATS[self.format].packages if importlib.util.find_spec(name) is None]
        if missing:
            raise InputError(
                f"--format {self.format} needs {', '.join(missing)}: pip install -r requirements/export.txt"
            )
        if keras.backend.backend() != "tensorflow":
            raise InputError("the export needs Keras' TensorFlow backend: unset KERAS_BACKEND")

    def write(self, models: Mapping[str, keras.Model]) -> dict[str, str]:
        """Writes models by name; replaces those of an earlier run when all are complete.

        Returns:
            SHA-256 by path below the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=self.folder) as temporary:
            place = Path(temporary)
            for name, model in models.items():
                log.info("writing %s", self.path(name))
                FORMATS[self.format].write(model, place / self.path(name).name, self.half)
            (self.folder / DESCRIPTION).unlink(missing_ok=True)
            found = {path.relative_to(place).as_posix(): sha256(path) for path in files_below(place)}
            for path in place.iterdir():
                if (target := self.folder / path.name).is_dir():
                    shutil.rmtree(target)
                path.replace(target)
        return found

    def read(self, name: str) -> Compute:
        """Loads a model that was written."""
        return FORMATS[self.format].read(self.path(name))


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and its folders, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------------- the check


@dataclass(frozen=True)
class Check:
    """A model of another format beside Keras, on the same images."""

    images: int
    difference: float  # largest absolute difference of the outputs
    images_per_second: float | None  # without the first batch; None: there was only one
    keras_images_per_second: float | None


def synthetic_images(count: int, size: int) -> np.ndarray:
    """Synthetic images to compare with, uint8 (count, size, size, 3)."""
    return np.stack(
        [synthetic.generate(NEVUS, (size, size), np.random.default_rng([0, one]))[0] for one in range(count)]
    )


def compute_all(compute: Compute, images: np.ndarray) -> tuple[np.ndarray, float | None]:
    """Outputs of all images, and images per second, see `Check`."""
    found, ends = [], []
    for batch in in_batches(compute, images.astype(np.float32), BATCH_SIZE, pad=True):
        found.append(batch)
        ends.append(time.perf_counter())
    rate = BATCH_SIZE * (len(ends) - 1) / (ends[-1] - ends[0]) if ends[1:] else None
    return np.concatenate(found), rate


def check(
    networks: Pipeline, models: Mapping[str, keras.Model], target: Target, images: np.ndarray
) -> dict[str, Check]:
    """Compares what was written with Keras.

    Args:
        networks: what lies between the two models.
        models: see `build`.
        target: where they were written.
        images: uint8 (N, size, size, 3).

    Raises:
        DifferenceError: a model differs by more than TOLERANCE, in float16 by NaN.
    """
    found = {}
    for name, model in models.items():
        expected, keras_rate = compute_all(model.predict_on_batch, images)
        outputs, rate = compute_all(target.read(name), images)
        found[name] = one = Check(len(images), float(abs(outputs - expected).max()), rate, keras_rate)
        log.info(
            "%s: largest difference from Keras %.1e on %d images%s",
            *(name, one.difference, one.images),
            f"; {rate:.2f} images/s, Keras {keras_rate:.2f}" if rate and keras_rate else "",
        )
        if name == SEGMENTATION:
            segmenter = networks.segmenter
            masks = postprocess.segment(expected, segmenter.threshold, segmenter.options.clean)
            images = networks.regions(images, masks)
    limit = np.inf if target.half else TOLERANCE
    if different := [name for name, one in found.items() if not one.difference <= limit]:
        raise DifferenceError(
            f"{', '.join(map(str, map(target.path, different)))}: differs from Keras by more than {limit:g}. Use "
            "another format or --precision float32, or the versions in requirements/export.txt"
        )
    return found


# ------------------------------------------------------------------------------------------------- the description


def describe(networks: Pipeline, target: Target, trained_on: Mapping[str, str]) -> dict[str, Any]:
    """What a program needs to know to use the two models.

    Args:
        networks: what was exported.
        target: what was written.
        trained_on: by network, its training images with their licences.
    """
    segmenter = networks.segmenter
    packages = FORMATS[target.format].packages
    return {
        "format": target.format,
        "precision_of_weights": "float16" if target.half else "float32",
        "models": {name: target.path(name).name for name in (SEGMENTATION, CLASSIFIER)},
        "input": f"{IMAGES}: float32 (N, size, size, 3), RGB, 0 to 255",
        "image": {
            "size": networks.size,
            "resize": "stretch to a square: a JPEG may be decoded at a half, a quarter or an eighth of its sides, if "
            "they are at least `size`; width and height reduced by whole factors (mean of blocks of pixels), then "
            "bilinear with antialiasing; EXIF orientation ignored, colours in sRGB",
        },
        "mask": {
            "threshold": segmenter.threshold,
            "rule": "lesion where the probability is at least the threshold",
            "keep_largest_component": segmenter.options.clean,
            "clean_up": "if so: largest component (pixels that touch at a corner are connected), holes filled",
        },
        "region": {
            "kind": networks.roi,
            "size": networks.region_size,
            "margin": roi.CROP_MARGIN,
            "rule": "crop: square around the largest component, its side the lesion's longer side times "
            "(1 + 2 * margin), rounded, at most the image; centred on the lesion, moved inside the image. "
            "mask: black outside the lesion. full: the image. An empty mask, or one of all pixels: the image",
            "resize": "bicubic with antialiasing, to uint8",
        },
        "classes": CLASSES,
        "thresholds": networks.thresholds,
        "inside_the_models": {
            "segmentation": {"networks": len(segmenter.models), "views": segmenter.options.views},
            "classifier": [
                {
                    "backbone": part.classifiers[0].name,
                    "networks": len(part.classifiers),
                    "views": part.views,
                    "calibration": asdict(part.calibration),
                }
                for part in networks.classifier.parts
            ],
        },
        "licence": "that of the images in trained_on",
        "trained_on": trained_on or "your own data",
        "versions": versions() | {name: version(name) for name in packages},
    }


def export(networks: Pipeline, target: Target, images: np.ndarray, trained_on: Mapping[str, str]) -> None:
    """Writes both models, compares them with Keras, and describes them.

    Args:
        networks: what to export.
        target: what to write, and where.
        images: to compare with, uint8 (N, size, size, 3).
        trained_on: see `describe`.

    Raises:
        DifferenceError: see `check`; then there is no description.
    """
    models = build(networks)
    checksums = target.write(models)
    checks = check(networks, models, target, images)
    content = describe(networks, target, trained_on) | {
        "sha256": checksums,
        "compared_with_keras": {name: asdict(one) for name, one in checks.items()},
    }
    write_json(target.folder / DESCRIPTION, content)
