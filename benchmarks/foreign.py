"""Which score finds images that are not dermoscopic: candidates on features, logits, masks and colours.

Fits each candidate on the train images of --source and sets its threshold so that 95 % of the validation images are
kept. Masks are those of the pipeline with the networks in pretrained/. The chosen score is that of
melanoma/deployment/foreign.py.

Reads   --source, ISIC 2017; --ham10000, HAM10000; the images in scikit-image's package
Writes  --cache, features of every kind of image, which are not computed again
Prints  for each kind of image and candidate: AUC against validation, and the fraction above the threshold

Run     python -m benchmarks.foreign --source isic2017 --ham10000 ham10000
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import foreign_images
from melanoma.artifacts.atomic import atomic_write
from melanoma.cli import flags
from melanoma.deployment import foreign, pipeline
from melanoma.inference import pretrained
from melanoma.inference.predict import predict
from melanoma.models.classifier import Classifier
from melanoma.sources import reader

import keras
import numpy as np
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score

NEIGHBOUR = 10  # the k-th nearest
TYPICAL_AREA = 0.15  # of the image, of a lesion
LITE, MOBILENET, UNET = "efficientnetlite2", "mobilenetv2", "unet"  # the first network of each backbone
REGION, FULL = "region", "full image"
Features = dict[str, np.ndarray]  # of N images, by name
Score = Callable[[Features], np.ndarray]  # higher: less like the images of training


def load_unet() -> tuple[keras.Model, dict[str, Any]]:
    """The segmentation network and its design."""
    (network,), settings = pretrained.load_segnet(foreign_images.SIZE)
    return network, settings["design"]


@dataclass
class Extractor:
    """Computes features with the networks of a pipeline."""

    networks: pipeline.Pipeline
    cache: Path

    def __post_init__(self) -> None:
        """Builds the models that end in features."""
        self.classifiers = {part.classifiers[0].name: part.classifiers[0] for part in self.networks.classifier.parts}
        self.backbones = {name: self.classifiers[name].extractor() for name in (LITE, MOBILENET)}
        self.unet = foreign.feature_model(*load_unet())

    def features(self, kind: str, load: Callable[[], np.ndarray]) -> Features:
        """Features of images, uint8 (N, S, S, 3), which are loaded if their features are not in the cache."""
        path = self.cache / f"{kind}.npz"
        if not path.is_file():
            found = self.compute(kind, load())
            with atomic_write(path) as stream:
                np.savez(stream, allow_pickle=False, **found)
        with np.load(path, allow_pickle=False) as saved:
            return dict(saved)

    def compute(self, kind: str, images: np.ndarray) -> Features:
        """All features that a candidate needs, and the masks."""

        def run(model: keras.Model, inputs: np.ndarray) -> np.ndarray:
            return np.concatenate(list(predict([model], inputs, pipeline.BATCH_SIZE, kind)))

        lesion = np.concatenate(list(self.networks.segmenter.probabilities(images, kind)))
        masks = self.networks.segmenter.segment(lesion)
        regions = self.networks.regions(images, masks)
        inputs = {REGION: regions, FULL: images}
        found = {
            f"{name}, {where}": run(model, what)
            for name, model in self.backbones.items()
            for where, what in inputs.items()
        }
        pixels = images.reshape(len(images), -1, 3).astype(np.float32)
        saturation = np.ptp(pixels, axis=2)
        return found | {
            UNET: run(self.unet, images),
            "inside": foreign.probability_inside(lesion, masks),
            "area": masks.mean(axis=(1, 2, 3)),
            "masks": masks,
            "colour": np.concatenate(
                [pixels.mean(axis=1), pixels.std(axis=1), saturation.mean(axis=1)[:, None]], axis=1
            ),
        }


def mahalanobis(train: Features, name: str) -> Score:
    """Distance from the mean of train, by a covariance with Ledoit and Wolf's shrinkage."""
    covariance = LedoitWolf().fit(train[name].astype(np.float64))
    return lambda images: covariance.mahalanobis(images[name].astype(np.float64))


def neighbour(train: Features, name: str) -> Score:
    """Squared distance to the NEIGHBOUR-th nearest of train, of features of norm 1."""

    def normalise(values: np.ndarray) -> np.ndarray:
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    known = normalise(train[name])
    return lambda images: np.partition(2 - 2 * normalise(images[name]) @ known.T, NEIGHBOUR - 1)[:, NEIGHBOUR - 1]


