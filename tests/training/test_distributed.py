"""Training on several devices and in several processes; the scripts on JAX."""

import contextlib
import dataclasses
import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.cli.locking import PREFIX
from melanoma.errors import InputError
from melanoma.training import distributed
from melanoma.training.batches import Batches, BatchOptions, PaddedBatches

import keras
import numpy as np
import pipeline
import pytest
import subprocess_runs
import toy_training
from subprocess_runs import EPOCHS, PAUSE_BEFORE, PAUSED

TIMEOUT = 300  # seconds


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_copied_model_normalises_with_the_copied_statistics() -> None:
    def build() -> keras.Model:
        inputs = keras.Input((1,))
        return keras.Model(inputs, keras.layers.Normalization(name="norm")(inputs))

    source, target = build(), build()
    source.get_layer("norm").adapt(np.array([[10.0], [30.0]]))
    distributed.copy_variables(source, target)
    assert np.asarray(target(np.array([[40.0]]))).item() == pytest.approx(2.0)


# ------------------------------------------------------------------------------------------------------------- settings


def test_without_distribute_the_default_device_is_used() -> None:
    with distributed.devices(distribute=False) as devices:
        assert devices is distributed.ONE and devices.leads and devices.replicas == 1


def test_several_machines_on_tensorflow_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}NUM_PROCESSES", "2")
    with pytest.raises(InputError, match="KERAS_BACKEND=jax"), distributed.devices(distribute=True):
        pass


def test_other_backends_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keras.backend.backend", lambda: "torch")
    with pytest.raises(InputError, match="not on torch: set KERAS_BACKEND=jax"), distributed.devices(distribute=True):
        pass


@pytest.mark.parametrize(
    ("name", "value"), [("JOB_ADDRESSES", "host"), ("PROCESS_ID", ""), ("PROCESS_ID", "2"), ("NUM_PROCESSES", "many")]
)
def test_malformed_environment_variable_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keras.backend.backend", lambda: "jax")
    for other, valid in (("JOB_ADDRESSES", "host:80"), ("PROCESS_ID", "1"), ("NUM_PROCESSES", "2")):
        monkeypatch.setenv(PREFIX + other, valid)
    monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(InputError, match=f"{name} is {value}"), distributed.devices(distribute=True):
        pass


# ------------------------------------------------------------------------------------------------------------- padding


def parts(rows: int, batch_size: int, processes: int, **options: Any) -> list[tuple[np.ndarray, ...]]:
    """Batches of numbered rows on four devices, put together from the parts of all processes."""
    batches = Batches(np.arange(rows), np.arange(rows), batch_size, BatchOptions(**options))
    of_processes = [PaddedBatches(batches, 4, process, processes) for process in range(processes)]
    together = []
    for index in range(len(batches)):
        found = [part[index] for part in of_processes]
        assert len({len(part[0]) for part in found}) == 1
        together.append(tuple(map(np.concatenate, zip(*found, strict=True))))
    return together


@pytest.mark.parametrize(("rows", "batch_size"), [(81, 8), (11, 8), (24, 12), (15, 8), (3, 4)])
@pytest.mark.parametrize("processes", [1, 2])
def test_processes_together_get_every_row_of_a_batch_once(rows: int, batch_size: int, processes: int) -> None:
    for place, (inputs, targets, weights) in enumerate(parts(rows, batch_size, processes)):
        real = range(place * batch_size, min((place + 1) * batch_size, rows))
        assert inputs[: len(real)].tolist() == list(real) and (inputs == targets).all()
        assert len(inputs) % 4 == 0 and len(inputs) - len(real) < 4 and set(inputs) == set(real)
        assert (weights[: len(real)] > 0).all() and (weights[len(real) :] == 0).all()
        assert weights.mean() == pytest.approx(1)  # Keras' mean is that of the rows without padding


def test_padding_keeps_the_weights_of_the_rows() -> None:
    *_, (inputs, _, weights) = parts(11, 8, 2, loss_weights=np.arange(11))
    assert inputs.tolist() == [8, 9, 10, 8]
    assert weights == pytest.approx(np.array([8, 9, 10, 0]) * 4 / 3)


def test_epoch_with_replacement_may_have_fewer_rows_than_there_are() -> None:
    (first, *_), (last, _, weights) = parts(24, 8, 2, seed=0, sampling_weights=np.ones(24), length=13)
    assert (len(first), len(last)) == (8, 8) and (weights > 0).tolist() == [True] * 5 + [False] * 3


def test_validation_rows_have_the_same_weight_in_all_batches() -> None:
    padded = PaddedBatches(Batches(np.arange(11), np.arange(11), 8), 4, for_training=False)
    weights = np.concatenate([padded[index][2] for index in range(2)])
    assert weights == pytest.approx([12 / 11] * 11 + [0])


