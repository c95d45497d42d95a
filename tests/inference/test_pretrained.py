"""The networks in `pretrained/`: checksums, and the images they were trained on."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from melanoma.artifacts import contract
from melanoma.artifacts.atomic import sha256
from melanoma.artifacts.store import Store
from melanoma.errors import InputError
from melanoma.inference import pretrained
from melanoma.inference.calibration import Calibration
from melanoma.models import backbones, classifier, segmentation
from melanoma.models.classifier import Preprocessing
from melanoma.models.segmentation import Design
from melanoma.sources.layouts import challenge_2017

import keras
import numpy as np
import pytest
from pipeline import BACKBONE, OTHER

SIZE = 16  # pixels
UNET = Design("unet", SIZE, BACKBONE)
SEGNET_WEIGHTS = "segnet.weights.h5"


def make_images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3)).astype(np.uint8)


def pack(folder: Path, network: str, models: dict[str, keras.Model], description: dict[str, Any]) -> None:
    """Writes weights, by the name of the file, and the description of a network."""
    for name, model in models.items():
        model.save_weights(folder / name)
    text = json.dumps(
        {"training_ids": [], "extra_training_ids": [], "sha256": {name: sha256(folder / name) for name in models}}
        | description
    )
    (folder / f"{network}.json").write_text(text, encoding="utf-8")


def pack_unet(folder: Path) -> None:
    pack(folder, pretrained.SEGNET, {SEGNET_WEIGHTS: segmentation.build(UNET, SIZE)}, {"design": asdict(UNET)})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    return tmp_path


def test_segmentation_network_is_restored_from_its_description(folder: Path) -> None:
    keras.utils.set_random_seed(0)
    model = segmentation.build(UNET, SIZE)
    pack(folder, pretrained.SEGNET, {SEGNET_WEIGHTS: model}, {"design": asdict(UNET), "threshold": 0.4})
    (restored,), description = pretrained.load_segnet(SIZE)
    assert description["threshold"] == 0.4
    assert np.array_equal(restored.predict_on_batch(make_images()), model.predict_on_batch(make_images()))


def test_classifiers_are_restored_for_images_of_another_size(folder: Path) -> None:
    keras.utils.set_random_seed(0)
    models = {
        pretrained.weight_file(backbone, member): classifier.build(
            backbone, SIZE, backbones.NONE, Preprocessing(input_size=8)
        ).model
        for backbone, member in ((OTHER, ""), (BACKBONE, "_fold1"), (BACKBONE, "_fold2"))
    }
    design: dict[str, Any] = {"scaling": None, "input_size": 8, "views": 1, "calibration": {}, "extra": False}
    parts = [
        design | {"backbone": OTHER, "members": {"": {}}},
        design | {"backbone": BACKBONE, "members": {"_fold1": {}, "_fold2": {}}},
    ]
    pack(folder, pretrained.CLASSIFIER, models, {"parts": parts})
    restored, _ = pretrained.load_classifier(SIZE)
    found, _ = restored.probabilities(make_images(), 2, "images")
    other, *folds = (model.predict_on_batch(make_images()) for model in models.values())
    assert found == pytest.approx((other + np.mean(folds, axis=0)) / 2, abs=1e-6)
    assert pretrained.load_classifier(24)[0].parts[0].classifiers[0].model.input_shape == (None, 24, 24, 3)


@pytest.mark.parametrize("missing", ["segnet.json", SEGNET_WEIGHTS])
def test_missing_file_is_named(missing: str, folder: Path) -> None:
    pack_unet(folder)
    (folder / missing).unlink()
    with pytest.raises(InputError, match=f"{missing} is missing; restore it from the repository"):
        pretrained.read(pretrained.SEGNET)


def test_changed_weights_are_refused(folder: Path) -> None:
    pack_unet(folder)
    weights = folder / SEGNET_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=rf"{weights.name} has SHA-256 \w{{64}}, expected \w{{64}}"):
        pretrained.load_segnet(SIZE)


@pytest.mark.parametrize(("network", "files"), [(pretrained.SEGNET, 1), (pretrained.CLASSIFIER, 5)])
def test_files_of_the_repository_match_their_checksums(network: str, files: int) -> None:
    description, weights = pretrained.read(network)
    assert len(weights) == files
    assert set(pretrained.FOLDER.glob(f"{network}*.h5")) == set(weights)
    if network == pretrained.SEGNET:
        assert Design(**description["design"]).network in segmentation.NETWORKS
        assert 0 < description["threshold"] < 1
    else:
        assert "roi" in description
        for part in description["parts"]:
            assert {"backbone", "scaling", "input_size", "views", "members"} <= part.keys()
            assert Calibration(**part["calibration"]).temperature > 0


@pytest.mark.parametrize(
    "name",
    [
        *("ISIC_0000013", "isic_0000013", "ISIC_0000013.jpg", "ISIC_0000013.JPEG", "ISIC_0000013_downsampled"),
        *("ISIC_0000013_downsampled.jpg", "ISIC_0000013.png", "more_ISIC_0000013"),
    ],
)
def test_image_has_one_hash_in_all_challenges(name: str) -> None:
    assert pretrained.hash_id(name) == "bce2b43ded1894b0"


def test_other_ids_have_other_hashes() -> None:
    names = ("ISIC_0000013", "ISIC_0000013.2", "ISIC_0000014", "ISIC_00000130", "caf\udce9")
    assert len({pretrained.hash_id(name) for name in names}) == len(names)


@pytest.mark.parametrize(("network", "ham10000"), [(pretrained.SEGNET, 0), (pretrained.CLASSIFIER, 5109)])
def test_networks_of_the_repository_list_the_images_they_were_trained_on(network: str, ham10000: int) -> None:
    description, _ = pretrained.read(network)
    hashes, extra = description["training_ids"], description.get("extra_training_ids", [])
    assert hashes == sorted(set(hashes)) and len(hashes) == 1976  # 2000 official ones without 24 duplicates
    assert len(extra) == ham10000 and not set(hashes) & set(extra)
    assert pretrained.hash_id("ISIC_0000000") in hashes  # of the official train split
    assert pretrained.hash_id("ISIC_0001769") not in hashes  # of validation
    assert not {pretrained.hash_id(image_id) for image_id in challenge_2017.KNOWN_DUPLICATES} & set(hashes)


def test_network_without_a_list_of_its_training_images_is_refused(folder: Path) -> None:
    pack_unet(folder)
    path = folder / "segnet.json"
    description = json.loads(path.read_text())
    del description["training_ids"]
    path.write_text(json.dumps(description))
    with pytest.raises(InputError, match=r"segnet\.json does not list the training images; restore it"):
        pretrained.read(pretrained.SEGNET)


def test_images_that_were_trained_on_are_found_in_every_split_but_train(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path, contract.PREPROCESSING, {})
    for split, ids in {"train": ["a", "b"], "val": ["B", "c", "a_downsampled"], "test": ["d"]}.items():
        store.save("ids", np.array(ids), split=split)
        store.save("source", np.arange(len(ids)), split=split)
        store.save("origin", np.zeros(len(ids), int), split=split)
    caplog.set_level("INFO")
    assert pretrained.find_seen(store, pretrained.hash_training_ids(store, extra=False)) == {
        "val": ["B", "a_downsampled"]
    }
    (line,) = caplog.messages
    assert line.startswith("2 of 3 images of validation were used to train the pretrained networks")


def test_augmented_copies_are_no_training_images_of_their_own(tmp_path: Path) -> None:
    store = Store(tmp_path, contract.PREPROCESSING, {})
    store.save("ids", np.array(["b", "a", "a"]), split="train")
    store.save("source", np.array([0, 1, 1]), split="train")
    store.save("origin", np.zeros(3, int), split="train")
    assert pretrained.hash_training_ids(store, extra=False) == sorted(map(pretrained.hash_id, "ab"))
