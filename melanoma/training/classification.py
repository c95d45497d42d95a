"""Training of the classifiers: one network, or one for every fold and seed."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.classes import CLASSES
from melanoma.dataset.splits import UNLABELLED, Member, are_original, assign_folds, list_members, out_of_fold_mask
from melanoma.errors import InputError, StageError
from melanoma.inference.predict import predict
from melanoma.log import log
from melanoma.models import backbones, classifier
from melanoma.training import checkpoints, distributed, loop
from melanoma.training.batches import Batches, BatchOptions
from melanoma.training.callbacks import Draw, TrainingRun

import keras
import numpy as np

PHASES = ("head", "full")  # the head on frozen features; then the whole network
EPOCHS = {"head": 60, "full": 15}
LEARNING_RATE = {"head": 1e-3, "full": 1e-4}
PATIENCE = 10  # epochs without a better AUC
BALANCES = ("copies", "weights", "focal", "sampling", "none")  # how rare classes are balanced
LOSSES = {"cross-entropy": "categorical_crossentropy", "focal cross-entropy": "categorical_focal_crossentropy"}
# Settings on which the frozen features depend.
OF_FEATURES = ("backbone", "weights_sha256", "scaling", "precision", "input_size", "keras_backend", "random_weights")

DrawPhase = Callable[[str, str], Draw]  # from phase and member name to what plots the curves


@dataclass(frozen=True)
class ClassifierSettings:
    """Settings of training, by the names of the flags."""

    backbone: str
    weights: str  # initial weights of the backbone, see `backbones.build`
    scaling: str | None  # see `backbones.preprocess`
    input_size: int | None  # side of the backbone's input in pixels; None: that of the arrays
    train: str  # of PHASES: the last phase
    balance: str  # of BALANCES
    epochs: int | None  # of the last phase; None: EPOCHS
    learning_rate: float | None  # of the last phase; None: LEARNING_RATE
    batch_size: int
    ema: float
    folds: int  # networks per seed, each trained without one fold; 1: no cross-validation
    seeds: int  # networks per fold
    seed: int


@dataclass(frozen=True)
class TrainedClassifiers:
    """The trained classifiers and what is saved of their training."""

    classifiers: list[classifier.Classifier]
    members: dict[str, dict[str, Any]]  # by member name: best epoch, history and seconds of each phase
    out_of_fold: np.ndarray | None  # bool (N, networks): which were not trained on a row of train


@dataclass(frozen=True)
class TrainingData:
    """Inputs and labels of train and, where it has labels, of validation."""

    inputs: dict[str, np.ndarray]  # by split: images (N, S, S, 3), or features (N, C)
    labels: dict[str, np.ndarray]  # by split: int (N,), UNLABELLED where there is none
    rows: np.ndarray  # of train to train on, all labelled


@dataclass(frozen=True)
class ClassifierTrainer:
    """Trains the classifiers of a data folder."""

    store: Store
    settings: ClassifierSettings
    devices: distributed.Devices
    draw: DrawPhase

    def train(self) -> TrainedClassifiers:
        """Trains a classifier for every fold and seed and saves its weights.

        Raises:
            StageError: train has no labels.
            InputError: a class is absent.
        """
        settings = self.settings
        labels, source = load_labels(self.store), self.store.load("source", split="train")
        groups = self.store.load("groups", split="train")
        members = list_members(settings.folds, settings.seeds, settings.seed)
        fold_of_row = assign_folds(source, groups, labels["train"], settings.folds, settings.seed)
        usable = (labels["train"] != UNLABELLED) & (are_original(source) | (settings.balance == "copies"))
        trained, notes = [], {}
        for member in members:
            rows = np.flatnonzero(usable & (fold_of_row != member.fold))
            one, notes[member.name] = self._train_member(labels, rows, member)
            trained.append(one)
        return TrainedClassifiers(trained, notes, out_of_fold_mask(members, fold_of_row))

    def _train_member(
        self, labels: dict[str, np.ndarray], rows: np.ndarray, member: Member
    ) -> tuple[classifier.Classifier, dict[str, Any]]:
        keras.utils.set_random_seed(member.seed)
        store, settings = self.store, self.settings
        images = {split: store.load("roi", split=split) for split in labels}
        network = classifier.build(
            settings.backbone, images["train"].shape[1], settings.weights, settings.scaling, settings.input_size
        )
        log.info(
            "%s%s: %d weights, %d training rows",
            *(settings.backbone, member.name, network.model.count_params(), len(rows)),
        )
        features = self._features(network, list(labels), member)
        if settings.weights == backbones.NONE:
            log.info("head on features of a random backbone: expect an AUC near 0.5 in this phase")
        phases = {"head": self._fit("head", network.head, TrainingData(features, labels, rows), member)}
        if self.devices.leads:
            store.save_weights("head_weights", network.head, backbone=settings.backbone, member=member.name)
        if settings.train == "full":
            # Without validation the head's value is not comparable: full training sees harder, augmented images.
            bar = phases["head"].best if "val" in labels else -math.inf
            phases["full"] = self._fit("full", network.model, TrainingData(images, labels, rows), member, bar)
        if self.devices.leads:
            store.save_weights("classifier_weights", network.model, backbone=settings.backbone, member=member.name)
        return network, {
            phase: {"best_epoch": one.best_epoch, "history": one.history, "seconds": one.seconds}
            for phase, one in phases.items()
        }

    def _features(self, network: classifier.Classifier, splits: list[str], member: Member) -> dict[str, np.ndarray]:
        """Features of the frozen backbone by split, float32 (N, C): computed once by the leading process, and saved."""
        store = self.store
        store.settings["random_weights"] = member.seed if self.settings.weights == backbones.NONE else None
        made_with = {setting: store.settings[setting] for setting in OF_FEATURES}
        extractor, backbone, features = network.extractor(), self.settings.backbone, {}
        for split in splits:
            images = store.load("roi", split=split)
            blocks = predict([extractor], images, self.settings.batch_size, f"features of {split}")
            if not self.devices.leads or store.reusable("features", made_with, split=split, backbone=backbone):
                log.info("reusing the features of %s", split)
            else:
                shape = extractor.output_shape[1:]
                with store.writer("features", len(images), shape, split=split, backbone=backbone) as file:
                    for block in blocks:
                        file.append(block)
                    store.settings["inference"] = blocks.inference.name
            self.devices.wait()
            features[split] = np.array(store.load("features", split=split, backbone=backbone))
            # No input of the networks: with random weights the next seed replaces them, which makes no network stale.
            store.forget("features", split=split, backbone=backbone)
        return features

    def _fit(
        self, phase: str, network: keras.Model, data: TrainingData, member: Member, initial_best: float = -math.inf
    ) -> loop.TrainingResult:
        """One phase; --epochs and --learning-rate apply to the last one."""
        settings, is_last = self.settings, phase == self.settings.train
        loss = f"{'focal ' * (settings.balance == 'focal')}cross-entropy"
        weights = class_weights(data.labels["train"], data.rows)
        options = BatchOptions(
            rows=data.rows,
            seed=member.seed,
            augment=phase == "full",
            sampling_weights=weights if settings.balance == "sampling" else None,
            loss_weights=weights if settings.balance == "weights" else None,
        )
        name = f"{settings.backbone}_{phase}{member.name}"
        return loop.fit(
            network,
            Batches(data.inputs["train"], one_hot(data.labels["train"]), settings.batch_size, options),
            self._validation(data.inputs, data.labels),
            loop.Objective(
                LOSSES[loss], [keras.metrics.AUC(multi_label=True, num_labels=len(CLASSES), name="auc")], "auc"
            ),
            loop.Hyperparameters(
                (is_last and settings.epochs) or EPOCHS[phase],
                (is_last and settings.learning_rate) or LEARNING_RATE[phase],
                settings.ema,
                PATIENCE,
            ),
            TrainingRun(
                checkpoints.for_training(self.store, settings.backbone, name),
                self.draw(phase, member.name),
                initial_best,
                self.devices,
            ),
        )

    def _validation(self, inputs: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> Batches | None:
        """The labelled rows of validation."""
        if "val" not in labels:
            return None
        rows = np.flatnonzero(labels["val"] != UNLABELLED)
        return Batches(inputs["val"], one_hot(labels["val"]), self.settings.batch_size, BatchOptions(rows=rows))


def load_labels(store: Store) -> dict[str, np.ndarray]:
    """Labels, int (N,), of train, and of validation if it has any; UNLABELLED where there is none.

    Raises:
        StageError: train has no labels.
    """
    labels = {}
    for split in ("train", "val"):
        if not store.has("labels", split=split):
            continue
        of_split = np.array(store.load("labels", split=split))
        originals = are_original(store.load("source", split=split))
        without = int((of_split[originals] == UNLABELLED).sum())
        if without:
            log.info("%s: %d of %d images are left out: no label", split, without, originals.sum())
        if without < originals.sum():
            labels[split] = of_split
    if "train" not in labels:
        raise StageError(f"there are no labelled training images: run {contract.PREPROCESSING} on a source with labels")
    if "val" not in labels:
        log.info("no validation labels: the training AUC chooses the best epoch")
    return labels


def one_hot(labels: np.ndarray) -> np.ndarray:
    """From labels, int (N,), to float32 (N, 3); UNLABELLED becomes zeros."""
    return np.equal.outer(labels, np.arange(len(CLASSES))).astype(np.float32)


def class_weights(labels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Weight of each row, float32 (N,), with which all classes count equally among `rows`; their mean there is 1.

    Args:
        labels: int (N,), UNLABELLED where there is none; such rows weigh 0.
        rows: int (K,), labelled rows.

    Raises:
        InputError: a class has no image among the rows.
    """
    counts = np.bincount(labels[rows], minlength=len(CLASSES))
    if absent := [name for name, count in zip(CLASSES, counts, strict=True) if not count]:
        raise InputError(f"no {' and no '.join(absent)} among {len(rows)} training images: add some")
    return one_hot(labels) @ (len(rows) / len(counts) / counts).astype(np.float32)


def warn_of_seen_masks(store: Store, settings: ClassifierSettings, roi: str) -> None:
    """Warns if a cross-validation would use train masks of a network trained on those images."""
    if settings.folds > 1 and roi != "full" and store.written_with("predicted", split="train").get("folds", 1) == 1:
        log.warning(
            "warning: the lesion masks of train come from a network trained on these images and are better than those "
            "of new images: for an unbiased cross-validation run %s with --folds",
            contract.SEGNET,
        )
