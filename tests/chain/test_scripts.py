"""The five scripts: their command lines, the files that they leave, and what bad input and wrong order get."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.classes import CLASSES, KERATOSIS, MELANOMA, SPLITS, TASKS
from melanoma.dataset import roi
from melanoma.dataset.splits import divide_2018
from melanoma.metrics import classification
from melanoma.sources import isic

import numpy as np
import pandas as pd
import pipeline
import pytest
from PIL import Image
from pipeline import array_bytes, exit_code, places, reader

CLASSIFIER_FLAGS = ("--backbone", pipeline.BACKBONE, "--weights", "none", "--train", "head", "--epochs", "1")
FRAMEWORKS = ("keras", "tensorflow", "jax", "torch")


def python(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter, with `folder` as the working folder."""
    environment = os.environ | {"PYTHONPATH": str(pipeline.ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def without_truth(source: Path, split: str) -> None:
    """Takes the masks and the labels of a split away."""
    shutil.rmtree(isic.mask_folder(source, split))
    isic.label_file(source, split).unlink()


@pytest.mark.parametrize("script", pipeline.SCRIPTS)
def test_help_shows_the_docstring_and_every_flag(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        pipeline.parser(script).parse_args(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--data", "--graphics", "--seed", "--limit", f"python {script}"))


@pytest.mark.parametrize("script", pipeline.SCRIPTS)
@pytest.mark.parametrize("flags", [["--no-such-flag"], ["--lim", "3"], ["--limit", "0"], ["--limit", "x"], ["extra"]])
def test_command_line_is_strict(script: str, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        pipeline.parser(script).parse_args(flags)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (contract.PREPROCESSING, ["--copies", "0.5"]),
        (contract.PREPROCESSING, ["--split", "2019"]),
        (contract.SEGNET, ["--learning-rate", "nan"]),
        (contract.SEGNET, ["--learning-rate", "0"]),
        (contract.SEGNET, ["--epochs", "-1"]),
        (contract.ROI, ["--roi", "circle"]),
        (contract.CLASSIFIER, ["--train", "none"]),
    ],
)
def test_values_out_of_range_are_refused(script: str, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        pipeline.parser(script).parse_args(flags)
    assert stop.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_importing_the_scripts_does_nothing(tmp_path: Path) -> None:
    names = ", ".join(script.removesuffix(".py") for script in pipeline.SCRIPTS)
    done = python(tmp_path, f"import {names}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_scripts_that_do_not_train_need_no_framework(tmp_path: Path) -> None:
    names = [script.removesuffix(".py") for script in (contract.PREPROCESSING, contract.ROI, contract.EVALUATION)]
    done = python(tmp_path, f"import sys, {', '.join(names)}; print(*{{*{FRAMEWORKS}}} & {{*sys.modules}})")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", contract.FILES)
def test_finished_chain_has_every_file_of_the_contract(finished: Path, name: str) -> None:
    file, store = contract.FILES[name], reader(finished)
    splits: list[str] = list(SPLITS) if "{split}" in file.path else [""]
    if name == "features":
        splits.remove("test")  # no one needs them
    if name == "probabilities":
        splits.remove("train")  # of a cross-validation
    for split in splits:
        fields = {"split": split, "backbone": pipeline.BACKBONE, "member": ""}
        path = store.path(name, **fields)
        assert path.stat().st_size > 0
        assert store.manifest[path.relative_to(finished / "data").as_posix()]["script"] == file.writer
        if file.dtype:
            array = store.load(name, **fields)
            axes = {"N": store.rows(split), "S": pipeline.SIZE, "C": 1024}
            assert array.shape == tuple(axes[axis] if isinstance(axis, str) else axis for axis in file.shape)
            assert array.dtype.kind == "U" if file.dtype == "str" else array.dtype == file.dtype
        elif path.suffix == ".json":
            assert json.loads(path.read_text())


def test_minorities_are_enlarged_in_train_alone(finished: Path, source: Path) -> None:
    store, splits = reader(finished), isic.read_source(source).records
    for split, records in splits.items():
        originals = np.bincount([record.label or 0 for record in records], minlength=3)
        factors = (1, 3.5, 3.5) if split == "train" else (1, 1, 1)
        expected = [round(factor * count) for factor, count in zip(factors, originals.tolist(), strict=True)]
        assert np.bincount(store.load("labels", split=split)).tolist() == expected


def test_labels_belong_to_their_ids(finished: Path, source: Path) -> None:
    store = reader(finished)
    for split in SPLITS:
        truth = isic.read_labels(isic.label_file(source, split))
        ids = [name.split("_copy")[0] for name in store.load("ids", split=split).tolist()]
        assert [truth[name] for name in ids] == store.load("labels", split=split).tolist()


def test_classifier_sees_the_surroundings_of_the_predicted_lesion(finished: Path) -> None:
    store = reader(finished)
    for split in SPLITS:
        photographs, predicted, masked = (store.load(name, split=split) for name in ("images", "predicted", "roi"))
        for photograph, mask, seen in zip(photographs, predicted, masked, strict=True):
            assert np.array_equal(seen, roi.region_of_interest(photograph, mask, "crop")[0])


def test_probabilities_sum_to_one(finished: Path) -> None:
    for split in ("val", "test"):
        assert np.allclose(reader(finished).load("probabilities", split=split).sum(axis=1), 1, atol=1e-5)


def test_pictures_open_and_show_something(finished: Path) -> None:
    paths = sorted((finished / "graphics").glob("*.png"))
    assert len(paths) > 8
    for path in paths:
        with Image.open(path) as picture:
            picture.load()
            assert min(picture.size) > 200
            assert np.asarray(picture.convert("L")).std() > 5, path.name


def test_metrics_have_counts_intervals_and_settings(finished: Path) -> None:
    report = json.loads((finished / "graphics" / "metrics.json").read_text())
    assert set(report["systems"]) == {pipeline.BACKBONE}
    splits = report["systems"][pipeline.BACKBONE]["splits"]
    assert set(splits) == {"val", "test"}
    for split, scored in splits.items():
        assert scored["n"] == pipeline.COUNTS[split] == sum(scored["of_each_class"].values())
        for matrix in (scored["class_confusion"], *scored["melanoma_confusion"].values()):
            assert np.sum(matrix) == scored["n"]
        assert set(scored["metrics"]) == set(scored["intervals"])
        assert {"melanoma auc", "melanoma f1 at Youden", "melanoma weighted f1 at 90 % sensitivity", "mean auc"} < set(
            scored["metrics"]
        )
        for name, value in scored["metrics"].items():
            if value is not None:
                low, high = scored["intervals"][name]
                assert 0 <= low <= high <= 1 and 0 <= value <= 1
    assert report["settings"]["seed"] == 0


def test_thresholds_come_from_validation(finished: Path) -> None:
    store = reader(finished)
    saved = json.loads(store.path("thresholds").read_text())
    probabilities = store.load("probabilities", split="val")
    for index in (MELANOMA, KERATOSIS):
        truth = store.load("labels", split="val") == index
        thresholds = saved[CLASSES[index]]
        assert thresholds == classification.operating_points(truth, probabilities[:, index])
        assert (probabilities[truth, index] >= thresholds[classification.HIGH_SENSITIVITY]).mean() >= 0.9


def test_segmentation_is_scored_where_there_are_masks(finished: Path) -> None:
    scores = json.loads((finished / "graphics" / "segmentation.json").read_text())["splits"]
    assert {split: scored["n"] for split, scored in scores.items()} == {"val": 12, "test": 12}
    assert 0 <= scores["val"]["metrics"]["jaccard"] <= 1


def test_predictions_are_listed_by_id(finished: Path) -> None:
    table = pd.read_csv(finished / "graphics" / "predictions_test.csv")
    assert table.columns.tolist() == ["image_id", "melanoma", "seborrheic_keratosis"]
    assert table["image_id"].tolist() == reader(finished).load("ids", split="test").tolist()
    probabilities = reader(finished).load("probabilities", split="test")[:, list(TASKS)]
    assert np.allclose(table[["melanoma", "seborrheic_keratosis"]], probabilities, atol=1e-6)


@pytest.mark.usefixtures("logging_restored")
@pytest.mark.parametrize(
    ("script", "needed"),
    [
        (contract.SEGNET, contract.PREPROCESSING),
        (contract.ROI, contract.PREPROCESSING),
        (contract.CLASSIFIER, contract.PREPROCESSING),
        (contract.EVALUATION, contract.PREPROCESSING),
    ],
)
def test_script_run_first_names_the_first_script(
    script: str, needed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(monkeypatch, script, *places(tmp_path)) == 3
    error = capsys.readouterr().err
    assert f"run {needed}" in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("logging_restored")
@pytest.mark.parametrize(
    ("script", "flags", "needed"),
    [
        (contract.ROI, (), contract.SEGNET),
        (contract.CLASSIFIER, CLASSIFIER_FLAGS, contract.ROI),
        (contract.EVALUATION, (), contract.CLASSIFIER),
    ],
)
def test_skipped_script_is_named(
    script: str,
    flags: tuple[str, ...],
    needed: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipeline.preprocess(source, tmp_path)
    assert exit_code(monkeypatch, script, *places(tmp_path), *flags) == 3
    assert f"missing: run {needed} first" in capsys.readouterr().err


@pytest.mark.usefixtures("logging_restored")
@pytest.mark.parametrize(
    ("script", "flags"), [(contract.ROI, ()), (contract.CLASSIFIER, CLASSIFIER_FLAGS), (contract.EVALUATION, ())]
)
def test_arrays_of_another_size_make_the_rest_stale(
    script: str,
    flags: tuple[str, ...],
    source: Path,
    own_chain: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipeline.run(contract.PREPROCESSING, own_chain, "--source", str(source), "--size", "40")
    before = array_bytes(own_chain)
    assert exit_code(monkeypatch, script, *places(own_chain), *flags) == 3
    assert "stale" in (error := capsys.readouterr().err) and f"run {contract.SEGNET} again" in error
    assert array_bytes(own_chain) == before


@pytest.mark.usefixtures("logging_restored")
def test_source_without_photographs_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (*places(tmp_path), "--source", str(tmp_path / "nowhere"))
    assert exit_code(monkeypatch, contract.PREPROCESSING, *flags) == 2
    assert "nowhere: no images found" in capsys.readouterr().err


@pytest.mark.usefixtures("logging_restored")
def test_cut_off_photograph_is_bad_input_and_the_old_arrays_stay_whole(
    own_source: Path, own_chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photograph = isic.read_split(own_source, "train")[5].image
    photograph.write_bytes(photograph.read_bytes()[:1500])
    before = array_bytes(own_chain)
    assert exit_code(monkeypatch, contract.PREPROCESSING, *places(own_chain), "--source", str(own_source)) == 2
    assert photograph.name in capsys.readouterr().err
    assert array_bytes(own_chain) == before


@pytest.mark.usefixtures("logging_restored")
def test_unknown_backbone_is_bad_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(monkeypatch, contract.CLASSIFIER, *places(tmp_path), "--backbone", "mobilenet9") == 2
    assert "mobilenet9" in capsys.readouterr().err


@pytest.mark.usefixtures("logging_restored")
def test_network_size_that_does_not_fit_is_bad_usage(
    own_chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = array_bytes(own_chain)
    assert exit_code(monkeypatch, contract.SEGNET, *places(own_chain), "--network", "segnet", "--input-size", "30") == 2
    assert "--input-size" in capsys.readouterr().err
    assert array_bytes(own_chain) == before


@pytest.mark.usefixtures("logging_restored")
def test_training_without_a_melanoma_is_bad_input(
    own_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = isic.label_file(own_source, "train")
    table.write_text(table.read_text().replace(",1.0,0.0", ",0.0,0.0"))
    pipeline.preprocess(own_source, tmp_path)
    pipeline.stand_in_for_segnet(tmp_path)
    pipeline.run(contract.ROI, tmp_path)
    assert exit_code(monkeypatch, contract.CLASSIFIER, *places(tmp_path), *CLASSIFIER_FLAGS) == 2
    assert "no melanoma among" in capsys.readouterr().err


def test_unlabelled_test_split_is_predicted_and_not_scored(own_source: Path, tmp_path: Path) -> None:
    without_truth(own_source, "test")
    pipeline.run_all(own_source, tmp_path, "head")
    store, graphics = reader(tmp_path), tmp_path / "graphics"
    assert not store.has("labels", split="test") and not store.has("masks", split="test")
    table = pd.read_csv(graphics / "predictions_test.csv")
    assert table["image_id"].tolist() == store.load("ids", split="test").tolist()
    judged = json.loads((graphics / "metrics.json").read_text())["systems"][pipeline.BACKBONE]
    assert set(judged["splits"]) == {"val"}
    assert set(json.loads((graphics / "segmentation.json").read_text())["splits"]) == {"val"}
    assert not list(graphics.glob("*_test.png"))


def test_evaluation_goes_on_where_a_class_is_absent(own_source: Path, tmp_path: Path) -> None:
    for split in ("val", "test"):
        table = isic.label_file(own_source, split)
        table.write_text(table.read_text().replace(",1.0,", ",0.0,"))
    pipeline.preprocess(own_source, tmp_path)
    settings = vars(pipeline.parser(contract.CLASSIFIER).parse_args([])) | {"backbone": "uniform"}
    store = Store(tmp_path / "data", contract.CLASSIFIER, settings)
    for split in ("val", "test"):
        uniform = np.full((store.rows(split), 3), 1 / 3, np.float32)
        store.save("probabilities", uniform, split=split)
    pipeline.run(contract.EVALUATION, tmp_path)
    judged = json.loads((tmp_path / "graphics" / "metrics.json").read_text())["systems"]["uniform"]
    figures = judged["splits"]["test"]["metrics"]
    assert figures["melanoma auc"] is None and figures["melanoma specificity at 0.5"] is not None


def test_labels_that_went_away_leave_no_figures_behind(own_chain: Path, own_source: Path) -> None:
    without_truth(own_source, "test")
    pipeline.preprocess(own_source, own_chain)
    assert not reader(own_chain).has("labels", split="test")
    assert not reader(own_chain).path("masks", split="test").exists()


def test_same_seed_gives_the_same_arrays_and_another_gives_others(source: Path, tmp_path: Path) -> None:
    for folder, seed in (("first", "4"), ("again", "4"), ("other", "5")):
        pipeline.preprocess(source, tmp_path / folder, "--seed", seed)
    first, again, other = (array_bytes(tmp_path / folder) for folder in ("first", "again", "other"))
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {"train_images.npy", "train_masks.npy"}


def test_more_copies_do_not_change_the_first_ones(source: Path, tmp_path: Path) -> None:
    pipeline.preprocess(source, tmp_path / "none", "--copies", "1")
    store, full = reader(tmp_path / "none"), tmp_path / "full"
    pipeline.preprocess(source, full)
    count = pipeline.COUNTS["train"]
    assert store.rows("train") == count < reader(full).rows("train")
    assert np.array_equal(store.load("images", split="train"), reader(full).load("images", split="train")[:count])


def test_limit_takes_the_first_images_of_each_split(finished: Path, source: Path, tmp_path: Path) -> None:
    pipeline.preprocess(source, tmp_path, "--limit", "4", "--copies", "1")
    for split in SPLITS:
        limited, whole = reader(tmp_path), reader(finished)
        assert limited.load("ids", split=split).tolist() == whole.load("ids", split=split)[:4].tolist()
        assert set(limited.load("labels", split=split).tolist()) == {0, 1, 2}


def test_division_of_2018_becomes_arrays(source: Path, tmp_path: Path) -> None:
    pipeline.preprocess(source, tmp_path, "--split", "2018", "--copies", "1")
    store = reader(tmp_path)
    ids = [name for split in SPLITS for name in store.load("ids", split=split).tolist()]
    assert len(ids) == len(set(ids)) == sum(pipeline.COUNTS.values())
    expected = divide_2018(isic.read_source(source).records, 0)
    for split in SPLITS:
        assert set(store.load("ids", split=split).tolist()) == {record.id for record in expected[split]}


def test_crop_fills_the_frame_with_the_lesion(source: Path, tmp_path: Path) -> None:
    pipeline.preprocess(source, tmp_path)
    pipeline.stand_in_for_segnet(tmp_path)
    pipeline.run(contract.ROI, tmp_path, "--roi", "crop")
    store = reader(tmp_path)
    masked, photographs = store.load("roi", split="val"), store.load("images", split="val")
    assert masked.shape == photographs.shape and not np.array_equal(masked, photographs)
    assert (masked.max(axis=3) == 0).mean() < 0.01
    assert store.written_with("roi", split="val")["roi"] == "crop"
