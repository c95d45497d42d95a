"""Training of the classifiers: one network, or one for every fold and seed."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.classes import CLASSES
from melanoma.cli import flags
from melanoma.dataset import augment
from melanoma.dataset.splits import (
    NEVER_HELD_OUT,
    UNLABELLED,
    Member,
    are_original,
    list_members,
    load_folds,
    out_of_fold_mask,
)
from melanoma.errors import InputError, StageError
from melanoma.inference.predict import predict
from melanoma.log import log
from melanoma.models import backbones, classifier
from melanoma.training import checkpoints, distributed, loop, teacher
from melanoma.training.batches import Batches, BatchOptions
from melanoma.training.callbacks import LAST, Draw, TrainingRun
from melanoma.training.loop import PRETRAINING
from melanoma.training.recipe import BATCHNORM, EPOCHS, LEARNING_RATE, WARM_UP_EPOCHS, Recipe

import keras
import numpy as np

LOSSES = {
    "cross-entropy": keras.losses.CategoricalCrossentropy,
    "focal cross-entropy": keras.losses.CategoricalFocalCrossentropy,
}
PATIENCE = 10  # epochs without a better value
# Settings on which the frozen features depend.
OF_FEATURES = (
    "backbone",
    "backbone_sha256",
    "scaling",
    "precision",
    "input_size",
    "colour_constancy",
    "keras_backend",
    "rows",
)

DrawPhase = Callable[[str, str], Draw]  # from phase and member name to what plots the curves


class ClassAUC(keras.metrics.AUC):
    """AUC of each class against the rest; the largest target is the true class, as soft labels are no truth."""

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Adds a batch of targets and probabilities, each (N, 3)."""
        truth = keras.ops.one_hot(keras.ops.argmax(y_true, axis=-1), y_true.shape[-1])
        super().update_state(truth, y_pred, sample_weight)


@dataclass(frozen=True)
class ClassifierSettings:
    """Settings of training, by the names of the flags."""

    backbone: str
    weights: str  # initial weights of the backbone, see `backbones.build`
    preprocessing: classifier.Preprocessing
    folds: int  # networks per seed, each trained without one fold; 1: no cross-validation
    seeds: int  # networks per fold
    seed: int
    continued: bool  # whether to start from the weights in the data folder
    recipe: Recipe

    @classmethod
    def from_flags(cls, settings: Mapping[str, Any]) -> "ClassifierSettings":
        """The settings of a parsed command line, value by name."""
        parts = {"recipe": Recipe, "preprocessing": classifier.Preprocessing}
        return flags.to_dataclass(
            cls, {**settings, **{name: flags.to_dataclass(part, settings) for name, part in parts.items()}}
        )


@dataclass(frozen=True)
class TrainedClassifiers:
    """The trained classifiers and what is saved of their training."""

    classifiers: list[classifier.Classifier]
    members: dict[str, dict[str, Any]]  # by member name: of each phase what `note` returns
    out_of_fold: np.ndarray | None  # bool (N, networks): which were not trained on a row of train


@dataclass(frozen=True)
class TrainingData:
    """Inputs and labels of train and, where it has labels, of validation."""

    inputs: dict[str, np.ndarray]  # by split: images (N, S, S, 3), or features (N, C)
    labels: dict[str, np.ndarray]  # by split: int (N,), UNLABELLED where there is none
    targets: np.ndarray  # of train: float32 (N, 3), labels or soft labels
    rows: np.ndarray  # of train to train on, all labelled


# From phase, member, network and data of a training run to callbacks that watch it.
Watch = Callable[[str, Member, keras.Model, TrainingData], list[keras.callbacks.Callback]]


def watch_nothing(*_: Any) -> list[keras.callbacks.Callback]:
    """No callbacks."""
    return []


