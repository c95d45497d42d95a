"""Images unlike those of training (out of distribution): how far each is from them, and when it is flagged.

Two measures, both by the segmentation network, which sees the full image: the distance of its features from those of
the training images, and its uncertainty inside the mask that it predicts. Which others were compared: docs/results.md.
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from melanoma.artifacts.atomic import atomic_write, sha256
from melanoma.errors import InputError
from melanoma.inference import pretrained
from melanoma.inference.predict import predict
from melanoma.log import log
from melanoma.models import backbones

import keras
import numpy as np
from keras import layers

FLAG = "unlike the dermoscopic images of training"
FILE = "foreign.npz"  # in pretrained.FOLDER
CHECKSUMS = "checksums"  # entry of FILE: of the weight files of the networks that it belongs to
LEVEL = 2  # of the U-Net's encoder, from 0: feature maps at 1/8 of the input's side
KEPT = 0.95  # fraction of validation images that are not flagged
CERTAIN = 0.999  # limit of mean probabilities, whose odds would be infinite
BATCH_SIZE = 16  # images per network call


@dataclass(frozen=True)
class Reference:
    """What images of training look like to a segmentation network.

    Attributes:
        mean: float32 (C,), of the features of the training images.
        precision: float32 (C, C), inverse of their covariance.
        center: float (2,), means of both measures on validation.
        scale: float (2,), their standard deviations.
        threshold: score above which an image is flagged.
    """

    mean: np.ndarray
    precision: np.ndarray
    center: np.ndarray
    scale: np.ndarray
    threshold: np.ndarray

    def scores(self, features: np.ndarray, inside: np.ndarray) -> np.ndarray:
        """The larger of both measures, in standard deviations from the mean of validation: float (N,).

        Args:
            features: float (N, C), see `feature_model`.
            inside: float (N,), see `probability_inside`.
        """
        found = (measures(self.mean, self.precision, features, inside) - self.center) / self.scale
        return found.max(axis=1)


def measures(mean: np.ndarray, precision: np.ndarray, features: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Logarithm of the squared Mahalanobis distance, and log odds that a pixel of the mask is not lesion: (N, 2).

    Source: Lee et al. 2018, arXiv 1807.03888, here with one mean for all classes.
    """
    offset = features.astype(np.float64) - mean
    distance = np.log(np.maximum((offset @ precision * offset).sum(axis=1), 1e-6))
    probability = np.clip(inside, 1 - CERTAIN, CERTAIN)
    return np.stack([distance, np.log((1 - probability) / probability)], axis=1)


def fit(train: np.ndarray, features: np.ndarray, inside: np.ndarray) -> Reference:
    """Describes the training images, and chooses the threshold that keeps KEPT of the validation images.

    Args:
        train: float (N, C), features of the training images.
        features: float (M, C), of validation.
        inside: float (M,), see `probability_inside`, of validation.
    """
    from sklearn.covariance import LedoitWolf  # importing it takes a second, which predict.py need not wait

    covariance = LedoitWolf().fit(train.astype(np.float64))
    mean, precision = covariance.location_.astype(np.float32), covariance.precision_.astype(np.float32)
    found = measures(mean, precision, features, inside)
    center, scale = found.mean(axis=0), found.std(axis=0)
    scores = Reference(mean, precision, center, scale, np.array(np.inf)).scores(features, inside)
    return Reference(mean, precision, center, scale, np.quantile(scores, KEPT, method="inverted_cdf"))


def feature_model(network: keras.Model, design: Mapping[str, Any]) -> keras.Model:
    """Model from RGB (N, S, S, 3) in [0, 255] to the means of the encoder's feature maps, (N, C).

    Built from the encoder, because OpenVINO makes outputs of all its levels that a network does not use.

    Args:
        network: a U-Net from `segmentation.build`.
        design: fields of its `Design`.
    """
    (encoder,) = (layer for layer in network.layers if isinstance(layer, keras.Model))
    images = keras.Input(network.input_shape[1:], name="images")
    side = design["input_size"]
    resized = images if side == images.shape[1] else layers.Resizing(side, side, name="resize_input")(images)
    maps = keras.Model(encoder.input, encoder.outputs[LEVEL])(
        backbones.preprocess(design["backbone"], resized, design["scaling"])
    )
    return keras.Model(images, layers.GlobalAveragePooling2D(name="features")(maps), name="unet_features")


def probability_inside(probability: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Mean probability of lesion inside the mask; 0 where the mask is empty.

    Args:
        probability: float (N, S, S, 1).
        masks: uint8 (N, S, S, 1), {0, 1}.

    Returns:
        float (N,), in [0, 1].
    """
    axes = (1, 2, 3)
    return (probability * masks).sum(axis=axes) / np.maximum(masks.sum(axis=axes), 1)


@dataclass(frozen=True)
class Detector:
    """Flags images unlike those of training."""

    features: keras.Model  # see `feature_model`
    reference: Reference

    def scores(self, images: np.ndarray, probability: np.ndarray, masks: np.ndarray) -> np.ndarray:
        """How unlike those of training images are: float (N,), see `Reference.scores`.

        Args:
            images: uint8 (N, S, S, 3).
            probability: float (N, S, S, 1), of lesion.
            masks: uint8 (N, S, S, 1), {0, 1}, made of these.
        """
        features = np.concatenate(list(predict([self.features], images, BATCH_SIZE, "")))
        return self.reference.scores(features, probability_inside(probability, masks))

    def flags(self, images: np.ndarray, probability: np.ndarray, masks: np.ndarray) -> np.ndarray:
        """Which images are flagged: bool (N,); arguments as of `scores`."""
        return self.scores(images, probability, masks) > self.reference.threshold


def save(reference: Reference, settings: Mapping[str, Any]) -> None:
    """Writes FILE for packed segmentation networks; `settings` as in `load`."""
    checksums = json.dumps([*settings["sha256"].values()])
    with atomic_write(pretrained.FOLDER / FILE) as stream:
        np.savez_compressed(stream, allow_pickle=False, **{CHECKSUMS: checksums}, **asdict(reference))


def load(network: keras.Model, settings: Mapping[str, Any]) -> tuple[Detector | None, str]:
    """The detector for packed segmentation networks, and the SHA-256 of FILE.

    Args:
        network: the first of them.
        settings: their description, see `pretrained.load_segnet`.

    Returns:
        None and "" where FILE is missing or belongs to other networks.

    Raises:
        InputError: FILE is damaged.
    """
    path, checksums = pretrained.FOLDER / FILE, [*settings["sha256"].values()]
    if not path.is_file():
        return None, ""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as found:
            belongs = json.loads(str(found[CHECKSUMS])) == checksums
            reference = Reference(**{field.name: found[field.name] for field in fields(Reference)})
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        raise InputError(f"{path} is damaged: {pretrained.ADVICE}") from None
    if not belongs:
        log.info("%s belongs to other networks: images unlike those of training are not flagged", path)
        return None, ""
    return Detector(feature_model(network, settings["design"]), reference), sha256(path)
