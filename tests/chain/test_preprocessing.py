"""The first script: what it reports and records; that a killed run, more processes or a cluster change no array."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from melanoma.artifacts import contract
from melanoma.classes import SPLITS
from melanoma.dataset import decode
from melanoma.dataset.splits import are_original
from melanoma.sources.layouts import challenge_2017
from melanoma.sources.records import SYNTHETIC_MARKER

import dask_cluster
import numpy as np
import pipeline
import psutil
import pytest
from PIL import Image
from pipeline import array_bytes, exit_code, places, reader

pytestmark = pytest.mark.usefixtures("logging_restored")


@pytest.fixture(scope="module")
def preprocessed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the first script has run in one process; read only."""
    folder = tmp_path_factory.mktemp("preprocessed")
    pipeline.preprocess(source, folder)
    return folder


@pytest.fixture
def preprocess(own_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int | str | None]:
    """Runs the first script on `own_source` as from a shell and returns its exit code."""
    flags = (*places(tmp_path), "--source", str(own_source), "--size", str(pipeline.SIZE), "--jobs", "1")
    return lambda *more: exit_code(monkeypatch, contract.PREPROCESSING, *flags, *more)


def test_check_reports_and_writes_no_arrays(
    preprocess: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert preprocess("--check") == 0
    out = capsys.readouterr().out
    assert not (tmp_path / "data" / "arrays").exists()
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for line in ("images 24 12 12", "lesion masks 24 12 12", "rejected 0 0 0", "usable 24 12 12"):
        assert line in lines
    assert "image sizes: 88x66 (48)" in lines
    monkeypatch.setattr(decode, "read", lambda *_: pytest.fail("read again"))
    assert preprocess() == 0
    assert "48 images were read by an earlier run" in capsys.readouterr().out
    assert not list((tmp_path / "data").glob("decoded*"))


def test_source_without_images_names_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, problem in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "no images found")):
        flags = (*places(tmp_path), "--source", str(folder))
        assert exit_code(monkeypatch, contract.PREPROCESSING, *flags) == 2
        error = capsys.readouterr().err
        assert f"{folder}: {problem}" in error and f"python download_data.py --out {folder}" in error