@dataclass(frozen=True)
class ClassifierTrainer:
    """Trains the classifiers of a data folder."""

    store: Store
    settings: ClassifierSettings
    devices: distributed.Devices
    draw: DrawPhase
    watch: Watch = watch_nothing

    def train(self) -> TrainedClassifiers:
        """Trains a classifier for every fold and seed and saves its weights.

        Raises:
            StageError: train has no labels.
            InputError: a class is absent, or --pretrain has no images.
        """
        store, settings, recipe = self.store, self.settings, self.settings.recipe
        checkpoints.note_finished(store, "classifier_settings", settings.continued, backbone=settings.backbone)
        teacher.check(store, recipe.teacher, settings.folds, settings.seed, settings.backbone)
        labels, source = load_labels(store), store.load("source", split="train")
        images = {split: store.load("roi", split=split) for split in labels}
        extra = store.load("origin", split="train") > 0
        members = list_members(settings.folds, settings.seeds, settings.seed)
        fold_of_row = load_folds(store, settings.folds, settings.seed)
        usable = (labels["train"] != UNLABELLED) & (are_original(source) | (recipe.balance == "copies"))
        alone = np.flatnonzero(usable & (fold_of_row == NEVER_HELD_OUT))
        wanted = np.isin(labels["train"], [CLASSES.index(name) for name in recipe.extra_classes])
        usable &= ~extra | ((recipe.extra_weight > 0) & wanted)
        needed = 1 + int(np.flatnonzero(usable).max(initial=-1))  # of the first rows of train
        targets = one_hot(labels["train"])
        initial: dict[int, list[np.ndarray]] = {}  # weights after pretraining, by seed
        trained, notes = [], dict[str, dict[str, Any]]()
        for member in members:
            keras.utils.set_random_seed(member.seed)
            network = self._build(member)
            notes[member.name] = {}
            if settings.continued:
                log.info("continuing from the weights in %s", store.data)
            elif recipe.pretrain and member.seed not in initial:
                data = TrainingData(images, labels, targets, alone)
                notes[member.name] = self._pretrain(network, data, member.seed)
                initial[member.seed] = network.model.get_weights()
            elif recipe.pretrain:
                network.model.set_weights(initial[member.seed])
            rows = np.flatnonzero(usable & (fold_of_row != member.fold))
            data = TrainingData(images, labels, self._targets(targets, member, needed), rows)
            notes[member.name] |= self._train_member(network, data, member, needed)
            trained.append(network)
        return TrainedClassifiers(trained, notes, out_of_fold_mask(members, fold_of_row))

    def _build(self, member: Member) -> classifier.Classifier:
        store, settings = self.store, self.settings
        trained = BATCHNORM[settings.recipe.batchnorm]
        network = classifier.build(
            settings.backbone,
            store.load("roi", split="train").shape[1],
            backbones.NONE if settings.continued else settings.weights,
            settings.preprocessing,
            settings.weights == backbones.NONE if trained is None else trained,
        )
        if settings.continued:
            path = store.check("classifier_weights", backbone=settings.backbone, member=member.name)
            backbones.load_weights(network.model, path)
        return network

    def _targets(self, targets: np.ndarray, member: Member, count: int) -> np.ndarray:
        """The labels of train, float32 (N, 3); if there is a teacher, the first `count` are mixed with soft labels."""
        recipe = self.settings.recipe
        if not recipe.teacher:
            return targets
        soft = teacher.soft_labels(self.store, recipe.teacher, member, count, recipe.batch_size)
        mixed = targets.copy()
        mixed[:count] += recipe.teacher_weight * (soft - targets[:count])
        return mixed

    def _pretrain(self, network: classifier.Classifier, data: TrainingData, seed: int) -> dict[str, Any]:
        """Trains a whole network on the images of --extra alone."""
        if not len(data.rows):
            raise InputError(f"--pretrain: no labelled images were added: run {contract.PREPROCESSING} with --extra")
        log.info("pretraining, seed %d: %d images", seed, len(data.rows))
        member = Member(f"_seed{seed}" if self.settings.seeds > 1 else "", -1, seed)
        return note(PRETRAINING, self._fit(PRETRAINING, network.model, data, member))

    def _train_member(
        self, network: classifier.Classifier, data: TrainingData, member: Member, needed: int
    ) -> dict[str, Any]:
        """Trains a network; `needed`: see `_train_head`. The head of a continued network is trained already."""
        store, settings = self.store, self.settings
        log.info(
            "%s%s: %d weights, %d training rows",
            *(settings.backbone, member.name, network.model.count_params(), len(data.rows)),
        )
        is_full, notes = settings.recipe.train == "full", dict[str, Any]()
        if not (is_full and settings.continued):
            notes |= self._train_head(network, data, member, needed)
        if is_full:
            notes |= note("full", self._fit("full", network.model, data, member))
        if self.devices.leads:
            store.save_weights("classifier_weights", network.model, backbone=settings.backbone, member=member.name)
        return notes

    def _train_head(
        self, network: classifier.Classifier, data: TrainingData, member: Member, needed: int
    ) -> dict[str, Any]:
        """Trains the head on features of the frozen backbone; of train those of the first `needed` rows."""
        store, settings = self.store, self.settings
        counts = {split: len(images) for split, images in data.inputs.items()} | {"train": needed}
        features = self._features(network, counts)
        if settings.weights == backbones.NONE and not settings.continued:
            log.info("head on features of a random backbone: expect an AUC near 0.5 in this phase")
        notes = note("head", self._fit("head", network.head, replace(data, inputs=features), member))
        if self.devices.leads:
            store.save_weights("head_weights", network.head, backbone=settings.backbone, member=member.name)
        return notes

    def _features(self, network: classifier.Classifier, counts: dict[str, int]) -> dict[str, np.ndarray]:
        """Features of the frozen backbone, float32 (N, C): computed once by the leading process, and saved.

        Args:
            network: with the backbone.
            counts: number N of rows by split, always the first ones.
        """
        store, backbone = self.store, self.settings.backbone
        store.settings["backbone_sha256"] = fingerprint(network.backbone)
        extractor, features = network.extractor(), {}
        for split, count in counts.items():
            store.settings["rows"] = int(count)
            made_with = {setting: store.settings[setting] for setting in OF_FEATURES}
            images = store.load("roi", split=split)[:count]
            blocks = predict([extractor], images, self.settings.recipe.batch_size, f"features of {split}")
            if not self.devices.leads or store.reusable(
                "features", made_with, int(count), split=split, backbone=backbone
            ):
                log.info("reusing the features of %s", split)
            else:
                shape = extractor.output_shape[1:]
                with store.writer("features", len(images), shape, split=split, backbone=backbone) as file:
                    for block in blocks:
                        file.append(block)
                    store.settings["inference"] = blocks.inference.name
            self.devices.wait()
            features[split] = np.array(store.load_first("features", int(count), split=split, backbone=backbone))
            # No input of the networks: with random weights the next seed replaces them, which makes no network stale.
            store.forget("features", split=split, backbone=backbone)
        for setting in ("backbone_sha256", "rows"):
            del store.settings[setting]
        return features

    def _fit(self, phase: str, network: keras.Model, data: TrainingData, member: Member) -> loop.TrainingResult:
        """One phase; --epochs and --learning-rate apply to the last one."""
        settings, recipe = self.settings, self.settings.recipe
        is_last, of_images = phase == recipe.train, phase != "head"
        loss = f"{'focal ' * (recipe.balance == 'focal')}cross-entropy"
        extra = self.store.load("origin", split="train") > 0
        each = np.ones(len(extra)) if phase == PRETRAINING else np.where(extra, recipe.extra_weight, 1.0)
        weights = row_weights(data.labels["train"], data.rows, each)
        options = BatchOptions(
            rows=data.rows,
            seed=member.seed,
            augmentation=augment.RANGES[recipe.augmentation] if of_images else None,
            mixup=recipe.mixup if of_images else 0.0,
            sampling_weights=weights if recipe.balance == "sampling" else None,
            length=round(each[data.rows].sum()) if recipe.balance == "sampling" else None,
            loss_weights=loss_weights(recipe, weights, each),
        )
        name = f"{settings.backbone}_{phase}{member.name}"
        epochs = {"head": WARM_UP_EPOCHS, PRETRAINING: recipe.pretrain}.get(phase, 0)
        if is_last:
            epochs = recipe.epochs or EPOCHS[phase]
        return loop.fit(
            network,
            Batches(data.inputs["train"], data.targets, recipe.batch_size, options),
            self._validation(data.inputs, data.labels),
            loop.Objective(
                LOSSES[loss](label_smoothing=recipe.label_smoothing),
                [ClassAUC(multi_label=True, num_labels=len(CLASSES), name="auc")],
                "auc",
            ),
            loop.Hyperparameters(
                epochs,
                ((is_last or phase == PRETRAINING) and recipe.learning_rate)
                or LEARNING_RATE["full" if of_images else "head"],
                recipe.ema if of_images else 0.0,
                PATIENCE,
                LAST if phase == PRETRAINING else recipe.keep,
                recipe.first_rate if of_images else 1.0,
            ),
            TrainingRun(
                checkpoints.for_training(self.store, settings.backbone, name),
                self.draw(phase, member.name),
                devices=self.devices,
                callbacks=self.watch(phase, member, network, data),
            ),
        )

    def _validation(self, inputs: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> Batches | None:
        """The labelled rows of validation."""
        if "val" not in labels:
            return None
        rows = np.flatnonzero(labels["val"] != UNLABELLED)
        return Batches(inputs["val"], one_hot(labels["val"]), self.settings.recipe.batch_size, BatchOptions(rows=rows))


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
        log.info("no validation labels: training AUC and loss are used instead")
    return labels


def one_hot(labels: np.ndarray) -> np.ndarray:
    """From labels, int (N,), to float32 (N, 3); UNLABELLED becomes zeros."""
    return np.equal.outer(labels, np.arange(len(CLASSES))).astype(np.float32)


def row_weights(labels: np.ndarray, rows: np.ndarray, each: np.ndarray) -> np.ndarray:
    """Weight of each row, float32 (N,), with which all classes count equally among `rows`; their mean there is 1.

    Args:
        labels: int (N,), UNLABELLED where there is none; such rows weigh 0.
        rows: int (K,), labelled rows.
        each: float (N,), weight of each row relative to others of its class.

    Raises:
        InputError: a class has no image among the rows.
    """
    totals = np.bincount(labels[rows], each[rows], minlength=len(CLASSES))
    if absent := [name for name, total in zip(CLASSES, totals, strict=True) if not total]:
        raise InputError(f"no {' and no '.join(absent)} among {len(rows)} training images: add some")
    return (each * (one_hot(labels) @ (len(rows) / len(totals) / totals))).astype(np.float32)


def loss_weights(recipe: Recipe, balanced: np.ndarray, each: np.ndarray) -> np.ndarray | None:
    """Weight of each row's loss, float32 (N,); None: equal weights.

    Args:
        recipe: with --balance.
        balanced: (N,), from `row_weights`.
        each: (N,), weights without regard to classes.
    """
    if recipe.balance == "weights":
        return balanced
    return None if recipe.balance == "sampling" or (each == 1).all() else each.astype(np.float32)


def note(phase: str, result: loop.TrainingResult) -> dict[str, Any]:
    """What is saved of the training of a phase."""
    return {
        phase: {
            "kept_epoch": result.kept_epoch,
            "reason": result.reason,
            "history": result.history,
            "seconds": result.seconds,
        }
    }


def fingerprint(model: keras.Model) -> str:
    """SHA-256 of a model's weights."""
    digest = hashlib.sha256()
    for value in model.get_weights():
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def warn_of_seen_masks(store: Store, settings: ClassifierSettings, roi: str) -> None:
    """Warns if a cross-validation would use train masks of a network trained on those images."""
    if settings.folds > 1 and roi != "full" and store.written_with("predicted", split="train").get("folds", 1) == 1:
        log.warning(
            "warning: the lesion masks of train come from a network trained on these images and are better than those "
            "of new images: for an unbiased cross-validation run %s with --folds",
            contract.SEGNET,
        )
