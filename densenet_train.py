"""Step 4 of 5: teach DenseNet121, or another backbone, to tell nevus, melanoma and seborrheic keratosis apart.

Reads   data/arrays/{train,val,test}_{ids,labels}.npy       from step 1
        data/arrays/{train,val,test}_masked.npy             from step 3
        pretrained/classifier{member}.weights.h5            with --pretrained
        pretrained/classifier.json                          with --pretrained
Writes  data/arrays/{train,val}_{backbone}_features.npy     float32 (N, C), the untrained backbone's features
        data/weights/{backbone}_head{member}.weights.h5     the head fitted on them, of each fold and seed
        data/weights/{backbone}{member}.weights.h5          the whole classifier, best epoch
        data/weights/{backbone}.json                        settings, calibration, training history
        data/arrays/{val,test}_probabilities.npy            float32 (N, 3), calibrated
        data/arrays/train_probabilities.npy                 with --folds: by the networks that have not seen each
        data/checkpoints/                                   states of interrupted trainings, until the script ends
        graphics/{backbone}_{head,full}{member}_curves.png  training curves of each phase
        graphics/{backbone}_{head,full}{member}_history.csv  their values

Run     python densenet_train.py
Try     python densenet_train.py --backbone mobilenet --weights none --epochs 1 --limit 30
Expect  README, "Results"
"""

import argparse
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from melanoma import (
    backbones,
    calibration,
    checkpoints,
    classifier,
    command,
    distribution,
    folds,
    hardware,
    isic,
    pretrained,
    stages,
    training,
)
from melanoma.command import log
from melanoma.errors import InputError, StageError

import keras
import numpy as np

BACKBONE = "densenet121"
BATCH_SIZE = 16
EPOCHS = {"head": 60, "full": 15}
LEARNING_RATE = {"head": 1e-3, "full": 1e-4}  # full training starts from weights worth keeping
AVERAGING = 0.0
PATIENCE = 10  # epochs without a better validation AUC
# Settings that the features depend on, beside what computes them.
OF_FEATURES = ("backbone", "weights_sha256", "scaling", "precision", "network_size", "keras_backend")
# What --pretrained leaves no use for.
OF_TRAINING = (
    *("backbone", "weights", "scaling", "network_size", "train", "balance", "folds", "seeds"),
    *("epochs", "learning_rate", "averaging", "restart", "turns", "distribute"),
)
LOSSES = {"cross-entropy": "categorical_crossentropy", "focal cross-entropy": "categorical_focal_crossentropy"}
BALANCES = ("copies", "weights", "focal", "sampling", "none")


def parser() -> argparse.ArgumentParser:
    """The script's command line."""
    flags = command.parser(__doc__)
    command.training_flags(flags, None, BATCH_SIZE, None, AVERAGING, "; None: a value of its own for each --train")
    backbones.flags(flags, BACKBONE, "; mobilenet is the earlier baseline")
    flags.add_argument(
        "--network-size", type=command.positive_int, help="side in pixels that the backbone works at; None: the arrays'"
    )
    flags.add_argument(
        "--train",
        choices=("head", "full"),
        default="full",
        help="head: the backbone stays frozen, as in 2018; full: the head first, then everything with augmentation, "
        "but for the batch normalisation of pretrained backbones",
    )
    flags.add_argument(
        "--balance",
        choices=BALANCES,
        default=BALANCES[0],
        help="of the classes: the augmented copies of the first script; or, without these, rare classes weigh more, "
        "focal loss, or all classes drawn equally often; or nothing",
    )
    flags.add_argument(
        "--folds",
        type=command.positive_int,
        default=1,
        help="networks, each trained without a part of the train photographs, which it then judges, as in a "
        "cross-validation; the other splits are judged by all networks together",
    )
    flags.add_argument("--seeds", type=command.positive_int, default=1, help="networks of each fold, from --seed up")
    flags.add_argument(
        "--turns", action=argparse.BooleanOptionalAction, default=True, help="mean over 8 flips and quarter turns"
    )
    flags.add_argument("--pretrained", action="store_true", help="no training: the weights that come with the scripts")
    return flags