def test_padding_changes_neither_weights_nor_metrics(tmp_path: Path) -> None:
    models, results = [], []
    five = dataclasses.replace(distributed.mirrored(), replicas=5)  # the last two of 12 rows become five
    for name, devices in (("one", distributed.ONE), ("padded", five)):
        models.append(toy_training.dense())
        batches, validation = toy_training.regression(5, seed=0), toy_training.regression(5)
        results.append(
            toy_training.fit(models[-1], batches, tmp_path / name, devices=devices, validation=validation).history
        )
    for one, padded in zip(*(model.get_weights() for model in models), strict=True):
        assert padded == pytest.approx(one, abs=1e-6)
    for metric in ("negative_mse", "val_loss", "val_negative_mse"):
        assert results[1][metric] == pytest.approx(results[0][metric], rel=1e-6)


def test_batch_size_that_the_devices_cannot_divide_is_refused(tmp_path: Path) -> None:
    devices = dataclasses.replace(distributed.mirrored(), replicas=3)
    with pytest.raises(InputError, match="--batch-size 5 is not a multiple of 3"):
        toy_training.fit(toy_training.dense(), toy_training.regression(5), tmp_path, devices=devices)


# ------------------------------------------------------------------------------------------------------ other processes

JAX = {"KERAS_BACKEND": "jax", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # optimising takes longer than it saves
TWO_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
BATCH_SIZE = ("--batch-size", "12")  # divides pipeline.COUNTS: each step is compiled once
SEGNET = (
    *(contract.SEGNET, "--network", "unet", "--backbone", pipeline.BACKBONE, "--weights", "none", "--views", "1"),
    *("--input-size", "16", "--epochs", "2", *BATCH_SIZE),
)
CLASSIFIER = (
    *(contract.CLASSIFIER, "--backbone", pipeline.BACKBONE, "--weights", "none", "--views", "1"),
    *("--epochs", "2", "--balance", "none", *BATCH_SIZE),
)
COMPARABLE = ["make_backends_comparable"]


@contextlib.contextmanager
def pair(
    runs: list[Any], paused: int | None = None, pause_before: str = "", runs_of_second: list[Any] | None = None
) -> Iterator[list[subprocess.Popen]]:
    """Two processes of a distributed job on JAX, one of which may pause."""
    job = {f"{PREFIX}JOB_ADDRESSES": f"127.0.0.1:{free_port()}", f"{PREFIX}NUM_PROCESSES": "2"}
    processes = []
    for number in range(2):
        pausing = {PAUSE_BEFORE: pause_before} if number == paused else {}
        environment = JAX | job | pausing | {f"{PREFIX}PROCESS_ID": str(number)}
        processes.append(subprocess_runs.start(runs_of_second or runs if number else runs, **environment))
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def finish(process: subprocess.Popen) -> str:
    """Waits for the end of a process; returns its standard output."""
    output, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    return output


def distance(one: Path, other: Path) -> float:
    """Largest difference between arrays of two files."""
    with np.load(one) as first, np.load(other) as second:
        assert first.files == second.files
        return max(float(np.abs(first[name] - second[name]).max()) for name in first.files)


def check_training(folder: Path) -> None:
    """Checks that `subprocess_runs.training` gave the same on all devices as on one.

    The last batch, of one row, counts twice in the training loss.
    """
    assert distance(folder / "process0.npz", folder / "one_device.npz") < 2e-4
    history = json.loads((folder / "history.json").read_text())
    for name in history["one_device"].keys() - {"loss"}:
        # Keras' AUC has 200 thresholds: rounding can move a prediction across one of them.
        tolerance = 0.02 if "auc" in name else 1e-3
        assert history["distributed"][name] == pytest.approx(history["one_device"][name], abs=tolerance), name


@pytest.fixture(scope="module")
def on_jax(source: Path, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that one process on JAX with two CPU devices computed; read only.

    chain: all scripts on one device. two_devices: the segmentation network trained again on two. training: see
    `subprocess_runs.training`. {tensorflow,jax}_chain_on_jax.npz: predictions of the weights of two chains.
    layer_steps.json: see `toy_training.layer_steps`.
    """
    folder = tmp_path_factory.mktemp("jax")
    chain, two_devices, training = (folder / name for name in ("chain", "two_devices", "training"))
    chain.mkdir()
    training.mkdir()
    preprocessing = [contract.PREPROCESSING, "--source", source, "--size", str(pipeline.SIZE), "--jobs", "1"]
    steps = [preprocessing, SEGNET, [contract.ROI], CLASSIFIER, [contract.EVALUATION]]
    runs = [
        ["layer_steps", folder, 0.01],
        COMPARABLE,
        ["scripts", chain, *steps],
        ["predict", chain, folder / "jax_chain_on_jax.npz"],
        ["predict", finished, folder / "tensorflow_chain_on_jax.npz"],
        ["copy", chain, two_devices],
        ["scripts", two_devices, [*SEGNET, "--distribute"]],
        ["training", training, 2],
    ]
    finish(subprocess_runs.start(runs, **JAX, **TWO_DEVICES))
    return folder


@pytest.mark.slow
def test_all_five_scripts_run_on_jax(on_jax: Path) -> None:
    settings = pipeline.reader(on_jax / "chain").written_with("probabilities", split="val", backbone=pipeline.BACKBONE)
    assert settings["keras_backend"] == "jax"
    assert (on_jax / "chain" / "graphics" / "report.html").is_file()


@pytest.mark.slow
def test_layers_have_their_own_learning_rates_on_jax(on_jax: Path) -> None:
    assert json.loads((on_jax / "layer_steps.json").read_text()) == pytest.approx([0.001, 0.01, 0.1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("written_on", ["jax", "tensorflow"])
def test_weights_of_one_backend_give_the_same_predictions_on_the_other(
    written_on: str, on_jax: Path, finished: Path, tmp_path: Path
) -> None:
    subprocess_runs.predict(str(on_jax / "chain" if written_on == "jax" else finished), str(tmp_path / "here.npz"))
    assert distance(on_jax / f"{written_on}_chain_on_jax.npz", tmp_path / "here.npz") < 1e-4


@pytest.mark.slow
def test_two_devices_of_jax_train_like_one(on_jax: Path) -> None:
    check_training(on_jax / "training")
    assert distance(on_jax / "two_devices" / "fit1_process0.npz", on_jax / "chain" / "fit1_process0.npz") < 1e-4
    assert pipeline.reader(on_jax / "two_devices").written_with("predicted", split="val")["distribute"]


@pytest.mark.slow
def test_two_devices_of_tensorflow_train_like_one(tmp_path: Path) -> None:
    finish(subprocess_runs.start([COMPARABLE, ["training", tmp_path, 2]]))
    check_training(tmp_path)


@pytest.mark.slow
def test_script_in_two_processes_ends_with_the_weights_of_one_and_writes_once(on_jax: Path, tmp_path: Path) -> None:
    folder, chain = pipeline.copy(on_jax / "chain", tmp_path / "chain"), on_jax / "chain"
    with pair([COMPARABLE, ["scripts", folder, [*CLASSIFIER, "--distribute"]]]) as processes:
        output, output_of_second = (finish(process) for process in processes)
    assert "val_" in output and "val_" not in output_of_second
    for training, before in ((1, 2), (2, 3)):  # head and full; the first one of the chain was the segmentation network
        first, second = (folder / f"fit{training}_process{process}.npz" for process in range(2))
        assert distance(first, second) == 0
        assert distance(first, chain / f"fit{before}_process0.npz") < 1e-4
    now, earlier = pipeline.reader(folder).manifest, pipeline.reader(chain).manifest
    written = [name for name in now if now[name] != earlier.get(name)]
    assert written and all(now[name]["settings"]["distribute"] for name in written)


@pytest.mark.slow
def test_processes_with_different_flags_are_refused_by_all(tmp_path: Path) -> None:
    with pair([["training", tmp_path, 2]], runs_of_second=[["training", tmp_path / "other", 2]]) as processes:
        for process in processes:
            _, message = process.communicate(timeout=TIMEOUT)
            assert process.returncode == InputError.exit_code
            assert "started with flags that differ" in message


@pytest.mark.slow
def test_end_of_a_process_ends_the_other_and_both_resume_to_the_weights_of_one_device(tmp_path: Path) -> None:
    runs = [COMPARABLE, ["training", tmp_path, 2]]
    for victim, epochs, ending, code in ((0, 2, signal.SIGKILL, -9), (1, 3, signal.SIGTERM, 143)):
        with pair(runs, victim, f"state {epochs}") as processes:
            stdout = processes[victim].stdout
            assert stdout and any(PAUSED in line for line in stdout)
            time.sleep(1)  # the other process is in the middle of a step
            processes[victim].send_signal(ending)
            ended = time.monotonic()
            processes[1 - victim].communicate(timeout=TIMEOUT)
            assert time.monotonic() - ended < 6 * distributed.HEARTBEAT
            _, message = processes[victim].communicate(timeout=TIMEOUT)
        assert processes[1 - victim].returncode != 0 and processes[victim].returncode == code
        assert code < 0 or "interrupted. To continue, run the same command" in message
    with pair(runs) as processes:
        output, _ = (finish(process) for process in processes)
    assert output.count("val_auc") == EPOCHS - 3 + EPOCHS  # the last one of both, then all of one device
    check_training(tmp_path)
    assert distance(tmp_path / "process0.npz", tmp_path / "process1.npz") == 0
