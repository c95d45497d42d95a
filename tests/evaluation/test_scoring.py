"""Systems and their thresholds: where they come from, where metrics are biased, what evaluate.py writes."""

import json
import os
import sys
from pathlib import Path

from melanoma.artifacts import contract
from melanoma.artifacts.store import Store
from melanoma.classes import CLASSES, KERATOSIS, MELANOMA, SPLITS
from melanoma.dataset.splits import UNLABELLED
from melanoma.errors import InputError, StageError
from melanoma.evaluation import report, scoring
from melanoma.evaluation.scoring import System
from melanoma.metrics import segmentation

import numpy as np
import pipeline
import pytest
from pipeline import BACKBONE, exit_code, places, reader

LABELS = np.array([0, 1, 0, 1])
PROBABILITIES = np.array([[0.8, 0.2, 0], [0.4, 0.6, 0], [0.7, 0.3, 0], [0.1, 0.9, 0]])


@pytest.fixture
def noise(finished: Path, tmp_path: Path) -> Path:
    """Random predictions for the test split of a chain."""
    rng = np.random.default_rng(0)
    lines = [f"{name}.jpg,{rng.random()},{rng.random()}" for name in reader(finished).load("ids", split="test")]
    path = tmp_path / "noise.csv"
    path.write_text("\n".join(lines))
    return path


def test_thresholds_are_chosen_on_validation() -> None:
    system = scoring.choose_thresholds(System("a", {"val": PROBABILITIES, "test": PROBABILITIES}), {"val": LABELS})
    assert system.chosen_on == "val"
    assert set(system.thresholds["melanoma"].values()) == {0.6}
    assert system.first_threshold(MELANOMA) == 0.6


def test_thresholds_are_chosen_on_train_after_a_cross_validation() -> None:
    system = scoring.choose_thresholds(
        System("a", {"train": PROBABILITIES, "val": PROBABILITIES / 2}), {"train": LABELS, "val": LABELS}
    )
    assert system.chosen_on == "train" and system.first_threshold(MELANOMA) == 0.6


def test_threshold_is_the_challenges_where_no_labels_choose_one() -> None:
    no_keratosis = scoring.choose_thresholds(System("a", {"val": PROBABILITIES}), {"val": LABELS})
    assert no_keratosis.thresholds[CLASSES[KERATOSIS]] == {"0.5": 0.5}
    for labels in ({}, {"test": LABELS}):
        thresholds = scoring.choose_thresholds(System("a", {"val": PROBABILITIES}), labels).thresholds
        assert list(thresholds.values()) == [{"0.5": 0.5}] * 2


@pytest.mark.parametrize(
    ("split", "chosen_on", "epochs_chosen_on", "submitted", "expected"),
    [
        ("test", "val", "val", False, ""),
        ("val", "val", None, True, "thresholds were"),
        ("val", "val", "val", False, "epochs, calibration and thresholds were"),
        ("val", "train", "val", False, "epochs were"),
        ("val", None, "val", False, "epochs were"),
        ("val", None, None, False, ""),
        ("train", "train", "val", False, "calibration and thresholds were"),
        ("train", None, "val", False, ""),
    ],
)
def test_caveat_names_what_was_chosen_on_the_same_images(
    split: str, chosen_on: str | None, epochs_chosen_on: str | None, submitted: bool, expected: str
) -> None:
    system = {"chosen_on": chosen_on, "epochs_chosen_on": epochs_chosen_on, "calibrated": not submitted}
    found = scoring.caveat(split, system)
    assert found == (f"Biased upwards: {expected} chosen on these images." if expected else "")


@pytest.mark.parametrize(
    ("layout", "split", "expected"),
    [("ISIC 2017 challenge", "official", "val"), ("ISIC 2017 challenge", "2018", None), ("HAM10000", "official", None)],
)
def test_epochs_of_pretrained_networks_were_chosen_on_one_validation_split_only(
    layout: str, split: str, expected: str | None, partly: Path
) -> None:
    settings = {"sources": [{"layout": layout}], "split": split}
    step1 = Store(partly / "data", contract.PREPROCESSING, settings)
    step1.save("ids", np.array(reader(partly).load("ids", split="train")), split="train")
    classifier = Store(partly / "data", contract.CLASSIFIER, {})
    made = {contract.PREPROCESSING: {"sources": [{"layout": "ISIC 2017 challenge"}], "split": "official"}}
    for name in (contract.PRETRAINED, "b"):
        description = {"parts": [pipeline.part(name)], "settings": made, "chosen_on": "val"}
        classifier.save_json("classifier_settings", description, backbone=name)
        classifier.save("probabilities", np.eye(5, 3, dtype=np.float32), split="train", backbone=name)
    images = scoring.load_images(reader(partly))
    found = scoring.load_classifier(reader(partly), images, contract.PRETRAINED)
    assert found.epochs_chosen_on == expected and found.calibrated == (expected == "val")
    assert scoring.load_classifier(reader(partly), images, "b").epochs_chosen_on == "val"


