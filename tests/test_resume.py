"""Scripts that end in the middle: by kill -9, by the system's wish, by Ctrl-C; and the same command once more."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from melanoma import stages

import h5py
import pipeline
import pytest
from pipeline import places

SLOW = """
import signal, time
from melanoma import command, training
import {module} as script

training.SECONDS_BETWEEN_LOOKS = 0
begin = training.Keeper.on_epoch_begin

def linger(keeper, epoch, logs=None):
    begin(keeper, epoch, logs)
    print("begins", keeper.checkpoint.path.stem, epoch, flush=True)
    if epoch == {epoch} and keeper.checkpoint.path.stem == "{training}":
        time.sleep(60)

training.Keeper.on_epoch_begin = linger
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with Ctrl-C ignored
command.run(script.parser(), script.main)
"""
SMALL = ("--epochs", "2", "--batch-size", "16")
RUNS = {
    stages.SEGNET: ("--network", "segnet", "--network-size", "32", "--no-turns", "--averaging", "0.9", *SMALL),
    stages.CLASSIFIER: ("--backbone", pipeline.BACKBONE, "--weights", "none", "--no-turns", *SMALL),
}
INTERRUPTED = {stages.SEGNET: "segnet", stages.CLASSIFIER: f"{pipeline.BACKBONE}_full"}


def stop(script: str, folder: Path, how: signal.Signals) -> tuple[int, str]:
    """Ends the script in the second epoch of its last training; returns exit code and what it said on stderr."""
    code = SLOW.format(module=script.removesuffix(".py"), epoch=1, training=INTERRUPTED[script])
    words = [sys.executable, "-c", code, *places(folder), *RUNS[script]]
    with subprocess.Popen(
        words, cwd=pipeline.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stderr
        for line in process.stdout:
            if line.split()[1:] == [INTERRUPTED[script], "1"] and line.startswith("begins"):
                time.sleep(0.2)
                process.send_signal(how)
                break
        process.stdout.read()
        said = process.stderr.read()
    return process.returncode, said


def weights(folder: Path, network: str) -> dict[str, bytes]:
    """Every array of a weight file, by its name."""
    found: dict[str, bytes] = {}

    def note(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item[()].tobytes()

    with h5py.File(folder / "data" / "weights" / f"{network}.weights.h5") as file:
        file.visititems(note)
    return found


@pytest.fixture(scope="module")
def whole(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain whose two trainings ran through; read only."""
    folder = pipeline.copy(finished, tmp_path_factory.mktemp("whole"))
    for script, flags in RUNS.items():
        if script == stages.CLASSIFIER:
            pipeline.run(stages.MASKING, folder)
        pipeline.run(script, folder, *flags)
    return folder


@pytest.mark.parametrize(
    ("script", "how", "code"),
    [
        (stages.SEGNET, signal.SIGKILL, -signal.SIGKILL),
        (stages.SEGNET, signal.SIGTERM, 143),
        (stages.CLASSIFIER, signal.SIGINT, 130),
    ],
)
def test_script_that_was_ended_goes_on_to_the_very_weights(
    script: str, how: signal.Signals, code: int, whole: Path, tmp_path: Path
) -> None:
    folder = pipeline.copy(whole, tmp_path)
    found, said = stop(script, folder, how)
    assert found == code
    if how != signal.SIGKILL:
        assert said.endswith("-c: interrupted; the same command goes on\n") and "Traceback" not in said
    checkpoints = folder / "data" / "checkpoints"
    assert checkpoints.is_dir()
    pipeline.run(script, folder, *RUNS[script])
    assert not checkpoints.exists()
    name = INTERRUPTED[script].removesuffix("_full")
    for network in (name, f"{name}_head") if script == stages.CLASSIFIER else (name,):
        assert weights(folder, network) == weights(whole, network)
    history = (folder / "graphics" / f"{INTERRUPTED[script]}_history.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in history] == ["epoch", "1", "2"]