def test_truncated_image_stops_the_run_or_is_left_out(
    own_source: Path,
    preprocess: Callable[..., int],
    preprocessed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = array_bytes(pipeline.copy(preprocessed, tmp_path))
    record = pipeline.records(own_source, "train")[5]
    record.image.write_bytes(record.image.read_bytes()[:1500])
    assert preprocess("--copies", "1") == 2
    assert f"1 images cannot be used: {record.id}." in capsys.readouterr().err
    assert array_bytes(tmp_path) == before
    assert preprocess("--copies", "1", "--skip-bad") == 0
    ids, source = (reader(preprocessed).load(name, split="train") for name in ("ids", "source"))
    rows = np.flatnonzero(are_original(source) & (ids != record.id))
    for name in ("ids", "images", "masks", "labels"):
        found, expected = (reader(folder).load(name, split="train") for folder in (tmp_path, preprocessed))
        assert np.array_equal(found, expected[rows])


def test_duplicates_are_left_out_or_kept_and_drawn(
    own_source: Path, preprocess: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    duplicate, original = (pipeline.records(own_source, split)[0] for split in ("train", "val"))
    shutil.copyfile(original.image, duplicate.image)
    assert preprocess("--copies", "1", "--strict") == 2
    assert f"{duplicate.id} = {original.id} (val)" in capsys.readouterr().err
    for flags, kept in (((), False), (("--keep-duplicates",), True)):
        assert preprocess("--copies", "1", *flags) == 0
        assert (duplicate.id in reader(tmp_path).load("ids", split="train")) == kept
    with Image.open(tmp_path / "graphics" / "duplicates.png") as figure:
        assert min(figure.size) > 200


def test_published_duplicates_are_left_out_of_the_official_train_split_only(
    own_source: Path, preprocess: Callable[..., int], tmp_path: Path
) -> None:
    name, record = min(challenge_2017.KNOWN_DUPLICATES), pipeline.records(own_source, "train")[0]
    assert record.mask
    record.image.rename(record.image.with_stem(name))
    record.mask.rename(record.mask.with_stem(f"{name}_segmentation"))
    labels = challenge_2017.label_file(own_source, "train")
    labels.write_text(labels.read_text().replace(record.id, name))
    for flags, kept in (((), False), (("--split", "2018"), True)):
        assert preprocess("--copies", "1", *flags) == 0
        assert any(name in reader(tmp_path).load("ids", split=split) for split in SPLITS) == kept


def test_labels_of_images_beyond_the_limit_cause_no_warning(preprocess: Callable[..., int]) -> None:
    assert preprocess("--limit", "3", "--strict", "--check") == 0


def test_too_little_memory_is_reported(preprocess: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert preprocess("--size", str(10**8), "--limit", "1") == 2
    assert "not enough memory for these settings" in capsys.readouterr().err


@pytest.mark.parametrize("synthetic", [True, False])
def test_manifest_says_whether_the_images_are_synthetic(
    synthetic: bool, own_source: Path, preprocess: Callable[..., int], tmp_path: Path
) -> None:
    if not synthetic:
        (own_source / SYNTHETIC_MARKER).unlink()
    assert preprocess("--limit", "2") == 0
    for name in ("ids", "images", "masks", "labels"):
        assert reader(tmp_path).written_with(name, split="train")["synthetic"] is synthetic


def test_jobs_and_cluster_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pipeline.parser(contract.PREPROCESSING).parse_args(["--jobs", "2", "--cluster", "tcp://x:1"])
    assert "not allowed with" in capsys.readouterr().err


def test_script_does_not_import_keras() -> None:  # which would take seconds and hundreds of megabytes
    code = "import sys, segmentation_01_preprocessing; sys.exit('keras' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=pipeline.ROOT).returncode == 0


def test_two_processes_write_the_same_arrays_as_one(source: Path, preprocessed: Path, tmp_path: Path) -> None:
    pipeline.preprocess(source, tmp_path, "--jobs", "2")
    assert array_bytes(tmp_path) == array_bytes(preprocessed)


# -------------------------------------------------------------------------------------------------- killed processes

COUNT = 100  # images; after 64 the cache is committed


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that take about 20 ms each to decode, so that a run can be killed in the middle; no masks."""
    folder = tmp_path_factory.mktemp("slow")
    images = challenge_2017.image_folder(folder, "train")
    images.mkdir()
    labels = ["image_id,melanoma,seborrheic_keratosis"]
    for number in range(COUNT):
        name, noise = f"ISIC_{number:07d}", np.random.default_rng(number).integers(0, 256, (600, 800, 3), np.uint8)
        labels.append(f"{name},{float(number % 5 == 1)},{float(number % 5 == 2)}")
        Image.fromarray(noise).save(images / f"{name}.png", compress_level=1)
    challenge_2017.label_file(folder, "train").write_text("\n".join(labels) + "\n")
    return folder


def command(source: Path, folder: Path, *flags: str) -> list[str]:
    script = str(pipeline.ROOT / contract.PREPROCESSING)
    shared = ("--source", str(source), "--size", "128", "--copies", "4")
    return [sys.executable, "-u", script, *places(folder), *shared, *flags]


@pytest.fixture(scope="module")
def undisturbed(slow_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The arrays of an undisturbed run in one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(command(slow_source, folder, "--jobs", "1"), check=True, capture_output=True)
    return array_bytes(folder)


def run_until(line: str, act: Callable[[subprocess.Popen[bytes]], None], log: Path, *command: str) -> tuple[int, str]:
    """Starts a command, acts once it has printed a line, and returns its exit code and output."""
    with log.open("wb") as stream:  # not a pipe, which orphaned workers would keep open
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    while line not in (out := log.read_text()):
        assert process.poll() is None, out
        time.sleep(0.01)
    act(process)
    return process.wait(timeout=60), log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("line", "kept"), [(f"reading 70/{COUNT}", 69), ("train 22/", COUNT)])
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_killed_run_resumes(
    line: str, kept: int, jobs: str, slow_source: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    same = command(slow_source, tmp_path, "--jobs", jobs)
    code, _ = run_until(line, subprocess.Popen.kill, tmp_path / "log", *same)
    assert code == -signal.SIGKILL
    assert not list((tmp_path / "data").glob("arrays/*.npy"))
    again = subprocess.run(same, check=True, capture_output=True, text=True)
    (before,) = [
        int(out.split()[0]) for out in again.stdout.splitlines() if out.endswith("were read by an earlier run")
    ]
    assert kept <= before <= COUNT
    assert array_bytes(tmp_path) == undisturbed
    assert not list((tmp_path / "data").glob("decoded*"))


def kill_a_worker(process: subprocess.Popen[bytes]) -> None:
    servers = psutil.Process(process.pid).children()
    workers = [worker for server in servers for worker in server.children()]
    workers[0].kill()


@pytest.mark.slow
def test_killed_worker_is_replaced(slow_source: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    both = command(slow_source, tmp_path, "--jobs", "2")
    code, out = run_until(f"reading 20/{COUNT}", kill_a_worker, tmp_path / "log", *both)
    assert code == 0, out
    assert "a worker process died; what it did is done again" in out
    assert array_bytes(tmp_path) == undisturbed


@pytest.mark.slow
def test_cluster_that_loses_a_worker_writes_the_same_arrays(
    slow_source: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    import distributed

    with dask_cluster.start(2) as cluster:
        with distributed.Client(cluster.address, timeout=60) as client:
            client.wait_for_workers(2, timeout=60)
        first, second = cluster.workers
        on_cluster = command(slow_source, tmp_path, "--cluster", cluster.address)
        code, out = run_until(f"reading 50/{COUNT}", lambda _: first.kill(), tmp_path / "log", *on_cluster)
        assert code == 0, out
        assert first.wait() == -signal.SIGKILL and second.poll() is None
    assert array_bytes(tmp_path) == undisturbed
