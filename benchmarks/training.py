"""Speed and memory of training and prediction: our loops, their bare training step, and DenseNet121 in PyTorch.

Every method runs in a process of its own, on random pixels with random weights; the methods are measured
alternately.

step       the training step only, on one batch that is already in memory
loop       `melanoma.training.loop.fit` as the scripts call it: arrays on disk, every image augmented
predict    `melanoma.inference.predict` with Keras or OpenVINO, or PyTorch only
           PyTorch runs as installed, and with the C library keeping freed memory, as it always does in our scripts
head       densenet_train.py --train head, from its start to the fitted head; with --data

Prints     images per second, the fraction of the loop's time that is not spent in the training step, and peak memory

Run        pip install -r requirements/torch.txt
           python -m benchmarks.training
"""

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.classes import CLASSES
from melanoma.cli import flags, hardware
from melanoma.dataset import augment
from melanoma.inference import openvino
from melanoma.inference.predict import predict
from melanoma.models import backbones, classifier, losses, segmentation
from melanoma.training import checkpoints, loop
from melanoma.training.batches import Batches, BatchOptions
from melanoma.training.callbacks import TrainingRun

import keras
import numpy as np

SIZE = 256  # pixels: side of the images
SEGNET_INPUT = 192  # pixels
BATCH_SIZE = 16
WARM_UP = 2  # steps, or batches to predict, that compile and are not measured
EPOCHS = 3  # of the loop, after one that compiles
KERAS, TORCH, TORCH_KEEPING = "Keras", "PyTorch", "PyTorch keeping memory"
OPENVINO = "OpenVINO"
SEGNET, DENSENET = "segnet", "densenet121"
FLOAT32, BFLOAT16 = "float32", "bfloat16"
POLICIES = {FLOAT32: "float32", BFLOAT16: "mixed_bfloat16"}  # of Keras
TORCH_VARIANTS = [(library, precision) for library in (TORCH, TORCH_KEEPING) for precision in (FLOAT32, BFLOAT16)]
TRAINED = [(KERAS, network, precision) for network in (SEGNET, DENSENET) for precision in (FLOAT32, BFLOAT16)]
TRAINED += [(library, DENSENET, precision) for library, precision in TORCH_VARIANTS]
PREDICTED = [(KERAS, FLOAT32), (OPENVINO, FLOAT32), (OPENVINO, BFLOAT16), *TORCH_VARIANTS]
HEAD = (
    *("--train", "head", "--weights", "none", "--batch-size", "256"),
    *("--precision", POLICIES[BFLOAT16], "--views", "1"),
)

Method = tuple[str, ...]  # what is measured, library, and network and precision or a data folder


@dataclass(frozen=True)
class Measurement:
    """How much is measured, by the names of the flags."""

    steps: int  # training steps per epoch
    images: int  # to predict
    keep_normalisation: bool  # whether DenseNet121's batch normalisation stays frozen


def random_images(count: int) -> np.ndarray:
    """Random pixels, uint8 (N, SIZE, SIZE, 3)."""
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def rate(work: Callable[[], Any], images: int) -> float:
    """Images per second of some work."""
    start = time.perf_counter()
    work()
    return images / (time.perf_counter() - start)


# ------------------------------------------------------------------------- the methods, each in a process of its own


class TimedBatches(Batches):
    """Records when its epochs end."""

    def on_epoch_end(self) -> None:
        """Also called once when the batches are set up."""
        super().on_epoch_end()
        self.ends = [*getattr(self, "ends", ()), time.perf_counter()]


def segmentation_task(count: int) -> tuple[keras.Model, np.ndarray, loop.Objective]:
    """SegNet, masks, and what it is trained for."""
    design = segmentation.Design(SEGNET, SEGNET_INPUT, mean=[128.0] * 3, std=[60.0] * 3)
    masks = np.zeros((count, SIZE, SIZE, 1), np.uint8)
    masks[:, 64:192, 64:192] = 1
    objective = loop.Objective(losses.dice_cross_entropy, [losses.jaccard], "jaccard")
    return segmentation.build(design, SIZE), masks, objective


def classification_task(count: int, keep_normalisation: bool) -> tuple[keras.Model, np.ndarray, loop.Objective]:
    """DenseNet121 with our head, one-hot labels, and what it is trained for."""
    network = classifier.build(DENSENET, SIZE, backbones.NONE)
    for layer in network.backbone.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = not keep_normalisation
    labels = np.eye(len(CLASSES), dtype=np.float32)[np.arange(count) % len(CLASSES)]
    auc = keras.metrics.AUC(multi_label=True, num_labels=len(CLASSES), name="auc")
    return network.model, labels, loop.Objective("categorical_crossentropy", [auc], "auc")


