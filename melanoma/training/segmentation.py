"""Training of the segmentation network: one for all train images, or one per fold."""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.dataset import augment
from melanoma.dataset.splits import (
    NEVER_HELD_OUT,
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
from melanoma.models import backbones, losses, segmentation
from melanoma.training import checkpoints, distributed, loop
from melanoma.training.batches import Batches, BatchOptions
from melanoma.training.callbacks import LAST, Draw, TrainingRun
from melanoma.training.loop import PRETRAINING

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
    continued: bool  # whether to start from the weights in the data folder
    pretrain: int  # epochs on the images of --extra alone, before the training of the folds
    extra_weight: float  # of the images of --extra in the training of the folds
    seed: int


@dataclass(frozen=True)
class TrainedNetworks:
    """The trained networks and what the report needs to know about them."""

    models: list[keras.Model]
    members: list[str]  # their names in file names
    out_of_fold: np.ndarray | None  # bool (N, networks): which were not trained on a row of train
    report: dict[str, Any]


@dataclass(frozen=True)
class MaskData:
    """Which images a network is trained on."""

    rows: np.ndarray  # int (K,), of train, with a mask
    weights: np.ndarray  # float (N,), how often each row of train is drawn relative to others
    validation: np.ndarray  # int, rows of validation with a mask


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
            InputError: a network would have no training images, or --pretrain has none.
        """
        store, settings = self.store, self.settings
        checkpoints.note_finished(store, "segnet_settings", settings.continued)
        # No augmented copies: they only balance the classes for the classifier.
        with_mask, validation = self._rows_with_mask("train"), self._rows_with_mask("val")
        if not len(with_mask):
            raise StageError(
                f"there are no masks of training images: run {contract.PREPROCESSING} on a source with masks, or this "
                "script with --pretrained"
            )
        if not len(validation):
            log.info("no validation masks: training Jaccard index and loss are used instead")
        extra = store.load("origin", split="train") > 0
        fold_of_row = self._folds(with_mask, extra)
        alone = with_mask[fold_of_row[with_mask] == NEVER_HELD_OUT]
        if settings.pretrain and not len(alone):
            raise InputError(f"--pretrain: no masks were added: run {contract.PREPROCESSING} with --extra")
        if settings.extra_weight == 0:
            with_mask = with_mask[~extra[with_mask]]
        weights = np.where(extra, settings.extra_weight, 1.0)
        members = list_members(settings.folds, settings.seeds, settings.seed)
        design = design_network(store, settings)
        models, results = [], []
        initial: dict[int, list[np.ndarray]] = {}  # weights after pretraining, by seed
        for member in members:
            rows = with_mask[fold_of_row[with_mask] != member.fold]
            if not len(rows):
                raise InputError(
                    f"--folds {settings.folds}: all training images with a mask are in fold {member.fold + 1}: choose "
                    "fewer folds or another --seed"
                )
            model = self._build(design, member)
            log.info("%s%s: %d weights, %d training images", model.name, member.name, model.count_params(), len(rows))
            if settings.continued:
                log.info("continuing from the weights in %s", store.data)
            elif settings.pretrain and member.seed in initial:
                model.set_weights(initial[member.seed])
            elif settings.pretrain:
                seed = f"_seed{member.seed}" if settings.seeds > 1 else ""
                data = MaskData(alone, np.ones(len(extra)), validation)
                self._fit(model, f"{NAME}_{PRETRAINING}{seed}", data, settings.pretrain, LAST, member.seed)
                initial[member.seed] = model.get_weights()
            data = MaskData(rows, weights, validation)
            result = self._fit(model, f"{NAME}{member.name}", data, settings.epochs, settings.keep, member.seed)
            if self.devices.leads:
                store.save_weights("segnet_weights", model, member=member.name)
            models.append(model)
            results.append(result)
        history = [
            {"kept_epoch": one.kept_epoch, "reason": one.reason, "history": one.history, "seconds": one.seconds}
            for one in results
        ]
        seconds = statistics.median(second for one in results for second in one.seconds)
        cost = {"weights": models[0].count_params(), "seconds_per_epoch": seconds}
        report = {"design": asdict(design), "training": history, "cost": cost}
        out_of_fold = out_of_fold_mask(members, fold_of_row)
        if out_of_fold is not None:
            out_of_fold[fold_of_row == NEVER_HELD_OUT] = True  # no network is without them
        return TrainedNetworks(models, [one.name for one in members], out_of_fold, report)

    def _build(self, design: segmentation.Design, member: Member) -> keras.Model:
        settings = self.settings
        # All networks differ at the start.
        keras.utils.set_random_seed((member.seed + settings.seeds * (member.fold + 1)) % 2**32)
        size = self.store.load("images", split="train").shape[1]
        if not settings.continued:
            return segmentation.build(design, size, settings.weights)
        path = self.store.check("segnet_weights", member=member.name)
        (model,) = segmentation.restore(asdict(design), size, [path])
        for layer in model.layers:
            if isinstance(layer, keras.Model):
                backbones.set_batchnorm(layer, settings.weights == backbones.NONE)
        return model

    def _fit(
        self, model: keras.Model, name: str, data: MaskData, epochs: int, keep: str, seed: int
    ) -> loop.TrainingResult:
        """Trains a network on some rows of train."""
        store, settings = self.store, self.settings
        all_once = (data.weights[data.rows] == 1).all()
        options = BatchOptions(
            rows=data.rows,
            seed=seed,
            augmentation=augment.RANGES[settings.augmentation],
            target_is_mask=True,
            sampling_weights=None if all_once else data.weights,
            length=None if all_once else round(data.weights[data.rows].sum()),
        )
        arrays = store.load("images", split="train"), store.load("masks", split="train")
        return loop.fit(
            model,
            Batches(*arrays, settings.batch_size, options),
            self._validation(data.validation),
            loop.Objective(losses.LOSSES[settings.loss], [losses.jaccard], "jaccard"),
            loop.Hyperparameters(epochs, settings.learning_rate, settings.ema, PATIENCE, keep),
            TrainingRun(checkpoints.for_training(store, NAME, name), self.draw(name), devices=self.devices),
        )

    def _folds(self, with_mask: np.ndarray, extra: np.ndarray) -> np.ndarray:
        """Fold of every row of train; folds have as many images of each class, with and without mask."""
        store = self.store
        if self.settings.folds == 1:  # labels are no input of the network
            return np.where(extra, NEVER_HELD_OUT, 0)
        classes = 2 * load_labels(store, "train").astype(int)
        classes[with_mask] += 1
        source, groups = (store.load(name, split="train") for name in ("source", "groups"))
        return assign_folds(source, groups, classes, self.settings.folds, self.settings.seed, extra)

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
