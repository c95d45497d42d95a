"""Training on several devices and in several processes; the scripts on JAX."""

import contextlib
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
from types import SimpleNamespace
from typing import Any

from melanoma.artifacts import contract
from melanoma.cli.locking import PREFIX
from melanoma.errors import InputError
from melanoma.training import distributed
from melanoma.training.batches import Batches, BatchOptions
from melanoma.training.distributed import Mirrored, Peers, RepeatedDataset, ShardedDataset

import keras
import numpy as np
import pipeline
import pytest
import subprocess_runs
import toy_training
from subprocess_runs import EPOCHS, PAUSE_BEFORE, PAUSED

TIMEOUT = 300  # seconds


def free_ports() -> int:
    """The first of two free ports in a row."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first, contextlib.suppress(OSError):
            port = first.getsockname()[1]
            with socket.create_server(("127.0.0.1", port + 1)):
                return port


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
    ("name", "value"), [("JOB_ADDRESSES", "host"), ("PROCESS_ID", ""), ("NUM_PROCESSES", "several")]
)
def test_malformed_environment_variable_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keras.backend.backend", lambda: "jax")
    for other, valid in (("JOB_ADDRESSES", "host:80"), ("PROCESS_ID", "1"), ("NUM_PROCESSES", "2")):
        monkeypatch.setenv(PREFIX + other, valid)
    monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(InputError, match=f"{name} is {value}"), distributed.devices(distribute=True):
        pass


# --------------------------------------------------------------------------------------------- division of the batches


def numbered_batches(rows: int, batch_size: int) -> Batches:
    return Batches(np.arange(rows), np.arange(rows), batch_size)


def test_batch_with_fewer_rows_than_replicas_is_repeated() -> None:
    repeated = RepeatedDataset(numbered_batches(10, 4), replicas=3)
    assert [repeated[index][0].tolist() for index in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9] * 3]


@pytest.mark.parametrize(("rows", "batch_size"), [(10, 4), (12, 4), (11, 8), (81, 8), (3, 8), (4, 1)])
def test_validation_batches_give_every_replica_a_row(rows: int, batch_size: int) -> None:
    devices = Mirrored()
    devices.replicas = 3
    batches = devices._evenly(numbered_batches(rows, batch_size))
    sizes = [len(batches[index][0]) for index in range(len(batches))]
    assert min(sizes) >= 3 and sum(sizes) == rows


def test_fewer_validation_images_than_devices_are_refused() -> None:
    devices = Mirrored()
    devices.replicas = 3
    with pytest.raises(InputError, match="2 validation images are fewer than 3 devices"):
        devices._evenly(numbered_batches(2, 8))


@pytest.mark.parametrize(("rows", "batch_size"), [(81, 8), (11, 8), (24, 12), (15, 8), (3, 4)])
@pytest.mark.parametrize("processes", [1, 2])
def test_processes_together_get_every_row_of_a_batch_once(rows: int, batch_size: int, processes: int) -> None:
    replicas = 4
    datasets = []
    for process in range(processes):
        devices: Any = SimpleNamespace(process=process, processes=processes, replicas=replicas)
        datasets.append(ShardedDataset(numbered_batches(rows, batch_size), devices))
    lengths = set()
    for index in range(len(datasets[0])):
        parts = [dataset[index][0] for dataset in datasets]
        together = np.concatenate(parts)
        first, end = index * batch_size, min((index + 1) * batch_size, rows)
        assert together[: end - first].tolist() == list(range(first, end))
        assert len({len(part) for part in parts}) == 1 and len(together) % replicas == 0
        # The number of rows shows whether a batch is padded, see `ShardedModel`.
        assert (len(together) == batch_size) == (end - first == batch_size)
        lengths.add(len(together))
    assert len(lengths) <= 2


def test_epoch_with_replacement_may_have_fewer_rows_than_there_are() -> None:
    options = BatchOptions(seed=0, sampling_weights=np.ones(24), length=13)
    batches = Batches(np.arange(1, 25), np.arange(1, 25), 8, options)
    devices: Any = SimpleNamespace(process=0, processes=1, replicas=4)
    dataset = ShardedDataset(batches, devices)
    parts = [dataset[index][0].tolist() for index in range(len(dataset))]
    assert parts[0] + parts[1][: dataset.last] == (batches.order + 1).tolist()
    assert parts[1][dataset.last :] == [0] * 7 and len(parts) == 2  # 12 rows: 8 would be a batch without padding


def test_mirrored_strategy_trains_like_a_single_device(tmp_path: Path) -> None:
    models, results = [], []
    for name, devices in (("one", distributed.ONE), ("mirrored", Mirrored())):
        models.append(toy_training.dense())
        results.append(
            toy_training.fit(models[-1], toy_training.regression(5, seed=0), tmp_path / name, devices=devices)
        )
    for one, mirrored in zip(*(model.get_weights() for model in models), strict=True):
        assert mirrored == pytest.approx(one, abs=1e-6)
    assert results[1].history["loss"] == pytest.approx(results[0].history["loss"], rel=1e-5)


# ------------------------------------------------------------------------------------- connections between processes


@contextlib.contextmanager
def connect(processes: int = 2) -> Iterator[list[Peers]]:
    """Peers of all processes, here in threads of one process."""
    port, peers = free_ports(), dict[int, Peers]()

    def join(process: int) -> None:
        peers[process] = Peers("127.0.0.1", port, process, processes)

    threads = [threading.Thread(target=join, args=(process,)) for process in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    try:
        yield [peers[process] for process in range(processes)]
    finally:
        for peer in peers.values():
            peer.over.acquire(blocking=False)  # the end of the connections must not end this process
        for one in [one for peer in peers.values() for one in peer.connections.values()]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@pytest.fixture
def exit_codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Codes with which peers end their process; here the process goes on."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def wait_for(codes: list[int], count: int) -> None:
    deadline = time.monotonic() + 10
    while len(codes) < count and time.monotonic() < deadline:
        time.sleep(0.01)


def test_no_process_goes_on_before_all_are_there(exit_codes: list[int]) -> None:
    arrived = list[int]()

    def arrive(peer: Peers) -> None:
        arrived.append(peer.process)
        peer.wait()
        assert len(arrived) == 3

    with connect(3) as peers:
        threads = [threading.Thread(target=arrive, args=(peer,)) for peer in peers[:2]]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        assert len(arrived) == 2 and all(thread.is_alive() for thread in threads)
        arrive(peers[2])
        for thread in threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in threads)
        for peer in peers:
            peer.leave()
    assert exit_codes == []


@pytest.mark.parametrize("ended", [0, 1])
def test_end_of_a_process_ends_the_other_with_advice(
    ended: int, exit_codes: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    with connect() as peers:
        for one in peers[ended].connections.values():
            one.shutdown(socket.SHUT_RDWR)  # as the system does when a process dies
        wait_for(exit_codes, 2)
    assert exit_codes == [InputError.exit_code] * 2
    message = capfd.readouterr().err
    assert f"process {ended} of 2 has ended or cannot be reached\nProcess {1 - ended} stops too." in message
    assert "on all machines to resume from the last checkpoint" in message


def test_error_in_a_process_is_shown_by_all(exit_codes: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    with connect() as peers:
        peers[1].fail(InputError("no images"))
        wait_for(exit_codes, 2)
    assert exit_codes[:2] == [InputError.exit_code] * 2
    message = capfd.readouterr().err
    assert f"{Path(sys.argv[0]).name}: no images\n" in message  # process 0 may write first
    assert "process 1 of 2 has ended: no images\nProcess 0 stops too." in message


def greet(port: int, greeting: bytes) -> threading.Thread:
    """A process that joins with this greeting."""

    def join() -> None:
        with distributed.connect_when_ready("127.0.0.1", port) as connection, contextlib.suppress(OSError):
            connection.sendall(greeting)
            connection.recv(1)

    thread = threading.Thread(target=join)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (1, "process 1 was started with flags that differ from those of process 0"),
        (2, "process id 2 is used twice, or not below 2"),
        (0, "process id 0 is used twice, or not below 2"),
    ],
)
def test_process_with_other_flags_or_an_impossible_number_is_refused(number: int, message: str) -> None:
    port = free_ports()
    other = greet(port, number.to_bytes(4, "big") + bytes(32))
    with pytest.raises(InputError, match=message):
        Peers("127.0.0.1", port, 0, 2)
    other.join()


@pytest.mark.parametrize(("process", "message"), [(0, "1 of 2 processes connected"), (1, "process 0 does not answer")])
def test_processes_that_do_not_start_in_time_are_reported(
    process: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "START_TIMEOUT", 0.1)
    with pytest.raises(InputError, match=f"{message} at 127.0.0.1"):
        Peers("127.0.0.1", free_ports(), process, 2)


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
def pair(runs: list[Any], paused: int | None = None, pause_before: str = "") -> Iterator[list[subprocess.Popen]]:
    """Two processes of a distributed job on JAX, one of which may pause."""
    job = {f"{PREFIX}JOB_ADDRESSES": f"127.0.0.1:{free_ports()}", f"{PREFIX}NUM_PROCESSES": "2"}
    processes = []
    for number in range(2):
        pausing = {PAUSE_BEFORE: pause_before} if number == paused else {}
        environment = JAX | job | pausing | {f"{PREFIX}PROCESS_ID": str(number)}
        processes.append(subprocess_runs.start(runs, **environment))
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


def check_training(folder: Path, prefix: str = "") -> None:
    """Checks that `subprocess_runs.training` gave the same on all devices as on one; metrics only with this prefix."""
    assert distance(folder / "process0.npz", folder / "one_device.npz") < 2e-4
    history = json.loads((folder / "history.json").read_text())
    for name in [name for name in history["one_device"] if name.startswith(prefix)]:
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
    check_training(tmp_path, prefix="val_")  # the last batch, of one row, counts twice in the training metrics


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
def test_kill_of_a_process_ends_the_other_and_both_resume_to_the_weights_of_one_device(tmp_path: Path) -> None:
    runs = [COMPARABLE, ["training", tmp_path, 2]]
    for victim, epochs in ((0, 2), (1, 3)):
        with pair(runs, victim, f"state {epochs}") as processes:
            stdout = processes[victim].stdout
            assert stdout and any(PAUSED in line for line in stdout)
            time.sleep(1)  # the other process is in the middle of a step
            processes[victim].send_signal(signal.SIGKILL)
            killed = time.monotonic()
            _, message = processes[1 - victim].communicate(timeout=TIMEOUT)
            assert time.monotonic() - killed < distributed.CONNECTION_TIMEOUT
        assert processes[1 - victim].returncode == InputError.exit_code
        assert f"process {victim} of 2 has ended" in message
        assert "on all machines to resume from the last checkpoint" in message
        assert "Traceback" not in message and "stack trace" not in message
    with pair(runs) as processes:
        output, _ = (finish(process) for process in processes)
    assert output.count("val_auc") == EPOCHS - 3 + EPOCHS  # the last one of both, then all of one device
    check_training(tmp_path)
    assert distance(tmp_path / "process0.npz", tmp_path / "process1.npz") == 0
