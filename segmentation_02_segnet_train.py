"""Step 2 of 5: teach SegNet to outline the lesion, then write its masks.

Reads   data/arrays/{train,val,test}_{ids,images,masks}.npy   from step 1
Writes  data/weights/segnet.weights.h5                        weights of the best epoch
        data/weights/segnet.json                              mean, std, sizes, training history
        data/arrays/{train,val,test}_predicted.npy            uint8 (N, S, S, 1), {0, 1}
        graphics/segnet_curves.png, segnet_overlays.png       training curves; worst, median and best masks
        graphics/segmentation.json                            the challenge's figures of the splits that have masks

Run     python segmentation_02_segnet_train.py
Try     python segmentation_02_segnet_train.py --epochs 1 --limit 30
Expect  README, "Results"
"""

import argparse
from typing import Any

from melanoma import command, metrics, plots, segnet, stages, training
from melanoma.command import log
from melanoma.errors import InputError, StageError

import keras
import numpy as np

NETWORK_SIZE = 200  # pixels, as in 2018
EPOCHS = 40
BATCH_SIZE = 16
LEARNING_RATE = 2e-3
PATIENCE = 10  # epochs without a better validation Jaccard
THRESHOLD = 0.5  # probability from which a pixel is lesion
OVERLAYS = "segnet_overlays.png"


def parser() -> argparse.ArgumentParser:
    """The script's command line."""
    flags = command.parser(__doc__)
    command.training_flags(flags, epochs=EPOCHS, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE)
    flags.add_argument(
        "--network-size",
        type=command.positive_int,
        default=NETWORK_SIZE,
        help=f"side in pixels that the network works at, a multiple of {segnet.STRIDE}; masks keep the arrays' side",
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


def train(store: stages.Store, arguments: argparse.Namespace) -> keras.Model:
    """Trains SegNet on train, chooses its best epoch on validation, and saves weights, settings and curves."""
    if not store.has("masks", split="train"):
        raise StageError(f"no masks of training images to learn from: run {stages.PREPROCESSING} on a source with them")
    images, masks = store.load("images", split="train"), store.load("masks", split="train")
    mean, std = colour_statistics(store)
    try:
        model = segnet.build(images.shape[1], arguments.network_size, mean, std)
    except ValueError as error:
        raise InputError(f"--network-size: {error}") from None
    log.info("SegNet, %d weights, %d rows of training", model.count_params(), len(images))
    validation = None
    if store.has("masks", split="val"):
        val_images, val_masks = store.load("images", split="val"), store.load("masks", split="val")
        validation = training.Batches(val_images, val_masks, arguments.batch_size)
    else:
        log.info("no validation masks: the best epoch is chosen by the training Jaccard")
    batches = training.Batches(images, masks, arguments.batch_size, seed=arguments.seed, vary=True, target_is_mask=True)
    result = training.fit(
        model,
        batches,
        validation,
        loss=segnet.dice_cross_entropy,
        metrics=[segnet.jaccard],
        monitor="jaccard",
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        patience=PATIENCE,
        save=lambda: store.save_weights("segnet_weights", model),
    )
    settings = {"size": images.shape[1], "network_size": arguments.network_size, "mean": mean, "std": std}
    found = {"threshold": THRESHOLD, "best_epoch": result.best_epoch, "history": result.history}
    store.save_json("segnet_settings", settings | found)
    plots.training_curves(
        arguments.graphics / "segnet_curves.png",
        result.history,
        result.best_epoch,
        {"loss": "Dice + cross-entropy loss", "jaccard": "mean Jaccard"},
        "SegNet",
    )
    return model


def predict(store: stages.Store, model: keras.Model, split: str, batch_size: int) -> None:
    """Writes the predicted masks of one split."""
    images = store.load("images", split=split)
    with store.writer("predicted", len(images), (*images.shape[1:3], 1), split=split) as file:
        for probability in training.predict(model, images, batch_size, f"masks of {split}"):
            file.append((probability > THRESHOLD).astype(np.uint8))


def score(store: stages.Store, split: str, seed: int) -> dict[str, Any]:
    """Mean of the challenge's figures over the images of a split, with 95 % intervals."""
    values = metrics.per_image(store.load("masks", split=split), store.load("predicted", split=split))

    def means(rows: np.ndarray) -> dict[str, float | None]:
        return {name: float(column[rows].mean()) for name, column in values.items()}

    everyone = np.arange(len(values["jaccard"]))
    return {"n": len(everyone), "figures": means(everyone), "intervals": metrics.intervals(means, 0 * everyone, seed)}


def draw_overlays(store: stages.Store, arguments: argparse.Namespace) -> None:
    """Draws the worst, median and best validation masks over their photographs."""
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
    plots.sheet(
        arguments.graphics / OVERLAYS, tiles, "SegNet on validation: truth cyan, prediction yellow, Jaccard index"
    )


def main(arguments: argparse.Namespace) -> None:
    """Trains, predicts every split, scores those that have masks."""
    keras.utils.set_random_seed(arguments.seed)
    store = stages.Store(arguments.data, stages.SEGNET, vars(arguments))
    splits = store.splits()
    model = train(store, arguments)
    scores = {}
    for split in splits:
        predict(store, model, split, arguments.batch_size)
        if split != "train" and store.has("masks", split=split):
            scores[split] = score(store, split, arguments.seed)
        elif split != "train":
            log.info("%s has no lesion masks: predicted, not scored", split)
    (arguments.graphics / OVERLAYS).unlink(missing_ok=True)
    if "val" in scores:
        draw_overlays(store, arguments)
    stages.write_json(arguments.graphics / "segmentation.json", {"splits": scores, **store.provenance()})
    for split, scored in scores.items():
        log.info("\nLesion masks of %s, n = %d", split, scored["n"])
        for line in command.table(scored["figures"], scored["intervals"]):
            log.info("%s", line)


if __name__ == "__main__":
    command.run(parser(), main)
