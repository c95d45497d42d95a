"""How fast the classifier trains in one process and in two that work together, each on its own share of the cores.

Reads   --data, masked images and labels of the third script; without, drawn noise: speed does not depend on content
Prints  images per second of each number of processes, median and range of the epochs after the first, and the ratio

Run     pip install -r requirements-dev.txt
        python benchmarks/scaling.py
Try     python benchmarks/scaling.py --backbone mobilenet --size 32 --images 32
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"  # of several processes
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from melanoma import backbones, classifier, command, distribution, isic, stages, training  # noqa: E402
from melanoma.checkpoints import Checkpoint  # noqa: E402

import numpy as np  # noqa: E402

PROCESSES = (1, 2)
EPOCHS = 4  # the first one compiles
RATES = "images/s:"


def photographs(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 (N, S, S, 3), and diagnoses, float32 (N, 3)."""
    classes = np.eye(len(isic.CLASSES), dtype=np.float32)
    if arguments.data:
        store = stages.Store(arguments.data, stages.CLASSIFIER, {"limit": arguments.images})
        return store.load("masked", split="train"), classes[store.load("labels", split="train")]
    rng = np.random.default_rng(arguments.seed)
    images = rng.integers(0, 256, (arguments.images, arguments.size, arguments.size, 3), np.uint8)
    return images, classes[np.arange(arguments.images) % len(classes)]


def work(arguments: argparse.Namespace, number: int) -> None:
    """Trains in this process, beside others where there are some, and prints the rates of the epochs."""
    cores = sorted(os.sched_getaffinity(0))
    own = cores[int(os.environ[f"{distribution.PREFIX}PROCESS_ID"]) :: max(PROCESSES)]
    os.sched_setaffinity(0, own[: len(cores) // max(PROCESSES)])
    with tempfile.TemporaryDirectory() as folder, distribution.devices(distribute=number > 1) as devices:
        images, diagnoses = photographs(arguments)
        model = classifier.build(arguments.backbone, images.shape[1], backbones.NONE).model
        result = training.fit(
            model,
            training.Batches(images, diagnoses, arguments.batch_size, seed=arguments.seed, vary=True),
            None,
            loss="categorical_crossentropy",
            metrics=["accuracy"],
            monitor="accuracy",
            epochs=EPOCHS,
            learning_rate=1e-4,
            averaging=0.0,
            patience=EPOCHS,
            checkpoint=Checkpoint(Path(folder) / "state.npz", {}),
            draw=lambda *_: None,
            devices=devices,
        )
    if devices.leads:
        print(RATES, *(len(images) / seconds for seconds in result.seconds[1:]))


def measure(number: int) -> list[float]:
    """Images per second of each epoch but the first, of so many processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = []
    for one in range(number):
        names = {"JOB_ADDRESSES": f"127.0.0.1:{port}", "NUM_PROCESSES": str(number), "PROCESS_ID": str(one)}
        environment = os.environ | {distribution.PREFIX + name: value for name, value in names.items()}
        words = [sys.executable, *sys.argv, "--work", str(number)]
        processes.append(subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True))
    told = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"{number} processes: failed\n{told[0]}")
    (rates,) = (line for line in told[0].splitlines() if line.startswith(RATES))
    return [float(rate) for rate in rates.removeprefix(RATES).split()]


def main() -> None:
    """Reads the command line; child processes train, the parent compares."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=command.HelpFormatter, allow_abbrev=False)
    flags.add_argument("--data", type=Path, help="folder of arrays; None: drawn images")
    flags.add_argument("--backbone", type=backbones.name_of, default="densenet121", help="of keras.applications")
    flags.add_argument("--size", type=command.positive_int, default=128, help="side of drawn images in pixels")
    flags.add_argument("--images", type=command.positive_int, default=128, help="of an epoch")
    flags.add_argument("--batch-size", type=command.positive_int, default=16, help="images per step, of all processes")
    flags.add_argument("--seed", type=command.seed, default=0, help="of weights, order and variants")
    flags.add_argument("--work", type=int, help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    if arguments.work:
        work(arguments, arguments.work)
        return
    rates = {number: measure(number) for number in PROCESSES}
    print(f"{'processes':12}{'images/s':>9}{'lowest':>9}{'highest':>9}")
    for number, found in rates.items():
        print(f"{number:<12}{statistics.median(found):9.2f}{min(found):9.2f}{max(found):9.2f}")
    one, two = (statistics.median(rates[number]) for number in PROCESSES)
    print(f"ratio       {two / one:9.2f}")


if __name__ == "__main__":
    main()
