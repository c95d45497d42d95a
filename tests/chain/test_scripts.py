"""The five scripts one after another: the files they leave, wrong order, stale arrays, splits without labels."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.classes import CLASSES, KERATOSIS, MELANOMA, NEVUS, SPLITS, TASKS
from melanoma.dataset.roi import region_of_interest
from melanoma.dataset.splits import DIVISION_2018, UNLABELLED, Division, base_rows
from melanoma.metrics import classification
from melanoma.sources import reader as source_reader
from melanoma.sources.layouts import challenge_2017
from melanoma.sources.records import Record

import numpy as np
import pandas as pd
import pipeline
import pytest
import toy
from pipeline import BACKBONE, COUNTS, array_bytes, exit_code, places, reader

pytestmark = pytest.mark.usefixtures("logging_restored")

HEAD_ONLY = ("--backbone", BACKBONE, "--weights", "none", "--train", "head", "--epochs", "1")
CLASSIFIER_FLAGS = {contract.CLASSIFIER: HEAD_ONLY}
FRAMEWORKS = {"keras", "tensorflow", "jax", "torch"}


@pytest.fixture(scope="module")
def preprocessed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which only the first script has run; read only."""
    folder = tmp_path_factory.mktemp("preprocessed")
    pipeline.preprocess(source, folder)
    return folder


