"""predict.py on the networks of a finished chain."""

import csv
import shutil
import sys
from pathlib import Path

import predict
from melanoma.artifacts import contract
from melanoma.classes import CLASSES, MELANOMA
from melanoma.cli import run as cli
from melanoma.deployment import pipeline, results
from melanoma.errors import StageError

import numpy as np
import pytest
from PIL import Image
from pipeline import BACKBONE, reader


def run(*flags: str | Path) -> None:
    predict.main(predict.build_parser().parse_args([*map(str, flags), "--jobs", "1"]))


def exit_code(monkeypatch: pytest.MonkeyPatch, *flags: str | Path) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, flags), "--jobs", "1"])
    try:
        cli.run(predict.build_parser(), predict.main, writes=predict.WRITES)
    except SystemExit as stop:
        return stop.code
    return 0


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / results.TABLE).open(newline="") as stream:
        return {row["image"]: row for row in csv.DictReader(stream)}


@pytest.fixture
def images(source: Path, tmp_path: Path) -> Path:
    """The test images, in a folder of another name."""
    return shutil.copytree(source / "ISIC-2017_Test_v2_Data", tmp_path / "mine")


def test_agrees_with_the_scripts(finished: Path, images: Path, tmp_path: Path) -> None:
    run(images, "--data", finished / "data", "--out", tmp_path / "out")
    store, found = reader(finished), table(tmp_path / "out")
    ids = store.load("ids", split="test").tolist()
    assert set(found) == set(ids)
    expected = store.load("probabilities", split="test", backbone=BACKBONE)
    probabilities = [[float(found[name][column]) for column in results.PROBABILITIES] for name in ids]
    assert np.array(probabilities) == pytest.approx(np.array(expected), abs=1e-5)
    for name, mask in zip(ids, store.load("predicted", split="test"), strict=True):
        with Image.open(tmp_path / "out/masks" / f"{name}_segmentation.png") as large:
            small = np.asarray(large.resize(mask.shape[:2], Image.Resampling.BOX)) > 127
        assert (small == (mask[..., 0] > 0)).mean() > 0.97  # the contour may move by a pixel


def test_resumes_and_keeps_what_is_there(finished: Path, images: Path, tmp_path: Path) -> None:
    flags = (images, "--data", finished / "data", "--out", tmp_path / "out")
    run(*flags)
    complete = (tmp_path / "out" / results.TABLE).read_text()
    lines = complete.splitlines(keepends=True)
    (tmp_path / "out" / results.TABLE).write_text("".join(lines[:4]) + "half a li")
    kept = tmp_path / "out/masks" / f"{lines[1].split(',')[0]}_segmentation.png"
    kept.write_bytes(b"not written again")
    run(*flags)
    assert (tmp_path / "out" / results.TABLE).read_text() == complete
    assert kept.read_bytes() == b"not written again"


def test_a_broken_image_is_listed_and_the_others_are_predicted(
    finished: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    assert exit_code(monkeypatch, images, "--data", finished / "data", "--out", tmp_path / "out") == 2
    assert "1 of 13 images could not be read" in capsys.readouterr().err
    assert len(table(tmp_path / "out")) == 12
    assert "broken" in (tmp_path / "out" / results.FAILED).read_text()
    assert "1 image could not be read" in (tmp_path / "out/report.html").read_text()


def test_a_folder_without_networks_names_the_script_to_run(tmp_path: Path, images: Path) -> None:
    with pytest.raises(StageError, match=contract.CLASSIFIER):
        run(images, "--data", tmp_path / "none", "--out", tmp_path / "out")


@pytest.mark.slow
def test_pretrained_networks_with_other_views_get_the_default_threshold() -> None:
    networks = pipeline.from_pretrained(views=1, backbone="mobilenetv2")
    assert networks.thresholds[CLASSES[MELANOMA]] == {"0.5": 0.5}
