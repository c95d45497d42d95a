"""Exported networks compute what the pipeline computes, in every format, and without this package."""

import json
import os
import re
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import export as script
from melanoma.artifacts.atomic import sha256
from melanoma.cli import run as cli
from melanoma.dataset import augment, decode
from melanoma.deployment import export, formats, images, pipeline
from melanoma.deployment.formats import FORMATS
from melanoma.deployment.pipeline import Pipeline
from melanoma.errors import DifferenceError, InputError
from melanoma.inference import pretrained
from melanoma.inference.calibration import IDENTITY, Calibration
from melanoma.inference.ensemble import Blend, Ensemble
from melanoma.inference.predict import mean_output
from melanoma.inference.segment import MaskOptions, Segmenter
from melanoma.metrics import classification
from melanoma.models import backbones, classifier, segmentation
from melanoma.models.classifier import Preprocessing
from melanoma.sources import synthetic

import keras
import numpy as np
import pytest
import toy
from PIL import Image
from pipeline import ROOT

SIZE, REGION = 40, 32  # pixels
PAGE = ROOT / "docs" / "prediction.md"
CALIBRATION = Calibration(2.0, (0.0, -1.0, 0.5))

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the converters


def make_classifiers(name: str, members: list[str], views: int, calibration: Calibration) -> Ensemble:
    networks = [
        classifier.build(name, REGION, backbones.NONE, Preprocessing(input_size=24, colour_constancy=True))
        for _ in members
    ]
    for one in networks:  # far from equal probabilities
        for layer in one.head.layers:
            if isinstance(layer, keras.layers.Dense):
                layer.kernel.assign(layer.kernel * 4)
    return Ensemble(networks, members, views, calibration)


def make_networks() -> Pipeline:
    """Two segmentation networks; two folds of one backbone, the first of two seeds, and a network of another."""
    toy.register()
    keras.utils.set_random_seed(0)
    design = segmentation.Design("unet", 32, toy.NAME)
    return Pipeline(
        SIZE,
        Segmenter([segmentation.build(design, SIZE) for _ in range(2)], 0.5, MaskOptions(8, True, 4)),
        "crop",
        REGION,
        Blend(
            [
                make_classifiers(toy.NAME, ["_fold1_seed0", "_fold1_seed1", "_fold2_seed0"], 4, CALIBRATION),
                make_classifiers(toy.OTHER, [""], 2, IDENTITY),
            ]
        ),
        {"melanoma": classification.default_points()},
        {},
    )


@pytest.fixture(scope="module")
def networks() -> Pipeline:
    return make_networks()


@pytest.fixture(scope="module")
def models(networks: Pipeline) -> dict[str, keras.Model]:
    return export.build(networks)


def make_images(size: int, count: int = 3) -> np.ndarray:
    """Asymmetric images, so that every view is another."""
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def require(name: str) -> None:
    for package in FORMATS[name].packages:
        pytest.importorskip(package)


# ----------------------------------------------------------------------------------------------- the two networks


def test_toy_folds_are_what_the_fixture_says(networks: Pipeline) -> None:
    assert [len(fold) for fold in networks.classifier.parts[0].folds().values()] == [2, 1]


@pytest.mark.parametrize("view", range(augment.VIEWS))
def test_views_are_those_of_numpy(view: int) -> None:
    images = make_images(5)
    for function in (augment.flip_rotate, augment.undo_flip_rotate):
        found = function(keras.ops.convert_to_tensor(images), view, (1, 2), keras.ops)
        assert np.array_equal(keras.ops.convert_to_numpy(found), function(images, view, (1, 2)))


def test_segmentation_model_computes_what_the_pipeline_computes(
    networks: Pipeline, models: dict[str, keras.Model]
) -> None:
    images, segmenter = make_images(SIZE), networks.segmenter
    expected = mean_output(segmenter.models, images, segmenter.options.views)
    assert models[export.SEGMENTATION].predict_on_batch(images) == pytest.approx(expected, abs=1e-6)
    assert expected.std() > 1e-3


def test_classifier_model_computes_what_the_pipeline_computes(
    networks: Pipeline, models: dict[str, keras.Model]
) -> None:
    regions = make_images(REGION)
    expected, _ = networks.classifier.probabilities(regions, 4, "")
    found = models[export.CLASSIFIER].predict_on_batch(regions)
    assert found == pytest.approx(expected, abs=1e-6)
    assert expected.std(axis=0).min() > 1e-4


