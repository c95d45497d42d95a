"""The networks in `pretrained/`: checksums, and the refusal to predict images they were trained on."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.atomic import sha256
from melanoma.artifacts.store import Store
from melanoma.dataset.splits import OFFICIAL
from melanoma.errors import InputError
from melanoma.inference import pretrained
from melanoma.inference.calibration import Calibration
from melanoma.models import backbones, classifier, segmentation
from melanoma.models.segmentation import Design

import keras
import numpy as np
import pytest
from pipeline import BACKBONE

SIZE = 16  # pixels
UNET = Design("unet", SIZE, BACKBONE)


def make_images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3)).astype(np.uint8)


def pack(folder: Path, network: str, model: keras.Model, description: dict[str, Any]) -> Path:
    """Writes the weights and the description of a network; returns the path of the weights."""
    weights = folder / f"{network}.weights.h5"
    model.save_weights(weights)
    text = json.dumps(description | {"sha256": {weights.name: sha256(weights)}})
    (folder / f"{network}.json").write_text(text, encoding="utf-8")
    return weights


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    return tmp_path


def test_segmentation_network_is_restored_from_its_description(folder: Path) -> None:
    keras.utils.set_random_seed(0)
    model = segmentation.build(UNET, SIZE)
    pack(folder, pretrained.SEGNET, model, {"design": asdict(UNET), "threshold": 0.4})
    restored, description = pretrained.load_segnet(SIZE)
    assert description["threshold"] == 0.4
    assert np.array_equal(restored.predict_on_batch(make_images()), model.predict_on_batch(make_images()))


def test_classifier_is_restored_for_images_of_another_size(folder: Path) -> None:
    keras.utils.set_random_seed(0)
    one = classifier.build(BACKBONE, SIZE, backbones.NONE, None, input_size=8)
    settings: dict[str, Any] = {"backbone": BACKBONE, "scaling": None, "input_size": 8, "tta": False, "calibration": {}}
    pack(folder, pretrained.CLASSIFIER, one.model, settings)
    restored, _ = pretrained.load_classifier(SIZE)
    found, _ = restored.probabilities(make_images(), 2, "images")
    assert found == pytest.approx(one.model.predict_on_batch(make_images()), abs=1e-6)
    assert pretrained.load_classifier(24)[0].classifiers[0].model.input_shape == (None, 24, 24, 3)


@pytest.mark.parametrize("missing", ["segnet.json", "segnet.weights.h5"])
def test_missing_file_is_named(missing: str, folder: Path) -> None:
    pack(folder, pretrained.SEGNET, segmentation.build(UNET, SIZE), {"design": asdict(UNET)})
    (folder / missing).unlink()
    with pytest.raises(InputError, match=f"{missing} is missing; restore it from the repository"):
        pretrained.read(pretrained.SEGNET)


def test_changed_weights_are_refused(folder: Path) -> None:
    weights = pack(folder, pretrained.SEGNET, segmentation.build(UNET, SIZE), {"design": asdict(UNET)})
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=rf"{weights.name} has SHA-256 \w{{64}}, expected \w{{64}}"):
        pretrained.load_segnet(SIZE)


@pytest.mark.parametrize(("network", "files"), [(pretrained.SEGNET, 1), (pretrained.CLASSIFIER, 4)])
def test_files_of_the_repository_match_their_checksums(network: str, files: int) -> None:
    description, weights = pretrained.read(network)
    assert len(weights) == files
    assert set(pretrained.FOLDER.glob(f"{network}*.h5")) == set(weights)
    if network == pretrained.SEGNET:
        assert Design(**description["design"]).network in segmentation.NETWORKS
        assert 0 < description["threshold"] < 1
    else:
        assert {"backbone", "scaling", "input_size", "tta", "roi"} <= description.keys()
        assert Calibration(**description["calibration"]).temperature > 0


@pytest.mark.parametrize("division", [OFFICIAL, "2018"])
def test_images_of_another_split_are_refused(division: str, tmp_path: Path) -> None:
    store = Store(tmp_path, contract.PREPROCESSING, {"split": division})
    store.save("ids", np.array(["a"]), split="val")
    if division == OFFICIAL:
        pretrained.refuse_other_split(store, "val")
        return
    with pytest.raises(InputError, match=f"--split 2018.*with --split {OFFICIAL}"):
        pretrained.refuse_other_split(store, "val")
