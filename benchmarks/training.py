"""Speed and memory of training and prediction: our loops, their bare training step, and DenseNet121 in PyTorch.

Every method runs in a process of its own, on random pixels with random weights; the methods are measured
alternately.

loop       `melanoma.training.loop.fit` as the scripts call it: arrays on disk, every image augmented
step       the same on one batch that is already in memory, every other epoch; PyTorch: the training step only
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
from dataclasses import dataclass
from pathlib import Path

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.classes import CLASSES
from melanoma.cli import flags, hardware
from melanoma.dataset import augment
from melanoma.errors import InputError
from melanoma.inference import openvino
from melanoma.inference.predict import predict
from melanoma.models import backbones, classifier, losses, segmentation
from melanoma.training import checkpoints, distributed, loop
from melanoma.training.batches import Batches, BatchOptions
from melanoma.training.callbacks import TrainingRun

import keras
import numpy as np

SEGMENTATION_INPUT = 192  # pixels: side of the input of SegNet and U-Net, at most
DISTINCT = 512  # images on disk at most, or one batch; longer epochs repeat them
EPOCHS = 2  # of the loop, and as many of the step, after one that compiles
KERAS, TORCH, TORCH_KEEPING, TORCH_COMPILED = "Keras", "PyTorch", "PyTorch keeping memory", "PyTorch compiled"
OPENVINO = "OpenVINO"
SEGNET, UNET, DENSENET = "segnet", "unet", "densenet121"
FLOAT32, BFLOAT16 = "float32", "bfloat16"
POLICIES = {FLOAT32: "float32", BFLOAT16: "mixed_bfloat16"}  # of Keras
TORCH_VARIANTS = [(library, DENSENET, precision) for library in (TORCH, TORCH_KEEPING) for precision in POLICIES]
TRAINED = [(KERAS, network, precision) for network in (SEGNET, DENSENET) for precision in POLICIES]
PREDICTED = [(KERAS, DENSENET, FLOAT32), (OPENVINO, DENSENET, FLOAT32), (OPENVINO, DENSENET, BFLOAT16)]
TRAIN, PREDICT, BOTH, HEAD = "train", "predict", "both", "head"
HEAD_FLAGS = (
    *("--train", "head", "--weights", "none", "--batch-size", "256"),
    *("--precision", POLICIES[BFLOAT16], "--views", "1"),
)

Method = tuple[str, ...]  # what is measured, library, and network and precision or a data folder


@dataclass(frozen=True)
class Measurement:
    """How much is measured, by the names of the flags."""

    steps: int  # training steps per epoch
    images: int  # to predict
    size: int  # pixels: side of the images
    batch_size: int  # images per step, on each device
    distribute: bool  # whether to train on all devices
    keep_normalisation: bool  # whether DenseNet121's batch normalisation stays frozen


def random_images(count: int, size: int) -> np.ndarray:
    """Random pixels, uint8 (N, size, size, 3)."""
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


# ------------------------------------------------------------------------- the methods, each in a process of its own


class AlternatingBatches(Batches):
    """Every other epoch, from the second on, repeats one batch that is ready in memory."""

    def part(self, places: np.ndarray) -> tuple[np.ndarray, ...]:
        """Rows of the epoch, or as many of the ready batch."""
        if self.epoch % 2 == 0:
            return super().part(places)
        if not hasattr(self, "ready"):
            self.ready = np.array(self.inputs[: self.batch_size]), np.array(self.targets[: self.batch_size])
        return self.ready[0][: len(places)], self.ready[1][: len(places)]


class StepTimer(keras.callbacks.Callback):
    """Records when the first and the last step of each epoch have been computed."""

    def __init__(self, steps: int) -> None:
        """Sets the number of steps per epoch."""
        super().__init__()
        self.steps, self.times = steps, list[float]()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Reads the loss, which waits for the device."""
        if batch in (0, self.steps - 1):
            float((logs or {})["loss"])
            self.times.append(time.perf_counter())

    def seconds(self, epoch: int) -> float:
        """Seconds of all steps of an epoch, counted from 0, but the first."""
        return self.times[2 * epoch + 1] - self.times[2 * epoch]


