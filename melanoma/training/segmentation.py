"""Training of the segmentation network: one for all train images, or one per fold."""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.dataset import augment
from melanoma.dataset.splits import (
    Member,
    are_original,
    assign_folds,
    list_members,
    load_labels,
    originals_with_mask,
    out_of_fold_mask,
)
from melanoma.errors import InputError, StageError
from melanoma.log import log
from melanoma.models import losses, segmentation
from melanoma.training import checkpoints, distributed, loop
from melanoma.training.batches import Batches, BatchOptions
from melanoma.training.callbacks import Draw, TrainingRun

import keras
import numpy as np

NAME = "segnet"  # of its files, whichever network it is
PATIENCE = 10  # epochs without a better Jaccard index

DrawMember = Callable[[str], Draw]  # from the name of a training run, e.g. segnet_fold1, to what plots its curves


@dataclass(frozen=True)
class SegmentationSettings:
    """Settings of training, by the names of the flags."""

    network: str  # of segmentation.NETWORKS
    input_size: int  # side of the network's input in pixels
    backbone: str
    weights: str  # initial weights of the backbone, see `backbones.build`
    scaling: str | None  # see `backbones.preprocess`
    loss: str  # of losses.LOSSES
    epochs: int
    batch_size: int
    learning_rate: float
    ema: float
    keep: str  # of callbacks.KEEP
    augmentation: str  # of augment.RANGES
    folds: int  # networks per seed, each trained without one fold; 1: trained on all images
    seeds: int  # networks per fold
    seed: int


@dataclass(frozen=True)
class TrainedNetworks:
    """The trained networks and what the report needs to know about them."""

    models: list[keras.Model]
    members: list[str]  # their names in file names
    out_of_fold: np.ndarray | None  # bool (N, networks): which were not trained on a row of train
    report: dict[str, Any]


@dataclass(frozen=True)
class SegmentationTrainer:
    """Trains the networks of a data folder."""

    store: Store
    settings: SegmentationSettings
    devices: distributed.Devices
    draw: DrawMember

    def train(self) -> TrainedNetworks:
        """Trains a network for every fold and saves its weights.

        Raises:
            StageError: train has no masks.
            InputError: a network would have no training images.
        """
        store, settings = self.store, self.settings
        # No augmented copies: they only balance the classes for the classifier.
        with_mask, validation = self._rows_with_mask("train"), self._rows_with_mask("val")
        if not len(with_mask):
            raise StageError(
                f"there are no masks of training images: run {contract.PREPROCESSING} on a source with masks, or this "
                "script with --pretrained"
            )
        if not len(validation):
            log.info("no validation masks: training Jaccard index and loss are used instead")
        fold_of_row = self._folds(with_mask)
        members = list_members(settings.folds, settings.seeds, settings.seed)
        design = design_network(store, settings)
        models, results = [], []
        for member in members:
            rows = with_mask[fold_of_row[with_mask] != member.fold]
            if not len(rows):
                raise InputError(
                    f"--folds {settings.folds}: all training images with a mask are in fold {member.fold + 1}: choose "
                    "fewer folds or another --seed"
                )
            model, result = self._train_member(design, rows, validation, member)
            models.append(model)
            results.append(result)
        history = [
            {"kept_epoch": one.kept_epoch, "reason": one.reason, "history": one.history, "seconds": one.seconds}
            for one in results
        ]
        seconds = statistics.median(second for one in results for second in one.seconds)
        cost = {"weights": models[0].count_params(), "seconds_per_epoch": seconds}
        report = {"design": asdict(design), "training": history, "cost": cost}
        return TrainedNetworks(models, [one.name for one in members], out_of_fold_mask(members, fold_of_row), report)

    def _train_member(
        self, design: segmentation.Design, rows: np.ndarray, validation: np.ndarray, member: Member
    ) -> tuple[keras.Model, loop.TrainingResult]:
        """Trains one network on some rows of train; those of validation may choose the epoch that is kept."""
        store, settings = self.store, self.settings
        keras.utils.set_random_seed(
            (member.seed + settings.seeds * (member.fold + 1)) % 2**32
        )  # all networks differ at the start
        images, truth = store.load("images", split="train"), store.load("masks", split="train")
        model = segmentation.build(design, images.shape[1], settings.weights)
        log.info("%s%s: %d weights, %d training images", model.name, member.name, model.count_params(), len(rows))
        options = BatchOptions(
            rows=rows, seed=member.seed, augmentation=augment.RANGES[settings.augmentation], target_is_mask=True
        )
        name = f"{NAME}{member.name}"
        result = loop.fit(
            model,
            Batches(images, truth, settings.batch_size, options),
            self._validation(validation),
            loop.Objective(losses.LOSSES[settings.loss], [losses.jaccard], "jaccard"),
            loop.Hyperparameters(settings.epochs, settings.learning_rate, settings.ema, PATIENCE, settings.keep),
            TrainingRun(checkpoints.for_training(store, NAME, name), self.draw(name), devices=self.devices),
        )
        if self.devices.leads:
            store.save_weights("segnet_weights", model, member=member.name)
        return model, result

    def _folds(self, with_mask: np.ndarray) -> np.ndarray:
        """Fold of every row of train; folds have as many images of each class, with and without mask."""
        store = self.store
        if self.settings.folds == 1:  # labels are no input of the network
            return np.zeros(store.rows("train"), int)
        classes = 2 * load_labels(store, "train").astype(int)
        classes[with_mask] += 1
        source, groups = (store.load(name, split="train") for name in ("source", "groups"))
        return assign_folds(source, groups, classes, self.settings.folds, self.settings.seed)

    def _rows_with_mask(self, split: str) -> np.ndarray:
        """Originals with a mask; logs how many are left out."""
        rows = originals_with_mask(self.store, split)
        if len(rows):
            count = are_original(self.store.load("source", split=split)).sum()
            if len(rows) < count:
                log.info("%s: %d of %d images are left out: no mask", split, count - len(rows), count)
        return rows

    def _validation(self, rows: np.ndarray) -> Batches | None:
        if not len(rows):
            return None
        arrays = self.store.load("images", split="val"), self.store.load("masks", split="val")
        return Batches(*arrays, self.settings.batch_size, BatchOptions(rows=rows))


def design_network(store: Store, settings: SegmentationSettings) -> segmentation.Design:
    """The network of the settings; SegNet is normalised by the colour statistics of the train images."""
    mean, std = colour_statistics(store) if settings.network == "segnet" else (None, None)
    backbone = {"segnet": "", "segnet_vgg16": segmentation.VGG16, "unet": settings.backbone}[settings.network]
    return segmentation.Design(settings.network, settings.input_size, backbone, settings.scaling, mean, std)


def colour_statistics(store: Store) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of red, green and blue over the train images, 0 to 255."""
    sums, squares, count = np.zeros(3), np.zeros(3), 0
    for block in store.blocks("images", split="train"):
        values = block.reshape(-1, 3).astype(np.float64)
        sums, squares, count = sums + values.sum(axis=0), squares + (values**2).sum(axis=0), count + len(values)
    mean = sums / count
    return mean.tolist(), np.sqrt(squares / count - mean**2).tolist()