@pytest.mark.parametrize(
    ("keeps", "expected"),
    [
        (["the last one"], None),
        (["lowest loss of training"], None),
        (["lowest loss of validation"], "val"),
        (["the last one", "best auc of validation"], "val"),  # of an ensemble
    ],
)
def test_epochs_were_chosen_on_validation_if_those_of_any_network_were(
    keeps: list[str], expected: str | None, partly: Path
) -> None:
    parts = [pipeline.part(f"b{place}", keep) for place, keep in enumerate(keeps)]
    classifier = Store(partly / "data", contract.CLASSIFIER, {})
    classifier.save_json("classifier_settings", {"parts": parts}, backbone="b")
    classifier.save("probabilities", np.eye(5, 3, dtype=np.float32), split="train", backbone="b")
    system = scoring.load_classifier(reader(partly), scoring.load_images(reader(partly)), "b")
    assert system.epochs_chosen_on == expected


def test_networks_are_described_by_their_backbone_and_last_phase() -> None:
    folds = pipeline.part("a", "lowest loss of validation", _fold1=(9, 12), _fold2=(4, 9), _fold3=(2, 9))
    folds["members"]["_fold1"] = {"head": {"kept_epoch": 1, "reason": "-", "seconds": []}} | folds["members"]["_fold1"]
    other = {"full": {"kept_epoch": 3, "reason": "the last one", "seconds": [1.0] * 3}}
    averaged = {
        "views": 8,
        "averaged": {"_fold1": {"_fold1": pipeline.part("b", "the last one")["members"][""], "_fold2": other}},
    }
    assert scoring.describe_networks([folds, pipeline.part("b", "the last one") | averaged]) == [
        {
            "backbone": "a",
            "count": 3,
            "averaged": 1,
            "views": 1,
            "epochs": "weights of epoch 9, 4, 2 of 9, 12, lowest loss of validation",
        },
        {"backbone": "b", "count": 1, "averaged": 2, "views": 8, "epochs": "weights of epoch 2, 3 of 3, the last one"},
    ]


def test_test_is_reported_before_validation_and_cross_validation() -> None:
    assert scoring.report_order(["train", "val", "test"]) == ["test", "val", "train"]
    assert scoring.report_order({"train": 0, "test": 0}) == ["test", "train"]


def test_metrics_of_a_subgroup_are_of_melanoma_at_the_threshold() -> None:
    found = scoring.score_subgroup(LABELS, PROBABILITIES, 0.7, seed=0)
    assert (found["n"], found["melanomas"]) == (4, 2)
    assert found["metrics"] == {"auc": 1, "sensitivity": 0.5, "specificity": 1}
    assert list(found["intervals"]["auc"]) == [1, 1]


def test_masks_are_scored_on_originals_only(finished: Path) -> None:
    store = reader(finished)
    scored = scoring.score_masks(store, "train", scoring.rows_with_masks(store, "train"), seed=0)
    count = pipeline.COUNTS["train"]  # the originals come before their copies
    masks, predicted = store.load("masks", split="train"), store.load("predicted", split="train")
    assert scored["n"] == count < len(masks)
    expected = segmentation.per_image(masks[:count], predicted[:count])
    assert scored["metrics"] == pytest.approx({name: values.mean() for name, values in expected.items()})
    for name, (low, high) in scored["intervals"].items():
        assert low <= scored["metrics"][name] <= high


@pytest.fixture
def partly(tmp_path: Path) -> Path:
    """Four images of train and a copy of the second, which has no label; the third has no mask."""
    pipeline.save_rows(tmp_path / "data", "train", [0, 1, 2, 3, 1])
    masks = np.zeros((5, 4, 4, 1), np.uint8)
    masks[:, :2] = 1
    step1, labels = Store(tmp_path / "data", contract.PREPROCESSING, {}), [0, UNLABELLED, 1, 2, UNLABELLED]
    step1.save("labels", np.array(labels, np.int8), split="train")
    step1.save("has_mask", np.array([True, True, False, True, True]), split="train")
    step1.save("masks", masks * np.array([1, 1, 0, 1, 1], np.uint8)[:, None, None, None], split="train")
    Store(tmp_path / "data", contract.SEGNET, {}).save("predicted", masks, split="train")
    classifier = Store(tmp_path / "data", contract.CLASSIFIER, {"backbone": "a", "pretrained": False})
    classifier.save_json("classifier_settings", {"parts": [pipeline.part("a")]}, backbone="a")
    classifier.save("probabilities", np.eye(5, 3, dtype=np.float32), split="train", backbone="a")
    return tmp_path


