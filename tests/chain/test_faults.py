"""Faults provoked for real: what a script reports, its exit code, and what it leaves behind.

Faults of one module are provoked in the tests of that module; here are those that need a script, a disk or a device.
"""

import os
import pickle
import resource
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.cli import hardware, run
from melanoma.errors import InputError
from melanoma.evaluation import plots
from melanoma.models import backbones
from melanoma.training import loop

import keras
import numpy as np
import pipeline
import pytest
from matplotlib.figure import Figure
from pipeline import BACKBONE, array_bytes, exit_code, places, reader

pytestmark = pytest.mark.usefixtures("logging_restored")

SEGNET_FLAGS = ("--network", "segnet", "--input-size", str(pipeline.SIZE), "--epochs", "1", "--views", "1")
CLASSIFIER_FLAGS = ("--backbone", BACKBONE, "--weights", "none", "--train", "head", "--epochs", "1")
FLAGS = {contract.SEGNET: SEGNET_FLAGS, contract.CLASSIFIER: CLASSIFIER_FLAGS}
FREE = 64 << 10  # bytes left on a full disk: enough for the smallest files only


def is_one_line(error: str) -> bool:
    """Whether a message for users is all that is on the standard error."""
    return "Traceback" not in error and len(error.splitlines()) == 1


