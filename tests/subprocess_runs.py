"""Work that tests start in other processes: on another Keras backend, on several devices, to be interrupted.

python subprocess_runs.py RUNS

RUNS is JSON: a list of [function, argument, ...]; the functions of this module are called one after another in the same
process. The environment variable PAUSE_BEFORE="NAME EPOCH" makes the process print "paused" and sleep before an epoch,
counted from 0, of the training whose checkpoint is NAME.npz.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from melanoma.cli import run as cli
from melanoma.dataset import augment
from melanoma.inference.ensemble import load
from melanoma.models import backbones, classifier, segmentation
from melanoma.training import callbacks, checkpoints, distributed, loop
from melanoma.training.batches import Batches, BatchOptions

import keras
import numpy as np
import pipeline
import toy_training

PAUSE_BEFORE, PAUSED = "PAUSE_BEFORE", "paused"
ROWS = {"train": 81, "val": 11}  # with batches of 8, the last ones have one row and three
EPOCHS = 4


def start(runs: list[Any], **environment: str) -> subprocess.Popen:
    """Starts a process for the runs; paths among their arguments become text."""
    path = os.pathsep.join(map(str, (pipeline.ROOT, Path(__file__).parent)))
    return subprocess.Popen(
        [sys.executable, __file__, json.dumps(runs, default=str)],
        cwd=pipeline.ROOT,
        env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def make_images(count: int, size: int = pipeline.SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


# ------------------------------------------------------------------------------------------------- scripts of the chain


def scripts(folder: str, *steps: list[str]) -> None:
    """Runs scripts, given with their flags, in a chain; saves the weights of training n to fit{n}_process{m}.npz."""
    original, numbers = loop.fit, itertools.count(1)

    def fit(model: keras.Model, *arguments: Any) -> loop.TrainingResult:
        result = original(model, *arguments)
        process = arguments[-1].devices.process
        np.savez(Path(folder) / f"fit{next(numbers)}_process{process}.npz", *model.get_weights())
        return result

    with mock.patch.object(loop, "fit", fit):
        for script, *flags in steps:
            pipeline.run(script, Path(folder), *flags)


def command(script: str, *flags: str) -> None:
    """Runs a script as from a shell."""
    sys.argv = [script, *flags]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with Ctrl-C ignored
    cli.run(pipeline.parser(script), pipeline.module(script).main)


def copy(folder: str, to: str) -> None:
    pipeline.copy(Path(folder), Path(to))


def predict(folder: str, out: str) -> None:
    """Saves what the networks of a chain predict for random images."""
    store, images = pipeline.reader(Path(folder)), make_images(4)
    (ensemble,) = load(store, pipeline.BACKBONE)[0].parts
    design = json.loads(store.check("segnet_settings").read_text(encoding="utf-8"))["design"]
    segmenter = segmentation.build(segmentation.Design(**design), pipeline.SIZE)
    backbones.load_weights(segmenter, store.check("segnet_weights", member=""))
    models = {"lesion": segmenter, "classes": ensemble.classifiers[0].model}
    outputs: dict[str, Any] = {name: model.predict_on_batch(images) for name, model in models.items()}
    np.savez(out, **outputs)


# ------------------------------------------------------------------------------------------------- a small training


def network(size: int) -> keras.Model:
    """A convolution and batch normalisation, which depends on all rows of a step."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((size, size, 3))
    x = keras.layers.Conv2D(4, 3, strides=2, use_bias=False)(keras.layers.Rescaling(1 / 255)(inputs))
    x = keras.layers.BatchNormalization(momentum=0.5)(x)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(x))
    if keras.backend.backend() == "jax":  # its random numbers do not depend on the devices
        x = keras.layers.Dropout(0.5)(x)
    return keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(x))


def fit_network(name: Path, devices: distributed.Devices) -> dict[str, list[float]]:
    """Trains on `devices`, saves the weights to {name}.npz, and returns the history."""
    count, train = sum(ROWS.values()), ROWS["train"]
    labels = np.arange(count) % 3
    targets = np.eye(3, dtype=np.float32)[labels]
    inputs = (make_images(count, 8) * (1 + labels[:, None, None, None]) // 3).astype(np.uint8)
    weights = 1 + np.arange(train, dtype=np.float32) / 10
    model = network(8)
    state = checkpoints.Checkpoint(name.with_name("one_device" if devices is distributed.ONE else "state.npz"), {})
    result = loop.fit(
        model,
        Batches(
            inputs[:train],
            targets[:train],
            8,
            BatchOptions(seed=0, augmentation=augment.STANDARD, loss_weights=weights),
        ),
        Batches(inputs[train:], targets[train:], 8),
        loop.Objective(
            "categorical_crossentropy", [keras.metrics.AUC(multi_label=True, num_labels=3, name="auc")], "auc"
        ),
        loop.Hyperparameters(EPOCHS, learning_rate=3.0, ema=0.5, patience=EPOCHS, first_rate=0.5),
        callbacks.TrainingRun(state, lambda *_: None, devices=devices),
    )
    np.savez(name.with_suffix(".npz"), *model.get_weights())
    return result.history


def training(out: str, count: int) -> None:
    """Trains the network on `count` devices, process 0 then also on one, and saves weights and histories."""
    callbacks.SECONDS_BETWEEN_SAVES = 0
    signal.signal(signal.SIGTERM, cli.interrupt)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        (processor,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * count)
    folder = Path(out)
    with distributed.devices(distribute=True) as devices:
        assert devices.replicas == count
        history = {"distributed": fit_network(folder / f"process{devices.process}", devices)}
    if devices.leads:
        history["one_device"] = fit_network(folder / "one_device", distributed.ONE)
        (folder / "history.json").write_text(json.dumps(history), encoding="utf-8")


def layer_steps(folder: str, first_rate: float) -> None:
    """Saves `toy_training.layer_steps`."""
    path = Path(folder) / "layer_steps.json"
    path.write_text(json.dumps(toy_training.layer_steps(Path(folder), first_rate)), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ processes


def pause(training: str, epoch: int) -> None:
    """Makes this process sleep at the start of an epoch, after the state before it was saved."""
    original = callbacks.CheckpointCallback.on_epoch_begin

    def on_epoch_begin(
        callback: callbacks.CheckpointCallback, number: int, logs: dict[str, float] | None = None
    ) -> None:
        original(callback, number, logs)
        if (callback.run.checkpoint.path.stem, number) == (training, epoch):
            print(PAUSED, flush=True)
            time.sleep(3600)

    callbacks.SECONDS_BETWEEN_SAVES = 0
    mock.patch.object(callbacks.CheckpointCallback, "on_epoch_begin", on_epoch_begin).start()


def main(runs: list[Any]) -> None:
    if place := os.environ.get(PAUSE_BEFORE):
        pause(place.split(" ")[0], int(place.split(" ")[1]))
    for name, *arguments in runs:
        globals()[name](*arguments)


def make_backends_comparable() -> None:
    """Removes what differs between backends and numbers of devices for reasons of rounding and random numbers."""
    # Adam divides by the size of the gradient, which amplifies rounding errors of small gradients.
    loop.LayerwiseAdam = partial(loop.LayerwiseAdam, epsilon=1.0)  # type: ignore[assignment, misc]
    classifier.HEAD_DROPOUT = 0.0


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
