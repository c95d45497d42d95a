"""Kills the second script again and again with signal 9 while it trains, and looks whether anything is lost.

Every life of the script is ended at a random moment after its first epoch, and after every one of these the state must
load. Then the script may end, and its weights must be those of a run that nobody disturbed, to the bit.

Run     python benchmarks/kills.py --kills 50
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from melanoma import command, phantom, stages  # noqa: E402

import h5py  # noqa: E402
import numpy as np  # noqa: E402

SIZE = 32  # pixels
COUNTS = {"train": 24, "val": 12}
EPOCHS_PER_LIFE = 3
LINGER = 0.3  # seconds, at most, from the beginning of an epoch to the kill
# Saves after every epoch, where the script itself waits ten seconds between two states, and never ends early.
HASTY = """
from melanoma import command, training
import segmentation_02_segnet_train as script
script.PATIENCE = 10**6
training.SECONDS_BETWEEN_LOOKS = 0
training.record = lambda *_: None
command.run(script.parser(), script.main)
"""


def start(words: list[str]) -> subprocess.Popen[str]:
    """A process in the folder of the scripts."""
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def finish(words: list[str]) -> None:
    """Runs a process to its end."""
    with start(words) as process:
        said, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(words)}: failed\n{said}")


def live(words: list[str], epochs: int) -> bool:
    """Lets the script train for some epochs, and kills it then; whether it was still there."""
    with start(words) as process:
        assert process.stdout
        seen = 0
        for line in process.stdout:
            seen += line.startswith("Epoch ")
            if seen == epochs:
                break
        try:
            process.wait(random.uniform(0, LINGER))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
    return process.returncode == -signal.SIGKILL


def weights(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of the weight file, by their names."""
    found: dict[str, np.ndarray] = {}
    with h5py.File(folder / "data" / stages.FILES["segnet_weights"].path.format(member="")) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


def main() -> None:
    """Trains undisturbed, then disturbed, and compares."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=command.HelpFormatter, allow_abbrev=False)
    flags.add_argument("--kills", type=command.positive_int, default=50, help="how many lives the script has to lose")
    arguments = flags.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder, undisturbed = Path(name) / "killed", Path(name) / "undisturbed"
        phantom.write_sample(folder / "source", COUNTS, size=(60, 80))
        training = ["--network", "segnet", "--network-size", str(SIZE), "--no-turns", "--batch-size", "8"]
        training += ["--averaging", "0.9", "--epochs", str((EPOCHS_PER_LIFE + 1) * arguments.kills)]
        words = {}
        for place in (folder, undisturbed):
            places = ["--data", str(place / "data"), "--graphics", str(place / "graphics")]
            finish([stages.PREPROCESSING, *places, "--source", str(folder / "source"), "--size", str(SIZE)])
            words[place] = ["-c", HASTY, *places, *training]
        finish(words[undisturbed])
        loadable = kills = 0
        while kills < arguments.kills and live(words[folder], random.randint(2, EPOCHS_PER_LIFE)):
            kills += 1
            (path,) = (folder / "data" / "checkpoints").rglob("[!.]*.npz")
            with np.load(path) as state:
                loadable += all(state[key] is not None for key in state.files)
        finish(words[folder])
        first, second = weights(undisturbed), weights(folder)
        same = first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)
    print(f"{kills} kills, after {loadable} of them the state loads; final weights equal: {'yes' if same else 'NO'}")


if __name__ == "__main__":
    main()
