"""Bad files and broken machines, provoked: what each script says, what it exits with, and what it leaves."""

import argparse
import contextlib
import os
import pickle
import resource
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from melanoma import backbones, command, hardware, plots, runs, stages
from melanoma.errors import InputError

import keras
import numpy as np
import pipeline
import pytest
from matplotlib.figure import Figure
from pipeline import array_bytes, exit_code, places, reader

pytestmark = pytest.mark.usefixtures("logging_restored")

SMALL_SEGNET = ("--network", "segnet", "--network-size", str(pipeline.SIZE), "--epochs", "1", "--no-turns")
SMALL_CLASSIFIER = ("--backbone", pipeline.BACKBONE, "--weights", "none", "--train", "head", "--epochs", "1")
FLAGS = {stages.SEGNET: SMALL_SEGNET, stages.CLASSIFIER: SMALL_CLASSIFIER}
FREE = 64 << 10  # bytes left on a full disk: enough for the smallest files alone


def plainly(error: str) -> bool:
    """Whether what stands on the standard error is one line for a user."""
    return "Traceback" not in error and len(error.splitlines()) == 1


# ------------------------------------------------------------------------------------------------- arrays of the chain


@pytest.mark.parametrize(
    ("script", "name"),
    [
        (stages.SEGNET, "images"),
        (stages.MASKING, "predicted"),
        (stages.CLASSIFIER, "masked"),
        (stages.EVALUATION, "probabilities"),
    ],
)
@pytest.mark.parametrize("fault", ["cut off", "objects"])
def test_array_that_is_cut_off_or_holds_objects_names_its_writer(
    script: str,
    name: str,
    fault: str,
    own_chain: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, sprung = reader(own_chain).path(name, split="val"), own_chain / "sprung"
    if fault == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        np.save(path, np.array([pipeline.Trap(sprung)], dtype=object), allow_pickle=True)
        pipeline.rewrite_entry(own_chain / "data", path)
    before = array_bytes(own_chain)
    assert exit_code(monkeypatch, script, *places(own_chain), *FLAGS.get(script, ())) == 3
    error = capsys.readouterr().err
    assert f"run {stages.FILES[name].writer} again" in error and plainly(error)
    assert not sprung.exists() and array_bytes(own_chain) == before


@pytest.mark.parametrize(
    ("script", "name", "flags"),
    [(stages.CLASSIFIER, "features", SMALL_CLASSIFIER), (stages.EVALUATION, "probabilities", ())],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_array_of_no_numbers_is_refused_though_the_manifest_agrees(
    script: str,
    name: str,
    flags: tuple[str, ...],
    value: float,
    own_chain: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = reader(own_chain).path(name, split="val", backbone=pipeline.BACKBONE)
    array = np.load(path)
    array[3, 1] = value
    np.save(path, array)
    pipeline.rewrite_entry(own_chain / "data", path)
    assert exit_code(monkeypatch, script, *places(own_chain), *flags) == 2
    error = capsys.readouterr().err
    assert f"found {'nan' if np.isnan(value) else '0'}" in error and f"delete it and run {stages.CLASSIFIER}" in error


# ---------------------------------------------------------------------------------------------------- disk and folders


def mount(folder: Path, options: str) -> None:
    """Mounts a file system in memory, or skips the test where the machine does not let it."""
    folder.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 200 MB."""
    folder = tmp_path / "disk"
    mount(folder, "size=200m")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Leaves FREE bytes on a disk."""
    state = os.statvfs(disk)
    with (disk / "filler").open("wb") as stream:
        stream.write(bytes(state.f_bavail * state.f_frsize - FREE))


@pytest.fixture(params=["full disk", "limit of file sizes"])
def no_room(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A folder, and what takes the room there away."""
    if request.param == "full disk":
        disk = request.getfixturevalue("disk")
        yield disk, lambda: fill(disk)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield tmp_path, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (FREE, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def dense(units: int) -> keras.Model:
    inputs = keras.Input((units,))
    return keras.Model(inputs, keras.layers.Dense(units)(inputs))


def write_array(store: stages.Store, size: int) -> None:
    store.save("images", np.full((12, size, size, 3), 200, np.uint8), split="val")


def write_weights(store: stages.Store, size: int) -> None:
    store.save_weights("segnet_weights", dense(size), member="")


def write_settings(store: stages.Store, size: int) -> None:
    store.save_json("segnet_settings", {"text": "x" * size**2})


def write_picture(store: stages.Store, size: int) -> None:
    figure = Figure(figsize=(size / 100, size / 100))
    figure.figimage(np.random.default_rng(0).random((size, size)))
    plots.save(figure, store.data / "arrays.png", dpi=100)


@pytest.mark.parametrize("write", [write_array, write_weights, write_settings, write_picture])
def test_full_disk_leaves_the_old_file_whole(
    write: Callable[[stages.Store, int], None], no_room: tuple[Path, Callable[[], None]]
) -> None:
    folder, take_room = no_room
    store = stages.Store(folder, stages.SEGNET, {})
    write(store, 24)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    take_room()
    with pytest.raises(OSError, match=r"No space left on device|File too large") as caught:
        write(store, 500)
    assert caught.value.errno in command.DISK_ERRORS
    (path,) = (path for path in before if path.name != "manifest.json")
    assert caught.value.filename == str(path)
    assert {path: path.read_bytes() for path in before} == before
    assert pipeline.hidden(folder) == []


@pytest.mark.parametrize("script", pipeline.SCRIPTS)
def test_script_that_meets_a_full_disk_says_so(
    script: str,
    finished: Path,
    source: Path,
    disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipeline.copy(finished, disk)
    before = {path: path.read_bytes() for path in (disk / "data").glob("*/*")}
    fill(disk)
    flags = {stages.PREPROCESSING: ("--source", str(source), "--size", str(pipeline.SIZE), "--jobs", "1")} | FLAGS
    graphics = ("--graphics", str(disk / "new"))  # where no old pictures make room for new ones
    assert exit_code(monkeypatch, script, *places(disk), *flags.get(script, ()), *graphics) == 2
    error = capsys.readouterr().err
    assert str(disk) in error and ("No space left on device" in error or "disk is full" in error) and plainly(error)
    assert {path: path.read_bytes() for path in before} == before
    assert pipeline.hidden(disk) == []


def test_process_that_met_a_full_disk_ends_in_peace(disk: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from melanoma import stages; import test_faults as faults\n"
        "store = stages.Store(Path(sys.argv[1]), stages.SEGNET, {}); faults.fill(store.data)\n"
        "try: faults.write_weights(store, 500)\n"
        "except OSError: print('full')"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", code, str(disk)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "full\n")
    assert "Traceback" not in done.stderr


def under_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "in"


def read_only(folder: Path) -> Path:
    disk = folder / "read-only"
    mount(disk, "size=1m,ro")
    return disk


def forbidden(folder: Path) -> Path:
    if not os.geteuid():
        pytest.skip("root may write anywhere")
    closed = folder / "closed"
    closed.mkdir(mode=0o500)
    return closed / "in"


@pytest.mark.parametrize("place", [under_a_file, read_only, forbidden])
@pytest.mark.parametrize("flag", ["--data", "--graphics"])
@pytest.mark.parametrize("script", pipeline.SCRIPTS)
def test_folder_that_cannot_be_written_is_told_before_any_work(
    script: str,
    flag: str,
    place: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(_: argparse.Namespace) -> None:
        raise AssertionError("it has begun")

    folder = place(tmp_path)
    monkeypatch.setattr(pipeline.module(script), "main", work)
    try:
        assert exit_code(monkeypatch, script, *places(tmp_path), flag, str(folder)) == 2
        error = capsys.readouterr().err
        assert "nothing can be written there" in error and plainly(error)
        assert not (tmp_path / "data").exists() and not (tmp_path / "graphics").exists()
    finally:
        if place is read_only:
            subprocess.run(["umount", "-l", str(folder)], check=True)


# ------------------------------------------------------------------------------------------------------------ two runs


@pytest.mark.parametrize("script", pipeline.SCRIPTS)
def test_second_run_in_a_folder_is_refused(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with runs.alone(tmp_path / "data"):
        assert exit_code(monkeypatch, script, *places(tmp_path)) == 2
    error = capsys.readouterr().err
    assert f"process {os.getpid()} on " in error and "wait until it ends" in error and plainly(error)
    assert list(tmp_path.iterdir()) == []
    assert exit_code(monkeypatch, script, *places(tmp_path)) in (2, 3)  # for want of photographs or arrays
    assert "another run" not in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "worked"), [(["--distribute"], True), ([], False)])
def test_members_of_a_distributed_job_alone_take_no_lock(
    flags: list[str], worked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [stages.SEGNET, *places(tmp_path), *flags])
    monkeypatch.setenv(f"{runs.PREFIX}PROCESS_ID", "1")
    done: list[argparse.Namespace] = []
    with runs.alone(tmp_path / "data"), contextlib.nullcontext() if worked else pytest.raises(SystemExit):
        command.run(pipeline.parser(stages.SEGNET), done.append)
    assert bool(done) == worked


HOLDER = """
import sys, time
from pathlib import Path
from melanoma import parallel, runs
with runs.alone(Path(sys.argv[1])):
    worker = parallel.Worker()
    worker.connection.send((time.sleep, 60))
    print(worker.process.pid, flush=True)
    time.sleep(60)
"""


def test_lock_goes_with_a_killed_run_though_a_worker_outlives_it(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(pipeline.ROOT)}
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    with first:
        assert first.stdout
        worker = int(first.stdout.readline())
        try:
            with pytest.raises(InputError, match=f"process {first.pid} on "), runs.alone(tmp_path):
                pass
            first.kill()
            first.wait()
            os.kill(worker, 0)  # it is alive
            with runs.alone(tmp_path):
                assert f"process {os.getpid()} " in (tmp_path / runs.LOCK).read_text()
            assert list(tmp_path.iterdir()) == []
        finally:
            os.kill(worker, signal.SIGKILL)


CONTENDER = """
import sys, time
from pathlib import Path
from melanoma import errors, runs
folder, end = Path(sys.argv[1]), time.monotonic() + 2
while time.monotonic() < end:
    try:
        with runs.alone(folder):
            (folder / "inside").touch(exist_ok=False)
            (folder / "inside").unlink()
    except errors.InputError:
        pass
"""


def test_no_two_runs_ever_get_in(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(pipeline.ROOT)}
    words = [sys.executable, "-c", CONTENDER, str(tmp_path)]
    contenders = [subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [contender.communicate()[1] for contender in contenders] == [""] * 4


# ------------------------------------------------------------------------------------------------------------- weights


def mobilenet(weights: Path) -> keras.Model:
    return backbones.build(pipeline.BACKBONE, pipeline.SIZE, str(weights), pooling="avg")


def model_with_code(marker: Path) -> keras.Model:
    """A model whose code, wherever it runs, makes a file."""
    touch = eval(f"lambda x: (__import__('pathlib').Path({str(marker)!r}).touch(), x)[1]")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Lambda(touch)(inputs)))
    marker.unlink()  # it has run, to learn the shape that it gives
    return model


@pytest.mark.filterwarnings("ignore:.*HDF5 file via:UserWarning")
@pytest.mark.parametrize("name", ["model.keras", "model.h5", "model.hdf5", "renamed.weights.h5", "zipped.h5"])
def test_code_in_a_model_file_is_refused_and_not_run(name: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / name
    kind = ".keras" if name in ("model.keras", "zipped.h5") else ".h5"
    whole = tmp_path / f"whole{kind}"
    model_with_code(marker).save(whole)
    assert not marker.exists()
    keras.saving.load_model(whole, safe_mode=False)
    assert marker.exists()  # so there is code in it
    marker.unlink()
    whole.rename(path)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        mobilenet(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["weights.pkl", "objects.weights.h5", "objects.npy"])
def test_pickled_weights_are_refused_and_not_run(name: str, tmp_path: Path) -> None:
    sprung, path = tmp_path / "sprung", tmp_path / name
    if path.suffix == ".npy":
        np.save(path, np.array([pipeline.Trap(sprung)], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(pipeline.Trap(sprung)))
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        mobilenet(path)
    assert not sprung.exists()


def test_page_instead_of_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.h5"
    path.write_text("<!DOCTYPE html><title>404</title>")
    with pytest.raises(InputError, match=r"page\.h5 does not fit mobilenet"):
        mobilenet(path)


def code(folder: Path) -> Path:
    path = folder / "model.h5"
    model_with_code(folder / "ran").save(path)
    return path


def not_a_number(folder: Path) -> Path:
    path = folder / "nan.weights.h5"
    model = mobilenet(Path("none"))
    kernel = model.get_layer("conv1").get_weights()[0]
    kernel[0, 0, 0, 0] = np.nan
    model.get_layer("conv1").set_weights([kernel])
    model.save_weights(path)
    return path


@pytest.mark.filterwarnings("ignore:.*HDF5 file via:UserWarning")
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (stages.SEGNET, ("--backbone", pipeline.BACKBONE, "--network-size", str(pipeline.SIZE), "--epochs", "1")),
        (stages.CLASSIFIER, ("--backbone", pipeline.BACKBONE, "--epochs", "1")),
    ],
)
@pytest.mark.parametrize(("make", "message"), [(code, "a whole model"), (not_a_number, "NaN or infinite")])
def test_weights_that_are_none_end_a_training_before_it_begins(
    script: str,
    flags: tuple[str, ...],
    make: Callable[[Path], Path],
    message: str,
    own_chain: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fit(*_: object, **__: object) -> None:
        raise AssertionError("it trains")

    path = make(own_chain)
    monkeypatch.setattr("melanoma.training.fit", fit)
    assert exit_code(monkeypatch, script, *places(own_chain), *flags, "--weights", str(path)) == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error and plainly(error)
    assert not (own_chain / "ran").exists()


@pytest.fixture
def keras_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keras' cache of weights, empty, on a machine without network."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setattr("keras.src.backend.config._KERAS_DIR", str(tmp_path / "keras"))  # read from there at import
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setattr(urllib.request, "_opener", None)  # that of an earlier test knows other proxies
    folder = tmp_path / "keras" / "models"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("script", "backbone", "file", "checksum"),
    [
        (
            stages.CLASSIFIER,
            "densenet121",
            "densenet121_weights_tf_dim_ordering_tf_kernels_notop.h5",
            "with checksum 30ee3e1110167f948a6b9946edeeb738",
        ),
        (
            stages.SEGNET,
            "mobilenetv2",
            "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5",
            "whose checksum is not known",
        ),
    ],
)
def test_weights_that_cannot_be_fetched_tell_what_was_expected_and_what_goes_without(
    script: str,
    backbone: str,
    file: str,
    checksum: str,
    own_chain: Path,
    keras_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if backbone == "densenet121":  # in the cache is another file than the one that Keras knows
        (keras_home / file).write_bytes(b"another")
    flags = ("--backbone", backbone, "--network-size", str(pipeline.SIZE), "--epochs", "1")
    assert exit_code(monkeypatch, script, *places(own_chain), *flags) == 2
    error = capsys.readouterr().err
    expected = ("URL fetch failure", f"/{file}, {checksum}", str(keras_home), "--weights FILE", "--weights none")
    assert all(words in error for words in (*expected, "--pretrained")) and plainly(error)


def test_weights_that_were_fetched_by_half_are_named(
    own_chain: Path, keras_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = keras_home / "mobilenet_1_0_224_tf_no_top.h5"
    keras.saving.save_model(dense(200), path)
    path.write_bytes(path.read_bytes()[:100_000])
    flags = ("--backbone", "mobilenet", "--epochs", "1")
    assert exit_code(monkeypatch, stages.CLASSIFIER, *places(own_chain), *flags) == 2
    error = capsys.readouterr().err
    assert f"{path}, which Keras fetched, is damaged" in error and "delete it" in error and plainly(error)


# ------------------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    "backend",
    ["tensorflow", pytest.param("jax", marks=pytest.mark.skipif(not find_spec("jax"), reason="JAX is not there"))],
)
def test_too_large_a_batch_is_told(backend: str, own_chain: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))

    script = str(pipeline.ROOT / stages.SEGNET)
    large = ("--network-size", str(1 << 16), "--batch-size", "4", "--limit", "4")  # 206 GB at the first layer
    words = [sys.executable, script, *places(own_chain), *SMALL_SEGNET, *large]
    environment = os.environ | {"KERAS_BACKEND": backend}
    done = subprocess.run(words, env=environment, preexec_fn=limited, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith(stages.SEGNET)]
    assert len(said) == 1 and f"{hardware.MEMORY}: try a smaller --batch-size" in said[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5368709120 bytes."), "--batch-size"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB."), "--batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), "--batch-size"),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), "KERAS_BACKEND=jax"),
        (RuntimeError("INTERNAL: CUDA_ERROR_NO_BINARY_FOR_GPU"), "CUDA_VISIBLE_DEVICES=-1"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_errors_of_the_machine_are_known_by_their_words(error: Exception, words: str) -> None:
    assert words in (hardware.advice(error) or "")
    assert hardware.advice(ValueError("shapes (2, 3) and (4, 3) differ")) is None


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="other backends know their GPUs")
@pytest.mark.parametrize(
    ("script", "flags"),
    [(stages.SEGNET, SMALL_SEGNET), (stages.CLASSIFIER, SMALL_CLASSIFIER), (stages.EVALUATION, ("--probe",))],
)
def test_gpu_that_is_too_new_is_refused(
    script: str,
    flags: tuple[str, ...],
    own_chain: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import tensorflow as tf

    def built_for(*_: object) -> dict[str, list[str]]:
        return {"cuda_compute_capabilities": ["sm_80", "compute_90"]}

    monkeypatch.setattr(tf.sysconfig, "get_build_info", built_for)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda _: [argparse.Namespace(name="GPU:0")])
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda _: {"compute_capability": (9, 0)})
    hardware.check()
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda _: {"compute_capability": (12, 0)})
    assert exit_code(monkeypatch, script, *places(own_chain), *flags) == 2
    error = capsys.readouterr().err
    assert "compute capability 12.0" in error and "requirements-jax.txt" in error and plainly(error)
