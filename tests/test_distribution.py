"""Training on several devices and in several processes, and the chain on JAX: in processes of their own."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from melanoma import distribution, stages
from melanoma.errors import InputError

import elsewhere
import numpy as np
import pipeline
import pytest

JAX = {"KERAS_BACKEND": "jax", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # which take longer than what they save
BATCH = "12"  # goes into COUNTS, so that a step is compiled once
SEGNET = (stages.SEGNET, "--network", "segnet", "--network-size", "16", "--no-turns", "--batch-size", BATCH)
CLASSIFY = (
    *(stages.CLASSIFIER, "--backbone", pipeline.BACKBONE, "--weights", "none", "--epochs", "1", "--no-turns"),
    *("--balance", "none", "--batch-size", BATCH),
)
TIMEOUT = 300  # seconds; a machine may be busy


def start(*words: object, **environment: str) -> subprocess.Popen:
    command = [sys.executable, str(Path(elsewhere.__file__)), *map(str, words)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(distribution.PREFIX)}
    return subprocess.Popen(
        command,
        cwd=pipeline.ROOT,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_ports() -> int:
    """The first of two."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first, contextlib.suppress(OSError):
            port = first.getsockname()[1]
            with socket.create_server(("127.0.0.1", port + 1)):
                return port


@contextlib.contextmanager
def pair(*words: object, pausing: int | None = None) -> Iterator[list[subprocess.Popen]]:
    """Two processes on JAX that work together, of which one may wait in the third epoch."""
    common = {
        f"{distribution.PREFIX}JOB_ADDRESSES": f"127.0.0.1:{free_ports()}",
        f"{distribution.PREFIX}NUM_PROCESSES": "2",
    }
    processes = []
    for one in range(2):
        own = {f"{distribution.PREFIX}PROCESS_ID": str(one)} | ({elsewhere.PAUSE: "2"} if one == pausing else {})
        processes.append(start(*words, **JAX, **common, **own))
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def finish(process: subprocess.Popen) -> str:
    """Its standard output."""
    out, complaints = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, complaints
    return out


def weights(path: Path) -> list[np.ndarray]:
    with np.load(path) as found:
        return [found[name] for name in found.files]


def distance(one: Path, other: Path) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(weights(one), weights(other), strict=True))


def check_small_training(folder: Path, figures: str = "") -> None:
    """Figures: how the names begin of those that are to be the same."""
    assert distance(folder / "process0.npz", folder / "alone.npz") < 2e-4
    found = json.loads((folder / "history.json").read_text())
    for name in [name for name in found["alone"] if name.startswith(figures)]:
        values = found["alone"][name]
        # Keras' AUC counts at 200 thresholds: rounding may take one answer to the other side.
        assert found["distributed"][name] == pytest.approx(values, abs=0.02 if "auc" in name else 1e-3), name