def logits(network: Classifier, features: np.ndarray) -> np.ndarray:
    """Logits (N, 3) of a head from features (N, C)."""
    (dense, bias), (weights, offset) = (network.head.get_layer(name).get_weights() for name in ("dense", "classes"))
    return np.maximum(features @ dense + bias, 0) @ weights + offset


def candidates(train: Features, validation: Features, lite: Classifier) -> dict[str, Score]:
    """The scores to compare, fitted on train; the chosen one first."""
    chosen = foreign.fit(train[UNET], validation[UNET], validation["inside"])
    region, full, mobile = f"{LITE}, {REGION}", f"{LITE}, {FULL}", f"{MOBILENET}, {FULL}"

    def log_sum(values: np.ndarray) -> np.ndarray:
        return np.log(np.exp(values).sum(axis=1))

    return {
        "chosen: the next two": lambda images: chosen.scores(images[UNET], images["inside"]),
        "Mahalanobis, U-Net": mahalanobis(train, UNET),
        "uncertainty inside the mask": lambda images: -images["inside"],
        f"Mahalanobis, {region}": mahalanobis(train, region),
        f"Mahalanobis, {full}": mahalanobis(train, full),
        f"neighbour, {region}": neighbour(train, region),
        f"neighbour, {full}": neighbour(train, full),
        f"neighbour, {mobile}": neighbour(train, mobile),
        f"energy, {LITE}": lambda images: -log_sum(logits(lite, images[region])),
        f"max-softmax, {LITE}": lambda images: log_sum(values := logits(lite, images[region])) - values.max(axis=1),
        "Mahalanobis, colours": mahalanobis(train, "colour"),
        "mask area": lambda images: abs(np.log((images["area"] + 1e-4) / TYPICAL_AREA)),
    }


def collect(extractor: Extractor, source: Path, ham10000: Path) -> dict[str, Features]:
    """Features of train, validation and of every kind of foreign image."""
    records = reader.read(source).splits

    def load(split: str) -> np.ndarray:
        return np.stack([foreign_images.read(record.image) for record in records[split]])

    found = {
        "train": extractor.features("train", lambda: load("train")),
        "validation": extractor.features("validation", lambda: load("val")),
    }

    def changed(change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        return change(load("val"))

    kinds: dict[str, Callable[[], np.ndarray]] = {
        "scikit-image's images": foreign_images.scikit_image_images,
        **foreign_images.drawings(),
        "skin without lesion": lambda: foreign_images.skins(load("train"), found["train"]["masks"]),
        **{kind: partial(changed, change) for kind, change in foreign_images.CHANGES.items()},
        **foreign_images.ham10000(ham10000),
    }
    return found | {kind: extractor.features(kind, images) for kind, images in kinds.items()}


def main() -> None:
    """Computes or loads features, then prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--source", type=Path, required=True, help="folder of ISIC 2017, train and validation")
    parser.add_argument("--ham10000", type=Path, required=True, help="folder of HAM10000, images/ and metadata")
    parser.add_argument("--cache", type=Path, default=Path("foreign_features"), help="folder of features")
    arguments = parser.parse_args()
    extractor = Extractor(pipeline.from_pretrained(), arguments.cache)
    found = collect(extractor, arguments.source, arguments.ham10000)
    train, validation = found.pop("train"), found.pop("validation")
    print(f"train n = {len(train[UNET])}, validation n = {len(validation[UNET])}; AUC, fraction flagged\n")
    scores = candidates(train, validation, extractor.classifiers[LITE])
    print(f"| images | n | {' | '.join(scores)} |")
    print("|---" * (2 + len(scores)) + "|")
    kept = {name: score(validation) for name, score in scores.items()}
    for kind, images in found.items():
        cells = []
        for name, score in scores.items():
            values = score(images)
            truth = np.repeat([0, 1], [len(kept[name]), len(values)])
            auc = roc_auc_score(truth, np.concatenate([kept[name], values]))
            flagged = (values > np.quantile(kept[name], foreign.KEPT, method="inverted_cdf")).mean()
            cells.append(f"{auc:.2f}, {flagged:.0%}")
        print(f"| {kind} | {len(images[UNET])} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
