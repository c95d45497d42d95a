"""Step 2 of 5: teach a network to outline the lesion, then write its masks.

Reads   data/arrays/{train,val,test}_{ids,images,masks,labels}.npy   from step 1
        pretrained/segnet.weights.h5, segnet.json                    with --pretrained
Writes  data/weights/segnet{member}.weights.h5                weights of the best epoch, of each fold
        data/weights/segnet.json                              the network's design, threshold, training history
        data/arrays/{train,val,test}_predicted.npy            uint8 (N, S, S, 1), {0, 1}
        data/checkpoints/                                     states of interrupted trainings, until the script ends
        graphics/segnet{member}_curves.png                    training curves of each fold
        graphics/segnet{member}_history.csv                   their values
        graphics/segnet_overlays.png                          worst, median and best validation masks
        graphics/segnet_jaccard.png                           Jaccard index against lesion size, and by class
        graphics/segmentation.json                            the challenge's figures of the splits that have masks

Run     python segmentation_02_segnet_train.py
Try     python segmentation_02_segnet_train.py --network segnet --epochs 1 --limit 30
Expect  README, "Results"
"""

import argparse
import statistics
import time
from dataclasses import asdict
from functools import partial
from typing import Any

from melanoma import (
    backbones,
    checkpoints,
    command,
    distribution,
    folds,
    hardware,
    isic,
    masks,
    metrics,
    plots,
    pretrained,
    segnet,
    stages,
    training,
)
from melanoma.command import log
from melanoma.errors import StageError

import keras
import numpy as np

NETWORK = "unet"
BACKBONE = "mobilenetv2"
NETWORK_SIZE = 192  # pixels
EPOCHS = 14
BATCH_SIZE = 16
LEARNING_RATE = 1e-3
AVERAGING = 0.99
PATIENCE = 10  # epochs without a better validation Jaccard
LOSS = "dice_cross_entropy"
SEGNET = "segnet"  # what files call the network, whichever it is
OVERLAYS, JACCARD = "segnet_overlays.png", "segnet_jaccard.png"
# What --pretrained leaves no use for.
OF_TRAINING = (
    *("network", "network_size", "backbone", "weights", "scaling", "loss", "folds"),
    *("epochs", "learning_rate", "averaging", "restart", "distribute"),
)


def parser() -> argparse.ArgumentParser:
    """The script's command line."""
    flags = command.parser(__doc__)
    flags.add_argument("--network", choices=segnet.NETWORKS, default=NETWORK, help="segnet takes no backbone")
    backbones.flags(flags, BACKBONE, "; for unet, segnet_vgg16 has its own")
    flags.add_argument(
        "--network-size",
        type=command.positive_int,
        default=NETWORK_SIZE,
        help="side in pixels that the network works at; masks keep the arrays' side",
    )
    flags.add_argument("--loss", choices=segnet.LOSSES, default=LOSS, help="to minimise, of each image")
    command.training_flags(flags, EPOCHS, BATCH_SIZE, LEARNING_RATE, AVERAGING)
    flags.add_argument(
        "--folds",
        type=command.positive_int,
        default=1,
        help="networks, each trained without a part of the train photographs, whose masks are then its own; the masks "
        "of the other splits are of all networks together",
    )
    flags.add_argument("--pretrained", action="store_true", help="no training: the weights that come with the scripts")
    switch = argparse.BooleanOptionalAction
    flags.add_argument("--turns", action=switch, default=True, help="mean over 8 flips and quarter turns")
    flags.add_argument("--clean", action=switch, default=True, help="largest part alone, its holes filled")
    flags.add_argument(
        "--threshold",
        type=command.share,
        help="probability from which a pixel is lesion; None: chosen on validation, or that of the pretrained network",
    )
    return flags


def colour_statistics(store: stages.Store) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the training photographs' red, green and blue, 0 to 255."""
    sums, squares, count = np.zeros(3), np.zeros(3), 0
    for block in store.blocks("images", split="train"):
        values = block.reshape(-1, 3).astype(np.float64)
        sums, squares, count = sums + values.sum(axis=0), squares + (values**2).sum(axis=0), count + len(values)
    mean = sums / count
    return mean.tolist(), np.sqrt(squares / count - mean**2).tolist()


def design_of(store: stages.Store, arguments: argparse.Namespace) -> segnet.Design:
    """The network that the flags ask for."""
    mean, std = colour_statistics(store) if arguments.network == "segnet" else (None, None)
    backbone = {"segnet": "", "segnet_vgg16": segnet.VGG16, "unet": arguments.backbone}[arguments.network]
    return segnet.Design(arguments.network, arguments.network_size, backbone, arguments.scaling, mean, std)


