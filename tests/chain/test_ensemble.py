"""The fourth script with --ensemble: the mean of two classifiers, evaluated, packed and loaded again."""

import json
import re
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.classes import SPLITS
from melanoma.dataset.splits import base_rows, load_folds
from melanoma.errors import InputError
from melanoma.evaluation import occlusion, report, scoring
from melanoma.inference import calibration, pretrained
from melanoma.inference.calibration import Calibration
from melanoma.inference.ensemble import load
from melanoma.inference.predict import mean_output
from melanoma.metrics import classification
from tools import pack_pretrained

import numpy as np
import pandas as pd
import pipeline
import pytest
from pipeline import BACKBONE, COUNTS, OTHER, exit_code, places, reader

pytestmark = pytest.mark.usefixtures("logging_restored")

ENSEMBLE = ("--ensemble", BACKBONE, OTHER)


def combine(folder: Path, *flags: str) -> None:
    pipeline.run(contract.CLASSIFIER, folder, *ENSEMBLE, *flags)


@pytest.fixture(scope="module")
def combined(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain with two cross-validated classifiers and their ensemble, evaluated; read only.

    The calibrations make the probabilities of the small networks differ between images and classifiers.
    """
    folder = pipeline.copy(finished, tmp_path_factory.mktemp("combined"))
    first = ("--epochs", "3", "--folds", "2")
    second = (
        "--epochs",
        "4",
        "--folds",
        "3",
        "--keep",
        "best",
        "--backbone",
        OTHER,
        "--views",
        "1",
        "--input-size",
        "16",
    )
    for flags, fitted in ((first, Calibration(0.1)), (second, Calibration(0.2, (0.0, 0.5, -0.5)))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calibration, "fit", lambda *_, fitted=fitted: fitted)
            pipeline.classify(folder, "--train", "head", *flags)
    combine(folder)
    pipeline.run(contract.EVALUATION, folder, "--occlusion")
    return folder


@pytest.fixture
def own(combined: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return pipeline.copy(combined, tmp_path / "chain")


@pytest.fixture
def packed(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The description of the ensemble, packed into a temporary folder."""
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "pretrained")
    pack(own)
    return json.loads((pretrained.FOLDER / "classifier.json").read_text())


def pack(folder: Path) -> None:
    pack_pretrained.main(pack_pretrained.build_parser().parse_args([pretrained.CLASSIFIER, *places(folder)]))


def probabilities(folder: Path, name: str, split: str) -> np.ndarray:
    """Of the images of --source."""
    store = reader(folder)
    return np.array(store.load_first("probabilities", len(base_rows(store, split)), split=split, backbone=name))


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "graphics" / report.METRICS_FILE).read_text())


def texts(folder: Path) -> list[str]:
    """The report and the model card."""
    return [(folder / "graphics" / name).read_text(encoding="utf-8") for name in (report.PAGE, report.CARD)]


# ------------------------------------------------------------------------------------------------------------- the mean


@pytest.mark.parametrize("split", SPLITS)
def test_probabilities_are_the_mean_of_those_of_the_classifiers(split: str, combined: Path) -> None:
    first, second = (probabilities(combined, name, split) for name in (BACKBONE, OTHER))
    found = np.load(reader(combined).path("probabilities", split=split, backbone=contract.ENSEMBLE))
    assert found == pytest.approx((first + second) / 2, abs=1e-7)
    assert found.shape == (COUNTS[split], 3)
    assert abs(first - second).max() > 0.1 and np.ptp(found, axis=0).max() > 0.03


def test_networks_of_the_ensemble_give_its_probabilities(combined: Path) -> None:
    blend, settings = load(reader(combined), contract.ENSEMBLE)
    assert [(part["backbone"], part["views"], part["input_size"]) for part in settings["parts"]] == [
        (BACKBONE, 8, pipeline.SIZE),
        (OTHER, 1, 16),
    ]
    assert [part.members for part in blend.parts] == [["_fold1", "_fold2"], ["_fold1", "_fold2", "_fold3"]]
    found, _ = blend.probabilities(reader(combined).load("roi", split="test"), 16, "test")
    assert found == pytest.approx(probabilities(combined, contract.ENSEMBLE, "test"), abs=1e-4)