def segmentation_task(network: str, count: int, size: int) -> tuple[keras.Model, np.ndarray, loop.Objective]:
    """A segmentation network, masks, and what it is trained for."""
    side = min(size, SEGMENTATION_INPUT)
    if network == SEGNET:
        design = segmentation.Design(SEGNET, side, mean=[128.0] * 3, std=[60.0] * 3)
    else:
        design = segmentation.Design(UNET, side, backbone="mobilenetv2")
    masks = np.zeros((count, size, size, 1), np.uint8)
    masks[:, size // 4 : -size // 4, size // 4 : -size // 4] = 1
    objective = loop.Objective(losses.dice_cross_entropy, [losses.jaccard], "jaccard")
    return segmentation.build(design, size), masks, objective


def classification_task(
    count: int, size: int, keep_normalisation: bool
) -> tuple[keras.Model, np.ndarray, loop.Objective]:
    """DenseNet121 with our head, one-hot labels, and what it is trained for."""
    network = classifier.build(DENSENET, size, backbones.NONE)
    for layer in network.backbone.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = not keep_normalisation
    labels = np.eye(len(CLASSES), dtype=np.float32)[np.arange(count) % len(CLASSES)]
    auc = keras.metrics.AUC(multi_label=True, num_labels=len(CLASSES), name="auc")
    return network.model, labels, loop.Objective("categorical_crossentropy", [auc], "auc")


def task(network: str, count: int, measurement: Measurement) -> tuple[keras.Model, np.ndarray, loop.Objective]:
    """A network, targets of `count` images, and what it is trained for."""
    if network == DENSENET:
        return classification_task(count, measurement.size, measurement.keep_normalisation)
    return segmentation_task(network, count, measurement.size)


def train_keras(network: str, precision: str, measurement: Measurement) -> dict[str, float]:
    """Images per second of the loop and of its steps, seconds until the first epoch ends, number of devices."""
    start = time.perf_counter()
    keras.config.set_dtype_policy(POLICIES[precision])
    with distributed.devices(measurement.distribute) as devices, tempfile.TemporaryDirectory() as folder:
        batch_size = measurement.batch_size * devices.replicas
        count = batch_size * measurement.steps
        distinct, path = min(count, max(DISTINCT, batch_size)), Path(folder) / "images.npy"
        model, targets, objective = task(network, distinct, measurement)
        np.save(path, random_images(distinct, measurement.size))
        options = BatchOptions(
            np.arange(count) % distinct, seed=0, augmentation=augment.STANDARD, target_is_mask=network != DENSENET
        )
        timer, epochs = StepTimer(measurement.steps), 1 + 2 * EPOCHS
        state = checkpoints.Checkpoint(Path(folder) / "state.npz", {})
        result = loop.fit(
            model,
            AlternatingBatches(np.load(path, mmap_mode="r"), targets, batch_size, options),
            None,
            objective,
            loop.Hyperparameters(epochs, learning_rate=1e-4, ema=0.0, patience=epochs),
            TrainingRun(state, lambda *_: None, devices, callbacks=[timer]),
        )
    return {
        "step": EPOCHS * (count - batch_size) / sum(timer.seconds(epoch) for epoch in range(1, epochs, 2)),
        "loop": EPOCHS * count / sum(result.seconds[2::2]),
        "start": timer.times[1] - start,
        "devices": devices.replicas,
    }


def predict_ours(library: str, network: str, precision: str, measurement: Measurement) -> dict[str, float]:
    """Images per second of `melanoma.inference.predict`, without the conversion for OpenVINO."""
    keras.config.set_dtype_policy(POLICIES[precision])
    model, *_ = task(network, 1, measurement)
    images, batch_size = random_images(measurement.images, measurement.size), measurement.batch_size
    openvino.MIN_VIEWS = sys.maxsize if library == KERAS else 0
    list(predict([model], images[:batch_size], batch_size, "warm-up"))
    predictions = predict([model], images, batch_size, "measured")
    if library == OPENVINO and not predictions.inference.name.startswith(openvino.OPENVINO):
        print(f"not measured: {predictions.inference.reason}", file=sys.stderr)
        return {}
    start = time.perf_counter()
    list(predictions)
    return {"predict": len(images) / (time.perf_counter() - start)}


def run_torch(kind: str, library: str, precision: str, measurement: Measurement) -> dict[str, float]:
    """Images per second of PyTorch's training step, or of its prediction."""
    from benchmarks import monai_densenet

    is_training, batch_size = kind == TRAIN, measurement.batch_size
    network = monai_densenet.build(
        len(CLASSES), library == TORCH_COMPILED, is_training and measurement.keep_normalisation
    )
    work = monai_densenet.train if is_training else monai_densenet.predict
    steps = measurement.steps if is_training else max(1, measurement.images // batch_size)
    images = random_images(batch_size, measurement.size)
    return {"step" if is_training else "predict": work(network, images, precision == BFLOAT16, steps)}


def gpu_peak(library: str) -> dict[str, float]:
    """Peak memory in GiB that this process used on the first GPU, where the library reports it."""
    peak: float | None = None
    if library.startswith(TORCH):
        from benchmarks import monai_densenet

        peak = monai_densenet.gpu_peak()
    elif not hardware.without_gpu() and keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        peak = tf.config.experimental.get_memory_info("GPU:0")["peak"] / 2**30
    elif not hardware.without_gpu():
        import jax

        peak = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / 2**30
    return {} if peak is None else {"gpu_peak": peak}


def check_gpu(library: str) -> None:
    """Refuses to measure where the library would compute on the CPU, or has no code for the GPU.

    Raises:
        InputError: it does not see a GPU, or see `hardware.check`.
    """
    name = "torch" if library.startswith(TORCH) else keras.backend.backend()
    if name != "torch":
        hardware.check()
    if not hardware.accelerators(name):
        raise InputError(f"{name} does not see the GPU")


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
        words = [sys.executable, contract.CLASSIFIER, "--data", str(folder), "--graphics", str(folder), *HEAD_FLAGS]
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
    """Runs a method in this process and prints its results as JSON, a line for each kind."""
    kind, library, *rest = method
    if library == TORCH_KEEPING:
        hardware.keep_memory()  # as our loops do
    for one in (TRAIN, PREDICT) if kind == BOTH else (kind,):
        if one == HEAD:
            found = fit_head(Path(rest[0]))
        elif library.startswith(TORCH):
            found = run_torch(one, library, rest[1], measurement)
        elif one == TRAIN:
            found = train_keras(rest[0], rest[1], measurement)
        else:
            found = predict_ours(library, rest[0], rest[1], measurement)
        print(json.dumps(found | {"peak": hardware.peak_memory()} | gpu_peak(library)), flush=True)


# -------------------------------------------------------------------------------------------------------- comparison


def measure(method: Method, measurement: Measurement) -> dict[str, float]:
    """Results of a method in a new process."""
    words = [sys.executable, "-m", "benchmarks.training", "--method", *method]
    for name in ("steps", "images", "size", "batch_size"):
        words += [f"--{name.replace('_', '-')}", str(getattr(measurement, name))]
    words += ["--distribute"] * measurement.distribute + ["--keep-normalisation"] * measurement.keep_normalisation
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(method)}: failed\n{done.stdout}")
    return json.loads(done.stdout.splitlines()[-1])


def list_methods(data: Path | None, only: str | None) -> list[Method]:
    """All methods, or those whose name contains `only`; `data`: where the head is fitted, if at all."""
    methods: list[Method] = [(TRAIN, *method) for method in (*TRAINED, *TORCH_VARIANTS)]
    methods += [(PREDICT, *method) for method in (*PREDICTED, *TORCH_VARIANTS)]
    methods += [(HEAD, KERAS, str(data))] if data else []
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
    sizes = f"{measurement.size} pixels, batches of {measurement.batch_size}"
    print(f"\nImages per second at {sizes}; medians of {rounds} rounds\n")
    print_rates(medians, waiting)
    print_head(medians)


def print_rates(medians: dict[Method, dict[str, float]], waiting: dict[Method, float]) -> None:
    """Prints a line per method: images per second, the fraction of the loop outside the step, peak memory in GiB."""
    print(f"{'':52}{'step':>8}{'loop':>8}{'waits':>8}{'predict':>9}{'peak GiB':>10}")
    for method, median in medians.items():
        step, in_loop = (f"{median[name]:.2f}" if name in median else "" for name in ("step", "loop"))
        waits = f"{waiting[method]:.3f}" if method in waiting else ""
        predicted = f"{median['predict']:.1f}" if "predict" in median else ""
        print(f"{', '.join(method):52}{step:>8}{in_loop:>8}{waits:>8}{predicted:>9}{median['peak']:>10.2f}")


def print_head(medians: dict[Method, dict[str, float]]) -> None:
    """Prints the time to a fitted head, and how long PyTorch would need for the features only, where measured."""
    for median in (median for method, median in medians.items() if method[0] == HEAD):
        seconds, images = median["seconds"], median["images"]
        print(f"\n{contract.CLASSIFIER} {' '.join(HEAD_FLAGS)}: {seconds:.1f} s to the head, {images:.0f} images")
        for library in (TORCH, TORCH_KEEPING):
            if measured := medians.get((PREDICT, library, DENSENET, FLOAT32)):
                print(f"{library} in float32, features only: {images / measured['predict']:.1f} s")


def main() -> None:
    """A child process, started with --method, runs one method; the parent compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--steps", type=flags.positive_int, default=8, help="training steps per epoch")
    parser.add_argument("--images", type=flags.positive_int, default=256, help="images to predict")
    parser.add_argument("--size", type=flags.positive_int, default=256, help="side of the images in pixels")
    parser.add_argument("--batch-size", type=flags.positive_int, default=16, help="images per step, on each device")
    parser.add_argument("--rounds", type=flags.positive_int, default=3, help="measurements per method")
    parser.add_argument("--data", type=Path, help="data folder after the first three scripts; fits a head there too")
    parser.add_argument("--only", help="methods whose name contains this, for example 'train Keras segnet'")
    parser.add_argument(
        "--keep-normalisation",
        action="store_true",
        help="freeze DenseNet121's batch normalisation, as densenet_train.py does for pretrained backbones",
    )
    parser.add_argument("--distribute", action="store_true", help="train with Keras on all GPUs of this machine")
    parser.add_argument("--method", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--need-gpu", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps must be at least 2: the first step of an epoch is not measured")
    measurement = flags.to_dataclass(Measurement, vars(arguments))
    if arguments.method:
        try:
            if arguments.need_gpu:
                check_gpu(arguments.method[1])
            run_method(tuple(arguments.method), measurement)
        except InputError as error:
            sys.exit(str(error))
    else:
        compare(list_methods(arguments.data, arguments.only), measurement, arguments.rounds)


if __name__ == "__main__":
    main()
