"""Step 4 of 5: teach DenseNet121, or another backbone, to tell nevus, melanoma and seborrheic keratosis apart.

Reads   data/arrays/{train,val,test}_{ids,labels}.npy       from step 1
        data/arrays/{train,val,test}_masked.npy             from step 3
Writes  data/arrays/{split}_{backbone}_features.npy         float32 (N, C), the untrained backbone's features
        data/weights/{backbone}_head.weights.h5             the head fitted on them
        data/weights/{backbone}.weights.h5                  the whole classifier, best epoch
        data/weights/{backbone}.json                        settings, training history
        data/arrays/{train,val,test}_probabilities.npy      float32 (N, 3)
        graphics/{backbone}_{head,full}_curves.png          training curves of each phase

Run     python densenet_train.py
Try     python densenet_train.py --backbone mobilenet --weights none --epochs 1 --limit 30
Expect  README, "Results"
"""

import argparse
import math
from functools import partial
from typing import Any

from melanoma import backbones, classifier, command, isic, plots, stages, training
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


def parser() -> argparse.ArgumentParser:
    """The script's command line."""
    flags = command.parser(__doc__)
    command.training_flags(flags, None, BATCH_SIZE, None, AVERAGING, "; None: a value of its own for each --train")
    backbones.flags(flags, BACKBONE, "; mobilenet is the earlier baseline")
    flags.add_argument(
        "--train",
        choices=("head", "full"),
        default="full",
        help="head: the backbone stays frozen, as in 2018; full: the head first, then everything with augmentation, "
        "but for the batch normalisation of pretrained backbones",
    )
    return flags


def diagnoses(store: stages.Store) -> dict[str, np.ndarray]:
    """One-hot diagnoses, float32 (N, 3), of train, and of validation where it has labels.

    Raises:
        StageError: train has no labels.
        InputError: a class has no training image.
    """
    if not store.has("labels", split="train"):
        raise StageError(f"no labelled training images to learn from: run {stages.PREPROCESSING} on a source with them")
    splits = [split for split in ("train", "val") if store.has("labels", split=split)]
    if "val" not in splits:
        log.info("no validation labels: the best epoch is chosen by the training AUC")
    one_hot = np.eye(len(isic.CLASSES), dtype=np.float32)
    truth = {split: one_hot[store.load("labels", split=split)] for split in splits}
    absent = [name for name, count in zip(isic.CLASSES, truth["train"].sum(axis=0), strict=True) if not count]
    if absent:
        raise InputError(f"no {' and no '.join(absent)} among {len(truth['train'])} training images: add some")
    return truth


def features(
    store: stages.Store, split: str, extract: keras.Model, made_with: dict[str, Any], batch: int
) -> np.ndarray:
    """The frozen backbone's features of a split, computed once and kept."""
    backbone = made_with["backbone"]
    if store.reusable("features", made_with, split=split, backbone=backbone):
        log.info("features of %s are there already", split)
    else:
        masked = store.load("masked", split=split)
        with store.writer("features", len(masked), extract.output_shape[1:], split=split, backbone=backbone) as file:
            for block in training.predict(extract, masked, batch, f"features of {split}"):
                file.append(block.astype(np.float32))
    return np.array(store.load("features", split=split, backbone=backbone))


def fit(
    phase: str,
    network: keras.Model,
    inputs: dict[str, np.ndarray],
    truth: dict[str, np.ndarray],
    arguments: argparse.Namespace,
    **keep: Any,
) -> training.Training:
    """One phase of training; --epochs and --learning-rate are those of the phase that --train names."""
    own = phase == arguments.train
    result = training.fit(
        network,
        training.Batches(
            inputs["train"], truth["train"], arguments.batch_size, seed=arguments.seed, vary=phase == "full"
        ),
        training.Batches(inputs["val"], truth["val"], arguments.batch_size) if "val" in truth else None,
        loss="categorical_crossentropy",
        metrics=[keras.metrics.AUC(multi_label=True, num_labels=len(isic.CLASSES), name="auc")],
        monitor="auc",
        epochs=(own and arguments.epochs) or EPOCHS[phase],
        learning_rate=(own and arguments.learning_rate) or LEARNING_RATE[phase],
        averaging=arguments.averaging,
        patience=PATIENCE,
        **keep,
    )
    plots.training_curves(
        arguments.graphics / f"{arguments.backbone}_{phase}_curves.png",
        result.history,
        result.best_epoch,
        {"loss": "cross-entropy", "auc": "mean AUC of the three classes"},
        f"{arguments.backbone}, {'head on frozen features' if phase == 'head' else 'full training'}",
    )
    return result


def main(arguments: argparse.Namespace) -> None:
    """Fits the head, then everything where asked, and writes the probabilities of every split."""
    keras.utils.set_random_seed(arguments.seed)
    keras.config.set_dtype_policy(arguments.precision)
    name, batch_size, full = arguments.backbone, arguments.batch_size, arguments.train == "full"
    made_with = {"backbone": name, "weights_sha256": backbones.digest(arguments.weights), "seed": arguments.seed}
    made_with |= {"scaling": arguments.scaling, "precision": arguments.precision}
    made_with["keras_backend"] = keras.backend.backend()  # whose random weights differ
    store = stages.Store(arguments.data, stages.CLASSIFIER, vars(arguments) | made_with)
    truth = diagnoses(store)
    masked = {split: store.load("masked", split=split) for split in store.splits()}
    classify = classifier.build(name, masked["train"].shape[1], arguments.weights, arguments.scaling)
    head, model = classify.head, classify.model
    log.info("%s, %d weights, %d rows of training", name, model.count_params(), len(truth["train"]))

    extract = classify.extractor()
    inputs = {
        split: features(store, split, extract, made_with, batch_size) for split in masked if not full or split in truth
    }
    save_head = partial(store.save_weights, "head_weights", head, backbone=name)
    results = {"head": fit("head", head, inputs, truth, arguments, save=save_head)}
    save = partial(store.save_weights, "classifier_weights", model, backbone=name)
    network = head
    if full:
        network, inputs = model, masked
        # A training value, without validation, is no bar: full training sees harder, augmented images.
        start = results["head"].best if "val" in truth else -math.inf
        results["full"] = fit("full", model, masked, truth, arguments, save=save, start=start)
    else:
        save()
    facts = {
        "size": masked["train"].shape[1],
        "classes": isic.CLASSES,
        "roi": store.written_with("masked", split="train")["roi"],
    }
    phases = {phase: {"best_epoch": one.best_epoch, "history": one.history} for phase, one in results.items()}
    store.save_json("classifier_settings", made_with | facts | phases, backbone=name)
    for split, rows in inputs.items():
        blocks = list(training.predict(network, rows, batch_size, f"probabilities of {split}"))
        store.save("probabilities", np.concatenate(blocks), split=split)


if __name__ == "__main__":
    command.run(parser(), main)
