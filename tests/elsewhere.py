"""Runs in processes of its own: on another backend, on several devices, beside others.

python elsewhere.py scripts OUT FOLDER [SCRIPT FLAG ...] [-- SCRIPT FLAG ...]   scripts of the chain, one after another
python elsewhere.py batches OUT DEVICES EPOCHS                                  a small training, distributed and alone;
                                                                                waits in epoch PAUSE_IN_EPOCH
python elsewhere.py predict OUT FOLDER                                          what the weights in a chain give

Of every training, the weights and, of those of the scripts, the answers to `drawn` images go to OUT/*.npz.
"""

import itertools
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

from melanoma import backbones, classifier, distribution, segnet, training
from melanoma.checkpoints import Checkpoint

import keras
import numpy as np
import pipeline

PAUSE = "PAUSE_IN_EPOCH"  # environment variable
ROWS = {"train": 81, "val": 11}  # more batches of 8 than are prepared ahead; the last has one row, and three


def drawn(size: int = pipeline.SIZE, count: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def answers(model: keras.Model) -> np.ndarray:
    return np.asarray(model.predict_on_batch(drawn()))


def keep(path: Path, model: keras.Model, **more: Any) -> None:
    np.savez(path, *model.get_weights(), **more)


def scripts(out: Path, folder: Path, *words: str) -> None:
    fit, number = training.fit, itertools.count(1)

    def noted(model: keras.Model, *arguments: Any, **more: Any) -> training.Training:
        result = fit(model, *arguments, **more)
        keep(out / f"fit{next(number)}_process{more['devices'].process}.npz", model)
        return result

    training.fit = noted
    for line in " ".join(words).split(" -- "):
        script, *flags = line.split(" ")
        pipeline.run(script, folder, *flags)


def network(size: int) -> keras.Model:
    """With normalisation by the statistics of the batch."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((size, size, 3))
    x = keras.layers.Conv2D(4, 3, strides=2, use_bias=False)(keras.layers.Rescaling(1 / 255)(inputs))
    x = keras.layers.BatchNormalization(momentum=0.5)(x)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(x))
    if keras.backend.backend() == "jax":  # whose draws do not depend on the devices
        x = keras.layers.Dropout(0.5)(x)
    return keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(x))


def small_training(path: Path, devices: distribution.Devices, epochs: int) -> dict[str, list[float]]:
    inputs, truth = drawn(8, sum(ROWS.values())), np.eye(3, dtype=np.float32)[np.arange(sum(ROWS.values())) % 3]
    inputs = (inputs * (1 + np.argmax(truth, axis=1)[:, None, None, None]) // 3).astype(np.uint8)
    counts = 1 + np.arange(len(inputs), dtype=np.float32) / 10
    model, train = network(8), ROWS["train"]
    result = training.fit(
        model,
        training.Batches(inputs[:train], truth[:train], 8, seed=0, vary=True, loss_weights=counts[:train]),
        training.Batches(inputs[train:], truth[train:], 8),
        loss="categorical_crossentropy",
        metrics=[keras.metrics.AUC(multi_label=True, num_labels=3, name="auc")],
        monitor="auc",
        epochs=epochs,
        learning_rate=3.0,
        averaging=0.5,
        patience=epochs,
        checkpoint=Checkpoint(path.with_name("alone_state.npz" if devices is distribution.ONE else "state.npz"), {}),
        draw=lambda *_: None,
        devices=devices,
    )
    keep(path, model)
    return result.history


def pause(in_epoch: int) -> None:
    """Lets this process wait there."""
    begin = training.Keeper.on_epoch_begin

    def wait(keeper: training.Keeper, epoch: int, logs: dict[str, float] | None = None) -> None:
        begin(keeper, epoch, logs)
        if epoch == in_epoch:
            time.sleep(3600)

    mock.patch.object(training.Keeper, "on_epoch_begin", wait).start()


def batches(out: Path, count: str, epochs: str) -> None:
    training.SECONDS_BETWEEN_LOOKS = 0
    if PAUSE in os.environ:
        pause(int(os.environ[PAUSE]))
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        (processor,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * int(count))
    with distribution.devices(distribute=True) as devices:
        assert devices.replicas == int(count)
        found = {"distributed": small_training(out / f"process{devices.process}.npz", devices, int(epochs))}
    if devices.leads:
        found["alone"] = small_training(out / "alone.npz", distribution.ONE, int(epochs))
        (out / "history.json").write_text(json.dumps(found))


def predict(out: Path, folder: Path) -> None:
    store = pipeline.reader(folder)
    ensemble, _ = classifier.load(store, pipeline.BACKBONE)
    design = json.loads(store.check("segnet_settings").read_text())["design"]
    outline = segnet.build(segnet.Design(**design), pipeline.SIZE)
    backbones.load_weights(outline, store.check("segnet_weights", member=""))
    np.savez(out, lesion=answers(outline), classes=answers(ensemble.classifiers[0].model))


if __name__ == "__main__":
    # Adam divides by the gradient's size and so blows up rounding where that is next to nothing; this damps it.
    keras.optimizers.Adam = partial(keras.optimizers.Adam, epsilon=1.0)
    classifier.HEAD_DROPOUT = 0.0  # draws differ on other devices of TensorFlow
    what, place, *words = sys.argv[1:]
    if what == "scripts":
        scripts(Path(place), Path(words[0]), *words[1:])
    elif what == "batches":
        batches(Path(place), *words)
    else:
        predict(Path(place), Path(words[0]))