def diagnoses(store: stages.Store) -> dict[str, np.ndarray]:
    """Diagnoses, int (N,), of train, and of validation where it has labels.

    Raises:
        StageError: train has no labels.
    """
    if not store.has("labels", split="train"):
        raise StageError(f"no labelled training images to learn from: run {stages.PREPROCESSING} on a source with them")
    splits = [split for split in ("train", "val") if store.has("labels", split=split)]
    if "val" not in splits:
        log.info("no validation labels: the best epoch is chosen by the training AUC")
    return {split: np.array(store.load("labels", split=split)) for split in splits}


def rarity(labels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """What each row counts so that the classes count the same among `rows`, where the mean is 1: float32 (N,).

    Raises:
        InputError: a class has no image among them.
    """
    counts = np.bincount(labels[rows], minlength=len(isic.CLASSES))
    if absent := [name for name, count in zip(isic.CLASSES, counts, strict=True) if not count]:
        raise InputError(f"no {' and no '.join(absent)} among {len(rows)} training images: add some")
    return (len(rows) / len(counts) / counts).astype(np.float32)[labels]


def features(
    store: stages.Store,
    devices: distribution.Devices,
    split: str,
    extract: keras.Model,
    made_with: dict[str, Any],
    batch: int,
) -> np.ndarray:
    """The frozen backbone's features of a split, computed once, by the process that leads, and kept."""
    backbone, masked = made_with["backbone"], store.load("masked", split=split)
    found = training.predict([extract], masked, batch, f"features of {split}")
    if not devices.leads or store.reusable("features", made_with, split=split, backbone=backbone):
        log.info("features of %s are there already", split)
    else:
        with store.writer("features", len(masked), extract.output_shape[1:], split=split, backbone=backbone) as file:
            for block in found:
                file.append(block)
            store.settings["inference"] = found.inference.name
    devices.wait()
    return np.array(store.load("features", split=split, backbone=backbone))


def fit(
    phase: str,
    store: stages.Store,
    network: keras.Model,
    inputs: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    rows: np.ndarray,
    member: folds.Member,
    arguments: argparse.Namespace,
    devices: distribution.Devices,
    start: float = -math.inf,
) -> training.Training:
    """One phase of training; --epochs and --learning-rate are those of the phase that --train names."""
    own, balance = phase == arguments.train, arguments.balance
    loss = f"{'focal ' * (balance == 'focal')}cross-entropy"
    weights = rarity(labels["train"], rows)
    truth = {split: np.eye(len(isic.CLASSES), dtype=np.float32)[one] for split, one in labels.items()}
    batches = training.Batches(
        inputs["train"],
        truth["train"],
        arguments.batch_size,
        rows=rows,
        seed=member.seed,
        vary=phase == "full",
        chances=weights if balance == "sampling" else None,
        loss_weights=weights if balance == "weights" else None,
    )
    name = f"{arguments.backbone}_{phase}{member.name}"
    return training.fit(
        network,
        batches,
        training.Batches(inputs["val"], truth["val"], arguments.batch_size) if "val" in truth else None,
        loss=LOSSES[loss],
        metrics=[keras.metrics.AUC(multi_label=True, num_labels=len(isic.CLASSES), name="auc")],
        monitor="auc",
        epochs=(own and arguments.epochs) or EPOCHS[phase],
        learning_rate=(own and arguments.learning_rate) or LEARNING_RATE[phase],
        averaging=arguments.averaging,
        patience=PATIENCE,
        checkpoint=checkpoints.of_training(store, arguments.backbone, name),
        draw=partial(
            training.record,
            arguments.graphics / name,
            {"loss": loss, "auc": "mean AUC of the three classes"},
            f"{arguments.backbone}, {'head on frozen features' if phase == 'head' else 'full training'}"
            f"{member.name.replace('_', ', ')}",
        ),
        start=start,
        devices=devices,
    )


def train(
    store: stages.Store,
    labels: dict[str, np.ndarray],
    rows: np.ndarray,
    member: folds.Member,
    arguments: argparse.Namespace,
    devices: distribution.Devices,
) -> tuple[classifier.Classifier, dict[str, Any]]:
    """Trains on some rows of train; returns the classifier with its best epoch's weights, and what to note of it."""
    keras.utils.set_random_seed(member.seed)
    name, full = arguments.backbone, arguments.train == "full"
    masked = {split: store.load("masked", split=split) for split in labels}
    size = masked["train"].shape[1]
    network = classifier.build(name, size, arguments.weights, arguments.scaling, arguments.network_size)
    log.info("%s%s, %d weights, %d rows of training", name, member.name, network.model.count_params(), len(rows))
    made_with = {setting: store.settings[setting] for setting in OF_FEATURES}
    store.settings["random_weights"] = made_with["random_weights"] = (
        member.seed if arguments.weights == backbones.NONE else None
    )
    extract = network.extractor()
    known = {split: features(store, devices, split, extract, made_with, arguments.batch_size) for split in labels}
    of_both = (labels, rows, member, arguments, devices)
    phases = {"head": fit("head", store, network.head, known, *of_both)}
    if devices.leads:
        store.save_weights("head_weights", network.head, backbone=name, member=member.name)
    if full:
        # A training value, without validation, is no bar: full training sees harder, augmented images.
        start = phases["head"].best if "val" in labels else -math.inf
        phases["full"] = fit("full", store, network.model, masked, *of_both, start)
    if devices.leads:
        store.save_weights("classifier_weights", network.model, backbone=name, member=member.name)
    return network, {
        phase: {"best_epoch": one.best_epoch, "history": one.history, "seconds": one.seconds}
        for phase, one in phases.items()
    }


def train_all(
    store: stages.Store, arguments: argparse.Namespace, devices: distribution.Devices, roi: str
) -> tuple[list[classifier.Classifier], dict[str, Any], np.ndarray | None]:
    """Trains a network for every fold and seed; returns them, what to note of each, and who has not seen which row."""
    if arguments.restart and devices.leads:
        checkpoints.remove(store, arguments.backbone)
    devices.wait()
    labels, ids = diagnoses(store), store.load("ids", split="train").tolist()
    members = folds.members(arguments.folds, arguments.seeds, arguments.seed)
    fold_of_row = folds.assign(ids, arguments.folds, arguments.seed)
    learnable = folds.photographs(ids) | (arguments.balance == "copies")
    if arguments.folds > 1 and roi != "full" and store.written_with("predicted", split="train").get("folds", 1) == 1:
        log.warning(
            "the lesion masks of train are by a network that has seen them, better than others will be: for a "
            "cross-validation run %s with --folds",
            stages.SEGNET,
        )
    networks, notes = [], {}
    for member in members:
        rows = np.flatnonzero(learnable & (fold_of_row != member.fold))
        network, notes[member.name] = train(store, labels, rows, member, arguments, devices)
        networks.append(network)
    return networks, notes, folds.own(members, fold_of_row)


def judged(
    store: stages.Store, ensemble: classifier.Ensemble, batch_size: int, own: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Probabilities, float32 (N, 3), of every split; of train where `own`, see `training.predict`, says by whom."""
    found, ways = {}, set()
    for split in store.splits():
        masked = store.load("masked", split=split)
        if split != "train":
            found[split], way = ensemble.probabilities(masked, batch_size, f"probabilities of {split}")
            ways.add(way)
        elif own is not None:
            photographs = folds.photograph_of(store.load("ids", split=split).tolist())
            count = photographs.max() + 1  # they come first; a copy gets what its photograph gets
            label = "probabilities of train, out of fold"
            each, way = ensemble.probabilities(masked[:count], batch_size, label, own[:count])
            found[split] = each[photographs]
            ways.add(way)
    store.settings["inference"] = ", ".join(sorted(ways))
    return found


def calibrate(store: stages.Store, found: dict[str, np.ndarray]) -> calibration.Calibration:
    """The calibration of probabilities on train, out of fold, where there are such, or on validation."""
    for split in ("train", "val"):
        if split in found and store.has("labels", split=split):
            rows = folds.photographs(store.load("ids", split=split).tolist())
            fitted = calibration.fit(store.load("labels", split=split)[rows], found[split][rows])
            log.info("calibrated on %s: temperature %.2f", split, fitted.temperature)
            return fitted
    return calibration.IDENTITY


def region_of_interest(store: stages.Store) -> str:
    """The --roi of the third script.

    Raises:
        StageError: it was not the same for all splits.
    """
    splits = store.splits()
    for split in splits:
        store.check("masked", split=split)
    used = {store.written_with("masked", split=split)["roi"] for split in splits}
    if len(used) > 1:
        raise StageError(f"splits differ in --roi ({', '.join(sorted(used))}): run {stages.MASKING} again")
    return used.pop()


def clear_curves(graphics: Path, backbone: str, notes: dict[str, Any]) -> None:
    """Takes the training curves of earlier networks away; `notes`: the phases of each of the new ones."""
    kept = {f"{backbone}_{phase}{member}" for member, phases in notes.items() for phase in phases}
    for phase in EPOCHS:
        for path in graphics.glob(f"{backbone}_{phase}*_[ch]*"):
            if path.stem.rpartition("_")[0] not in kept:
                path.unlink()


def take_pretrained(store: stages.Store, size: int, roi: str) -> tuple[classifier.Ensemble, dict[str, Any]]:
    """The networks that come with the scripts and what is noted of them; puts their weights among those trained here.

    Raises:
        InputError: they were trained on another region of interest.
    """
    ensemble, noted = pretrained.load_classifier(size)
    if roi != noted["roi"]:
        raise InputError(
            f"--pretrained: the networks know --roi {noted['roi']}: run {stages.MASKING} with it, not with --roi {roi}"
        )
    made_with = noted["settings"][stages.CLASSIFIER]
    store.settings |= {name: made_with.get(name) for name in OF_TRAINING} | {"weights_sha256": noted["sha256"]}
    backbone = noted["backbone"]
    for member, network in zip(noted["members"], ensemble.classifiers, strict=True):
        store.save_weights("classifier_weights", network.model, backbone=backbone, member=member)
    store.keep_members("classifier_weights", list(noted["members"]), backbone=backbone)
    store.keep_members("head_weights", [], backbone=backbone)
    return ensemble, noted


def main(arguments: argparse.Namespace) -> None:
    """Trains, or takes the pretrained networks; writes the probabilities of every split."""
    hardware.check()
    keras.config.set_dtype_policy(arguments.precision)
    made_with = {"weights_sha256": backbones.digest(arguments.weights), "keras_backend": keras.backend.backend()}
    store = stages.Store(arguments.data, stages.CLASSIFIER, vars(arguments) | made_with)
    split = store.splits()[0]
    size = store.load("masked", split=split).shape[1]
    roi = region_of_interest(store)
    if arguments.pretrained:
        pretrained.refuse_other_split(store, split)
        command.refuse(arguments, parser(), OF_TRAINING, "--pretrained trains nothing")
        ensemble, facts = take_pretrained(store, size, roi)
        clear_curves(arguments.graphics, facts["backbone"], {})
        found = judged(store, ensemble, arguments.batch_size)
    else:
        with distribution.devices(arguments.distribute) as devices:
            networks, notes, own = train_all(store, arguments, devices, roi)
        if not devices.leads:
            return
        for name in ("head_weights", "classifier_weights"):
            store.keep_members(name, list(notes), backbone=arguments.backbone)
        clear_curves(arguments.graphics, arguments.backbone, notes)
        raw = judged(store, classifier.Ensemble(networks, arguments.turns), arguments.batch_size, own)
        fitted = calibrate(store, raw)
        found = {split: fitted.apply(probabilities) for split, probabilities in raw.items()}
        facts = {
            "backbone": arguments.backbone,
            "scaling": arguments.scaling,
            "network_size": networks[0].network_size,
            "classes": isic.CLASSES,
            "roi": roi,
            "turns": arguments.turns,
            "calibration": asdict(fitted),
            "members": notes,
        }
    store.save_json("classifier_settings", facts | {"size": size}, backbone=facts["backbone"])
    store.remove("probabilities", split="train")  # of an earlier run
    for split, probabilities in found.items():
        store.save("probabilities", probabilities, split=split)
    if not arguments.pretrained:
        checkpoints.remove(store, arguments.backbone)


if __name__ == "__main__":
    command.run(parser(), main)
