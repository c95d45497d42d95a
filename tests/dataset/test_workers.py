"""Functions in several processes and on a Dask cluster, also when processes die."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from melanoma.dataset import workers as module
from melanoma.dataset.workers import Workers
from melanoma.errors import InputError

import dask_cluster
import pytest

REPEATED = "a worker process died; what it did is done again"


# Functions for the workers, which import this module.


def double(number: int) -> int:
    return 2 * number


def double_slowly(number: int) -> int:
    time.sleep(number)
    return double(number)


def double_or_die_once(task: tuple[int, Path]) -> int:
    number, marker = task
    if number == 17 and not marker.exists():
        marker.touch()
        die(number)
    return double(number)


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def megabyte(number: int) -> tuple[int, bytes]:
    """More than fits into a pipe."""
    return number, bytes(10**6)


def refuse(number: int) -> None:
    raise InputError(f"number {number} is odd")


def process_id(_: int) -> int:
    return os.getpid()


# ----------------------------------------------------------------------------------------------------- on this machine


@pytest.mark.parametrize(("jobs", "threads", "ahead"), [(1, False, 1), (2, False, 12), (2, True, 12)])
def test_results_come_in_order_and_few_items_are_read_ahead(
    jobs: int, threads: bool, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    monkeypatch.setattr(module, "AHEAD", 3)
    read = []

    def items() -> Iterator[int]:
        for number in range(25):
            read.append(number)
            yield number

    with Workers(jobs, threads=threads) as workers:
        results = workers.map(double, items())
        assert next(results) == 0 and len(read) == ahead
        assert list(results) == [2 * number for number in range(1, 25)]


@pytest.mark.parametrize("jobs", [1, 2])
def test_error_of_the_function_is_raised(jobs: int) -> None:
    with Workers(jobs) as workers, pytest.raises(InputError, match="number 1 is odd"):
        list(workers.map(refuse, [1, 1, 1]))


def test_item_of_a_worker_that_dies_is_processed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Workers(2) as workers:
        tasks = ((number, tmp_path / "died") for number in range(30))
        results = list(workers.map(double_or_die_once, tasks))
    assert results == [double(number) for number in range(30)]
    assert REPEATED in caplog.messages


def test_process_may_die_at_any_time(caplog: pytest.LogCaptureFixture) -> None:
    with Workers(2) as workers:
        processes = set(workers.map(process_id, range(50)))
        results = workers.map(megabyte, range(100))
        assert next(results) == megabyte(0)
        for process in processes:
            os.kill(process, signal.SIGKILL)
        assert list(results) == [megabyte(number) for number in range(1, 100)]
    assert REPEATED in caplog.messages
    assert not Path(workers.folder).exists()


def test_processes_that_died_between_two_tasks_are_replaced() -> None:
    with Workers(2) as workers:
        for process in set(workers.map(process_id, range(50))):
            os.kill(process, signal.SIGKILL)
        time.sleep(0.5)
        assert list(workers.map(double, range(6))) == [double(number) for number in range(6)]


def test_workers_can_be_used_after_results_that_nobody_read() -> None:
    with Workers(2) as workers:
        list(workers.map(megabyte, range(2)))  # both have started
        assert next(workers.map(megabyte, range(30))) == megabyte(0)
        assert list(workers.map(double, range(6))) == [double(number) for number in range(6)]


def test_workers_that_die_repeatedly_stop_the_run() -> None:
    with (
        Workers(2) as workers,
        pytest.raises(InputError, match=r"died 3 times on 0; probably too little memory"),
    ):
        list(workers.map(die, range(4)))


STARTS_TWO = """
import os, time
from melanoma.dataset.workers import Workers
from test_workers import process_id
with Workers(2) as workers:
    print(*set(workers.map(process_id, range(50))), flush=True)
    time.sleep(60)
"""


def is_running(process: int) -> bool:
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())  # empty once it is dead
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/cmdline").is_file(), reason="looks for the workers in /proc")
def test_workers_end_with_a_killed_process() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", STARTS_TWO]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        found = [int(number) for number in process.stdout.readline().split()]
        assert found and all(map(is_running, found))
        process.kill()
    deadline = time.monotonic() + 10
    while any(map(is_running, found)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# -------------------------------------------------------------------------------------------------------- on a cluster


@pytest.mark.slow
def test_items_are_processed_on_the_cluster() -> None:
    with dask_cluster.start(1) as cluster, Workers(None, cluster.address) as workers:
        assert set(workers.map(process_id, range(5))) == {cluster.workers[0].pid}


@pytest.mark.slow
def test_item_that_kills_the_workers_of_a_cluster_stops_the_run() -> None:
    with (
        dask_cluster.start(2, allowed_failures=0) as cluster,
        Workers(None, cluster.address) as workers,
        pytest.raises(InputError, match=f"--cluster {cluster.address}: workers keep dying on the same item"),
    ):
        list(workers.map(die, range(1)))


@pytest.mark.slow
def test_cluster_whose_last_worker_dies_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with dask_cluster.start(1) as cluster, Workers(None, cluster.address) as workers:
        monkeypatch.setattr(module, "CLUSTER_TIMEOUT", 1)
        with pytest.raises(InputError, match=f"--cluster {cluster.address}: the last worker is gone"):
            list(workers.map(die, range(2)))


@pytest.mark.slow
def test_cluster_whose_scheduler_dies_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLUSTER_TIMEOUT", 5)
    monkeypatch.setattr(module, "CHUNK", 1)
    with dask_cluster.start(1) as cluster, Workers(None, cluster.address) as workers:
        assert list(workers.map(double, range(1))) == [0]
        results = workers.map(double_slowly, range(4))
        assert next(results) == 0
        cluster.scheduler.kill()
        with pytest.raises(InputError, match=f"--cluster {cluster.address}: the scheduler is gone"):
            list(results)


@pytest.fixture
def no_client_left() -> None:
    """Collects Dask clients that could not start: collecting them during the start of another one would block."""
    gc.collect()


@pytest.mark.usefixtures("no_client_left")
@pytest.mark.parametrize("address", ["tls://127.0.0.1:1", "nonsense", "unused port"])
def test_address_without_a_scheduler_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLUSTER_TIMEOUT", 1)
    if address == "unused port":
        address = f"tcp://127.0.0.1:{dask_cluster.free_port()}"
    with pytest.raises(InputError, match=f"--cluster {address}: no scheduler"), Workers(None, address):
        pass


def test_cluster_without_dask_names_the_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"pip install -r requirements/cluster\.txt"), Workers(1, "tcp://x:1"):
        pass
