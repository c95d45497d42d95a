"""Predictions of other systems: their forms, what is refused, and how evaluate.py judges and compares them."""

import json
from pathlib import Path

from melanoma import isic, predictions, stages
from melanoma.errors import InputError, StageError

import numpy as np
import pipeline
import pytest
from pipeline import BACKBONE, exit_code, places, reader

IDS = {"val": ["ISIC_1", "ISIC_2"], "test": ["ISIC_3"]}
EXPECTED = [[0.6, 0.3, 0.1], [0.0, 0.75, 0.25]]
HEADER = "image_id,melanoma,seborrheic_keratosis"


def written(folder: Path, *lines: str) -> Path:
    path = folder / "system.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def noise(finished: Path, tmp_path: Path) -> Path:
    """Random predictions for the test split of a chain."""
    rng = np.random.default_rng(0)
    lines = [f"{name}.jpg,{rng.random()},{rng.random()}" for name in reader(finished).load("ids", split="test")]
    path = tmp_path / "noise.csv"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    "lines",
    [
        (HEADER, "ISIC_1,0.3,0.1", "ISIC_2,0.75,0.25"),
        ("ISIC_1,0.3,0.1", "ISIC_2,0.75,0.25"),
        ("ISIC_2.jpg,0.75,0.25", "ISIC_1.jpg, 0.30, 1e-1"),
        ("Seborrheic_Keratosis,image_id,age,melanoma", "0.1,ISIC_1,40,0.3", "0.25,ISIC_2.JPG,,0.75"),
        (f"\ufeff{HEADER}\r", "ISIC_1,0.3,0.1\r", "", "ISIC_2,0.75,0.25\r"),
    ],
    ids=["header", "bare", "suffixes, other order", "other columns", "byte order mark, CRLF, empty line"],
)
def test_forms_that_are_met_are_read(lines: tuple[str, ...], tmp_path: Path) -> None:
    found = predictions.read(written(tmp_path, *lines), IDS)
    assert list(found) == ["val"]
    assert found["val"] == pytest.approx(np.array(EXPECTED))


