"""Training speed of the classifier in one process and in two that train together, one core for each process.

Reads   --data, regions of interest and labels of step 3; without it, random pixels: speed does not depend on content
Prints  images per second by number of processes, median and range of the epochs after the first, and the ratio

Run     pip install -r requirements/dev.txt
        python -m benchmarks.scaling
Try     python -m benchmarks.scaling --backbone mobilenet --size 32 --images 32
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.classes import CLASSES
from melanoma.cli import flags, locking
from melanoma.dataset import augment
from melanoma.models import backbones, classifier
from melanoma.training import checkpoints, distributed, loop
from melanoma.training.batches import Batches, BatchOptions
from melanoma.training.callbacks import TrainingRun

import numpy as np

PROCESSES = (1, 2)
EPOCHS = 4  # the first one compiles
RATES = "images/s:"
BACKEND = "jax"  # the only one that trains in several processes


@dataclass(frozen=True)
class Training:
    """What is trained, by the names of the flags."""

    data: Path | None
    backbone: str
    size: int
    images: int
    batch_size: int
    seed: int


def load_images(settings: Training) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 (N, S, S, 3), and one-hot labels, float32 (N, 3)."""
    classes = np.eye(len(CLASSES), dtype=np.float32)
    if settings.data:
        store = Store(settings.data, contract.CLASSIFIER, {"limit": settings.images})
        return store.load("roi", split="train"), classes[store.load("labels", split="train")]
    rng = np.random.default_rng(settings.seed)
    images = rng.integers(0, 256, (settings.images, settings.size, settings.size, 3), np.uint8)
    return images, classes[np.arange(settings.images) % len(classes)]


def train(settings: Training, processes: int) -> None:
    """Trains in this process, together with the others if there are any, and prints the rate of every epoch but one."""
    cores = sorted(os.sched_getaffinity(0))
    cores_per_process = len(cores) // max(PROCESSES)
    rank = int(os.environ[f"{locking.PREFIX}PROCESS_ID"])
    os.sched_setaffinity(0, cores[rank :: max(PROCESSES)][:cores_per_process])
    with tempfile.TemporaryDirectory() as folder, distributed.devices(distribute=processes > 1) as devices:
        images, labels = load_images(settings)
        checkpoint = checkpoints.Checkpoint(Path(folder) / "state.npz", {})
        result = loop.fit(
            classifier.build(settings.backbone, images.shape[1], backbones.NONE).model,
            Batches(
                images, labels, settings.batch_size, BatchOptions(seed=settings.seed, augmentation=augment.STANDARD)
            ),
            None,
            loop.Objective("categorical_crossentropy", ["accuracy"], "accuracy"),
            loop.Hyperparameters(EPOCHS, learning_rate=1e-4, ema=0.0, patience=EPOCHS),
            TrainingRun(checkpoint, lambda *_: None, devices=devices),
        )
    if devices.leads:
        print(RATES, *(len(images) / seconds for seconds in result.seconds[1:]))


def measure(number: int) -> list[float]:
    """Starts the given number of processes; images per second of each epoch after the first."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free again afterwards
    processes = []
    for rank in range(number):
        names = {"JOB_ADDRESSES": f"127.0.0.1:{port}", "NUM_PROCESSES": str(number), "PROCESS_ID": str(rank)}
        environment = os.environ | {locking.PREFIX + name: value for name, value in names.items()}
        words = [sys.executable, "-m", "benchmarks.scaling", *sys.argv[1:], "--processes", str(number)]
        processes.append(
            subprocess.Popen(words, env=environment | {"KERAS_BACKEND": BACKEND}, stdout=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"{number} processes: failed\n{outputs[0]}")
    (rates,) = (line for line in outputs[0].splitlines() if line.startswith(RATES))
    return [float(rate) for rate in rates.removeprefix(RATES).split()]


def compare() -> None:
    """Measures every number of processes and prints a table."""
    rates = {number: measure(number) for number in PROCESSES}
    print(f"{'processes':12}{'images/s':>9}{'lowest':>9}{'highest':>9}")
    for number, found in rates.items():
        print(f"{number:<12}{statistics.median(found):9.2f}{min(found):9.2f}{max(found):9.2f}")
    one, two = (statistics.median(rates[number]) for number in PROCESSES)
    print(f"ratio       {two / one:9.2f}")


def main() -> None:
    """Child processes, started with --processes, train; the parent compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--data", type=Path, help="folder of arrays; default: random pixels")
    parser.add_argument("--backbone", type=backbones.backbone_name, default="densenet121", help="of keras.applications")
    parser.add_argument("--size", type=flags.positive_int, default=128, help="side of the random images in pixels")
    parser.add_argument("--images", type=flags.positive_int, default=128, help="images per epoch")
    parser.add_argument("--batch-size", type=flags.positive_int, default=16, help="images per step of all processes")
    parser.add_argument("--seed", type=flags.seed, default=0, help="seed of everything random")
    parser.add_argument("--processes", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.processes:
        train(flags.to_dataclass(Training, vars(arguments)), arguments.processes)
    else:
        compare()


if __name__ == "__main__":
    main()