def test_images_without_label_are_not_evaluated_but_listed(partly: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    images = scoring.load_images(reader(partly))
    assert images.ids == {"train": ["train0", "train1", "train2", "train3"]}
    evaluated = scoring.to_evaluate(images, [])
    assert evaluated.ids == {"train": ["train0", "train2", "train3"]}
    assert evaluated.labels["train"].tolist() == [0, 1, 2]
    system = scoring.load_classifier(reader(partly), images, "a")
    scoring.log_unlabelled(images, [scoring.System("b", {})])
    assert not caplog.messages
    scoring.log_unlabelled(images, [system])
    assert caplog.messages == ["train: 1 of 4 images are predicted, but not evaluated: no label"]
    assert np.array_equal(system.probabilities["train"], np.eye(4, 3))
    assert np.array_equal(system.of_images(images, evaluated).probabilities["train"], np.eye(4, 3)[[0, 2, 3]])


def test_images_of_other_sources_are_not_evaluated(partly: Path) -> None:
    pipeline.save_rows(partly / "data", "train", [0, 1, 2, 3, 1], base=3)
    classifier = Store(partly / "data", contract.CLASSIFIER, {"backbone": "a", "pretrained": False})
    classifier.save("probabilities", np.eye(3, dtype=np.float32), split="train", backbone="a")
    images = scoring.load_images(reader(partly))
    assert images.ids == images.all_ids == {"train": ["train0", "train1", "train2"]}
    assert scoring.to_evaluate(images, []).labels["train"].tolist() == [0, 1]
    assert scoring.load_classifier(reader(partly), images, "a").probabilities["train"].tolist() == np.eye(3).tolist()


def test_submitted_predictions_cover_images_without_label_too(partly: Path) -> None:
    table = partly / "other.csv"
    table.write_text("".join(f"train{row},0.{row},0\n" for row in range(4)))
    images = scoring.load_images(reader(partly))
    (system,) = scoring.load_submissions([table], images)
    assert system.probabilities["train"][:, MELANOMA].tolist() == [0, 0.1, 0.2, 0.3]
    evaluated = system.of_images(images, scoring.to_evaluate(images, []))
    assert evaluated.probabilities["train"][:, MELANOMA].tolist() == [0, 0.2, 0.3]


@pytest.mark.parametrize(("limit", "evaluated"), [(1, [0]), (2, [0]), (3, [0, 2]), (5, [0, 2, 3])])
def test_limit_counts_images_without_label(limit: int, evaluated: list[int], partly: Path) -> None:
    images = scoring.load_images(Store(partly / "data", contract.EVALUATION, {"limit": limit}))
    assert len(images.rows["train"]) == min(limit, 4) and len(images.all_ids["train"]) == 4
    assert scoring.to_evaluate(images, []).rows["train"].tolist() == evaluated


def test_split_of_which_no_image_has_a_label_is_predicted_only(partly: Path) -> None:
    step1 = Store(partly / "data", contract.PREPROCESSING, {})
    step1.save("labels", np.full(5, UNLABELLED, np.int8), split="train")
    images = scoring.to_evaluate(scoring.load_images(reader(partly)), [])
    assert images.labels == {} and images.rows["train"].tolist() == [0, 1, 2, 3]


def test_masks_are_scored_where_there_is_a_true_one(partly: Path) -> None:
    rows = scoring.rows_with_masks(reader(partly), "train")
    scored = scoring.score_masks(reader(partly), "train", rows, seed=0)
    assert scored["n"] == 3 and scored["metrics"]["jaccard"] == 1


def test_images_to_leave_out_have_no_rows(finished: Path) -> None:
    store = reader(finished)
    ids = store.load("ids", split="val").tolist()
    assert scoring.rows_with_masks(store, "val", [ids[2], "unknown"]).tolist() == [0, 1, *range(3, len(ids))]
    assert scoring.rows_with_masks(store, "val", ids).tolist() == []


@pytest.mark.usefixtures("logging_restored")
def test_other_systems_are_evaluated_beside_the_classifier(
    own_chain: Path, noise: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    graphics = own_chain / "graphics"
    pipeline.run(contract.EVALUATION, own_chain)
    before = {split: (graphics / f"roc_{split}.png").read_bytes() for split in ("val", "test")}
    own = graphics / "predictions_test.csv"
    copy = own.rename(own.with_name("copy.csv"))
    assert exit_code(monkeypatch, contract.EVALUATION, *places(own_chain), "--predictions", str(copy), str(noise)) == 0
    systems = json.loads((graphics / "metrics.json").read_text())["systems"]
    assert list(systems) == [BACKBONE, "copy", "noise"]
    metrics = {name: system["splits"]["test"]["metrics"] for name, system in systems.items()}
    aucs = {name: found["melanoma auc"] for name, found in metrics.items()}
    assert aucs["copy"] == pytest.approx(aucs[BACKBONE]) and metrics["noise"] != metrics["copy"]
    assert set(systems["copy"]["splits"]) == {"test"}
    assert systems["copy"]["thresholds"]["melanoma"] == {"0.5": 0.5}
    changed = {split: (graphics / f"roc_{split}.png").read_bytes() != before[split] for split in before}
    assert changed == {"val": False, "test": True}
    printed = capsys.readouterr().out
    assert report.SYNTHETIC in printed
    titles = [line for line in printed.splitlines() if ", n = " in line]
    count = pipeline.COUNTS["test"]
    assert titles == [
        f"Test, n = {count}: {BACKBONE}",
        f"Test, n = {count}: all systems. F1 at the first operating point",
        f"Validation, n = {pipeline.COUNTS['val']}: {BACKBONE}",
    ]


@pytest.mark.usefixtures("logging_restored")
def test_submitted_systems_are_evaluated_without_a_classifier(
    own_chain: Path, noise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = reader(own_chain)
    for split in SPLITS:
        store.remove("probabilities", split=split, backbone=BACKBONE)
    assert exit_code(monkeypatch, contract.EVALUATION, *places(own_chain), "--predictions", str(noise)) == 0
    assert list(json.loads((own_chain / "graphics" / "metrics.json").read_text())["systems"]) == ["noise"]
    assert (own_chain / "graphics" / "roc_test.png").is_file()
    assert not (own_chain / "graphics" / "roc_val.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--predictions", "{noise}", "{noise}"), "have the same name"),
        (("--predictions", "{graphics}/" + f"{BACKBONE}.csv"), "name of a classifier of this pipeline"),
        (("--predictions", "{graphics}/predictions_val.csv"), "this run replaces"),
    ],
)
def test_ambiguous_systems_are_refused_and_nothing_is_removed(
    flags: tuple[str, ...], message: str, own_chain: Path, noise: Path
) -> None:
    graphics = own_chain / "graphics"
    (graphics / f"{BACKBONE}.csv").write_bytes((graphics / "predictions_val.csv").read_bytes())
    before = sorted((path.name, path.stat().st_mtime_ns) for path in graphics.iterdir())
    with pytest.raises(InputError, match=message):
        pipeline.run(contract.EVALUATION, own_chain, *(flag.format(graphics=graphics, noise=noise) for flag in flags))
    assert sorted((path.name, path.stat().st_mtime_ns) for path in graphics.iterdir()) == before