def train_keras(network: str, precision: str, measurement: Measurement) -> dict[str, float]:
    """Images per second of the training step, measured before and after the loop, and of the loop."""
    keras.config.set_dtype_policy(POLICIES[precision])
    is_segnet, count = network == SEGNET, BATCH_SIZE * measurement.steps
    model, targets, objective = (
        segmentation_task(count) if is_segnet else classification_task(count, measurement.keep_normalisation)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        np.save(path, random_images(count))
        inputs: np.ndarray = np.load(path, mmap_mode="r")
        trainer = keras.Model(model.inputs, model.outputs)
        trainer.compile("adam", loss=objective.loss, metrics=objective.metrics)
        batch = keras.ops.convert_to_tensor(inputs[:BATCH_SIZE]), keras.ops.convert_to_tensor(targets[:BATCH_SIZE])

        def step(times: int) -> None:
            for _ in range(times):
                trainer.train_on_batch(*batch)

        step(WARM_UP)
        before = rate(lambda: step(measurement.steps), count)
        batches = TimedBatches(
            inputs, targets, BATCH_SIZE, BatchOptions(seed=0, augmentation=augment.STANDARD, target_is_mask=is_segnet)
        )
        loop.fit(
            model,
            batches,
            None,
            objective,
            loop.Hyperparameters(1 + EPOCHS, learning_rate=1e-4, ema=0.0, patience=1 + EPOCHS),
            TrainingRun(checkpoints.Checkpoint(Path(folder) / "state.npz", {}), lambda *_: None),
        )
        after = rate(lambda: step(measurement.steps), count)
    seconds = batches.ends[-1] - batches.ends[-1 - EPOCHS]
    return {"step": statistics.mean([before, after]), "loop": EPOCHS * count / seconds}


def torch_network(keep_normalisation: bool) -> Any:
    """MONAI's DenseNet121 in the memory layout that is fastest on a CPU."""
    import torch
    from monai.networks.nets import DenseNet121

    network = DenseNet121(spatial_dims=2, in_channels=3, out_channels=len(CLASSES))
    network = network.to(memory_format=torch.channels_last).train()
    for layer in network.modules() if keep_normalisation else ():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eval().requires_grad_(False)
    return network


def torch_batch() -> Any:
    """A batch of random images, float32 in [0, 1]."""
    import torch

    pixels = torch.from_numpy(random_images(BATCH_SIZE)).permute(0, 3, 1, 2).float() / 255
    return pixels.contiguous(memory_format=torch.channels_last)


def train_torch(precision: str, measurement: Measurement) -> dict[str, float]:
    """Images per second of the training step."""
    import torch

    network, images = torch_network(measurement.keep_normalisation), torch_batch()
    labels = torch.arange(BATCH_SIZE) % len(CLASSES)
    optimizer = torch.optim.Adam([weight for weight in network.parameters() if weight.requires_grad])

    def step(times: int) -> None:
        for _ in range(times):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == BFLOAT16):
                loss = torch.nn.functional.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()

    step(WARM_UP)
    return {"step": rate(lambda: step(measurement.steps), BATCH_SIZE * measurement.steps)}


def predict_ours(library: str, precision: str, count: int) -> dict[str, float]:
    """Images per second of `melanoma.inference.predict`, without the conversion for OpenVINO."""
    keras.config.set_dtype_policy(POLICIES[precision])
    network = classifier.build(DENSENET, SIZE, backbones.NONE).model
    images = random_images(count)
    openvino.MIN_VIEWS = sys.maxsize if library == KERAS else 0
    list(predict([network], images[:BATCH_SIZE], BATCH_SIZE, "warm-up"))
    predictions = predict([network], images, BATCH_SIZE, "measured")
    if library == OPENVINO and not predictions.inference.name.startswith(openvino.OPENVINO):
        print(f"not measured: {predictions.inference.reason}", file=sys.stderr)
        return {}
    return {"predict": rate(lambda: list(predictions), count)}