@pytest.fixture(scope="module")
def on_jax(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all five scripts have run on JAX; read only."""
    folder = tmp_path_factory.mktemp("jax")
    steps = [
        (stages.PREPROCESSING, "--source", str(source), "--size", str(pipeline.SIZE), "--jobs", "1"),
        (*SEGNET, "--epochs", "2"),
        (stages.MASKING,),
        CLASSIFY,
        (stages.EVALUATION,),
    ]
    finish(start("scripts", folder, folder, *" -- ".join(" ".join(step) for step in steps).split(" "), **JAX))
    return folder


def test_all_five_scripts_run_on_jax(on_jax: Path) -> None:
    settings = pipeline.reader(on_jax).written_with("probabilities", split="val")
    assert settings["keras_backend"] == "jax"
    assert (on_jax / "graphics" / "report.html").is_file()


@pytest.mark.parametrize("written_on", ["jax", "tensorflow"])
def test_weights_of_one_backend_give_the_same_on_the_other(
    written_on: str, on_jax: Path, finished: Path, tmp_path: Path
) -> None:
    folder = on_jax if written_on == "jax" else finished
    elsewhere_path, here = tmp_path / "jax.npz", tmp_path / "tensorflow.npz"
    process = start("predict", elsewhere_path, folder, **JAX)
    elsewhere.predict(here, folder)
    finish(process)
    assert distance(elsewhere_path, here) < 1e-4


@pytest.mark.parametrize("backend", ["jax", "tensorflow"])
def test_two_devices_train_like_one(backend: str, tmp_path: Path) -> None:
    two = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"} if backend == "jax" else {}
    finish(start("batches", tmp_path, 2, 4, **JAX | {"KERAS_BACKEND": backend}, **two))
    # There a batch of fewer rows than devices counts twice in the training's own figures.
    check_small_training(tmp_path, "val_" if backend == "tensorflow" else "")


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    with pair("batches", tmp_path, 2, 4) as processes:
        for process in processes:
            finish(process)
    check_small_training(tmp_path)
    assert distance(tmp_path / "process0.npz", tmp_path / "process1.npz") == 0


@pytest.mark.parametrize(
    ("step", "training"), [((*SEGNET, "--epochs", "2"), 1), ((*CLASSIFY, "--train", "head", "--epochs", "60"), 2)]
)
def test_script_in_two_processes_ends_with_the_weights_of_one_and_writes_once(
    step: tuple[str, ...], training: int, on_jax: Path, tmp_path: Path
) -> None:
    folder = pipeline.copy(on_jax, tmp_path / "chain")
    with pair("scripts", tmp_path, folder, *step, "--distribute") as processes:
        _, told = (finish(process) for process in processes)
    assert "val_" not in told
    assert distance(tmp_path / "fit1_process0.npz", tmp_path / "fit1_process1.npz") == 0
    assert distance(tmp_path / "fit1_process0.npz", on_jax / f"fit{training}_process0.npz") < 1e-4
    there, before = pipeline.reader(folder).manifest, pipeline.reader(on_jax).manifest
    written = [name for name in there if there[name] != before.get(name)]
    assert written and all(there[name]["settings"]["distribute"] for name in written)


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_process_ends_the_other_with_a_clear_message_and_both_go_on_later(victim: int, tmp_path: Path) -> None:
    with pair("batches", tmp_path, 2, 4, pausing=victim) as processes:
        assert processes[0].stdout
        epochs = (line for line in processes[0].stdout if "val_auc" in line)
        assert len(list(itertools.islice(epochs, 2))) == 2
        time.sleep(1)  # the other one is in the middle of a step
        processes[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        _, complaint = processes[1 - victim].communicate(timeout=TIMEOUT)
        assert time.monotonic() - killed < distribution.SILENCE
    assert processes[1 - victim].returncode == InputError.exit_code
    assert f"process {victim} of 2 has ended" in complaint and "Start the same command on all" in complaint
    assert "Traceback" not in complaint and "stack trace" not in complaint
    with pair("batches", tmp_path, 2, 4) as processes:
        told = [finish(process) for process in processes]
    assert told[0].count("val_auc") == 2 + 4  # the last two epochs, and then all of one process alone
    check_small_training(tmp_path)


def test_several_machines_on_tensorflow_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{distribution.PREFIX}NUM_PROCESSES", "2")
    with pytest.raises(InputError, match="KERAS_BACKEND=jax"), distribution.devices(distribute=True):
        pass


def test_process_with_other_flags_is_refused() -> None:
    port = free_ports()
    greeting = (1).to_bytes(4, "big") + bytes(32)

    def join() -> None:
        with distribution.patiently_connect("127.0.0.1", port) as connection:
            connection.sendall(greeting)
            connection.recv(1)

    other = threading.Thread(target=join)
    other.start()
    with pytest.raises(InputError, match="process 1 was started with other flags"):
        distribution.Peers("127.0.0.1", port, 0, 2)
    other.join()


@pytest.mark.parametrize(("name", "value"), [("JOB_ADDRESSES", "host"), ("PROCESS_ID", "")])
def test_environment_that_names_no_processes_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keras.backend.backend", lambda: "jax")
    for other, good in (("JOB_ADDRESSES", "host:80"), ("PROCESS_ID", "1"), ("NUM_PROCESSES", "2")):
        monkeypatch.setenv(distribution.PREFIX + other, good)
    monkeypatch.setenv(distribution.PREFIX + name, value)
    with pytest.raises(InputError, match=f"{name} is"), distribution.devices(distribute=True):
        pass