def test_stale_classifier_is_left_out(own_chain: Path, noise: Path) -> None:
    pipeline.run(contract.ROI, own_chain, "--roi", "full")
    with pytest.raises(StageError):
        pipeline.run(contract.EVALUATION, own_chain)
    pipeline.run(contract.EVALUATION, own_chain, "--predictions", str(noise))
    assert list(json.loads((own_chain / "graphics" / "metrics.json").read_text())["systems"]) == ["noise"]
    assert not (own_chain / "graphics" / "MODEL_CARD.md").exists()  # it would describe the stale classifier


@pytest.mark.skipif(sys.platform != "linux", reason="file names must be text")
def test_any_file_name_can_name_a_system(own_chain: Path, noise: Path) -> None:
    path = noise.rename(os.fsdecode(bytes(noise.with_name("_a$^$|`<b>\n\\frac{")) + b"\xff.csv"))
    pipeline.run(contract.EVALUATION, own_chain, "--predictions", str(path))
    graphics, name = own_chain / "graphics", "_a$^$|`<b>\\n\\frac{\\udcff"
    assert list(json.loads((graphics / "metrics.json").read_text())["systems"]) == [BACKBONE, name]
    page = (graphics / report.PAGE).read_text(encoding="utf-8")
    assert f'<th scope="row">{name.replace("<b>", "&lt;b&gt;")}</th>' in page and "<b>\\n" not in page
    assert (graphics / report.CARD).is_file() and (graphics / "roc_test.png").is_file()


def test_limit_applies_to_submitted_predictions(own_chain: Path, noise: Path) -> None:
    pipeline.run(contract.EVALUATION, own_chain, "--limit", "6", "--predictions", str(noise))
    systems = json.loads((own_chain / "graphics" / "metrics.json").read_text())["systems"]
    assert {system["splits"]["test"]["n"] for system in systems.values()} == {6}