def test_ensemble_with_other_views_is_predicted_and_calibrated_again(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = Calibration(0.3)
    monkeypatch.setattr(calibration, "fit", lambda *_: fitted)
    combine(own, "--views", "2")
    blend, settings = load(reader(own), contract.ENSEMBLE)
    assert [(part["views"], part["calibration"]["temperature"]) for part in settings["parts"]] == [(2, 0.3)] * 2
    found, _ = blend.probabilities(reader(own).load("roi", split="test"), 16, "test")
    assert found == pytest.approx(probabilities(own, contract.ENSEMBLE, "test"), abs=1e-4)
    rows = base_rows(reader(own), "train")
    images, expected = reader(own).load("roi", split="train"), []
    for part in blend.parts:  # of each image the network that was trained without it
        fold_of_row = load_folds(reader(own), len(part.classifiers), 0)[rows]
        each = np.stack([fitted.apply(mean_output([one.model], images[rows], 2)) for one in part.classifiers])
        expected.append(each[fold_of_row, np.arange(len(rows))])
    assert probabilities(own, contract.ENSEMBLE, "train") == pytest.approx(np.mean(expected, axis=0), abs=1e-4)


def test_limit_takes_the_first_images(own: Path) -> None:
    combine(own, "--limit", "5")
    for split in ("val", "test"):
        found = np.load(reader(own).path("probabilities", split=split, backbone=contract.ENSEMBLE))
        assert found == pytest.approx(np.mean([probabilities(own, name, split)[:5] for name in (BACKBONE, OTHER)], 0))


def test_without_a_cross_validation_of_every_classifier_train_is_not_predicted(
    own: Path, packed: dict[str, Any]
) -> None:
    pipeline.classify(own, "--train", "head", "--backbone", OTHER)
    combine(own)
    assert not reader(own).has("probabilities", split="train", backbone=contract.ENSEMBLE)
    pipeline.run(contract.EVALUATION, own)
    system = results(own)["systems"][contract.ENSEMBLE]
    assert set(system["splits"]) == {"val", "test"} and system["chosen_on"] == "val"
    pack(own)
    description = json.loads((pretrained.FOLDER / "classifier.json").read_text())
    assert description["chosen_on"] == "val" and "train" not in description["metrics_before_packing"]
    assert list(description["sha256"]) == [
        *(pretrained.weight_file(BACKBONE, f"_fold{fold}") for fold in (1, 2)),
        pretrained.weight_file(OTHER, ""),
    ]
    pipeline.run(contract.CLASSIFIER, own, "--pretrained")
    for split in ("val", "test"):
        expected, found = (probabilities(own, name, split) for name in (contract.ENSEMBLE, contract.PRETRAINED))
        assert found == pytest.approx(expected, abs=5e-3)


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_ensemble_is_evaluated_first_and_the_classifiers_are_compared_with_it(combined: Path) -> None:
    metrics = results(combined)
    assert list(metrics["systems"]) == [contract.ENSEMBLE, OTHER, BACKBONE]
    assert list(metrics["differences"]["test"]) == [OTHER, BACKBONE]
    system = metrics["systems"][contract.ENSEMBLE]
    assert set(system["splits"]) == set(SPLITS) and system["chosen_on"] == "train"
    assert system["networks"] == [
        *metrics["systems"][BACKBONE]["networks"],
        *metrics["systems"][OTHER]["networks"],
    ]
    labels = reader(combined).load("labels", split="test")
    expected = classification.task_aucs(labels, probabilities(combined, contract.ENSEMBLE, "test"))
    assert {name: system["splits"]["test"]["metrics"][name] for name in expected} == pytest.approx(expected)
    table = pd.read_csv(combined / "graphics" / "predictions_test.csv")
    assert np.allclose(table["melanoma"], probabilities(combined, contract.ENSEMBLE, "test")[:, 1], atol=1e-6)


def test_occlusion_test_and_grad_cam_are_of_the_ensemble(combined: Path) -> None:
    systems = results(combined)["systems"]
    assert [name for name, system in systems.items() if "occlusion" in system] == [contract.ENSEMBLE]
    for split, variants in systems[contract.ENSEMBLE]["occlusion"].items():
        rows = occlusion.rows_with_lesion(reader(combined), split)
        labels = reader(combined).load("labels", split=split)[rows]
        expected = classification.task_aucs(labels, probabilities(combined, contract.ENSEMBLE, split)[rows])
        assert variants[occlusion.AS_TRAINED]["metrics"] == pytest.approx(expected, abs=0.05)
        assert (combined / "graphics" / f"gradcam_{split}.png").is_file()


def test_report_and_model_card_name_the_networks_and_why_their_epochs_were_kept(combined: Path) -> None:
    page, card = texts(combined)
    first, second = (one["epochs"] for one in results(combined)["systems"][contract.ENSEMBLE]["networks"])
    assert first == "weights of epoch 3, 3 of 3, the last one"
    assert re.fullmatch(r"weights of epoch \d, \d, \d of 4, best auc of validation", second)
    assert f">{BACKBONE}: {first}.<" in page and f">{OTHER}: {second}.<" in page
    described = [
        f"- 2 with backbone {BACKBONE}; {first}; test-time augmentation: mean over 8 flips and quarter turns of each "
        "image.",
        f"- 3 with backbone {OTHER}; {second}.",
    ]
    # Blank lines, without which Markdown joins the list and the paragraph after it.
    assert "\n\n{}\n{}\n\nThe result is the mean".format(*described) in card
    assert f"The mean of these classifiers: {BACKBONE}, {OTHER}." in card


def test_commands_of_the_report_train_the_classifiers_before_the_ensemble(own: Path) -> None:
    for flags in ((), ("--backbone", contract.ENSEMBLE)):
        pipeline.run(contract.EVALUATION, own, *flags)
        for text in texts(own):
            found = re.findall(rf"python {contract.CLASSIFIER} (--\S+.*)", text)
            named = [re.search(rf"--backbone ({BACKBONE}|{OTHER})|--ensemble {BACKBONE} {OTHER}", one) for one in found]
            assert [one and one[1] for one in named] == [BACKBONE, OTHER, None]


def test_ensemble_of_a_classifier_that_was_trained_again_is_left_out(
    own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline.classify(own, "--train", "head", "--backbone", OTHER, "--seed", "1")
    caplog.set_level("INFO")
    pipeline.run(contract.EVALUATION, own)
    assert list(results(own)["systems"]) == [OTHER, BACKBONE]
    assert re.search(rf"the classifier ensemble is left out: .* is stale: .*{OTHER}", caplog.text)
    combine(own)
    assert [one.name for one in systems(own)] == [contract.ENSEMBLE, OTHER, BACKBONE]


def systems(folder: Path) -> list[scoring.System]:
    return scoring.load_systems(reader(folder), scoring.load_images(reader(folder)), [])


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--ensemble", BACKBONE, "mobilenet"), 3, rf"mobilenet\.json is missing: run {contract.CLASSIFIER} first"),
        (("--ensemble", BACKBONE, OTHER, BACKBONE.upper()), 2, f"--ensemble names {BACKBONE} twice"),
        (("--ensemble", contract.PRETRAINED), 2, "no backbone 'pretrained'"),
        ((*ENSEMBLE, "--pretrained"), 2, "not allowed with argument"),
        (
            (*ENSEMBLE, "--backbone", OTHER, "--folds", "2"),
            2,
            "--ensemble trains nothing: leave out --backbone, --folds",
        ),
        ((*ENSEMBLE, "--keep", "best", "--views", "1"), 2, "leave out --keep"),
        ((*ENSEMBLE, "--views", "2", "--limit", "9"), 2, "leave out --limit"),
        ((*ENSEMBLE, "--batch-size", "2", "--restart"), 2, "leave out --restart, --batch-size"),
        (("--ensemble", BACKBONE, "mobilenet", "--views", "2"), 3, r"mobilenet\.json is missing"),
    ],
)
def test_ensemble_that_cannot_be_made_is_refused_and_nothing_changes(
    flags: tuple[str, ...],
    code: int,
    message: str,
    own: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {path: path.stat().st_mtime_ns for path in own.rglob("*") if path.is_file()}
    assert exit_code(monkeypatch, contract.CLASSIFIER, *places(own), *flags) == code
    assert re.search(message, capsys.readouterr().err)
    assert {path: path.stat().st_mtime_ns for path in own.rglob("*") if path.is_file()} == before


def test_ensemble_of_a_stale_classifier_is_refused_and_names_the_script(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.run(contract.ROI, own, "--roi", "full")
    pipeline.classify(own, "--train", "head")
    assert exit_code(monkeypatch, contract.CLASSIFIER, *places(own), *ENSEMBLE) == 3
    assert re.search(rf"{OTHER}\.json is stale: .* run {contract.CLASSIFIER} again", capsys.readouterr().err)


def test_ensemble_of_classifiers_of_fewer_images_is_refused(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.classify(own, "--train", "head", "--backbone", OTHER, "--limit", "9")
    assert exit_code(monkeypatch, contract.CLASSIFIER, *places(own), *ENSEMBLE) == 3
    assert "or this script with --limit 9" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- packing


def test_packed_ensemble_gives_the_probabilities_it_gave_before(own: Path, packed: dict[str, Any]) -> None:
    names = [pretrained.weight_file(BACKBONE, f"_fold{fold}") for fold in (1, 2)]
    names += [pretrained.weight_file(OTHER, f"_fold{fold}") for fold in (1, 2, 3)]
    assert names[0] == f"classifier_{BACKBONE}_fold1.weights.h5"
    assert list(packed["sha256"]) == names
    assert {path.name for path in pretrained.FOLDER.glob("*.h5")} == set(names)
    pipeline.run(contract.CLASSIFIER, own, "--pretrained")
    weights = reader(own).path("classifier_settings", backbone=BACKBONE).parent
    assert {path.name for path in weights.glob("pretrained_*.h5")} == {
        name.replace("classifier", contract.PRETRAINED) for name in names
    }
    for split in ("val", "test"):
        expected, found = (probabilities(own, name, split) for name in (contract.ENSEMBLE, contract.PRETRAINED))
        assert found == pytest.approx(expected, abs=5e-3) and abs(found - expected).max() > 0  # rounded to float16
    thresholds = results(own)["systems"][contract.ENSEMBLE]["thresholds"]
    pipeline.run(contract.EVALUATION, own, "--occlusion", "--backbone", contract.PRETRAINED)
    (system,) = results(own)["systems"].values()
    assert system["thresholds"] == packed["thresholds"] == thresholds
    assert [one["backbone"] for one in system["networks"]] == [BACKBONE, OTHER] and "occlusion" in system


def test_pretrained_networks_of_one_backbone_can_be_used_alone(own: Path, packed: dict[str, Any]) -> None:
    pipeline.run(contract.CLASSIFIER, own, "--pretrained", "--backbone", OTHER)
    expected, found = (probabilities(own, name, "test") for name in (OTHER, contract.PRETRAINED))
    assert found == pytest.approx(expected, abs=5e-3)
    settings = json.loads(reader(own).path("classifier_settings", backbone=contract.PRETRAINED).read_text())
    assert [part["backbone"] for part in settings["parts"]] == [OTHER]
    assert packed["thresholds"] and settings["thresholds"] == {}
    pipeline.run(contract.EVALUATION, own, "--backbone", contract.PRETRAINED)
    (system,) = results(own)["systems"].values()
    assert system["chosen_on"] == "val" and system["thresholds"]
    page, card = texts(own)
    assert "on which split their\ncalibration and thresholds were chosen (`chosen_on`)" in card
    assert "calibration and thresholds were chosen" not in page
    with pytest.raises(InputError, match=f"no networks of mobilenet, but of {BACKBONE}, {OTHER}"):
        pipeline.run(contract.CLASSIFIER, own, "--pretrained", "--backbone", "mobilenet")


def test_description_of_the_packed_ensemble_says_how_each_classifier_was_trained(packed: dict[str, Any]) -> None:
    used = [part["settings"] for part in packed["parts"]]
    assert [(one["backbone"], one["folds"], one["keep"]) for one in used] == [(BACKBONE, 2, "last"), (OTHER, 3, "best")]
    assert packed["settings"][contract.CLASSIFIER]["ensemble"] == [BACKBONE, OTHER]
    assert packed["data"].endswith("; epochs chosen on validation")
    assert packed["metrics_before_packing"]["train"]["n"] == COUNTS["train"]
