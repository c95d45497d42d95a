"""The cache of decoded pictures, a run that is killed, and work in several processes, here and on a cluster."""

import contextlib
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from melanoma import images, isic, parallel, stages
from melanoma.errors import InputError
from melanoma.reading import NAME, Cache

import numpy as np
import pipeline
import pytest
from PIL import Image
from pipeline import array_bytes, places

COUNT = 100  # photographs of the slow source; after 64 the cache is saved


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs that take some 20 ms each to decode, so that a run can be hit in the middle; no masks, no sheet."""
    folder = tmp_path_factory.mktemp("slow")
    photographs = isic.image_folder(folder, "train")
    photographs.mkdir()
    labels = ["image_id,melanoma,seborrheic_keratosis"]
    for number in range(COUNT):
        name, noise = f"ISIC_{number:07d}", np.random.default_rng(number).integers(0, 256, (600, 800, 3), np.uint8)
        labels.append(f"{name},{float(number % 5 == 1)},{float(number % 5 == 2)}")
        Image.fromarray(noise).save(photographs / f"{name}.png", compress_level=1)
    isic.label_file(folder, "train").write_text("\n".join(labels) + "\n")
    return folder


def command(source: Path, folder: Path, *flags: str) -> list[str]:
    script = str(pipeline.ROOT / stages.PREPROCESSING)
    shared = ("--source", str(source), "--size", "128", "--copies", "4")
    return [sys.executable, "-u", script, *places(folder), *shared, *flags]


@pytest.fixture(scope="module")
def undisturbed(slow_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The arrays of a run in one process that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(command(slow_source, folder, "--jobs", "1"), check=True, capture_output=True)
    return array_bytes(folder)


def run_until(line: str, act: Callable[[subprocess.Popen[bytes]], None], log: Path, *words: str) -> tuple[int, str]:
    """Starts a command, acts once it has printed a line, and gives its exit code and output."""
    with log.open("wb") as stream:  # no pipe: orphaned workers would keep it open
        process = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT)
    while line not in (out := log.read_text()):
        assert process.poll() is None, out
        time.sleep(0.01)
    act(process)
    return process.wait(timeout=60), log.read_text()


@pytest.mark.parametrize(("line", "kept"), [(f"reading 70/{COUNT}", 64), ("train 22/", COUNT)])
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_killed_run_goes_on_where_it_was(
    line: str, kept: int, jobs: str, slow_source: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    words = command(slow_source, tmp_path, "--jobs", jobs)
    code, _ = run_until(line, subprocess.Popen.kill, tmp_path / "log", *words)
    assert code == -signal.SIGKILL
    assert not list((tmp_path / "data").glob("arrays/*.npy"))
    again = subprocess.run(words, check=True, capture_output=True, text=True)
    (before,) = [int(out.split()[0]) for out in again.stdout.splitlines() if out.endswith("were read before")]
    assert kept <= before <= COUNT
    assert array_bytes(tmp_path) == undisturbed
    assert not list((tmp_path / "data").glob("cache*"))


def test_two_processes_write_what_one_writes(slow_source: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    subprocess.run(command(slow_source, tmp_path, "--jobs", "2"), check=True, capture_output=True)
    assert array_bytes(tmp_path) == undisturbed


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the workers in /proc")


def is_worker(process: int) -> bool:
    try:
        return b"parallel.serve" in Path(f"/proc/{process}/cmdline").read_bytes()  # empty once it is dead
    except OSError:
        return False


def workers_of(run: int) -> list[int]:
    children = map(int, Path(f"/proc/{run}/task/{run}/children").read_text().split())
    return [child for child in children if is_worker(child)]


def kill_a_worker(run: int) -> None:
    os.kill(workers_of(run)[0], signal.SIGKILL)


@needs_proc
def test_killed_worker_is_replaced(slow_source: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    line = f"reading 20/{COUNT}"
    code, out = run_until(
        line,
        lambda process: kill_a_worker(process.pid),
        tmp_path / "log",
        *command(slow_source, tmp_path, "--jobs", "2"),
    )
    assert code == 0, out
    assert "a worker process died; its work is done again" in out
    assert array_bytes(tmp_path) == undisturbed


def double_after_a_death(task: tuple[int, Path]) -> int:
    number, marker = task
    if number == 17 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return double(number)


def test_work_of_a_worker_that_dies_is_done_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with parallel.Workers(2) as workers:
        results = list(
            workers.map(double_after_a_death, ((number, tmp_path / "died") for number in range(30)), block=10)
        )
    assert results == [double(number) for number in range(30)]
    assert "a worker process died; its work is done again" in caplog.messages


def much(number: int) -> tuple[int, bytes]:
    return number, bytes(10**6)


@needs_proc
def test_answer_that_a_worker_could_write_by_half_is_worked_out_again(caplog: pytest.LogCaptureFixture) -> None:
    with parallel.Workers(2) as workers:
        list(workers.map(much, range(2)))  # both have started
        results = workers.map(much, range(30))
        assert next(results) == much(0)
        time.sleep(0.5)  # the others' answers do not fit into their pipes
        kill_a_worker(os.getpid())
        assert list(results) == [much(number) for number in range(1, 30)]
    assert "a worker process died; its work is done again" in caplog.messages


def complain(number: int) -> None:
    raise InputError(f"number {number} is odd")


@pytest.mark.parametrize("jobs", [1, 2])
def test_error_of_the_work_is_raised(jobs: int) -> None:
    with parallel.Workers(jobs) as workers, pytest.raises(InputError, match="number 1 is odd"):
        list(workers.map(complain, [1, 1, 1]))


def test_workers_are_of_use_after_results_that_nobody_took() -> None:
    with parallel.Workers(2) as workers:
        list(workers.map(much, range(2)))  # both have started
        assert next(workers.map(much, range(30))) == much(0)
        assert list(workers.map(double, range(6))) == [double(number) for number in range(6)]


@needs_proc
def test_workers_end_with_the_run(slow_source: Path, tmp_path: Path) -> None:
    found: list[int] = []

    def kill(process: subprocess.Popen[bytes]) -> None:
        found.extend(workers_of(process.pid))
        process.kill()

    run_until("reading 20/", kill, tmp_path / "log", *command(slow_source, tmp_path, "--jobs", "2"))
    assert len(found) == 2
    deadline = time.monotonic() + 10
    while any(map(is_worker, found)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_die_again_and_again_end_the_run() -> None:
    with parallel.Workers(2) as workers, pytest.raises(InputError, match=r"died 3 times over [0-3]; is there"):
        list(workers.map(die, range(4)))


def double(number: int) -> int:
    return 2 * number


def double_slowly(number: int) -> int:
    time.sleep(number)
    return double(number)


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_come_in_order_and_the_items_in_blocks(jobs: int) -> None:
    asked = []

    def items() -> Iterator[int]:
        for number in range(25):
            asked.append(number)
            yield number

    with parallel.Workers(jobs) as workers:
        results = workers.map(double, items(), block=10)
        assert next(results) == 0 and len(asked) == 10
        assert list(results) == [2 * number for number in range(1, 25)]


# ------------------------------------------------------------------------------------------------------------ cluster


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def cluster(workers: int, failures: int = 3) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A Dask scheduler and its workers on loopback: their address, and the processes, the scheduler's first."""
    address = f"tcp://127.0.0.1:{free_port()}"
    dask = (sys.executable, "-m", "dask")
    host, port = address.removeprefix("tcp://").split(":")
    scheduler = (*dask, "scheduler", "--host", host, "--port", port, "--no-dashboard")
    worker = (*dask, "worker", address, "--no-nanny", "--nthreads", "1", "--no-dashboard")
    environment = os.environ | {
        "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": str(failures),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    with contextlib.ExitStack() as stack:
        processes = []
        for words in (scheduler, *[worker] * workers):
            process = subprocess.Popen(
                words, cwd=pipeline.ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        yield address, processes


def test_cluster_that_loses_a_worker_writes_what_one_process_writes(
    slow_source: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    import distributed

    with cluster(2) as (address, (_, *workers)):
        with distributed.Client(address, timeout=60) as client:
            client.wait_for_workers(2, timeout=60)
        words = command(slow_source, tmp_path, "--cluster", address)
        code, out = run_until(f"reading 50/{COUNT}", lambda _: workers[0].kill(), tmp_path / "log", *words)
        assert code == 0, out
        assert workers[0].wait() == -signal.SIGKILL and workers[1].poll() is None
    assert array_bytes(tmp_path) == undisturbed


def process_id(_: int) -> int:
    return os.getpid()


def test_work_is_done_on_the_cluster() -> None:
    with cluster(1) as (address, (_, worker)), parallel.Workers(None, address) as workers:
        assert set(workers.map(process_id, range(5), block=2)) == {worker.pid}


def test_work_that_kills_the_workers_of_a_cluster_ends_the_run() -> None:
    with (
        cluster(2, failures=0) as (address, _),
        parallel.Workers(None, address) as workers,
        pytest.raises(InputError, match=f"--cluster {address}: workers die over the same work"),
    ):
        list(workers.map(die, range(1)))


def test_cluster_without_workers_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(1) as (address, _), parallel.Workers(None, address) as workers:
        monkeypatch.setattr(parallel, "PATIENCE", 1)
        with pytest.raises(InputError, match=f"--cluster {address}: its last worker is gone"):
            list(workers.map(die, range(2)))


def test_scheduler_that_is_gone_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "PATIENCE", 5)
    with cluster(1) as (address, (scheduler, _)), parallel.Workers(None, address) as workers:
        results = workers.map(double, range(1))
        assert next(results) == 0
        results = workers.map(double_slowly, range(4))
        assert next(results) == 0
        scheduler.kill()
        with pytest.raises(InputError, match=f"--cluster {address}: the scheduler is gone"):
            list(results)


@pytest.fixture
def no_client_left() -> None:
    """Collects Dask clients that could not start: they close as they go, which blocks within the start of another."""
    gc.collect()


@pytest.mark.usefixtures("no_client_left")
@pytest.mark.parametrize("address", ["tls://127.0.0.1:1", "nonsense"])
def test_address_that_is_none_is_told(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "PATIENCE", 1)
    with pytest.raises(InputError, match=f"--cluster {address}: no scheduler"), parallel.Workers(None, address):
        pass


@pytest.mark.usefixtures("no_client_left")
def test_cluster_that_does_not_answer_is_told(
    slow_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "PATIENCE", 1)
    with pytest.raises(InputError, match=r"--cluster tcp://127\.0\.0\.1:\d+: no scheduler with workers answers"):
        pipeline.run(
            stages.PREPROCESSING,
            tmp_path,
            "--source",
            str(slow_source),
            "--cluster",
            f"tcp://127.0.0.1:{free_port()}",
        )


def test_cluster_without_dask_names_the_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"pip install -r requirements-cluster\.txt"), parallel.Workers(1, "tcp://x:1"):
        pass


def test_jobs_and_cluster_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pipeline.parser(stages.PREPROCESSING).parse_args(["--jobs", "2", "--cluster", "tcp://x:1"])
    assert "not allowed with" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def records(own_source: Path) -> list[isic.Record]:
    return isic.read_split(own_source, "val")


def decoded(data: Path, records: list[isic.Record], monkeypatch: pytest.MonkeyPatch, size: int = 32) -> int:
    """How many pictures a run decodes; every one in the cache is then as from a direct decoding."""
    count, read = 0, images.read

    def counting(task: tuple[Path, Path | None, int]) -> images.Pair | str:
        nonlocal count
        count += 1
        return read(task)

    with monkeypatch.context() as patch, Cache(data, size) as cache, parallel.Workers(1) as workers:
        patch.setattr(images, "read", counting)
        cache.read(records, workers)
        for record in records:
            pair = images.read_pair(record.image, record.mask, size)
            image, mask = cache.pixels(record)
            assert np.array_equal(image, pair.image)
            if pair.mask is None or mask is None:
                assert pair.mask is mask
            else:
                assert np.array_equal(mask, pair.mask)
            assert np.array_equal(cache.thumbnail(record), pair.thumbnail)
            assert cache.facts[record].size == pair.size and cache.facts[record].notes == pair.notes
    return count


def test_picture_is_decoded_again_only_when_its_file_changed(
    records: list[isic.Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert decoded(tmp_path, records, monkeypatch) == len(records)
    assert decoded(tmp_path, records, monkeypatch) == 0
    shutil.copyfile(records[1].image, records[0].image)
    assert decoded(tmp_path, records, monkeypatch) == 1
    without_mask = isic.Record(records[2].id, records[2].image, None, None)
    assert decoded(tmp_path, [without_mask], monkeypatch) == 1


def test_cache_of_another_size_or_decoder_is_not_used(
    records: list[isic.Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded(tmp_path, records, monkeypatch)
    assert decoded(tmp_path, records, monkeypatch, size=16) == len(records)
    monkeypatch.setattr("melanoma.reading.version", lambda _: "0.0")
    assert decoded(tmp_path, records, monkeypatch, size=16) == len(records)


@pytest.mark.parametrize("damage", [b"no database at all" * 100, b""])
def test_damaged_cache_is_begun_anew(
    damage: bytes, records: list[isic.Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded(tmp_path, records, monkeypatch)
    (tmp_path / NAME).write_bytes(damage)
    assert decoded(tmp_path, records, monkeypatch) == len(records)


@pytest.mark.parametrize("place", [1, 3, 6, 10])
def test_cache_damaged_within_is_begun_anew(
    place: int, records: list[isic.Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded(tmp_path, records, monkeypatch, size=256)
    with (tmp_path / NAME).open("r+b") as stream:
        stream.seek(place << 16)
        stream.write(b"\xff" * (1 << 16))
    assert decoded(tmp_path, records, monkeypatch, size=256) == len(records)


def test_file_that_changes_while_it_is_read_is_decoded_again(
    records: list[isic.Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = images.read

    def changing(task: tuple[Path, Path | None, int]) -> images.Pair | str:
        pair = read(task)
        if task[0] == records[0].image:
            shutil.copyfile(records[1].image, records[0].image)
        return pair

    with monkeypatch.context() as patch, Cache(tmp_path, 32) as cache, parallel.Workers(1) as workers:
        patch.setattr(images, "read", changing)
        cache.read(records, workers)
        assert cache.pixels(records[0])[0].shape == (32, 32, 3)
    assert decoded(tmp_path, records, monkeypatch) == 1


def test_link_to_nowhere_is_a_problem(records: list[isic.Record], tmp_path: Path) -> None:
    records[0].image.unlink()
    records[0].image.symlink_to(tmp_path / "nowhere.jpg")
    with Cache(tmp_path, 32) as cache, parallel.Workers(1) as workers:
        cache.read(records, workers)
    assert cache.problems == {records[0]: f"{records[0].image}: No such file or directory"}


def test_second_run_in_a_folder_refuses(records: list[isic.Record], tmp_path: Path) -> None:
    with (
        Cache(tmp_path, 32),
        pytest.raises(InputError, match="another run is at work in this folder"),
        Cache(tmp_path, 32),
    ):
        pass


def test_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    with pytest.raises(InputError, match=NAME), Cache(tmp_path, 32):
        pass
