"""The tool that scores submissions to the ISIC challenges reads what predict.py writes, and its metrics are ours."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import predict
from melanoma.classes import CLASSES, TASKS

import pipeline
import pytest
from pipeline import BACKBONE

pytestmark = pytest.mark.slow

LOCK = pipeline.ROOT / "requirements" / "challenge.txt"


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tool in an environment of its own, because it needs an older pandas."""
    environment = tmp_path_factory.mktemp("challenge")
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    install = [str(part) for part in (environment / "bin" / "python", "-m", "pip", "install", "--quiet", "-r", LOCK)]
    if subprocess.run(install, capture_output=True, check=False).returncode:
        pytest.skip("isic-challenge-scoring cannot be installed here")
    return environment / "bin" / "isic-challenge-scoring"


@pytest.fixture(scope="module")
def predicted(finished: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Predictions of the validation images of the finished chain."""
    out = tmp_path_factory.mktemp("predicted")
    images = source / "ISIC-2017_Validation_Data"
    flags = [str(images), "--data", str(finished / "data"), "--out", str(out), "--no-overlays", "--jobs", "1"]
    predict.main(predict.build_parser().parse_args(flags))
    return out


def score(tool: Path, task: str, truth: Path, prediction: Path) -> dict[str, Any]:
    command = [str(part) for part in (tool, "--output", "json", task, truth, prediction)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_scores_of_the_masks_are_ours_at_the_images_own_size(
    tool: Path, predicted: Path, finished: Path, source: Path
) -> None:
    scored = score(tool, "segmentation", source / "ISIC-2017_Validation_Part1_GroundTruth", predicted / "masks")
    ours = json.loads((finished / "graphics" / "segmentation.json").read_text())["own_size"]["val"]
    assert ours["n"] == pipeline.COUNTS["val"]
    for name in ("jaccard", "threshold_jaccard", "dice", "sensitivity", "specificity"):
        assert scored["macro_average"][name] == pytest.approx(ours["metrics"][name], abs=1e-9), name


def test_scores_of_the_classes_are_ours(
    tool: Path, predicted: Path, finished: Path, source: Path, tmp_path: Path
) -> None:
    truth = tmp_path / "truth.csv"
    with (source / "ISIC-2017_Validation_Part3_GroundTruth.csv").open(newline="") as stream, truth.open("w") as out:
        out.write("image,benign_nevus,melanoma,seborrheic_keratosis\n")
        for row in csv.DictReader(stream):
            melanoma, keratosis = float(row["melanoma"]), float(row["seborrheic_keratosis"])
            out.write(f"{row['image_id']},{1 - melanoma - keratosis},{melanoma},{keratosis}\n")
    scored = score(tool, "classification", truth, predicted / "submission.csv")["per_category"]["auc"]
    ours = json.loads((finished / "graphics" / "metrics.json").read_text())["systems"][BACKBONE]["splits"]["val"]
    for index in TASKS:
        name = CLASSES[index]
        assert scored[name.replace(" ", "_")] == pytest.approx(ours["metrics"][f"{name} auc"], abs=1e-6), name