# ----------------------------------------------------------------------------------------------------- the formats


@pytest.mark.parametrize("name", FORMATS)
def test_exported_models_compute_what_keras_computes(
    name: str, networks: Pipeline, models: dict[str, keras.Model], tmp_path: Path
) -> None:
    require(name)
    target = export.Target(name, False, tmp_path)
    target.write(models)
    for model in models.values():
        compute = target.read(model.name)
        for count in (3, 1):
            images = make_images(model.input_shape[1], count).astype(np.float32)
            found = compute(images)
            assert found.shape == (count, *model.output_shape[1:])
            assert found == pytest.approx(model.predict_on_batch(images), abs=1e-5)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "saved_model"])
def test_float16_is_smaller_and_close(name: str, models: dict[str, keras.Model], tmp_path: Path) -> None:
    require(name)
    model, images = models[export.CLASSIFIER], make_images(REGION).astype(np.float32)
    targets = [export.Target(name, half, tmp_path / str(half)) for half in (False, True)]
    single, half = (
        sum((target.folder / path).stat().st_size for path in target.write({model.name: model})) for target in targets
    )
    assert half < 0.8 * single  # of networks this small the graph is a large part
    difference = abs(targets[1].read(model.name)(images) - model.predict_on_batch(images)).max()
    assert 0 < difference < 0.01


def test_saved_model_has_no_float16(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no effect on saved_model"):
        export.Target("saved_model", True, tmp_path).require()
    assert list(tmp_path.iterdir()) == []


EXPORT = """
import sys
from pathlib import Path
from test_export import export, make_networks
models = export.build(make_networks())
for name in sys.argv[2:]:
    print(export.Target(name, False, Path(sys.argv[1]) / name).write(models))
"""


@pytest.mark.slow
def test_two_runs_write_the_same_files(tmp_path: Path) -> None:
    names = [name for name in ("openvino", "litert") if all(map(find_spec, FORMATS[name].packages))]
    found = []
    for number in "12":  # another order of Python's sets
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))
        environment = os.environ | {"PYTHONPATH": paths, "PYTHONHASHSEED": number}
        command = [sys.executable, "-c", EXPORT, str(tmp_path / number), *names]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found.append(done.stdout.splitlines()[-len(names) :])
    assert found[0] == found[1] and "classifier" in found[0][0]


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "saved_model"])
def test_missing_package_is_reported_with_the_command_that_installs_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = FORMATS[name].packages[0]
    monkeypatch.setitem(sys.modules, package, None)
    assert exit_code(monkeypatch, "--format", name, "--out", tmp_path / "out") == 2
    assert f"{package}" in (message := capsys.readouterr().err)
    assert "pip install -r requirements/export.txt" in message


def test_other_backends_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(InputError, match="unset KERAS_BACKEND"):
        export.Target("saved_model", False, tmp_path).require()


# ---------------------------------------------------------------------------------------- the check and the script


def exit_code(monkeypatch: pytest.MonkeyPatch, *flags: str | Path) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, flags)])
    try:
        cli.run(script.build_parser(), script.main, writes=script.WRITES)
    except SystemExit as stop:
        return stop.code
    return 0