def train(
    store: stages.Store,
    arguments: argparse.Namespace,
    devices: distribution.Devices,
    design: segnet.Design,
    rows: np.ndarray,
    member: folds.Member,
) -> tuple[keras.Model, training.Training]:
    """Trains on some rows of train, chooses the best epoch on validation, saves weights and curves.

    Copies stay out: they balance the classes for the classifier, and every epoch varies the photographs anew anyway.
    """
    keras.utils.set_random_seed((member.seed + member.fold + 1) % 2**32)  # each fold starts from weights of its own
    images, truth = store.load("images", split="train"), store.load("masks", split="train")
    model = segnet.build(design, images.shape[1], arguments.weights)
    log.info("%s%s, %d weights, %d photographs of training", model.name, member.name, model.count_params(), len(rows))
    validation = None
    if store.has("masks", split="val"):
        val = store.load("images", split="val"), store.load("masks", split="val")
        validation = training.Batches(*val, arguments.batch_size)
    else:
        log.info("no validation masks: the best epoch is chosen by the training Jaccard")
    result = training.fit(
        model,
        training.Batches(
            images, truth, arguments.batch_size, rows=rows, seed=member.seed, vary=True, target_is_mask=True
        ),
        validation,
        loss=segnet.LOSSES[arguments.loss],
        metrics=[segnet.jaccard],
        monitor="jaccard",
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        averaging=arguments.averaging,
        patience=PATIENCE,
        checkpoint=checkpoints.of_training(store, SEGNET, f"{SEGNET}{member.name}"),
        draw=partial(
            training.record,
            arguments.graphics / f"{SEGNET}{member.name}",
            {"loss": f"loss, {arguments.loss.replace('_', ' ')}", "jaccard": "mean Jaccard"},
            f"{design.network}{member.name.replace('_', ', ')}",
        ),
        devices=devices,
    )
    if devices.leads:
        store.save_weights("segnet_weights", model, member=member.name)
    return model, result


def train_all(
    store: stages.Store,
    arguments: argparse.Namespace,
    devices: distribution.Devices,
    members: list[folds.Member],
    fold_of_row: np.ndarray,
) -> tuple[list[keras.Model], dict[str, Any]]:
    """Trains a network for every fold; returns them and what to note of them."""
    if arguments.restart and devices.leads:
        checkpoints.remove(store, SEGNET)
    devices.wait()
    design = design_of(store, arguments)
    learnable = folds.photographs(store.load("ids", split="train").tolist())
    models: list[keras.Model] = []
    notes: list[dict[str, Any]] = []
    for member in members:
        rows = np.flatnonzero(learnable & (fold_of_row != member.fold))
        model, result = train(store, arguments, devices, design, rows, member)
        models.append(model)
        notes.append({"best_epoch": result.best_epoch, "history": result.history, "seconds": result.seconds})
    seconds = statistics.median(second for note in notes for second in note["seconds"])
    cost = {"weights": models[0].count_params(), "seconds_per_epoch": seconds}
    return models, {"design": asdict(design), "training": notes, "cost": cost}


def choose_threshold(
    store: stages.Store, arguments: argparse.Namespace, models: list[keras.Model]
) -> tuple[float, dict[str, Any]]:
    """The threshold with the best masks of validation, and what each step after the network is worth there."""
    if not store.has("masks", split="val"):
        return masks.DEFAULT_THRESHOLD, {}
    images, truth = store.load("images", split="val"), np.array(store.load("masks", split="val"))
    found, rates = {}, {}
    list(training.predict(models, images[:1], arguments.batch_size, "first look"))  # Keras compiles
    for turns in (False, True):
        blocks = training.predict(models, images, arguments.batch_size, f"validation, turns {turns}", turns)
        blocks.inference.networks()  # converts them, so that the rate is of predicting alone
        store.settings["inference"] = blocks.inference.name
        start = time.perf_counter()
        found[turns], rates[turns] = np.concatenate(list(blocks)), len(images) / (time.perf_counter() - start)
    effects = masks.effects(truth, found[False], found[True])
    log.info("\nOn validation, mean Jaccard without and with turned views, clean-up, a threshold chosen here:")
    for row in effects:
        words = [name for name in ("turns", "cleaned") if row[name]] + [f"threshold {row['threshold']:.2f}"]
        log.info("  %-40s%.4f", ", ".join(words), row["jaccard"])
    asked = {"turns": arguments.turns, "cleaned": arguments.clean, "threshold_chosen": True}
    chosen = next(float(row["threshold"]) for row in effects if row.items() >= asked.items())
    facts = {"effects_on_validation": effects, "images_per_second": rates[False]}
    facts["images_per_second_with_turns"] = rates[True]
    return chosen, facts


def write_masks(
    store: stages.Store,
    arguments: argparse.Namespace,
    models: list[keras.Model],
    threshold: float,
    own: np.ndarray | None,
) -> None:
    """Writes the predicted masks of every split; for `own`, of train, see `training.predict`."""
    for split in store.splits():
        images = store.load("images", split=split)
        seers = own if split == "train" else None
        blocks = training.predict(models, images, arguments.batch_size, f"masks of {split}", arguments.turns, seers)
        with store.writer("predicted", len(images), (*images.shape[1:3], 1), split=split) as file:
            for block in blocks:
                file.append(masks.outline(block, threshold, arguments.clean))
            store.settings["inference"] = blocks.inference.name


