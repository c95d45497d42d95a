"""Bad files and broken machines, provoked: what each script says, what it exits with, and what it leaves."""

import argparse
import os
import pickle
import resource
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.cli import hardware, run
from melanoma.errors import InputError
from melanoma.evaluation import plots
from melanoma.models import backbones

import keras
import numpy as np
import pipeline
import pytest
from matplotlib.figure import Figure
from pipeline import array_bytes, exit_code, places, reader

pytestmark = pytest.mark.usefixtures("logging_restored")

SMALL_SEGNET = ("--network", "segnet", "--input-size", str(pipeline.SIZE), "--epochs", "1", "--no-tta")
SMALL_CLASSIFIER = ("--backbone", pipeline.BACKBONE, "--weights", "none", "--train", "head", "--epochs", "1")
FLAGS = {contract.SEGNET: SMALL_SEGNET, contract.CLASSIFIER: SMALL_CLASSIFIER}
FREE = 64 << 10  # bytes left on a full disk: enough for the smallest files alone


def plainly(error: str) -> bool:
    """Whether what stands on the standard error is one line for a user."""
    return "Traceback" not in error and len(error.splitlines()) == 1


# ------------------------------------------------------------------------------------------------- arrays of the chain


@pytest.mark.parametrize(
    ("script", "name"),
    [
        (contract.SEGNET, "images"),
        (contract.ROI, "predicted"),
        (contract.CLASSIFIER, "roi"),
        (contract.EVALUATION, "probabilities"),
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
    assert f"run {contract.FILES[name].writer} again" in error and plainly(error)
    assert not sprung.exists() and array_bytes(own_chain) == before


@pytest.mark.parametrize(
    ("script", "name", "flags"),
    [(contract.CLASSIFIER, "features", SMALL_CLASSIFIER), (contract.EVALUATION, "probabilities", ())],
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
    assert f"found {'nan' if np.isnan(value) else '0'}" in error and f"delete it and run {contract.CLASSIFIER}" in error


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


def write_array(store: Store, size: int) -> None:
    store.save("images", np.full((12, size, size, 3), 200, np.uint8), split="val")


def write_weights(store: Store, size: int) -> None:
    store.save_weights("segnet_weights", dense(size), member="")


def write_settings(store: Store, size: int) -> None:
    store.save_json("segnet_settings", {"text": "x" * size**2})


def write_picture(store: Store, size: int) -> None:
    figure = Figure(figsize=(size / 100, size / 100))
    figure.figimage(np.random.default_rng(0).random((size, size)))
    plots.save(figure, store.data / "arrays.png", dpi=100)


@pytest.mark.parametrize("write", [write_array, write_weights, write_settings, write_picture])
def test_full_disk_leaves_the_old_file_whole(
    write: Callable[[Store, int], None], no_room: tuple[Path, Callable[[], None]]
) -> None:
    folder, take_room = no_room
    store = Store(folder, contract.SEGNET, {})
    write(store, 24)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    take_room()
    with pytest.raises(OSError, match=r"No space left on device|File too large") as caught:
        write(store, 500)
    assert caught.value.errno in run.DISK_ERRORS
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
    flags = {contract.PREPROCESSING: ("--source", str(source), "--size", str(pipeline.SIZE), "--jobs", "1")} | FLAGS
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
        (contract.SEGNET, ("--backbone", pipeline.BACKBONE, "--input-size", str(pipeline.SIZE), "--epochs", "1")),
        (contract.CLASSIFIER, ("--backbone", pipeline.BACKBONE, "--epochs", "1")),
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
            contract.CLASSIFIER,
            "densenet121",
            "densenet121_weights_tf_dim_ordering_tf_kernels_notop.h5",
            "with checksum 30ee3e1110167f948a6b9946edeeb738",
        ),
        (
            contract.SEGNET,
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
    flags = ("--backbone", backbone, "--input-size", str(pipeline.SIZE), "--epochs", "1")
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
    assert exit_code(monkeypatch, contract.CLASSIFIER, *places(own_chain), *flags) == 2
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

    script = str(pipeline.ROOT / contract.SEGNET)
    large = ("--input-size", str(1 << 16), "--batch-size", "4", "--limit", "4")  # 206 GB at the first layer
    words = [sys.executable, script, *places(own_chain), *SMALL_SEGNET, *large]
    environment = os.environ | {"KERAS_BACKEND": backend}
    done = subprocess.run(words, env=environment, preexec_fn=limited, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith(contract.SEGNET)]
    assert len(said) == 1 and f"{hardware.MEMORY}: try a smaller --batch-size" in said[0]
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="other backends know their GPUs")
@pytest.mark.parametrize(
    ("script", "flags"),
    [(contract.SEGNET, SMALL_SEGNET), (contract.CLASSIFIER, SMALL_CLASSIFIER), (contract.EVALUATION, ("--occlusion",))],
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
    assert "compute capability 12.0" in error and "requirements/jax.txt" in error and plainly(error)
