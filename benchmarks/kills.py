"""Kills step 2 with SIGKILL repeatedly while it trains, and checks that nothing is lost.

After every kill, at a random moment after the first epoch, the saved state must load. In the end the script may finish:
its weights must be bit-identical to those of an uninterrupted run.

Run     python -m benchmarks.kills --kills 50
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from melanoma.artifacts import contract
from melanoma.cli import flags
from melanoma.sources import synthetic

import h5py
import numpy as np

ROOT = Path(__file__).parent.parent
SIZE = 32  # pixels
COUNTS = {"train": 24, "val": 12}
EPOCHS_PER_RUN = 3  # at most, before the kill
MAX_DELAY = 0.3  # seconds from the start of an epoch to the kill
# Step 2, but it saves after every epoch instead of every ten seconds, and never stops early.
STEP_2 = """
from melanoma.cli import run
from melanoma.evaluation import figures
from melanoma.training import callbacks, segmentation
import segmentation_02_segnet_train as script
segmentation.PATIENCE = 10**6
callbacks.SECONDS_BETWEEN_SAVES = 0
figures.draw_training = lambda *_: None
run.run(script.build_parser(), script.main)
"""


def start(words: list[str]) -> subprocess.Popen[str]:
    """Starts Python in the folder of the scripts."""
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def run_to_end(words: list[str]) -> None:
    """Runs Python to its end; exits if it fails."""
    with start(words) as process:
        output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(words)}: failed\n{output}")


def run_and_kill(words: list[str], epochs: int) -> bool:
    """Kills a training run soon after the given number of epochs has started; returns False if it ended before."""
    with start(words) as process:
        assert process.stdout
        started = 0
        for line in process.stdout:
            started += line.startswith("Epoch ")
            if started == epochs:
                break
        try:
            process.wait(random.uniform(0, MAX_DELAY))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
    return process.returncode == -signal.SIGKILL


def state_loads(folder: Path) -> bool:
    """Whether the one saved state of a run can be read."""
    (path,) = (folder / "data" / "checkpoints").rglob("[!.]*.npz")
    with np.load(path) as state:
        return all(state[key] is not None for key in state.files)


def final_weights(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of the weight file, by name."""
    found: dict[str, np.ndarray] = {}
    with h5py.File(folder / "data" / contract.FILES["segnet_weights"].path.format(member="")) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


def prepare(source: Path, folder: Path, epochs: int) -> list[str]:
    """Runs step 1 and returns the Python arguments that run step 2."""
    places = ["--data", str(folder / "data"), "--graphics", str(folder / "graphics")]
    run_to_end([contract.PREPROCESSING, *places, "--source", str(source), "--size", str(SIZE)])
    network = ["--network", "segnet", "--input-size", str(SIZE), "--views", "1"]
    return ["-c", STEP_2, *places, *network, "--batch-size", "8", "--ema", "0.9", "--epochs", str(epochs)]


def main() -> None:
    """Trains once without kills and once with them, and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=flags.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--kills", type=flags.positive_int, default=50, help="number of kills")
    arguments = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as name:
        source, uninterrupted, killed = (Path(name) / part for part in ("source", "uninterrupted", "killed"))
        synthetic.write_sample(source, COUNTS, size=(60, 80))
        epochs = (EPOCHS_PER_RUN + 1) * arguments.kills
        run_to_end(prepare(source, uninterrupted, epochs))
        words = prepare(source, killed, epochs)
        kills = loadable = 0
        while kills < arguments.kills and run_and_kill(words, random.randint(2, EPOCHS_PER_RUN)):
            kills += 1
            loadable += state_loads(killed)
        run_to_end(words)
        expected, found = final_weights(uninterrupted), final_weights(killed)
        equal = expected.keys() == found.keys() and all(np.array_equal(expected[key], found[key]) for key in expected)
    print(f"{kills} kills, the state loads after {loadable} of them; final weights equal: {'yes' if equal else 'NO'}")


if __name__ == "__main__":
    main()