def score(store: stages.Store, split: str, seed: int) -> dict[str, Any]:
    """Mean of the challenge's figures over the photographs of a split, with 95 % intervals."""
    rows = folds.photographs(store.load("ids", split=split).tolist())
    values = metrics.per_image(store.load("masks", split=split)[rows], store.load("predicted", split=split)[rows])

    def means(rows: np.ndarray) -> dict[str, float | None]:
        return {name: float(column[rows].mean()) for name, column in values.items()}

    everyone = np.arange(len(values["jaccard"]))
    return {"n": len(everyone), "figures": means(everyone), "intervals": metrics.intervals(means, 0 * everyone, seed)}


def draw(store: stages.Store, arguments: argparse.Namespace) -> None:
    """Draws validation: its worst, median and best masks, and how good they are by size and class of the lesion."""
    images, ids = store.load("images", split="val"), store.load("ids", split="val")
    truth, predicted = store.load("masks", split="val"), store.load("predicted", split="val")
    jaccard = metrics.per_image(truth, predicted)["jaccard"]
    order, count = np.argsort(jaccard), min(4, len(jaccard))
    middle = max(0, (len(order) - count) // 2)
    rows = {"worst": order[:count], "median": order[middle : middle + count], "best": order[::-1][:count]}
    tiles = [
        [
            plots.Tile(images[row], f"{name}: {ids[row]}, {jaccard[row]:.2f}", truth[row], predicted[row])
            for row in which
        ]
        for name, which in rows.items()
    ]
    title = "Lesion masks of validation: truth cyan, prediction yellow, Jaccard index"
    plots.sheet(arguments.graphics / OVERLAYS, tiles, title)
    groups = {"lesions": np.ones(len(ids), bool)}
    if store.has("labels", split="val"):
        labels = store.load("labels", split="val")
        groups = {name: labels == label for label, name in enumerate(isic.CLASSES) if (labels == label).any()}
    share = truth.mean(axis=(1, 2, 3))
    title = f"Lesion masks of validation, n = {len(ids)}"
    plots.jaccard(arguments.graphics / JACCARD, share, jaccard, groups, metrics.JACCARD_THRESHOLD, title)


def main(arguments: argparse.Namespace) -> None:
    """Trains, or takes the pretrained network; predicts every split, scores those that have masks."""
    hardware.check()
    keras.config.set_dtype_policy(arguments.precision)
    made_with = {"weights_sha256": backbones.digest(arguments.weights), "keras_backend": keras.backend.backend()}
    store = stages.Store(arguments.data, stages.SEGNET, vars(arguments) | made_with)
    splits = store.splits()
    own = None
    facts: dict[str, Any] = {}
    if arguments.pretrained:
        command.refuse(arguments, parser(), OF_TRAINING, "--pretrained trains nothing")
        pretrained.refuse_other_split(store, splits[0])
        model, shipped = pretrained.load_segnet(store.load("images", split=splits[0]).shape[1])
        models, threshold = [model], shipped["threshold"]
        store.settings["weights_sha256"] = shipped["sha256"]
        facts["design"] = shipped["design"]
    else:
        if not store.has("masks", split="train"):
            raise StageError(
                f"no masks of training images to learn from: run {stages.PREPROCESSING} on a source with them, or this "
                "script with --pretrained"
            )
        members = folds.members(arguments.folds, 1, arguments.seed)
        fold_of_row = folds.assign(store.load("ids", split="train").tolist(), arguments.folds, arguments.seed)
        own = folds.own(members, fold_of_row)
        with distribution.devices(arguments.distribute) as devices:
            models, facts = train_all(store, arguments, devices, members, fold_of_row)
        if not devices.leads:
            return
        for gone in store.keep_members("segnet_weights", [member.name for member in members]):
            for path in arguments.graphics.glob(f"{SEGNET}{gone}_[ch]*"):
                path.unlink()
        threshold, found = choose_threshold(store, arguments, models)
        facts |= found
    if arguments.threshold is not None:
        threshold = arguments.threshold
    after = {"threshold": threshold, "turns": arguments.turns, "clean": arguments.clean}
    if not arguments.pretrained:
        store.save_json("segnet_settings", facts | after)
    write_masks(store, arguments, models, threshold, own)
    scores = {}
    for split in splits:
        if split == "train" and len(models) == 1:
            continue  # it has seen them: no measure of anything
        if store.has("masks", split=split):
            scores[split] = score(store, split, arguments.seed)
        else:
            log.info("%s has no lesion masks: predicted, not scored", split)
    for name in (OVERLAYS, JACCARD):
        (arguments.graphics / name).unlink(missing_ok=True)
    if "val" in scores:
        draw(store, arguments)
    report = {"splits": scores, **after, **facts, "peak_memory_gib": command.peak_memory()}
    stages.write_json(arguments.graphics / "segmentation.json", report | store.provenance())
    for split, scored in scores.items():
        note = ", each by the network that had not seen it" if split == "train" else ""
        log.info("\nLesion masks of %s, n = %d%s", split, scored["n"], note)
        for line in command.table(scored["figures"], scored["intervals"]):
            log.info("%s", line)
    if not arguments.pretrained:
        checkpoints.remove(store, SEGNET)


if __name__ == "__main__":
    command.run(parser(), main)