def test_file_may_be_about_several_splits(tmp_path: Path) -> None:
    found = predictions.read(written(tmp_path, "ISIC_3,1,0", "ISIC_1,0.3,0.1", "ISIC_2,0.75,0.25"), IDS)
    assert found["test"].tolist() == [[0, 1, 0]] and found["val"] == pytest.approx(np.array(EXPECTED))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((HEADER, "ISIC_1,0.3,0.1"), "lacks ids of val: ISIC_2"),
        (("ISIC_3,0,0", "ISIC_3.jpg,0,0"), "more than once: ISIC_3"),
        (("ISIC_3,0,0", "ISIC_9,0,0"), "are in no split here: ISIC_9"),
        (("ISIC_3,1.01,0",), "not from 0 to 1: ISIC_3"),
        (("ISIC_3,0,-0.01",), "not from 0 to 1: ISIC_3"),
        (("ISIC_3,nan,0",), "not from 0 to 1: ISIC_3"),
        (("ISIC_3,NaN,0",), "not from 0 to 1: ISIC_3"),
        (("ISIC_3,inf,0",), "not from 0 to 1: ISIC_3"),
        (("ISIC_3,,0",), "not from 0 to 1: ISIC_3"),
        (("ISIC_3,high,0",), "not from 0 to 1: ISIC_3"),
        (("ISIC_3,0",), "has 2 columns"),
        (("ISIC_3,0,0,0",), "has 4 columns"),
        (("image_id,melanoma,nevus", "ISIC_3,0,0"), "no single column seborrheic_keratosis"),
        (("image_id,melanoma,melanoma,seborrheic_keratosis", "ISIC_3,0,0,0"), "no single column melanoma"),
        ((HEADER,), "names no image"),
        (("ISIC_3,0,0", "ISIC_1,0,0,0"), "no readable CSV"),
        (("",), "no readable CSV"),
    ],
)
def test_predictions_that_cannot_be_judged_are_refused(lines: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        predictions.read(written(tmp_path, *lines), IDS)


def test_file_that_is_not_there_or_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        predictions.read(tmp_path / "none.csv", IDS)
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.raises(InputError, match="no readable CSV"):
        predictions.read(tmp_path / "picture.csv", IDS)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    predictions.write(tmp_path / "own.csv", IDS["val"], np.array(EXPECTED))
    assert (tmp_path / "own.csv").read_text().splitlines()[0] == HEADER
    assert predictions.read(tmp_path / "own.csv", IDS)["val"] == pytest.approx(np.array(EXPECTED))


@pytest.mark.usefixtures("logging_restored")
def test_other_systems_are_judged_and_drawn_beside_the_own(
    own_chain: Path, noise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphics = own_chain / "graphics"
    before = {split: (graphics / f"roc_{split}.png").read_bytes() for split in ("val", "test")}
    own = graphics / "predictions_test.csv"
    copy = own.rename(own.with_name("copy.csv"))
    assert exit_code(monkeypatch, stages.EVALUATION, *places(own_chain), "--predictions", str(copy), str(noise)) == 0
    systems = json.loads((graphics / "metrics.json").read_text())["systems"]
    assert list(systems) == [BACKBONE, "copy", "noise"]
    areas = {name: system["splits"]["test"]["figures"]["melanoma auc"] for name, system in systems.items()}
    assert areas["copy"] == pytest.approx(areas[BACKBONE]) and areas["noise"] != areas["copy"]
    assert set(systems["copy"]["splits"]) == {"test"}
    assert systems["copy"]["thresholds"]["melanoma"] == {"0.5": 0.5}
    changed = {split: (graphics / f"roc_{split}.png").read_bytes() != before[split] for split in before}
    assert changed == {"val": False, "test": True}


@pytest.mark.usefixtures("logging_restored")
def test_predictions_are_judged_without_a_classifier(
    own_chain: Path, noise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = reader(own_chain)
    for split in isic.SPLITS:
        store.remove("probabilities", split=split)
    assert exit_code(monkeypatch, stages.EVALUATION, *places(own_chain), "--predictions", str(noise)) == 0
    assert list(json.loads((own_chain / "graphics" / "metrics.json").read_text())["systems"]) == ["noise"]
    assert (own_chain / "graphics" / "roc_test.png").is_file()
    assert not (own_chain / "graphics" / "roc_val.png").exists()


@pytest.mark.usefixtures("logging_restored")
def test_comparison_tells_the_difference_and_leaves_the_rest_alone(
    own_chain: Path, noise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphics = own_chain / "graphics"
    before, own = (graphics / "metrics.json").read_bytes(), graphics / "predictions_test.csv"
    assert exit_code(monkeypatch, stages.EVALUATION, *places(own_chain), "--compare", str(own), str(noise)) == 0
    assert (graphics / "metrics.json").read_bytes() == before
    found = json.loads((graphics / "comparison.json").read_text())
    areas = json.loads(before)["systems"][BACKBONE]["splits"]["test"]["figures"]
    assert (found["first"], found["second"]) == ("predictions_test", "noise")
    assert found["splits"]["test"]["melanoma auc"]["first"] == pytest.approx(areas["melanoma auc"])
    assert (graphics / "comparison_test.png").is_file() and set(found["splits"]) == {"test"}


@pytest.mark.usefixtures("logging_restored")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--compare", "{graphics}/predictions_val.csv", "{noise}"), "no labelled split in common"),
        (("--predictions", "{noise}", "{noise}"), "have the same name"),
        (("--predictions", "{graphics}/" + f"{BACKBONE}.csv"), "name of the own network"),
        (("--predictions", "{graphics}/predictions_val.csv"), "this run writes itself"),
    ],
)
def test_systems_that_cannot_be_told_apart_or_compared_are_refused(
    flags: tuple[str, ...],
    message: str,
    own_chain: Path,
    noise: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    graphics = own_chain / "graphics"
    (graphics / f"{BACKBONE}.csv").write_bytes((graphics / "predictions_val.csv").read_bytes())
    filled = [flag.format(graphics=graphics, noise=noise) for flag in flags]
    before = sorted((path.name, path.stat().st_mtime_ns) for path in graphics.iterdir())
    assert exit_code(monkeypatch, stages.EVALUATION, *places(own_chain), *filled) == 2
    assert message in capsys.readouterr().err
    assert sorted((path.name, path.stat().st_mtime_ns) for path in graphics.iterdir()) == before


def test_own_network_that_is_stale_is_left_out(own_chain: Path, noise: Path) -> None:
    pipeline.run(stages.MASKING, own_chain, "--roi", "full")
    with pytest.raises(StageError):
        pipeline.run(stages.EVALUATION, own_chain)
    pipeline.run(stages.EVALUATION, own_chain, "--predictions", str(noise))
    assert list(json.loads((own_chain / "graphics" / "metrics.json").read_text())["systems"]) == ["noise"]
    assert not (own_chain / "graphics" / "MODEL_CARD.md").exists()  # it would be of a network that nobody asked about


def test_limit_cuts_the_predictions_too(own_chain: Path, noise: Path) -> None:
    pipeline.run(stages.EVALUATION, own_chain, "--limit", "6", "--predictions", str(noise))
    systems = json.loads((own_chain / "graphics" / "metrics.json").read_text())["systems"]
    assert {system["splits"]["test"]["n"] for system in systems.values()} == {6}


def test_new_comparison_takes_the_pictures_of_the_last_one_away(own_chain: Path, noise: Path, tmp_path: Path) -> None:
    graphics = own_chain / "graphics"
    copy = tmp_path / "copy.csv"
    copy.write_bytes((graphics / "predictions_val.csv").read_bytes())
    pipeline.run(stages.EVALUATION, own_chain, "--compare", str(graphics / "predictions_val.csv"), str(copy))
    assert (graphics / "comparison_val.png").is_file()
    pipeline.run(stages.EVALUATION, own_chain, "--compare", str(graphics / "predictions_test.csv"), str(noise))
    assert [path.name for path in graphics.glob("comparison_*")] == ["comparison_test.png"]