@pytest.fixture(scope="module")
def resized(finished: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished chain whose first script has run again with another size; read only."""
    folder = pipeline.copy(finished, tmp_path_factory.mktemp("resized"))
    pipeline.preprocess(source, folder, "--size", str(pipeline.SIZE + 8))
    return folder


def remove_truth(source: Path, split: str) -> None:
    """Deletes the masks and the labels of a split."""
    shutil.rmtree(challenge_2017.mask_folder(source, split))
    challenge_2017.label_file(source, split).unlink()


def metrics(folder: Path, system: str = BACKBONE) -> dict:
    """Metrics of a system by split."""
    return json.loads((folder / "graphics" / "metrics.json").read_text())["systems"][system]["splits"]


def mask_metrics(folder: Path) -> dict:
    """Metrics of the predicted masks by split."""
    return json.loads((folder / "graphics" / "segmentation.json").read_text())["splits"]


# -------------------------------------------------------------------------------------------------------- command lines


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (contract.PREPROCESSING, ["--copies", "0.5"]),
        (contract.PREPROCESSING, ["--split", "2019"]),
        (contract.SEGNET, ["--learning-rate", "nan"]),
        (contract.SEGNET, ["--threshold", "0"]),
        (contract.SEGNET, ["--threshold", "1"]),
        (contract.SEGNET, ["--epochs", "-1"]),
        (contract.ROI, ["--roi", "circle"]),
        (contract.CLASSIFIER, ["--train", "none"]),
        (contract.EVALUATION, ["--seed", "-1"]),
    ],
)
def test_flag_with_a_value_out_of_range_is_named(
    script: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        pipeline.parser(script).parse_args(flags)
    assert stop.value.code == 2
    assert f"argument {flags[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize("script", pipeline.SCRIPTS)
def test_importing_a_script_has_no_effect(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(pipeline.ROOT / script), run_name=script.removesuffix(".py"))
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_scripts_that_do_not_train_need_no_framework(tmp_path: Path) -> None:
    names = [script.removesuffix(".py") for script in (contract.PREPROCESSING, contract.ROI, contract.EVALUATION)]
    code = f"import sys, {', '.join(names)}; print({FRAMEWORKS} & sys.modules.keys())"
    environment = os.environ | {"PYTHONPATH": str(pipeline.ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr


@pytest.mark.parametrize("script", [contract.SEGNET, contract.CLASSIFIER, contract.EVALUATION])
def test_unknown_backbone_is_bad_usage(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(monkeypatch, script, *places(tmp_path), "--backbone", "mobilenet9") == 2
    assert "mobilenet9" in capsys.readouterr().err


def test_input_size_that_does_not_fit_the_network_is_bad_usage(
    own_chain: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = array_bytes(own_chain)
    assert exit_code(monkeypatch, contract.SEGNET, *places(own_chain), "--network", "segnet", "--input-size", "30") == 2
    assert "--input-size" in capsys.readouterr().err
    assert array_bytes(own_chain) == before


# ----------------------------------------------------------------------------------------------------- a finished chain


@pytest.mark.parametrize("name", contract.FILES)
def test_finished_chain_has_every_file_of_the_contract(finished: Path, name: str) -> None:
    file, store = contract.FILES[name], reader(finished)
    splits: list[str] = list(SPLITS) if "{split}" in file.path else [""]
    if name == "features":
        splits.remove("test")  # the head is trained on train and validation
    if name == "probabilities":
        splits.remove("train")  # has probabilities only after a cross-validation
    for split in splits:
        fields = {"split": split, "backbone": BACKBONE, "member": ""}
        path = store.path(name, **fields)
        assert path.stat().st_size > 0
        assert store.manifest[path.relative_to(finished / "data").as_posix()]["script"] == file.writer
        if file.dtype:
            array = store.load(name, **fields)
            axes = {"N": store.rows(split), "S": pipeline.SIZE, "C": toy.FEATURES}
            assert array.shape == tuple(axes[axis] if isinstance(axis, str) else axis for axis in file.shape)
            assert array.dtype.kind == "U" if file.dtype == "str" else array.dtype == file.dtype
        elif path.suffix == ".json":
            assert json.loads(path.read_text())


def test_only_train_has_augmented_copies_of_the_minority_classes(finished: Path, source: Path) -> None:
    for split in SPLITS:
        originals = np.bincount([record.label or 0 for record in pipeline.records(source, split)], minlength=3)
        factors = (1, 3.5, 3.5) if split == "train" else (1, 1, 1)
        expected = [round(factor * count) for factor, count in zip(factors, originals.tolist(), strict=True)]
        assert np.bincount(reader(finished).load("labels", split=split)).tolist() == expected


def test_labels_belong_to_their_ids(finished: Path, source: Path) -> None:
    store = reader(finished)
    for split in SPLITS:
        truth = challenge_2017.read_labels(challenge_2017.label_file(source, split))
        assert [truth[name] for name in store.load("ids", split=split)] == store.load("labels", split=split).tolist()


def assert_regions(folder: Path, roi: str) -> None:
    """Checks that the regions of interest of all splits follow from images and predicted masks."""
    store = reader(folder)
    for split in SPLITS:
        images, predicted, regions = (store.load(name, split=split) for name in ("images", "predicted", "roi"))
        for image, mask, region in zip(images, predicted, regions, strict=True):
            assert np.array_equal(region, region_of_interest(image, mask, roi)[0])
        assert store.written_with("roi", split=split)["roi"] == roi


def test_classifier_gets_the_box_around_the_predicted_lesion(finished: Path) -> None:
    assert_regions(finished, "crop")


def test_classifier_gets_the_region_that_was_chosen(own_chain: Path) -> None:
    pipeline.run(contract.ROI, own_chain, "--roi", "mask")
    assert_regions(own_chain, "mask")


def test_probabilities_sum_to_one(finished: Path) -> None:
    for split in ("val", "test"):
        assert np.allclose(
            reader(finished).load("probabilities", split=split, backbone=BACKBONE).sum(axis=1), 1, atol=1e-5
        )


def test_metrics_have_counts_intervals_and_settings(finished: Path) -> None:
    report = json.loads((finished / "graphics" / "metrics.json").read_text())
    assert set(report["systems"]) == {BACKBONE}
    assert set(metrics(finished)) == {"val", "test"}
    for split, scored in metrics(finished).items():
        assert scored["n"] == COUNTS[split] == sum(scored["of_each_class"].values())
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
    saved = json.loads(store.path("thresholds", backbone=BACKBONE).read_text())
    probabilities = store.load("probabilities", split="val", backbone=BACKBONE)
    for index in (MELANOMA, KERATOSIS):
        truth = store.load("labels", split="val") == index
        thresholds = saved[CLASSES[index]]
        assert thresholds == classification.operating_points(truth, probabilities[:, index])
        assert (probabilities[truth, index] >= thresholds[classification.HIGH_SENSITIVITY]).mean() >= 0.9


def test_masks_are_scored_on_validation_and_test(finished: Path) -> None:
    scores = mask_metrics(finished)
    assert {split: scored["n"] for split, scored in scores.items()} == {"val": COUNTS["val"], "test": COUNTS["test"]}
    assert 0 <= scores["val"]["metrics"]["jaccard"] <= 1


def test_predictions_are_listed_by_id(finished: Path) -> None:
    table = pd.read_csv(finished / "graphics" / "predictions_test.csv")
    assert table.columns.tolist() == ["image_id", "melanoma", "seborrheic_keratosis"]
    assert table["image_id"].tolist() == reader(finished).load("ids", split="test").tolist()
    probabilities = reader(finished).load("probabilities", split="test", backbone=BACKBONE)[:, list(TASKS)]
    assert np.allclose(table[["melanoma", "seborrheic_keratosis"]], probabilities, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- wrong order


@pytest.mark.parametrize("script", pipeline.SCRIPTS[1:])
def test_script_that_runs_first_names_the_first_script(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(monkeypatch, script, *places(tmp_path)) == 3
    error = capsys.readouterr().err
    assert f"run {contract.PREPROCESSING}" in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "needed"),
    [
        (contract.ROI, contract.SEGNET),
        (contract.CLASSIFIER, contract.ROI),
        (contract.EVALUATION, contract.CLASSIFIER),
    ],
)
def test_script_that_was_left_out_is_named(
    script: str,
    needed: str,
    preprocessed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = array_bytes(preprocessed)
    assert exit_code(monkeypatch, script, *places(preprocessed), *CLASSIFIER_FLAGS.get(script, ())) == 3
    assert f"missing: run {needed} first" in capsys.readouterr().err
    assert array_bytes(preprocessed) == before


@pytest.mark.parametrize("script", [contract.ROI, contract.CLASSIFIER, contract.EVALUATION])
def test_arrays_made_from_images_of_another_size_are_stale(
    script: str, resized: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = array_bytes(resized)
    assert exit_code(monkeypatch, script, *places(resized), *CLASSIFIER_FLAGS.get(script, ())) == 3
    error = capsys.readouterr().err
    assert "stale" in error and f"run {contract.SEGNET} again" in error
    assert array_bytes(resized) == before


# ------------------------------------------------------------------------------------------- classes and labels missing


def test_training_without_melanoma_is_bad_input(
    own_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = challenge_2017.label_file(own_source, "train")
    table.write_text(table.read_text().replace(",1.0,0.0", ",0.0,0.0"))
    pipeline.preprocess(own_source, tmp_path, "--copies", "1")
    pipeline.use_true_masks(tmp_path)
    pipeline.run(contract.ROI, tmp_path)
    assert exit_code(monkeypatch, contract.CLASSIFIER, *places(tmp_path), *HEAD_ONLY) == 2
    assert "no melanoma among" in capsys.readouterr().err


def test_metrics_of_an_absent_class_are_undefined(own_source: Path, tmp_path: Path) -> None:
    for split in ("val", "test"):
        table = challenge_2017.label_file(own_source, split)
        table.write_text(table.read_text().replace(",1.0,", ",0.0,"))
    pipeline.preprocess(own_source, tmp_path, "--copies", "1")
    store = Store(tmp_path / "data", contract.CLASSIFIER, vars(pipeline.parser(contract.CLASSIFIER).parse_args([])))
    store.save_json("classifier_settings", {"parts": [pipeline.part("uniform")]}, backbone="uniform")
    for split in ("val", "test"):
        uniform = np.full((store.rows(split), 3), 1 / 3, np.float32)
        store.save("probabilities", uniform, split=split, backbone="uniform")
    pipeline.run(contract.EVALUATION, tmp_path)
    found = metrics(tmp_path, "uniform")["test"]["metrics"]
    assert found["melanoma auc"] is None and found["melanoma specificity at 0.5"] is not None


def test_split_that_lost_its_labels_is_predicted_but_not_evaluated(own_source: Path, own_chain: Path) -> None:
    remove_truth(own_source, "test")
    graphics = own_chain / "graphics"
    assert (graphics / "roc_test.png").is_file()
    pipeline.preprocess(own_source, own_chain)
    store = reader(own_chain)
    for name in ("labels", "masks", "has_mask"):
        assert not store.has(name, split="test") and not store.path(name, split="test").exists()
    pipeline.segment(own_chain)
    pipeline.run(contract.ROI, own_chain)
    pipeline.classify(own_chain, "--train", "head")
    pipeline.run(contract.EVALUATION, own_chain)
    table = pd.read_csv(graphics / "predictions_test.csv")
    assert table["image_id"].tolist() == store.load("ids", split="test").tolist()
    assert set(metrics(own_chain)) == set(mask_metrics(own_chain)) == {"val"}
    assert not list(graphics.glob("*_test.png"))


def rename(source: Path, split: str, record: Record, name: str) -> None:
    """Gives an image, its mask and its label another id."""
    assert record.mask
    record.image.rename(record.image.with_stem(name))
    record.mask.rename(record.mask.with_stem(f"{name}_segmentation"))
    table = challenge_2017.label_file(source, split)
    table.write_text(table.read_text().replace(record.id, name))


@pytest.fixture(scope="module")
def incomplete(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[Record]], Path]:
    """The records of a source, and a finished cross-validation on them; read only.

    In each split two images are named mole and mole_copy, three have no label and two others no mask.
    """
    changed = shutil.copytree(source, tmp_path_factory.mktemp("incomplete") / "source")
    for split in SPLITS:
        for record, name in zip(pipeline.records(changed, split), ("mole", "mole_copy"), strict=False):
            rename(changed, split, record, f"{split}_{name}")
    lines = ["image,label,mask,split"]
    for split in SPLITS:
        records = pipeline.records(changed, split)
        nevi = [row for row, record in enumerate(records) if record.label == NEVUS]
        for row, record in enumerate(records):
            label = "" if row in nevi[:3] else record.label
            lines.append(f"{record.image},{label},{'' if row in nevi[-2:] else record.mask},{split}")
    folder = changed.parent
    table = folder / "my.csv"
    table.write_text("\n".join(lines) + "\n")
    pipeline.preprocess(table, folder)
    pipeline.segment(folder, "--folds", "2")
    pipeline.run(contract.ROI, folder)
    pipeline.classify(folder, "--train", "head", "--folds", "2")
    pipeline.run(contract.EVALUATION, folder)
    return {split: pipeline.records(table, split) for split in SPLITS}, folder


def test_images_without_label_or_mask_and_of_any_name_are_predicted(
    incomplete: tuple[dict[str, list[Record]], Path],
) -> None:
    for split, records in incomplete[0].items():
        table = pd.read_csv(incomplete[1] / "graphics" / f"predictions_{split}.csv")
        ids = table["image_id"].tolist()
        assert sorted(ids) == [record.id for record in records] and f"{split}_mole_copy" in ids
        store = reader(incomplete[1])
        originals = base_rows(store, split)
        probabilities = store.load_first("probabilities", len(originals), split=split, backbone=BACKBONE)
        assert np.allclose(table[["melanoma", "seborrheic_keratosis"]], probabilities[:, list(TASKS)], atol=1e-6)
        assert store.load("ids", split=split)[originals].tolist() == ids


def test_only_images_with_label_and_mask_are_evaluated(
    incomplete: tuple[dict[str, list[Record]], Path],
) -> None:
    for split, records in incomplete[0].items():
        scored = metrics(incomplete[1])[split]
        assert scored["n"] == sum(scored["of_each_class"].values()) == len(records) - 3
        assert mask_metrics(incomplete[1])[split]["n"] == len(records) - 2


def test_rows_without_label_or_mask_are_those_of_the_source(
    incomplete: tuple[dict[str, list[Record]], Path],
) -> None:
    for split, records in incomplete[0].items():
        store, of_id = reader(incomplete[1]), {record.id: record for record in records}
        arrays = (store.load(name, split=split).tolist() for name in ("ids", "labels", "has_mask"))
        for name, label, has_mask in zip(*arrays, strict=True):
            record = of_id[name]
            assert label == (UNLABELLED if record.label is None else record.label)
            assert has_mask == (record.mask is not None)


# -------------------------------------------------------------------------------------------- settings of preprocessing


def test_only_augmented_copies_depend_on_the_seed(
    preprocessed: Path, finished: Path, source: Path, tmp_path: Path
) -> None:
    arrays = array_bytes(preprocessed)
    assert arrays.items() <= array_bytes(finished).items()  # the same seed
    pipeline.preprocess(source, tmp_path, "--seed", "5")
    others = array_bytes(tmp_path)
    assert arrays.keys() == others.keys()
    assert {name for name in arrays if arrays[name] != others[name]} == {"train_images.npy", "train_masks.npy"}
    for name in ("images", "masks"):
        first, second = (reader(folder).load(name, split="train") for folder in (preprocessed, tmp_path))
        assert np.array_equal(first[: COUNTS["train"]], second[: COUNTS["train"]])


def test_limit_takes_the_first_images_of_each_split_without_changing_them(
    preprocessed: Path, source: Path, tmp_path: Path
) -> None:
    pipeline.preprocess(source, tmp_path, "--limit", "4", "--copies", "1")
    for split in SPLITS:
        for name in ("ids", "images", "masks", "labels"):
            limited, complete = (reader(folder).load(name, split=split) for folder in (tmp_path, preprocessed))
            assert len(limited) == 4 and np.array_equal(limited, complete[:4])
        assert set(reader(tmp_path).load("labels", split=split).tolist()) == {0, 1, 2}


def test_split_of_2018_becomes_arrays(source: Path, tmp_path: Path) -> None:
    pipeline.preprocess(source, tmp_path, "--split", "2018", "--copies", "1")
    ids = {split: reader(tmp_path).load("ids", split=split).tolist() for split in SPLITS}
    everything = [name for names in ids.values() for name in names]
    assert len(everything) == len(set(everything)) == sum(COUNTS.values())
    sources = [source_reader.read(source)]
    division = Division(DIVISION_2018, None, 0)
    group_of = {record: number for number, record in enumerate(division.images_to_read(sources))}
    for split, records in division.divide(sources, group_of).items():
        assert ids[split] == [record.id for record in records]