def break_format(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    """Lets SavedModels that are loaded compute with an error."""
    read = formats.read_saved_model

    def read_wrongly(path: Path) -> formats.Compute:
        compute = read(path)
        return lambda images: compute(images) + np.float32(error)

    broken = formats.Format((), "_saved_model", formats.write_saved_model, read_wrongly)
    monkeypatch.setitem(FORMATS, "saved_model", broken)


@pytest.mark.parametrize("error", [1e-3, np.nan])
def test_difference_from_keras_ends_the_script_with_code_1_and_no_description(
    error: float,
    networks: Pipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    logging_restored: None,
) -> None:
    monkeypatch.setattr(pipeline, "from_pretrained", lambda views, backbone: networks)
    monkeypatch.setattr(script, "COUNT", 2)
    break_format(monkeypatch, error)
    assert exit_code(monkeypatch, "--format", "saved_model", "--out", tmp_path) == 1
    assert "differs from Keras by more than 0.0001" in capsys.readouterr().err
    assert not (tmp_path / export.DESCRIPTION).exists()


def test_difference_of_float16_is_only_reported(
    networks: Pipeline, models: dict[str, keras.Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export.Target("saved_model", False, tmp_path).write(models)
    break_format(monkeypatch, 1e-3)
    images = make_images(SIZE)
    with pytest.raises(DifferenceError):
        export.check(networks, models, export.Target("saved_model", False, tmp_path), images)
    found = export.check(networks, models, export.Target("saved_model", True, tmp_path), images)
    assert found[export.CLASSIFIER].difference == pytest.approx(1e-3, abs=1e-5)


def test_script_exports_networks_of_a_data_folder(
    finished: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logging_restored: None
) -> None:
    flags = ("--format", "saved_model", "--out", tmp_path, "--data", finished / "data", "--views", "2")
    for _ in range(2):  # replaces what is there
        assert exit_code(monkeypatch, *flags, "--check", source / "ISIC-2017_Test_v2_Data") == 0
    content = json.loads((tmp_path / export.DESCRIPTION).read_text())
    expected = pipeline.from_data(finished / "data", 2)
    assert content["thresholds"] == expected.thresholds
    assert content["mask"]["threshold"] == expected.segmenter.threshold
    assert content["classes"] == ["benign nevus", "melanoma", "seborrheic keratosis"]
    assert content["inside_the_models"]["segmentation"]["views"] == 2
    assert content["compared_with_keras"]["classifier"]["images"] == 12
    assert {path: sha256(tmp_path / path) for path in content["sha256"]} == content["sha256"]
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {*content["sha256"], export.DESCRIPTION}


def test_check_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"none of the first 1 images can be read.*broken\.jpg"):
        script.images_to_check(images.find([tmp_path], []), SIZE)


def test_licence_depends_on_the_networks_that_are_used() -> None:
    every, mobilenet = pretrained.training_data(), pretrained.training_data("mobilenetv2")
    assert "CC-BY-NC" in every["classifier"]
    assert "CC-BY-NC" not in mobilenet["classifier"] and "CC-0" in mobilenet["classifier"]
    assert every["segnet"] == mobilenet["segnet"] and "CC-0" in every["segnet"]


# ----------------------------------------------------------------------------------------------- without this package


def program() -> str:
    """The Python program of the page that runs the ONNX pair."""
    section = PAGE.read_text(encoding="utf-8").partition("\n## Export\n")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found
    return found[1]


@pytest.fixture(scope="module")
def other_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with onnxruntime, NumPy and Pillow only."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    install = [str(python), "-m", "pip", "install", "--quiet", "onnxruntime", "numpy", "pillow"]
    if subprocess.run(install, capture_output=True, check=False).returncode:
        pytest.skip("pip cannot install onnxruntime")
    return python


def run_program(python: Path, folder: Path, image: Path) -> dict[str, float]:
    (folder / "program.py").write_text(program())
    environment: dict[str, Any] = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(python), "program.py", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, env=environment)
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in done.stdout.splitlines())}


@pytest.mark.slow
def test_program_of_the_page_predicts_what_the_pipeline_predicts(other_python: Path, tmp_path: Path) -> None:
    require("onnx")
    assert subprocess.run([other_python, "-c", "import tensorflow"], capture_output=True, check=False).returncode
    networks = pipeline.from_pretrained(backbone="mobilenetv2")
    export.Target("onnx", False, tmp_path / "exported").write(export.build(networks))
    target = export.Target("onnx", False, tmp_path / "exported")
    (target.folder / export.DESCRIPTION).write_text(json.dumps(export.describe(networks, target, {})))
    for number, size in enumerate([(300, 420), (1200, 1650)]):  # also one that is reduced first
        pixels, _ = synthetic.generate(number, size, np.random.default_rng(number))
        path = tmp_path / f"{number}.jpg"
        Image.fromarray(pixels).save(path, quality=95)
        expected = networks.predict(decode.read_pair(path, None, networks.size).image[None])
        assert 0 < expected.masks.mean() < 1
        found = run_program(other_python, tmp_path, path)
        assert [*found.values()] == pytest.approx(expected.probabilities[0].tolist(), abs=1e-4)
