"""Scripts that are killed, terminated or interrupted by Ctrl-C continue when the same command runs again."""

import signal
import time
from pathlib import Path

from melanoma.artifacts import contract

import h5py
import pipeline
import pytest
import subprocess_runs
from pipeline import BACKBONE, places
from subprocess_runs import PAUSE_BEFORE, PAUSED

pytestmark = pytest.mark.slow

COMMON = ("--backbone", BACKBONE, "--weights", "none", "--views", "1", "--epochs", "2", "--batch-size", "16")
FLAGS = {
    contract.SEGNET: ("--network", "unet", "--input-size", "32", "--ema", "0.9", *COMMON),
    contract.CLASSIFIER: COMMON,
}
INTERRUPTED = {contract.SEGNET: "segnet", contract.CLASSIFIER: f"{BACKBONE}_full"}  # training
WEIGHTS = {contract.SEGNET: ("segnet",), contract.CLASSIFIER: (BACKBONE, f"{BACKBONE}_head")}


def end(script: str, folder: Path, how: signal.Signals) -> tuple[int, str]:
    """Ends a script in the second epoch of its last training; returns exit code and standard error."""
    runs = [["command", script, *places(folder), *FLAGS[script]]]
    with subprocess_runs.start(runs, **{PAUSE_BEFORE: f"{INTERRUPTED[script]} 1"}) as process:
        assert process.stdout and process.stderr
        paused = any(PAUSED in line for line in process.stdout)
        time.sleep(0.2)
        process.send_signal(how)
        process.stdout.read()
        errors = process.stderr.read()
    assert paused, errors
    return process.returncode, errors


def weights(folder: Path, network: str) -> dict[str, bytes]:
    """The arrays of a weight file by name."""
    arrays: dict[str, bytes] = {}

    def add(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[name] = item[()].tobytes()

    with h5py.File(folder / "data" / "weights" / f"{network}.weights.h5") as file:
        file.visititems(add)
    return arrays


@pytest.fixture(scope="module")
def uninterrupted(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain in which both trainings ran without interruption; read only."""
    folder = pipeline.copy(finished, tmp_path_factory.mktemp("uninterrupted"))
    for script in (contract.SEGNET, contract.ROI, contract.CLASSIFIER):
        pipeline.run(script, folder, *FLAGS.get(script, ()))
    return folder


@pytest.mark.parametrize(
    ("script", "how", "code"),
    [
        (contract.SEGNET, signal.SIGKILL, -signal.SIGKILL),
        (contract.SEGNET, signal.SIGTERM, 143),
        (contract.CLASSIFIER, signal.SIGINT, 130),
    ],
)
def test_script_that_was_ended_resumes_to_exactly_the_same_weights(
    script: str, how: signal.Signals, code: int, uninterrupted: Path, tmp_path: Path
) -> None:
    folder, checkpoints = pipeline.copy(uninterrupted, tmp_path), tmp_path / "data" / "checkpoints"
    found, errors = end(script, folder, how)
    assert found == code
    if how != signal.SIGKILL:
        assert f"{script}: interrupted. To continue, run the same command" in errors and "Traceback" not in errors
    assert checkpoints.is_dir()
    pipeline.run(script, folder, *FLAGS[script])
    assert not checkpoints.exists()
    for network in WEIGHTS[script]:
        assert weights(folder, network) == weights(uninterrupted, network)
    history = (folder / "graphics" / f"{INTERRUPTED[script]}_history.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in history] == ["epoch", "1", "2"]
