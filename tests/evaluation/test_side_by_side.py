"""Several classifiers in one data folder: which are evaluated, in which order, on which images, in which files."""

import json
import re
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.classes import MELANOMA
from melanoma.errors import StageError
from melanoma.evaluation import report, scoring, submissions, tables
from melanoma.metrics import bootstrap, classification

import numpy as np
import pandas as pd
import pipeline
import pytest
from pipeline import BACKBONE, reader

MAIN, OTHER = "densenet121", "mobilenet"


@pytest.fixture(scope="module")
def several(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain with three classifiers, all evaluated; read only. The main one was cross-validated."""
    folder = pipeline.copy(finished, tmp_path_factory.mktemp("several"))
    pipeline.add_classifier(folder, OTHER)
    pipeline.add_classifier(folder, MAIN, ("train", "val", "test"))
    pipeline.run(contract.EVALUATION, folder)
    return folder


@pytest.fixture
def own(several: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return pipeline.copy(several, tmp_path / "several")


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "graphics" / report.METRICS_FILE).read_text())


def probabilities(folder: Path, name: str, split: str) -> np.ndarray:
    return np.array(reader(folder).load("probabilities", split=split, backbone=name))


def load(folder: Path, backbone: str | None = None, *files: Path) -> list[scoring.System]:
    store = Store(folder / "data", contract.EVALUATION, {})
    return scoring.load_systems(store, scoring.load_images(store), files, backbone)


# ---------------------------------------------------------------------------------------------------- which classifiers


def test_the_ensemble_is_the_main_classifier_then_densenet_and_pretrained_networks_come_last() -> None:
    names = ["xception", "pretrained", "mobilenet", "densenet121", "ensemble", "densenet169"]
    expected = ["ensemble", "densenet121", "densenet169", "mobilenet", "xception", "pretrained"]
    assert sorted(names, key=contract.classifier_order) == expected


def test_all_classifiers_are_evaluated_on_the_splits_they_predict(several: Path) -> None:
    assert {name: set(system["splits"]) for name, system in results(several)["systems"].items()} == {
        MAIN: {"train", "val", "test"},
        OTHER: {"val", "test"},
        BACKBONE: {"val", "test"},
    }
    for name, system in results(several)["systems"].items():
        truth = reader(several).load("labels", split="test") == MELANOMA
        expected = classification.auc(truth, probabilities(several, name, "test")[:, MELANOMA])
        assert system["splits"]["test"]["metrics"]["melanoma auc"] == pytest.approx(expected)
        saved = json.loads(reader(several).path("thresholds", backbone=name).read_text())
        assert saved == system["thresholds"]


def test_named_classifier_is_evaluated_alone_and_files_of_the_others_go(own: Path) -> None:
    graphics = own / "graphics"
    assert (graphics / submissions.FILE_OF_OTHER.format(split="test", name=OTHER)).is_file()
    (graphics / "predictions_test_mine.csv").touch()
    pipeline.run(contract.EVALUATION, own, "--backbone", "Mobile_Net")
    assert list(results(own)["systems"]) == [OTHER]
    assert {path.name for path in graphics.glob("predictions_*")} == {
        "predictions_val.csv",
        "predictions_test.csv",
        "predictions_test_mine.csv",
    }
    table = pd.read_csv(graphics / "predictions_test.csv")
    assert np.allclose(table["melanoma"], probabilities(own, OTHER, "test")[:, MELANOMA])


@pytest.mark.parametrize("name", ["xception", contract.PRETRAINED])
def test_named_classifier_that_is_missing_names_the_script(name: str, several: Path) -> None:
    with pytest.raises(StageError, match=rf"{name}_probabilities.npy is missing: run {contract.CLASSIFIER} first"):
        load(several, name)


def test_stale_or_incomplete_classifiers_are_left_out_beside_a_current_one(
    own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline.run(contract.ROI, own, "--roi", "full")
    with pytest.raises(StageError, match=f"{MAIN}_probabilities.npy is stale"):
        load(own)
    pipeline.add_classifier(own, OTHER)
    pipeline.add_classifier(own, "xception", ("val",))
    with caplog.at_level("INFO", "melanoma"):
        assert [system.name for system in load(own)] == [OTHER]
    left_out = [record.getMessage() for record in caplog.records if "is left out" in record.getMessage()]
    assert [line.split()[2] for line in left_out] == [MAIN, BACKBONE, "xception"]
    assert all(f"run {contract.CLASSIFIER}" in line for line in left_out)
    with pytest.raises(StageError, match="stale"):  # it is named, so no other system can stand in for it
        load(own, MAIN, own / "graphics" / "predictions_test.csv")


def test_later_classifier_does_not_make_another_one_stale(several: Path) -> None:
    for name in (MAIN, OTHER, BACKBONE):
        for file in ("classifier_settings", "thresholds"):
            reader(several).check(file, backbone=name)
    inputs = reader(several).manifest[f"weights/{OTHER}_thresholds.json"]["inputs"]
    assert f"arrays/val_{OTHER}_probabilities.npy" in inputs
    assert not any(MAIN in key or BACKBONE in key for key in inputs)


# ---------------------------------------------------------------------------------------------------------------- files


def test_predictions_without_a_name_are_those_of_the_main_classifier(several: Path) -> None:
    for name, file in ((MAIN, "predictions_test.csv"), (OTHER, f"predictions_test_{OTHER}.csv")):
        table = pd.read_csv(several / "graphics" / file)
        assert np.allclose(table["melanoma"], probabilities(several, name, "test")[:, MELANOMA])
    names = {path.name for path in (several / "graphics").glob("predictions_train*")}
    assert names == {"predictions_train.csv"}


def test_differences_from_the_main_classifier_are_paired(several: Path) -> None:
    found = results(several)["differences"]
    assert {split: list(others) for split, others in found.items()} == {
        "train": [],
        "val": [OTHER, BACKBONE],
        "test": [OTHER, BACKBONE],
    }
    labels = reader(several).load("labels", split="test")
    first, second = (probabilities(several, name, "test") for name in (MAIN, OTHER))
    for metric, expected in bootstrap.paired_differences(labels, first, second, seed=0).items():
        one = found["test"][OTHER][metric]
        assert one == {**vars(expected), "interval": list(expected.interval)}


def test_report_compares_and_the_model_card_describes_only_the_main_classifier(several: Path) -> None:
    graphics, metrics = several / "graphics", results(several)
    page, card = ((graphics / name).read_text(encoding="utf-8") for name in (report.PAGE, report.CARD))
    for values in tables.compared(metrics["systems"], "test").values():
        assert len(values) == len(tables.COMPARED) == 5
        for value in values:
            assert re.search(f">{value.number}<.*{value.bounds}<", page)
    for one in metrics["differences"]["test"][OTHER].values():
        assert f"<td>{one['difference']:+.3f}<small>" in page and f"<td>{one['p_value']:.4f}</td>" in page
    assert f"# Model card: {MAIN}," in card
    # Of other classifiers the card has only the commands.
    assert OTHER not in card.partition("## What was run")[0]
    commands = [line for line in card.splitlines() if line.startswith(f"python {contract.CLASSIFIER}")]
    assert len(commands) == 3 and len(set(commands)) == 3


def test_terminal_table_has_every_system_below_its_columns(several: Path) -> None:
    lines = list(tables.compared_lines(results(several)["systems"], "test"))
    assert [line.split()[0] for line in lines[2::2]] == [MAIN, OTHER, BACKBONE]
    assert max(map(len, lines)) <= 100 and len(set(map(len, lines[1:]))) == 1
    assert list(tables.compared_lines(results(several)["systems"], "train")) == []  # the main one is alone there


def test_cross_validation_of_another_classifier_is_shown_if_the_main_one_has_none(own: Path) -> None:
    Store(own / "data", contract.CLASSIFIER, {}).remove("probabilities", split="train", backbone=MAIN)
    pipeline.add_classifier(own, MAIN)
    pipeline.add_classifier(own, OTHER, ("train", "val", "test"))
    pipeline.run(contract.EVALUATION, own)
    assert list(tables.compared(results(own)["systems"], "train")) == [OTHER]
    page = (own / "graphics" / report.PAGE).read_text(encoding="utf-8")
    assert "<h2>Cross-validation" in page and "train" not in results(own)["differences"]


def test_table_says_which_of_its_metrics_are_biased(several: Path) -> None:
    systems = results(several)["systems"]
    best = "Biased upwards: epochs, calibration and thresholds were chosen on these images."
    last = "Biased upwards: calibration and thresholds were chosen on these images."
    assert tables.compared_caveats(systems, "val") == {best: [OTHER], last: [BACKBONE]}  # the main one's are from train
    assert tables.compared_caveats(systems, "test") == {}
    lines = list(tables.compared_lines(systems, "val"))
    assert lines[-4:] == [f"{OTHER}:", f"  {best}", f"{BACKBONE}:", f"  {last}"]
    page = (several / "graphics" / report.PAGE).read_text(encoding="utf-8")
    assert f"{OTHER}: <b>{best}</b>" in page and f"{BACKBONE}: <b>{last}</b>" in page


# ------------------------------------------------------------------------------------------- images seen while training


def test_images_seen_in_training_are_left_out_of_the_metrics_of_all_systems(
    own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = {split: reader(own).load("ids", split=split).tolist() for split in ("train", "val", "test")}
    seen = {"val": ids["val"][1:4], "test": ids["test"], "train": ids["train"]}
    pipeline.add_classifier(own, contract.PRETRAINED, seen=seen)
    with caplog.at_level("INFO", "melanoma"):
        pipeline.run(contract.EVALUATION, own)
    metrics, count = results(own), pipeline.COUNTS["val"]
    assert metrics["left_out"] == {
        "val": {"seen": 3, "images": count},
        "test": {"seen": pipeline.COUNTS["test"], "images": pipeline.COUNTS["test"]},
    }
    for name, system in metrics["systems"].items():
        assert set(system["splits"]) == ({"val", "train"} if name == MAIN else {"val"})
        assert system["splits"]["val"]["n"] == count - 3
    kept = np.r_[0, 4:count]
    truth = reader(own).load("labels", split="val")[kept] == MELANOMA
    score = probabilities(own, OTHER, "val")[kept][:, MELANOMA]
    assert metrics["systems"][OTHER]["splits"]["val"]["metrics"]["melanoma auc"] == classification.auc(truth, score)
    truth, score = reader(own).load("labels", split="val") == MELANOMA, probabilities(own, OTHER, "val")[:, MELANOMA]
    assert metrics["systems"][OTHER]["thresholds"]["melanoma"] == classification.operating_points(truth, score)
    assert metrics["systems"][MAIN]["splits"]["train"]["n"] == pipeline.COUNTS["train"]  # pretrained has none of train
    assert len(pd.read_csv(own / "graphics" / "predictions_test.csv")) == pipeline.COUNTS["test"]
    notes = [scoring.left_out_note(split, counts) for split, counts in metrics["left_out"].items()]
    assert notes[0] == f"3 of {count} images of validation were used to train the pretrained networks: left out"
    assert notes[1].endswith("predicted, not evaluated")
    for place in (caplog.text, *((own / "graphics" / name).read_text() for name in (report.PAGE, report.CARD))):
        assert all(note in place for note in notes)


def test_images_seen_by_a_classifier_that_is_not_evaluated_are_kept(own: Path) -> None:
    pipeline.add_classifier(own, contract.PRETRAINED, seen={"val": reader(own).load("ids", split="val").tolist()})
    store = Store(own / "data", contract.EVALUATION, {})
    images = scoring.load_images(store)
    for backbone, split_is_evaluated in ((OTHER, True), (None, False)):
        systems = scoring.load_systems(store, images, [], backbone)
        assert ("val" in scoring.to_evaluate(images, systems).labels) == split_is_evaluated


def test_only_rows_that_are_kept_count_with_a_limit() -> None:
    images = scoring.Images({"val": list("abcd")}, {"val": np.arange(3)}, {"val": np.array([0, 1, 2])})
    systems = [scoring.System("a", {}, seen={"val": ["b"]})]
    kept = scoring.to_evaluate(images, systems)
    assert kept.ids == {"val": ["a", "c"]}
    assert (kept.rows["val"].tolist(), kept.labels["val"].tolist()) == ([0, 2], [0, 2])
    assert scoring.count_seen(images, systems) == {"val": {"seen": 1, "images": 3}}


def test_thresholds_of_one_classifier_do_not_depend_on_what_another_has_seen() -> None:
    images = scoring.Images({"val": list("abcdef")}, {"val": np.arange(6)}, {"val": np.array([0, 1, 2, 0, 1, 2])})
    values = np.random.default_rng(0).dirichlet((1, 1, 1), 6)
    own = scoring.System("own", {"val": values})
    other = scoring.System("other", {"val": values}, seen={"val": list("abcdef")})
    assert scoring.with_thresholds(own, images) == scoring.choose_thresholds(own, images.labels)
    chosen = scoring.with_thresholds(other, images)
    assert {point for points in chosen.thresholds.values() for point in points} == {"0.5"}
    assert scoring.to_evaluate(images, [own, other]).labels == {}