# --------------------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize(
    ("script", "name"),
    [
        (contract.SEGNET, "images"),
        (contract.ROI, "predicted"),
        (contract.CLASSIFIER, "roi"),
        (contract.EVALUATION, "probabilities"),
    ],
)
def test_truncated_array_names_the_script_that_wrote_it(
    script: str,
    name: str,
    own_chain: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = reader(own_chain).path(name, split="val", backbone=BACKBONE)
    path.write_bytes(path.read_bytes()[:-100])
    before = array_bytes(own_chain)
    assert exit_code(monkeypatch, script, *places(own_chain), *FLAGS.get(script, ())) == 3
    error = capsys.readouterr().err
    assert f"run {contract.FILES[name].writer} again" in error and is_one_line(error)
    assert array_bytes(own_chain) == before


def test_array_of_objects_is_refused_and_nothing_in_it_runs(
    own_chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, sprung = reader(own_chain).path("probabilities", split="val", backbone=BACKBONE), own_chain / "sprung"
    np.save(path, np.array([pipeline.Trap(sprung)], dtype=object), allow_pickle=True)
    pipeline.rewrite_entry(own_chain / "data", path)
    assert exit_code(monkeypatch, contract.EVALUATION, *places(own_chain)) == 3
    error = capsys.readouterr().err
    assert f"run {contract.CLASSIFIER} again" in error and is_one_line(error)
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("script", "name", "value", "found"),
    [
        (contract.CLASSIFIER, "features", np.nan, "found nan to nan"),
        (contract.EVALUATION, "probabilities", np.inf, " to inf"),
    ],
)
def test_array_that_is_not_finite_is_refused_although_the_manifest_agrees(
    script: str,
    name: str,
    value: float,
    found: str,
    own_chain: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = reader(own_chain).path(name, split="val", backbone=BACKBONE)
    array = np.load(path)
    array[3, 1] = value
    np.save(path, array)
    pipeline.rewrite_entry(own_chain / "data", path)
    assert exit_code(monkeypatch, script, *places(own_chain), *FLAGS.get(script, ())) == 2
    error = capsys.readouterr().err
    assert found in error and f"delete it and run {contract.CLASSIFIER}" in error


# ---------------------------------------------------------------------------------------------------------------- disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system in memory; skips the test where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)]
    if sys.platform == "win32" or os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Leaves FREE bytes on a disk."""
    status = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(status.f_bavail * status.f_frsize - FREE))


@pytest.fixture(params=["full disk", "limit of file sizes"])
def take_room(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A folder, and a function after which large files cannot be written there."""
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


def write_array(store: Store, size: int) -> None:
    store.save("images", np.full((12, size, size, 3), 200, np.uint8), split="val")


def write_weights(store: Store, size: int) -> None:
    store.save_weights("segnet_weights", dense(size), member="")


def write_settings(store: Store, size: int) -> None:
    store.save_json("segnet_settings", {"text": "x" * size**2})


def write_figure(store: Store, size: int) -> None:
    figure = Figure(figsize=(size / 100, size / 100))
    figure.figimage(np.random.default_rng(0).random((size, size)))
    plots.save(figure, store.data / "figure.png", dpi=100)


@pytest.mark.parametrize("write", [write_array, write_weights, write_settings, write_figure])
def test_previous_file_survives_a_full_disk(
    write: Callable[[Store, int], None], take_room: tuple[Path, Callable[[], None]]
) -> None:
    folder, take = take_room
    store = Store(folder, contract.SEGNET, {})
    write(store, 24)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    take()
    with pytest.raises(OSError, match=r"No space left on device|File too large") as caught:
        write(store, 500)
    assert caught.value.errno in run.DISK_ERRORS
    (path,) = (path for path in before if path.name != "manifest.json")
    assert caught.value.filename == str(path)
    assert {path: path.read_bytes() for path in before} == before
    assert pipeline.hidden(folder) == []


@pytest.mark.parametrize(
    "script",
    [
        contract.PREPROCESSING,
        pytest.param(contract.SEGNET, marks=pytest.mark.slow),  # trains first
        contract.ROI,
        contract.CLASSIFIER,
        contract.EVALUATION,
    ],
)
def test_full_disk_is_reported_and_the_previous_files_survive(
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
    flags = {contract.PREPROCESSING: ("--source", str(source), "--size", str(pipeline.SIZE), "--jobs", "1")} | FLAGS
    graphics = ("--graphics", str(disk / "new"))  # in a used folder, removed figures would make room
    assert exit_code(monkeypatch, script, *places(disk), *flags.get(script, ()), *graphics) == 2
    error = capsys.readouterr().err
    assert str(disk) in error and ("No space left on device" in error or "disk is full" in error)
    assert is_one_line(error)
    assert {path: path.read_bytes() for path in before} == before
    assert pipeline.hidden(disk) == []


WRITE_WEIGHTS = """
import sys
from pathlib import Path
import test_faults
from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
store = Store(Path(sys.argv[1]), contract.SEGNET, {})
test_faults.fill(store.data)
try:
    test_faults.write_weights(store, 500)
except OSError:
    print("full")
"""


@pytest.mark.slow
def test_process_that_met_a_full_disk_ends_normally(disk: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", WRITE_WEIGHTS, str(disk)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "full\n"), done.stderr
    assert "Traceback" not in done.stderr


# -------------------------------------------------------------------------------------------------------------- weights


def toy_backbone(weights: Path | str) -> keras.Model:
    return backbones.build(BACKBONE, pipeline.SIZE, str(weights), pooling="avg")


def model_with_code(marker: Path) -> keras.Model:
    """A model whose code creates `marker` wherever it runs."""
    inputs, path = keras.Input((4,)), str(marker)
    code = keras.layers.Lambda(lambda x: (__import__("pathlib").Path(path).touch(), x)[1])
    model = keras.Model(inputs, keras.layers.Dense(2)(code(inputs)))
    marker.unlink()  # Keras has run the code to infer the shape
    return model


@pytest.mark.filterwarnings("ignore:.*HDF5 file via:UserWarning")
@pytest.mark.parametrize("name", ["model.keras", "model.h5", "model.hdf5", "renamed.weights.h5", "zipped.h5"])
def test_code_in_a_model_file_is_refused_and_does_not_run(name: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / name
    saved = tmp_path / ("saved.keras" if name in ("model.keras", "zipped.h5") else "saved.h5")
    model_with_code(marker).save(saved)
    assert not marker.exists()
    keras.saving.load_model(saved, safe_mode=False)
    assert marker.exists()  # the file does contain code
    marker.unlink()
    saved.rename(path)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        toy_backbone(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["weights.pkl", "objects.weights.h5", "objects.npy"])
def test_pickled_weights_are_refused_and_nothing_in_them_runs(name: str, tmp_path: Path) -> None:
    sprung, path = tmp_path / "sprung", tmp_path / name
    if path.suffix == ".npy":
        np.save(path, np.array([pipeline.Trap(sprung)], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(pipeline.Trap(sprung)))
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        toy_backbone(path)
    assert not sprung.exists()


def test_web_page_in_place_of_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.h5"
    path.write_text("<!DOCTYPE html><title>404</title>")
    with pytest.raises(InputError, match=rf"page\.h5 does not fit {BACKBONE}"):
        toy_backbone(path)


def full_model(folder: Path) -> Path:
    path = folder / "model.h5"
    model_with_code(folder / "ran").save(path)
    return path


def nan_weights(folder: Path) -> Path:
    path = folder / "nan.weights.h5"
    model = toy_backbone("none")
    model.set_weights([np.full_like(weights, np.nan) for weights in model.get_weights()])
    model.save_weights(path)
    return path


@pytest.mark.filterwarnings("ignore:.*HDF5 file via:UserWarning")
@pytest.mark.parametrize(
    ("script", "make", "message"),
    [
        (contract.SEGNET, full_model, "it holds a full model"),
        (contract.CLASSIFIER, nan_weights, f"weights of {BACKBONE} are NaN or infinite"),
    ],
)
def test_unusable_weights_stop_the_script_before_training(
    script: str,
    make: Callable[[Path], Path],
    message: str,
    own_chain: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = make(own_chain)
    monkeypatch.setattr(loop, "fit", lambda *_: pytest.fail("training began"))
    flags = ("--backbone", BACKBONE, "--input-size", str(pipeline.SIZE), "--weights", str(path))
    assert exit_code(monkeypatch, script, *places(own_chain), *flags) == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error and is_one_line(error)
    assert not (own_chain / "ran").exists()


@pytest.fixture
def keras_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keras' folder of downloaded weights, empty, on a machine without network."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setattr("keras.src.backend.config._KERAS_DIR", str(tmp_path / "keras"))  # Keras reads it at import
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(urllib.request, "_opener", None)  # remembers the proxies of an earlier download
    folder = tmp_path / "keras" / "models"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("script", "backbone", "file", "checksum"),
    [
        (
            contract.CLASSIFIER,
            "vgg16",
            "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5",
            "with checksum 6d6bbae143d832006294945121d1f1fc",
        ),
        (
            contract.SEGNET,
            "mobilenetv2",
            "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5",
            "whose checksum is not known",
        ),
    ],
)
def test_failed_download_of_weights_names_what_was_expected_and_the_flags_that_need_none(
    script: str,
    backbone: str,
    file: str,
    checksum: str,
    own_chain: Path,
    keras_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if backbone == "vgg16":
        (keras_cache / file).write_bytes(b"content with another checksum")
    flags = ("--backbone", backbone, "--input-size", str(pipeline.SIZE), "--epochs", "1")
    assert exit_code(monkeypatch, script, *places(own_chain), *flags) == 2
    error = capsys.readouterr().err
    expected = ("URL fetch failure", f"/{file}, {checksum}", str(keras_cache), "--weights FILE", "--weights none")
    assert all(words in error for words in (*expected, "--pretrained")) and is_one_line(error)


def test_truncated_download_of_weights_is_named(
    own_chain: Path, keras_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = keras_cache / "mobilenet_1_0_224_tf_no_top.h5"
    keras.saving.save_model(dense(200), path)
    path.write_bytes(path.read_bytes()[:100_000])
    flags = ("--backbone", "mobilenet", "--epochs", "1")
    assert exit_code(monkeypatch, contract.CLASSIFIER, *places(own_chain), *flags) == 2
    error = capsys.readouterr().err
    assert f"{path}, which Keras downloaded, is damaged" in error and "delete it" in error and is_one_line(error)


# -------------------------------------------------------------------------------------------------------------- devices


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    ["tensorflow", pytest.param("jax", marks=pytest.mark.skipif(not find_spec("jax"), reason="JAX is not installed"))],
)
def test_batch_that_exceeds_the_memory_is_reported(backend: str, own_chain: Path) -> None:
    def limit_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))

    too_large = ("--input-size", str(1 << 16), "--batch-size", "4", "--limit", "4")  # 206 GB at the first layer
    done = subprocess.run(
        [sys.executable, str(pipeline.ROOT / contract.SEGNET), *places(own_chain), *SEGNET_FLAGS, *too_large],
        env=os.environ | {"KERAS_BACKEND": backend},
        preexec_fn=limit_memory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    messages = [line for line in done.stderr.splitlines() if line.startswith(contract.SEGNET)]
    assert len(messages) == 1 and f"{hardware.MEMORY}: try a smaller --batch-size" in messages[0]
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow is not the backend")
@pytest.mark.parametrize(
    ("script", "flags"),
    [(contract.SEGNET, SEGNET_FLAGS), (contract.CLASSIFIER, CLASSIFIER_FLAGS), (contract.EVALUATION, ("--occlusion",))],
)
def test_gpu_that_is_too_new_is_refused(
    script: str,
    flags: tuple[str, ...],
    own_chain: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import tensorflow as tf

    built = {"cuda_compute_capabilities": ["sm_80", "compute_90"]}
    monkeypatch.setattr(tf.sysconfig, "get_build_info", lambda: built)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda _: [SimpleNamespace(name="GPU:0")])
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda _: {"compute_capability": (12, 0)})
    assert exit_code(monkeypatch, script, *places(own_chain), *flags) == 2
    error = capsys.readouterr().err
    assert "compute capability 12.0" in error and "requirements/jax.txt" in error and is_one_line(error)