def predict_torch(precision: str, count: int) -> dict[str, float]:
    """Images per second of PyTorch."""
    import torch

    network, images = torch_network(keep_normalisation=False).eval(), torch_batch()

    def run(times: int) -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == BFLOAT16):
            for _ in range(times):
                network(images)

    run(WARM_UP)
    return {"predict": rate(lambda: run(count // BATCH_SIZE), count)}


def fit_head(data: Path) -> dict[str, float]:
    """Seconds from the start of densenet_train.py to a fitted head, and the number of images it saw."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "arrays").mkdir()
        shutil.copy(data / "manifest.json", folder)
        for array in (data / "arrays").glob("*.npy"):
            if "features" not in array.name:
                (folder / "arrays" / array.name).symlink_to(array.resolve())
        store = Store(folder, contract.CLASSIFIER, {})
        images = sum(store.rows(split) for split in ("train", "val"))
        weights = store.path("head_weights", backbone=DENSENET, member="")
        words = [sys.executable, contract.CLASSIFIER, "--data", str(folder), "--graphics", str(folder), *HEAD]
        start = time.perf_counter()
        with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and not weights.exists():
                time.sleep(0.05)
            seconds = time.perf_counter() - start
            process.terminate()
    if process.returncode not in (0, 128 + signal.SIGTERM):
        sys.exit(f"{contract.CLASSIFIER} failed")
    return {"seconds": seconds, "images": images}


def run_method(method: Method, measurement: Measurement) -> None:
    """Runs a method in this process and prints its results as JSON."""
    kind, library, *rest = method
    if library == TORCH_KEEPING:
        hardware.keep_memory()  # as our loops do
    if kind == "head":
        found = fit_head(Path(rest[0]))
    elif kind == "train":
        network, precision = rest
        is_keras = library == KERAS
        found = train_keras(network, precision, measurement) if is_keras else train_torch(precision, measurement)
    else:
        (precision,) = rest
        is_torch = library in (TORCH, TORCH_KEEPING)
        count = measurement.images
        found = predict_torch(precision, count) if is_torch else predict_ours(library, precision, count)
    print(json.dumps(found | {"peak": hardware.peak_memory()}))


# -------------------------------------------------------------------------------------------------------- comparison


def measure(method: Method, measurement: Measurement) -> dict[str, float]:
    """Results of a method in a new process."""
    words = [sys.executable, "-m", "benchmarks.training", "--method", *method]
    words += ["--steps", str(measurement.steps), "--images", str(measurement.images)]
    words += ["--keep-normalisation"] * measurement.keep_normalisation
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(method)}: failed\n{done.stdout}")
    return json.loads(done.stdout.splitlines()[-1])


def list_methods(data: Path | None, only: str | None) -> list[Method]:
    """All methods, or those whose name contains `only`; `data`: where the head is fitted, if at all."""
    methods: list[Method] = [("train", *method) for method in TRAINED]
    methods += [("predict", *method) for method in PREDICTED]
    methods += [("head", KERAS, str(data))] if data else []
    return [method for method in methods if not only or only in " ".join(method)]


def compare(methods: list[Method], measurement: Measurement, rounds: int) -> None:
    """Measures all methods alternately and prints medians."""
    found: dict[Method, list[dict[str, float]]] = {method: [] for method in methods}
    for number in range(1, rounds + 1):
        for method in methods:
            found[method].append(measure(method, measurement))
            values = ", ".join(f"{name} {value:.2f}" for name, value in found[method][-1].items())
            print(f"round {number}, {' '.join(method)}: {values}", file=sys.stderr)
    medians = {
        method: {name: statistics.median(one[name] for one in results) for name in results[0]}
        for method, results in found.items()
    }
    waiting = {
        method: 1 - statistics.median(one["loop"] / one["step"] for one in results)
        for method, results in found.items()
        if "loop" in results[0]
    }
    print(f"\nImages per second at {SIZE} pixels, batches of {BATCH_SIZE}; medians of {rounds} rounds\n")
    print_rates(medians, waiting)
    print_head(medians)


def print_rates(medians: dict[Method, dict[str, float]], waiting: dict[Method, float]) -> None:
    """Prints a line per method: images per second, the fraction of the loop outside the step, peak memory in GiB."""
    print(f"{'':44}{'step':>8}{'loop':>8}{'waits':>8}{'predict':>9}{'peak GiB':>10}")
    for method, median in medians.items():
        step, in_loop = (f"{median[name]:.2f}" if name in median else "" for name in ("step", "loop"))
        waits = f"{waiting[method]:.3f}" if method in waiting else ""
        predicted = f"{median['predict']:.1f}" if "predict" in median else ""
        print(f"{', '.join(method):44}{step:>8}{in_loop:>8}{waits:>8}{predicted:>9}{median['peak']:>10.2f}")


def print_head(medians: dict[Method, dict[str, float]]) -> None:
    """Prints the time to a fitted head, and how long PyTorch would need for the features only, where measured."""
    for median in (median for method, median in medians.items() if method[0] == "head"):
        seconds, images = median["seconds"], median["images"]
        print(f"\n{contract.CLASSIFIER} {' '.join(HEAD)}: {seconds:.1f} s to the head, {images:.0f} images")
        for library in (TORCH, TORCH_KEEPING):
            if measured := medians.get(("predict", library, FLOAT32)):
                print(f"{library} in float32, features only: {images / measured['predict']:.1f} s")


def main() -> None:
    """A child process, started with --method, runs one method; the parent compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--steps", type=flags.positive_int, default=8, help="training steps per epoch")
    parser.add_argument("--images", type=flags.positive_int, default=256, help="images to predict")
    parser.add_argument("--rounds", type=flags.positive_int, default=3, help="measurements per method")
    parser.add_argument("--data", type=Path, help="data folder after the first three scripts; fits a head there too")
    parser.add_argument("--only", help="methods whose name contains this, for example 'train Keras segnet'")
    parser.add_argument(
        "--keep-normalisation",
        action="store_true",
        help="freeze DenseNet121's batch normalisation, as densenet_train.py does for pretrained backbones",
    )
    parser.add_argument("--method", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    measurement = flags.to_dataclass(Measurement, vars(arguments))
    if arguments.method:
        run_method(tuple(arguments.method), measurement)
    else:
        compare(list_methods(arguments.data, arguments.only), measurement, arguments.rounds)


if __name__ == "__main__":
    main()
